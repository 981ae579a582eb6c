"""linear_logprob_backward: the gradients of linear_logprob with the logits computed again, one block of the vocabulary
at a time. Three kernels for each block:

    linear_logprob_grad      logits (hidden weight^T) to g, in one kernel; g is written, in 16 bits, the logits are not
    linear_logprob_d_hidden  d hidden += g weight: a program owns a tile of d hidden and goes through the vocabulary
    linear_logprob_d_weight  d weight = g^T hidden: a program owns a tile of d weight and goes through the tokens

That is three products, the least there are when nothing is cached. Without g in memory each gradient would need the
logits for itself, four products; and since a tile of d hidden as wide as H fits in no program, each of its column
tiles would need them again. Nothing is added up by two programs: no atomics, no locks, the same bits every time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from dpofast.kernels.device import grad_tile, load_row, logits_tile, token_rows, transformed
from dpofast.kernels.launch import Tile, aligned, choose_tile, dot_dtype, grad_factors, is_plain, on
from torch import Tensor

from dpofast.backends._tensors import element_offsets
from dpofast.backends.base import InputGrads, OutputGrads, Problem, Saved, Transform


@triton.jit(
    do_not_specialize=["n", "v0", "width"],
    do_not_specialize_on_alignment=[
        "offsets", "bias", "labels", "logps", "lse", "grad_logps", "entropy", "grad_entropy", "d_bias",
    ],
)  # fmt: skip
def linear_logprob_grad_kernel(
    hidden, offsets, h_stride, weight, w_ld, w_stride, bias,  # as in linear_logprob_forward_kernel
    labels, logps, lse, grad_logps, entropy, grad_entropy,  # as in logprob_grad_kernel
    g, g_ld,  # [n, whole tiles of width], 0 beyond width
    d_bias,  # [tiles of tokens, width], sums over the tokens of each, or None
    n, v0, width, H, scale: tl.float64, inner: tl.float64, cap: tl.float64, inv_cap: tl.float64,
    SOFTCAP: tl.constexpr, DOT: tl.constexpr, EVEN_H: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(n, BLOCK_N)
    job = tl.program_id(0).to(tl.int64)
    n_tile, v_tile = job % tiles, (job // tiles).to(tl.int32)  # programs at work together share rows of the weight
    row = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    column = v_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    here = (row < n)[:, None] & (column < width)[None, :]
    h_row = token_rows(offsets, row, n, ALIGNED)
    v = v0 + tl.minimum(column, width - 1)
    w_row = v.to(tl.int64) * w_ld
    logits = logits_tile(hidden, h_row, h_stride, weight, w_row, w_stride, bias, v, H, DOT, BLOCK_H, EVEN_H)
    z = transformed(logits, scale, inner, cap, SOFTCAP)
    of_row = load_row(logps, lse, grad_logps, entropy, grad_entropy, row, row < n)
    label = tl.load(labels + row, row < n, other=-1)
    is_label = v[None, :] == label[:, None]
    x = grad_tile(z, is_label, of_row, scale, inv_cap, SOFTCAP, grad_entropy is not None)
    x = tl.where((column < width)[None, :], x, 0.0)
    tl.store(g + row[:, None] * g_ld + column[None, :], x, mask=(row < n)[:, None])
    if d_bias is not None:
        tl.store(d_bias + n_tile * width + column, tl.sum(tl.where(here, x, 0.0), 0), mask=column < width)


@triton.jit(do_not_specialize=["n", "v0", "width"])
def linear_logprob_d_hidden_kernel(
    g, g_ld, weight, w_ld, w_stride, sums,  # sums [n, H] fp32, d hidden so far
    n, v0, width, H,
    FIRST: tl.constexpr, DOT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(n, BLOCK_N)
    job = tl.program_id(0).to(tl.int64)
    row = job % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    c = (job // tiles).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
    g_row = tl.minimum(row, n - 1) * g_ld
    acc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for k0 in range(0, width, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        left = tl.load(g + g_row[:, None] + k[None, :])
        w_at = weight + ((v0 + k).to(tl.int64)[:, None] * w_ld + c.to(tl.int64)[None, :] * w_stride)
        right = tl.load(w_at, mask=(k < width)[:, None] & (c < H)[None, :], other=0.0)
        acc = tl.dot(left, right.to(DOT), acc, input_precision="ieee")
    at = sums + row[:, None] * H + c[None, :]
    here = (row < n)[:, None] & (c < H)[None, :]
    if not FIRST:
        acc += tl.load(at, mask=here, other=0.0)
    tl.store(at, acc, mask=here)


@triton.jit(do_not_specialize=["n", "width"], do_not_specialize_on_alignment=["offsets"])
def linear_logprob_d_weight_kernel(
    g, g_ld, hidden, offsets, h_stride, out, out_ld,  # out [width, H]
    n, width, H,
    FIRST: tl.constexpr, DOT: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    v_tiles = tl.cdiv(width, BLOCK_V)
    job = tl.program_id(0).to(tl.int64)
    v_tile = (job % v_tiles).to(tl.int32)
    column = v_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    c = (job // v_tiles).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_V, BLOCK_C), tl.float32)
    for k0 in range(0, n, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        h_row = token_rows(offsets, k, n, ALIGNED)
        left = tl.load(g + (k.to(tl.int64)[None, :] * g_ld + column[:, None]), mask=(k < n)[None, :], other=0.0)
        h_at = hidden + (h_row[:, None] + c.to(tl.int64)[None, :] * h_stride)
        right = tl.load(h_at, mask=(k < n)[:, None] & (c < H)[None, :], other=0.0)
        acc = tl.dot(left, right.to(DOT), acc, input_precision="ieee")
    here = (column < width)[:, None] & (c < H)[None, :]
    at = out + (column.to(tl.int64)[:, None] * out_ld + c[None, :])
    if not FIRST:
        acc += tl.load(at, mask=here, other=0.0)
    tl.store(at, acc, mask=here)


class _Call(NamedTuple):
    """One backward: its operands, and its launches as methods."""

    hidden: Tensor
    offsets: Tensor  # [n], the element where each token starts
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    transform: Transform
    saved: Saved
    incoming: OutputGrads

    def shared(self, tile: Tile) -> dict:
        return {"DOT": dot_dtype(self.hidden, self.weight)[1], "num_warps": tile.warps, "num_stages": tile.stages}

    def grad(self, tile: Tile, chunk: slice, v0: int, g: Tensor, to_bias: bool) -> Tensor | None:
        """Fills g [n, width]; d bias of these tokens, None if not wanted."""
        (n, width), n_hidden = g.shape, self.weight.shape[1]
        tiles, v_tiles = triton.cdiv(n, tile.n), triton.cdiv(width, tile.v)
        at = self.saved.chunk(chunk)
        grad_logps, grad_entropy = self.incoming.chunk(chunk)
        entropy = None if grad_entropy is None else at.entropy
        d_bias = at.logps.new_empty(tiles, width) if to_bias else None
        linear_logprob_grad_kernel[(tiles * v_tiles,)](
            self.hidden, self.offsets[chunk], self.hidden.stride(-1), self.weight, *self.weight.stride(), self.bias,
            self.labels[chunk], at.logps, at.lse, grad_logps, entropy, grad_entropy, g, g.stride(0), d_bias,
            n, v0, width, n_hidden, **grad_factors(self.transform), **self.shared(tile), BLOCK_N=tile.n, BLOCK_V=tile.v,
            EVEN_H=n_hidden % tile.h == 0, ALIGNED=aligned(self.hidden), BLOCK_H=tile.h,
        )  # fmt: skip
        return None if d_bias is None else d_bias.sum(0)

    def d_hidden(self, tile: Tile, v0: int, g: Tensor, sums: Tensor, first: bool) -> None:
        (n, width), n_hidden = g.shape, self.weight.shape[1]
        linear_logprob_d_hidden_kernel[(triton.cdiv(n, tile.n) * triton.cdiv(n_hidden, tile.c),)](
            g, g.stride(0), self.weight, *self.weight.stride(), sums, n, v0, width, n_hidden, **self.shared(tile),
            FIRST=first, BLOCK_N=tile.n, BLOCK_C=tile.c, BLOCK_K=tile.k,
        )  # fmt: skip

    def d_weight(self, tile: Tile, chunk: slice, g: Tensor, out: Tensor, first: bool) -> None:
        (n, width), n_hidden = g.shape, self.weight.shape[1]
        linear_logprob_d_weight_kernel[(triton.cdiv(width, tile.v) * triton.cdiv(n_hidden, tile.c),)](
            g, g.stride(0), self.hidden, self.offsets[chunk], self.hidden.stride(-1), out, out.stride(0), n, width,
            n_hidden, **self.shared(tile), FIRST=first, ALIGNED=aligned(self.hidden), BLOCK_V=tile.v, BLOCK_C=tile.c,
            BLOCK_K=tile.k,
        )  # fmt: skip

    def scratch(self, tile: Tile, n: int, width: int) -> Tensor:
        """Makes room for g, in whole tiles."""
        dtype, _ = dot_dtype(self.hidden, self.weight)
        return torch.empty(n, triton.cdiv(width, tile.v) * tile.v, dtype=dtype, device=self.hidden.device)

    def once(self, tile: Tile, chunk: slice, width: int) -> None:
        """Every product of one block, for a choice of tiles: what it makes is thrown away."""
        g = self.scratch(tile, chunk.stop - chunk.start, width)[:, :width]
        self.grad(tile, chunk, 0, g, False)
        self.d_hidden(tile, 0, g, g.new_empty(g.shape[0], self.weight.shape[1], dtype=torch.float32), True)
        self.d_weight(tile, chunk, g, g.new_empty(width, self.weight.shape[1]), True)


def linear_logprob_backward(
    problem: Problem, chunks: list[slice], block: int, saved: Saved, incoming: OutputGrads, grads: InputGrads
) -> None:
    """Fills those of ``grads`` that are given.

    Args:
        problem: as for `linear_logprob_forward`.
        chunks: consecutive slices of the n tokens, the first the longest; g of one of them and of ``block`` columns of
            the vocabulary is in memory at a time. With more than one, d weight of a block is added up in fp32.
        saved: logps [n], lse [n, 2] (z_max and log_sum), and entropy [n] where a gradient of it arrives.
        grads: hidden's are sums in fp32, [tokens of ``chunks``, H]; of weight's and bias's, every element is written
            once.
    """
    hidden, weight, _, positions, labels, transform = problem[:6]
    sums, grad_weight, grad_bias = grads[:3]
    n_vocab, n_hidden = weight.shape
    offsets = element_offsets(hidden, positions)
    call = _Call(hidden, offsets, weight, problem.wide_bias(), labels, transform, saved, incoming)
    start, longest = chunks[0].start, chunks[0].stop - chunks[0].start
    block = min(block, n_vocab)
    d_weight = None
    if grad_weight is not None and len(chunks) > 1:
        d_weight = torch.empty(block, n_hidden, dtype=torch.float32, device=hidden.device)
    with on(hidden.device):
        shape, dtype = (longest, block, n_hidden), dot_dtype(hidden, weight)[0]
        plain = is_plain(problem) and incoming.entropy is None
        tile = choose_tile("backward", hidden.device, dtype, plain, shape, lambda t: call.once(t, chunks[0], block))
        scratch = call.scratch(tile, longest, block)
        for v0 in range(0, n_vocab, block):
            v1 = min(v0 + block, n_vocab)
            d_bias = None
            for i, chunk in enumerate(chunks):
                g = scratch[: chunk.stop - chunk.start, : v1 - v0]
                b = call.grad(tile, chunk, v0, g, grad_bias is not None)
                if sums is not None:
                    call.d_hidden(tile, v0, g, sums[chunk.start - start : chunk.stop - start], v0 == 0)
                if d_weight is not None:
                    call.d_weight(tile, chunk, g, d_weight, i == 0)
                elif grad_weight is not None:
                    call.d_weight(tile, chunk, g, grad_weight[v0:], True)
                if b is not None:
                    d_bias = b if i == 0 else d_bias + b
            if d_weight is not None:
                grad_weight[v0:v1] = d_weight[: v1 - v0].to(grad_weight.dtype)
            if grad_bias is not None:
                grad_bias[v0:v1] = d_bias.to(grad_bias.dtype)
