"""The loss of a batch of preferences, and what is known of each of its records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpofast.functional import DPOLossOutput, objective_of
from dpofast.integrations.models import model_dpo_loss, model_logprob
from dpofast.sequences import sequence_logps
from dpofast.train.config import Config


class Scored(NamedTuple):
    """A batch's loss, and numbers of each of its records ``[B]``, by name."""

    loss: Tensor
    values: dict[str, Tensor]


class PairObjective:
    """A loss of pairs, as the options of a training say."""

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
        self.needs_reference = any(term.loss.reference for term in objective_of(self.options).terms)

    def score(self, model: nn.Module, batch: Any, ref_logps: Tensor | None, reduction: str = "mean") -> Scored:
        """The loss of ``batch``, ``[B]`` for reduction="none"."""
        options = self.options | _columns(batch)
        out = model_dpo_loss(
            model, batch.inputs, batch.labels, ref_logps=ref_logps, reduction=reduction, **self.head, **options
        )
        return Scored(out.loss, _values(out))

    @torch.no_grad()
    def logps(self, model: nn.Module, batch: Any) -> Tensor:
        """The log-probs ``[N]`` of the answers in ``batch``."""
        logps = model_logprob(model, batch.inputs, batch.labels, **self.head).logps
        return sequence_logps(logps, batch.labels[:, 1:])


def _columns(batch: Any) -> dict[str, Tensor]:
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
