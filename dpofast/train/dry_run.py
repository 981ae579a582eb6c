"""What a training will take, before it is begun: one forward and backward of it, measured here, and multiplied."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from dpofast._memory import peak_growth
from dpofast.integrations.models.head import find
from dpofast.plan.report import plan
from dpofast.train import model, ranks
from dpofast.train.config import Config
from dpofast.train.engine import steps_of
from dpofast.train.feed import Feed
from dpofast.train.frozen import FrozenLayers
from dpofast.train.objective import objective_of

MIB = 1 << 20


def dry_run(config: Config) -> str:
    """A page of what `dpofast.train.run.train` would do with this configuration on one rank; nothing is written."""
    disable_progress_bar()  # of files read
    here = ranks.start(config.device)
    objective = objective_of(config)
    feed = Feed(config, here, objective)
    policy = model.trained(config, None).to(here.device)
    batch = feed.step()[0].to(here.device)
    references = torch.zeros(len(batch.labels), device=here.device) if objective.needs_reference else None

    def autocast() -> Any:
        return torch.autocast(here.device.type, torch.bfloat16, enabled=config.precision == "bf16")

    def train() -> None:
        with autocast():
            scored = objective.score(policy, batch, references)
        scored.loss.backward()

    def score() -> None:
        with autocast():
            objective.logps(policy, batch)

    train()  # the first makes the gradients, and whatever else is made once
    score_all = _seconds(score, here.device)
    if config.cache_frozen:
        with autocast():
            FrozenLayers(policy, config.last_layers, config.cache_frozen, {})
        train()
    memory = _peak(train, here.device)
    seconds, without_gradient = _seconds(train, here.device), _seconds(score, here.device)
    steps = steps_of(config, feed.records)
    times = {
        "reference": feed.all_batches * score_all * objective.needs_reference,
        "training": steps * math.ceil(config.batch_size / config.micro_batch) * seconds,
        "evaluation": _evaluations(config, steps) * feed.held_out_batches * without_gradient,
    }
    return "\n".join(
        [
            f"{feed.records} records, {steps} steps of {config.batch_size} in parts of {config.micro_batch}",
            *_parameters(policy, memory),
            *(f"{name:<12} about {_duration(value)}" for name, value in times.items() if value),
            f"{'together':<12} about {_duration(sum(times.values()))}: a part measured here and multiplied; optimizer "
            "and checkpoints are not in it",
            "",
            f"The head, of the first part's {_answer_tokens(batch)} answer tokens:",
            str(_head_plan(policy, batch, config)),
        ]
    )


def _parameters(policy: torch.nn.Module, memory: int | None) -> list[str]:
    weights = sum(p.numel() * p.element_size() for p in policy.parameters())
    everything = sum(p.numel() for p in policy.parameters())
    trained = sum(p.numel() for p in model.trained_parameters(policy))
    kept = weights + 12 * trained
    lines = [
        f"{everything:,} parameters, of which {trained:,} are trained",
        f"memory       weights {weights / MIB:,.0f} MiB, gradients and AdamW {12 * trained / MIB:,.0f} MiB",
    ]
    if memory is None:
        return [*lines, "             activations: not measurable here"]
    together = f"together {(kept + memory) / MIB:,.0f} MiB"
    return [*lines, f"             activations of the first part {memory / MIB:,.0f} MiB, measured; {together}"]


def _evaluations(config: Config, steps: int) -> int:
    """One before the first step, one after the last, and those between."""
    return 1 + math.ceil(steps / config.evaluate_every) if config.evaluate_every else 2


def _answer_tokens(batch: Any) -> int:
    return int((batch.labels[:, 1:] != -100).sum())


def _head_plan(policy: torch.nn.Module, batch: Any, config: Config) -> Any:
    head = find(policy).linear.weight
    dtype = torch.bfloat16 if config.precision == "bf16" else head.dtype
    return plan(
        max(1, _answer_tokens(batch)), head.shape[1], head.shape[0], dtype,
        train_head=head.requires_grad, memory_budget=config.memory_budget or None,
    )  # fmt: skip


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _peak(work: Callable[[], None], device: torch.device) -> int | None:
    """Bytes above what is there already."""
    if device.type != "cuda":
        return peak_growth(work)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
