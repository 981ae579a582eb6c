"""`dpofast train` against TRL's DPOTrainer: the same data in the same order, 20 steps, the same losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import training

pytest.importorskip("peft")
pytest.importorskip("rich")
pytest.importorskip("trl", minversion="1.16")

from datasets import Dataset
from train import tiny_run
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from dpofast.bench import report, step, trainer
from dpofast.bench.record import Results
from dpofast.train import engine, log
from dpofast.train.config import from_dict
from dpofast.train.run import train

pytestmark = pytest.mark.usefixtures("quick")
STEPS, PAIRS, LR = 20, 4, 3e-3
NAMES = {"loss": "loss", "grad_norm": "grad_norm", "learning_rate": "learning_rate"} | {
    name: name for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl")
    tiny_run.write_model(folder / "model")
    return folder


def ours(folder: Path, monkeypatch, **others) -> tuple[list[dict], list[list[str]]]:
    """The log of a run, and its rows ``[chosen; rejected]`` of each step as text."""
    seen, step = [], engine.Feed.step

    def noted(self):
        batches = step(self)
        seen.extend(self.tokenizer.batch_decode(x.inputs["input_ids"], skip_special_tokens=True) for x in batches)
        return batches

    monkeypatch.setattr(engine.Feed, "step", noted)
    data = tiny_run.write_pairs(folder / "pairs.jsonl", STEPS * PAIRS)
    options = tiny_run.options(folder, **others) | {
        "data": [data], "eval_data": [], "batch_size": PAIRS, "micro_batch": PAIRS, "steps": 0, "learning_rate": LR,
        "evaluate_every": 0, "save_every": 0,
    }  # fmt: skip
    out = folder / "-".join(map(str, others.values()))
    train(from_dict(options | {"out": str(out)}, "the test"))
    return [entry for entry in log.read(out / "log.jsonl") if "loss" in entry], seen


def theirs(folder: Path, texts: list[list[str]]) -> list[dict]:
    rows = {" ".join(row["prompt"].split() + row["chosen"].split()): row for row in tiny.pairs(STEPS * PAIRS)}
    ordered = [rows[text] for batch in texts for text in batch[:PAIRS]]
    options = training.arguments(
        folder / "theirs", STEPS, learning_rate=LR, optim="adamw_torch", max_grad_norm=1.0, warmup_steps=2,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=DPOConfig(**options, beta=0.1, weight_decay=0.0),
        train_dataset=Dataset.from_list(ordered),
        processing_class=tiny.tokenizer(),
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("others", [{"share_prompt": False}, {"share_prompt": True}], ids=str)
def test_losses_are_those_of_trl_for_20_steps(folder, monkeypatch, others):
    mine, texts = ours(folder, monkeypatch, **others)
    found = theirs(folder, texts)
    assert len(mine) == len(found) == STEPS
    for i, (a, b) in enumerate(zip(mine, found)):
        for name in NAMES:
            assert a[name] == pytest.approx(float(b[name]), rel=1e-4, abs=1e-4), (i, name)
    assert mine[-1]["loss"] < mine[0]["loss"] - 0.05, "training changed nothing, and so the comparison shows nothing"


def test_the_benchmark_times_each_way_and_finds_the_same_losses(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "in_a_process_of_its_own", lambda work, *args: work(*args))
    step.write_tiny(tmp_path)
    results = Results({}, [])
    results.add(trainer.measure(tmp_path, trainer.TINY, 3))
    assert [r.provider for r in results.where(metric="time")] == list(trainer.WAYS)
    assert all(r.value > 0 for r in results.where(metric="time"))
    assert all(r.value < 1e-4 for r in results.where(metric="loss, apart from TRL"))
    assert report.trainer_table(results).count(trainer.TINY) == len(trainer.WAYS)
