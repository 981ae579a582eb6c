"""A tiny sweep from end to end: what it records, that it goes on where it ended, and what it leaves out."""

from __future__ import annotations

import pytest
import torch

from dpofast.bench import record, sweep
from dpofast.bench.record import Record
from dpofast.bench.workloads import States


@pytest.fixture
def run(tmp_path, monkeypatch):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(90, (30,), generator=g)
    states = States("SmolLM2", torch.randn(30, 16, generator=g), torch.randn(90, 16, generator=g), labels)
    monkeypatch.setattr(sweep, "load", lambda name, n: states)
    out = tmp_path / "sweep.json"

    def run(*options: str) -> record.Results:
        given = ("--tokens", "40", "80", "--dtypes", "fp32", "--out", str(out), *options)
        monkeypatch.setattr("sys.argv", ["sweep", *given])
        sweep.main()
        return record.read(out)

    return run


def test_a_sweep_ends_and_goes_on(run):
    first = run("--providers", "dpofast", "plain PyTorch", "--vocab", "100")
    keys = [(r.provider, r.shape, r.metric) for r in first.records]
    assert len(keys) == len(set(keys))
    for name in ("dpofast", "plain PyTorch"):
        of = [r for r in first.records if r.provider == name]
        assert {r.shape for r in of} == {(40, 16, 100), (80, 16, 100)} and not any(r.failed for r in of)
        (off,) = (r.value for r in of if r.metric == "error of d hidden")
        assert 0 < off < 1e-5
    # Nothing is measured twice; a further size is.
    again = run("--providers", "dpofast", "plain PyTorch", "--vocab", "100", "--tokens", "40", "80", "120")
    assert again.records[: len(first.records)] == first.records
    assert {r.shape[0] for r in again.records[len(first.records) :]} == {120}


def test_no_point_begins_after_the_time(run, tmp_path):
    with pytest.raises(FileNotFoundError):
        run("--seconds", "0")


@pytest.mark.parametrize("metric, unit, limit, text", [("time", "s", 10, "16 s"), ("peak memory", "B", 8, "0 MiB")])
def test_a_point_beyond_a_limit_is_named(metric, unit, limit, text):
    before = [Record("sweep", metric, 4.0, unit, shape=(100, 8, 90))]
    assert sweep.beyond(before, 400, {metric: limit}) == f"left out: {text} expected from 100 tokens"
    assert not sweep.beyond(before, 200, {metric: limit})
    assert sweep.beyond([before[0]._replace(failed="no memory")], 200, {}) == "no memory"


def test_a_failure_is_recorded_and_ends_the_series(run):
    found = run("--providers", "Liger", "--tokens", "1", "3", "--vocab", "100", "--limit-seconds", "1e-9").records
    assert [r.shape[0] for r in found if r.failed] and found[-1].failed
    assert found[-1].shape[0] == 3


def test_states_repeat_and_labels_stay_in_the_vocabulary(tmp_path):
    saved = {"hidden": torch.randn(5, 4), "weight": torch.randn(9, 4), "labels": torch.arange(4, 9)}
    torch.save(saved, tmp_path / "s.pt")
    hidden, weight, labels = sweep.tensors(tmp_path / "s.pt", "fp32", 12, 7)
    assert hidden.shape == (12, 4) and weight.shape == (7, 4) and labels.max() < 7
    assert torch.equal(hidden[5:10], saved["hidden"]) and torch.equal(weight, saved["weight"][:7])
    assert sweep.tensors(tmp_path / "s.pt", "bf16", 3, 20)[1].shape == (20, 4)
