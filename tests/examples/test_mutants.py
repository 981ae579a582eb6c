"""Mutants are one edit away from their program, and fail tests that it passes."""

from __future__ import annotations

import ast

import mutants
import pytest
from mutants import Problem

SOURCE = '''
def f(numbers, limit):
    """Größe: 1 < 2 and not 3"""
    total = 0
    for i in range(len(numbers)):
        if not (numbers[i]) < limit and numbers[i] not in [3, 4]:
            total += max(numbers[i] * 2, i // 2)
    return total - 1 if total is not None else len(numbers[: len(numbers)]) % 7
'''
ADD = Problem(
    "add",
    'def add(a, b):\n    """The sum: 1 + 1 is 2."""\n',
    "    total = a + b\n    return total\n",
    "def check(f):\n    assert f(2, 3) == 5 and f(-1, 1) == 0\n",
    "add",
)


def sizes(tree: ast.AST) -> int:
    return sum(1 for _ in ast.walk(tree))


def test_every_edit_makes_another_program_that_differs_in_one_place():
    found = mutants.edits(SOURCE)
    assert {edit.kind for edit in found} == {"operator", "comparison", "and, or, not", "constant", "bound", "name"}
    programs = [edit.of(SOURCE) for edit in found]
    assert len(set(programs)) == len(programs)
    whole = ast.parse(SOURCE)
    for edit, program in zip(found, programs):
        mutant = ast.parse(program)
        assert ast.dump(mutant) != ast.dump(whole), edit
        assert abs(sizes(mutant) - sizes(whole)) <= 3, edit  # of a bound, an operation more; of a `not`, one less
        assert len(program.splitlines()) == len(SOURCE.splitlines())
        changed = [a != b for a, b in zip(program.splitlines(), SOURCE.splitlines())]
        assert sum(changed) == 1, edit


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = (a) + (b)", {"x = (a) - (b)"}),
        ("x = a ** b", {"x = a * b"}),
        ("x -= y", {"x += y"}),
        ("a < b <= c", {"a <= b <= c", "a < b < c"}),
        ("a is not b", {"a is b"}),
        ("a or b or c", {"a and b or c", "a or b and c"}),
        ("not  a", {"a"}),
        ("x = 0", {"x = 1"}),
        ("x = True", {"x = False"}),
        ("range(1 + n)", {"range(1 - n)", "range(0 + n)", "range(2 + n)"}),
        ("range(n)", {"range(n - 1)", "range(n + 1)"}),
        ("x[a:b]", {"x[a:b - 1]", "x[a:b + 1]"}),
        ("s.lower()", {"s.upper()"}),
        ('"é" + x', {'"é" - x'}),
        ("(a  # + here\n + b)", set()),
        ("x = 'a'", set()),
    ],
)
def test_edits_are_these(source, expected):
    assert {edit.of(source) for edit in mutants.edits(source)} == expected


def test_a_body_passes_fails_or_does_not_end():
    assert mutants.outcome(ADD, ADD.solution) == "passes"
    assert mutants.outcome(ADD, "    return a - b\n") == "fails"
    assert mutants.outcome(ADD, "    return a +\n") == "fails"
    assert mutants.outcome(ADD, "    while True: pass\n", seconds=0.5) == "does not end"


def test_mutants_are_of_the_body_alone_and_fail():
    found = mutants.mutants(ADD, 9, seed=0)
    assert found == [("    total = a - b\n    return total\n", "operator")]
    assert mutants.mutants(ADD, 0, seed=0) == []


def test_a_problem_whose_own_solution_fails_has_no_mutants():
    assert mutants.mutants(ADD._replace(solution="    return a - b\n"), 9, seed=0) == []


def test_edits_that_the_tests_do_not_notice_are_no_mutants():
    loose = ADD._replace(solution="    if a > 99:\n        return 0\n    return a + b\n")
    found = [body for body, _ in mutants.mutants(loose, 9, seed=0)]
    assert "    if a <= 99:\n        return 0\n    return a + b\n" not in found
    assert "    if a > 99:\n        return 0\n    return a - b\n" in found
    assert not any("> 98" in body or "> 100" in body or ">= 99" in body or "return 1" in body for body in found)


def test_mutants_of_several_problems_are_those_of_each():
    problems = [ADD, ADD._replace(name="other", solution="    return a + b + 0\n")]
    found = mutants.all_mutants(problems, {"add": 1, "other": 3}, seed=1, threads=2)
    assert found == {"add": mutants.mutants(ADD, 1, 1), "other": mutants.mutants(problems[1], 3, 1)}
    assert len(found["add"]) == 1 and len(found["other"]) > 1
