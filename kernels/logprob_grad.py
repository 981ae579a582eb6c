"""logprob_grad: turns a tile of logits [n, width] into d loss / d logits, in place or into a 16-bit buffer; also whole
rows of logits, wherever they start. One read, one write.

    p = exp(z - z_max - log_sum)
    g = dz/dx * (c (onehot - p) - d_entropy p (log p + entropy))

where c and d_entropy are the incoming gradients of logps and entropy.

logprob_keep writes dz/dx exp(z - shift) to the cache, while log_sum is not known yet.
"""

from __future__ import annotations

import triton
import triton.language as tl
from dpofast.kernels.device import grad_tile, load_row, slope, transformed
from dpofast.kernels.launch import grad_factors, on
from torch import Tensor

from dpofast.backends.base import OutputGrads, Saved
from dpofast.backends.tiled import Tile

BLOCK = 1024  # columns of a program: 8 of each thread, of four warps; neither number was tuned


@triton.jit
def _columns(x, offsets, ld, bias, width, BLOCK: tl.constexpr, A: tl.constexpr):
    """(row [1], columns [BLOCK], their logits [1, BLOCK]) of this program."""
    blocks = tl.cdiv(width, BLOCK)
    job = tl.program_id(0).to(tl.int64)
    row = job // blocks + tl.zeros((1,), tl.int64)
    v = (job % blocks) * BLOCK + tl.arange(0, BLOCK)
    if offsets is not None:
        start = tl.load(offsets + row)
    else:
        start = row * ld
    logits = tl.load(x + start[:, None] + v[None, :], mask=v[None, :] < width, other=0.0).to(A)
    if bias is not None:
        logits += tl.load(bias + v, mask=v < width, other=0.0)[None, :]
    return row, v, logits


@triton.jit(do_not_specialize=["width"])
def logprob_keep_kernel(
    x, ld, bias, shift, out, out_ld, width, scale: tl.float64, inner: tl.float64, cap: tl.float64,
    inv_cap: tl.float64, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, v, logits = _columns(x, None, ld, bias, width, BLOCK, shift.dtype.element_ty)
    z = transformed(logits, scale, inner, cap, SOFTCAP)
    cached = tl.exp(z - tl.load(shift + row)[:, None]) * slope(z, scale, inv_cap, SOFTCAP)
    tl.store(out + row[:, None] * out_ld + v[None, :], cached, mask=v[None, :] < width)


@triton.jit(do_not_specialize=["width", "v0"])
def logprob_grad_kernel(
    x, offsets, ld, bias,  # as in logprob_fold_kernel
    labels, logps, lse,  # [n], [n], [n, 2]
    grad_logps, entropy, grad_entropy,  # [n] or None
    out, out_offsets, out_ld,  # as x, which it may be
    width, v0, scale: tl.float64, inner: tl.float64, cap: tl.float64,
    inv_cap: tl.float64, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, v, logits = _columns(x, offsets, ld, bias, width, BLOCK, lse.dtype.element_ty)
    z = transformed(logits, scale, inner, cap, SOFTCAP)
    saved = load_row(logps, lse, grad_logps, entropy, grad_entropy, row, row >= 0)
    is_label = v[None, :] == (tl.load(labels + row) - v0)[:, None]
    g = grad_tile(z, is_label, saved, scale, inv_cap, SOFTCAP, grad_entropy is not None)
    if out_offsets is not None:
        start = tl.load(out_offsets + row)
    else:
        start = row * out_ld
    tl.store(out + start[:, None] + v[None, :], g, mask=v[None, :] < width)


def _grid(n: int, width: int) -> tuple[tuple[int], int]:
    block = min(BLOCK, max(16, triton.next_power_of_2(width)))
    return (n * triton.cdiv(width, block),), block


def logprob_keep(tile: Tile, shift: Tensor, out: Tensor) -> None:
    """``out = exp(z - shift) dz/dx`` of the logits of ``tile``, without offsets; shift [n] is finite."""
    x, bias, _, _, transform, _ = tile
    grid, block = _grid(*x.shape)
    with on(x.device):
        logprob_keep_kernel[grid](
            x, x.stride(0), bias, shift, out, out.stride(0), x.shape[1], **grad_factors(transform), BLOCK=block,
            num_warps=4,
        )  # fmt: skip


def logprob_grad(
    tile: Tile, saved: Saved, incoming: OutputGrads, out: Tensor, out_offsets: Tensor | None = None
) -> None:
    """``out = d loss / d x`` of the logits of ``tile``; ``out`` may be ``tile.x``.

    Equivalent: ``dpofast.backends.torch.TorchPasses.grad``.

    Args:
        tile: as for `dpofast.kernels.logprob_fold.logprob_fold`; ``out`` and ``out_offsets`` as its x and offsets.
        saved: logps [n], lse [n, 2] (z_max and log_sum), and entropy [n] where a gradient of it arrives.
    """
    x, bias, labels, v0, transform, offsets = tile
    grad_logps, grad_entropy = incoming
    n, width = labels.numel(), x.shape[-1]
    grid, block = _grid(n, width)
    with on(x.device):
        logprob_grad_kernel[grid](
            x, offsets, x.stride(0) if offsets is None else 0, bias, labels, saved.logps, saved.lse, grad_logps,
            saved.entropy if grad_entropy is not None else None, grad_entropy, out, out_offsets,
            out.stride(0) if out_offsets is None else 0, width, v0, **grad_factors(transform), BLOCK=block, num_warps=4,
        )  # fmt: skip
