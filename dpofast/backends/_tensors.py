"""Helpers that every backend uses for its tensors: accumulators' dtypes, addresses, room for results."""

from __future__ import annotations

import torch
from torch import Tensor

from dpofast.contract import output_dtype


def wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The accumulator's type: fp64 if any input is, else fp32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def pointer(x: Tensor | None) -> int | None:
    """The address of a tensor's data, None of None."""
    return None if x is None else x.data_ptr()


def element_offsets(x: Tensor, rows: Tensor) -> Tensor:
    """Tells where each row of ``x`` [*, H] starts, in elements, whatever its strides: no copy flattens it."""
    if x.is_contiguous():
        return rows * x.shape[-1]
    offsets = torch.zeros_like(rows)
    rest = rows
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1])):
        offsets += (rest % size) * stride
        rest = rest // size
    return offsets


def empty_results(n: int, names: tuple[str, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Makes room for the results of n tokens; ``lse`` is two numbers, the largest z and log sum exp(z - it)."""
    out = {"logps": torch.empty(n, dtype=dtype, device=device), "lse": torch.empty(n, 2, dtype=dtype, device=device)}
    for name in names:
        out[name] = torch.empty(n, dtype=output_dtype(name, dtype), device=device)
    return out


def places(shape: torch.Size, positions: Tensor) -> tuple[Tensor, ...]:
    """Indices along each of the dimensions of ``shape``, of which there may be none, of positions in row-major order.

    `torch.unravel_index` does the same, but copies the shape to the device and waits for that.
    """
    indices, rest = [], positions
    for size in reversed(shape[1:]):
        indices.append(rest % size)
        rest = rest // size
    return (rest, *reversed(indices))


def take(x: Tensor, positions: Tensor) -> Tensor:
    """Vectors of ``x`` [*, H] by number, whatever its strides."""
    if x.is_contiguous():
        return x.view(-1, x.shape[-1])[positions]
    return x[places(x.shape[:-1], positions)]
