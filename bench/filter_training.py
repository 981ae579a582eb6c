"""Training with filtered gradients against exact ones: are they further apart than two orders of the batches?

    dpofast bench filter_training       four trainings of 200 steps, some minutes

The demo's data, model and trained layers, fp32, with the cut that ``grad_filter="auto"`` has in bfloat16. Exact and
filtered take the same batches; two more exact runs take them in other orders, and say what a difference is worth.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dpofast.bench import record
from dpofast.bench.measure import machine
from dpofast.bench.record import Record
from dpofast.demo import data
from dpofast.demo.estimate import Machine
from dpofast.demo.model import write_model
from dpofast.demo.run import preset, quiet_libraries, split, write
from dpofast.demo.train import head_inputs
from dpofast.grad_filter import AUTO
from dpofast.primitive import linear_logprob
from dpofast.train import log, ranks
from dpofast.train.config import Config
from dpofast.train.engine import Context, Training
from dpofast.train.model import load_tokenizer
from dpofast.train.run import identity_of
from dpofast.train.stop import Stop

CUT = AUTO[torch.bfloat16]
RUNS = (("exact", None, 0), ("filtered", CUT, 0), ("exact, order 1", None, 1), ("exact, order 2", None, 2))
SMOOTHED = 20  # steps of which a mean is a point of a curve


def curve(losses: Sequence[float]) -> list[float]:
    return [statistics.fmean(losses[i : i + SMOOTHED]) for i in range(0, len(losses), SMOOTHED)]


def apart(a: Sequence[float], b: Sequence[float]) -> float:
    return statistics.fmean(abs(x - y) for x, y in zip(curve(a), curve(b), strict=True))


def dropped(training: Training, cut: float) -> float:
    """The mean dropped mass of the answers' tokens of a batch: more than 0 where the filter is at work."""
    with torch.no_grad():
        hidden, weight, labels, _ = head_inputs(training, training.feed.first(training.config.micro_batch))
    hidden = hidden.requires_grad_()  # a call without gradients filters none
    out = linear_logprob(hidden, weight.detach(), labels, grad_filter=cut, outputs=("dropped_mass",))
    return out.dropped_mass[labels >= 0].mean().item()


def begun(config: Config, first: Path) -> Training:
    """A training; what frozen layers and reference say is the same in all, and taken from ``first``."""
    out = Path(config.out)
    out.mkdir(parents=True)
    for path in (*first.glob("frozen-0.*"), *first.glob("references.bin")):
        shutil.copy(path, out)
    context = Context(ranks.start("cpu"), log.Screen(Console(), silent=True), Stop())
    return Training(config, context, {**identity_of(config), "world": 1})


def measure(folder: Path, **options: Any) -> Iterator[list[Record]]:
    """The trainings one after another, from the same start; the first is what the others are compared with."""
    base = Record("filter_training", workload="SmolLM2", provider="dpofast", dtype="fp32")
    exact: list[float] = []
    for name, cut, seed in RUNS:
        out = folder / f"run, {name}"
        config = preset(folder, out=str(out), grad_filter="" if cut is None else f"{cut}", seed=seed, **options)
        training = begun(config, folder / f"run, {RUNS[0][0]}")
        if cut is not None:
            mean = dropped(training, cut)
            yield [base._replace(case=name).of("dropped mass of a token, before the first step, mean", mean)]
        training.run()
        entries = log.read(out / "log.jsonl")
        losses = [entry["loss"] for entry in entries if "loss" in entry]
        held_out = [entry for entry in entries if "eval/loss" in entry][-1]
        values = {
            "loss of the last steps": curve(losses)[-1],
            "held-out loss": held_out["eval/loss"],
            "held-out margin": held_out["eval/rewards/margins"],
        }
        if exact:
            values["mean distance of the loss's curve from exact"] = apart(losses, exact)
        exact = exact or losses
        yield [base._replace(case=name).of(metric, value) for metric, value in values.items()]
        shutil.rmtree(out / "checkpoints")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4, help="pairs of a step (default 4)")
    record.add_out(parser)
    args = parser.parse_args()
    results, out = record.begin(args.out, "filter_training", machine())
    quiet_libraries()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        ruff = data.ruff_binary()
        pairs = data.verified_pairs(ruff, data.documented_pairs(ruff)[0])
        training, held_out, _ = split(pairs, load_tokenizer(str(folder / "model")), 0)
        write(training, folder / "train.jsonl")
        write(held_out, folder / "held_out.jsonl")
        size = {"batch_size": args.batch_size, "micro_batch": args.batch_size}
        frozen = Machine.measured().precision
        results.add(measure(folder, steps=args.steps, evaluate_every=0, cache_frozen=frozen, **size))
    results.save(out)


if __name__ == "__main__":
    main()
