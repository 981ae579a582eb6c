"""logprob_fold: folds one tile of logits [n, width] into the running statistics of its n rows; also whole rows of
logits, wherever they start. One read of the tile.

A row is cut into parts, one program each, when there are too few rows to fill the GPU. Then each program writes a
partial, and logprob_merge adds them up in their order, so that the bits do not depend on timing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from dpofast.kernels.device import (
    STATS,
    empty_piece,
    fold_tile,
    load_piece,
    local_label,
    merged,
    store_piece,
    transformed,
)
from dpofast.kernels.launch import factors, on, splits
from torch import Tensor

BLOCK = 1024  # columns at a time
PART = 4 * BLOCK  # columns of a row that one program reads at least, where rows are split
MERGE_ROWS = 128


@triton.jit(do_not_specialize=["n", "width", "v0", "parts", "part"])
def logprob_fold_kernel(
    x,  # row i starts at offsets[i], or i * ld where offsets is None
    offsets, ld, bias,  # bias [width] or None
    labels, stats,  # [n], [STATS, n]
    partials,  # [parts, STATS, n], or None where parts is 1
    n, width, v0, parts, part, scale: tl.float64, before: tl.float64, after: tl.float64,
    SOFTCAP: tl.constexpr, EXTRA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    A: tl.constexpr = stats.dtype.element_ty
    job = tl.program_id(0).to(tl.int64)
    row, split = job // parts, job % parts
    if offsets is not None:
        start = tl.load(offsets + row)
    else:
        start = row * ld
    rows = row + tl.zeros((1,), tl.int64)
    label = tl.load(labels + rows) - v0
    n = n.to(tl.int64)
    piece = empty_piece(1, A)
    begin = split * part
    stop = tl.minimum(begin + part, width)
    for first in range(begin, stop, BLOCK):
        v = first + tl.arange(0, BLOCK)
        logits = tl.load(x + start + v, mask=v < stop, other=0.0).to(A)
        if bias is not None:
            logits += tl.load(bias + v, mask=v < stop, other=0.0)
        z = transformed(logits[None, :], scale, before, after, SOFTCAP)
        piece = fold_tile(piece, z, stop - first, local_label(label, first, BLOCK), EXTRA)
    every = rows >= 0
    if partials is None:
        piece = merged(load_piece(stats, n, rows, every), piece, EXTRA)
        store_piece(stats, n, rows, every, piece)
    else:
        store_piece(partials + split * STATS * n, n, rows, every, piece)


@triton.jit(do_not_specialize=["n", "parts"])
def logprob_merge_kernel(stats, partials, n, parts, EXTRA: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < n
    n = n.to(tl.int64)
    piece = load_piece(stats, n, row, mask)
    for split in range(parts):
        piece = merged(piece, load_piece(partials + split * STATS * n, n, row, mask), EXTRA)
    store_piece(stats, n, row, mask, piece)


def merge(stats: Tensor, partials: Tensor, extra: bool) -> None:
    """Adds partials [parts, Stat.COUNT, n] to stats [Stat.COUNT, n], in order."""
    n = stats.shape[1]
    with on(stats.device):
        logprob_merge_kernel[(triton.cdiv(n, MERGE_ROWS),)](
            stats, partials, n, partials.shape[0], EXTRA=extra, ROWS=MERGE_ROWS, num_warps=4
        )


def logprob_fold(
    x: Tensor, offsets: Tensor | None, bias: Tensor | None, labels: Tensor, v0: int,
    transform: tuple[float, float, float], stats: Tensor, extra: bool, programs: int,
) -> None:  # fmt: skip
    """Folds logits of columns v0, v0 + 1, .. into ``stats`` [Stat.COUNT, n].

    Equivalent: ``dpofast.backends.torch.TorchPasses.fold`` without ``keep``.

    Args:
        x: [n, width] with unit stride along width; with ``offsets``, the element where each row of its storage starts.
        bias: [width], in the dtype of ``stats``.
        extra: the optional statistics are wanted, too.
        programs: how many keep the device busy.
    """
    n, width = stats.shape[1], x.shape[-1]
    parts, part = splits(n, width, PART, programs)
    partials = stats.new_empty(parts, *stats.shape) if parts > 1 else None
    with on(x.device):
        logprob_fold_kernel[(n * parts,)](
            x, offsets, x.stride(0) if offsets is None else 0, bias, labels, stats, partials, n, width, v0, parts, part,
            **factors(transform), EXTRA=extra, BLOCK=min(BLOCK, max(16, triton.next_power_of_2(width))), num_warps=4,
        )  # fmt: skip
    if partials is not None:
        merge(stats, partials, extra)
