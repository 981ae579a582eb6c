"""The shape of the sources: short functions, few parameters, no circles, a schedule's name in its planners only."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dpofast"
LINES, PARAMETERS = 50, 8
# Signatures that are public, or that mirror another library's; ops' schemas, which hold tensors and plain numbers only.
WIDE = {
    "functional.py": {"linear_dpo_loss", "dpo_loss"},
    "integrations/liger.py": {"__init__", "forward"},
    "integrations/models/calls.py": {"model_dpo_loss", "model_list_loss"},
    "integrations/trl.py": {"apply"},
    "losses.py": {"preference_loss"},
    "modules.py": {"__init__"},
    "plan/report.py": {"plan"},
    "primitive.py": {"linear_logprob", "logprob"},
    "reference.py": {"linear_logprob"},
    "sequence_losses.py": {"linear_list_loss", "linear_unpaired_loss"},
}
OPS, OP_PARAMETERS = "_ops.py", 13
SCHEDULES = ("score", "jacobian", "cached", "mixed", "filtered", "recompute", "recompute-split")
LONGEST_CPP = 80

SOURCES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
FUNCTIONS = [
    (name, node) for name, tree in SOURCES.items() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
]


def body_lines(node: ast.FunctionDef) -> int:
    """Lines of a function without its signature and docstring."""
    documented = ast.get_docstring(node) is not None and len(node.body) > 1
    return node.end_lineno - node.body[int(documented)].lineno + 1


def test_functions_are_short():
    assert len(FUNCTIONS) > 300
    assert not [(name, node.name) for name, node in FUNCTIONS if body_lines(node) > LINES]


def test_parameters_are_few():
    def count(node: ast.FunctionDef) -> int:
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        return len([name for name in names if name not in ("self", "cls", "ctx")])

    allowed = {OPS: OP_PARAMETERS}
    wide = [(n, f.name) for n, f in FUNCTIONS if count(f) > allowed.get(n, PARAMETERS)]
    assert not [(name, function) for name, function in wide if function not in WIDE.get(name, ())]


def imports(name: str) -> set[str]:
    """Modules of the package that a file names, types included; names of the package itself are not modules."""
    modules = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in SOURCES}
    found = set()
    for node in ast.walk(SOURCES[name]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dpofast"):
            inside = node.module.removeprefix("dpofast").lstrip(".")
            for alias in node.names:
                full = f"{inside}.{alias.name}".lstrip(".")
                found |= {modules[m] for m in (full, inside) if m in modules and (m == full or full not in modules)}
    return found - {"__init__.py"}


def test_no_import_is_part_of_a_circle():
    graph = {name: imports(name) for name in SOURCES}
    assert sum(map(len, graph.values())) > 100
    while True:
        leaves = {name for name, needs in graph.items() if not needs & set(graph)}
        if not leaves:
            break
        graph = {name: needs for name, needs in graph.items() if name not in leaves}
    assert not graph


def test_a_schedules_name_is_written_by_planners_only():
    strings = {
        (name, node.value)
        for name, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in SCHEDULES
    }
    keys = {("backends/cpu.py", "jacobian"), ("cli.py", "score")}  # an argument of the kernels, a command: no schedules
    assert {name for name, _ in strings - keys} == {"plan/schedule.py", "plan/cpu.py", "plan/tiled.py"}


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").rglob("*.*")), ids=lambda path: path.name)
def test_functions_in_cpp_are_short(path):
    """A function begins at a line that ends in a brace, beside which nothing of a class or a namespace stands."""
    lines = [re.sub(r'"[^"]*"|//.*', "", line) for line in path.read_text().splitlines()]
    opened, long = [], []
    for number, line in enumerate(lines):
        for character in line:
            if character == "{":
                opened.append(number)
            elif character == "}" and opened:
                first = opened.pop()
                is_type = re.search(
                    r"\b(namespace|struct|class|enum)\b", " ".join(lines[max(0, first - 1) : first + 1])
                )
                if number - first > LONGEST_CPP and not is_type:
                    long.append(f"{first + 1}: {number - first} lines")
    assert not opened and not long
