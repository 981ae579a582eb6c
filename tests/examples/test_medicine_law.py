"""The example of medicine and law, on a few codes and reporters of the tests' own."""

from __future__ import annotations

import datetime
import importlib.machinery
import random
import sys
import types

import medicine_law
import pytest
import torch
import workbench

SIDES = ("right eye", "left eye", "bilateral", "unspecified eye")
FAMILIES = [
    [(f"{number:02} chapter", f"{letter}10.{end}", f"{what}, {side}") for end, side in zip("1239", SIDES)]
    for number, letter, what in ((1, "A", "Itch"), (2, "C", "Lump"), (3, "D", "Pallor"), (4, "H", "Squint"))
]


def edition(start: int, end: int | None = None) -> dict:
    return {"start": datetime.datetime(start, 1, 1), "end": end and datetime.datetime(end, 12, 31)}


def reporter(name: str, kind: str, courts: list[str], editions: dict, wrong: dict) -> dict:
    return {
        "name": name, "cite_type": kind, "mlz_jurisdiction": courts, "editions": editions,
        "variations": {x: right for right, each in wrong.items() for x in each},
    }  # fmt: skip


REPORTERS = {
    "Ab.": [
        reporter("Abel's Reports", "state", ["us:c2:oh.nd;district.court", "us:ny;court.appeals"],
                 {"Ab.": edition(1801, 1841), "Ab.2d": edition(1841)},
                 {"Ab.": ["Abel", "Abel Rep.", "A.R.", "Abl.", "Abel.", "Ab.R.", "Ba."], "Ab.2d": ["Ab. 2d", "Ab2d"]})
    ],
    "Ba.": [reporter("Baker", "state", ["us:ny;court"], {"Ba.": edition(1900)}, {"Ba.": ["Bak", "B. R.", "All R."]})],
    "Ca.": [reporter("Cable", "federal", ["us;federal"], {"Ca.": edition(1900)}, {"Ca.": ["Cab", "Ca. R", "All R."]})],
    "Da.": [reporter("Dale", "state", ["us:tx;court"], {"Da.": edition(1900)}, {"Da.": ["Dal", "D. R.", "All R."]})],
}  # fmt: skip


@pytest.fixture
def rows():
    return medicine_law.diagnoses(FAMILIES)


def test_who_does_not_read_the_description_is_right_once_in_four_times(rows):
    for seed in range(5):
        likes = random.Random(seed)
        liked = {code: likes.random() for family in FAMILIES for _, code, _ in family}
        values = [[liked[x.strip()] for x in (row["chosen"], *row["rejected"])] for row in rows]
        assert sum(map(medicine_law.first, values)) == len(rows) / 4
    assert len(rows) == 16 and {row["group"] for row in rows} == {f"{i:02} chapter" for i in (1, 2, 3, 4)}
    assert {row["family"] for row in rows} == {f"{letter}10.1" for letter in "ACDH"}


def test_training_has_one_row_of_a_family_and_what_is_held_out_whole_families(rows, monkeypatch):
    trained = medicine_law.one_of_each(rows, 0)
    assert [row["family"] for row in trained] == ["A10.1", "C10.1", "D10.1", "H10.1"]
    assert len({row["chosen"][-1] for row in trained + medicine_law.one_of_each(rows, 1)}) > 1
    monkeypatch.setattr(medicine_law, "HELD_OUT_FAMILIES", 1)
    more = medicine_law.diagnoses([[("01 chapter", f"B1.{end}", f"Rash, {side}") for end, side in zip("1239", SIDES)]])
    assert medicine_law.some_of_each([*rows, *more]) == rows
    assert medicine_law.some_of_each([*more, *rows]) == [*more, *rows[4:]]


def test_a_row_asks_for_the_code_of_its_description(rows):
    for row, (_, code, text) in zip(rows, (each for family in FAMILIES for each in family), strict=True):
        assert row["prompt"] == f"Diagnosis: {text}\nICD-10-CM code:" and row["chosen"] == f" {code}"
        assert len({row["chosen"], *row["rejected"]}) == 4


@pytest.mark.parametrize(
    ("text", "others", "expected"),
    [
        ("Itch, left eye", ["Itch, right eye", "Itch, unspecified eye"], 1.0),
        ("Itch of the right eye, left", ["Itch of the right eye", "Itch of the right eye, bilateral"], 1.0),
        ("Other itch", ["Itch, unspecified", "Itch"], None),  # no code ends with 8
        ("Itch, bilateral", ["Itch, left", "Itch, right"], 0.0),
        ("Itch", ["Itch, left", "Itch, right"], None),
    ],
)
def test_a_convention_is_a_word_that_the_siblings_lack(text, others, expected):
    codes = [("H10.3", others[0]), ("H10.9", others[1])]
    assert medicine_law.convention("H10.2", text, codes) == expected


def test_a_convention_takes_nine_for_unspecified_before_nought():
    others = [("L1.0", "Itch of skin"), ("L1.1", "Itch of nail")]
    assert medicine_law.convention("L1.9", "Itch, unspecified", others) == 1.0
    assert medicine_law.convention("L1.2", "Itch, unspecified", others) == 0.0


def test_wrong_citations_are_variations_that_no_reporter_is_cited_by():
    rows = medicine_law.citations(REPORTERS, seed=0)
    assert [row["chosen"] for row in rows] == [" Ab.", " Ab.", " Ba.", " Ca.", " Da."]
    known = {f" {x}" for each in REPORTERS.values() for one in each for x in one["variations"]} - {" Ba."}
    assert all(set(row["rejected"]) <= known and len(set(row["rejected"])) == 3 for row in rows)
    assert not set(rows[0]["rejected"]) & set(rows[1]["rejected"])
    assert rows[0]["prompt"] == "Reporter: Abel's Reports (1801-1841)\nCited as:"
    assert rows[2]["prompt"] == "Reporter: Baker\nCited as:"
    assert [row["group"] for row in rows] == ["OH", "OH", "NY", "federal", "TX"]


