"""What the passes of backends with kernels of their own share, CUDA and Triton: products, splits, whole rows."""

from __future__ import annotations

import torch
from torch import Tensor

from dpofast import _backend
from dpofast.backends._tensors import element_offsets, wide_dtype
from dpofast.backends.torch import TorchPasses


class GpuPasses(TorchPasses):
    """`dpofast.backends.tiled.Passes` whose products keep 16-bit operands and write fp32.

    `fold` and `grad` of a subclass also take rows of ``x`` that start at any ``offsets`` (elements), and `grad` rows of
    ``out`` that do: so whole rows of logits are tiles, wherever they start.

    Args:
        blocks: thread blocks that keep the GPU busy; rows are split when there are fewer. None: four for each of the
            device's multiprocessors.
    """

    def __init__(self, blocks: int | None = None):
        self._blocks = blocks

    def blocks(self, device: torch.device) -> int:
        return self._blocks or 4 * _backend.multiprocessors(device)

    def product_dtype(self, hidden: torch.dtype, weight: torch.dtype) -> torch.dtype:
        return torch.promote_types(hidden, weight)

    def product(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        if a.dtype == out.dtype:
            torch.mm(a, b, out=out)
        elif a.is_cuda:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        else:  # PyTorch has no such product elsewhere
            torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)

    def accumulate(self, sums: Tensor, a: Tensor, b: Tensor) -> None:
        if a.dtype == sums.dtype:
            sums.addmm_(a, b)
        elif a.is_cuda:
            torch.addmm(sums, a, b, out_dtype=sums.dtype, out=sums)
        else:
            sums.addmm_(a.to(sums.dtype), b.to(sums.dtype))

    def rows_forward(self, logits, rows, y, transform, outputs) -> dict[str, Tensor]:
        stats = self.new_stats(rows.numel(), wide_dtype(logits.dtype), logits.device)
        self.fold(logits, None, y, 0, transform, stats, outputs, None, None, element_offsets(logits, rows))
        return self.finish(stats, y, logits.shape[-1], outputs)

    def rows_backward(self, logits, rows, y, transform, saved, grad_logps, grad_entropy, grad_logits) -> None:
        offsets = element_offsets(logits, rows), element_offsets(grad_logits, rows)
        self.grad(logits, None, y, 0, transform, saved, grad_logps, grad_entropy, grad_logits, *offsets)
