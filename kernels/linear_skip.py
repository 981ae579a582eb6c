"""linear_skip: both products of a filtered backward, of those tiles of e = exp(z - shift) alone that matter.

The forward (`linear_keep`) leaves the sum of e over each row and WIDTH columns, and with it the mass m of each tile in
each token's softmax for nothing. Whether a tile of ROWS tokens and WIDTH columns matters follows from these:

    threshold      `dpofast.grad_filter.thresholds` of each token: the 2-norm of its dropped entries is at most that of
                   their tiles' masses
    mark           a tile in which no token has more than its threshold, nor a label, does not matter
    skip_product   goes along a list of the tiles that do, one list for each row of tiles and one for each column:
                   d hidden = e weight, whose programs own tokens, and d weight = e^T hidden, whose own rows of it

How long a list is, is read on the device: nothing waits for it, and where everything matters the lists are whole.
A column of e is a row of the weight in an order of its own, `dpofast.grad_filter.ranked`, in which those that matter to
many tokens lie side by side. Nothing is added up by two programs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from dpofast.kernels.device import expm1
from dpofast.kernels.launch import on
from dpofast.kernels.linear_keep import WIDTH, Partials, TensorDescriptor, halves
from torch import Tensor

from dpofast.grad_filter import LEVELS
from dpofast.plan.tiled import SKIP_HIDDEN, SKIP_ROWS

ROWS = SKIP_ROWS  # tokens of a tile
BLOCK_K = 64  # of a list's tiles at a time; as in `linear_keep`, and not run on a GPU
BLOCK_H = SKIP_HIDDEN  # columns of a result
_STAGES = 5  # of which two bring a list's next number: three tiles of each operand are on their way
_LEVELS = tl.constexpr(LEVELS)
_THRESHOLD_ROWS, _TILES = 16, 64  # tokens and tiles at a time, as `seal` takes them; not tuned


class Marks(NamedTuple):
    """What `mark` finds."""

    dropped: Tensor  # [N] fp32, the sum of a token's p over the tiles that do not matter
    of_tokens: Tensor  # [tiles of tokens, 1 + tiles of the vocabulary] int32: how many matter, and which, in order
    of_vocab: Tensor  # [tiles of the vocabulary, 1 + tiles of tokens] int32: likewise


@triton.jit
def mass(sums, shifts, z_max, log_sum, rest, at, there):
    """Masses of tiles as shares of what the label leaves to the others, ``rest``; 0 where nothing is left."""
    shift = tl.load(shifts + at, there, other=0.0)
    p = tl.load(sums + at, there, other=0.0) * tl.exp((shift - z_max) - log_sum)
    return tl.where(rest == 0, 0.0, p / rest)


@triton.jit
def of_rows(logps, lse, row, there):
    """z_max, log_sum and 1 - p[label] of rows."""
    logp = tl.load(logps + row, there, other=-1.0)
    return tl.load(lse + 2 * row, there, other=0.0), tl.load(lse + 2 * row + 1, there, other=0.0), -expm1(logp)


@triton.jit(
    do_not_specialize=["n", "n_tiles"],
    do_not_specialize_on_alignment=["sums", "shifts", "logps", "lse", "thresholds"],
)  # fmt: skip
def threshold_kernel(
    sums, shifts, logps, lse, thresholds,  # [n_tiles, n] twice, [n], [n, 2], [n]
    n, n_tiles, budget, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    z_max, log_sum, rest = of_rows(logps, lse, row, row < n)
    level = tl.sqrt(budget) * tl.exp2(-0.5 * tl.arange(0, _LEVELS).to(tl.float32))
    total = tl.zeros((_LEVELS, ROWS), tl.float32)
    for first in range(0, n_tiles, TILES):
        tile = first + tl.arange(0, TILES)
        there = (tile < n_tiles)[:, None] & (row < n)[None, :]
        at = tile[:, None] * n.to(tl.int64) + row[None, :]
        m = mass(sums, shifts, z_max[None, :], log_sum[None, :], rest[None, :], at, there)
        small = m[None, :, :] <= level[:, None, None]
        total += tl.sum(tl.where(small, (m * m)[None, :, :], 0.0), 1)
    tl.store(thresholds + row, tl.max(tl.where(total <= budget, level[:, None], 0.0), 0), row < n)


@triton.jit(
    do_not_specialize=["n", "n_tiles"],
    do_not_specialize_on_alignment=["sums", "shifts", "logps", "lse", "labels", "thresholds", "matters", "dropped"],
)  # fmt: skip
def mark_kernel(
    sums, shifts, logps, lse, labels, thresholds,
    matters, dropped,  # [tiles of tokens, n_tiles] and [groups of TILES, n]
    n, n_tiles, ROWS: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    of_tokens, group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = of_tokens * ROWS + tl.arange(0, ROWS)
    tile = group * TILES + tl.arange(0, TILES)
    z_max, log_sum, rest = of_rows(logps, lse, row, row < n)
    threshold = tl.load(thresholds + row, row < n, other=0.0)
    of_label = tl.load(labels + row, row < n, other=-1) // WIDTH
    there = (tile < n_tiles)[:, None] & (row < n)[None, :]
    at = tile[:, None] * n + row[None, :]
    m = mass(sums, shifts, z_max[None, :], log_sum[None, :], rest[None, :], at, there)
    own = ~(m <= threshold[None, :]) | (tile[:, None] == of_label[None, :])  # a NaN, too
    matter = tl.max((own & there).to(tl.int32), 1)
    tl.store(matters + of_tokens * n_tiles + tile, matter, tile < n_tiles)
    left = tl.sum(tl.where((matter == 0)[:, None] & there, m * rest[None, :], 0.0), 0)
    tl.store(dropped + group * n + row, left, row < n)


def mark(partials: Partials, logps: Tensor, lse: Tensor, labels: Tensor, budget: float) -> Marks:
    """Finds the tiles that matter, from what `linear_keep` and `seal` left.

    Args:
        budget: what a token's dropped masses, squared and added up, may be as a share of ``(1 - p[label])^2``.
    """
    n_tiles, n = partials.sums.shape
    of_row, at = (logps, lse), (partials.sums, partials.shifts)
    matters = torch.empty(-(-n // ROWS), n_tiles, dtype=torch.int32, device=logps.device)
    thresholds, dropped = logps.new_empty(n), logps.new_empty(-(-n_tiles // _TILES), n)
    with on(logps.device):
        threshold_kernel[(-(-n // _THRESHOLD_ROWS),)](
            *at, *of_row, thresholds, n, n_tiles, budget, ROWS=_THRESHOLD_ROWS, TILES=_TILES, num_warps=4
        )
        mark_kernel[(len(matters), len(dropped))](
            *at, *of_row, labels, thresholds, matters, dropped, n, n_tiles, ROWS=ROWS, TILES=_TILES, WIDTH=WIDTH,
            num_warps=8,
        )  # fmt: skip
    return Marks(dropped.sum(0), _lists(matters), _lists(matters.T))


def _lists(matters: Tensor) -> Tensor:
    """Of each row of ``matters`` how many columns are 1, and behind that these columns, then the others."""
    places = matters.argsort(dim=1, descending=True, stable=True)
    return torch.cat((matters.sum(1, keepdim=True), places), 1).to(torch.int32)


@triton.jit(
    do_not_specialize=["M", "H", "ld", "length", "h_tiles"],
    do_not_specialize_on_alignment=["lists", "column", "row", "order", "out"],
)  # fmt: skip
def skip_product_kernel(
    e, right,  # descriptors of [N, V], and of [V, H] or, TRANSPOSED, [N, H]
    lists,  # [tiles of M, length]: a count, and numbers of tiles of WIDTH along the sum
    column, row,  # [M] or None, [H]: what sums begin with is their outer product, or the row
    order,  # [M] or None: row i of the sums is row order[i] of out
    out,  # [splits, M, H]
    M, H, ld, length, h_tiles,
    TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = WIDTH // BLOCK_K
    tile, split = tl.program_id(0) // h_tiles, tl.program_id(1)
    h0 = tl.program_id(0) % h_tiles * BLOCK_H
    first = tile * ROWS
    mine = lists + tile.to(tl.int64) * length
    steps = tl.load(mine) * PARTS
    begin, end = steps * split // tl.num_programs(1), steps * (split + 1) // tl.num_programs(1)
    i, j = first + tl.arange(0, ROWS), h0 + tl.arange(0, BLOCK_H)
    spread = tl.load(row + j, mask=j < tl.where(split == 0, H, 0), other=0.0)[None, :]
    if column is not None:
        spread = tl.load(column + i, mask=i < M, other=0.0)[:, None] * spread
    acc = tl.zeros((ROWS, BLOCK_H), tl.float32) + spread
    for step in range(begin, end):
        k = tl.load(mine + 1 + step // PARTS) * WIDTH + step % PARTS * BLOCK_K
        left = e.load([k, first]).T if TRANSPOSED else e.load([first, k])
        acc = tl.dot(left, right.load([k, h0]), acc, input_precision="ieee")
    to = i if order is None else tl.load(order + i, mask=i < M, other=0)
    at = out + (split.to(tl.int64) * M + to.to(tl.int64)) * ld
    # In parts, whose addresses fit into the registers beside what is still to be stored.
    left, right = halves(acc)
    _put(left, at, i < M, h0, H)
    _put(right, at, i < M, h0 + BLOCK_H // 2, H)


@triton.jit
def _put(x, at, mask, column, H):
    """Stores x at the addresses of its rows, from a column on."""
    if x.shape[1] > 64:
        left, right = halves(x)
        _put(left, at, mask, column, H)
        _put(right, at, mask, column + x.shape[1] // 2, H)
    else:
        j = column + tl.arange(0, x.shape[1])
        tl.store(at[:, None] + j[None, :], x.to(at.dtype.element_ty), mask=mask[:, None] & (j < H)[None, :])


def _product(
    e: Tensor, right: Tensor, lists: Tensor, begin: tuple[Tensor | None, Tensor], order: Tensor | None, out: Tensor,
    transposed: bool,
) -> None:  # fmt: skip
    """``out[order] = begin + (e^T or e) right`` over the listed tiles; out [splits, M, H]."""
    splits, m, n_hidden = out.shape
    h_tiles = -(-n_hidden // BLOCK_H)
    block = [BLOCK_K, ROWS] if transposed else [ROWS, BLOCK_K]
    with on(e.device):
        skip_product_kernel[(len(lists) * h_tiles, splits)](
            TensorDescriptor(e, list(e.shape), [e.stride(0), 1], block),
            TensorDescriptor(right, list(right.shape), [right.stride(0), 1], [BLOCK_K, BLOCK_H]),
            lists, *begin, order, out, m, n_hidden, out.stride(1), lists.shape[1], h_tiles,
            TRANSPOSED=transposed, ROWS=ROWS, WIDTH=WIDTH, BLOCK_K=BLOCK_K, BLOCK_H=BLOCK_H, num_warps=8,
            num_stages=_STAGES,
        )  # fmt: skip


def d_hidden(e: Tensor, weight: Tensor, lists: Tensor, spread: Tensor, row: Tensor, sums: Tensor) -> None:
    """``sums = e weight + spread row^T`` of the listed tiles of e.

    Args:
        e: [N, V], of a multiple of 8 elements from row to row.
        weight: [V, H], of e's dtype, its rows in the order of e's columns.
        lists: ``Marks.of_tokens``.
        spread, row: [N] and [H], fp32.
        sums: [splits, N, H] fp32: the sum over the first dimension is what was asked for.
    """
    _product(e, weight, lists, (spread, row), None, sums, False)


def d_weight(e: Tensor, scaled: Tensor, lists: Tensor, row: Tensor, order: Tensor, grad: Tensor) -> None:
    """``grad[order] = e^T scaled + row`` of the listed tiles of e.

    Args:
        scaled: [N, H], of e's dtype, contiguous.
        lists: ``Marks.of_vocab``.
        row: [H], fp32.
        order: [V], int64, which row of the weight each column of e is.
        grad: [V, H], contiguous, of any dtype.
    """
    _product(e, scaled, lists, (None, row), order, grad.unsqueeze(0), True)
