"""linear_keep: the product hidden weight^T on Hopper's tensor cores, of which only exponentials leave the kernel.

The logits of a tile stay in registers. e = exp(z - shift) is stored in 16 bits for the backward, or nothing at all for
a score, and what a row adds up to is written beside it. Three kernels, in this order:

    pack_tokens   the token vectors in one matrix, as the tensor memory accelerator (TMA) reads it, and every label's z
    linear_keep   the product, e, and of every row and tile of WIDTH columns the sum of e and its shift
    seal          log-probs, lse, and the factor that makes a gradient of e

The shift of a row is its label's z: the log-odds of the label are then the logarithm of a sum, with no difference of
large numbers in them. Only where a tile's sum outgrows LARGEST, its own largest z is the shift instead; `seal` then
scales what is stored of that row, which a trained model hardly ever needs.

A label whose z is -inf has 0 for a shift: where nothing else reaches exp(-87), its log-prob is NaN in place of -inf.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from dpofast.kernels.device import larger, token_rows
from dpofast.kernels.launch import aligned, on
from torch import Tensor

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # an old Triton, with which nothing is `supported`
    TensorDescriptor = None

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))
# A tile's sum may be this before its row is shifted further: sums of 2^31 of them, and their reciprocals times a small
# gradient, are far from the limits of eight bits of exponent.
LARGEST = tl.constexpr(math.exp(40.0))


class Form(NamedTuple):
    """A way to cut the product: tiles of ``n`` tokens and ``v`` rows of the weight, of which the epilogue takes one of
    ``pieces`` at a time; ``group`` columns of tiles run together, so that what runs at one time is about square."""

    n: int = 128
    v: int = 256
    h: int = 64
    pieces: int = 2
    group: int = 8
    early: bool = False  # labels are loaded before the product
    warps: int = 8
    stages: int = 3

    @property
    def width(self) -> int:
        return self.v // self.pieces


FORM = Form()  # on an H100 0.94 of cuBLAS's speed at H 4096, 0.84 at H 1024 (docs/design.md)
WIDTH = FORM.width  # columns of a tile that has one sum and one shift
_PACK = 1024  # elements of a token at a time: 8 of each thread, of four warps; neither number was tuned
_SEAL_ROWS, _SEAL_TILES = (
    16,
    64,
)  # 64 bytes of a row of sums, and how many of them at a time; not tuned


class Partials(NamedTuple):
    """The numbers that the product leaves of each token for `seal`, in fp32."""

    z_label: Tensor  # [N], the label's z
    sums: Tensor  # [tiles(V), N], of e before it is rounded, the labels left out
    shifts: Tensor  # [tiles(V), N]: z_label, or the largest z of a tile whose sum would be more than exp(40)


def tiles(n_vocab: int, form: Form = FORM) -> int:
    """The number of rows of ``sums`` and ``shifts``."""
    return -(-n_vocab // form.width)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """The number of programs that run at one time; three for a test without a GPU."""
    return 3 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.cuda is None or TensorDescriptor is None:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def supported(device: torch.device, dtype: torch.dtype, n_hidden: int, *operands: Tensor) -> bool:
    """Says whether the kernels run on that device, with products of ``dtype`` and matrices such as ``operands``.

    Args:
        operands: the weight, and packed and e where they exist already: unit strides along their rows, which begin at
            multiples of 16 bytes.
    """
    if dtype not in (torch.bfloat16, torch.float16) or n_hidden % 8 != 0 or not _is_hopper(device):
        return False
    return all(x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 for x in operands)


# ---- pack_tokens -------------------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=["n", "V", "H", "ld"], do_not_specialize_on_alignment=["offsets", "labels", "z_label"]
)  # fmt: skip
def pack_tokens_kernel(
    hidden, offsets, weight, labels, packed, z_label,  # token i starts at element offsets[i]
    n, V, H, ld, scale, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    h_row = token_rows(offsets, row, n, ALIGNED)
    label = tl.load(labels + row)
    valid = (label >= 0) & (label < V)
    w_row = tl.where(valid, label, 0) * (ld // 8) * 8
    H = H // 8 * 8  # as it is; now the compiler knows that no 16 bytes are half inside
    total = tl.zeros((BLOCK,), tl.float32)
    for k0 in range(0, H, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        h = tl.load(hidden + h_row + k, mask=k < H, other=0.0).to(packed.dtype.element_ty)
        w = tl.load(weight + w_row + k, mask=k < H, other=0.0)
        tl.store(packed + row * H + k, h, mask=k < H)
        total += h.to(tl.float32) * w.to(tl.float32)
    tl.store(z_label + row, tl.where(valid, tl.sum(total, 0) * scale, float("nan")))


def pack_tokens(
    hidden: Tensor, offsets: Tensor, weight: Tensor, labels: Tensor, scale: float, packed: Tensor, z_label: Tensor
) -> None:
    """Gathers the tokens into ``packed`` and computes the z of their labels.

    Equivalent: ``packed.copy_(tokens); z_label.copy_(scale * (packed * weight[labels]).sum(1))``, the latter in fp32.

    Args:
        hidden: [*, H], unit stride along H; ``offsets`` [n], int64, are the elements where the n tokens start.
        weight: [V, H], unit stride along H.
        labels: [n], int64; of one outside of the vocabulary z is NaN.
        packed: [n, H], contiguous, of the weight's dtype.
        z_label: [n], fp32.
    """
    n, n_hidden = packed.shape
    with on(hidden.device):
        pack_tokens_kernel[(n,)](
            hidden, offsets, weight, labels, packed, z_label, n, weight.shape[0], n_hidden, weight.stride(0), scale,
            ALIGNED=aligned(hidden), BLOCK=_PACK, num_warps=4,
        )  # fmt: skip


# ---- linear_keep -------------------------------------------------------------------------------------------------


@triton.jit
def either(a, b):
    return a | b


@triton.jit
def halves(x):
    """The left and the right half of the columns, in registers."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def others(x, label, column, V):
    """x [n, width], -inf at the label and beyond the vocabulary; ``column`` is that of its first."""
    columns = column + tl.arange(0, x.shape[1])
    return tl.where((columns[None, :] == label[:, None]) | (columns >= V)[None, :], float("-inf"), x)


