"""The step's benchmark compares what it says it compares, and refuses to report two ways that disagree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numerics
import pytest
import torch

from dpofast.bench import record, report, step

pytest.importorskip("trl", minversion="1.16")
pytest.importorskip("peft")
pytest.importorskip("liger_kernel")

ROOT = Path(__file__).parents[2]


def test_a_quick_run_writes_the_table_and_its_numbers(tmp_path):
    program = "import sys; sys.path.pop(0); from dpofast.bench import step; step.main()"
    command = [sys.executable, "-c", program, "--quick", "--rounds", "2", "--rows", "LoRA", "plain"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # products this small are slower on several threads
    done = subprocess.run(
        [*command, "--out", tmp_path / "out" / "step.json"],
        capture_output=True, text=True, check=False, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = record.read(tmp_path / "out" / "step.json")
    assert results.machine["torch"] == torch.__version__
    rows = [row for row in step.ROWS if row.lora or row.workload.startswith("plain")]
    assert done.stdout.endswith(report.step_table(results))
    assert [report.step_name(r) for r in results.where(metric="time / before")] == [str(row) for row in rows]
    for row in rows:
        facts = {"workload": row.workload, "case": row.facts.case, "dtype": row.dtype}
        before, after = (
            [r.value for r in results.where(**facts, provider=provider, metric="time")]
            for provider in (row.provider, "dpofast")
        )
        assert len(before) == len(after) == 2
        ratios = [b / a for a, b in zip(before, after)]
        assert results.value(**facts, metric="time / before") == pytest.approx(sum(ratios) / 2)
        for peak in results.where(**facts, metric="peak memory"):
            assert 0 < peak.value < 64 << 20, "a tiny step, and nothing that was there before it"


@pytest.mark.parametrize("row", step.ROWS, ids=str)
def test_only_the_second_way_of_a_row_runs_dpofast(row, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with numerics.threads(1), torch._dynamo.config.patch(disable=True):  # Liger compiles, for longer than it runs
        step.write_tiny(tmp_path)
        _, forward_backward = row.build(tmp_path, row)
        ran = {}
        for way in step.WAYS:
            with torch.profiler.profile() as seen:
                forward_backward(way)
            ran[way] = any(event.key.startswith("dpofast::") for event in seen.key_averages())
    assert ran == {"before": False, "after": True}


ROW = {dtype: step.ROWS[0]._replace(dtype=dtype) for dtype in ("fp32", "bf16")}


def outcomes(loss: float, norm: float, other_loss: float, other_norm: float) -> dict[str, step.Outcome]:
    return {"before": step.Outcome(loss, norm), "after": step.Outcome(other_loss, other_norm)}


def test_ways_that_agree_pass():
    step.check(ROW["fp32"], outcomes(0.3, 4.0, 0.300001, 4.0001))
    step.check(ROW["bf16"], outcomes(0.3, 4.0, 0.31, 4.1))


@pytest.mark.parametrize(
    "dtype, found, message",
    [
        ("fp32", outcomes(0.3, 4.0, 0.301, 4.0), "loss is 0.301 with dpofast and 0.3 without"),
        ("fp32", outcomes(0.3, 4.0, 0.3, 4.01), "grad_norm is 4.01 with dpofast and 4.0 without"),
        ("bf16", outcomes(0.3, 4.0, 0.34, 4.0), "loss is 0.34"),
        ("fp32", outcomes(0.3, 4.0, float("nan"), 4.0), "loss is nan"),
        ("fp32", outcomes(0.6931, 4.0, 0.6931, 4.0), "equals its reference"),
    ],
)
def test_ways_that_disagree_or_show_nothing_fail(dtype, found, message):
    with pytest.raises(RuntimeError, match=message):
        step.check(ROW[dtype], found)


def test_rows_that_do_not_exist_are_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["step", "--rows", "unsloth"])
    with pytest.raises(SystemExit):
        step.main()
    assert "--rows unsloth: expected parts of TRL DPOTrainer, bf16, " in capsys.readouterr().err
