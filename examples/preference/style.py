"""Verses are rewritten in the English of 1611: the King James Version's wording is preferred to a modern one.

The model is shown a verse of the World English Bible and asked for it in the other's English. Chosen is the King James
Version's own verse, and rejected is the verse that it was shown, which an untrained model likes best: to copy. Whole
books are held out. Two trainings differ in one thing, an SFT term beside DPO's loss, which keeps the log-prob of the
chosen verses from falling.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import bibles
from bibles import Verse
from results import Figure, Report, preferred
from workbench import Row, Workbench

HELD_OUT = 0.25
TRAIN, TESTS, WRITTEN = 64, 36, 18  # pairs, held-out pairs, and held-out verses that are rewritten
FEWEST, MOST = 8, 20  # words of a verse in either Bible
SYSTEM = "You rewrite verses."
REQUEST = "Write this in the English of the King James Bible: "
OLD = re.compile(
    r"\b((?i:thou|thee|thy|thine|thyself|ye|hath|hast|doth|dost|saith|shalt|wilt|unto|hither|thither|whither|thereof|"
    r"wherefore|yea|nay|verily|behold|lo|spake|begat|brethren)|(?!teeth|\w+tieth)[a-z]{2,}eth)\b"
)
"""Words that a reader of today knows to be old."""
TRAININGS: dict[str, dict[str, Any]] = {
    "DPO": {"loss_type": "sigmoid"},
    "DPO + SFT": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]},
}
OPTIONS: dict[str, Any] = {"batch_size": 8, "learning_rate": 1e-3}
LAYERS = 10  # the last ones have the LoRA


def comparable(verse: Verse) -> bool:
    """Whether the two differ in style: as long, neither too long, and without God's name, which is LORD or Yahweh."""
    lengths = [len(text.split()) for text in verse[1:]]
    named = re.search("Yahweh|LORD|JEHOVAH", verse.king_james + verse.english)
    return not named and FEWEST <= min(lengths) and max(lengths) <= MOST and verse.king_james != verse.english


def prompt(verse: Verse, tokenizer: Any, shown: bool = True) -> str:
    """The request; without the verse if it is not ``shown``."""
    request = REQUEST + verse.english if shown else "Quote a verse of the King James Bible."
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": request}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def pair(verse: Verse, tokenizer: Any, shown: bool = True) -> Row:
    texts = {"prompt": prompt(verse, tokenizer, shown), "chosen": verse.king_james, "rejected": verse.english}
    return texts | {"group": verse.place[0]}


def tests_of(verses: Sequence[Verse], tokenizer: Any) -> list[Row]:
    """Each verse as a pair, with another old verse as a third answer; behind these each as a pair, not shown."""
    others = [*verses[1:], *verses[:1]]
    shown = [
        row | {"rejected": [row["rejected"], other.king_james]}
        for row, other in zip((pair(verse, tokenizer) for verse in verses), others)
    ]
    return shown + [pair(verse, tokenizer, shown=False) for verse in verses]


def drawn(verses: Sequence[Verse], bench: Workbench) -> tuple[list[Verse], list[Verse]]:
    """``(train, held_out)`` of the verses that compare, of different books, and of different wording."""
    rows = [{"group": verse.place[0], "verse": verse} for verse in verses if comparable(verse)]
    train, held_out = ([row["verse"] for row in part] for part in bench.split(rows, HELD_OUT))
    known = {text for verse in held_out for text in verse[1:]}
    train = [verse for verse in train if not known & set(verse[1:])]  # Kings and Chronicles tell the same, for one
    choice = random.Random(bench.args.seed)
    return tuple(choice.sample(part, min(n, len(part))) for part, n in ((train, TRAIN), (held_out, TESTS)))


def by_old_words(verses: Sequence[Verse]) -> tuple[list[float], int]:
    """Which verses somebody gets right who counts `OLD` words, and how many have as many in both."""
    counts = [[len(OLD.findall(text)) for text in verse[1:]] for verse in verses]
    return [float(old > new) for old, new in counts], sum(old == new for old, new in counts)


def likeness(text: str, other: str) -> float:
    """F1 of two texts' words, as bags: 1 if they have the same words."""
    a, b = (Counter(re.findall("[a-z']+", x.lower())) for x in (text, other))
    return 2 * (a & b).total() / ((a.total() + b.total()) or 1)


def rewritten(verses: Sequence[Verse], model: str, bench: Workbench) -> list[str]:
    """What the model makes of each verse, its likeliest word at each place."""
    ids = bench.continuations(model, [prompt(verse, bench.tokenizer) for verse in verses], 2 * MOST)
    return [" ".join(bench.tokenizer.decode(row, skip_special_tokens=True).split()) for row in ids]


