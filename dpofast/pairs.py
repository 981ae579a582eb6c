"""A loss whose pairs decide alone, by whole pairs: from logits to the loss and both gradients, and then the next.

`dpofast.plan.pairs` says when. The gradients are made in the forward, unscaled, and wait for the backward in the
accumulators' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dpofast._ops import check_range
from dpofast.backends import registry
from dpofast.backends._tensors import take, wide_dtype
from dpofast.backends.base import InputGrads, OutputGrads, Problem, Saved, Transform, chunk
from dpofast.contract import output_dtype
from dpofast.plan.pairs import Pairs
from dpofast.primitive import HeadCall
from dpofast.reference import LogprobOutput

Evaluate = Callable[[LogprobOutput, str], Tensor]
"""From results of labels' shape, and a reduction, to a loss that is a sum of what each pair decides alone."""


class PairsCall(NamedTuple):
    """One loss by whole pairs."""

    head: HeadCall
    pairs: Pairs
    lengths: Tensor  # [2B], tokens that count
    outputs: tuple[str, ...]
    reduction: str  # "mean" or "sum"

    def loss_and_scores(self, evaluate: Evaluate) -> tuple[Tensor, LogprobOutput]:
        """The loss, reduced, and what `HeadCall.score` returns, of which only logps have a gradient."""
        loss, *results = _PairsLoss.apply(self, evaluate, *self.head[:3])
        return loss, self.scores(results)

    def scores(self, results: Sequence[Tensor]) -> LogprobOutput:
        return LogprobOutput(results[0], **dict(zip(self.outputs, results[1:], strict=True)))

    def without_operands(self) -> PairsCall:
        """What a graph may hold beyond its backward."""
        return self._replace(head=self.head._replace(hidden=None, weight=None, bias=None))

    def again(
        self,
        evaluate: Evaluate,
        grad_loss: Tensor | None,
        grad_logps: Tensor | None,
        inputs: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        """The gradients of ``inputs``, hidden, weight and bias, by the ordinary way."""
        leaves = [None if x is None else x.detach().requires_grad_(x.requires_grad) for x in inputs]
        with torch.enable_grad():
            hidden, weight, bias = leaves
            scored = self.head._replace(hidden=hidden, weight=weight, bias=bias).score(self.outputs)
            reached = [(evaluate(scored, self.reduction), grad_loss), (scored.logps, grad_logps)]
        of, by = zip(*((y, g) for y, g in reached if g is not None))
        wanted = [x for x in leaves if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(of, wanted, by, allow_unused=True))
        return [next(found) if x is not None and x.requires_grad else None for x in leaves]


class _PairsLoss(torch.autograd.Function):
    """The loss, logps and statistics of a `PairsCall`.

    Its backward scales what the forward made. Where logps have a gradient of their own, and in a second backward
    through the same graph, it scores again, as if there were no pairs.
    """

    @staticmethod
    def forward(ctx, call: PairsCall, evaluate: Evaluate, *inputs):
        run = _Run(call, evaluate, ctx.needs_input_grad[2:])
        loss = run.loss()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*run.results[1:])
        ctx.save_for_backward(*inputs)
        ctx.call, ctx.evaluate, ctx.left = call.without_operands(), evaluate, run.left()
        return loss, *run.results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, grad_logps, *_):
        inputs, left, ctx.left = ctx.saved_tensors, ctx.left, None
        if left is None or grad_logps is not None:
            return None, None, *ctx.call.again(ctx.evaluate, grad_loss, grad_logps, inputs)
        return None, None, *left.scaled(grad_loss, inputs)


