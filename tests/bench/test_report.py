"""The tables of README and docs/design.md and README's figure are made from the results that are committed."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpofast.bench import goals, record, report

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_every_table_is_that_of_its_results():
    pages = {page: page.read_text() for page in report.PAGES}
    assert sum(len(report.MARKER.findall(text)) for text in pages.values()) >= 6
    for text in pages.values():
        assert report.with_tables(text) == text


def test_another_number_makes_another_table():
    def changed(file: str) -> record.Results:
        results = record.read(record.RESULTS / file)
        other = [r._replace(value=7.25) if r.metric == "time / before" else r for r in results.records]
        return results._replace(records=other)

    text = report.with_tables(report.PAGES[0].read_text(), changed)
    assert "| TRL DPOTrainer, bf16 | 7.25 |" in text


def test_the_first_sentence_has_the_numbers_of_the_step():
    facts = {"workload": "TRL DPOTrainer", "dtype": "bf16", "case": ""}
    step = report.results_of("step")
    peaks = {p: step.value(metric="peak memory", provider=p, **facts) for p in ("TRL", "dpofast")}
    ratio, memory = step.value(metric="time / before", **facts), peaks["dpofast"] / peaks["TRL"]
    first = " ".join(report.PAGES[0].read_text().split("![")[0].split())
    assert f"takes {ratio:.2f} of the time and {memory:.2f} of the peak memory" in first


def test_the_second_has_those_of_the_shared_prompt():
    shared, found = record.read(record.RESULTS / "step-shared-2026-11-27.json"), {}
    for dtype in ("fp32", "bf16"):
        facts = {"workload": "TRL DPOTrainer", "dtype": dtype}
        peaks = [shared.value(metric="peak memory", provider=p, **facts) for p in ("dpofast", "TRL")]
        found[dtype] = f"{shared.value(metric='time / before', **facts):.2f}", f"{peaks[0] / peaks[1]:.2f}"
    first = " ".join(report.PAGES[0].read_text().split("![")[0].split())
    full, half = found["fp32"], found["bf16"]
    assert f"{full[0]} of the time and {full[1]} of the memory in fp32, and {half[0]} and {half[1]} in bf16" in first


@pytest.mark.parametrize("suite", report.FIGURES)
def test_the_figures_show_them_too(suite, tmp_path):
    pytest.importorskip("matplotlib")
    report.draw(suite, tmp_path)
    file = f"{suite}.svg"

    def texts(svg: str) -> list[str]:
        return [part.split("</text>")[0].rpartition(">")[2] for part in svg.split("<text")[1:]]

    def paths(svg: str) -> list[str]:
        return [part.partition('"')[0] for part in svg.split(' d="')[1:]]

    committed, drawn = (ROOT / "docs" / file).read_text(), (tmp_path / file).read_text()
    assert texts(committed) == texts(drawn) and len(texts(committed)) >= 8
    assert paths(committed) == paths(drawn)


def test_a_file_is_read_as_it_was_written(tmp_path):
    facts = record.Record("head", workload="SmolLM2", shape=(1000, 576, 49152), provider="dpofast", dtype="bf16")
    results = record.Results({"device": "any", "date": "2026-11-26"}, [])
    results.add([[facts.of("time / products", 0.5, spread=0.01), facts.of("time", 0.1, "s")]])
    results.add([[facts._replace(metric="time", provider="TRL", failed="no such module")]])
    results.save(tmp_path / "new" / "head.json")
    assert record.read(tmp_path / "new" / "head.json") == results
    assert results.value(provider="dpofast", metric="time") == 0.1 and results.value(provider="Liger") is None
    with pytest.raises(ValueError, match="2 records have them, expected one"):
        results.value(provider="dpofast")


def test_results_go_to_the_checkout_or_to_the_current_folder(tmp_path, monkeypatch, capsys):
    machine = {"date": "2026-11-26"}
    assert record.begin(None, "head", machine)[1] == record.RESULTS / "head-2026-11-26.json"
    monkeypatch.chdir(tmp_path)
    assert record.begin(None, "head", machine)[1] == Path("head-2026-11-26.json")
    assert record.begin(tmp_path / "x.json", "head", machine)[1] == tmp_path / "x.json"


def test_every_goal_is_that_of_some_committed_number():
    files = [file for file in record.RESULTS.glob("*.json") if "sweep" not in file.name]
    records = [r for file in files for r in record.read(file).records]
    assert len(records) > 300
    found = {goals.goal_of(r) for r in records}
    assert {goal for _, goal in goals.GOALS} == found - {None}


def test_a_missed_goal_is_said_so():
    small = record.Record("hardware", shape=(8, 16, 100), provider="dpofast")
    assert str(small.of("time - plain PyTorch", 0.44, "ms")) == (
        "time - plain PyTorch 0.44 ms (goal 0.3 ms more: MISSED)"
    )
    share = record.Record("hardware", case="micro-kernel").of("share of the multiply-adds", 0.9)
    assert str(share) == "share of the multiply-adds 0.9 (goal 0.88)"
    assert str(small.of("peak memory", 3 << 20, "B")) == "peak memory 3 MiB"