@triton.jit
def keep_piece(
    product, e, sums, shifts, row, label, shift, special, first_row, column, N, V, scale2
):  # fmt: skip
    """The epilogue of ``product`` [n, WIDTH]; ``special``: a label or the end of the vocabulary is in it."""
    # One instruction an entry, and the exponential is the other.
    z2 = tl.fma(product, scale2, (shift * -LOG2_E)[:, None])
    if special:
        z2 = others(z2, label, column, V)
    x = tl.exp2(z2)
    total = tl.sum(x, 1)
    if e is not None:
        cached = x.to(e.dtype)
    outgrown = ~(total <= LARGEST)  # a NaN, too
    if tl.max(outgrown.to(tl.int32), 0) > 0:
        more = tl.where(outgrown, larger(0.0, tl.max(z2, 1)), 0.0)
        shift += more * LN_2
        x = tl.exp2(z2 - more[:, None])  # inf - inf is NaN, as it shall be
        total = tl.sum(x, 1)
        if e is not None:
            cached = x.to(e.dtype)
    if e is not None:
        e.store([first_row, column], cached)
    at = (column // product.shape[1]).to(tl.int64) * N
    there = row < tl.where(column < V, N, 0)  # a piece may lie beyond the vocabulary
    tl.store(sums + at + row, total, mask=there)
    tl.store(shifts + at + row, shift, mask=there)


@triton.jit(do_not_specialize=["N", "V", "H"], do_not_specialize_on_alignment=["labels", "z_label", "sums", "shifts"])
def linear_keep_kernel(
    packed, weight, e,  # descriptors of [N, H], [V, H] and [N, V] or None
    labels, z_label, sums, shifts,  # [N], [N], [tiles, N]
    N, V, H, scale2,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, PIECES: tl.constexpr, GROUP: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = BLOCK_V // PIECES
    row_tiles = tl.cdiv(N, BLOCK_N)
    col_tiles = tl.cdiv(V, BLOCK_V)
    for job in tl.range(tl.program_id(0), row_tiles * col_tiles, tl.num_programs(0), flatten=True):
        first = job // (GROUP * row_tiles) * GROUP
        size = tl.minimum(col_tiles - first, GROUP)
        first_row = (job % (GROUP * row_tiles)) // size * BLOCK_N
        column = (first + (job % (GROUP * row_tiles)) % size) * BLOCK_V
        row = first_row + tl.arange(0, BLOCK_N)
        if EARLY:
            label = tl.load(labels + row, mask=row < N, other=-1)
            z = tl.load(z_label + row, mask=row < N, other=0.0)
        product = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for k in range(0, H, BLOCK_H):
            product = tl.dot(packed.load([first_row, k]), weight.load([column, k]).T, product, input_precision="ieee")
        if not EARLY:
            label = tl.load(labels + row, mask=row < N, other=-1)
            z = tl.load(z_label + row, mask=row < N, other=0.0)
        label = tl.minimum(tl.maximum(label, -1), V).to(tl.int32)
        shift = tl.where(z == float("-inf"), 0.0, z)
        # One bit for each piece, for only those with a label or the end of the vocabulary compare columns.
        bits = tl.zeros(label.shape, tl.int32)
        for i in tl.static_range(PIECES):
            begin = column + i * WIDTH
            bits |= ((label >= begin) & (label < begin + WIDTH) | (begin + WIDTH > V)).to(tl.int32) << i
        bits = tl.reduce(bits, 0, either)
        if PIECES == 1:
            keep_piece(product, e, sums, shifts, row, label, shift, bits > 0, first_row, column, N, V, scale2)
        else:
            left, right = halves(product)
            middle = column + WIDTH
            keep_piece(left, e, sums, shifts, row, label, shift, (bits & 1) > 0, first_row, column, N, V, scale2)
            keep_piece(right, e, sums, shifts, row, label, shift, (bits & 2) > 0, first_row, middle, N, V, scale2)


def linear_keep(
    packed: Tensor, weight: Tensor, labels: Tensor, scale: float, partials: Partials, e: Tensor | None,
    form: Form = FORM,
) -> None:  # fmt: skip
    """Multiplies, and keeps e = exp(z - shift) of z = scale * packed weight^T: writes it to the cache.

    Equivalent, with one shift a row and tile t of WIDTH columns: ``e[:, t].copy_((z[:, t] - shifts[t]).exp())`` with
    the labels' entries 0, and ``sums[t] = e[:, t].sum(1)`` before e is rounded.

    Args:
        packed: [N, H], of the weight's dtype, bf16 or fp16.
        weight: [V, H].
        labels: [N], int64.
        partials: of which z_label is that of `pack_tokens`, and the others are filled.
        e: [N, V], bf16, of a multiple of 8 elements from row to row, all of them in memory: the last 16 bytes of a row
            are written whole. None where only a score is wanted.
    """
    (n, n_hidden), n_vocab = packed.shape, weight.shape[0]
    cached = None if e is None else TensorDescriptor(e, [n, n_vocab], [e.stride(0), 1], [form.n, form.width])
    programs = -(-n // form.n) * -(-n_vocab // form.v)
    with on(packed.device):
        linear_keep_kernel[(min(programs, _multiprocessors(packed.device)),)](
            TensorDescriptor(packed, [n, n_hidden], [packed.stride(0), 1], [form.n, form.h]),
            TensorDescriptor(weight, [n_vocab, n_hidden], [weight.stride(0), 1], [form.v, form.h]),
            cached, labels, *partials, n, n_vocab, n_hidden, scale * LOG2_E.value,
            BLOCK_N=form.n, BLOCK_V=form.v, BLOCK_H=form.h, PIECES=form.pieces, GROUP=form.group, EARLY=form.early,
            num_warps=form.warps, num_stages=form.stages,
        )  # fmt: skip


# ---- seal --------------------------------------------------------------------------------------------------------


@triton.jit
def log1p(x):
    """log(1 + x) of x >= 0 with full relative precision."""
    y = 1 + x
    return tl.where(y == 1, x, tl.log(y) * (x / tl.where(y == 1, 1, y - 1)))


@triton.jit(
    do_not_specialize=["n", "V", "n_tiles", "ld"],
    do_not_specialize_on_alignment=["z_label", "sums", "shifts", "labels", "logps", "lse", "factor"],
)  # fmt: skip
def seal_kernel(
    z_label, sums, shifts,  # [n], [n_tiles, n]
    e, ld, labels,  # [n, V] or None
    logps, lse, factor,  # [n], [n, 2], [n] or None
    n, V, n_tiles, scale, ROWS: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    none = float("-inf")
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < n
    n = n.to(tl.int64)
    at = tl.arange(0, TILES)[:, None] * n + row[None, :]
    # Online, every lane for itself: there is no reduction before the last.
    top = tl.full((TILES, ROWS), none, tl.float32)
    least = tl.full((TILES, ROWS), float("inf"), tl.float32)
    total = tl.zeros((TILES, ROWS), tl.float32)
    for first in range(0, n_tiles, TILES):
        there = (first + tl.arange(0, TILES) < n_tiles)[:, None] & mask[None, :]
        piece = first * n + at
        shift = tl.load(shifts + piece, mask=there, other=none)
        x = tl.load(sums + piece, mask=there, other=0.0)
        least = tl.where(there & (shift < least), shift, least)
        new = larger(top, shift)
        base = tl.where(new == none, 0.0, new)
        total = total * tl.exp(top - base) + x * tl.exp(shift - base)
        top = new
    m = larger(none, tl.max(top, 0))
    uneven = mask & (tl.min(least, 0) < m)
    total = tl.sum(total * tl.exp(top - tl.where(m == none, 0.0, m)[None, :]), 0)
    # In fp64: the device does a row's last few steps in passing.
    z = tl.load(z_label + row, mask, other=0.0).to(tl.float64)
    k, s = m.to(tl.float64), total.to(tl.float64)
    d = k - z + tl.log(s)
    logp = tl.where(d > 0, -d, 0.0) - log1p(tl.exp(-tl.abs(d)))
    z_max = tl.where(k > z, k, z)  # NaN where z is
    log_sum = tl.log(s * tl.exp(k - z_max) + tl.exp(z - z_max))
    tl.store(logps + row, logp.to(tl.float32), mask)
    tl.store(lse + 2 * row, z_max.to(tl.float32), mask)
    tl.store(lse + 2 * row + 1, log_sum.to(tl.float32), mask)
    if e is not None:
        tl.store(factor + row, (-scale * tl.exp(k - z_max - log_sum)).to(tl.float32), mask)
        label = tl.load(labels + row, mask, other=-1)
        start = row.to(tl.int64) * tl.multiple_of(ld, 8)
        own = mask & (label >= 0) & (label < V)
        tl.store(e + start + label, (-total).to(e.dtype.element_ty), own)
        if tl.max(uneven.to(tl.int32), 0) > 0:
            for tile in range(0, n_tiles):
                shift = tl.load(shifts + tile * n + row, uneven, other=none)
                scaled = uneven & (shift < m)
                if tl.max(scaled.to(tl.int32), 0) > 0:
                    column = tile * WIDTH + tl.arange(0, WIDTH)
                    entry = e + (start[:, None] + column[None, :])
                    others = scaled[:, None] & (column < V)[None, :] & (column[None, :] != label[:, None])
                    f = tl.exp(tl.where(scaled, shift - m, 0.0))
                    x = tl.load(entry, others, other=0.0).to(tl.float32)
                    tl.store(entry, (x * f[:, None]).to(e.dtype.element_ty), others)


def seal(
    partials: Partials, e: Tensor | None, labels: Tensor, scale: float, logps: Tensor, lse: Tensor,
    factor: Tensor | None, form: Form = FORM,
) -> None:  # fmt: skip
    """Log-probs from what `linear_keep` left, and e made the gradient: d logps / d (packed weight^T) = factor * e.

    Args:
        partials: what `linear_keep` left.
        e: [N, V], whose labels' entries are set here; None for a score, with ``factor``.
        logps: [N], fp32.
        lse: [N, 2], fp32: the largest shift, and what is to be added to it.
        factor: [N], fp32.
    """
    n = labels.numel()
    ld, n_vocab = (0, 0) if e is None else (e.stride(0), e.shape[1])
    with on(labels.device):
        seal_kernel[(-(-n // _SEAL_ROWS),)](
            *partials, e, ld, labels, logps, lse, factor, n, n_vocab, len(partials.sums), scale,
            ROWS=_SEAL_ROWS, TILES=_SEAL_TILES, WIDTH=form.width, num_warps=4,
        )  # fmt: skip
