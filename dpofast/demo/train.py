"""The demo's work: reference log-probs, training steps, and the same steps and head in plain PyTorch."""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dpofast._memory import peak_growth
from dpofast.demo.data import EncodedPair
from dpofast.demo.model import IGNORE, Batch, Opening, Upper, collate, lower_states, split_model
from dpofast.functional import linear_dpo_loss
from dpofast.primitive import linear_logprob
from dpofast.sequences import sequence_logps

SCORE_ROWS = 16  # pairs scored at a time, without gradient: what a layer makes of more of them leaves the caches


@dataclass(frozen=True)
class Settings:
    """What a run is made of. ``top`` counts the trained layers, ``batch_size`` the pairs of a step."""

    steps: int = 14
    batch_size: int = 16
    top: int = 2
    learning_rate: float = 3e-4
    warmup: int = 4
    beta: float = 0.1
    seed: int = 0
    compared_steps: int = 2
    measured_pairs: int = 8  # of the batch on which the heads are measured alone
    repeats: int = 2
    evaluations: int = 3  # on the held-out pairs: the last after the last step, the others evenly before it

    @property
    def evaluated_steps(self) -> set[int]:
        """The steps after which the held-out pairs are scored."""
        return {round(self.steps * (i + 1) / self.evaluations) for i in range(self.evaluations)} - {0}


@dataclass(frozen=True)
class HeadLoss:
    """What the demo wants from a loss, whichever head made it."""

    loss: Tensor
    margins: Tensor  # [B], reward of chosen less reward of rejected


Head = Callable[[Tensor, Tensor, Tensor, Tensor, float], HeadLoss]


def dpofast_head_loss(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, beta: float) -> HeadLoss:
    """The DPO loss by dpofast: hidden ``[2B, T, H]``, weight ``[V, H]``, labels ``[2B, T]``, ref ``[2B]``."""
    out = linear_dpo_loss(hidden, weight, labels, ref_logps=ref_logps, beta=beta, loss_type="sigmoid")
    return HeadLoss(out.loss, (out.chosen_rewards - out.rejected_rewards).detach())


def plain_head_loss(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, beta: float) -> HeadLoss:
    """The same loss as most trainers write it: all logits, then log_softmax, gather, mask and sum."""
    logits = F.linear(hidden, weight)
    mask = labels != IGNORE
    picked = logits.log_softmax(-1).gather(-1, labels.where(mask, 0).unsqueeze(-1)).squeeze(-1)
    chosen, rejected = (torch.where(mask, picked, 0.0).sum(-1) - ref_logps).chunk(2)
    margins = beta * (chosen - rejected)
    return HeadLoss(-F.logsigmoid(margins).mean(), margins.detach())


def masked_head_loss(hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, beta: float) -> HeadLoss:
    """The same loss in plain PyTorch that is told the mask: logits of the answers' tokens only."""
    mask = labels != IGNORE
    logps = F.linear(hidden[mask], weight).log_softmax(-1).gather(-1, labels[mask].unsqueeze(-1)).squeeze(-1)
    summed = torch.zeros(len(labels)).index_add(0, mask.nonzero()[:, 0], logps)
    chosen, rejected = (summed - ref_logps).chunk(2)
    margins = beta * (chosen - rejected)
    return HeadLoss(-F.logsigmoid(margins).mean(), margins.detach())


HEADS: dict[str, Head] = {
    "plain": plain_head_loss,
    "plain, told the mask": masked_head_loss,
    "dpofast": dpofast_head_loss,
}


@dataclass(frozen=True)
class Example:
    """A pair with what never changes about it: the frozen layers' output and the reference's log-probs."""

    pair: EncodedPair
    state: Tensor  # [pair.length, H]
    ref_chosen: float
    ref_rejected: float


@dataclass(frozen=True)
class Inputs:
    """The inputs of one step."""

    batch: Batch
    states: Tensor  # [B, T, H], fp32
    ref_logps: Tensor  # [2B]


def stack(examples: Sequence[Example]) -> Inputs:
    states = torch.nn.utils.rnn.pad_sequence([example.state.float() for example in examples], batch_first=True)
    refs = [example.ref_chosen for example in examples] + [example.ref_rejected for example in examples]
    return Inputs(collate([example.pair for example in examples]), states, torch.tensor(refs))


