"""linear_logprob_forward: the product hidden weight^T, its bias and transform, and the online softmax of every row in
one kernel. A tile of logits lives in registers and is never written.

A program owns a tile of tokens and a split of the vocabulary, which streams past in blocks; for each block the hidden
dimension is gone through in steps. Programs that run at the same time go through the same split of the vocabulary, so
that they share its rows of the weight in the L2 cache. Each writes a partial, and logprob_merge adds them up in order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from dpofast.kernels.device import (
    STATS,
    empty_piece,
    fold_tile,
    local_label,
    logits_tile,
    store_piece,
    token_rows,
    transformed,
)
from dpofast.kernels.launch import Tile, aligned, choose_tile, dot_dtype, factors, is_plain, on, split_rows
from dpofast.kernels.logprob_fold import merge
from torch import Tensor

from dpofast.backends._tensors import element_offsets
from dpofast.backends.base import Problem


@triton.jit(
    do_not_specialize=["n", "splits", "split_width"],
    do_not_specialize_on_alignment=["offsets", "bias", "labels", "partials"],
)  # fmt: skip
def linear_logprob_forward_kernel(
    hidden, offsets, h_stride,  # token i starts at element offsets[i]
    weight, w_ld, w_stride, bias,  # [V, H]; bias [V] or None
    labels, partials,  # [n]; [splits, STATS, n]
    n, V, H, splits, split_width, scale: tl.float64, inner: tl.float64, cap: tl.float64,
    SOFTCAP: tl.constexpr, EXTRA: tl.constexpr, DOT: tl.constexpr, EVEN_H: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(n, BLOCK_N)
    job = tl.program_id(0).to(tl.int64)
    split = (job // tiles).to(tl.int32)
    row = (job % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = row < n
    # Rows and columns beyond the last repeat the last: no load is masked, and what they give is not used.
    h_row = token_rows(offsets, row, n, ALIGNED)
    label = tl.load(labels + row, mask, other=-1)
    piece = empty_piece(BLOCK_N, tl.float32)
    begin = split * split_width
    stop = tl.minimum(begin + split_width, V)
    for v0 in range(begin, stop, BLOCK_V):
        v = tl.minimum(v0 + tl.arange(0, BLOCK_V), V - 1)
        w_row = v.to(tl.int64) * w_ld
        logits = logits_tile(hidden, h_row, h_stride, weight, w_row, w_stride, bias, v, H, DOT, BLOCK_H, EVEN_H)
        z = transformed(logits, scale, inner, cap, SOFTCAP)
        piece = fold_tile(piece, z, stop - v0, local_label(label, v0, BLOCK_V), EXTRA)
    n = n.to(tl.int64)
    store_piece(partials + split * STATS * n, n, row, mask, piece)


def linear_logprob_forward(problem: Problem, stats: Tensor, extra: bool, programs: int) -> None:
    """Folds the logits of every token into ``stats`` [Stat.COUNT, n], fp32.

    Equivalent: ``TorchPasses.fold(hidden @ weight.T, ...)`` over the whole vocabulary.

    Args:
        problem: hidden and weight are fp32, bf16 or fp16; two dtypes are promoted as by `torch.promote_types`.
        extra: the optional statistics are wanted, too.
        programs: how many keep the device busy.
    """
    hidden, weight, _, positions, labels, transform = problem[:6]
    offsets, bias = element_offsets(hidden, positions), problem.wide_bias()
    n, (n_vocab, n_hidden) = labels.numel(), weight.shape
    dtype, DOT = dot_dtype(hidden, weight)

    def launch(tile: Tile) -> Tensor:
        tiles = triton.cdiv(n, tile.n)
        splits, split_width = split_rows(tiles, n_vocab, tile.v, programs)
        partials = stats.new_empty(splits, *stats.shape)
        linear_logprob_forward_kernel[(tiles * splits,)](
            hidden, offsets, hidden.stride(-1), weight, weight.stride(0), weight.stride(1), bias, labels, partials,
            n, n_vocab, n_hidden, splits, split_width, **factors(transform), EXTRA=extra, DOT=DOT,
            EVEN_H=n_hidden % tile.h == 0, ALIGNED=aligned(hidden), BLOCK_N=tile.n, BLOCK_V=tile.v, BLOCK_H=tile.h,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return partials

    plain = is_plain(problem) and not extra
    with on(hidden.device):
        partials = launch(choose_tile("forward", hidden.device, dtype, plain, (n, n_vocab, n_hidden), launch))
    merge(stats, partials, extra)
