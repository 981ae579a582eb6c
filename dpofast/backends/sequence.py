"""The CUDA kernel `sequence_dpo`: log-probs of tokens to the loss of each pair and its gradient, in one launch.

The equivalent of `dpofast.sequence_logps`, `dpofast.preference_loss` and their backward pass, for one loss that a pair
decides alone. Names and options are those of `dpofast.losses.LOSSES`; nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpofast import losses
from dpofast.backends.base import PAIR_OPTIONS, PairsProblem
from dpofast.backends.cuda import CudaPasses


class SequenceDPO(NamedTuple):
    """The results of `sequence_dpo`.

    Attributes:
        losses: of each pair ``[B]``, times its weight.
        chosen_logps, rejected_logps: sums over each completion ``[B]``.
        coefficients: ``d losses.mean() / d logps``, of the shape of logps; exactly 0 where a token does not count.
        chosen_lengths, rejected_lengths: tokens that count ``[B]``, int64.
    """

    losses: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    coefficients: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor


def sequence_dpo(
    library: Any,
    logps: Tensor,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ignore_index: int = -100,
    loss_type: str = "sigmoid",
    **options: Any,
) -> SequenceDPO:
    """The losses of a batch ``[chosen; rejected]`` and their gradient by every token.

    Equivalent to::

        sums = sequence_logps(logps, labels, cu_seqlens=cu_seqlens)
        losses = preference_loss(*sums.chunk(2), *ref_logps.chunk(2), loss_type=loss_type, reduction="none", **options)
        coefficients = torch.autograd.grad(losses.mean(), logps)

    Args:
        library: dpofast._C, or another module that has its CUDA launchers.
        logps: per-token log-probabilities ``[2B, T]``, or packed ``[N]`` with cu_seqlens; fp32 or fp64.
        labels: token ids of the same shape, ``ignore_index`` where a token does not count; or
        mask: bool of the same shape, False where a token does not count.
        cu_seqlens: boundaries of packed sequences ``[2B + 1]``, integer, from 0 to N, not decreasing.
        ref_logps: the reference's sums ``[2B]``, for the losses that compare with it.
        loss_type: one of ``library.cuda_pair_losses``.
        options: of that loss, as in `dpofast.preference_loss`. cpo has no supervised term here: cpo_alpha is 0.

    Returns:
        `SequenceDPO`, in logps' dtype. Sums and losses are computed in fp64.

    Raises:
        ValueError: what `dpofast.preference_loss` raises for; a loss or a value that the kernel does not have; shapes
            or devices that do not match.
        TypeError: logps of another dtype; labels that are no integers.
    """
    term = _term(library, loss_type, options)
    losses.check_reference((term,), ref_logps is not None, "ref_logps")
    if logps.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"logps are of {logps.dtype}; expected torch.float32 or torch.float64")
    pairs = _check_tokens(logps, labels, mask, cu_seqlens)
    if ref_logps is not None and (ref_logps.shape != (2 * pairs,) or not ref_logps.is_floating_point()):
        raise ValueError(
            f"ref_logps is {list(ref_logps.shape)} of {ref_logps.dtype}; expected floating point [{2 * pairs}]"
        )
    losses.check_per_pair((term,), pairs)
    problem = pairs_problem(
        term, logps, labels=labels, mask=mask, cu_seqlens=cu_seqlens,
        ref_logps=ref_logps, weight=term.options.get("weight"), ignore_index=ignore_index,
    )  # fmt: skip
    for name, x in problem._asdict().items():
        if isinstance(x, Tensor) and x.device != logps.device:
            raise ValueError(f"{name} is on {x.device}; expected logps' device, {logps.device}")
    with torch.no_grad():
        result = CudaPasses(library).sequence_dpo(problem)
    return SequenceDPO(result.losses, *result.sums.chunk(2), result.coefficients, *result.lengths.chunk(2))


def pairs_problem(
    term: losses.Term,
    logps: Tensor,
    *,
    labels: Tensor | None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None,
    ref_logps: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
) -> PairsProblem:
    """One loss of a batch, with the options of ``term`` and the weight of each pair."""
    given = term.options
    beta, margin = (x if isinstance(x, Tensor) else None for x in (given.get("beta"), given.get("margin")))
    numbers = [given.get(name, 0.0) for name in PAIR_OPTIONS]
    options = [0.0 if isinstance(x, Tensor) else float(x) for x in numbers]
    divergence = given.get("f_divergence_type", losses.F_DIVERGENCES[0])
    return PairsProblem(
        logps, labels, mask, cu_seqlens, ref_logps, beta, margin, weight, ignore_index, term.loss.name, options,
        divergence,
    )  # fmt: skip


def _term(library: Any, loss_type: str, options: Mapping[str, Any]) -> losses.Term:
    """The one loss and its options, all of which the kernel has."""
    if not isinstance(loss_type, str):
        raise TypeError(f"loss_type={loss_type!r} is a {type(loss_type).__name__}; expected one name")
    (term,) = losses.resolve(loss_type, None, table=losses.LOSSES, **options)
    if loss_type not in library.cuda_pair_losses:
        raise ValueError(
            f"loss_type={loss_type!r} looks beyond its pair, and sequence_dpo does not; "
            f"it has {', '.join(library.cuda_pair_losses)}"
        )
    if term.options.get("cpo_alpha"):
        raise ValueError(
            f"cpo_alpha={term.options['cpo_alpha']!r} weighs a mean over the tokens of the batch, and sequence_dpo "
            "looks at one pair at a time; pass cpo_alpha=0.0"
        )
    return term


def _check_tokens(logps: Tensor, labels: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None) -> int:
    """Checks what keeps the kernel within its tensors; returns the number of pairs."""
    if (labels is None) == (mask is None):
        raise ValueError("labels and mask say which tokens count; pass one of them")
    name, marks = ("labels", labels) if mask is None else ("mask", mask)
    if marks.is_floating_point() or (marks.dtype == torch.bool) != (name == "mask"):
        expected = "torch.bool" if name == "mask" else "integer token ids"
        raise TypeError(f"{name} is of {marks.dtype}; expected {expected}")
    if marks.shape != logps.shape or logps.dim() != (2 if cu_seqlens is None else 1):
        expected = "[2B, T] for both" if cu_seqlens is None else "[N] for both, with cu_seqlens"
        raise ValueError(f"logps have shape {list(logps.shape)} and {name} {list(marks.shape)}; expected {expected}")
    if cu_seqlens is None:
        sequences = logps.shape[0]
    else:
        if cu_seqlens.is_floating_point() or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            raise ValueError(
                f"cu_seqlens is {list(cu_seqlens.shape)} of {cu_seqlens.dtype}; expected integers [2B + 1]"
            )
        # on a GPU the values can't be looked at without waiting for it
        ends = cu_seqlens.tolist() if cu_seqlens.device.type == "cpu" else [0, logps.shape[0]]
        if ends[0] != 0 or ends[-1] != logps.shape[0] or ends != sorted(ends):
            raise ValueError(f"cu_seqlens={ends}; expected boundaries from 0 to N={logps.shape[0]}, not decreasing")
        sequences = cu_seqlens.shape[0] - 1
    if sequences % 2:
        raise ValueError(f"logps hold {sequences} sequences; expected [chosen; rejected], an even number")
    return sequences // 2
