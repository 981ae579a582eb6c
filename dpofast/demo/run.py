"""The demo from beginning to end: pairs, model, reference, costs of the head, training, report."""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import random
import subprocess
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
import transformers
from rich.console import Console

from dpofast.demo import data, model, train
from dpofast.demo.estimate import LOADING, Count, Machine, expected_seconds
from dpofast.demo.report import Result, print_result, save_picture, training_note
from dpofast.demo.screen import Bar, Screen

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


def describe_pairs(console: Console, encoded: Sequence[data.EncodedPair], name: str) -> None:
    prompts = sum(len(pair.prompt) for pair in encoded)
    answers = sum(len(pair.chosen) + len(pair.rejected) for pair in encoded)
    families = len({pair.family for pair in encoded})
    share = 2 * prompts / (2 * prompts + answers)
    console.print(
        f"  {name}: {len(encoded)} pairs of {families} families, {answers:,} answer tokens; "
        f"{share:.0%} of the [chosen; rejected] tokens are prompt"
    )


def encoded_split(
    pairs: Sequence[data.Pair], tokenizer: Any, seed: int
) -> tuple[list[data.EncodedPair], list[data.EncodedPair], str]:
    """Train and held-out pairs in tokens, without the long ones; and what was left out, in words."""
    training, held_out = data.split_by_family(pairs, data.HELD_OUT_SHARE, seed)
    alone = data.without_copies(training, held_out)

    def short(part: Sequence[data.Pair]) -> list[data.EncodedPair]:
        encoded = (data.encode(pair, tokenizer) for pair in part)
        return [
            pair
            for pair in encoded
            if len(pair.prompt) <= data.MAX_PROMPT and max(len(pair.chosen), len(pair.rejected)) <= data.MAX_ANSWER
        ]

    kept, kept_out = short(alone), short(held_out)
    left_out = (
        f"{len(training) - len(alone)} training pairs share code with a held-out one and go; "
        f"{len(alone) + len(held_out) - len(kept) - len(kept_out)} pairs are longer than "
        f"{data.MAX_PROMPT} prompt or {data.MAX_ANSWER} answer tokens and go"
    )
    return kept, kept_out, left_out


def tune(
    screen: Screen,
    language_model: Any,
    training: Sequence[data.EncodedPair],
    held_out: Sequence[data.EncodedPair],
    settings: train.Settings,
    machine: Machine,
) -> Result:
    """Everything after the data is there: reference, costs, training, evaluation."""
    dtype = machine.dtype
    pairs = [*training, *held_out]
    expected = expected_seconds(machine, Count.of(training), Count.of(held_out), settings)

    def phase(name: str, total: int) -> AbstractContextManager[Bar]:
        return screen.phase(name, expected[name], total)

    with phase("frozen layers and reference", sum(pair.length for pair in pairs)) as bar:
        examples, upper, weight = train.prepare(language_model, pairs, settings.top, dtype, bar.advance)
    known = {id(pair) for pair in held_out}
    unseen = [example for example in examples if id(example.pair) in known]
    seen = [example for example in examples if id(example.pair) not in known]
    trained = sum(parameter.numel() for parameter in upper.parameters())
    layers = language_model.config.num_hidden_layers
    screen.console.print(
        f"  training: layers {layers - settings.top + 1}-{layers} of {layers} and the final norm, "
        f"{trained / 1e6:.1f} M parameters, fp32; frozen: the layers below, in "
        f"{str(dtype).removeprefix('torch.')}, the embedding and the head tied to it; AdamW, learning rate "
        f"{settings.learning_rate:g}, beta {settings.beta:g}, {settings.batch_size} pairs a step"
    )

    batches = train.training_batches(seen, settings.batch_size, settings.seed)
    first = list(itertools.islice(batches, min(settings.compared_steps, settings.steps)))
    with phase("cost of the heads", settings.repeats * len(train.HEADS)) as bar:
        costs, labels = train.head_costs(upper, weight, first[0][: settings.measured_pairs], settings, bar.advance)
    before = train.score_before(unseen, settings.beta)
    with phase("first steps, plain loss", len(first)) as bar:
        plain = train.plain_first_steps(upper, weight, first, settings, bar.advance)
    with phase("training with dpofast", settings.steps) as bar:
        history, agreement = train.train(
            upper,
            weight,
            itertools.chain(first, batches),
            unseen,
            settings,
            plain,
            lambda history: bar.advance(1, training_note(history)),
        )
    after = history.held_out[settings.steps]
    return Result(before, after, len(unseen), history, agreement, costs, labels, weight.shape[0])


def announce(console: Console, machine: Machine, settings: train.Settings, share: float, threads: int) -> float:
    """Say how long it will take here, with a ``share`` of the pairs; returns the seconds for the loading."""
    loading = LOADING * machine.python
    training, held_out = (
        Count(round(pairs), round(pairs * TOKENS), round(pairs * ANSWERS))
        for pairs in (min(share * TRAINING, settings.steps * settings.batch_size), share * HELD_OUT)
    )
    seconds = loading + sum(expected_seconds(machine, training, held_out, settings).values())
    speeds = ", ".join(
        f"{str(dtype).removeprefix('torch.')} {flops / 1e9:.0f}" for dtype, flops in machine.flops.items()
    )
    console.print(
        f"This machine, {threads} threads: {speeds} GFLOP/s in products like a layer's. "
        f"The demo will take about {seconds:.0f} seconds at that speed.\n"
    )
    return loading


def run(args: argparse.Namespace) -> None:
    quiet_libraries()
    threads = args.threads or cores()
    torch.set_num_threads(threads)
    console = Console(highlight=False, markup=False)
    screen = Screen(console)
    settings = train.Settings(steps=args.steps, seed=args.seed)
    if args.quick:
        settings = replace(settings, steps=2, batch_size=4, compared_steps=2, repeats=1, evaluations=1)
    machine = Machine.measured()
    loading = announce(console, machine, settings, 0.1 if args.quick else 1.0, threads)

    ruff = data.ruff_binary()
    version = subprocess.run([ruff, "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    if version != data.RUFF_VERSION:
        console.print(f"ruff is {version}, not {data.RUFF_VERSION}: the pairs, and so the results, may differ")
    with screen.phase("pairs and model", loading), model.gguf_read_once():
        documented, rules = data.documented_pairs(ruff)
        if args.quick:
            documented = documented[::10]
        pairs = data.verified_pairs(ruff, documented)
        path = model.gguf_file()
        tokenizer, language_model = model.load_tokenizer(path), model.load_model(path)
        training, held_out, left_out = encoded_split(pairs, tokenizer, settings.seed)
    console.print(
        f"  {len(documented)} pairs{' (--quick: every tenth)' if args.quick else ''} in the documentation of the "
        f"{rules} rules of ruff {version}; {len(pairs)} pass: "
        "their rule fires on the rejected snippet and is silent on the chosen one"
    )
    console.print(f"  {left_out}")
    needed = settings.steps * settings.batch_size
    if needed < len(training):  # the frozen layers are the dearest part: none of their work is for nothing
        console.print(f"  {needed} of the {len(training)} training pairs, drawn at random, fill {settings.steps} steps")
        training = random.Random(settings.seed).sample(training, needed)
    describe_pairs(console, training, "training")
    describe_pairs(console, held_out, "held out")

    result = tune(screen, language_model, training, held_out, settings, machine)
    result.seconds = screen.seconds
    with screen.phase("picture", expected=1.5):
        save_picture(result, args.out)
    console.print()
    print_result(console, result)
    console.print(f"Picture: {args.out}")
