"""A training on two ranks under torchrun: the parameters of one, and signals and errors that both hear of."""

from __future__ import annotations

import json

import pytest
import torch
from ranks import launch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("rich")

from safetensors.torch import load_file
from train import killed, tiny_run, trained_ranks

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs on one rank, and beside them those of two."""
    folder = tmp_path_factory.mktemp("ranks")
    rows = [{"prompt": f"w{i} w{i + 1} ", "completion": f"w{40 - i}", "label": i % 3 > 0} for i in range(12)]
    (folder / "single.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers, scores = ["w3 w4", "w40", "w50 w51"], [2, 1, 0]
    rows = [
        {"prompt": f"w{i} w{i + 1} ", "answers": answers[: 2 + i % 2], "scores": scores[: 2 + i % 2]} for i in range(12)
    ]
    (folder / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, others in trained_ranks.WAYS.items():
        trained_ranks.run(folder, name, **others)
    assert launch.torchrun("../train/trained_ranks.py", 2, folder, str(folder)) == {"all"}
    return folder


@pytest.mark.parametrize("name", trained_ranks.WAYS)
def test_two_ranks_have_the_parameters_of_one(folder, name):
    one, two = (load_file(next((folder / run / "last").glob("*.safetensors"))) for run in (name, f"ranks-{name}"))
    assert one.keys() == two.keys()
    for key, weight in one.items():
        torch.testing.assert_close(two[key], weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", trained_ranks.WAYS)
def test_two_ranks_log_the_numbers_of_one(folder, name):
    one, two = ((folder / run / "log.jsonl").read_text().splitlines() for run in (name, f"ranks-{name}"))
    for a, b in zip(map(json.loads, one), map(json.loads, two), strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            if key not in killed.TIMINGS:
                assert b[key] == pytest.approx(value, rel=1e-4, abs=1e-4), key


def test_a_signal_to_one_rank_stops_both_and_the_rest_has_the_same_bits(folder):
    for way in range(2):  # whole copies; sharded
        killed.expect_same(killed.result(folder / f"ranks-signal{way}"), killed.result(folder / f"ranks-whole{way}"))


def test_the_number_of_ranks_of_a_run_does_not_change(folder):
    with pytest.raises(ValueError, match="resume: .*world has changed"):
        trained_ranks.run(folder, "ranks-full", resume=True)


def test_a_trained_model_moved(folder):
    start, end = (
        load_file(folder / "model" / "model.safetensors"),
        load_file(folder / "full" / "last" / "model.safetensors"),
    )
    assert max((end[key] - start[key]).abs().max() for key in start) > 1e-3
    assert tiny_run.options(folder)["steps"] == 8
