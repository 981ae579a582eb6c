"""How long the demo will take on this machine: its matrix products, counted, at the speed of a few measured here."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dpofast.data import Encoded
from dpofast.demo.train import COMPARED_STEPS, MEASURED_PAIRS, REPEATS
from dpofast.train.config import Config

LAYER, LAYERS, HEAD = 3.54e6, 30, 28.3e6  # SmolLM2-135M: parameters of a layer, layers, parameters of the head

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

    @property
    def precision(self) -> str:
        """fp32 or bf16, as a training is told."""
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

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
    """Some pairs, as work: tokens of their prompts, and of both answers."""

    pairs: int
    prompts: int
    answers: int

    @classmethod
    def of(cls, pairs: Sequence[Encoded]) -> Count:
        answers = sum(len(answer.ids) for pair in pairs for answer in pair.answers)
        return cls(len(pairs), sum(len(pair.prompt) for pair in pairs), answers)

    @property
    def tokens(self) -> int:
        """In rows that have the prompt once."""
        return self.prompts + self.answers


def expected_seconds(machine: Machine, training: Count, held_out: Count, config: Config) -> dict[str, float]:
    """Seconds of each phase after the loading, by its name."""
    fp32, frozen = machine.flops[torch.float32], machine.flops[machine.dtype]
    top = config.last_layers * LAYER * BODY_FACTOR / fp32  # seconds of a token and an operation on each parameter
    head, plain_head = HEAD * HEAD_FACTOR / fp32, HEAD * PLAIN_HEAD_FACTOR / fp32

    def scored(count: Count) -> float:
        return 2 * top * count.tokens + 2 * head * count.answers

    share = config.batch_size / max(training.pairs, 1)
    tokens, answers = share * training.tokens, share * training.answers
    positions = 2 * tokens - answers  # of a batch with a row for each answer
    measured = MEASURED_PAIRS / config.batch_size
    body = (LAYERS - config.last_layers) * LAYER * BODY_FACTOR / frozen
    heads = 4 * (plain_head * positions + plain_head * answers + head * answers)
    evaluations = (1 + math.ceil(config.steps / config.evaluate_every)) * scored(held_out)
    return {
        "reference": 2 * body * (training.tokens + held_out.tokens) + scored(training) + scored(held_out),
        "cost of the heads": REPEATS * measured * heads,
        "first steps, plain loss": COMPARED_STEPS * (6 * top * tokens + 4 * plain_head * positions),
        "training": config.steps * (6 * top * tokens + 4 * head * answers) + evaluations,
    }
