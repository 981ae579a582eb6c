"""How long the demo will take on this machine: its matrix products, counted, at the speed of a few measured here."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dpofast.demo.data import EncodedPair
from dpofast.demo.train import Settings

LAYER, LAYERS, HEAD = 3.54e6, 30, 28.3e6  # SmolLM2-135M: parameters of a layer, layers, parameters of the head
OPENING = 19  # tokens that all prompts begin with, which the frozen layers see once

# Seconds of a phase over those that its products would take alone, measured on two Zen 3 cores.
BODY_FACTOR, HEAD_FACTOR, PLAIN_HEAD_FACTOR = 1.2, 1.1, 2.4
LOADING = 210.0  # reading the model and the pairs is Python's work: so many times `Machine.python`


def _best(work: Callable[[], object], tries: int) -> float:
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@dataclass(frozen=True)
class Machine:
    """What was measured. ``dtype`` is the one whose products are fastest here: not every CPU has some for bf16."""

    dtype: torch.dtype
    flops: dict[torch.dtype, float]  # operations a second, of a product as a layer has it
    python: float  # seconds of a loop of plain Python

    @classmethod
    def measured(cls) -> Machine:
        """Takes half a second, or a second where bf16 is slow."""
        flops = {}
        for dtype in (torch.float32, torch.bfloat16):
            a, b = torch.ones(1024, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
            flops[dtype] = 2 * 1024 * 576 * 1536 / _best(lambda a=a, b=b: torch.nn.functional.linear(a, b), tries=4)
        python = _best(lambda: [re.sub("a", str, f"{i}a")[:1] for i in range(30_000)], tries=3)
        return cls(max(flops, key=lambda dtype: flops[dtype]), flops, python)


@dataclass(frozen=True)
class Count:
    """Some pairs, as work: tokens in rows of a prompt and two answers, and how many of them are answers."""

    pairs: int
    tokens: int
    answers: int

    @classmethod
    def of(cls, pairs: Sequence[EncodedPair]) -> Count:
        answers = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
        return cls(len(pairs), sum(pair.length for pair in pairs), answers)


def expected_seconds(machine: Machine, training: Count, held_out: Count, settings: Settings) -> dict[str, float]:
    """Seconds of each phase after the loading, by its name."""
    fp32, lower = machine.flops[torch.float32], machine.flops[machine.dtype]
    top = settings.top * LAYER * BODY_FACTOR / fp32  # seconds of a token and an operation on each parameter
    head, plain_head = HEAD * HEAD_FACTOR / fp32, HEAD * PLAIN_HEAD_FACTOR / fp32

    def scored(count: Count) -> float:
        return 2 * top * count.tokens + 2 * head * count.answers

    share = settings.batch_size / max(training.pairs, 1)
    tokens, answers = share * training.tokens, share * training.answers
    positions = 2 * tokens - answers  # of a batch with a row for each answer
    measured = settings.measured_pairs / settings.batch_size
    body = (LAYERS - settings.top) * LAYER * BODY_FACTOR / lower
    rest = training.tokens + held_out.tokens - OPENING * (training.pairs + held_out.pairs)
    heads = 4 * (plain_head * positions + plain_head * answers + head * answers)
    evaluations = len(settings.evaluated_steps) * scored(held_out)
    return {
        "frozen layers and reference": 2 * body * rest + scored(training) + scored(held_out),
        "cost of the heads": settings.repeats * measured * heads,
        "first steps, plain loss": settings.compared_steps * (6 * top * tokens + 4 * plain_head * positions),
        "training with dpofast": settings.steps * (6 * top * tokens + 4 * head * answers) + evaluations,
    }
