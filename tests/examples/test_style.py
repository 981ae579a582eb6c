"""Two Bibles are read verse by verse, and the example on style trains on books that it is not tested on."""

# ruff: noqa: RUF001  (quotation marks as they are printed)

from __future__ import annotations

import json
import shutil
import struct
import zlib

import bibles
import pytest
import style
from bibles import Verse

BOOKS = ["Gen", "Ruth", "Jonah", "Mark", "Titus", "Jude", "Rev", "Ezra"]
KINDS = [
    ("And he saith unto him, {} thou hast not known the way of thy fathers.",
     "He says to him, {} you haven't known the way of your fathers."),
    ("Behold, the {} goeth forth unto the field, and ye shall see it.",
     "Look, the {} goes out to the field, and you will see it."),
    ("Thou shalt not take the {} of thy neighbour in the night.",
     "You must not take the {} of your neighbor in the night."),
    ("Verily the {} doth stand before the gate of the city all day.",
     "Truly the {} stands before the gate of the city all day."),
]  # fmt: skip
THINGS = ["goat", "lamp", "plough", "basket", "stone", "well"]


def fixture() -> tuple[dict, dict]:
    """48 verses in eight books, in either English; no two alike."""
    old, new = {}, {}
    for b, book in enumerate(BOOKS):
        for i in range(6):
            a, m = KINDS[i % 4]
            thing = f"{THINGS[i]} of {THINGS[(i + b) % 6]} number {b}"
            old[book, 1, i + 1], new[book, 1, i + 1] = a.format(thing), m.format(thing)
    return old, new


