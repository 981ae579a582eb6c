"""A small model's own repetition loops are rejected, and what people wrote in their place is chosen.

The model writes on, greedily, from the first words of the documentation of ruff's rules. Where it falls into a loop,
its continuation is the rejected answer, and the documentation's own next words are the chosen one. The rate of loops is
then measured on the documentation of other families of rules, beside what would make it fall for the wrong reason:
shorter continuations, or a model that has forgotten how such text goes on.
"""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
from collections.abc import Sequence

from results import Figure, Report, preferred
from workbench import Row, Workbench, need

from dpofast.demo import data as ruff_data

PROMPT, TOKENS = 16, 64  # tokens of a prompt, and that the model writes
TRAIN, HELD_OUT = 384, 128  # prompts
LAYERS = 8  # the last ones have the LoRA: nothing is computed backward below them
OPTIONS = {
    "loss_type": ["sigmoid", "sft"],
    "loss_weights": [1.0, 0.1],
    "beta": 0.1,
    "learning_rate": 5e-4,
    "batch_size": 8,
    "epochs": 4.0,
}
LONGEST_PERIOD, REPEATS, FEWEST = 16, 3, 12  # of a loop: tokens of its period, how often it comes, tokens in all


def loop_period(ids: Sequence[int]) -> int:
    """The period of the loop that ``ids`` end in, or 0.

    They do if their last tokens are some p tokens, p <= 16, at least three times over, and 12 tokens at least: a comma
    three times is no loop. What came before the loop does not matter, for a loop never ends by itself.
    """
    for period in range(1, LONGEST_PERIOD + 1):
        span = max(REPEATS * period, FEWEST)
        tail = ids[-span:]
        if len(tail) == span and all(a == b for a, b in zip(tail, tail[period:])):
            return period
    return 0


def repeated(ids: Sequence[int], n: int = 4) -> float:
    """The share of the runs of n tokens that were there before: loops, but near-loops as well."""
    runs = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def texts() -> list[tuple[str, str]]:
    """``(family, text)`` of each of ruff's rules: its documentation without headings."""
    need(importlib.util.find_spec("ruff"), "ruff", f"pip install ruff=={ruff_data.RUFF_VERSION}")
    command = [ruff_data.ruff_binary(), "rule", "--all", "--output-format", "json"]
    rules = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return [(rule["linter"] or "rules without a family", _prose(rule["explanation"])) for rule in rules]


def _prose(explanation: str) -> str:
    parts = [ruff_data.section(explanation, title) for title in ("What it does", "Why is this bad\\?", "Examples?")]
    return "\n\n".join(part.strip() for part in parts if part)


def prompts(found: Sequence[tuple[str, str]], bench: Workbench) -> list[Row]:
    """A row for each text that is long enough: its first tokens, what follows them, its family."""
    rows = []
    for family, text in found:
        ids = bench.tokenizer(text)["input_ids"]
        prompt = bench.tokenizer.decode(ids[:PROMPT])
        if len(ids) > PROMPT + TOKENS and text.startswith(prompt):
            rows.append({"prompt": prompt, "completion": text[len(prompt) :], "label": True, "group": family})
    return rows


def looped(rows: Sequence[Row], written: Sequence[Sequence[int]], bench: Workbench) -> list[Row]:
    """A pair for each continuation that ends in a loop: the text's own next words, and the loop."""
    return [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": rejected, "group": row["group"]}
        for row, ids in zip(rows, written, strict=True)
        if loop_period(ids) and (rejected := bench.tokenizer.decode(ids)).strip()
    ]


def figures(
    rows: Sequence[Row], written: Sequence[Sequence[Sequence[int]]], real: Sequence[Sequence[Row]]
) -> list[Figure]:
    """What the continuations before and after are like, and how likely the real text is to either model."""
    groups = [row["group"] for row in rows]
    before, after = written
    measures = [
        ("continuations that end in a loop", lambda ids: float(loop_period(ids) > 0), "share"),
        ("runs of 4 tokens that were there before", repeated, "share"),
        (f"continuations that end before {TOKENS} tokens", lambda ids: float(len(ids) < TOKENS), "share"),
        ("length of a continuation", lambda ids: float(len(ids)), "tokens"),
    ]
    found = [Figure(name, [*map(of, before)], [*map(of, after)], groups, unit=unit) for name, of, unit in measures]
    old, new = ([line["logps"][0] / line["lengths"][0] for line in lines] for lines in real)
    return [*found, Figure("log-prob of a token of the real text", old, new, groups, unit="nats")]


def main(argv: Sequence[str] | None = None) -> Report:
    # both answers are cut before their ends, so that nothing is learnt of when to end
    length = PROMPT + TOKENS - 4
    bench = Workbench("own-failures", __doc__.partition("\n")[0], argv, max_length=length, last_layers=LAYERS)
    with bench.phase("reading the documentation"):
        train, held_out = bench.split(prompts(texts(), bench), 0.35)
        choice = random.Random(bench.args.seed)
        train, held_out = (choice.sample(x, min(n, len(x))) for x, n in ((train, TRAIN), (held_out, HELD_OUT)))
    own = looped(train, bench.continuations(bench.model, [row["prompt"] for row in train], TOKENS, rows=128), bench)
    if not own:
        raise SystemExit(f"None of {len(train)} continuations ends in a loop: there is nothing to train on")
    openings = [row["prompt"] for row in held_out]
    before = bench.continuations(bench.model, openings, TOKENS, rows=128)
    pairs = looped(held_out, before, bench)
    scores = [(bench.score(bench.model, held_out, "scoring"), bench.score(bench.model, pairs, "scoring"))]
    policy = bench.train(own, **OPTIONS)
    after = bench.continuations(policy, openings, TOKENS, rows=128)
    scores.append((bench.score(policy, held_out, "scoring"), bench.score(policy, pairs, "scoring")))

    report = Report(bench, "A model's own repetition loops", "family of rules", ["ruff"])
    report.figures += figures(held_out, (before, after), [real for real, _ in scores])
    (old, old_ties), (new, new_ties) = (preferred(lines) for _, lines in scores)
    groups = [row["group"] for row in pairs]
    report.figures.append(Figure("real text preferred to the loop", old, new, groups, 0.5, (old_ties, new_ties)))
    report.notes += [
        f"{len(own)} of {len(train)} continuations of training prompts ended in a loop and became pairs. A loop is an "
        f"end of at least {FEWEST} tokens that says the same up to {LONGEST_PERIOD} tokens at least {REPEATS} times. "
        f"Continuations are greedy, of at most {TOKENS} tokens. The last row is of the held-out prompts on which the "
        "model looped before.",
        "A rate of loops falls for the wrong reason if continuations end early, if loops make room for repetition that "
        "is not periodic, or if the model forgets the text itself: the other rows are there to see that.",
    ]
    report.write()
    return report


if __name__ == "__main__":
    main()