def figures(name: str, tests: Sequence[Verse], before: Sequence[Row], after: Sequence[Row]) -> list[Figure]:
    """What the training ``name`` made of the held-out pairs: those with the verse shown, then those without it."""
    n, groups = len(tests), [verse.place[0] for verse in tests]
    shown, unshown = ((before[:n], after[:n]), (before[n:], after[n:]))
    found = []
    for what, lines, which in (
        ("old preferred to new", shown, (0, 1)),
        ("the same, verse not shown", unshown, (0, 1)),
        ("right verse preferred to another, both old", shown, (0, 2)),
    ):
        (old, old_ties), (new, new_ties) = (preferred([_only(line, which) for line in part]) for part in lines)
        found.append(Figure(f"{what}, {name}", old, new, groups, 0.5, (old_ties, new_ties)))
    for what, i in (("old", 0), ("new", 1)):
        values = [[line["logps"][i] / line["lengths"][i] for line in part] for part in shown]
        found.append(Figure(f"log-prob of a token of the {what} verse, {name}", *values, groups, unit="nats"))
    return found


def _only(line: Row, which: Sequence[int]) -> Row:
    return {key: [line[key][i] for i in which] for key in ("logps", "lengths")}


def figures_of_texts(name: str, tests: Sequence[Verse], before: Sequence[str], after: Sequence[str]) -> list[Figure]:
    """What the rewritten verses are like, and what a copy of the verse that was shown is like."""
    groups = [verse.place[0] for verse in tests]

    def figure(what: str, of: Any) -> Figure:
        values = [
            [float(of(text, verse)) for text, verse in zip(texts, tests, strict=True)] for texts in (before, after)
        ]
        copied = sum(float(of(verse.english, verse)) for verse in tests) / len(tests)
        return Figure(f"rewritten: {what}, {name}", *values, groups, copied)

    return [
        figure("a copy", lambda text, verse: text == verse.english),
        figure("an old word or more", lambda text, verse: OLD.search(text) is not None),
        figure("words shared with the old verse", lambda text, verse: likeness(text, verse.king_james)),
        figure("words shared with the verse shown", lambda text, verse: likeness(text, verse.english)),
    ]


def examples(verses: Sequence[Verse], texts: dict[str, Sequence[str]], count: int = 5) -> str:
    """A few verses as a table: as shown, as each model rewrites them, and as they are in the King James Version."""
    rows = [
        f"| {' '.join(map(str, verse.place[:2]))}:{verse.place[2]} | {who} | {text[i].replace('|', '/')} |"
        for i, verse in enumerate(verses[:count])
        for who, text in {
            "shown": [v.english for v in verses], **texts, "King James": [v.king_james for v in verses]
        }.items()
    ]  # fmt: skip
    return "\n".join(["| verse | | |", "|---|---|---|", *rows])


def main(argv: Sequence[str] | None = None) -> Report:
    bench = Workbench("style", __doc__.partition("\n")[0], argv, last_layers=LAYERS)
    with bench.phase("reading two Bibles"):
        found, misaligned = bibles.verses(bibles.king_james(), bibles.world_english())
        train, held_out = drawn(found, bench)
    tests, rows = tests_of(held_out, bench.tokenizer), [pair(verse, bench.tokenizer) for verse in train]
    before = bench.score(bench.model, tests, "scoring before")
    texts = {"before": rewritten(held_out[:WRITTEN], bench.model, bench)}
    report = Report(bench, "Verses in the English of 1611", "book")
    for name, options in TRAININGS.items():
        policy = bench.train(rows, name.replace(" + ", "-"), **(options if bench.args.tiny else OPTIONS | options))
        report.figures += figures(name, held_out, before, bench.score(policy, tests, f"scoring {name}"))
        texts[name] = rewritten(held_out[:WRITTEN], policy, bench)
        report.figures += figures_of_texts(name, held_out[:WRITTEN], texts["before"], texts[name])
    guessed, level = by_old_words(held_out)
    groups = [verse.place[0] for verse in held_out]
    report.figures.append(Figure("whoever counts old words", None, guessed, groups, 0.5, (0, level)))
    report.notes += [
        f"Both Bibles have {len(found) + len(misaligned)} verses under one number. {len(misaligned)} of them are left "
        "out: they share as many words or more with a neighbour of that number. "
        f"Trained on {len(train)} pairs of verses of {FEWEST} to {MOST} words, without God's name, of "
        f"{len({verse.place[0] for verse in train})} books.",
        examples(held_out, texts),
    ]
    report.write()
    return report


if __name__ == "__main__":
    main()
