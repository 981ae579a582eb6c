"""The Triton kernels of ``kernels/``: the passes over a tile of logits, and the fused ones that need no tile.

Where nothing is kept from forward to backward (score, recompute), the forward computes the log-sum-exp while the
product is at hand, and the backward makes ``g`` in the same way; logits are never written. Where ``g`` is kept, the
schedules are those of `dpofast.backends.tiled`, with products by `torch.mm`; so they are for fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpofast.backends._tensors import element_offsets, wide_dtype
from dpofast.backends.gpu import GpuPasses
from dpofast.backends.tiled import TiledBackend, chunks
from dpofast.backends.torch import Stat
from dpofast.kernels.linear_logprob_backward import linear_logprob_backward
from dpofast.kernels.linear_logprob_forward import linear_logprob_forward
from dpofast.kernels.logprob_fold import logprob_fold
from dpofast.kernels.logprob_grad import logprob_grad, logprob_keep

_UNKEPT = ("score", "recompute", "recompute-split")  # schedules that keep nothing


class TritonPasses(GpuPasses):
    """`dpofast.backends.tiled.Passes` by Triton kernels."""

    def fold(self, x, bias, y, v0, transform, stats, outputs, keep, reference, offsets=None) -> None:
        logprob_fold(x, offsets, bias, y, v0, transform, stats, bool(outputs), self.blocks(x.device))
        if keep is not None:
            reference.copy_(stats[Stat.M]).masked_fill_(reference == -torch.inf, 0.0)
            logprob_keep(x, bias, transform, reference, keep)

    def grad(
        self, x, bias, y, v0, transform, saved, grad_logps, grad_entropy, out, offsets=None, out_offsets=None
    ) -> None:  # fmt: skip
        logprob_grad(x, offsets, bias, y, v0, transform, saved, grad_logps, grad_entropy, out, out_offsets)


class TritonBackend(TiledBackend):
    """`TiledBackend` whose schedules that keep nothing run on the fused kernels."""

    passes: TritonPasses

    def forward(self, isa, hidden, weight, bias, rows, y, transform, outputs, choice, cache) -> dict[str, Tensor]:
        if choice.schedule not in _UNKEPT or wide_dtype(hidden.dtype, weight.dtype) == torch.float64:
            return super().forward(isa, hidden, weight, bias, rows, y, transform, outputs, choice, cache)
        stats = self._fold(hidden, weight, bias, rows, y, transform, outputs)
        return self.passes.finish(stats, y, weight.shape[0], outputs)

    def fold(self, isa, hidden, weight, bias, rows, y, transform, outputs, choice) -> Tensor:
        if wide_dtype(hidden.dtype, weight.dtype) == torch.float64:
            return super().fold(isa, hidden, weight, bias, rows, y, transform, outputs, choice)
        return self._fold(hidden, weight, bias, rows, y, transform, outputs)

    def _fold(self, hidden, weight, bias, rows, y, transform, outputs) -> Tensor:
        wide = wide_dtype(hidden.dtype, weight.dtype)
        stats = self.passes.new_stats(rows.numel(), wide, hidden.device)
        linear_logprob_forward(
            hidden, element_offsets(hidden, rows), weight, _in(wide, bias), y, transform, stats, bool(outputs),
            self.passes.blocks(hidden.device),
        )  # fmt: skip
        return stats

    def backward(
        self, isa, hidden, weight, bias, rows, y, transform, choice, cache, saved, grad_logps, grad_entropy,
        grad_hidden, grad_weight, grad_bias,
    ) -> None:  # fmt: skip
        wide = wide_dtype(hidden.dtype, weight.dtype)
        if choice.schedule not in _UNKEPT or wide == torch.float64:
            super().backward(
                isa, hidden, weight, bias, rows, y, transform, choice, cache, saved, grad_logps, grad_entropy,
                grad_hidden, grad_weight, grad_bias,
            )  # fmt: skip
            return
        operands = hidden, element_offsets(hidden, rows), weight, _in(wide, bias), y, transform

        def run(parts: list[slice], to_hidden: bool, to_rest: bool) -> None:
            n = parts[-1].stop - parts[0].start
            sums = torch.empty(n, hidden.shape[-1], dtype=wide, device=hidden.device) if to_hidden else None
            linear_logprob_backward(
                *operands, parts, choice.block, saved, grad_logps, grad_entropy, sums,
                *((grad_weight, grad_bias) if to_rest else (None, None)),
            )  # fmt: skip
            if sums is not None:
                at = rows[parts[0].start : parts[-1].stop]
                grad_hidden.view(-1, hidden.shape[-1])[at] = sums.to(grad_hidden.dtype)

        parts = chunks(rows.numel(), choice.token_chunk)
        to_hidden, to_rest = grad_hidden is not None, grad_weight is not None or grad_bias is not None
        if to_rest and choice.schedule != "recompute-split":
            run(parts, to_hidden, True)
            return
        for part in parts if to_hidden else ():
            run([part], True, False)
        if to_rest:
            run(parts, False, True)


def _in(dtype: torch.dtype, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.to(dtype).contiguous()
