"""The demo from beginning to end: pairs, model, reference, costs of the head, training, report."""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from dpofast.data import Encoded, Encoder, read
from dpofast.demo import data, model, train
from dpofast.demo.estimate import LOADING, Count, Machine, expected_seconds
from dpofast.demo.report import Result, print_result, save_picture
from dpofast.demo.screen import Screen
from dpofast.train import log, ranks
from dpofast.train.config import Config, from_dict, read_toml
from dpofast.train.engine import Context
from dpofast.train.model import load_tokenizer
from dpofast.train.run import finish, identity_of
from dpofast.train.stop import asked_by_signals

PRESET = Path(__file__).with_name("demo.toml")
# What the documentation of `data.RUFF_VERSION` holds, for an estimate before it is read.
TRAINING, HELD_OUT, TOKENS, ANSWERS = 310, 122, 79, 33  # pairs; tokens of a pair, and of its answers


def quiet_libraries() -> None:
    """Keep the progress bars and remarks of others out of the demo's own."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("gguf").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def preset(folder: Path, **others: Any) -> Config:
    """The options of demo.toml, for the model and the data in ``folder``."""
    where = {
        "model": str(folder / "model"),
        "data": str(folder / "train.jsonl"),
        "eval_data": str(folder / "held_out.jsonl"),
        "out": str(folder / "run"),
    }
    return from_dict({**read_toml(PRESET), **where, **others}, "the demo")


# Data


Row = dict[str, Any]


def encoded(rows: Sequence[Row], tokenizer: Any) -> list[Encoded]:
    return list(map(Encoder(tokenizer), read(rows)))


def split(pairs: Sequence[data.Pair], tokenizer: Any, seed: int) -> tuple[list[Row], list[Row], str]:
    """Rows to train on and to hold out, without the long ones; and what was left out, in words."""
    training, held_out = data.split_by_family(pairs, data.HELD_OUT_SHARE, seed)
    alone = data.without_copies(training, held_out)

    def short(part: Sequence[data.Pair]) -> list[Row]:
        rows = data.rows_of(part, tokenizer)
        counted = zip(rows, encoded(rows, tokenizer), strict=True)
        return [row | {"tokens": Count.of([each]).tokens} for row, each in counted if data.is_short(each)]

    kept, kept_out = short(alone), short(held_out)
    left_out = (
        f"{len(training) - len(alone)} training pairs share code with a held-out one and go; "
        f"{len(alone) + len(held_out) - len(kept) - len(kept_out)} pairs are longer than "
        f"{data.MAX_PROMPT} prompt or {data.MAX_ANSWER} answer tokens and go"
    )
    return kept, kept_out, left_out


def write(rows: Sequence[Row], path: Path) -> None:
    """A file of rows, by length: neighbours need little padding."""
    ordered = sorted(rows, key=lambda row: row["tokens"])
    path.write_text("".join(json.dumps(row) + "\n" for row in ordered), encoding="utf-8")


def describe_pairs(console: Console, rows: Sequence[Row], tokenizer: Any, name: str) -> Count:
    """Say what some rows are, and count them."""
    count = Count.of(encoded(rows, tokenizer))
    families = len({row["family"] for row in rows})
    share = 2 * count.prompts / (2 * count.prompts + count.answers)
    console.print(
        f"  {name}: {count.pairs} pairs of {families} families, {count.answers:,} answer tokens; "
        f"{share:.0%} of the [chosen; rejected] tokens are prompt"
    )
    return count


# Training


def tune(screen: Screen, config: Config, compared_steps: int, measured_pairs: int, repeats: int) -> Result:
    """Everything after model and data are there: reference, costs, training, evaluation."""
    compared_steps = min(compared_steps, config.steps)
    identity = {**identity_of(config), "world": 1}
    with asked_by_signals() as stop:
        context = Context(ranks.start("cpu"), screen, stop)
        plain = train.FirstSteps(config, context, identity, compared_steps)
        if stop:
            raise KeyboardInterrupt
        plain.objective = train.PlainObjective(config)
        trained = sum(parameter.numel() for parameter in plain.parameters)
        layers = plain.bare.config.num_hidden_layers
        screen.say(
            f"  training: layers {layers - config.last_layers + 1}-{layers} of {layers} and the final norm, "
            f"{trained / 1e6:.1f} M parameters, fp32; frozen: the layers below, in {config.cache_frozen}, the "
            f"embedding and the head tied to it; AdamW, learning rate {config.learning_rate:g}, beta {config.beta:g}, "
            f"{config.batch_size} pairs a step"
        )
        first = plain.feed.first(measured_pairs)
        with screen.phase("cost of the heads", repeats * len(train.HEADS)) as bar:
            costs, labels = train.head_costs(plain, first, config.beta, bar.advance, repeats)
        with screen.phase("first steps, plain loss", compared_steps) as bar:
            for _ in range(compared_steps):
                plain.step()
                bar.advance()
        fast = train.FirstSteps(config, context, identity, compared_steps)
        outcome = fast.run()
    if outcome.signal:
        raise KeyboardInterrupt
    finish(fast, outcome)
    history = train.history_of(log.read(fast.out / "log.jsonl"))
    before, after = history.held_out.pop(0), history.held_out[outcome.step]
    weight = plain.bare.get_output_embeddings().weight
    pairs = sum(1 for _ in read(config.eval_data))
    return Result(before, after, pairs, history, train.agreement(plain, fast), costs, labels, weight.shape[0])


def announce(console: Console, machine: Machine, config: Config, share: float, threads: int) -> float:
    """Say how long it will take here, with a ``share`` of the pairs; returns the seconds for the loading."""
    loading = LOADING * machine.python
    training, held_out = (
        Count(round(pairs), round(pairs * (TOKENS - ANSWERS)), round(pairs * ANSWERS))
        for pairs in (min(share * TRAINING, config.steps * config.batch_size), share * HELD_OUT)
    )
    seconds = loading + sum(expected_seconds(machine, training, held_out, config).values())
    speeds = ", ".join(
        f"{str(dtype).removeprefix('torch.')} {flops / 1e9:.0f}" for dtype, flops in machine.flops.items()
    )
    console.print(
        f"This machine, {threads} threads: {speeds} GFLOP/s in products like a layer's. "
        f"The demo will take about {seconds:.0f} seconds at that speed.\n"
    )
    return loading


def run(args: argparse.Namespace) -> None:
    """The demo in ``--run``'s folder, or in one that is gone afterwards."""
    if args.run is not None:
        args.run.mkdir(parents=True, exist_ok=True)
        return _run(args, args.run)
    with tempfile.TemporaryDirectory(prefix="dpofast-demo-") as folder:
        return _run(args, Path(folder))


