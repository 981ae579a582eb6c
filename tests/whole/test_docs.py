"""What docs and comments point to exists: files by their paths, and names of this package by theirs."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("", "dpofast", "csrc", "tests", "bench", "docs", "examples", "build")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SOURCES = sorted(
    path
    for folder in ("dpofast", "kernels", "csrc", "tests", "bench", "examples")
    for ending in ("py", "h", "cpp", "cu", "cuh")
    for path in (ROOT / folder).rglob(f"*.{ending}")
    if path != Path(__file__)
)
A_PATH = re.compile(r"(?<![\w/.:<-])((?:[\w*-]+/)+[\w*{},.-]*\.(?:py|h|cpp|cu|cuh|md|json|sh|txt))(?![\w/])")
A_NAME = re.compile(r"`(dpofast(?:\.\w+)+)`")
OURS = tuple(
    f"{folder}/"
    for folder in (
        "dpofast",
        "csrc",
        "kernels",
        "tests",
        "bench",
        "docs",
        "examples",
        "backends",
        "integrations",
        "cpu",
    )
)
WRITTEN_BY_THE_BUILD = "dpofast/_build_notes.json"


def names_of(pattern: re.Pattern, paths: list[Path]) -> list[tuple[str, str]]:
    found = {
        (path.relative_to(ROOT).as_posix(), m.group(1)) for path in paths for m in pattern.finditer(path.read_text())
    }
    return sorted(found)


def exists(path: str) -> bool:
    head, brace, tail = path.partition("{")
    if brace:
        middle, _, rest = tail.partition("}")
        return all(exists(head + name + rest) for name in middle.split(","))
    return any(next((ROOT / folder).glob(path), None) for folder in FOLDERS if (ROOT / folder).is_dir())


def test_there_are_some():
    assert len(names_of(A_PATH, PAGES)) > 20 and len(names_of(A_NAME, SOURCES)) > 20


def test_every_file_that_is_mentioned_exists():
    mentioned = [found for found in names_of(A_PATH, PAGES + SOURCES) if found[1].startswith(OURS)]
    assert not [found for found in mentioned if found[1] != WRITTEN_BY_THE_BUILD and not exists(found[1])]


@pytest.mark.parametrize("name", sorted({name for _, name in names_of(A_NAME, PAGES + SOURCES)}))
def test_every_name_that_is_mentioned_exists(name):
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("dpofast"):
                pytest.skip(f"{error.name} is not installed")
            continue
        for part in parts[i:]:
            assert hasattr(found, part), f"{name}: {found} has no {part}"
            found = getattr(found, part)
        return
    raise AssertionError(f"{name} is not there")
