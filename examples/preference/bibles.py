"""The same verses in two kinds of English: the King James Version of 1611 and the World English Bible of 2020.

Both are packages of Debian. The first is printed by the program `bible`. The second is a module of the SWORD project,
of the kind zText, and is read here.
"""

# ruff: noqa: RUF001  (quotation marks as they are printed)

from __future__ import annotations

import html
import re
import shutil
import struct
import subprocess
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from workbench import need

SWORD = Path("/usr/share/sword/modules/texts/ztext/engWEB2015eb")
BOOKS = {
    "Ge": "Gen", "Exo": "Exod", "Lev": "Lev", "Num": "Num", "Deu": "Deut", "Josh": "Josh", "Jdgs": "Judg",
    "Ruth": "Ruth", "1Sm": "1Sam", "2Sm": "2Sam", "1Ki": "1Kgs", "2Ki": "2Kgs", "1Chr": "1Chr", "2Chr": "2Chr",
    "Ezra": "Ezra", "Neh": "Neh", "Est": "Esth", "Job": "Job", "Psa": "Ps", "Prv": "Prov", "Eccl": "Eccl",
    "SSol": "Song", "Isa": "Isa", "Jer": "Jer", "Lam": "Lam", "Eze": "Ezek", "Dan": "Dan", "Hos": "Hos", "Joel": "Joel",
    "Amos": "Amos", "Obad": "Obad", "Jonah": "Jonah", "Mic": "Mic", "Nahum": "Nah", "Hab": "Hab", "Zep": "Zeph",
    "Hag": "Hag", "Zec": "Zech", "Mal": "Mal", "Mat": "Matt", "Mark": "Mark", "Luke": "Luke", "John": "John",
    "Acts": "Acts", "Rom": "Rom", "1Cor": "1Cor", "2Cor": "2Cor", "Gal": "Gal", "Eph": "Eph", "Phi": "Phil",
    "Col": "Col", "1Th": "1Thess", "2Th": "2Thess", "1Tim": "1Tim", "2Tim": "2Tim", "Titus": "Titus", "Phmn": "Phlm",
    "Heb": "Heb", "Jas": "Jas", "1Pet": "1Pet", "2Pet": "2Pet", "1Jn": "1John", "2Jn": "2John", "3Jn": "3John",
    "Jude": "Jude", "Rev": "Rev",
}  # fmt: skip
"""The abbreviations of `bible`, each with that of SWORD."""

Place = tuple[str, int, int]  # book, chapter, verse


class Verse(NamedTuple):
    """One verse in both, without quotation marks, which the King James Version does not have."""

    place: Place
    king_james: str
    english: str


def king_james() -> dict[Place, str]:
    """Every verse, as the program `bible` prints it."""
    need(shutil.which("bible"), "the program bible with its text", "apt-get install bible-kjv bible-kjv-text")
    command = ["bible", "-f", "Gen1:1-Rev22:21"]
    printed = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
    return parse_printed(printed)


def parse_printed(printed: str) -> dict[Place, str]:
    """The verses in lines of ``BookChapter:Verse Text``."""
    found = {}
    for line in printed.splitlines():
        match = re.fullmatch(r"(\d?[A-Za-z]+)(\d+):(\d+) (.+)", line)
        if match:
            found[BOOKS[match[1]], int(match[2]), int(match[3])] = match[4].strip()
    return found


def world_english(folder: Path = SWORD) -> dict[Place, str]:
    """Every verse of a SWORD module.

    Each testament is three files. In ``.bzz`` are blocks of zlib, in ``.bzs`` where each begins and how long it is, and
    in ``.bzv`` the block, offset and length of each entry: of headings and verses in the order of the module's
    versification. The entry of a chapter's heading names its chapter, and the entries behind it are verses 1, 2, ... So
    that order, which has more verses than these books do here and there (3 John ends with a 15th), need not be known.
    """
    need((folder / "nt.bzv").is_file(), "the World English Bible", "apt-get install sword-text-web")
    found: dict[Place, str] = {}
    for testament in ("ot", "nt"):
        found |= parse_entries(entries(folder, testament))
    return found


def entries(folder: Path, testament: str) -> Iterator[str]:
    """The entries of one testament, in OSIS markup."""
    sizes, places, texts = ((folder / f"{testament}.{kind}").read_bytes() for kind in ("bzs", "bzv", "bzz"))
    blocks = [zlib.decompress(texts[begin : begin + size]) for begin, size, _ in struct.iter_unpack("<III", sizes)]
    for block, begin, size in struct.iter_unpack("<IIH", places):
        yield blocks[block][begin : begin + size].decode("utf-8")


def parse_entries(found: Iterator[str]) -> dict[Place, str]:
    """The verses in entries, by the headings of their chapters; verses without text are left out."""
    verses: dict[Place, str] = {}
    book, chapter, number = "", 0, 0
    for entry in found:
        heading = re.search(r'<chapter [^>]*osisID="(\w+)\.(\d+)" sID=', entry)
        if heading:
            book, chapter, number = heading[1], int(heading[2]), 0
        elif book:
            number += 1
            if text := plain(entry):
                verses[book, chapter, number] = text
    return verses


def plain(osis: str) -> str:
    """The text of an entry, without notes, titles, speakers and quotation marks."""
    text = re.sub(r"<(note|title|speaker)\b[^>]*?(/>|>.*?</\1>)", " ", osis, flags=re.DOTALL)
    text = re.sub(r"</?w\b[^>]*>", "", text)
    text = html.unescape(re.sub(r"<[^>]*>", " ", text))
    text = re.sub(r"(?<![A-Za-z])’|’(?![A-Za-z ])|[“”‘]", "", text).replace("’", "'")
    return re.sub(r" +([,.;:?!])", r"\1", " ".join(text.split()))


def verses(old: Mapping[Place, str], new: Mapping[Place, str]) -> tuple[list[Verse], list[Place]]:
    """``(verses, misaligned)``: those that both have under one number, and those of which it means another verse.

    A verse is taken to be misaligned if its words are those of the verse before or behind it in the other Bible as much
    as those of the verse with its own number, or more.
    """
    places = [place for place in old if place in new]
    words = [[_words(text[place]) for place in places] for text in (old, new)]
    aligned, misaligned = [], []
    for i, place in enumerate(places):
        own = _overlap(words[0][i], words[1][i])
        around = [j for j in (i - 1, i + 1) if 0 <= j < len(places)]
        others = [max(_overlap(words[0][i], words[1][j]), _overlap(words[0][j], words[1][i])) for j in around]
        if own > max(others, default=0.0):
            aligned.append(Verse(place, old[place], new[place]))
        else:
            misaligned.append(place)
    return aligned, misaligned


def _words(text: str) -> Counter[str]:
    """Words by their first four letters, so that ``loveth`` is ``loves``."""
    return Counter(word[:4] for word in re.findall("[a-z]+", text.lower()))


def _overlap(a: Counter[str], b: Counter[str]) -> float:
    return 2 * (a & b).total() / ((a.total() + b.total()) or 1)
