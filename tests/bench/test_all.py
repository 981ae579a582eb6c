"""Everybody on the same heads: what a point is given, a run from end to end, that it goes on, and its tables."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch

from dpofast.bench import all as everybody
from dpofast.bench import csv, measure, record, report
from dpofast.bench.providers import BY_NAME, CONTENDERS, of_pairs, plain_logps, training_step
from dpofast.bench.record import Record
from dpofast.bench.workloads import IGNORE

TINY = everybody.REHEARSAL
FACTS = Record("all", workload=TINY, shape=(64, 16, 300), dtype="fp32")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("inputs")
    everybody.prepare(made / f"{TINY}.pt", TINY)
    return made


@pytest.mark.parametrize("share", everybody.SHARES)
def test_prompts_are_that_share_and_change_nothing_else(folder, share):
    hidden, weight, labels = everybody.inputs(folder, FACTS._replace(prompt=share), CPU)
    counts = labels != IGNORE
    alone, same_weight, same_labels = everybody.inputs(folder, FACTS, CPU)
    assert abs((~counts).float().mean() - share / 100) < 0.02 and len(hidden) % 2 == 0
    torch.testing.assert_close(
        (hidden[counts], weight, labels[counts]), (alone, same_weight, same_labels), rtol=0, atol=0
    )
    first, second = counts.chunk(2)  # each half, which is a sequence to Liger: its prompt, then what counts
    assert torch.equal(first, second) and torch.equal(first.sort(stable=True).values, first)


def test_a_cut_head_has_labels_that_it_has(folder):
    *_, whole = everybody.inputs(folder, FACTS, CPU)
    hidden, weight, labels = everybody.inputs(folder, FACTS._replace(shape=(64, 16, 100)), CPU)
    assert weight.shape == (100, 16) and 0 <= labels.min() and labels.max() < 100
    assert torch.equal(labels[whole < 100], whole[whole < 100]) and (whole >= 100).any()
    assert torch.equal(labels[whole >= 100], (hidden @ weight.T).argmax(-1)[whole >= 100])


def test_flat_states_are_flat(folder):
    flat, real = (everybody.inputs(folder, FACTS._replace(states=x), CPU) for x in ("flat", ""))
    assert plain_logps(*flat).std() < 0.1 * plain_logps(*real).std()


def test_exact_is_autograd_in_fp64_over_blocks(folder, monkeypatch):
    monkeypatch.setattr(measure, "VOCAB_BLOCK", 64)
    hidden, weight, labels = everybody.inputs(folder, FACTS._replace(prompt=40), CPU)
    c = torch.randn(len(labels), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    h, w = (x.double().requires_grad_() for x in (hidden, weight))
    want = (h @ w.T).log_softmax(-1).gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1).masked_fill(labels < 0, 0)
    (want * c).sum().backward()
    for got, x in zip(measure.exact(hidden, weight, labels, c), (want.detach(), h.grad, w.grad)):
        torch.testing.assert_close(got, x, rtol=1e-11, atol=1e-12)
    assert measure.error(w.grad.float(), w.grad) == pytest.approx(
        ((w.grad.float() - w.grad).norm() / w.grad.norm()).item()
    )


SUMS = [c for c in CONTENDERS if c.summed and c.loss and c.device != "cuda" and "compiled" not in c.name]


@pytest.mark.parametrize("contender", SUMS, ids=lambda c: c.name)
def test_everybody_has_the_gradient_of_the_same_sum(folder, contender, monkeypatch):
    if "TRL" in contender.name:
        pytest.importorskip("trl", minversion="1.16")
    if "cut" in contender.name:
        pytest.importorskip("cut_cross_entropy")
    if "F." in contender.name and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("not in this torch")
    tensors = everybody.inputs(folder, FACTS._replace(prompt=40), CPU)
    _, *want = measure.exact(*tensors, -torch.ones(len(tensors[0]), dtype=torch.float64))
    run, leaves = training_step(contender.loss, *tensors, not contender.frozen)
    with torch._dynamo.config.patch(disable=True):
        run()
    assert (leaves[1].grad is None) == contender.frozen
    for leaf, x in zip(leaves, want):
        if leaf.grad is not None:
            assert measure.error(leaf.grad, x) < 1e-5


@pytest.mark.parametrize("name", everybody.PAIRED)
def test_everybody_has_the_same_loss_of_pairs(folder, name):
    pytest.importorskip({"TRL, told": "trl", "Liger DPO": "liger_kernel"}.get(name, "torch"))
    tensors = everybody.inputs(folder, FACTS, CPU)
    found = []
    for who in ("plain PyTorch", name):
        run, leaves = training_step(of_pairs(who, 4), *tensors)
        run()
        found.append((of_pairs(who, 4)(*leaves, tensors[2]).detach(), *(leaf.grad for leaf in leaves)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


@pytest.fixture
def run(tmp_path, monkeypatch):
    out = tmp_path / "all.json"
    monkeypatch.setattr(everybody, "AXES", {"vocabulary": (100, 200, 300), "dpo": (1, 2, 4)})
    monkeypatch.setattr(everybody, "AXIS_TOKENS", 32)
    monkeypatch.setattr(everybody, "PAIR_TOKENS", 16)
    monkeypatch.setattr(everybody, "sizes_and_page", lambda *_: None)
    # Processes have a test of their own; in this one points take milliseconds, and a process takes seconds.
    monkeypatch.setattr(everybody, "in_a_process_of_its_own", lambda work, *args, limit_s=None: work(*args))
    monkeypatch.setattr(os, "environ", dict(os.environ))

    def run(*options: str) -> record.Results:
        given = ("--rehearse", "--rounds", "2", "--dtypes", "fp32", "--scratch", str(tmp_path), "--out", str(out))
        monkeypatch.setattr(sys, "argv", ["all", *given, *options])
        everybody.main()
        return record.read(out)

    return run


def test_a_run_ends_goes_on_and_has_its_tables(run, capsys):
    with pytest.raises(FileNotFoundError):
        run("--seconds", "0")
    assert "points are left; run it again to go on" in capsys.readouterr().out
    only = ("--only", "dpofast, auto")
    first = run(*only, "--suites", "all")
    assert not [r for r in first.records if r.failed]
    keys = [(everybody.key(r), r.metric) for r in first.records]
    assert len(set(keys)) == len(keys)
    again = run(*only, "--suites", "all", "vocabulary")
    assert again.records[: len(first.records)] == first.records and len(again.records) > len(first.records)
    grid = report.table_of(again, "all").splitlines()
    assert "| time, 0 % prompt | time, 40 % prompt | time, 80 % prompt | time, flat |" in grid[0]
    (ours,) = (row.split(" | ") for row in grid if "dpofast, auto" in row)
    assert "drops ignored labels" in ours and all(float(x) > 0 for x in ours[3:8])
    errors = [r.value for r in again.records if r.provider == "dpofast, auto" and r.metric == "error of d hidden"]
    assert len(errors) == 2 and max(errors) < 1e-5  # real states and flat ones; in fp32 auto is exact
    by_vocabulary = report.table_of(again, "vocabulary")
    assert "V 100 | V 200 | V 300 |" in by_vocabulary and "(within" in by_vocabulary
    lines = list(csv.rows(again))
    assert {x["kernel_operation_mode"] for x in lines} == {"full", "forward"}
    assert {(x["kernel_name"], x["x_name"]) for x in lines} == {("all", "prompt"), ("vocabulary", "V")}
    assert all(x["y_value_20"] <= x["y_value_50"] <= x["y_value_80"] for x in lines)
    of_lines = [(x["kernel_name"], x["kernel_provider"], x["kernel_operation_mode"], x["metric_name"]) for x in lines]
    points = [(*which, x["x_value"]) for which, x in zip(of_lines, lines)]
    assert len(points) == len(set(points))


def test_its_pictures_are_on_the_page(run, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("markdown_it")
    from dpofast.bench import page

    run("--only", "dpofast, auto", "--suites", "vocabulary", "dpo")
    text = page.page([tmp_path / "all.json"])
    assert text.count("<svg") >= 2 and "peak above inputs, MiB" in text and "<td>V 300</td>" not in text
    for axis in ("vocabulary", "pairs"):
        assert f">{axis}</text>" in text


def test_more_memory_than_the_limit_is_an_error_and_the_limit_ends():
    def take(n_bytes: int) -> None:
        torch.empty(n_bytes, dtype=torch.uint8)

    with pytest.raises(MemoryError, match="it takes more than 16 MiB"), measure.at_most(16 << 20):
        take(256 << 20)
    take(256 << 20)
    with pytest.raises(RuntimeError, match="another"), measure.at_most(16 << 20):
        raise RuntimeError("another")


def test_a_failure_is_recorded_and_said_in_the_table(monkeypatch):
    def fail(*_, **__) -> None:
        raise RuntimeError("MemoryError: it takes more than 16 MiB")

    monkeypatch.setattr(everybody, "in_a_process_of_its_own", fail)
    args = type("Args", (), {"limits": everybody.Limits(10, 0), "device": "cpu", "rounds": 1})
    (found,) = everybody.run(Path(), everybody.of(BY_NAME["TRL"], FACTS._replace(prompt=40)), [], args)
    assert found.metric == "time" and found.value is None
    table = report.table_of(record.Results({}, [found]))
    assert table.splitlines()[2].endswith("| - | - | - | - | - | 40 % prompt: MemoryError: it takes more than 16 MiB |")


def test_a_point_that_would_take_too_long_is_left_out():
    of = everybody.of(BY_NAME["plain PyTorch"], FACTS)
    took = of.of("time", 3.0, "s")
    longer = of._replace(prompt=80)
    assert everybody.expected(of, [took]) == 3 and everybody.expected(longer, [took]) == pytest.approx(15)
    assert everybody.expected(of._replace(provider="dpofast"), [took]) == 0
    ours = everybody.of(BY_NAME["dpofast"], FACTS)
    assert everybody.expected(ours._replace(prompt=80), [ours.of("time", 3.0, "s")]) == 3
    limits = everybody.Limits(10, 0)
    (left_out,) = everybody.run(Path(), longer, [took], type("Args", (), {"limits": limits}))
    assert left_out.failed == "left out: a step would take 15 s"


def test_a_record_of_another_machine_is_not_gone_on_with(tmp_path):
    out = tmp_path / "all.json"
    record.Results({"device": "a", "date": "1"}, [FACTS.of("time", 1.0)]).save(out)
    new = record.Results({"device": "a", "date": "2"}, [])
    assert len(everybody.resume(out, new).records) == 1
    with pytest.raises(ValueError, match="it is of another device; give another --out"):
        everybody.resume(out, record.Results({"device": "b", "date": "2"}, []))


def test_a_process_of_its_own_says_why_there_is_no_answer():
    assert measure.in_a_process_of_its_own(divmod, 7, 2) == (3, 1)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        measure.in_a_process_of_its_own(divmod, 7, 0)
    with pytest.raises(RuntimeError, match="ended with exit code 3"):
        measure.in_a_process_of_its_own(os._exit, 3)
    with pytest.raises(TimeoutError, match="more than 0 s"):
        measure.in_a_process_of_its_own(time.sleep, 60, limit_s=0.2)
