"""What a training does beside resuming: its steps, its end, and what it leaves for people and for other libraries."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("rich")

from peft import PeftModel
from train import tiny_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpofast import cli
from dpofast.integrations.models import model_dpo_loss
from dpofast.train import checkpoint, engine, log, model
from dpofast.train.config import from_dict
from dpofast.train.dry_run import dry_run
from dpofast.train.feed import Feed
from dpofast.train.objective import objective_of
from dpofast.train.ranks import Ranks
from dpofast.train.run import train

pytestmark = pytest.mark.usefixtures("quick")


def config(folder, out="run", **others):
    return from_dict(tiny_run.options(folder, **others) | {"out": str(folder / out)}, "the test")


def entries(run, kind="loss"):
    return [entry for entry in log.read(run / "log.jsonl") if kind in entry]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with two ended runs, of all weights and of a LoRA."""
    folder = tmp_path_factory.mktemp("run")
    train(config(folder, "full", picture=True, tensorboard=True))
    train(config(folder, "lora", lora_rank=2))
    return folder


@pytest.mark.parametrize("lora_rank", (0, 2))
def test_a_models_own_dropout_is_off_unless_it_is_asked_for(folder, tmp_path, lora_rank):
    path, ids = tmp_path / "model", torch.arange(24).view(2, 12) % 16
    policy = AutoModelForCausalLM.from_pretrained(config(folder).model)
    policy.config.attention_dropout = 0.5
    policy.save_pretrained(path)

    def varies(**others) -> bool:
        trained = model.trained(config(folder, model=str(path), lora_rank=lora_rank, **others), None)
        assert trained.training
        return not torch.equal(trained(ids).logits, trained(ids).logits)

    assert varies(dropout=True) and not varies()


def test_steps_are_those_of_a_plain_loop(folder):
    c = config(folder, "full")
    feed, policy = Feed(c, Ranks(torch.device("cpu")), objective_of(c)), AutoModelForCausalLM.from_pretrained(c.model)
    reference = AutoModelForCausalLM.from_pretrained(c.model)
    optimizer = torch.optim.AdamW(policy.parameters(), c.learning_rate, weight_decay=0.0)
    for i, entry in enumerate(entries(folder / "full")):
        rate = c.learning_rate * (i if i < 1 else (c.steps - i) / (c.steps - 1))
        assert entry["learning_rate"] == pytest.approx(rate)
        optimizer.param_groups[0]["lr"] = rate
        losses = []
        for batch in feed.step():
            out = model_dpo_loss(policy, batch.inputs, batch.labels, ref_model=reference, beta=c.beta)
            (out.loss / 2).backward()
            losses.append(out.loss.item() / 2)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert entry["loss"] == pytest.approx(sum(losses), abs=1e-5)
        assert entry["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)


def test_checkpoints_are_transformers_own(folder):
    last = folder / "full" / "last"
    model, start = (AutoModelForCausalLM.from_pretrained(x) for x in (last, folder / "model"))
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)
    assert AutoTokenizer.from_pretrained(last)("w1")["input_ids"]