def module(folder, testament: str, entries: list[str], block: int = 3) -> None:
    """A module of the SWORD project of these entries, ``block`` of them in a block."""
    sizes = places = texts = b""
    for first in range(0, len(entries), block):
        whole = b""
        for entry in entries[first : first + block]:
            data = entry.encode()
            places += struct.pack("<IIH", first // block, len(whole), len(data))
            whole += data
        packed = zlib.compress(whole)
        sizes += struct.pack("<III", len(texts), len(packed), len(whole))
        texts += packed
    for kind, data in (("bzs", sizes), ("bzv", places), ("bzz", texts)):
        (folder / f"{testament}.{kind}").write_bytes(data)


def test_a_module_is_read_by_the_headings_of_its_chapters(tmp_path):
    head = ["", "<milestone/>", '<div osisID="Gen" sID="g" type="book"/>']
    module(tmp_path, "ot", [
        *head, '<chapter n="1" osisID="Gen.1" sID="Gen.1"/>', "One – é.", "Two.", "", "",
        '<chapter n="2" osisID="Gen.2" sID="Gen.2"/>', '<title type="main">A title</title><w lemma="a">Three</w>.',
    ])  # fmt: skip
    module(tmp_path, "nt", [*head, '<chapter eID="Rev.3"/><chapter n="3" osisID="3John.1" sID="3John.1"/>', "Last."])
    assert bibles.world_english(tmp_path) == {
        ("Gen", 1, 1): "One – é.",
        ("Gen", 1, 2): "Two.",
        ("Gen", 2, 1): "Three.",
        ("3John", 1, 1): "Last.",
    }


@pytest.mark.parametrize(
    ("osis", "text"),
    [
        ('<w lemma="x">God</w><note placement="foot"><reference>1:1 </reference>A “note”.</note><w>made</w> it.',
         "God made it."),
        ("said, “<w>Let</w> <w>it</w> be,” <lb/>and", "said, Let it be, and"),
        ("The <w>king</w><note>NU omits</note>. <div sID='p'/>He", "The king. He"),
        ("<speaker>Beloved</speaker> Come", "Come"),
        ("God’s house, the sons’ tents: “‘Don’t go,’”", "God's house, the sons' tents: Don't go,"),
        ("wife &amp; son", "wife & son"),
        ("<l>one</l><l>two</l>", "one two"),
    ],
)  # fmt: skip
def test_notes_titles_markup_and_quotation_marks_are_left_out(osis, text):
    assert bibles.plain(osis) == text


def test_printed_verses_are_read_by_book_chapter_and_verse():
    printed = "Ge1:1 In it.\n1Sm2:13 And he.\n\nRev22:21 The end.\nCannot open\n"
    assert bibles.parse_printed(printed) == {
        ("Gen", 1, 1): "In it.",
        ("1Sam", 2, 13): "And he.",
        ("Rev", 22, 21): "The end.",
    }


def test_verses_whose_number_means_another_one_are_left_out():
    old, new = fixture()
    aligned, misaligned = bibles.verses(old, new)
    assert [verse.place for verse in aligned] == list(old) and not misaligned
    assert all((verse.king_james, verse.english) == (old[verse.place], new[verse.place]) for verse in aligned)
    del new["Jude", 1, 6]
    new["Mark", 1, 2], new["Mark", 1, 3] = new["Mark", 1, 3], new["Mark", 1, 2]
    aligned, misaligned = bibles.verses(old, new)
    assert set(misaligned) == {("Mark", 1, 2), ("Mark", 1, 3)}
    assert {verse.place for verse in aligned} == set(old) - set(misaligned) - {("Jude", 1, 6)}


def test_what_is_missing_is_asked_for_by_its_package(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="apt-get install sword-text-web"):
        bibles.world_english(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="apt-get install bible-kjv bible-kjv-text"):
        bibles.king_james()


@pytest.mark.skipif(
    not (shutil.which("bible") and bibles.SWORD.is_dir()), reason="bible-kjv and sword-text-web are not installed"
)
def test_the_installed_bibles_agree_on_their_numbers():
    old, new = bibles.king_james(), bibles.world_english()
    assert len(old) == 31102 and {place[0] for place in old} == set(bibles.BOOKS.values())
    aligned, misaligned = bibles.verses(old, new)
    assert len(misaligned) < 100 and len(old) - len(aligned) - len(misaligned) < 10
    assert ("3John", 1, 14) in {verse.place for verse in aligned} and ("3John", 1, 15) not in new
    assert not any(mark in text for verse in aligned for text in verse[1:] for mark in "“”‘’<>&")


def test_old_words_are_found_and_new_ones_are_not():
    old, new = fixture()
    assert all(style.OLD.search(text) for text in old.values())
    assert not any(style.OLD.search(text) for text in new.values())
    assert not style.OLD.search("Beneath Elizabeth's teeth, on the twentieth day")
    verses = [Verse(("Gen", 1, 1), *texts) for texts in (("Thou art", "You are"), ("He is", "It is"), ("He", "Lo, he"))]
    assert style.by_old_words(verses) == ([1.0, 0.0, 0.0], 1)


def test_verses_are_compared_where_they_differ_in_style_alone():
    old, new = KINDS[1]
    assert style.comparable(Verse(("Gen", 1, 1), old, new))
    for a, m in ((old, old), (old + " LORD", new), (old, new + " Yahweh"), ("Behold.", new), (old, 5 * new)):
        assert not style.comparable(Verse(("Gen", 1, 1), a, m))


def test_likeness_counts_shared_words():
    assert style.likeness("And he went", "and HE went!") == 1
    assert style.likeness("a b", "c d") == style.likeness("", "") == 0
    assert style.likeness("he went he", "he came") == pytest.approx(2 / 5)


def test_style_runs_and_holds_out_whole_books(monkeypatch, tmp_path):
    old, new = fixture()
    old["Ruth", 1, 1], new["Ruth", 1, 1] = old["Rev", 1, 1], new["Rev", 1, 1]  # told twice, and Ruth is held out
    monkeypatch.setattr(bibles, "king_james", lambda: old)
    monkeypatch.setattr(bibles, "world_english", lambda: new)
    report = style.main(["--tiny", "--work", str(tmp_path / "work"), "--results", str(tmp_path)])
    figures = {figure.name: figure for figure in report.figures}
    held_out = set(figures["old preferred to new, DPO"].groups)
    assert held_out == {"Ruth", "Titus"}
    files = [[json.loads(line) for line in path.open()] for path in report.bench.folder.glob("*.jsonl")]
    (trained,) = (rows for rows in files if not {row["group"] for row in rows} & held_out)
    (tested,) = (rows for rows in files if {row["group"] for row in rows} == held_out)
    assert len(tested) == 2 * len(figures["old preferred to new, DPO"].after)
    for row in trained:
        assert row["chosen"] in old.values() and row["rejected"] in new.values()
        assert style.REQUEST + row["rejected"] in row["prompt"]
    assert not {row["chosen"] for row in trained} & {row["chosen"] for row in tested}
    copies = figures["rewritten: a copy, DPO + SFT"]
    assert copies.baseline == 1 and len(copies.after) == len(tested) // 2
    assert figures["whoever counts old words"].before is None
    assert figures["right verse preferred to another, both old, DPO"].ties == (0, 0)
    text = (tmp_path / "style.md").read_text()
    assert "| King James |" in text and "48 verses under one number" in text
