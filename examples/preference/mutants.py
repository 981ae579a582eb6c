"""Programs that are one edit away from one that passes its tests, and the running of those tests."""

from __future__ import annotations

import ast
import importlib.util
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

BINARY = {"+": "-", "-": "+", "*": "+", "/": "*", "//": "/", "%": "//", "**": "*"}
COMPARISONS = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "in": "not in", "not in": "in", "is": "is not",
    "is not": "is",
}  # fmt: skip
NAMES = {
    "min": "max", "max": "min", "any": "all", "all": "any", "lower": "upper", "upper": "lower",
    "startswith": "endswith", "endswith": "startswith", "isupper": "islower", "islower": "isupper",
    "ceil": "floor", "floor": "ceil",
}  # fmt: skip
SYMBOLS = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%", ast.Pow: "**",
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=", ast.In: "in",
    ast.NotIn: "not in", ast.Is: "is", ast.IsNot: "is not", ast.And: "and", ast.Or: "or",
}  # fmt: skip
SECONDS = 2.0
PRELUDE = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"  # 1 GiB


class Edit(NamedTuple):
    """Put ``text`` where the source has the bytes from ``start`` to ``end``."""

    kind: str
    start: int
    end: int
    text: str

    def of(self, source: str) -> str:
        raw = source.encode()
        return (raw[: self.start] + self.text.encode() + raw[self.end :]).decode()


class Problem(NamedTuple):
    """A function's head and docstring, a body that passes the tests, and the tests, which define ``check``."""

    name: str
    prompt: str
    solution: str
    test: str
    entry_point: str


class _Source:
    """A program's text with the places of its syntax, in bytes."""

    def __init__(self, text: str) -> None:
        self.raw = text.encode()
        self.lines = [0]
        for line in self.raw.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))

    def start(self, node: ast.AST) -> int:
        return self.lines[node.lineno - 1] + node.col_offset

    def end(self, node: ast.AST) -> int:
        return self.lines[node.end_lineno - 1] + node.end_col_offset

    def between(self, left: ast.AST, right: ast.AST, old: str, kind: str, new: str) -> Iterator[Edit]:
        """The edit of an operator that stands between two operands."""
        first, last = self.end(left), self.start(right)
        at = self.raw.find(old.encode(), first, last)
        if at >= 0 and b"#" not in self.raw[first:last]:
            yield Edit(kind, at, at + len(old), new)


def edits(source: str) -> list[Edit]:
    """All single edits of the kinds that are known here."""
    text = _Source(source)
    return [edit for node in ast.walk(ast.parse(source)) for edit in _edits_of(text, node)]


def _edits_of(text: _Source, node: ast.AST) -> Iterator[Edit]:
    match node:
        case ast.BinOp() if type(node.op) in SYMBOLS:
            old = SYMBOLS[type(node.op)]
            yield from text.between(node.left, node.right, old, "operator", BINARY[old])
        case ast.AugAssign() if type(node.op) in SYMBOLS:
            old = SYMBOLS[type(node.op)]
            yield from text.between(node.target, node.value, f"{old}=", "operator", f"{BINARY[old]}=")
        case ast.Compare():
            for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators):
                old = SYMBOLS[type(op)]
                yield from text.between(left, right, old, "comparison", COMPARISONS[old])
        case ast.BoolOp():
            old = SYMBOLS[type(node.op)]
            for left, right in zip(node.values, node.values[1:]):
                yield from text.between(left, right, old, "and, or, not", {"and": "or", "or": "and"}[old])
        case ast.UnaryOp(op=ast.Not()):
            yield Edit("and, or, not", text.start(node), text.start(node.operand), "")
        case ast.Constant(value=bool()):
            yield Edit("constant", text.start(node), text.end(node), str(not node.value))
        case ast.Constant(value=int()):
            for value in (node.value + 1, node.value - 1):
                if value >= 0:
                    yield Edit("constant", text.start(node), text.end(node), str(value))
        case ast.Call(func=ast.Name(id="range")) if isinstance(node.args[-1], (ast.Name, ast.Call, ast.Attribute)):
            yield from (Edit("bound", (at := text.end(node.args[-1])), at, end) for end in (" - 1", " + 1"))
        case ast.Slice(upper=ast.Name() | ast.Call()):
            yield from (Edit("bound", (at := text.end(node.upper)), at, end) for end in (" - 1", " + 1"))
        case ast.Name() if node.id in NAMES:
            yield Edit("name", text.start(node), text.end(node), NAMES[node.id])
        case ast.Attribute() if node.attr in NAMES:
            yield Edit("name", text.end(node) - len(node.attr), text.end(node), NAMES[node.attr])


def outcome(problem: Problem, solution: str, seconds: float = SECONDS) -> str:
    """``"passes"``, ``"fails"`` or ``"does not end"``: the tests in a process of its own, in an empty folder."""
    program = f"{problem.prompt}{solution}\n{problem.test}\ncheck({problem.entry_point})\n"
    limit = PRELUDE if importlib.util.find_spec("resource") else ""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", limit + program],
                stdin=subprocess.DEVNULL, capture_output=True, cwd=folder, timeout=seconds,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return "does not end"
    return "fails" if done.returncode else "passes"


def mutants(problem: Problem, count: int, seed: int) -> list[tuple[str, str]]:
    """Up to ``count`` bodies that fail the tests, each with the kind of its edit; none where the solution fails too.

    Kinds take turns, in an order of the seed. A body that does not end in time is left out: a slower machine may not
    tell it from one that passes.
    """
    if outcome(problem, problem.solution) != "passes":
        return []
    whole, head = problem.prompt + problem.solution, len(problem.prompt.encode())
    candidates = [edit for edit in edits(whole) if edit.start >= head]
    random.Random(f"{seed} {problem.name}").shuffle(candidates)
    seen: Counter[str] = Counter()
    turns = []
    for edit in candidates:
        turns.append((seen[edit.kind], edit))
        seen[edit.kind] += 1
    found: list[tuple[str, str]] = []
    for _, edit in sorted(turns, key=lambda turn: turn[0]):
        if len(found) == count:
            break
        body = edit.of(whole)[len(problem.prompt) :]
        if outcome(problem, body) == "fails":
            found.append((body, edit.kind))
    return found


def all_mutants(
    problems: Sequence[Problem], counts: Mapping[str, int], seed: int, threads: int
) -> dict[str, list[tuple[str, str]]]:
    """`mutants` of each problem, by its name; ``counts`` are how many."""
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda problem: mutants(problem, counts[problem.name], seed), problems)
        return {problem.name: each for problem, each in zip(problems, found)}
