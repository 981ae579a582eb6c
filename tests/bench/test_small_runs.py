"""The benchmarks of whole pairs, filtered trainings, the shared prompt and files run, and say what they measured."""

from __future__ import annotations

import numerics
import pytest
import torch

from dpofast.bench import data, pairs, step

pytest.importorskip("transformers")


def test_pairs_are_timed_in_both_ways(monkeypatch):
    monkeypatch.setattr(pairs, "BUDGETS", {"fp32": ("2MiB",)})
    with numerics.threads(1):
        records, kept = pairs.times(40, 16, 300, rounds=1)
    assert [r.provider for r in records] == ["ordinary", "by pairs"]
    assert [(r.provider, r.case) for r in kept] == [("ordinary", pairs.EVERYTHING)]
    assert all(r.metric == "time / products" and r.value > 0 and r.shape == (40, 16, 300) for r in records)


def test_the_ordinary_way_is_one_without_pairs():
    seen = []
    schedule = pairs.functional.pairs_schedule
    pairs.in_the_ordinary_way(lambda: seen.append(pairs.functional.pairs_schedule))()
    assert seen[0] is not schedule and seen[0](None, None, "", None, None) is None
    assert pairs.functional.pairs_schedule is schedule


def test_cuts_are_compared_with_what_they_leave_out(monkeypatch):
    from dpofast.bench import filter as filters

    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(200, 256, generator=g), torch.randn(5000, 256, generator=g) / 3
    weight[:, 0] += 2.0  # the mean row is no row of zeros
    labels = torch.randint(5000, (200,), generator=g)
    monkeypatch.setattr(filters, "CUTS", (9,))
    (records,) = filters.cuts(filters.States("random", hidden, weight, labels), 200)
    found = {r.metric: r.value for r in records}
    assert 0 < found["entries kept, share"] < 0.2 and 0 < found["dropped share, largest"] <= 0.125
    assert 0 < found["error, given back"] < found["error, left out"]
    assert 0 < found["error, in equal parts"] < found["error, left out"]


def test_a_filtered_training_is_compared_with_exact_ones(monkeypatch, tmp_path):
    import tiny
    from train import tiny_run

    from dpofast.bench import filter_training

    monkeypatch.setattr(filter_training, "RUNS", (("exact", None, 0), ("filtered", 0.02, 0), ("again", None, 0)))
    tiny_run.write_model(tmp_path / "model")
    steep = tiny.model()
    steep.lm_head.weight.data.mul_(40.0)  # distributions with a tail
    steep.save_pretrained(tmp_path / "model")
    tiny_run.write_pairs(tmp_path / "train.jsonl", 8)
    tiny_run.write_pairs(tmp_path / "held_out.jsonl", 4, skip=8)
    options = {"steps": 3, "batch_size": 4, "micro_batch": 4, "last_layers": 1, "evaluate_every": 0}
    with numerics.threads(1):
        exact, dropped, filtered, again = filter_training.measure(tmp_path, **options)
    assert dropped[0].value > 0
    assert [run[0].case for run in (exact, filtered, again)] == ["exact", "filtered", "again"]
    assert filtered[-1].value > 0 and again[-1].value == 0


def test_tiles_of_a_filter_are_counted():
    from dpofast.bench import report, tiles
    from dpofast.bench.record import Record, Results
    from dpofast.bench.workloads import States

    n, v = 300, 2000
    hidden = torch.zeros(n, 16)
    hidden[:, 0] = torch.linspace(0, 1, n)  # from flat to steep
    weight = 0.1 * torch.randn(v, 16, generator=torch.Generator().manual_seed(0))
    weight[::20, 0] = 12.0
    states = States("tiny", hidden, weight, torch.arange(n) * 20 % v)
    with numerics.threads(1):
        records = [r for row in tiles.tiles(states, Record("filter", workload="tiny")) for r in row]
    found = {r.metric: r.value for r in records if r.case == "2^-12"}
    assert 0.05 < found["union of 128 tokens"] <= found["union of 256 tokens"] <= 1
    assert 0 < found["tiles, ranked"] < found["tiles, as the head has it"] <= 1  # a twentieth, spread over all tiles
    assert 0 < found["error of d hidden, mean"] <= found["error of d hidden, p99"] < 0.1
    assert 0 < found["error of d weight"] < 0.1 and 0 < found["dropped share, mean"] < 1 / 8
    assert report.tiles_table(Results({}, records)).count("\n") == 2 + len(tiles.CUTS)


def test_shares_of_the_prompt_are_timed_in_three_ways(tmp_path, monkeypatch):
    import tiny

    from dpofast.bench import prompt

    with numerics.threads(1):
        step.write_tiny(tmp_path)
        monkeypatch.setattr(step, "cut_pairs", lambda *_: tiny.pairs(step.PAIRS))
        (records,) = prompt.measure(tmp_path, 128, 50, rounds=1)
    assert [(r.metric, r.provider) for r in records] == [
        ("tokens / unshared", "dpofast, prompt shared"),
        ("work / unshared", "dpofast, prompt shared"),
        ("time / plain PyTorch", "dpofast"),
        ("time / plain PyTorch", "dpofast, prompt shared"),
        ("time / unshared", "dpofast, prompt shared"),
    ]
    assert 0.5 < records[0].value < 1 and all(r.case == "50 % prompt" for r in records)


def test_tokens_are_counted_by_pair():
    from dpofast.bench import prompt

    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [1, 2, 9, 0], [7, 6, 5, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]])
    assert prompt.tokens_left({"input_ids": ids, "attention_mask": mask}) == pytest.approx(10 / 12)


def test_work_is_of_weights_of_what_a_token_sees_and_of_a_head_that_is_not_shared():
    import tiny

    from dpofast.bench import prompt

    model = tiny.model()
    config, linear = model.config, [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    ids = torch.tensor([[1, 2, 3, 4, 5], [5, 6, 7, 0, 0], [1, 2, 3, 9, 0], [5, 6, 8, 1, 0]])
    mask = (ids > 0).long()
    labels = ids.masked_fill(ids == 0, -100)
    labels[:, :2] = -100

    def work(first: int, last: int) -> int:
        """Of the tokens of a sequence from the first to the last."""
        seen = config.num_hidden_layers * config.num_attention_heads * config.head_dim * 2
        return sum(sum(m.weight.numel() for m in linear) + seen * (i + 1) for i in range(first, last))

    head = model.lm_head.weight.numel() * (3 + 1 + 2 + 2)
    apart = work(0, 5) + work(0, 3) + work(0, 4) + work(0, 4) + head
    shared = work(0, 5) + work(0, 3) + work(3, 4) + work(2, 4) + head
    found = prompt.work_left(model, {"input_ids": ids, "attention_mask": mask}, labels)
    assert found == pytest.approx(shared / apart)


def test_ways_of_reading_a_file_are_measured_in_processes_of_their_own(tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = data.write(path, 10**6)
    assert len({*path.read_text().splitlines()}) == lines
    nothing, *others = (data.peak(way, path, lines) for way in data.WAYS)
    assert 0 < nothing < 2**30 and all(0.9 * nothing < peak < 1.2 * nothing for peak in others)
