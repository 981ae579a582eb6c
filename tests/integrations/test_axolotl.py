"""Axolotl's own DPO runs with dpofast's plugin and without it: logged numbers and every parameter, on a tiny model.

A run is Axolotl's whole: a YAML, data set and model from a folder, training, evaluation. Steps are taken with SGD, as
in `training.py`.
"""

from __future__ import annotations

import json
import os

import pytest
import torch
import yaml

pytest.importorskip("axolotl")

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"  # read when it is imported

import families
import tiny
import training
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_preference_datasets
from axolotl.train import train
from trl.trainer import dpo_trainer

from dpofast.integrations import trl as integration
from dpofast.integrations.models import sharing

PLUGIN = "dpofast.integrations.axolotl.Plugin"
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and data as Axolotl wants to find them."""
    root = tmp_path_factory.mktemp("axolotl")
    for family in ("llama", "gemma2"):
        families.build(family).save_pretrained(root / family)
        tiny.tokenizer().save_pretrained(root / family)
    rows = tiny.pairs(22)
    for name, part in (("train", rows[:16]), ("eval", rows[16:])):
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    return root


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, ...]]:
    """The shape of hidden at each call of dpofast's loss."""
    forward, seen = integration.LigerFusedLinearDPOLoss.forward, []

    def counted(self, lin_weight, _input, *args, **kwargs):
        seen.append(tuple(_input.shape))
        return forward(self, lin_weight, _input, *args, **kwargs)

    monkeypatch.setattr(integration.LigerFusedLinearDPOLoss, "forward", counted)
    yield seen
    integration.unpatch()


def run(folder, output, family: str = "llama", **options):
    """The trainer of a run of 20 steps."""

    def data(name):
        return [{"path": str(folder / f"{name}.jsonl"), "ds_type": "json", "split": "train", "type": "passthrough"}]

    config = {
        "base_model": str(folder / family),
        "rl": "dpo",
        "datasets": data("train"),
        "test_datasets": data("eval"),
        "dataset_prepared_path": str(output / "prepared"),
        "sequence_len": 64,
        "output_dir": str(output),
        "max_steps": 20,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.05,
        "optimizer": "sgd",
        "lr_scheduler": "linear",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "eval_steps": 10,
        "save_strategy": "no",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "gradient_checkpointing": False,
        "seed": 0,
        **options,
    }
    output.mkdir()
    path = output / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    torch.manual_seed(0)  # LoRA's own
    cfg = load_cfg(str(path))
    _, _, trainer = train(cfg=cfg, dataset_meta=load_preference_datasets(cfg=cfg, cli_args=TrainerCliArgs()))
    return trainer


COMPARED = ("loss", "grad_norm", "learning_rate", "rewards/", "logps/", "num_tokens", "epoch")
"""Without the plugin TRL logs entropy and accuracy as well, and as logits others: see the plugin."""


def history(trainer) -> list[dict[str, float]]:
    entries = [
        {name: value for name, value in entry.items() if any(word in name for word in COMPARED)}
        for entry in trainer.state.log_history
        if "train_runtime" not in entry
    ]
    steps = [entry for entry in entries if "loss" in entry]
    assert len(steps) == 20
    assert {"rewards/margins", "rewards/accuracies", "logps/chosen", "grad_norm", "num_tokens"} <= steps[0].keys()
    assert sum("eval_rewards/margins" in entry and "eval_loss" in entry for entry in entries) >= 2
    return entries


def assert_same_parameters(found, wanted) -> None:
    training.assert_same_weights(*(dict(each.named_parameters()) for each in (found, wanted)))


LORA = {"adapter": "lora", "lora_r": 2, "lora_alpha": 16, "lora_target_modules": ["q_proj", "down_proj"]}
CASES = {
    "sigmoid": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "ipo": {"rl": "ipo", "learning_rate": 0.002},
    "hinge": {"dpo_loss_type": ["hinge"]},
    "lora": {**LORA, "learning_rate": 0.05},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_logs_and_learns_the_same(case, folder, calls, tmp_path):
    theirs = run(folder, tmp_path / "theirs", **CASES[case])
    assert not calls
    ours = run(folder, tmp_path / "ours", plugins=[PLUGIN], **CASES[case])
    assert len(calls) >= 20 * CASES[case].get("gradient_accumulation_steps", 1)
    training.assert_same_numbers(history(ours), history(theirs))
    assert_same_parameters(ours.model, theirs.model)
    losses = [entry["loss"] for entry in theirs.state.log_history if "loss" in entry]
    assert abs(losses[-1] - losses[0]) > 1e-3, "training changed nothing, and so the comparison shows nothing"


@pytest.mark.parametrize("case", ["sigmoid", "lora"])
def test_prompts_that_are_shared_log_and_learn_the_same(case, folder, calls, tmp_path, monkeypatch):
    theirs = run(folder, tmp_path / "theirs", **CASES[case])
    monkeypatch.setattr(sharing, "_cost", lambda hidden_size, rows, width, causal=False: rows)
    run_shared, shared = sharing.run_shared, []
    monkeypatch.setattr(sharing, "run_shared", lambda *args: shared.append(1) or run_shared(*args))
    ours = run(folder, tmp_path / "ours", plugins=[PLUGIN], dpofast_share_prompt=True, **CASES[case])
    assert len(calls) >= 20 and len(shared) >= 40  # policy and reference
    training.assert_same_numbers(history(ours), history(theirs))
    assert_same_parameters(ours.model, theirs.model)


def test_accumulating_gradients_is_a_larger_batch(folder, calls, tmp_path):
    """Four batches of two pairs are one of eight."""
    parts, whole = (
        run(
            folder, tmp_path / str(accumulate), plugins=[PLUGIN], max_steps=3, eval_steps=3,
            gradient_accumulation_steps=accumulate, micro_batch_size=8 // accumulate,
        )
        for accumulate in (4, 1)
    )  # fmt: skip
    assert calls
    steps = [[entry for entry in each.state.log_history if "loss" in entry] for each in (parts, whole)]
    assert len(steps[0]) == 3
    for mine, theirs in zip(*steps, strict=True):
        for name in ("loss", "grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name
    assert_same_parameters(parts.model, whole.model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dpo_label_smoothing": 0.1}, "dpo_label_smoothing: got 0.1"),
        ({"dpo_use_weighting": True}, "dpo_use_weighting: got True"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs: got True"),
        ({"dpo_loss_type": ["sigmoid", "hinge"]}, "dpo_loss_type: got .*expected a single loss"),
        ({"rl": "simpo"}, "rl: got .*serves dpo and ipo"),
        ({"family": "gemma2"}, "base_model: Gemma2ForCausalLM has a softcap of 3.0"),
        ({**LORA, "lora_target_modules": ["q_proj", "lm_head"]}, "applying a PEFT adapter to `lm_head`"),
    ],
)
def test_what_trl_would_drop_is_refused(options, message, folder, calls, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(folder, tmp_path / "ours", plugins=[PLUGIN], **options)
    assert not calls


def test_a_trl_without_the_place_is_refused(folder, calls, monkeypatch, tmp_path):
    monkeypatch.delattr(dpo_trainer, "LigerFusedLinearDPOLoss")
    with pytest.raises(ImportError, match="no LigerFusedLinearDPOLoss"):
        run(folder, tmp_path / "ours", plugins=[PLUGIN])