def by_length(items: Sequence[Any], length: Callable[[Any], int], size: int) -> list[list[Any]]:
    """Batches of neighbours in length, which need little padding."""
    ordered = sorted(items, key=length)
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def training_batches(examples: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Batches without end, in an order that only the seed decides; by length within every four batches."""
    size = min(size, len(examples))
    rng = random.Random(seed)
    while True:
        order = rng.sample(examples, len(examples))
        epoch = []
        for i in range(0, len(order), 4 * size):
            group = by_length(order[i : i + 4 * size], lambda example: example.pair.length, size)
            epoch += [batch for batch in group if len(batch) == size]
        rng.shuffle(epoch)
        yield from epoch


@torch.no_grad()
def pair_logps(upper: Upper, weight: Tensor, states: Tensor, batch: Batch) -> tuple[list[float], list[float]]:
    """Log-probs of the chosen and of the rejected answers, ``[B]`` each, without gradient."""
    logps = linear_logprob(batch.unfold(upper(states, batch)), weight, batch.labels).logps
    chosen, rejected = sequence_logps(logps, batch.labels).chunk(2)
    return chosen.tolist(), rejected.tolist()


def prepare(
    model: Any, pairs: Sequence[EncodedPair], top: int, dtype: torch.dtype, tick: Callable[[int], None]
) -> tuple[list[Example], Upper, Tensor]:
    """Run the frozen layers and the reference (the model before training) once over all pairs.

    ``tick`` hears how many tokens are done. Returns the examples, the part to train and the head's weight ``[V, H]``.
    """
    lower, upper, weight = split_model(model, top, dtype)
    opening, examples = Opening(pairs), []
    for group in by_length(pairs, lambda pair: pair.length, SCORE_ROWS):
        batch = collate(group)
        states = lower_states(model, lower, batch, opening, dtype)
        refs = zip(*pair_logps(upper, weight, states.float(), batch), strict=True)
        examples += [
            Example(pair, state[: pair.length].clone(), *ref)
            for pair, state, ref in zip(group, states, refs, strict=True)
        ]
        tick(sum(pair.length for pair in group))
    return examples, upper, weight


@dataclass(frozen=True)
class Score:
    """How a policy does on some pairs. Before training the policy is the reference: no margin, loss ln 2."""

    loss: float
    margin: float
    reward_accuracy: float  # share of pairs whose chosen answer gained more than the rejected one
    preference: float  # share of pairs whose chosen answer is the more probable one


def score(scored: Iterator[tuple[Example, float, float]], beta: float) -> Score:
    """The score of a policy that gives these log-probs to the chosen and the rejected answer of each example."""
    margins, preferred = [], []
    for example, chosen, rejected in scored:
        margins.append(beta * ((chosen - example.ref_chosen) - (rejected - example.ref_rejected)))
        preferred.append(chosen > rejected)
    return Score(
        loss=F.softplus(-torch.tensor(margins)).mean().item(),
        margin=statistics.fmean(margins),
        reward_accuracy=statistics.fmean(margin > 0 for margin in margins),
        preference=statistics.fmean(preferred),
    )


def score_before(examples: Sequence[Example], beta: float) -> Score:
    """The score of the reference, whose log-probs the examples hold."""
    return score(((example, example.ref_chosen, example.ref_rejected) for example in examples), beta)


def evaluate(upper: Upper, weight: Tensor, examples: Sequence[Example], beta: float) -> Score:
    """The score of the policy as it is now."""

    def scored() -> Iterator[tuple[Example, float, float]]:
        for group in by_length(examples, lambda example: example.pair.length, SCORE_ROWS):
            inputs = stack(group)
            yield from zip(group, *pair_logps(upper, weight, inputs.states, inputs.batch), strict=True)

    return score(scored(), beta)


class Trainer:
    """AdamW with a short warm-up and a linear decay on the upper layers; the loss is exchangeable."""

    def __init__(self, upper: Upper, weight: Tensor, settings: Settings, head: Head) -> None:
        self.upper, self.weight, self.settings, self.head = upper, weight, settings, head
        self.optimizer = torch.optim.AdamW(upper.parameters(), lr=settings.learning_rate, weight_decay=0.0)
        self.done = 0

    def step(self, inputs: Inputs) -> HeadLoss:
        s = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = s.learning_rate * min((self.done + 1) / s.warmup, 1.0) * (1 - self.done / s.steps)
        hidden = inputs.batch.unfold(self.upper(inputs.states, inputs.batch))
        out = self.head(hidden, self.weight, inputs.batch.labels, inputs.ref_logps, s.beta)
        self.optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.upper.parameters(), 1.0)
        self.optimizer.step()
        self.done += 1
        return out


def flat_parameters(module: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@dataclass(frozen=True)
class Agreement:
    """dpofast against the plain loss over the same first steps. Distances are Euclidean."""

    steps: int
    loss_difference: float  # the largest of the steps
    parameter_difference: float  # the largest of the parameters
    distance_apart: float
    distance_moved: float


@dataclass
class History:
    """One entry per step; and the scores on held-out pairs, by the number of steps before them."""

    loss: list[float] = field(default_factory=list)
    margin: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    held_out: dict[int, Score] = field(default_factory=dict)

    def add(self, out: HeadLoss) -> None:
        self.loss.append(out.loss.item())
        self.margin.append(out.margins.mean().item())
        self.accuracy.append((out.margins > 0).float().mean().item())


def plain_first_steps(
    upper: Upper, weight: Tensor, batches: Sequence[Sequence[Example]], settings: Settings, tick: Callable[[], None]
) -> tuple[list[float], Tensor]:
    """Losses and last parameters of a copy of ``upper`` that takes these steps with the plain loss."""
    trainer, losses = Trainer(copy.deepcopy(upper), weight, settings, plain_head_loss), []
    for batch in batches:
        losses.append(trainer.step(stack(batch)).loss.item())
        tick()
    return losses, flat_parameters(trainer.upper)


def train(
    upper: Upper,
    weight: Tensor,
    batches: Iterator[Sequence[Example]],
    held_out: Sequence[Example],
    settings: Settings,
    plain: tuple[list[float], Tensor],
    tick: Callable[[History], None],
) -> tuple[History, Agreement]:
    """Train ``upper`` with dpofast; on the way, hold its first steps against those of `plain_first_steps`.

    Nothing is decided by the ``held_out`` pairs: they are scored, and that is all.
    """
    plain_losses, plain_parameters = plain
    trainer, history = Trainer(upper, weight, settings, dpofast_head_loss), History()
    start = flat_parameters(upper)
    for _ in range(settings.steps):
        history.add(trainer.step(stack(next(batches))))
        if trainer.done == len(plain_losses):
            here = flat_parameters(upper)
            agreement = Agreement(
                steps=trainer.done,
                loss_difference=max(abs(a - b) for a, b in zip(history.loss, plain_losses, strict=True)),
                parameter_difference=(here - plain_parameters).abs().max().item(),
                distance_apart=(here - plain_parameters).norm().item(),
                distance_moved=(here - start).norm().item(),
            )
        if trainer.done in settings.evaluated_steps:
            history.held_out[trainer.done] = evaluate(upper, weight, held_out, settings.beta)
        tick(history)
    return history, agreement


@dataclass(frozen=True)
class HeadCost:
    """Median seconds, and the most memory beyond what was in use before the call (None: not measurable)."""

    seconds: float
    peak_bytes: int | None


def head_costs(
    upper: Upper, weight: Tensor, examples: Sequence[Example], settings: Settings, tick: Callable[[], None]
) -> tuple[dict[str, HeadCost], Tensor]:
    """Forward and backward of each of `HEADS` alone, on the real hidden states of some examples, in turns.

    Returns the costs by name, and the examples' labels.
    """
    inputs = stack(examples)
    with torch.no_grad():
        hidden = inputs.batch.unfold(upper(inputs.states, inputs.batch))
    seconds: dict[str, list[float]] = {name: [] for name in HEADS}
    peaks: dict[str, list[int | None]] = {name: [] for name in HEADS}

    def once(name: str) -> None:
        leaf = hidden.clone().requires_grad_(True)
        start = time.perf_counter()
        HEADS[name](leaf, weight, inputs.batch.labels, inputs.ref_logps, settings.beta).loss.backward()
        seconds[name].append(time.perf_counter() - start)

    for _ in range(settings.repeats):
        for name in HEADS:
            peaks[name].append(peak_growth(lambda name=name: once(name)))
            tick()
    costs = {
        name: HeadCost(
            statistics.median(seconds[name]), None if None in peaks[name] else max(peaks[name], default=None)
        )
        for name in HEADS
    }
    return costs, inputs.batch.labels