def test_an_edition_that_goes_on_has_no_last_year():
    assert medicine_law.named(REPORTERS["Ab."][0], "Ab.2d") == "Abel's Reports (1841-)"


def test_the_line_through_the_surface_finds_what_shows_and_does_not_read():
    def rows(count: int, right: str, wrong: tuple[str, str, str]):
        return [{"chosen": right.format(i), "rejected": [x.format(i) for x in wrong]} for i in range(count)]

    shows = ("A. {}", ("A {}", "A.{}.", "A, {}"))
    assert medicine_law.by_surface(rows(9, *shows), rows(4, *shows)) == [1.0] * 4
    hidden = rows(4, "q", ("w", "e", "r"))
    assert medicine_law.by_surface(rows(9, *shows), hidden) == [0.25] * 4
    assert medicine_law.first([1.0, 2.0]) == 0 and medicine_law.first([2.0, 2.0, 1.0]) == 0.5


def package(monkeypatch, name: str, **content) -> None:
    """Put a module of this name where imports find it."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


def test_families_are_of_four_codes_with_one_parent_and_of_one_length(monkeypatch):
    children = {"A10": list("12345"), "A11": list("123"), "A12": ["1", "2", "3", "41"], "B10": list("1234")}
    codes = {f"{parent}.{end}": parent for parent, ends in children.items() for end in ends}
    package(
        monkeypatch, "simple_icd_10_cm", get_all_codes=lambda: ["1", "2", *children, *codes],
        is_category_or_subcategory=lambda code: not code.isdigit(), is_leaf=lambda code: code in codes,
        get_parent=codes.get, get_ancestors=lambda code: [{"A": "1", "B": "2"}[code[0]]],
        get_description={"1": "Infectious diseases of a very, very long kind (A00-B99)", "2": "Growths (C00-D49)"}.get,
    )  # fmt: skip
    families = medicine_law.siblings(seed=0)
    assert [{chapter for chapter, *_ in family} for family in families] == [
        {"01 Infectious diseases of a very, very ..."}, {"02 Growths"}
    ]  # fmt: skip
    assert [sorted(code for _, code, _ in family)[0][:3] for family in families] == ["A10", "B10"]
    assert all(len({code for _, code, _ in family}) == 4 for family in families)


@pytest.mark.parametrize("name", ["simple_icd_10_cm", "reporters_db"])
def test_a_missing_package_is_named_with_its_command(monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda wanted: None if wanted == name else object())
    read = {"simple_icd_10_cm": lambda: medicine_law.siblings(0), "reporters_db": medicine_law.reporters}[name]
    with pytest.raises(SystemExit, match=f"pip install {name.replace('_', '-')}"):
        read()


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """The example on the rows above: the rows that it trained on and scored, and its table."""
    seen: dict[str, list] = {"trained": [], "scored": []}

    def train(bench, rows, name, **options):
        seen["trained"].append(rows)
        return trains(bench, rows, name, **options)

    def score(bench, model, rows, *more):
        seen["scored"].append(rows)
        return scores(bench, model, rows, *more)

    trains, scores = workbench.Workbench.train, workbench.Workbench.score
    monkeypatch.setattr(workbench.Workbench, "train", train)
    monkeypatch.setattr(workbench.Workbench, "score", score)
    monkeypatch.setattr(medicine_law, "siblings", lambda seed: FAMILIES)
    monkeypatch.setattr(medicine_law, "reporters", lambda: REPORTERS)
    monkeypatch.setattr(medicine_law, "PACKAGES", ())
    torch.manual_seed(0)
    medicine_law.main(["--tiny", "--work", str(tmp_path / "work"), "--results", str(tmp_path)])
    return seen, (tmp_path / "medicine-law.md").read_text()


@pytest.mark.usefixtures("quick")
def test_what_is_scored_is_of_other_chapters_and_states_than_what_was_trained_on(ran):
    seen, table = ran
    codes, law = seen["trained"]
    assert len(seen["scored"]) == 5 and len(codes) == 3
    for trained, scored in ((codes, seen["scored"][:2]), (law, seen["scored"][2:])):
        assert trained and not {row["group"] for row in trained} & {row["group"] for each in scored for row in each}
    held_out, strangers = seen["scored"][2], seen["scored"][4]
    assert [row["chosen"] for row in held_out] == [row["chosen"] for row in strangers]
    assert sorted(row["prompt"] for row in held_out) == sorted(row["prompt"] for row in strangers)
    for name in (
        "medicine: right code of four siblings",
        "- chapter 0",
        "law: right abbreviation of four",
        "- the sho",
    ):
        assert sum(line.startswith(f"| {name}") for line in table.splitlines()) == 1
    assert "| 25.0% |" in table


@pytest.mark.usefixtures("quick")
def test_an_abbreviation_that_is_asked_for_was_not_in_training(ran):
    seen, _ = ran
    known = {x for row in seen["scored"][2] for x in (row["chosen"], *row["rejected"])}
    assert known.isdisjoint(x for row in seen["trained"][1] for x in (row["chosen"], *row["rejected"]))
    assert " All R." in known and len(seen["trained"][1]) == 2  # those of the two others have it too
