"""The page and the CSV of records: nothing from a network, every record in its columns; lines through sizes."""

from __future__ import annotations

import csv as csv_file
import json
import re
from pathlib import Path

import pytest

from dpofast.bench import csv, record, report, slopes
from dpofast.bench.record import Record

ROOT = Path(__file__).parents[2]
COLUMNS = (
    "kernel_name,kernel_provider,kernel_operation_mode,metric_name,metric_unit,x_name,x_label,x_value,y_value_50,"
    "y_value_20,y_value_80,extra_benchmark_config_str,gpu_name,timestamp,liger_version"
)
MACHINE = {"device": "any", "date": "2026-11-27"}


def line(sizes=(256, 1024, 4096), fixed=0.5, each=0.25, **facts) -> list[Record]:
    of = Record("sweep", provider="dpofast", dtype="fp32", head="trained")._replace(**facts)
    return [of._replace(shape=(n, 8, 100), value=fixed + each * n) for n in sizes]


@pytest.fixture
def page(monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("markdown_it")
    monkeypatch.chdir(ROOT)
    from dpofast.bench import page

    return page


def test_a_line_is_found_again():
    found = slopes.fit([256, 1024, 4096], [0.5 + 0.25 * n for n in (256, 1024, 4096)])
    assert found == pytest.approx((0.5, 0.25, 0, 256, 4096), abs=1e-9)
    flat = slopes.fit([256, 1024, 4096], [7.0, 7.0, 7.0])
    assert flat.fixed == pytest.approx(7) and abs(flat.each) < 1e-9
    # A tenth more at one size is said to be off, and moves the slope by less than that.
    bent = slopes.fit([256, 1024, 4096], [25.6, 102.4, 450.56])
    assert 0.02 < bent.off < 0.1 and 0.1 < bent.each < 0.11


def test_two_sizes_are_too_few():
    with pytest.raises(ValueError, match=r"sizes: got \[8, 16\], expected at least 3"):
        slopes.fit([8, 16, 8], [1, 2, 3])
    results = record.Results(MACHINE, line(metric="time", unit="s", sizes=(8, 16)))
    assert not slopes.slopes(results, "time")


def test_a_median_with_its_range_is_on_the_line_of_the_others():
    ranged = [
        r._replace(spread=i, low=r.value - i, high=r.value + i) for i, r in enumerate(line(metric="time", unit="s"))
    ]
    results = record.Results(MACHINE, [r._replace(suite="sweep") for r in ranged])
    assert len(slopes.slopes(results, "time")) == 1
    assert report.table_of(results, "sweep").count("within 0%") == 1


def test_series_keep_apart_what_differs():
    records = line(metric="time", unit="s") + line(metric="time", unit="s", dtype="bf16", each=0.125)
    found = slopes.slopes(record.Results(MACHINE, records), "time")
    assert {facts.dtype: round(line.each, 6) for facts, line in found.items()} == {"fp32": 0.25, "bf16": 0.125}
    twice = record.Results(MACHINE, line(metric="time", unit="s") + line(metric="time", unit="s", run=2))
    assert not slopes.slopes(twice, "time")


def test_the_table_says_lines_and_what_is_missing():
    failed = Record("sweep", "time", provider="TRL", dtype="fp32", shape=(256, 8, 100), failed="no such module")
    records = line(metric="time", unit="s", fixed=0.001, each=1e-5) + line(metric="time / products", each=0) + [failed]
    records += line(metric="peak memory", unit="B", fixed=3 * 2**20, each=0)
    ours, theirs = report.table_of(record.Results(MACHINE, records)).splitlines()[2:]
    assert ours == (
        "| dpofast, fp32, V 100 | 0.50 | 0.50 | 0.50 | 1.0 + 10.0 N/1000 (within 0%) | 3 + 0.0 N/1000 | - |"
    )
    assert theirs == "| TRL, fp32, V 100 | - | - | - | - | - | 256: no such module |"


def test_csv_has_the_columns_that_ligers_visualiser_reads(tmp_path, monkeypatch, capsys):
    file = tmp_path / "sweep.json"
    time = Record("sweep", "time", 0.5, "s", shape=(256, 8, 100), provider="dpofast", dtype="fp32", spread=0.125)
    peak = time.of("peak memory", 3 << 20, "B", spread=None)
    share = Record("prompt", "time / unshared", 0.75, provider="dpofast", case="25 % prompt")
    left_out = [time._replace(value=None, failed="no"), Record("step", "time", 1.0, "s", case="LoRA")]
    record.Results(MACHINE | {"liger-kernel": "0.8.5"}, [time, peak, share, *left_out]).save(file)
    monkeypatch.setattr("sys.argv", ["csv", str(file)])
    csv.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == COLUMNS and len(lines) == 4
    speed, memory, prompt = csv_file.DictReader(lines)
    assert [speed[f"y_value_{q}"] for q in (20, 50, 80)] == ["375.0", "500.0", "625.0"]
    assert (speed["metric_name"], speed["metric_unit"], speed["x_value"]) == ("speed", "ms", "256")
    assert (memory["metric_name"], memory["metric_unit"], float(memory["y_value_50"])) == ("memory", "MB", 3)
    assert (prompt["metric_name"], prompt["x_name"], prompt["x_value"]) == ("time / unshared", "prompt", "25")
    config = json.loads(speed["extra_benchmark_config_str"])
    assert config == {"N": 256, "H": 8, "V": 100, "dtype": "fp32", "case": ""}
    assert {x["kernel_operation_mode"] for x in (speed, memory, prompt)} == {"full"}
    assert speed["timestamp"] == "2026-11-27 00:00:00" and speed["liger_version"] == "0.8.5"


def test_one_line_of_the_visualiser_is_of_one_thing(monkeypatch):
    monkeypatch.chdir(ROOT)
    for file in ("head-2026-11-24.json", "filter-2026-11-27-avx2.json", "gpu-h100-2026-11-26.json"):
        rows = list(csv.rows(record.read(record.RESULTS / file)))
        points = [(r["kernel_name"], r["kernel_provider"], r["metric_name"], r["x_value"]) for r in rows]
        assert len(rows) > 20 and len(points) == len(set(points)), file
    time = Record("sweep", "time", 0.5, "s", shape=(256, 8, 100), provider="dpofast", dtype="fp32", head="trained")
    others = (time._replace(**{k: v}) for k, v in (("shape", (256, 8, 90)), ("dtype", "bf16"), ("head", "frozen")))
    assert len({csv.row(r, MACHINE)["kernel_provider"] for r in (time, *others)}) == 4


def test_the_committed_page_is_that_of_the_records(page):
    def without_pictures(text: str) -> str:  # which differ with matplotlib's version
        return re.sub(r"<svg.*?</svg>", "<svg>", text, flags=re.S)

    text = page.PAGE.read_text()
    assert without_pictures(text) == without_pictures(page.page(page.committed())), "run: dpofast bench page"
    assert len(text) < 1e6 and text.count("<svg") >= 4
    assert "gpu-h100-2026-11-26.json" in text and "gpu-h100-sweep" not in text


def test_the_page_needs_no_network_and_its_ids_differ(page):
    text = page.page([record.RESULTS / name for name in ("prompt-2026-11-26-avx2.json", "head-2026-11-24.json")])
    assert not re.search(r"<(link|script|img|iframe|object|embed|base)\b|@import", text)
    outside = re.findall(r'(?:href|src)="(?!#)[^"]*"|url\((?!#)[^)]*\)', text)
    assert not outside
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)) > 20
    assert set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)


def test_the_page_has_tables_pictures_and_every_number(page, tmp_path, monkeypatch, capsys):
    records = [r for metric, unit in (("time", "s"), ("peak memory", "B")) for r in line(metric=metric, unit=unit)]
    records += line(metric="time / products") + line(metric="error of d hidden", sizes=(256,))
    records += [r._replace(provider="<TRL>") for r in records]
    file, out = tmp_path / "sweep.json", tmp_path / "new" / "page.html"
    record.Results(MACHINE, records).save(file)
    monkeypatch.setattr("sys.argv", ["page", str(file), "--out", str(out)])
    page.main()
    text = out.read_text()
    assert text.count("<svg") == 2 and "error of d hidden</text>" in text and "completion tokens</text>" in text
    assert text.count("<tr>") == 1 + 2 + 1 + len(records) and "<TRL>" not in text and "&lt;TRL&gt;" in text


def test_one_size_makes_no_picture_of_sizes(page):
    results = record.Results(MACHINE, line(metric="time", unit="s", sizes=(256,)))
    assert page.draw_sizes(results) is None and page.draw_errors(results) is None