def _run(args: argparse.Namespace, folder: Path) -> None:
    quiet_libraries()
    threads = args.threads or cores()
    torch.set_num_threads(threads)
    console = Console(highlight=False, markup=False)
    machine = Machine.measured()
    quick = {"steps": 2, "batch_size": 4, "micro_batch": 4} if args.quick else {"steps": args.steps}
    config = preset(folder, seed=args.seed, cache_frozen=machine.precision, **quick)
    loading = announce(console, machine, config, 0.1 if args.quick else 1.0, threads)
    screen = Screen(console, {"pairs and model": loading, "picture": 1.5})

    ruff = data.ruff_binary()
    version = subprocess.run([ruff, "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    if version != data.RUFF_VERSION:
        console.print(f"ruff is {version}, not {data.RUFF_VERSION}: the pairs, and so the results, may differ")
    with screen.phase("pairs and model"):
        documented, rules = data.documented_pairs(ruff)
        if args.quick:
            documented = documented[::10]
        pairs = data.verified_pairs(ruff, documented)
        model.write_model(folder / "model")
        tokenizer = load_tokenizer(config.model)
        training, held_out, left_out = split(pairs, tokenizer, args.seed)
    console.print(
        f"  {len(documented)} pairs{' (--quick: every tenth)' if args.quick else ''} in the documentation of the "
        f"{rules} rules of ruff {version}; {len(pairs)} pass: "
        "their rule fires on the rejected snippet and is silent on the chosen one"
    )
    console.print(f"  {left_out}")
    needed = config.steps * config.batch_size
    if needed < len(training):  # the frozen layers are the dearest part: none of their work is for nothing
        console.print(f"  {needed} of the {len(training)} training pairs, drawn at random, fill {config.steps} steps")
        training = random.Random(args.seed).sample(training, needed)
    counts = [
        describe_pairs(console, rows, tokenizer, name)
        for rows, name in ((training, "training"), (held_out, "held out"))
    ]
    write(training, folder / "train.jsonl")
    write(held_out, folder / "held_out.jsonl")

    screen.expected |= expected_seconds(machine, *counts, config)
    repeats = 1 if args.quick else train.REPEATS
    result = tune(screen, config, train.COMPARED_STEPS, train.MEASURED_PAIRS, repeats)
    result.seconds = screen.seconds
    with screen.phase("picture"):
        save_picture(result, args.out)
    console.print()
    print_result(console, result)
    console.print(f"Picture: {args.out}")
    if args.run is not None:
        console.print(f"The trained model: {folder / 'run' / 'best'}")
