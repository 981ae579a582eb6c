"""The keywords that a loss passes on, by name and type, for editors and type checkers.

What they mean is in the docstrings of `linear_logprob` and `preference_loss`; which values are good, in
`dpofast.losses.OPTIONS`. A test holds these lists to those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from torch import Tensor


class PairOptions(TypedDict, total=False):
    """What `preference_loss` takes beside its named arguments, for one pair or for all."""

    margin: float | Tensor | Mapping[str, Any]
    f_divergence_type: str | Mapping[str, Any]
    f_alpha_divergence_coef: float | Mapping[str, Any]
    discopop_tau: float | Mapping[str, Any]
    simpo_gamma: float | Mapping[str, Any]
    alphapo_alpha: float | Mapping[str, Any]
    cpo_alpha: float | Mapping[str, Any]
    dpop_lambda: float | Mapping[str, Any]


class LossOptions(PairOptions, total=False):
    """What a loss of sequences takes beside its named arguments."""

    loss_weights: list[float] | None
    pair_weight: Tensor | None
    token_weights: Tensor | None
    use_weighting: bool
    ld_alpha: float | None
    metrics: bool


class LogitsLossOptions(LossOptions, total=False):
    """What `dpo_loss` passes on to `logprob`, too."""

    temperature: float
    logit_scale: float
    softcap: float | None
    grad_filter: None
    inplace_grad: bool


class HeadOptions(TypedDict, total=False):
    """What a ``linear_`` loss passes on to `linear_logprob`."""

    temperature: float
    logit_scale: float
    softcap: float | None
    grad_filter: float | str | None


class LinearLossOptions(LossOptions, HeadOptions, total=False):
    """What `linear_dpo_loss` takes beside its named arguments."""


class LinearListOptions(HeadOptions, total=False):
    """What `linear_list_loss` takes beside its named arguments."""

    margin: float | Tensor | Mapping[str, Any]
    loss_weights: list[float] | None
    list_weight: Tensor | None
    token_weights: Tensor | None
    metrics: bool


class LinearUnpairedOptions(HeadOptions, total=False):
    """What `linear_unpaired_loss` takes beside its named arguments."""

    desirable_weight: float
    undesirable_weight: float
    sequence_weight: Tensor | None
    token_weights: Tensor | None
    metrics: bool
