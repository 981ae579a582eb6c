"""Medicine and law: the right code among its siblings, and a court reporter's right abbreviation among wrong ones.

Both are lists of one right answer and three wrong ones that are as near to it as the data has them. Medicine: four
codes of ICD-10-CM with one parent, and the description of one of them; each of the four is asked for once, so whoever
does not read the description is right once in four times. Law: the abbreviation by which the Free Law Project's
reporters-db cites a reporter, and three variations of it that are no abbreviation of its. Whole chapters are held out,
and whole states.

    python examples/preference/medicine_law.py
"""

from __future__ import annotations

import importlib.util
import random
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from results import Figure, Report, preferred
from workbench import Row, Workbench, need

ANSWERS = 4
CHANCE = 1 / ANSWERS
FAMILIES = 24  # of each chapter, so that no chapter outweighs the others
HELD_OUT_FAMILIES = 6  # of each chapter that is held out
SHARE = 0.3  # of chapters, and of a reporter's lists, that are held out
OPTIONS = {"loss_type": ["softmax_dpo"], "beta": 0.1, "learning_rate": 5e-4, "batch_size": 8}
LISTS = 176  # to train on, of each of the two: what three minutes allow
CONVENTIONS = {
    "right": "1", "left": "2", "bilateral": "3", "unspecified": "90", "other": "8", "initial": "A", "subsequent": "D",
    "sequela": "S", "first": "1", "second": "2", "third": "3",
}  # fmt: skip
"""How ICD-10-CM ends a code, in any chapter, for a word that its siblings' descriptions lack."""


# Medicine


def siblings(seed: int) -> list[list[tuple[str, str, str]]]:
    """Families of four codes with one parent, each as ``(chapter, code, description)``, drawn by ``seed``."""
    need(importlib.util.find_spec("simple_icd_10_cm"), "simple-icd-10-cm", "pip install simple-icd-10-cm")
    import simple_icd_10_cm as icd

    choice, by_parent = random.Random(seed), defaultdict(list)
    for code in icd.get_all_codes():
        if icd.is_category_or_subcategory(code) and icd.is_leaf(code):
            by_parent[icd.get_parent(code)].append(code)
    families = defaultdict(list)
    for parent, codes in by_parent.items():
        if len(codes) >= ANSWERS and len(set(map(len, codes))) == 1:
            chapter = chapter_of(icd, parent)
            families[chapter].append([(chapter, code, icd.get_description(code)) for code in codes])
    return [
        choice.sample(family, ANSWERS)
        for chapter in sorted(families)
        for family in choice.sample(families[chapter], min(FAMILIES, len(families[chapter])))
    ]


def chapter_of(icd: Any, code: str) -> str:
    """The number of a code's chapter, and what it is called, in short."""
    chapter = icd.get_ancestors(code)[-1]
    name = re.sub(r" \([^()]*\)$", "", icd.get_description(chapter))
    return f"{int(chapter):02} {textwrap.shorten(name, 40, placeholder=' ...')}"


def diagnoses(families: Iterable[Sequence[tuple[str, str, str]]]) -> list[Row]:
    """A row for each code of each family: its description, its code before its siblings', and what decides it."""
    rows = []
    for family in families:
        for chapter, code, description in family:
            others = [(c, text) for _, c, text in family if c != code]
            rows.append({
                "prompt": f"Diagnosis: {' '.join(description.split())}\nICD-10-CM code:",
                "chosen": f" {code}", "rejected": [f" {c}" for c, _ in others],
                "group": chapter, "family": min(c for _, c, _ in family),
                "convention": convention(code, description, others),
            })  # fmt: skip
    return rows


def one_of_each(rows: Sequence[Row], seed: int) -> list[Row]:
    """One row of each family. All of them would teach by turns that a code is right and that it is wrong."""
    choice, families = random.Random(seed), defaultdict(list)
    for row in rows:
        families[row["family"]].append(row)
    return [choice.choice(family) for family in families.values()]


def some_of_each(rows: Sequence[Row]) -> list[Row]:
    """All rows of the first families of each group."""
    families: dict[str, dict[str, None]] = defaultdict(dict)
    for row in rows:
        families[row["group"]][row["family"]] = None
    kept = {group: set(list(found)[:HELD_OUT_FAMILIES]) for group, found in families.items()}
    return [row for row in rows if row["family"] in kept[row["group"]]]


