"""The demo from beginning to end: pairs, model, reference, costs of the head, training, report."""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import subprocess
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
import transformers
from rich.console import Console

from dpofast.demo import HELD_OUT_SHARE, MAX_ANSWER, MAX_PROMPT, data, model, train
from dpofast.demo.report import Result, Screen, print_result, save_picture


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
    console: Console, pairs: Sequence[data.Pair], tokenizer: Any, seed: int
) -> tuple[list[data.EncodedPair], list[data.EncodedPair]]:
    """Train and held-out pairs in tokens, without the long ones."""
    training, held_out = data.split_by_family(pairs, HELD_OUT_SHARE, seed)
    alone = data.without_copies(training, held_out)

    def short(part: Sequence[data.Pair]) -> list[data.EncodedPair]:
        encoded = (data.encode(pair, tokenizer) for pair in part)
        return [
            pair
            for pair in encoded
            if len(pair.prompt) <= MAX_PROMPT and max(len(pair.chosen), len(pair.rejected)) <= MAX_ANSWER
        ]

    parts = short(alone), short(held_out)
    console.print(
        f"  {len(training) - len(alone)} training pairs share code with a held-out one and go; "
        f"{len(alone) + len(held_out) - len(parts[0]) - len(parts[1])} pairs are longer than "
        f"{MAX_PROMPT} prompt or {MAX_ANSWER} answer tokens and go"
    )
    return parts


def tune(
    screen: Screen,
    language_model: Any,
    training: Sequence[data.EncodedPair],
    held_out: Sequence[data.EncodedPair],
    settings: train.Settings,
) -> Result:
    """Everything after the data is there: reference, costs, training, evaluation."""
    dtype = model.faster_dtype()
    pairs = [*training, *held_out]
    with screen.phase("frozen layers and reference", len(pairs)) as bar:
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
    with screen.phase("cost of the two heads"):
        costs, labels = train.head_costs(upper, weight, first[0], settings)
    with screen.phase("held-out pairs, before"):
        before = train.evaluate(upper, weight, unseen, settings.beta)
    with screen.phase("first steps, plain loss"):
        plain = train.plain_first_steps(upper, weight, first, settings)
    with screen.phase("training with dpofast", settings.steps) as bar:
        history, agreement = train.train(
            upper, weight, itertools.chain(first, batches), settings, plain, bar.train_step
        )
    with screen.phase("held-out pairs, after"):
        after = train.evaluate(upper, weight, unseen, settings.beta)
    return Result(before, after, len(unseen), history, agreement, costs, labels, weight.shape[0])


def run(args: argparse.Namespace) -> None:
    quiet_libraries()
    threads = args.threads or cores()
    torch.set_num_threads(threads)
    console = Console(highlight=False, markup=False)
    screen = Screen(console)
    settings = train.Settings(steps=args.steps, seed=args.seed)
    if args.quick:
        settings = replace(settings, steps=2, batch_size=4, compared_steps=2, repeats=1)

    ruff = data.ruff_binary()
    version = subprocess.run([ruff, "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    if version != data.RUFF_VERSION:
        console.print(f"ruff is {version}, not {data.RUFF_VERSION}: the pairs, and so the results, may differ")
    with screen.phase("pairs and model"), ThreadPoolExecutor(1) as beside:
        documented, rules = data.documented_pairs(ruff)
        if args.quick:
            documented = documented[::10]
        # ruff is other processes, the GGUF reader one thread of Python: together they fill two cores
        verified = beside.submit(data.verified_pairs, ruff, documented, threads)
        path = model.gguf_file()
        tokenizer, language_model = model.load_tokenizer(path), model.load_model(path)
        pairs = verified.result()
    console.print(
        f"  {len(documented)} pairs{' (--quick: every tenth)' if args.quick else ''} in the documentation of the "
        f"{rules} rules of ruff {version}; {len(pairs)} pass: "
        "their rule fires on the rejected snippet and is silent on the chosen one"
    )
    training, held_out = encoded_split(console, pairs, tokenizer, settings.seed)
    describe_pairs(console, training, "training")
    describe_pairs(console, held_out, "held out")

    result = tune(screen, language_model, training, held_out, settings)
    result.seconds = screen.seconds
    with screen.phase("picture"):
        save_picture(result, args.out)
    console.print()
    print_result(console, result)
    console.print(f"Picture: {args.out}")
