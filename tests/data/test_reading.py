"""Files, streams and rows give the same records; a bad row stops with the words on the page, or is listed."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dpofast import data
from dpofast.data import sources as sources_module

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
TABLE = PAGE.partition("## Bad input")[2].partition("| record, met by")[0]  # of the rows; the other is the encoder's
REASONS = dict(re.findall(r"^\| ([^|`]+) \| (.+) \|$", TABLE, re.MULTILINE))
GOOD = b'{"prompt": "a", "chosen": "b", "rejected": "c"}'
PAIRS = [{"prompt": f"p{i} ", "chosen": f"good {i}", "rejected": f"bad {i}", "margin": i / 2} for i in range(7)]


def pair(prompt=b'"a"', chosen=b'"b"', rejected=b'"c"') -> bytes:
    return b'{"prompt": %s, "chosen": %s, "rejected": %s}' % (prompt, chosen, rejected)


ASKED, IMAGE = b'[{"role": "user", "content": "a"}]', b'[{"role": "user", "content": [{"type": "image"}]}]'
TALK = b'[{"role": "user", "content": "3?"}, {"role": "assistant", "content": "%s"}]'
BAD = {
    "no JSON": b'{"prompt": "a" "chosen": "b"}',
    "no object": b"3",
    "wrong UTF-8": b'{"prompt": "\xff"}',
    "half of a surrogate pair": pair(b'"\\ud800"'),
    "duplicate keys": b'{"prompt": "a", "chosen": "b", "chosen": "d", "rejected": "c"}',
    "missing column": b'{"prompt": "a", "chosen": "b"}',
    "wrong type": pair(ASKED, b"4"),
    "text and messages": pair(chosen=b'[{"role": "assistant", "content": "4"}]'),
    "a message without role": pair(b'[{"content": "a"}]'),
    "an image": pair(IMAGE),
    "empty answer": pair(rejected=b'" "'),
    "no turn of the assistant": pair(ASKED, ASKED),
    "chosen equal to rejected": pair(rejected=b'"b"'),
    "a prompt that is no prefix": pair(b'"4?"', TALK % b"4", TALK % b"5"),
    "no common prefix": b'{"chosen": "b", "rejected": "c"}',
    "NaN score": b'{"prompt": "a", "answers": ["b", "c"], "scores": [1.0, NaN]}',
    "too few scores": b'{"prompt": "a", "answers": ["b", "c"], "scores": [1.0]}',
    "a label that is no bool": b'{"prompt": "a", "completion": "b", "label": 1}',
    "a negative weight": pair(rejected=b'"c", "weight": -1'),
    "mixed formats": GOOD + b'\n{"prompt": "a", "answers": ["b", "c"]}',
}
ACCEPTED = {
    "an empty line": b"\n  \n" + GOOD + b"\n\n",
    "a byte-order mark": b"\xef\xbb\xbf" + GOOD,
    "CRLF": GOOD + b"\r\n",
}


def written(path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def lines(rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def bare(records):
    """Records without the place that they came from."""
    return [(r.prompt, r.answers, r.scores, r.label, r.weight, r.margin, r.columns) for r in records]


# Bad input


def test_every_bad_row_on_the_page_is_tried():
    apart = {"UTF-16", "missing column, format given"}
    assert set(REASONS) - {"row", "---"} == {*BAD, *ACCEPTED, *apart}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_stops_with_file_line_and_the_reason_on_the_page(kind, tmp_path):
    path = written(tmp_path / "x.jsonl", b"\n" + BAD[kind] + b"\n")
    number = 2 + BAD[kind].count(b"\n")
    with pytest.raises(data.BadRow) as caught:
        list(data.read(path))
    expected = re.escape(REASONS[kind].strip("`")).replace(re.escape("..."), ".*")
    assert re.fullmatch(re.escape(f"data: {path}:{number}: ") + expected, str(caught.value))


@pytest.mark.parametrize("kind", ACCEPTED)
def test_what_the_page_accepts_is_read(kind, tmp_path):
    assert bare(data.read(written(tmp_path / "x.jsonl", ACCEPTED[kind]))) == [("a", ("b", "c"), *[None] * 4, {})]
    picked = data.read(written(tmp_path / "y.jsonl", ACCEPTED[kind]))
    assert len(picked) == 1 and bare([picked[0]]) == bare(picked)
    assert picked[0].where == next(iter(picked)).where


def test_utf16_says_so(tmp_path):
    with pytest.raises(data.BadRow, match=re.escape(REASONS["UTF-16"].strip("`"))):
        list(data.read(written(tmp_path / "x.jsonl", GOOD.decode().encode("utf-16"))))


def test_a_missing_column_of_a_given_format_is_named(tmp_path):
    with pytest.raises(data.BadRow, match=re.escape(REASONS["missing column, format given"].strip("`"))):
        list(data.read([{"prompt": "a", "chosen": "b"}], format="trl"))


def test_skipping_counts_and_lists_and_leaves_the_good_ones(tmp_path):
    rows = [GOOD if i % 2 else bad for i, bad in enumerate(row for bad in BAD.values() for row in (bad, b""))]
    rows = [row for row in rows if b"\n" not in row]
    path = written(tmp_path / "x.jsonl", b"\n".join([GOOD, *rows]))
    records = data.read(path, on_error="skip")
    good = [i for i, row in enumerate([GOOD, *rows], 1) if row == GOOD]
    assert [record.where for record in records] == [f"{path}:{i}" for i in good]
    assert [(file, line) for file, line, _ in records.skipped] == [
        (path, i) for i in range(1, len(rows) + 2) if i not in good
    ]
    assert "no JSON" in records.skipped[0].reason
    assert len(records) == len(good) and [records[i].where for i in range(len(records))] == [r.where for r in records]
    assert len(records.skipped) == len(rows) + 1 - len(good)  # of one pass, not of all


def test_asking_for_the_format_lists_nothing(tmp_path):
    records = data.read(written(tmp_path / "x.jsonl", b"{\n" + GOOD), on_error="skip")
    assert records.format == "trl" and records.skipped == []
    assert len(list(records)) == len(records.skipped) == 1


def test_nesting_without_end_is_a_bad_row(tmp_path):
    with pytest.raises(data.BadRow, match="nested too deeply"):
        list(data.read(written(tmp_path / "x.jsonl", b'{"a": ' + b"[" * 100_000)))


def test_a_bad_row_survives_pickling():
    error = pickle.loads(pickle.dumps(data.BadRow("file:3", "why")))
    assert (str(error), error.where, error.reason) == ("data: file:3: why", "file:3", "why")


# Sources


def test_an_array_that_would_fill_the_memory_is_refused_and_says_what_to_do(tmp_path, monkeypatch):
    content = json.dumps(PAIRS).encode()
    paths = [written(tmp_path / "a.json", content), written(tmp_path / "a.json.gz", gzip.compress(content))]
    monkeypatch.setattr(sources_module, "ARRAY_LIMIT", len(content))
    assert [len(data.read(path)) for path in paths] == [7, 7]
    monkeypatch.setattr(sources_module, "ARRAY_LIMIT", len(content) - 1)
    for path in paths:
        with pytest.raises(ValueError, match=re.escape(f"source: got {path}, a JSON array of more than") + ".* jq -c"):
            data.read(path)


def test_a_damaged_gz_is_named(tmp_path):
    whole = gzip.compress(lines(PAIRS))
    for name, content in {
        "short.gz": whole[:-20],
        "wrong.gz": whole[:12] + bytes([255 - whole[12]]) + whole[13:],
    }.items():
        path = written(tmp_path / name, content)
        with pytest.raises(OSError, match=f"{path}"):
            list(data.read(path))


def test_a_gz_cannot_be_shuffled_and_says_so(tmp_path):
    path = written(tmp_path / "a.jsonl.gz", gzip.compress(lines(PAIRS)))
    with pytest.raises(TypeError, match=re.escape(f"got {path}, which can be read in its order alone; gunzip it to")):
        data.shuffle(data.read(path))


def sources(tmp_path):
    yield "jsonl", written(tmp_path / "a.jsonl", lines(PAIRS))
    yield "gz", written(tmp_path / "a.jsonl.gz", gzip.compress(lines(PAIRS)))
    yield "array", written(tmp_path / "a.json", json.dumps(PAIRS, indent=1).encode())
    yield "array.gz", written(tmp_path / "a.json.gz", gzip.compress(json.dumps(PAIRS).encode()))
    yield "json lines in .json", written(tmp_path / "b.json", lines(PAIRS))
    yield "rows", PAIRS
    yield "stream", io.BytesIO(lines(PAIRS))
    yield "text stream", io.StringIO(lines(PAIRS).decode())
    yield "generator", (row for row in PAIRS)
    yield "two files", [written(tmp_path / "c.jsonl", lines(PAIRS[:3])), tmp_path / "c2.jsonl"]
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(PAIRS), tmp_path / "a.parquet", row_group_size=3)
    yield "parquet", str(tmp_path / "a.parquet")
    datasets = pytest.importorskip("datasets")
    yield "dataset", datasets.Dataset.from_list(PAIRS)
    yield "iterable dataset", datasets.Dataset.from_list(PAIRS).to_iterable_dataset()


def test_every_source_gives_the_same_records(tmp_path):
    written(tmp_path / "c2.jsonl", lines(PAIRS[3:]))
    wanted = [(r["prompt"], (r["chosen"], r["rejected"]), None, None, None, r["margin"], {}) for r in PAIRS]
    in_order = ("gz", "stream", "text stream", "generator", "iterable dataset")
    once = ("stream", "text stream", "generator")
    for name, source in sources(tmp_path):
        records = data.read(source)
        assert bare(records) == wanted, name
        assert records.format == "trl"
        if name in once:
            with pytest.raises(ValueError, match="source: got a stream that was read before"):
                list(records)
        else:
            assert bare(records) == wanted, name
        if name in in_order:
            with pytest.raises(TypeError, match="which can be read in its order alone"):
                len(records)
        else:
            picked = data.read(source)
            assert bare(picked[i] for i in (6, 0, 3, -1, 2)) == [wanted[i] for i in (6, 0, 3, -1, 2)], name
            assert len(picked) == 7 and [picked[i].where for i in range(7)] == [r.where for r in records]
            with pytest.raises(IndexError):
                picked[7]


def test_lines_are_numbered_across_blank_ones(tmp_path):
    path = written(tmp_path / "x.jsonl", b"\n" + GOOD + b"\n\n\n" + GOOD + b"\n" + GOOD + b"\n\n" + GOOD)
    records = data.read(path)
    assert [records[i].where for i in range(4)] == [f"{path}:{n}" for n in (2, 5, 6, 8)] == [r.where for r in records]


def test_the_format_of_picked_rows_is_that_of_the_first(tmp_path):
    path = written(tmp_path / "x.jsonl", GOOD + b'\n{"prompt": "a", "answers": ["b", "c"]}\n')
    with pytest.raises(data.BadRow, match="got the format ranked, expected trl"):
        data.read(path)[1]
    assert data.read(path).format == "trl"


def test_a_file_that_changes_after_it_was_counted_is_refused(tmp_path):
    path = written(tmp_path / "x.jsonl", GOOD + b"\n")
    records = data.read(path)
    assert len(records) == 1
    written(tmp_path / "x.jsonl", b"\n\n" + GOOD)
    with pytest.raises(ValueError, match="which changed after its lines were counted"):
        records[0]


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(TypeError, match="source: got int 3, expected a path"):
        data.read(3)
    with pytest.raises(ValueError, match="on_error: got 'ignore'"):
        data.read([], on_error="ignore")
    with pytest.raises(FileNotFoundError):
        data.read(tmp_path / "none.jsonl")


def test_a_file_is_streamed_in_little_memory(tmp_path):
    """60 MB of lines, read and counted by a process that may grow by a tenth of them."""
    path = tmp_path / "x.jsonl"
    line = json.dumps({"prompt": "p" * 2000, "chosen": "c" * 500, "rejected": "r" * 500}).encode() + b"\n"
    with path.open("wb") as file:
        for _ in range(20_000):
            file.write(line)
    script = """
import sys
from dpofast import data
from dpofast._memory import peak_growth
records = data.read(sys.argv[1])
next(iter(records))
counts = []
print(peak_growth(lambda: counts.extend((sum(1 for _ in records), len(records)))))
assert counts == [20_000, 20_000]
"""
    found = subprocess.run([sys.executable, "-c", script, path], check=True, capture_output=True, text=True)
    assert path.stat().st_size > 60e6 and int(found.stdout) < 6e6
