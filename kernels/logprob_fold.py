"""logprob_fold: folds one tile of logits [n, width] into the running statistics of its n rows; also whole rows of
logits, wherever they start. One read of the tile.

A row is cut into splits, one program each, when there are too few rows to fill the GPU. Then each program writes a
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
from dpofast.kernels.launch import factors, on, split_rows
from torch import Tensor

from dpofast.backends.tiled import Tile

BLOCK = 1024  # columns at a time: 8 of each thread, of four warps; neither number was tuned
SPLIT = 4 * BLOCK  # columns of a row that one program reads at least, where rows are split, so that partials are few
MERGE_ROWS = 128  # one of each thread of four warps


@triton.jit(do_not_specialize=["n", "width", "v0", "splits", "split_width"])
def logprob_fold_kernel(
    x,  # row i starts at offsets[i], or i * ld where offsets is None
    offsets, ld, bias,  # bias [width] or None
    labels, stats,  # [n], [STATS, n]
    partials,  # [splits, STATS, n], or None where splits is 1
    n, width, v0, splits, split_width, scale: tl.float64, inner: tl.float64, cap: tl.float64,
    SOFTCAP: tl.constexpr, EXTRA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    A: tl.constexpr = stats.dtype.element_ty
    job = tl.program_id(0).to(tl.int64)
    row, split = job // splits, job % splits
    if offsets is not None:
        start = tl.load(offsets + row)
    else:
        start = row * ld
    rows = row + tl.zeros((1,), tl.int64)
    label = tl.load(labels + rows) - v0
    n = n.to(tl.int64)
    piece = empty_piece(1, A)
    begin = split * split_width
    stop = tl.minimum(begin + split_width, width)
    for first in range(begin, stop, BLOCK):
        v = first + tl.arange(0, BLOCK)
        logits = tl.load(x + start + v, mask=v < stop, other=0.0).to(A)
        if bias is not None:
            logits += tl.load(bias + v, mask=v < stop, other=0.0)
        z = transformed(logits[None, :], scale, inner, cap, SOFTCAP)
        piece = fold_tile(piece, z, stop - first, local_label(label, first, BLOCK), EXTRA)
    every = rows >= 0
    if partials is None:
        piece = merged(load_piece(stats, n, rows, every), piece, EXTRA)
        store_piece(stats, n, rows, every, piece)
    else:
        store_piece(partials + split * STATS * n, n, rows, every, piece)


@triton.jit(do_not_specialize=["n", "splits"])
def logprob_merge_kernel(stats, partials, n, splits, EXTRA: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < n
    n = n.to(tl.int64)
    piece = load_piece(stats, n, row, mask)
    for split in range(splits):
        piece = merged(piece, load_piece(partials + split * STATS * n, n, row, mask), EXTRA)
    store_piece(stats, n, row, mask, piece)


def merge(stats: Tensor, partials: Tensor, extra: bool) -> None:
    """Adds partials [splits, Stat.COUNT, n] to stats [Stat.COUNT, n], in order."""
    n = stats.shape[1]
    with on(stats.device):
        logprob_merge_kernel[(triton.cdiv(n, MERGE_ROWS),)](
            stats, partials, n, partials.shape[0], EXTRA=extra, ROWS=MERGE_ROWS, num_warps=4
        )


def logprob_fold(tile: Tile, stats: Tensor, extra: bool, programs: int) -> None:
    """Folds the logits of ``tile`` into ``stats`` [Stat.COUNT, n].

    Equivalent: ``dpofast.backends.torch.TorchPasses.fold`` without ``exps``.

    Args:
        tile: its x [n, width] has unit stride along width, or ``offsets``; its bias has the dtype of ``stats``.
        extra: the optional statistics are wanted, too.
        programs: how many keep the device busy.
    """
    x, bias, labels, v0, transform, offsets = tile
    n, width = stats.shape[1], x.shape[-1]
    splits, split_width = split_rows(n, width, SPLIT, programs)
    partials = stats.new_empty(splits, *stats.shape) if splits > 1 else None
    with on(x.device):
        logprob_fold_kernel[(n * splits,)](
            x, offsets, x.stride(0) if offsets is None else 0, bias, labels, stats, partials, n, width, v0, splits,
            split_width, **factors(transform), EXTRA=extra,
            BLOCK=min(BLOCK, max(16, triton.next_power_of_2(width))), num_warps=4,
        )  # fmt: skip
    if partials is not None:
        merge(stats, partials, extra)
