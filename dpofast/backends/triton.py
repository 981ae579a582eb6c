"""The Triton kernels of ``kernels/``: the passes over a tile of logits, and the fused ones that need no tile.

Where there is no cache (score, recompute), the forward computes the log-sum-exp while the
product is at hand, and the backward makes ``g`` in the same way; logits are never written. The schedules with a cache
 are those of `dpofast.backends.tiled`, with products by `torch.mm`; so they are for fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpofast.backends.base import InputGrads, OutputGrads, Problem, Saved
from dpofast.backends.gpu import GpuPasses
from dpofast.backends.tiled import Exps, Tile, TiledBackend
from dpofast.contract import Stat
from dpofast.kernels.linear_logprob_backward import linear_logprob_backward
from dpofast.kernels.linear_logprob_forward import linear_logprob_forward
from dpofast.kernels.logprob_fold import logprob_fold
from dpofast.kernels.logprob_grad import logprob_grad, logprob_keep
from dpofast.plan import Schedule


class TritonPasses(GpuPasses):
    """`dpofast.backends.tiled.Passes` by Triton kernels."""

    def fold(self, tile: Tile, stats: Tensor, outputs: tuple[str, ...], exps: Exps | None) -> None:
        x = tile.x
        logprob_fold(tile, stats, bool(outputs), self.thread_blocks(x.device))
        if exps is not None:
            shift = exps.shifts[tile.v0 // exps.block]
            shift.copy_(stats[Stat.M]).masked_fill_(shift == -torch.inf, 0.0)
            logprob_keep(tile, shift, exps.tile(tile.v0, tile.v0 + x.shape[1]))

    def grad(
        self, tile: Tile, saved: Saved, incoming: OutputGrads, out: Tensor, out_offsets: Tensor | None = None
    ) -> None:
        logprob_grad(tile, saved, incoming, out, out_offsets)


class TritonBackend(TiledBackend):
    """`TiledBackend` whose schedules without a cache run on the fused kernels."""

    passes: TritonPasses

    def forward(
        self, problem: Problem, schedule: Schedule, outputs: tuple[str, ...], cache: Tensor
    ) -> dict[str, Tensor]:
        if schedule.is_fused or not _is_fused(problem, schedule):
            return super().forward(problem, schedule, outputs, cache)
        stats = self.fold(problem, schedule, outputs)
        return self.passes.finish(stats, problem.labels, problem.n_vocab, outputs)

    def fold(self, problem: Problem, schedule: Schedule, outputs: tuple[str, ...]) -> Tensor:
        if problem.wide == torch.float64:
            return super().fold(problem, schedule, outputs)
        device = problem.hidden.device
        stats = self.passes.new_stats(problem.n_tokens, problem.wide, device)
        linear_logprob_forward(problem, stats, bool(outputs), self.passes.thread_blocks(device))
        return stats

    def backward(
        self, problem: Problem, schedule: Schedule, saved: Saved, incoming: OutputGrads, grads: InputGrads
    ) -> None:
        if not _is_fused(problem, schedule):
            super().backward(problem, schedule, saved, incoming, grads)
            return

        def run(chunks: list[slice], to_hidden: bool, to_head: bool) -> None:
            n = chunks[-1].stop - chunks[0].start
            shape = n, problem.n_hidden
            sums = torch.empty(shape, dtype=problem.wide, device=problem.hidden.device) if to_hidden else None
            into = InputGrads(sums, grads.weight, grads.bias) if to_head else InputGrads(sums)
            linear_logprob_backward(problem, chunks, schedule.block, saved, incoming, into)
            if sums is not None:
                at = problem.positions[chunks[0].start : chunks[-1].stop]
                grads.hidden.view(-1, problem.n_hidden)[at] = sums.to(grads.hidden.dtype)

        chunks, to_hidden = schedule.chunks(problem.n_tokens), grads.hidden is not None
        if grads.of_head and not schedule.splits_backward:
            run(chunks, to_hidden, True)
            return
        for chunk in chunks if to_hidden else ():
            run([chunk], True, False)
        if grads.of_head:
            run(chunks, False, True)


_WIDE_HIDDEN = 2048
"""The hidden size from which on products by `torch.mm` are faster, even with their tiles of logits. On an H100 a step
that recomputes took 3.8 times three bare products fused and 1.6 over tiles at H 4096, 3.7 and 6.7 at H 1024."""


def _is_fused(problem: Problem, schedule: Schedule) -> bool:
    """Says whether the older kernels, whose products are fused with the softmax, are the ones to run."""
    if schedule.block == 0 or problem.wide == torch.float64:
        return False
    return schedule.keeps_nothing and problem.n_hidden < _WIDE_HIDDEN
