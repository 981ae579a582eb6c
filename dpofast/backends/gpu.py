"""What the passes of CUDA and Triton, which have kernels of their own, share: products, and whole rows as tiles."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dpofast.backends._tensors import element_offsets, empty_results, take
from dpofast.backends.base import LogitsProblem, OutputGrads, Problem, Saved
from dpofast.backends.tiled import Tile
from dpofast.backends.torch import TorchPasses

# Before 2.10 addmm wants the sums in the dtype of the operands, whatever dtype it is asked to write.
_ADDS_TO_WIDE_SUMS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors of a CUDA device; 1 for any other device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class GpuPasses(TorchPasses):
    """`dpofast.backends.tiled.Passes` whose products keep 16-bit operands and write fp32.

    `fold` and `grad` of a subclass also take a `Tile` with ``offsets``, and `grad` rows of ``out`` that start at any
    ``out_offsets`` (elements): so whole rows of logits are tiles, wherever they start.

    Args:
        thread_blocks: how many (in Triton: programs) keep the GPU busy; rows are split when there are fewer. None:
            four for each of the device's multiprocessors, as many as have room there (``kBlocksPerSm``).
    """

    def __init__(self, thread_blocks: int | None = None):
        self._thread_blocks = thread_blocks

    def thread_blocks(self, device: torch.device) -> int:
        return self._thread_blocks or 4 * multiprocessors(device)

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
        elif a.is_cuda and _ADDS_TO_WIDE_SUMS:
            torch.addmm(sums, a, b, out_dtype=sums.dtype, out=sums)
        elif a.is_cuda:
            sums += torch.mm(a, b, out_dtype=sums.dtype)
        else:
            sums.addmm_(a.to(sums.dtype), b.to(sums.dtype))

    def fused(self, problem: Problem, e: Tensor | None, factor: Tensor | None) -> dict[str, Tensor]:
        # Here and not above: Triton is loaded by those who run it.
        from dpofast.kernels.linear_keep import Partials, linear_keep, pack_tokens, seal, tiles

        hidden, weight, _, positions, labels, (temperature, logit_scale, _) = problem[:6]
        n, device, scale = problem.n_tokens, hidden.device, logit_scale / temperature
        if hidden.stride(-1) != 1:
            hidden, positions = take(hidden, positions), torch.arange(n, device=device)
        if weight.data_ptr() % 16:
            weight = weight.clone()
        packed = torch.empty(n, problem.n_hidden, dtype=weight.dtype, device=device)
        n_tiles = tiles(problem.n_vocab)
        buffer = torch.empty(2 * n_tiles + 1, n, dtype=problem.wide, device=device)
        partials = Partials(*buffer.split_with_sizes((1, n_tiles, n_tiles)))
        results = empty_results(n, (), problem.wide, device)
        pack_tokens(hidden, element_offsets(hidden, positions), weight, labels, scale, packed, partials.z_label)
        linear_keep(packed, weight, labels, scale, partials, e)
        seal(partials, e, labels, scale, results["logps"], results["lse"], factor)
        return results

    def logits_forward(self, problem: LogitsProblem, outputs: tuple[str, ...]) -> dict[str, Tensor]:
        stats = self.new_stats(problem.n_tokens, problem.wide, problem.logits.device)
        self.fold(_rows(problem), stats, outputs, None)
        return self.finish(stats, problem.labels, problem.n_vocab, outputs)

    def logits_backward(self, problem: LogitsProblem, saved: Saved, incoming: OutputGrads, grad_logits: Tensor) -> None:
        out_offsets = element_offsets(grad_logits, problem.positions)
        self.grad(_rows(problem), saved, incoming, grad_logits, out_offsets)


def _rows(problem: LogitsProblem) -> Tile:
    """Whole rows of logits as one tile, where they lie."""
    offsets = element_offsets(problem.logits, problem.positions)
    return Tile(problem.logits, None, problem.labels, 0, problem.transform, offsets)
