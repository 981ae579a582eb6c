"""LLaMA-Factory's own DPO runs with dpofast and without it: every logged number and every parameter, on a tiny model.

A run is LLaMA-Factory's whole: arguments, template, data set, model loaded from a folder, training, evaluation, what it
writes. Steps are taken with SGD, as in `training.py`.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import types

import pytest
import torch

pytest.importorskip("llamafactory")

if importlib.util.find_spec("torchaudio") is None:
    # It reads audio files, and LLaMA-Factory imports it in any case; what pip has of it wants a CUDA torch.
    torchaudio = types.ModuleType("torchaudio")
    torchaudio.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = torchaudio

import families
import tiny
import training
from llamafactory.train.dpo import trainer as their_trainer
from llamafactory.train.tuner import run_exp
from safetensors.torch import load_file

from dpofast.integrations import llamafactory as integration
from dpofast.integrations.models import sharing

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and data as LLaMA-Factory wants to find them."""
    root = tmp_path_factory.mktemp("llamafactory")
    tokenizer = tiny.tokenizer(chat_template="{{ messages }}")
    for name, seed, family in (("llama", 0, "llama"), ("ref", 1, "llama"), ("gemma2", 0, "gemma2")):
        families.build(family, seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    rows = [{"instruction": row.pop("prompt"), "input": "", **row} for row in tiny.pairs(22)]
    (root / "train.json").write_text(json.dumps(rows[:16]))
    (root / "eval.json").write_text(json.dumps(rows[16:]))
    (root / "dataset_info.json").write_text(
        json.dumps(
            {
                name: {
                    "file_name": f"{name}.json",
                    "ranking": True,
                    "columns": {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"},
                }
                for name in ("train", "eval")
            }
        )
    )
    return root


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, ...]]:
    """The shape of hidden at each call of dpofast's function."""
    linear_logprob, seen = integration.linear_logprob, []

    def counted(hidden, *args, **kwargs):
        seen.append(tuple(hidden.shape))
        return linear_logprob(hidden, *args, **kwargs)

    monkeypatch.setattr(integration, "linear_logprob", counted)
    yield seen
    integration.unpatch()


def run(folder, output, policy: str = "llama", **options) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """What a run of 20 steps logged, and the weights it saved."""
    run_exp(
        {
            "stage": "dpo",
            "do_train": True,
            "model_name_or_path": str(folder / policy),
            "ref_model": str(folder / "ref"),
            "finetuning_type": "full",
            "template": "empty",
            "dataset_dir": str(folder),
            "dataset": "train",
            "cutoff_len": 64,
            "output_dir": str(output),
            "max_steps": 20,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.05,
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "disable_gradient_checkpointing": True,
            "seed": 0,
            **options,
        }
    )
    logged = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return training.without_timings(logged), load_file(next(output.glob("*model.safetensors")))