def convention(code: str, description: str, others: Sequence[tuple[str, str]]) -> float | None:
    """How often a reader of `CONVENTIONS` alone names the right code; None if they name none of the four."""
    own = words(description).difference(*(words(text) for _, text in others))
    for end in "".join(end for word, end in CONVENTIONS.items() if word in own):
        named = [c for c in (code, *(c for c, _ in others)) if c[-1] == end]
        if named:
            return (code in named) / len(named)
    return None


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


# Law


def reporters() -> Mapping[str, Any]:
    need(importlib.util.find_spec("reporters_db"), "reporters-db", "pip install reporters-db")
    from reporters_db import REPORTERS

    return REPORTERS


def citations(reporters: Mapping[str, Sequence[Mapping[str, Any]]], seed: int) -> list[Row]:
    """Rows of an edition's abbreviation and three variations of it, as many as the variations are enough for.

    A variation that is some reporter's abbreviation is no wrong one, and left out.
    """
    choice = random.Random(seed)
    right = {edition for each in reporters.values() for reporter in each for edition in reporter["editions"]}
    rows = []
    for reporter in (reporter for each in reporters.values() for reporter in each):
        for edition in reporter["editions"]:
            wrong = [x for x, of in reporter["variations"].items() if of == edition and x not in right]
            choice.shuffle(wrong)
            for i in range(0, len(wrong) - ANSWERS + 2, ANSWERS - 1):
                rows.append({
                    "prompt": f"Reporter: {named(reporter, edition)}\nCited as:", "chosen": f" {edition}",
                    "rejected": [f" {x}" for x in wrong[i : i + ANSWERS - 1]], "group": place(reporter),
                })  # fmt: skip
    return rows


def named(reporter: Mapping[str, Any], edition: str) -> str:
    """A reporter's name, with the years of the edition where there are several."""
    dates = reporter["editions"][edition]
    years = f" ({dates['start'].year}-{dates['end'].year if dates['end'] else ''})"
    return reporter["name"] + (years if len(reporter["editions"]) > 1 else "")


def place(reporter: Mapping[str, Any]) -> str:
    """The state whose courts a reporter of one state has first; otherwise its kind, such as federal or specialty."""
    if reporter["cite_type"] == "state":
        for court in reporter["mlz_jurisdiction"]:
            parts = [part for part in court.partition(";")[0].split(":")[1:] if not re.fullmatch(r"c\d*|fed", part)]
            if parts:
                return parts[0].partition(".")[0].upper()
    return str(reporter["cite_type"])


def surface(text: str) -> list[float]:
    """What is seen of an abbreviation without reading it."""
    kinds = (str.isspace, ".".__eq__, str.isupper, str.isdigit, lambda c: not c.isalnum() and c not in " .")
    return [len(text), *(sum(map(kind, text)) for kind in kinds)]


