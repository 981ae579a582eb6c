"""Single answers that are marked good or bad: the losses of a plain loop, and TRL's KL of mismatched answers."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("rich")

import tiny
from train import killed, tiny_run
from transformers import AutoModelForCausalLM

from dpofast import data
from dpofast.losses import unpaired_preference_loss
from dpofast.train import feed, log
from dpofast.train.config import from_dict
from dpofast.train.run import train

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def folder(tmp_path):
    """A model and 8 single answers in files."""
    tiny_run.write_model(tmp_path / "model")
    rows = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair, side in zip(tiny.pairs(8), ["chosen", "rejected", "rejected", "chosen", "rejected"] * 2)
    ]
    (tmp_path / "single.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def options(folder, loss_type, **others):
    return {
        "model": str(folder / "model"), "data": [str(folder / "single.jsonl")], "out": str(folder / "run"),
        "eval_data": [str(folder / "single.jsonl")], "loss_type": loss_type, "batch_size": 8, "micro_batch": 8,
        "steps": 4, "warmup": 0.0, "learning_rate": 1e-2,
        "schedule": "constant", "tensorboard": False, "picture": False, **others,
    }  # fmt: skip


def logps(model, rows) -> torch.Tensor:
    """The log-probs of each row's completion by the model's logits, each sequence alone."""
    ids, found = tiny.tokenizer(), []
    for row in rows:
        prompt, rest = (ids(row[name])["input_ids"] for name in ("prompt", "completion"))
        tokens = torch.tensor([prompt + rest + [ids.eos_token_id]])
        logits = model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        found.append(logits.gather(-1, tokens[0, len(prompt) :, None]).sum())
    return torch.stack(found)


def test_a_mismatched_answer_is_that_of_the_next_record(folder):
    records = data.read(folder / "single.jsonl")
    mismatched = feed.Mismatched(records)
    for record, pair, other in zip(records, mismatched, [*[*records][1:], records[0]]):
        assert pair.prompt == record.prompt and pair.label == record.label
        assert pair.answers == (record.answers[0], other.answers[0]) and pair.answers[0] != pair.answers[1]
    assert len(mismatched) == 8


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired", "bco"])
def test_losses_are_those_of_a_plain_loop(folder, loss_type):
    more = {"desirable_weight": 1.5}
    train(from_dict(options(folder, loss_type, loss_options=more), "the test"))
    rows = [json.loads(line) for line in (folder / "single.jsonl").read_text().splitlines()]
    mismatched = [{**row, "completion": other["completion"]} for row, other in zip(rows, rows[1:] + rows[:1])]
    good = torch.tensor([row["label"] for row in rows])
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "model") for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-2, weight_decay=0.0)
    entries, seen = [entry for entry in log.read(folder / "run" / "log.jsonl") if "loss" in entry], [torch.zeros(1)]
    assert len(entries) == 4
    for entry in entries:
        with torch.no_grad():
            ref = logps(reference, rows)
            kl = logps(policy, mismatched) - logps(reference, mismatched) if loss_type == "kto" else None
        mine = logps(policy, rows)
        shift = torch.cat(seen).mean() if loss_type == "bco" else None  # of the rewards of the steps before
        loss = unpaired_preference_loss(mine, ref, good, loss_type=loss_type, kl=kl, reward_shift=shift, **more)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rewards = 0.1 * (mine - ref).detach()
        seen = [*(seen if len(seen[0]) > 1 else []), rewards]
        assert entry["loss"] == pytest.approx(loss.item(), abs=1e-4)
        assert entry["rewards/chosen"] == pytest.approx(rewards[good].mean().item(), abs=1e-3)
        assert entry["rewards/rejected"] == pytest.approx(rewards[~good].mean().item(), abs=1e-3)
    assert entries[-1]["loss"] < entries[0]["loss"] - 0.01


def test_bcos_mean_does_not_know_of_micro_batches_and_is_not_moved_by_evaluations(folder):
    found = []
    for size, every in ((8, 0), (2, 1)):
        out = str(folder / f"run{size}")
        train(from_dict(options(folder, "bco", micro_batch=size, evaluate_every=every, out=out), "the test"))
        found.append([entry["loss"] for entry in log.read(folder / out / "log.jsonl") if "loss" in entry])
    assert found[0] == pytest.approx(found[1], abs=1e-5)


@pytest.mark.parametrize("loss_type", ["kto", "bco"])
def test_kills_change_nothing(folder, loss_type):
    from dpofast.train import run

    def config(out):
        return from_dict(
            options(folder, loss_type, micro_batch=4, save_every=1, out=str(folder / out), resume=True), "test"
        )

    run.train(config("whole"))
    for seconds in (0.2, 0.3, 0.4):
        killed.killed(config("killed"), seconds)
    run.train(config("killed"))
    killed.expect_same(killed.result(folder / "killed"), killed.result(folder / "whole"))


@pytest.mark.parametrize(
    ("row", "others", "message"),
    [
        ({"prompt": "w1", "completion": "w2"}, {}, r"single.jsonl:1: .*label"),
        (
            {"prompt": "w1", "chosen": "w2", "rejected": "w3"},
            {"loss_type": ["apo_zero_unpaired"]},
            "got 2 answers, exp",
        ),
        ({"prompt": "w1", "completion": "w2", "label": True}, {}, r"is the only record"),
        ({"prompt": "w1", "completion": "w2", "label": True}, {"loss_type": ["kto", "sigmoid"]}, "loss_type: got"),
        ({"prompt": "w1", "completion": "w2", "label": True}, {"label_smoothing": 0.1}, "label_smoothing: got"),
        ({"prompt": "w1", "completion": "w2", "label": True}, {"share_prompt": True}, "share_prompt: got True"),
        (
            {"prompt": "w1", "completion": "w2", "label": True},
            {"loss_type": ["sigmoid"]},
            "got a label, expected chosen",
        ),
    ],
)
def test_what_does_not_fit_is_refused(folder, row, others, message):
    (folder / "single.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        train(from_dict(options(folder, "kto") | others, "the test"))