LORA = {"finetuning_type": "lora", "lora_rank": 2, "lora_target": "q_proj,down_proj", "ref_model": None}
EVALUATION = {"eval_dataset": "eval", "eval_strategy": "steps", "eval_steps": 10, "per_device_eval_batch_size": 3}
CASES = {
    "sigmoid": ({}, 20 * 2),
    "sigmoid, accumulation, evaluation": ({**EVALUATION, "gradient_accumulation_steps": 2}, 20 * 2 * 2 + 3 * 2 * 2),
    "ipo": ({"pref_loss": "ipo"}, 20 * 2),
    "hinge": ({"pref_loss": "hinge"}, 20 * 2),
    "kto_pair": ({"pref_loss": "kto_pair"}, 20 * 2),
    "orpo": ({"pref_loss": "orpo", "ref_model": None}, 20),
    "simpo": ({"pref_loss": "simpo", "ref_model": None}, 20),
    "bco, ftx, ld_alpha": ({"pref_bco_weight": 0.3, "pref_ftx": 0.2, "ld_alpha": 0.4}, 20 * 2),
    "lora": (LORA, 20 * 2),
    "gradient checkpointing": ({"disable_gradient_checkpointing": False}, 20 * 2),
    "gemma2": ({"policy": "gemma2"}, 20 * 2 + 20),  # the softcap's mean logits are a call of their own
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_logs_and_learns_the_same(case, folder, calls, tmp_path):
    options, count = CASES[case]
    theirs, their_weights = run(folder, tmp_path / "theirs", **options)
    assert not calls
    with integration.patched():
        ours, our_weights = run(folder, tmp_path / "ours", **options)
    assert len(calls) == count
    training.assert_same_numbers(ours, theirs)
    training.assert_same_weights(our_weights, their_weights)
    first, last = theirs[0]["loss"], theirs[19]["loss"]
    assert abs(last - first) > 1e-3, "training changed nothing, and so the comparison shows nothing"


@pytest.mark.parametrize("case", ["sigmoid, accumulation, evaluation", "lora", "gradient checkpointing"])
def test_prompts_that_are_shared_log_and_learn_the_same_but_for_logits_at_padding(
    case, folder, calls, tmp_path, monkeypatch
):
    options, count = CASES[case]
    theirs, their_weights = run(folder, tmp_path / "theirs", **options)
    # texts are short and the model is small, and so attention, which shared rows have more of, would decide
    monkeypatch.setattr(sharing, "_cost", lambda hidden_size, rows, width, causal=False: rows)
    run_shared, shared = sharing.run_shared, []
    monkeypatch.setattr(sharing, "run_shared", lambda *args: shared.append(1) or run_shared(*args))
    with integration.patched(share_prompt=True):
        ours, our_weights = run(folder, tmp_path / "ours", **options)
    assert len(calls) == count and len(shared) >= count

    def without_logits(log_history):
        return [{name: x for name, x in entry.items() if "logits/" not in name} for entry in log_history]

    training.assert_same_numbers(without_logits(ours), without_logits(theirs))
    training.assert_same_weights(our_weights, their_weights)
    mine, others = (entry["logits/chosen"] for entry in (ours[0], theirs[0]))
    assert mine != pytest.approx(others, rel=1e-3)


def test_sharing_may_be_added_and_is_taken_back_with_the_patch(folder):
    before = their_trainer.CustomDPOTrainer.concatenated_forward
    integration.patch()
    integration.patch(share_prompt=True)
    assert their_trainer.CustomDPOTrainer.concatenated_forward is not integration._concatenated_forward
    integration.unpatch()
    assert their_trainer.CustomDPOTrainer.concatenated_forward is before
    with pytest.raises(TypeError, match="share_prompt: got str 'no', expected True or False"):
        integration.patch(share_prompt="no")
    with pytest.raises(ValueError, match="refuse: got str 'never', expected 'error' or 'warn'"):
        integration.patch(share_prompt=True, refuse="never")
    assert their_trainer.CustomDPOTrainer.concatenated_forward is before


def test_accumulating_gradients_is_a_larger_batch(folder, calls, tmp_path):
    """Four batches of two pairs are one of eight."""
    runs = {}
    with integration.patched():
        for accumulate in (4, 1):
            options = {"gradient_accumulation_steps": accumulate, "per_device_train_batch_size": 8 // accumulate}
            runs[accumulate] = run(folder, tmp_path / str(accumulate), max_steps=3, **options)
    (parts, part_weights), (whole, whole_weights) = runs[4], runs[1]
    assert calls
    steps = [[entry for entry in history if "loss" in entry] for history in (parts, whole)]
    assert len(steps[0]) == 3
    for mine, theirs in zip(*steps, strict=True):
        for name in ("loss", "grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name
    training.assert_same_weights(part_weights, whole_weights)


def test_importing_patches_nothing_and_unpatch_puts_everything_back():
    before = their_trainer.CustomDPOTrainer.concatenated_forward
    assert before.__module__ == their_trainer.__name__
    integration.patch()
    integration.patch()
    with integration.patched():
        pass  # leaves an outer patch alone
    assert their_trainer.CustomDPOTrainer.concatenated_forward is integration._concatenated_forward
    integration.unpatch()
    integration.unpatch()
    assert their_trainer.CustomDPOTrainer.concatenated_forward is before
    with pytest.raises(KeyError), integration.patched():
        raise KeyError
    assert their_trainer.CustomDPOTrainer.concatenated_forward is before


def test_an_unknown_trainer_is_refused_and_nothing_is_patched(monkeypatch):
    def other(self, model, batch):
        pass

    def elsewhere(self, model, batch, is_ref_model=False):
        pass

    with monkeypatch.context() as context:
        context.setattr(integration, "get_batch_logps", lambda logits, labels: None)
        with pytest.raises(ImportError, match=r"expected get_batch_logps to take .*ld_alpha.*; found .*logits"):
            integration.patch()
    for forward, message in ((other, "to take .*is_ref_model.*; found"), (elsewhere, "calling get_batch_logps")):
        monkeypatch.setattr(their_trainer.CustomDPOTrainer, "concatenated_forward", forward)
        with pytest.raises(ImportError, match=message):
            integration.patch()
        assert their_trainer.CustomDPOTrainer.concatenated_forward is forward
