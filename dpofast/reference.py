"""The readable truth: what every backend must compute, in plain PyTorch with plain autograd.

Builds the full [N, V] logits, so it is for tests, for reading, and for nothing large. Evaluated in
fp64 it is the oracle that every backend is measured against.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class LogprobOutput(NamedTuple):
    """What `linear_logprob` and `logprob` return. Every field has the shape of ``labels``.

    A field that was not asked for is ``None``. Ignored positions hold 0 (``False``). ``logps`` and
    ``entropy`` are differentiable.

    Attributes:
        logps: log-probabilities of the labels, which always come; the others are names for ``outputs``.
        entropy: of the softmax, in nats.
        log_sum_sq_probs: ``log sum_v p_v^2``.
        mean_logits: the mean of z over the vocabulary.
        is_top1: whether the label is the first maximum.
        dropped_mass: 0, as gradients are exact.
    """

    logps: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    dropped_mass: Tensor | None = None


def _entropy(log_p: Tensor, z: Tensor, y: Tensor) -> Tensor:
    # 0 * log 0 is 0, so that a logit of -inf adds nothing, to the gradient neither
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)


def _is_top1(log_p: Tensor, z: Tensor, y: Tensor) -> Tensor:
    columns = torch.arange(z.shape[-1], device=z.device)
    return torch.where(z == z.amax(-1, keepdim=True), columns, z.shape[-1]).amin(-1) == y


STATISTICS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "entropy": _entropy,
    "log_sum_sq_probs": lambda log_p, z, y: torch.logsumexp(2 * log_p.detach(), -1),
    "mean_logits": lambda log_p, z, y: z.detach().mean(-1),
    "is_top1": _is_top1,
}
"""Each optional statistic from log p ``[N, V]``, z ``[N, V]`` and the labels ``[N]``. Backends have the same, by these
names and in this order: that of the bits of ``enum Output`` in csrc/core."""
BOOLEAN = frozenset(("is_top1",))
"""The statistics that are true or false."""
OUTPUTS = (*STATISTICS, "dropped_mass")
"""Names accepted in ``outputs``, beside ``logps``, which always comes."""


def transform(logits: Tensor, temperature: float, logit_scale: float, softcap: float | None) -> Tensor:
    """``softcap * tanh(logit_scale * logits / softcap) / temperature``, each part optional."""
    z = logits * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def logprob(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int | None = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    outputs: tuple[str, ...] = (),
) -> LogprobOutput:
    """Per-token log-probabilities and statistics from logits ``[*, V]``, in the logits' dtype (at least fp32)."""
    valid = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    dtype = torch.promote_types(logits.dtype, torch.float32)
    z = transform(logits[valid].to(dtype), temperature, logit_scale, softcap)
    y = labels[valid]
    log_p = torch.log_softmax(z, dim=-1)

    def scatter(values: Tensor) -> Tensor:
        return torch.zeros(labels.shape, dtype=values.dtype, device=values.device).masked_scatter(valid, values)

    values = {name: statistic(log_p, z, y) for name, statistic in STATISTICS.items() if name in outputs}
    if "dropped_mass" in outputs:
        values["dropped_mass"] = torch.zeros_like(z[:, 0])
    logps = log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    return LogprobOutput(scatter(logps), **{name: scatter(x) for name, x in values.items()})


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int | None = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    outputs: tuple[str, ...] = (),
) -> LogprobOutput:
    """`logprob` of ``hidden @ weight.T + bias``: hidden ``[*, H]``, weight ``[V, H]``, labels ``[*]``."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    logits = torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return logprob(
        logits,
        labels,
        ignore_index=ignore_index,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        outputs=outputs,
    )
