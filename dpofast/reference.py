"""The readable truth: what every backend must compute, in plain PyTorch with plain autograd.

Builds the full [N, V] logits, so it is for tests, for reading, and for nothing large. Evaluated in
fp64 it is the oracle that every backend is measured against.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "dropped_mass")
"""Names accepted in ``outputs``, beside ``logps``, which always comes."""


class LogprobOutput(NamedTuple):
    """What `linear_logprob` and `logprob` return. Every field has the shape of ``labels``.

    A field that was not asked for is ``None``. Ignored positions hold 0 (``False``). ``logps`` and
    ``entropy`` are differentiable.
    """

    logps: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    dropped_mass: Tensor | None = None


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

    want = {name: name in outputs for name in OUTPUTS}
    first = torch.arange(z.shape[-1], device=z.device)
    return LogprobOutput(
        logps=scatter(log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1)),
        # 0 * log 0 is 0, so that a logit of -inf adds nothing, to the gradient neither
        entropy=scatter(-(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1))
        if want["entropy"]
        else None,
        log_sum_sq_probs=scatter(torch.logsumexp(2 * log_p.detach(), -1)) if want["log_sum_sq_probs"] else None,
        mean_logits=scatter(z.detach().mean(-1)) if want["mean_logits"] else None,
        is_top1=scatter(torch.where(z == z.amax(-1, keepdim=True), first, z.shape[-1]).amin(-1) == y)
        if want["is_top1"]
        else None,
        dropped_mass=scatter(torch.zeros_like(z[:, 0])) if want["dropped_mass"] else None,
    )


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
