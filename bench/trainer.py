"""The trainer's benchmark: a step of `dpofast train` against one of TRL's DPOTrainer, and the losses of both.

    dpofast bench trainer               a tiny random model, and SmolLM2-135M-Instruct's own weights; in a checkout
    dpofast bench trainer --quick       the tiny model alone: mostly what a trainer does beside the model

Pairs of the documentation of ruff's rules, the same in the same order for both, fp32, AdamW, clipping, no activations
computed twice. Each way runs in a process of its own; the first step warms up. TRL's reference is scored in each step,
which is its default, or before the training, as `dpofast train` does it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpofast.bench import record, report, step
from dpofast.bench.measure import machine
from dpofast.bench.record import Record

TINY = "tiny model"
WAYS = ("TRL", "TRL, reference scored before", "dpofast train", "dpofast train, prompt shared")
RATE = 1e-5


def repeated(folder: Path, steps: int) -> list[dict[str, str]]:
    """The folder's pairs, once for each step: in whatever order they come, a step has all of them."""
    return json.loads((folder / step.PAIRS_FILE).read_text()) * steps


def theirs(folder: Path, steps: int, precompute: bool) -> tuple[list[float], list[float]]:
    """Seconds and losses of the steps of TRL's trainer."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.starts: list[float] = []
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.starts.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.starts[-1])

    model, tokenizer, _ = step.read(folder)
    clock = Clock()
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(folder / "trainer"),
            per_device_train_batch_size=step.PAIRS,
            max_steps=steps,
            learning_rate=RATE,
            beta=step.BETA,
            precompute_ref_log_probs=precompute,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            train_sampling_strategy="sequential",
        ),
        train_dataset=Dataset.from_list(repeated(folder, steps)),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    return clock.seconds, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def ours(folder: Path, steps: int, share_prompt: bool) -> tuple[list[float], list[float]]:
    """The same of `dpofast train`. All steps have the same pairs, so only their order in a step is random."""
    from dpofast.train import log
    from dpofast.train.config import from_dict
    from dpofast.train.run import train

    data, out = folder / "pairs.jsonl", folder / f"run-{share_prompt}"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in repeated(folder, 1)))
    options = {
        "model": str(folder), "data": [str(data)], "out": str(out), "batch_size": step.PAIRS, "steps": steps,
        "micro_batch": step.PAIRS, "learning_rate": RATE, "warmup": 0.0, "beta": step.BETA, "picture": False,
        "share_prompt": share_prompt, "tensorboard": False,
    }  # fmt: skip
    train(from_dict(options, "the benchmark"))
    entries = log.read(out / "log.jsonl")
    return [entry["seconds"] for entry in entries], [entry["loss"] for entry in entries]


def measure(folder: Path, workload: str, steps: int) -> Iterator[list[Record]]:
    base, base_losses = 0.0, []
    for way in WAYS:
        run, flag = (ours, "shared" in way) if "dpofast" in way else (theirs, "before" in way)
        seconds, losses = step.in_a_process_of_its_own(run, folder, steps, flag)
        median = statistics.median(seconds[1:])
        base, base_losses = base or median, base_losses or losses
        apart = max(abs(a - b) for a, b in zip(losses, base_losses, strict=True))
        facts = Record("trainer", workload=workload, provider=way, dtype="fp32")
        ratio, distance = facts.of("time / TRL", median / base), facts.of("loss, apart from TRL", apart)
        yield [facts.of("time", median, "s"), ratio, distance]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the tiny model alone")
    parser.add_argument(
        "--tokens", type=int, nargs=2, default=(96, 32), metavar=("PROMPT", "ANSWER"), help="default 96 32"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=4,
        help="of each way, of the tiny model five times as many; the first warms up (default 4)",
    )
    record.add_out(parser)
    args = parser.parse_args()
    if args.steps < 2:
        parser.error(f"--steps {args.steps}: expected at least 2")
    step.expect_checkout(parser)
    os.environ |= dict(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    results, out = record.begin(args.out, "trainer", machine() | {n: version(n) for n in ("transformers", "trl")})
    for workload in (TINY,) if args.quick else (TINY, "SmolLM2, {} + {} tokens".format(*args.tokens)):
        with tempfile.TemporaryDirectory() as name:
            if workload == TINY:
                step.in_a_process_of_its_own(step.write_tiny, Path(name))
            else:
                step.in_a_process_of_its_own(step.write_smollm2, Path(name), 0, tuple(args.tokens))
            results.add(measure(Path(name), workload, args.steps * (5 if workload == TINY else 1)))
    results.save(out)
    print(report.trainer_table(results), end="", flush=True)


if __name__ == "__main__":
    main()
