"""The demo's work: what `dpofast.train` trains, and beside it the same steps and the same head in plain PyTorch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dpofast._memory import peak_growth
from dpofast.functional import linear_dpo_loss
from dpofast.integrations.models import share_prompt
from dpofast.train.config import Config
from dpofast.train.engine import Context, Training
from dpofast.train.feed import Batch
from dpofast.train.objective import PairObjective, Scored

IGNORE = -100
COMPARED_STEPS = 2
MEASURED_PAIRS = 8  # of the first batch, on which the heads are measured alone
REPEATS = 2

Head = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


# Heads


def dpofast_loss(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """The DPO loss by dpofast: hidden ``[2B, T, H]``, weight ``[V, H]``, labels ``[2B, T]``, ref ``[2B]``."""
    return linear_dpo_loss(hidden, weight, labels, ref_logps=ref_logps, beta=beta, loss_type="sigmoid").loss


def plain_loss(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """The same loss as most trainers write it: all logits, then log_softmax, gather, mask and sum."""
    logits = F.linear(hidden, weight)
    mask = labels != IGNORE
    picked = logits.log_softmax(-1).gather(-1, labels.where(mask, 0).unsqueeze(-1)).squeeze(-1)
    chosen, rejected = (torch.where(mask, picked, 0.0).sum(-1) - ref_logps).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def masked_loss(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """The same loss in plain PyTorch that is told the mask: logits of the answers' tokens only."""
    mask = labels != IGNORE
    logps = F.linear(hidden[mask], weight).log_softmax(-1).gather(-1, labels[mask].unsqueeze(-1)).squeeze(-1)
    summed = torch.zeros(len(labels)).index_add(0, mask.nonzero()[:, 0], logps)
    chosen, rejected = (summed - ref_logps).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


HEADS: dict[str, Head] = {"plain": plain_loss, "plain, told the mask": masked_loss, "dpofast": dpofast_loss}


@dataclass(frozen=True)
class HeadCost:
    """Median seconds, and the most memory beyond what was in use before the call (None: not measurable)."""

    seconds: float
    peak_bytes: int | None


def head_inputs(training: Training, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a head takes of ``batch``: hidden states ``[2B, T, H]``, its weight, labels ``[2B, T]``, references."""
    hidden = _hidden(training.bare, batch)
    return hidden, training.bare.get_output_embeddings().weight, batch.labels[:, 1:], training.ref_logps(batch)


def _hidden(model: Any, batch: Batch) -> Tensor:
    """The states that predict each label, the prompt of a pair run once."""
    with share_prompt(model):
        return model.base_model(**batch.inputs, use_cache=False)[0][:, :-1]


def head_costs(
    training: Training, batch: Batch, beta: float, tick: Callable[[], None], repeats: int = REPEATS
) -> tuple[dict[str, HeadCost], Tensor]:
    """Forward and backward of each of `HEADS` alone, on the real hidden states of a batch, in turns.

    Returns the costs by name, and the batch's labels.
    """
    with torch.no_grad():
        hidden, weight, labels, refs = head_inputs(training, batch)
    weight = weight.detach()  # it is frozen
    seconds: dict[str, list[float]] = {name: [] for name in HEADS}
    peaks: dict[str, list[int | None]] = {name: [] for name in HEADS}

    def once(name: str) -> None:
        leaf = hidden.clone().requires_grad_(True)
        start = time.perf_counter()
        HEADS[name](leaf, weight, labels, refs, beta).backward()
        seconds[name].append(time.perf_counter() - start)

    for _ in range(repeats):
        for name in HEADS:
            peaks[name].append(peak_growth(lambda name=name: once(name)))
            tick()
    costs = {
        name: HeadCost(
            statistics.median(seconds[name]), None if None in peaks[name] else max(peaks[name], default=None)
        )
        for name in HEADS
    }
    return costs, labels


# Trainings


class PlainObjective(PairObjective):
    """The trainer's loss, by `plain_loss`."""

    def score(self, model: Any, batch: Batch, ref_logps: Tensor | None, reduction: str = "mean") -> Scored:
        hidden, weight = _hidden(model, batch), model.get_output_embeddings().weight
        return Scored(plain_loss(hidden, weight, batch.labels[:, 1:], ref_logps, self.options["beta"]), {})


class FirstSteps(Training):
    """A training that keeps the losses of its first steps, and the parameters after them."""

    def __init__(self, config: Config, context: Context, identity: Mapping[str, Any], steps: int) -> None:
        super().__init__(config, context, identity)
        self.compared = steps
        self.losses: list[float] = []
        self.before = flat(self.parameters)
        self.after = self.before

    def step(self) -> dict[str, float]:
        entry = super().step()
        if len(self.losses) < self.compared:
            self.losses.append(entry["loss"])
            self.after = flat(self.parameters)
        return entry


def flat(parameters: Sequence[Tensor]) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


@dataclass(frozen=True)
class Agreement:
    """dpofast against the plain loss over the same first steps. Distances are Euclidean."""

    steps: int
    loss_difference: float  # the largest of the steps
    parameter_difference: float  # the largest of the parameters
    distance_apart: float
    distance_moved: float


def agreement(plain: FirstSteps, fast: FirstSteps) -> Agreement:
    apart = fast.after - plain.after
    return Agreement(
        steps=len(fast.losses),
        loss_difference=max(abs(a - b) for a, b in zip(fast.losses, plain.losses, strict=True)),
        parameter_difference=apart.abs().max().item(),
        distance_apart=apart.norm().item(),
        distance_moved=(fast.after - fast.before).norm().item(),
    )


# What a training wrote


@dataclass(frozen=True)
class Score:
    """How a policy does on the held-out pairs. Before training the policy is the reference: no margin, loss ln 2."""

    loss: float
    margin: float
    reward_accuracy: float  # share of pairs whose chosen answer gained more than the rejected one
    preference: float  # share of pairs whose chosen answer is the more probable one


@dataclass
class History:
    """One entry per step; and the scores on held-out pairs, by the number of steps before them."""

    loss: list[float] = field(default_factory=list)
    margin: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    held_out: dict[int, Score] = field(default_factory=dict)


def history_of(entries: Sequence[Mapping[str, Any]]) -> History:
    """The log of a training."""
    history = History()
    for entry in entries:
        if "loss" in entry:
            history.loss.append(entry["loss"])
            history.margin.append(entry["rewards/margins"])
            history.accuracy.append(entry["rewards/accuracies"])
        if "eval/loss" in entry:
            names = ("loss", "rewards/margins", "rewards/accuracies", "logps/accuracies")
            history.held_out[entry["step"]] = Score(*(entry[f"eval/{name}"] for name in names))
    return history
