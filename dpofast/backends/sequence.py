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
from dpofast.backends._tensors import pointer
from dpofast.backends.cuda import launch
from dpofast.contract import DTYPE_CODES

_NUMBERS = (
    "label_smoothing", "discopop_tau", "simpo_gamma", "alphapo_alpha", "dpop_lambda", "f_alpha_divergence_coef",
)  # fmt: skip


class SequenceDPO(NamedTuple):
    """What `sequence_dpo` returns.

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
    logps = logps.detach().contiguous()
    per_pair = {name: _per_pair(term, name, pairs, logps) for name in ("beta", "margin", "weight")}
    inputs = {
        "logps": logps,
        "labels": None if labels is None else labels.long().contiguous(),
        "mask": None if mask is None else mask.contiguous(),
        "cu_seqlens": None if cu_seqlens is None else cu_seqlens.long().contiguous(),
        "ref_logps": None if ref_logps is None else ref_logps.detach().to(logps.dtype).contiguous(),
        **per_pair,
    }
    for name, x in inputs.items():
        if x is not None and x.device != logps.device:
            raise ValueError(f"{name} is on {x.device}; expected logps' device, {logps.device}")
    results = {
        "losses": logps.new_empty(pairs),
        "sums": logps.new_empty(2 * pairs),
        "lengths": torch.empty(2 * pairs, dtype=torch.int64, device=logps.device),
        "coefficients": torch.empty_like(logps),
    }
    args = {name: pointer(x) for name, x in {**inputs, **results}.items()}
    args |= {name: term.options.get(name, 0.0) for name in _NUMBERS}
    args |= {f"{name}_value": _number(term, name) for name in ("beta", "margin")}
    divergence = term.options.get("f_divergence_type", losses.F_DIVERGENCES[0])
    args |= {
        "dtype": DTYPE_CODES[logps.dtype], "ignore_index": ignore_index, "pairs": pairs,
        "width": 0 if cu_seqlens is not None else logps.shape[1], "loss": library.cuda_pair_losses.index(loss_type),
        "f_divergence": losses.F_DIVERGENCES.index(divergence),
    }  # fmt: skip
    launch(library, "sequence_dpo", logps.device, args)
    sums, lengths = results["sums"].chunk(2), results["lengths"].chunk(2)
    return SequenceDPO(results["losses"], *sums, results["coefficients"], *lengths)


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
    """What keeps the kernel within its tensors; the number of pairs."""
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


def _per_pair(term: losses.Term, name: str, pairs: int, logps: Tensor) -> Tensor | None:
    """An option as ``[pairs]`` of logps' dtype where it is a tensor."""
    value = term.options.get(name)
    return value.detach().to(logps.dtype).expand(pairs).contiguous() if isinstance(value, Tensor) else None


def _number(term: losses.Term, name: str) -> float:
    """An option where it is a number; 0 where it is a tensor, or the loss has none."""
    value = term.options.get(name, 0.0)
    return 0.0 if isinstance(value, Tensor) else value
