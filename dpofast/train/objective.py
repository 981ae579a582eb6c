"""The loss of a batch of preferences, and what is known of each of its records."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpofast.checks import wrong
from dpofast.functional import DPOLossOutput
from dpofast.functional import objective_of as pair_objective_of
from dpofast.integrations.models import model_dpo_loss, model_logprob
from dpofast.losses import UNPAIRED_LOSSES, unpaired_preference_loss
from dpofast.sequences import sequence_logps
from dpofast.train.config import Config
from dpofast.train.feed import Batch


class Scored(NamedTuple):
    """A batch's loss, and numbers of each of its records ``[B]``, by name: nan where a record has none."""

    loss: Tensor
    values: dict[str, Tensor]


def objective_of(config: Config) -> PairObjective | UnpairedObjective:
    """What the options of a training say that is trained: a loss of pairs, or of single answers."""
    return UnpairedObjective(config) if set(config.loss_type) & set(UNPAIRED_LOSSES) else PairObjective(config)


class PairObjective:
    """A loss of pairs. ``answers`` is how many a record must have; ``has_kl``, whether mismatched ones are needed."""

    answers, has_kl = 2, False

    def __init__(self, config: Config) -> None:
        self.head = {"memory_budget": config.memory_budget or None, "share_prompt": config.share_prompt}
        self.options = {
            "loss_type": config.loss_type if len(config.loss_type) > 1 else config.loss_type[0],
            "beta": config.beta,
            "label_smoothing": config.label_smoothing,
            "grad_filter": config.filter,
            **config.loss_options,
        }
        if config.loss_weights:
            self.options["loss_weights"] = config.loss_weights
        self.needs_reference = any(term.loss.reference for term in pair_objective_of(self.options).terms)

    def score(self, model: nn.Module, batch: Batch, ref_logps: Tensor | None, reduction: str = "mean") -> Scored:
        """The loss of ``batch``, ``[B]`` for reduction="none"."""
        options = self.options | _columns(batch)
        out = model_dpo_loss(
            model, batch.inputs, batch.labels, ref_logps=ref_logps, reduction=reduction, **self.head, **options
        )
        return Scored(out.loss, _values(out))

    def logps(self, model: nn.Module, batch: Batch) -> Tensor:
        """The log-probs ``[N]`` of the answers in ``batch``."""
        return _sums(model, batch.inputs, batch.labels, **self.head)


class UnpairedObjective:
    """A loss of single answers, each marked good or bad; of `kto` with a mismatched answer to the same prompt behind.

    Means are over the records of a micro-batch; so is the KL of `kto`, which a rank does not share with the others.
    """

    answers = 1
    needs_reference = True

    def __init__(self, config: Config) -> None:
        if len(config.loss_type) > 1 or config.loss_weights:
            raise wrong("loss_type", f"{config.loss_type} with {config.loss_weights}", "one loss of single answers")
        (self.name,) = config.loss_type
        needs = UNPAIRED_LOSSES[self.name].needs
        if "reward_shift" in needs:
            raise wrong("loss_type", repr(self.name), "kto or apo_zero_unpaired, which have no running mean")
        if config.share_prompt:
            raise wrong("share_prompt", "True", f"False: {self.name} has one answer to a prompt")
        if config.label_smoothing:
            raise wrong("label_smoothing", f"{config.label_smoothing}", f"0, for {self.name} has none")
        self.has_kl = "kl" in needs
        self.head = {"memory_budget": config.memory_budget or None}
        self.filter, self.beta, self.options = config.filter, config.beta, config.loss_options

    def score(self, model: nn.Module, batch: Batch, ref_logps: Tensor | None, reduction: str = "mean") -> Scored:
        """The loss of ``batch``, ``[B]`` for reduction="none"."""
        n, kl = batch.records, None
        if self.has_kl:
            with torch.no_grad():
                kl = _sums(model, _rows(batch.inputs, n, None), batch.labels[n:], **self.head) - ref_logps[n:]
        own = _rows(batch.inputs, 0, n)
        logps = _sums(model, own, batch.labels[:n], grad_filter=self.filter, **self.head)
        options = self.options if batch.weight is None else self.options | {"weight": batch.weight}
        loss = unpaired_preference_loss(
            logps, ref_logps[:n], batch.good, loss_type=self.name, beta=self.beta, kl=kl, reduction=reduction, **options
        )
        rewards = self.beta * (logps - ref_logps[:n]).detach()
        nowhere = torch.full_like(rewards, math.nan)
        values = {
            "rewards/chosen": rewards.where(batch.good, nowhere),
            "rewards/rejected": rewards.where(~batch.good, nowhere),
            "rewards/accuracies": ((rewards > 0) == batch.good).to(rewards.dtype),
            "logps/chosen": logps.detach().where(batch.good, nowhere),
            "logps/rejected": logps.detach().where(~batch.good, nowhere),
        }
        return Scored(loss, values)

    def logps(self, model: nn.Module, batch: Batch) -> Tensor:
        """The log-probs ``[N]`` of the answers in ``batch``, mismatched ones included."""
        return _sums(model, batch.inputs, batch.labels, **self.head)


def _sums(model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor, **options: Any) -> Tensor:
    return sequence_logps(model_logprob(model, inputs, labels, **options).logps, labels[:, 1:])


def _rows(inputs: Mapping[str, Tensor], first: int, last: int | None) -> dict[str, Tensor]:
    return {name: x[first:last] for name, x in inputs.items()}


def _columns(batch: Batch) -> dict[str, Tensor]:
    """What the data says of each pair: its margin, its weight."""
    found: Mapping[str, Tensor | None] = {"margin": batch.margin, "pair_weight": batch.weight}
    return {name: value for name, value in found.items() if value is not None}


def _values(out: DPOLossOutput) -> dict[str, Tensor]:
    margins = out.chosen_rewards - out.rejected_rewards
    values = {
        "rewards/chosen": out.chosen_rewards,
        "rewards/rejected": out.rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).to(margins.dtype),
        "logps/chosen": out.chosen_logps,
        "logps/rejected": out.rejected_logps,
        "logps/accuracies": (out.chosen_logps > out.rejected_logps).to(margins.dtype),
    }
    return {name: value.detach() for name, value in values.items()}
