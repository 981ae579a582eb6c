"""The step's benchmark compares what it says it compares, and refuses to report two ways that disagree."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numerics
import pytest
import torch

pytest.importorskip("trl", minversion="1.16")
pytest.importorskip("peft")
pytest.importorskip("liger_kernel")

BENCH = Path(__file__).parents[2] / "bench"
sys.path.append(str(BENCH))
step = importlib.import_module("step")


def test_a_quick_run_writes_the_table_and_its_numbers(tmp_path):
    rows = [row for row in step.ROWS if "LoRA" in row or "plain" in row]
    command = [sys.executable, BENCH / "step.py", "--quick", "--rounds", "2", "--rows", "LoRA", "plain"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # products this small are slower on several threads
    done = subprocess.run(
        [*command, "--out", tmp_path / "out" / "step.json"],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "step.json").read_text())
    assert list(report["results"]) == rows and report["machine"]["torch"] == torch.__version__
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1 and len(table) == 2 + len(rows)
    for line, row in zip(table[2:], rows):
        result = report["results"][row]
        assert line == step.report.step_row(row, result)
        before, after = (result["seconds"][way] for way in step.WAYS)
        assert len(before) == len(after) == 2
        ratios = [b / a for a, b in zip(before, after)]
        assert result["time_ratio"] == pytest.approx(sum(ratios) / 2)
        for peak in result["peak_bytes"].values():
            assert peak is None or 0 < peak < 64 << 20, "a tiny step, and nothing that was there before it"


@pytest.mark.parametrize("row", step.ROWS)
def test_only_the_second_way_of_a_row_runs_dpofast(row, tmp_path):
    with numerics.threads(1), torch._dynamo.config.patch(disable=True):  # Liger compiles, for longer than it runs
        step.write_tiny(tmp_path)
        _, forward_backward = step.ROWS[row](tmp_path)
        ran = {}
        for way in step.WAYS:
            with torch.profiler.profile() as seen:
                forward_backward(way)
            ran[way] = any(event.key.startswith("dpofast::") for event in seen.key_averages())
    assert ran == {"before": False, "after": True}


def outcomes(loss: float, norm: float, other_loss: float, other_norm: float) -> dict[str, step.Outcome]:
    return {"before": step.Outcome(loss, norm), "after": step.Outcome(other_loss, other_norm)}


def test_ways_that_agree_pass():
    step.check("any, fp32", outcomes(0.3, 4.0, 0.300001, 4.0001))
    step.check("any, bf16", outcomes(0.3, 4.0, 0.31, 4.1))


@pytest.mark.parametrize(
    "row, found, message",
    [
        ("any, fp32", outcomes(0.3, 4.0, 0.301, 4.0), "loss is 0.301 with dpofast and 0.3 without"),
        ("any, fp32", outcomes(0.3, 4.0, 0.3, 4.01), "grad_norm is 4.01 with dpofast and 4.0 without"),
        ("any, bf16", outcomes(0.3, 4.0, 0.34, 4.0), "loss is 0.34"),
        ("any, fp32", outcomes(0.3, 4.0, float("nan"), 4.0), "loss is nan"),
        ("any, fp32", outcomes(0.6931, 4.0, 0.6931, 4.0), "equals its reference"),
    ],
)
def test_ways_that_disagree_or_show_nothing_fail(row, found, message):
    with pytest.raises(RuntimeError, match=message):
        step.check(row, found)


def test_rows_that_do_not_exist_are_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["step.py", "--rows", "unsloth"])
    with pytest.raises(SystemExit):
        step.main()
    assert "--rows unsloth: expected parts of TRL DPOTrainer, bf16, " in capsys.readouterr().err
