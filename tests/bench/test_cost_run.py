"""The benchmark of the CPU's cost model runs, says what it measured, and goes on where it stopped."""

from __future__ import annotations

import sys

import numerics
import pytest

from dpofast.bench import cost, record

SMALL = (40, 16, 300)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(cost, "SHAPES", (SMALL,))
    monkeypatch.setattr(cost, "PEER_SHAPES", (SMALL,))


def test_each_case_is_predicted_and_measured(small):
    cases = [*cost.grid((1,)), next(cost.others((1,)))]
    assert len({case.facts for case in cases}) == len(cases) == 7
    with numerics.threads(1):
        for case in cases:
            ratio, took = cost.measure(case, rounds=1)
            assert (ratio.metric, took.metric) == ("predicted / measured", "time") and min(ratio.value, took.value) > 0
            assert ratio.shape == SMALL and ratio.case.endswith("1 thread") and bool(ratio.schedule) != bool(case.peer)


def test_it_goes_on_where_it_stopped(small, tmp_path, monkeypatch, capsys):
    out = tmp_path / "cost.json"
    ask = ["cost", "--out", str(out), "--rounds", "1", "--threads", "1", "--parts", "grid"]
    with numerics.threads(1):
        for seconds in ("0", "60", "60"):
            monkeypatch.setattr(sys, "argv", [*ask, "--seconds", seconds])
            cost.main()
    assert len(record.read(out).where(metric="predicted / measured")) == 6
    text = capsys.readouterr().out
    assert text.count("trained, bf16, 1GiB") == 1 and "dpofast, fp32: 3 cases" in text


def test_the_summary_counts_what_is_near():
    case = cost.Case(SMALL, "fp32", "trained", "1GiB", 2)
    records = [case.facts.of("predicted / measured", x, run=i) for i, x in enumerate((1.0, 1.09, 0.8, 1.3))]
    (line,) = cost.summary(record.Results({}, records))
    assert line == "dpofast, fp32: 4 cases, 50% within 10%, 75% within 25%, 0.80 to 1.30, median 1.04"
