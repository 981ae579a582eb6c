"""What every backend needs to know of its tensors: accumulators, addresses, the optional statistics and their bits."""

from __future__ import annotations

import torch
from torch import Tensor

STATISTICS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
"""In the order of the bits of csrc/core/types.h, Output."""


def flags(names: tuple[str, ...]) -> int:
    """The bit mask of the statistics among ``names``."""
    return sum(1 << i for i, name in enumerate(STATISTICS) if name in names)


def wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The accumulator's type: fp64 if any input is, else fp32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def pointer(x: Tensor | None) -> int | None:
    """The address of a tensor's data, None of None."""
    return None if x is None else x.data_ptr()


def element_offsets(x: Tensor, rows: Tensor) -> Tensor:
    """Where each row of ``x`` [*, H] starts, in elements, whatever its strides: no copy to flatten it."""
    if x.is_contiguous():
        return rows * x.shape[-1]
    offsets = torch.zeros_like(rows)
    rest = rows
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1])):
        offsets += (rest % size) * stride
        rest = rest // size
    return offsets


def empty_results(n: int, names: tuple[str, ...], like: Tensor) -> dict[str, Tensor]:
    """Room for what a forward of n rows returns, in ``like``'s dtype and on its device.

    ``lse`` is in two parts, the largest z and log sum exp(z - it).
    """
    out = {"logps": like.new_empty(n), "lse": like.new_empty(n, 2)}
    return out | {name: like.new_empty(n, dtype=torch.bool if name == "is_top1" else like.dtype) for name in names}
