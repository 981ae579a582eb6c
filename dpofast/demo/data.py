"""The demo's data: real preference pairs out of the documentation of ruff's own rules, each one verified.

A rule's text shows code that breaks it ("Example") and the same code done right ("Use instead"). The
first is the rejected answer, the second the chosen one; the pair counts only if running the rule agrees.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpofast.data import Encoded

RUFF_VERSION = "0.17.6"  # rule texts change between releases, and the pairs with them
MAX_PROMPT, MAX_ANSWER = 64, 28  # tokens; longer pairs are left out, for the sake of two minutes
HELD_OUT_SHARE = 0.3  # of the pairs: enough that one standard error is 4 points

SETTINGS = ((".py", "py314"), (".pyi", "py314"), (".py", "py310"), (".py", "py38"))
"""File ending and target version, tried in turn: some rules look only at stubs, some only at old targets."""

_FENCE = re.compile(r"^(`{3,})[^\n]*\n(.*?)^\1\s*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Pair:
    """One question and two answers to it, as text."""

    rule: str
    family: str
    task: str
    chosen: str
    rejected: str


def section(explanation: str, title: str) -> str | None:
    """The text under ``## title``, up to the next heading; None where there is no such heading."""
    # the end is sought outside of code, where "## " may open a comment
    match = re.search(rf"^## {title}\s*?\n", explanation, re.MULTILINE)
    if match is None:
        return None
    rest = explanation[match.end() :]
    code = [m.span() for m in _FENCE.finditer(rest)]
    for heading in re.finditer(r"^## ", rest, re.MULTILINE):
        if not any(start <= heading.start() < end for start, end in code):
            return rest[: heading.start()]
    return rest


def split_rule(rule: dict[str, Any]) -> Pair | None:
    """The pair in one entry of ``ruff rule --all``, or None if its text does not hold one."""
    what = section(rule["explanation"], "What it does")
    example = section(rule["explanation"], "Examples?")
    if what is None or example is None or "Removed" in rule["status"]:
        return None
    before, found, after = example.partition("Use instead")
    rejected, chosen = _FENCE.search(before), _FENCE.search(after)
    if not found or rejected is None or chosen is None:
        return None
    return Pair(
        rule=rule["name"],
        family=rule["linter"] or "rules without a family",
        task=" ".join(what.split()),
        chosen=chosen[2],
        rejected=rejected[2],
    )


def ruff_binary() -> str:
    """The ruff of this Python environment, which need not be the one on PATH."""
    from ruff import find_ruff_bin

    return find_ruff_bin()


def documented_pairs(ruff: str) -> tuple[list[Pair], int]:
    """All pairs in the documentation of ``ruff``, and the number of rules it has."""
    listing = subprocess.run([ruff, "rule", "--all", "--output-format", "json"], capture_output=True, check=True)
    rules = json.loads(listing.stdout)
    pairs = (split_rule(rule) for rule in rules)
    return [pair for pair in pairs if pair is not None], len(rules)


def _agreeing(ruff: str, pairs: Sequence[Pair], ending: str, target: str) -> list[bool]:
    """Tells of each pair whether its rule fires on the rejected snippet and is silent on the chosen one.

    A chosen snippet that does not parse is refused: no rule fires on it, for the wrong reason.
    """
    rules = {pair.rule for pair in pairs}
    with tempfile.TemporaryDirectory() as folder:
        for i, pair in enumerate(pairs):  # a folder each: some rules look at a file's neighbours
            Path(folder, str(i)).mkdir()
            Path(folder, str(i), f"rejected{ending}").write_text(pair.rejected, encoding="utf-8")
            Path(folder, str(i), f"chosen{ending}").write_text(pair.chosen, encoding="utf-8")
        command = [ruff, "check", "--isolated", "--no-cache", "--preview", "--select", ",".join(sorted(rules))]
        command += ["--target-version", target, "--output-format", "json", "."]
        done = subprocess.run(command, capture_output=True, cwd=folder)
        if done.returncode not in (0, 1):
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.decode(errors='replace')[-2000:]}")
        found: set[tuple[int, str]] = set()  # pairs, and which of their snippets has something of concern
        for diagnostic in json.loads(done.stdout):
            path, name = Path(diagnostic["filename"]), diagnostic["name"]
            i = int(path.parent.name)
            if name == pairs[i].rule or (path.stem == "chosen" and name not in rules):  # not in rules: no Python
                found.add((i, path.stem))
        return [(i, "rejected") in found and (i, "chosen") not in found for i in range(len(pairs))]


def verified_pairs(ruff: str, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs on which running ruff agrees, under one of `SETTINGS`, in the same order.

    All pairs are checked in one go. Of two rules that exclude each other ruff drops one, with a warning; that one is
    met in the next round, when the pair of the other has passed.
    """
    passed: set[Pair] = set()
    for ending, target in SETTINGS:
        left = [pair for pair in pairs if pair not in passed]
        if left:
            passed.update(pair for pair, agrees in zip(left, _agreeing(ruff, left, ending, target)) if agrees)
    return [pair for pair in pairs if pair in passed]


def split_by_family(pairs: Sequence[Any], share: float, seed: int) -> tuple[list[Any], list[Any]]:
    """``(train, held_out)``: whole families, drawn until about ``share`` of the pairs is held out.

    Rules of one family resemble each other, so a random choice among *pairs* would test memory. A family
    that would take the held-out part beyond 1.25 times ``share`` is passed over.
    """
    sizes = Counter(pair.family for pair in pairs)
    order = sorted(sizes)
    random.Random(seed).shuffle(order)
    held: set[str] = set()
    total = 0
    for family in order:
        if total < share * len(pairs) and total + sizes[family] <= 1.25 * share * len(pairs):
            held.add(family)
            total += sizes[family]
    train = [pair for pair in pairs if pair.family not in held]
    return train, [pair for pair in pairs if pair.family in held]


def without_copies(train: Sequence[Pair], held_out: Sequence[Pair]) -> list[Pair]:
    """``train`` without the pairs whose code is also held out: rules of two families may share an example."""
    seen = {text.strip() for pair in held_out for text in (pair.chosen, pair.rejected)}
    return [pair for pair in train if pair.chosen.strip() not in seen and pair.rejected.strip() not in seen]


def rows_of(pairs: Sequence[Pair], tokenizer: Any) -> list[dict[str, str]]:
    """The pairs as the model is asked, as `dpofast.data` reads them: what the rule looks for, and code that passes it.

    The prompt ends inside an opened code fence, so that an answer is code from its first token on.
    """
    rows = []
    for pair in pairs:
        messages = [
            {"role": "system", "content": "You write Python."},
            {"role": "user", "content": f"Write code that passes the lint rule {pair.rule}. {pair.task}"},
        ]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + "```python\n"
        chosen, rejected = (code.strip("\n") + "\n```" for code in (pair.chosen, pair.rejected))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "family": pair.family,
                     "rule": pair.rule})  # fmt: skip
    return rows


def is_short(pair: Encoded) -> bool:
    """Whether the prompt and both answers have few enough tokens."""
    return len(pair.prompt) <= MAX_PROMPT and max(len(answer.ids) for answer in pair.answers) <= MAX_ANSWER