class _Left(NamedTuple):
    """The gradients of an unscaled loss, in the accumulators' dtype."""

    hidden: Tensor | None  # [N, H], of the tokens at
    positions: Tensor  # [N]
    weight: Tensor | None
    bias: Tensor | None

    def scaled(self, by: Tensor, inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of ``inputs``, hidden, weight and bias, times a number: once, for they are given away."""
        grads: list[Tensor | None] = [None, None, None]
        if self.hidden is not None:
            grads[0] = torch.zeros_like(inputs[0], memory_format=torch.contiguous_format)
            grads[0].view(-1, grads[0].shape[-1])[self.positions] = self.hidden.mul_(by).to(grads[0].dtype)
        for i, sums in ((1, self.weight), (2, self.bias)):
            if sums is not None:
                grads[i] = sums.mul_(by).to(inputs[i].dtype)  # torch.mul to another dtype has a copy of sums between
        return grads


class _Run:
    """The forward."""

    def __init__(self, call: PairsCall, evaluate: Evaluate, needs: tuple[bool, ...]):
        head, labels = call.head, call.head.labels
        self.call, self.evaluate, self.engine = call, evaluate, registry.get(head.exact_backend)
        wide = wide_dtype(head.hidden.dtype, head.weight.dtype)
        self.results = [
            labels.new_zeros(labels.shape, dtype=wide if name == "logps" else output_dtype(name, wide))
            for name in ("logps", *call.outputs)
        ]
        n_pairs = call.lengths.numel() // 2
        pair = torch.arange(n_pairs, device=labels.device).repeat(2).repeat_interleave(
            call.lengths, output_size=head.n_tokens
        )  # fmt: skip
        self.positions = head.positions[pair.argsort(stable=True)]
        self.labels = labels.reshape(-1)[self.positions]
        check_range(self.labels, head.weight.shape[0], head.options.ignore_index)
        self.sums = self._sums(wide, *needs)

    def _sums(self, wide: torch.dtype, of_hidden: bool, of_weight: bool, of_bias: bool) -> InputGrads:
        """Room for the sums: as for any gradient of the weight, where they are it."""
        hidden, weight, n_tokens = self.call.head.hidden, self.call.head.weight, self.call.head.n_tokens

        def empty(*shape: int) -> Tensor:
            return weight.new_empty(shape, dtype=wide)

        return InputGrads(
            empty(n_tokens, hidden.shape[-1]) if of_hidden else None,
            (self.engine.grad_weight(weight) if weight.dtype == wide else empty(*weight.shape)) if of_weight else None,
            empty(weight.shape[0]) if of_bias else None,
        )

    def left(self) -> _Left:
        return _Left(self.sums.hidden, self.positions, *self.sums[1:3])

    def loss(self) -> Tensor:
        call = self.call
        cache = self.engine.cache(call.pairs.schedule.cache_bytes, self.labels.device)
        counts = call.lengths.view(2, -1).sum(0).tolist()
        for tokens in _parts(counts, call.pairs.tokens):
            self._part(tokens, cache)
        with torch.no_grad():
            return self.evaluate(call.scores(self.results), call.reduction)

    def _part(self, tokens: slice, cache: Tensor) -> None:
        """Scores the tokens of some pairs, and adds their share of the gradients."""
        hidden, weight, bias = self.call.head[:3]
        schedule, positions = self.call.pairs.schedule, self.positions[tokens]
        here = torch.arange(positions.numel(), device=positions.device)
        transform = Transform(*self.call.head.options.transform)
        problem = Problem(take(hidden, positions), weight, bias, here, self.labels[tokens], transform)
        values = self.engine.forward(problem, schedule, self.call.outputs, cache)
        for result, name in zip(self.results, ("logps", *self.call.outputs), strict=True):
            result.view(-1)[positions] = values[name].to(result.dtype)
        incoming = OutputGrads(self._slope().reshape(-1)[positions])
        saved = Saved(values["logps"], values["lse"], None, cache)
        into = self.sums._replace(hidden=chunk(self.sums.hidden, tokens), adds=tokens.start > 0)
        self.engine.backward(problem, schedule, saved, incoming, into)

    def _slope(self) -> Tensor:
        """The derivative of the loss by logps, of labels' shape: right for every pair that was scored."""
        with torch.enable_grad():
            logps = self.results[0].detach().requires_grad_()
            loss = self.evaluate(self.call.scores([logps, *self.results[1:]]), self.call.reduction)
            return torch.autograd.grad(loss, logps)[0]


def _parts(counts: list[int], most: int) -> list[slice]:
    """The tokens of pairs that have so many each, as parts of whole pairs of at most ``most``, or of one pair."""
    parts, start, stop = [], 0, 0
    for count in counts:
        if stop > start and stop + count - start > most:
            parts.append(slice(start, stop))
            start = stop
        stop += count
    return [*parts, slice(start, stop)] if stop > start else parts