def test_checkpoints_of_a_lora_are_pefts_own(folder):
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    names = {path.name for path in (folder / "lora" / "last").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    model = PeftModel.from_pretrained(base, folder / "lora" / "last")
    changed = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert changed and all(p.abs().max() > 0 for p in changed)


def test_the_held_out_numbers_are_those_that_score_gives(folder, capsys):
    argv = [str(folder / "full" / "last"), str(folder / "held_out.jsonl"), "--reference", str(folder / "model")]
    assert cli.main(["score", *argv]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    last = entries(folder / "full", "eval/loss")[-1]
    margins = [line["margin"] for line in lines]
    mean = sum(margins) / len(margins)
    error = math.sqrt(sum((x - mean) ** 2 for x in margins) / (len(margins) - 1) / len(margins))
    assert last["step"] == 8 and last["eval/records"] == len(lines) == 9
    assert last["eval/rewards/margins"] == pytest.approx(mean, abs=1e-5)
    assert last["eval/rewards/margins/error"] == pytest.approx(error, abs=1e-5)
    assert last["eval/rewards/accuracies"] == sum(x > 0 for x in margins) / 9
    assert 0 < last["eval/rewards/accuracies/error"] < 0.2
    assert last["eval/loss"] == pytest.approx(sum(math.log1p(math.exp(-x)) for x in margins) / 9, abs=1e-5)


def test_summary_and_picture_are_there(folder):
    text = (folder / "full" / "summary.md").read_text()
    last = entries(folder / "full", "eval/loss")[-1]
    assert f"{last['eval/loss']:.4f} ± {last['eval/loss/error']:.4f}" in text
    for part in ("9 records", "| learning_rate | 0.01 |", "dpofast ", "transformers ", "ended after step 8"):
        assert part in text
    assert (folder / "full" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "lora" / "curves.png").exists()


def test_the_best_stays_and_patience_ends_the_run(tmp_path, monkeypatch):
    values = iter([0.7, 0.5, 0.6, 0.55, 0.1])

    def held_out(self):
        value = next(values)
        names = ("loss", "rewards/accuracies", "rewards/margins")
        return {name: [value, value] for name in names}

    monkeypatch.setattr(engine.Training, "_held_out", held_out)
    outcome = train(config(tmp_path, evaluate_every=2, patience=2, steps=20, save_every=1))
    assert (outcome.step, outcome.impatient) == (6, True)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [6, 2]
    assert (tmp_path / "run" / "best").resolve().name == "step-00000002"
    assert (tmp_path / "run" / "last").resolve().name == "step-00000006"


@pytest.mark.parametrize(
    "others",
    [
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
        {"loss_type": ["simpo"], "loss_options": {"simpo_gamma": 0.3}, "beta": 2.0},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "lora_rank": 2, "precision": "bf16"},
        {"memory_budget": "1MiB"},
    ],
    ids=lambda others: ", ".join(map(str, others.values())),
)
def test_options_reach_the_training(folder, tmp_path, others):
    model = {"model": str(folder / "model"), "data": [str(folder / "train.jsonl")], "eval_data": []}
    options = tiny_run.options(folder) | model | others | {"out": str(tmp_path / "run"), "evaluate_every": 0}
    train(from_dict(options, "the test"))
    found = [entry["loss"] for entry in entries(tmp_path / "run")]
    plain = [entry["loss"] for entry in entries(folder / "full")]
    assert len(found) == 8 and all(map(math.isfinite, found))
    same = set(others) <= {"gradient_checkpointing", "memory_budget"}
    assert (found == pytest.approx(plain, abs=1e-4)) == same
    assert (tmp_path / "run" / "references.bin").exists() == ("simpo" not in others.get("loss_type", ()))


def test_margin_and_weight_of_the_data_reach_the_loss(folder, tmp_path):
    row = {"prompt": "w1 ", "chosen": "w2", "rejected": "w3"}
    losses = {}
    for name, more in {"plain": {}, "margin": {"margin": 1.5}, "weight": {"weight": 0.5}}.items():
        data = tmp_path / f"{name}.jsonl"
        data.write_text(json.dumps(row | more) + "\n")
        out = tmp_path / name
        options = tiny_run.options(folder) | {"data": [str(data)], "eval_data": [], "out": str(out), "steps": 1}
        train(from_dict(options, "the test"))
        losses[name] = entries(out)[0]["loss"]
    assert losses["plain"] == pytest.approx(math.log(2), abs=1e-5)
    assert losses["margin"] == pytest.approx(math.log1p(math.exp(1.5)), abs=1e-5)
    assert losses["weight"] == pytest.approx(0.5 * math.log(2), abs=1e-5)


def test_a_loss_that_is_not_finite_ends_the_run_with_a_message(folder, tmp_path, capsys):
    options = tiny_run.options(folder) | {"out": str(tmp_path / "run"), "learning_rate": 1e30, "clip": 0.0}
    path = tmp_path / "run.toml"
    path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in options.items()))
    assert cli.main(["train", str(path)]) == 1
    assert "dpofast train: loss " in capsys.readouterr().err
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"batch_size": 3}, "batch_size: got 3, expected a multiple"),
        ({"loss_type": ["sigmoidal"]}, "loss_type"),
        ({"loss_options": {"simpo_gamma": 1.0}}, "simpo_gamma"),
        ({"model": "none"}, "model: got 'none'"),
        ({"data": ["none.jsonl"]}, "none.jsonl"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_trained_is_said_before_the_first_step(folder, tmp_path, others, message):
    with pytest.raises((ValueError, TypeError, OSError), match=message):
        train(from_dict(tiny_run.options(folder, **others) | {"out": str(tmp_path / "run")} | others, "the test"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_bad_records_are_left_out_and_listed_where_that_is_wanted(folder, tmp_path):
    rows = tmp_path / "bad.jsonl"
    empty = json.dumps({"prompt": "", "chosen": "w1", "rejected": "w2"})  # which only the tokenizer finds
    rows.write_text("{\n" + (folder / "train.jsonl").read_text() + empty + "\n")
    more = {"data": [str(rows)], "eval_data": [], "out": str(tmp_path / "run")}
    with pytest.raises(ValueError, match=f"{rows}:1: "):
        train(from_dict(tiny_run.options(folder) | more, "the test"))
    train(from_dict(tiny_run.options(folder) | more | {"on_error": "skip", "resume": True}, "the test"))
    found, plain = (entries(out) for out in (tmp_path / "run", folder / "full"))
    assert [x["loss"] for x in found] == [x["loss"] for x in plain]
    listed = (tmp_path / "run" / "summary.md").read_text()
    assert f"- bad records left out: 2: {rows}:1 no JSON" in listed and f"; {rows}:22 prompt: got no token" in listed


def test_a_dry_run_says_what_would_come_and_writes_nothing(folder, tmp_path):
    before = sorted(folder.rglob("*"))
    text = dry_run(config(folder, "dry"))
    assert sorted(folder.rglob("*")) == before
    for part in ("20 records, 8 steps of 4 in parts of 2", "training     about", "evaluation", "schedule", "V 64"):
        assert part in text
    count = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder / "model").parameters())
    assert f"{count:,} parameters, of which {count:,} are trained" in text
