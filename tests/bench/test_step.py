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


def test_a_row_that_rounds_its_logits_is_held_to_those_in_fp32():
    """To the loss of these by a few per cent, and the timed one, which is rounded, by what rounding can be."""
    (row,) = (row for row in step.ROWS if row.truth == "exact")
    found = outcomes(0.33, 4.5, 0.305, 4.1) | {"exact": step.Outcome(0.3, 4.0)}
    step.check(row, found)
    with pytest.raises(RuntimeError, match="loss is 0.305 with dpofast and 0.25 without"):
        step.check(row, found | {"exact": step.Outcome(0.25, 4.0), "before": step.Outcome(0.25, 4.0)})
    with pytest.raises(RuntimeError, match="the loss is 0.4, and 0.3 of logits in fp32"):
        step.check(row, found | {"before": step.Outcome(0.4, 4.0)})


def test_logits_of_the_loop_in_bf16_are_not_rounded_where_they_are_the_truth(tmp_path, monkeypatch):
    """Beside the same loop in fp32, with the model's hidden states rounded and its head: only sums remain."""
    (row,) = (row for row in step.ROWS if row.truth == "exact")
    monkeypatch.chdir(ROOT)
    with numerics.threads(1):
        step.write_tiny(tmp_path)
        _, found = step.times(row, tmp_path, 1)
    assert found.keys() == {"before", "after", "exact"}
    assert found["after"].loss == pytest.approx(found["exact"].loss, rel=1e-3)


def test_what_is_measured_is_saved_before_the_next_row(tmp_path, monkeypatch):
    def measure(row, _folder, _rounds):
        if row is not step.ROWS[0]:
            raise KeyboardInterrupt
        yield [row.facts.of("time", 1.0, "s", provider=row.provider)]

    monkeypatch.setattr(step, "measure", measure)
    monkeypatch.setattr(step, "in_a_process_of_its_own", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["step", "--quick", "--out", str(tmp_path / "step.json")])
    with pytest.raises(KeyboardInterrupt):
        step.main()
    assert [r.value for r in record.read(tmp_path / "step.json").where(metric="time")] == [1.0]


def test_rows_that_do_not_exist_are_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["step", "--rows", "unsloth"])
    with pytest.raises(SystemExit):
        step.main()
    assert "--rows unsloth: expected parts of TRL DPOTrainer, bf16, " in capsys.readouterr().err


def test_pairs_are_cut_from_rules_to_the_size_that_was_asked_for(tmp_path):
    from tiny_weights import write_tiny

    from dpofast.train.model import load_tokenizer

    pytest.importorskip("ruff")
    write_tiny(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))  # of bytes
    cut = step.cut_pairs(tokenizer, 96, 32)
    assert len(cut) == step.PAIRS and len({pair["prompt"] for pair in cut}) == step.PAIRS
    assert {(len(p["prompt"].encode()), len(p["chosen"].encode())) for p in cut} <= {
        (a, b) for a in range(94, 99) for b in range(29, 34)
    }
    for pair in step.longest_pairs(tokenizer, 400):
        assert "Write code that passes the lint rule" in pair["prompt"] and pair["chosen"] != pair["rejected"]
        assert 300 < len(pair["prompt"].encode()) + max(len(pair[x].encode()) for x in ("chosen", "rejected")) < 400


@pytest.mark.parametrize("name", ["step", "trainer"])
def test_outside_of_a_checkout_the_tiny_model_is_missed_in_words(name, tmp_path, monkeypatch, capsys):
    from dpofast.bench import trainer

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench", "--quick"])
    with pytest.raises(SystemExit):
        {"step": step, "trainer": trainer}[name].main()
    assert "examples/tiny.py: run this in a checkout" in capsys.readouterr().err
