"""What the passes of CUDA and Triton, which have kernels of their own, share: products, and whole rows as tiles."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dpofast.backends._tensors import element_offsets, empty_results, take
from dpofast.backends.base import LogitsProblem, OutputGrads, Problem, Saved
from dpofast.backends.tiled import Kept, Tile
from dpofast.backends.torch import TorchPasses
from dpofast.grad_filter import ranked, square_budget
from dpofast.plan.cost import RANKING_TOKENS
from dpofast.plan.schedule import ceil_div
from dpofast.plan.tiled import skip_splits

if TYPE_CHECKING:
    from dpofast.kernels import linear_keep

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
        return self._fused(problem, e, factor)[0]

    def _fused(
        self, problem: Problem, e: Tensor | None, factor: Tensor | None
    ) -> tuple[dict[str, Tensor], linear_keep.Partials]:
        """What `fused` returns, and what the product left of each tile."""
        # Here and not above: Triton is loaded by those who run it.
        from dpofast.kernels import linear_keep as kernels

        hidden, weight, _, positions, labels, (temperature, logit_scale, _) = problem[:6]
        n, device, scale = problem.n_tokens, hidden.device, logit_scale / temperature
        if hidden.stride(-1) != 1:
            hidden, positions = take(hidden, positions), torch.arange(n, device=device)
        if weight.data_ptr() % 16:
            weight = weight.clone()
        packed = torch.empty(n, problem.n_hidden, dtype=weight.dtype, device=device)
        n_tiles = kernels.tiles(problem.n_vocab)
        buffer = torch.empty(2 * n_tiles + 1, n, dtype=problem.wide, device=device)
        partials = kernels.Partials(*buffer.split_with_sizes((1, n_tiles, n_tiles)))
        results = empty_results(n, (), problem.wide, device)
        offsets = element_offsets(hidden, positions)
        kernels.pack_tokens(hidden, offsets, weight, labels, scale, packed, partials.z_label)
        kernels.linear_keep(packed, weight, labels, scale, partials, e)
        kernels.seal(partials, e, labels, scale, results["logps"], results["lse"], factor)
        return results, partials

    def skipping(self, problem: Problem, e: Tensor, factor: Tensor, kept: Kept) -> dict[str, Tensor]:
        from dpofast.kernels import linear_skip

        self._rank(problem, kept)
        labels, places = problem.labels, torch.empty_like(kept.order)
        places.scatter_(0, kept.order, torch.arange(problem.n_vocab, device=labels.device))
        inside = (labels >= 0) & (labels < problem.n_vocab)
        labels = torch.where(inside, places[torch.where(inside, labels, 0)], labels)
        results, partials = self._fused(problem._replace(weight=kept.weight, labels=labels), e, factor)
        budget = square_budget(problem.grad_filter, len(partials.sums))
        marks = linear_skip.mark(partials, results["logps"], results["lse"], labels, budget)
        temperature, logit_scale, _ = problem.transform
        torch.mul(marks.dropped / factor, -logit_scale / temperature / problem.n_vocab, out=kept.spread)
        kept.of_tokens.copy_(marks.of_tokens)
        kept.of_vocab.copy_(marks.of_vocab)
        return results | {"dropped_mass": marks.dropped}

    def _rank(self, problem: Problem, kept: Kept) -> None:
        """Puts the head into an order that some tokens, which go first, decide."""
        some = problem.chunk(slice(None, None, ceil_div(problem.n_tokens, RANKING_TOKENS)))
        tokens = take(some.hidden, some.positions).to(problem.weight.dtype)
        z = kept.spread.new_empty(len(tokens), problem.n_vocab)
        self.product(tokens, problem.weight.T, z)
        temperature, logit_scale, _ = problem.transform
        z.mul_(logit_scale / temperature)
        kept.order.copy_(ranked(z, some.labels.clamp(0, problem.n_vocab - 1)))
        torch.index_select(problem.weight, 0, kept.order, out=kept.weight)

    def skip_to_hidden(self, e: Tensor, kept: Kept, sums: Tensor) -> None:
        from dpofast.kernels import linear_skip

        n, n_hidden = sums.shape
        splits = skip_splits(n, n_hidden)
        parts = sums.unsqueeze(0) if splits == 1 else sums.new_empty(splits, n, n_hidden)
        of_all = torch.sum(kept.weight, 0, dtype=sums.dtype)
        linear_skip.d_hidden(e, kept.weight, kept.of_tokens, kept.spread, of_all, parts)
        if splits > 1:
            torch.sum(parts, 0, out=sums)

    def skip_to_weight(self, e: Tensor, scaled: Tensor, kept: Kept, grad: Tensor) -> None:
        from dpofast.kernels import linear_skip

        # In two parts that add up to it, so that a product of 16-bit operands loses nothing of it.
        high = kept.spread.to(scaled.dtype)
        two = torch.stack((high, (kept.spread - high).to(scaled.dtype)))
        rows = kept.spread.new_empty(2, scaled.shape[1])
        self.product(two, scaled, rows)
        linear_skip.d_weight(e, scaled, kept.of_vocab, rows.sum(0), kept.order, grad)

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