def by_surface(train: Sequence[Row], held_out: Sequence[Row]) -> list[float]:
    """How often the line through `surface` that fits the training lists best has the right answer first."""
    inputs, others = (
        torch.tensor([[surface(x) for x in (row["chosen"], *row["rejected"])] for row in rows], dtype=torch.float32)
        for rows in (train, held_out)
    )
    line = torch.zeros(inputs.shape[-1], requires_grad=True)
    optimizer = torch.optim.LBFGS([line], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = -(inputs @ line).log_softmax(-1)[:, 0].mean() + 1e-3 * line.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return [first(values) for values in (others @ line.detach()).tolist()]


def first(values: Sequence[float]) -> float:
    """Whether the first of some values is the largest; of several that are level, its share of a draw."""
    best = max(values)
    return (values[0] == best) / list(values).count(best)


# What is found


def compared(name: str, before: Sequence[Row], after: Sequence[Row], groups: Sequence[str]) -> Figure:
    """The share of lists whose right answer has the largest log-prob."""
    (old, old_ties), (new, new_ties) = preferred(before), preferred(after)
    return Figure(name, old, new, groups, CHANCE, (old_ties, new_ties))


def chosen_from(rows: Sequence[Row], where: Iterable[int], *scores: Sequence[Row]) -> list[list[Any]]:
    """The rows and scores at some places."""
    places = list(where)
    return [[each[i] for i in places] for each in (rows, *scores)]


def some(rows: Sequence[Row], seed: int) -> list[Row]:
    """At most `LISTS` of them, drawn at random."""
    return random.Random(seed).sample(rows, min(LISTS, len(rows)))


def medicine(bench: Workbench, families: Iterable[Sequence[tuple[str, str, str]]]) -> tuple[list[Figure], str]:
    """Train on some chapters; the figures of the others: all, by what decides, and each chapter; and a remark."""
    train, held_out = bench.split(diagnoses(families), SHARE)
    train, held_out = some(one_of_each(train, bench.args.seed), bench.args.seed), some_of_each(held_out)
    before = bench.score(bench.model, held_out)
    after = bench.score(bench.train(train, "medicine", **OPTIONS), held_out)
    rules = [CHANCE if row["convention"] is None else row["convention"] for row in held_out]
    parts = {
        "medicine: right code of four siblings": lambda row: True,
        "- a word says how the code ends": lambda row: row["convention"] is not None,
        "- no word does": lambda row: row["convention"] is None,
        **{f"- chapter {name}": lambda row, name=name: row["group"] == name
           for name in sorted({row["group"] for row in held_out})},
    }  # fmt: skip
    figures = []
    for name, has in parts.items():
        part, old, new = chosen_from(held_out, (i for i, row in enumerate(held_out) if has(row)), before, after)
        if part:
            by = "family" if name.startswith("- chapter") else "group"
            figures.append(compared(name, old, new, [row[by] for row in part]))
    figures.insert(3, Figure("- the words alone, by rule", None, rules, [row["group"] for row in held_out], CHANCE))
    note = (
        f"Medicine: trained on {len(train)} lists, one of each family. Held-out families are whole: each of four "
        "codes with one parent is asked for once, so whatever does not read the description has 25.0%. ICD-10-CM "
        "ends many codes alike in all chapters, such as 1 for right, 2 for left, 8 for other, 9 for unspecified. *A "
        "word says how the code ends* where the description has such a word that its siblings lack, and one of the "
        "four ends so; *by rule* takes that code, and draws where no word says anything. What else differs among "
        "siblings, each family numbers in its own way."
    )
    return figures, note


def law(bench: Workbench, known: Mapping[str, Any]) -> tuple[list[Figure], str]:
    """Train on some states; the figures of the others, of the model and of what needs no model; and a remark."""
    train, held_out = bench.split(citations(known, bench.args.seed), SHARE)
    seen = {x for row in held_out for x in (row["chosen"], *row["rejected"])}
    train = [row for row in train if seen.isdisjoint((row["chosen"], *row["rejected"]))]  # no answer is known before
    train = some(train, bench.args.seed)
    groups = [row["group"] for row in held_out]
    half = len(held_out) // 2
    strangers = [row | {"prompt": held_out[i - half]["prompt"]} for i, row in enumerate(held_out)]
    before = bench.score(bench.model, held_out)
    policy = bench.train(train, "law", **OPTIONS)
    after, misled = (bench.score(policy, rows) for rows in (held_out, strangers))
    shortest = [first([-len(x) for x in (row["chosen"], *row["rejected"])]) for row in held_out]
    note = (
        f"Law: trained on {len(train)} lists, which share no answer with those held out. Abbreviations look different "
        "from their variations: the last two rows never see the reporter's name. The last is a softmax of a line "
        "through six counts of characters, fitted to the same lists. *Another reporter's name* is the trained model "
        "with the prompts exchanged among the held-out lists: what it keeps there, it has from the looks of an answer."
    )
    figures = [
        compared("law: right abbreviation of four", before, after, groups),
        Figure("- another reporter's name in the prompt", None, preferred(misled)[0], groups, CHANCE),
        Figure("- the shortest", None, shortest, groups, CHANCE),
        Figure("- by length, spaces, stops, capitals, digits", None, by_surface(train, held_out), groups, CHANCE),
    ]
    return figures, note


PACKAGES = ("simple-icd-10-cm", "reporters-db")


def main(argv: Sequence[str] | None = None) -> Report:
    bench = Workbench("medicine-law", __doc__.partition("\n")[0], argv, max_length=128)
    with bench.phase("reading"):
        families, known = siblings(bench.args.seed), reporters()
    what = "chapter or a state; in a chapter's row a family of codes"
    report = Report(bench, "Medicine and law: the right one of four", what, PACKAGES)
    for part, data in ((medicine, families), (law, known)):
        figures, note = part(bench, data)
        report.figures += figures
        report.notes.append(note)
    report.write()
    return report


if __name__ == "__main__":
    main()
