"""The registered ops: schema, fake kernel, autograd, and the hand-over to a backend. Arguments were checked.

``torch.compile(fullgraph=True)`` sees each op as opaque, with static shapes: what depends on the number of
completion tokens stays inside, in the cache buffer, whose size in bytes is an argument.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dpofast import distributed
from dpofast.backends import registry
from dpofast.backends._tensors import places, take, wide_dtype
from dpofast.backends.base import (
    InputGrads,
    LogitsProblem,
    OutputGrads,
    PairsProblem,
    Problem,
    Saved,
    Transform,
)
from dpofast.contract import STATISTICS, output_dtype, wanted
from dpofast.plan import Schedule

_Results = tuple[(Tensor,) * (2 + len(STATISTICS))]  # type: ignore[misc]
_ResultsAndCache = tuple[(Tensor,) * (4 + len(STATISTICS))]  # type: ignore[misc]
"""What the ops return: a schema has no tuple of any length."""


# Tokens: from [*] to the N that count, and back


def _positions(labels: Tensor, ignore_index: int | None, n_tokens: int) -> tuple[Tensor, Tensor]:
    """Positions of the labels that count, and these labels; waits for the device only if ``n_tokens`` is -1, unknown"""
    flat = labels.reshape(-1).long().contiguous()
    if ignore_index is None or n_tokens == flat.numel():
        return torch.arange(flat.numel(), device=flat.device), flat
    counts = flat != ignore_index
    positions = torch.nonzero(counts).squeeze(-1) if n_tokens < 0 else _places(counts, n_tokens)
    return positions, flat[positions]


def _places(counts: Tensor, n: int) -> Tensor:
    """Where ``counts`` [*] is true, which is n times; the device is not waited for."""
    # Each position goes to its place among those that count, the others to one place too many.
    place = torch.where(counts, counts.cumsum(0) - 1, n)
    positions = torch.empty(n + 1, dtype=torch.int64, device=counts.device)
    return positions.scatter_(0, place, torch.arange(counts.numel(), device=counts.device))[:-1]


def check_range(y: Tensor, n_vocab: int, ignore_index: int | None) -> None:
    """Looks at a forward's labels; their backward need not look again."""
    if y.numel() and (y.device.type == "cpu" or os.environ.get("DPOFAST_CHECK_LABELS") == "1"):
        low, high = map(int, torch.aminmax(y))
        if low < 0 or high >= n_vocab:
            bad = low if low < 0 else high
            raise ValueError(
                f"labels: got {bad}, expected values in [0, {n_vocab}) (the rows of weight) or "
                f"ignore_index={ignore_index}"
            )


def _empty_results(labels: Tensor, dtype: torch.dtype, outputs: int) -> list[Tensor]:
    """logps, lse in its two parts, then the statistics: labels' shape where wanted, no elements where not."""
    names = wanted(outputs)
    results = [labels.new_zeros(shape, dtype=dtype) for shape in (labels.shape, (*labels.shape, 2))]
    for name in STATISTICS:
        kind = output_dtype(name, dtype)
        results.append(labels.new_zeros(labels.shape, dtype=kind) if name in names else labels.new_empty(0, dtype=kind))
    return results


def _results(
    labels: Tensor, dtype: torch.dtype, outputs: int, positions: Tensor, values: dict[str, Tensor]
) -> list[Tensor]:
    """`_empty_results` with the values at ``positions``, which may be none, in their places."""
    if not positions.numel():
        return _empty_results(labels, dtype, outputs)
    return [
        _in_place(labels, positions, values[name], output_dtype(name, dtype))
        if name in values
        else labels.new_empty(0, dtype=output_dtype(name, dtype))
        for name in ("logps", "lse", *STATISTICS)
    ]


def _in_place(labels: Tensor, positions: Tensor, packed: Tensor, dtype: torch.dtype) -> Tensor:
    """[*labels, ..] with ``packed`` [N, ..] at ``positions`` and 0 elsewhere."""
    packed = packed.to(dtype)
    if positions.numel() == labels.numel():
        return (packed if labels.ndim == 1 else packed.reshape((*labels.shape, *packed.shape[1:]))).contiguous()
    out = labels.new_zeros((labels.numel(), *packed.shape[1:]), dtype=dtype)
    out[positions] = packed
    return out if labels.ndim == 1 else out.view((*labels.shape, *packed.shape[1:]))


def _pick(labels: Tensor, positions: Tensor, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The entries at ``positions`` of tensors that begin with labels' shape; None of one without elements."""
    picked = []
    for x in tensors:
        if x is not None and x.numel():
            flat = (x if labels.ndim == 1 else x.reshape(labels.numel(), *x.shape[labels.ndim :])).contiguous()
            picked.append(flat if positions.numel() == labels.numel() else flat[positions])
        else:
            picked.append(None)
    return picked


# Registration


def _no_second_derivative(ctx, *_):
    raise RuntimeError(
        "dpofast: second derivatives of log-probs are not implemented; call backward without create_graph=True, "
        "or use dpofast.reference for a problem small enough"
    )


def _register(function: Callable, fake: Callable, backward: Callable, setup: Callable | None = None):
    """The op ``dpofast::<the function's name without _>``, with what compilers and autograd must know of it."""
    op = torch.library.custom_op(f"dpofast::{function.__name__.lstrip('_')}", function, mutates_args=())
    op.register_fake(fake)
    op.register_autograd(backward, setup_context=setup)
    return op


# linear_logprob


def _linear_logprob(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, bounds: Tensor | None,
    ignore_index: int | None, n_tokens: int, numbers: list[float], outputs: int, backend: str, schedule: str,
    sizes: list[int], group: str,
) -> _ResultsAndCache:  # fmt: skip
    """(logps, lse, each of the statistics, the dropped mass, cache); see `dpofast.linear_logprob`.

    ``numbers`` are temperature, logit_scale, softcap and the cut of a filter of gradients or 0, ``sizes`` are block,
    token_chunk and cache_bytes of the schedule. With ``bounds``, weight has rows ``bounds[rank]`` to
    ``bounds[rank + 1]`` of a head that the ranks of ``group`` hold together.
    """
    positions, y = _positions(labels, ignore_index, n_tokens)
    problem = Problem.of(hidden, weight, bias, positions, y, numbers)
    values, cache = _forward(problem, bounds, ignore_index, outputs, _Where(backend, schedule, sizes, group))
    results = _results(labels, wide_dtype(hidden.dtype, weight.dtype), outputs, positions, values)
    return (*results, _dropped_mass(labels, problem, values), cache)


def _dropped_mass(labels: Tensor, problem: Problem, values: dict[str, Tensor]) -> Tensor:
    """Of labels' shape where gradients are filtered; without elements where they are exact."""
    if not problem.grad_filter:
        return labels.new_empty(0, dtype=problem.wide)
    if not problem.n_tokens:
        return labels.new_zeros(labels.shape, dtype=problem.wide)
    return _in_place(labels, problem.positions, values["dropped_mass"], problem.wide)


class _Where(NamedTuple):
    """Who computes, how, and with whom: the last arguments of the ops."""

    backend: str
    schedule: str
    sizes: list[int]
    group: str


def _forward(
    problem: Problem, bounds: Tensor | None, ignore_index: int | None, outputs: int, where: _Where
) -> tuple[dict[str, Tensor], Tensor]:
    """What the backend makes of the tokens that count, [N], and the cache."""
    check_range(problem.labels, problem.n_vocab if bounds is None else int(bounds[-1]), ignore_index)
    engine, how, names = registry.get(where.backend), Schedule.of(where.schedule, where.sizes), wanted(outputs)
    cache = engine.cache(how.cache_bytes, problem.hidden.device)
    if not problem.n_tokens:
        return {}, cache
    if bounds is None:
        return engine.forward(problem, how, names, cache), cache
    part = distributed.slice_of_head(problem, bounds, where.group)
    stats = engine.fold(part, how, names) if part.n_vocab else None
    return distributed.finish(stats, problem, bounds, where.group, names), cache


def _fake_linear_logprob(
    hidden, weight, bias, labels, bounds, ignore_index, n_tokens, numbers, outputs, backend, schedule, sizes, group
):
    results = _empty_results(labels, wide_dtype(hidden.dtype, weight.dtype), outputs)
    dropped = labels.new_empty(labels.shape if numbers[3] else 0, dtype=results[0].dtype)
    return (*results, dropped, hidden.new_empty(sizes[2], dtype=torch.uint8))


def _linear_logprob_backward(
    incoming: list[Tensor | None], operands: list[Tensor | None], saved: list[Tensor], needs: list[bool],
    ignore_index: int | None, n_tokens: int, numbers: list[float], backend: str, schedule: str, sizes: list[int],
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden, weight and bias; those that ``needs`` does not ask for have no elements.

    ``incoming`` are the gradients of logps and entropy; ``operands`` hidden, weight, bias, labels and bounds;
    ``saved`` logps, lse, entropy and cache. With bounds, d hidden is the whole of it, on every rank.
    """
    hidden, weight, bias, labels, bounds = operands
    positions, y = _positions(labels, ignore_index, n_tokens)
    problem = Problem.of(hidden, weight, bias, positions, y, numbers)
    held = Saved(*_pick(labels, positions, saved[:3]), saved[3])
    arriving = OutputGrads(*_pick(labels, positions, incoming))
    where = _Where(backend, schedule, sizes, group)
    return _gradients(problem, bounds, held, arriving, needs, labels.numel(), where)


def _gradients(
    problem: Problem, bounds: Tensor | None, saved: Saved, incoming: OutputGrads, needs: list[bool], n_labels: int,
    where: _Where,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What `_linear_logprob_backward` returns, from the tokens that count among ``n_labels``."""
    hidden, weight, bias, positions = problem[:4]
    engine, how = registry.get(where.backend), Schedule.of(where.schedule, where.sizes)
    grads = _empty_grads(hidden, weight, bias, [needs[0], False, needs[2]])
    if needs[1]:
        grads[1] = engine.grad_weight(weight)
    if not positions.numel() or all(x is None for x in incoming):
        return tuple(g.zero_() for g in grads)
    into = InputGrads(*(g if need else None for g, need in zip(grads, needs)))
    if needs[0] and positions.numel() < n_labels:
        grads[0].zero_()
    if bounds is None:
        engine.backward(problem, how, saved, incoming, into)
        return tuple(grads)
    # The ranks' shares of d hidden travel: those of tokens that count, before they are rounded.
    picked = take(hidden, positions)
    everywhere = torch.arange(positions.numel(), device=positions.device)
    part = distributed.slice_of_head(problem._replace(hidden=picked, positions=everywhere), bounds, where.group)
    share = picked.new_zeros(picked.shape, dtype=problem.wide) if needs[0] else None
    if part.n_vocab:
        engine.backward(part, how, saved, incoming, into._replace(hidden=share))
    if share is not None:
        distributed.add_up(share, where.group)
        grads[0].view(-1, share.shape[-1])[positions] = share.to(hidden.dtype)
    return tuple(grads)


def _empty_grads(hidden, weight, bias, needs) -> list[Tensor]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    like = (hidden, weight, weight if bias is None else bias)
    return [x.new_empty(shape if need else (0,)) for x, shape, need in zip(like, shapes, needs)]


def _fake_linear_logprob_backward(incoming, operands, saved, needs, *_):
    return tuple(_empty_grads(*operands[:3], needs))


def _setup(ctx, inputs, output):
    *operands, ignore_index, n_tokens, numbers, _, backend, schedule, sizes, group = inputs
    logps, lse, entropy, *_, cache = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands, logps, lse, entropy, cache)
    ctx.options = ignore_index, n_tokens, numbers, backend, schedule, sizes, group


def _backward(ctx, grad_logps, _lse, grad_entropy, *_):
    *operands, logps, lse, entropy, cache = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    saved = [logps, lse, entropy, cache]
    grads = linear_logprob_backward([grad_logps, grad_entropy], operands, saved, needs, *ctx.options)
    return (*(g if need else None for g, need in zip(grads, needs)), *(None,) * 10)


linear_logprob = _register(_linear_logprob, _fake_linear_logprob, _backward, _setup)
linear_logprob_backward = _register(_linear_logprob_backward, _fake_linear_logprob_backward, _no_second_derivative)


class _LinearLogprob(torch.autograd.Function):
    """`linear_logprob` without PyTorch's dispatcher, whose way to a Python op is longer than a small head takes.

    What it saves stays packed: only what was asked for travels to the shape of labels.
    """

    @staticmethod
    def forward(ctx, positions, *inputs):
        hidden, weight, bias, labels, bounds, ignore_index, n_tokens, numbers, outputs, *where = inputs
        positions, y = _packed(labels, ignore_index, n_tokens, positions)
        problem = Problem.of(hidden, weight, bias, positions, y, numbers)
        values, cache = _forward(problem, bounds, ignore_index, outputs, _Where(*where))
        results = _unpacked(labels, wide_dtype(hidden.dtype, weight.dtype), outputs, positions, values)
        results = (*results, _dropped_mass(labels, problem, values))
        ctx.set_materialize_grads(False)
        wide = problem.wide  # what is merged over ranks comes in double
        packed = (values[name].to(wide) if name in values else None for name in ("logps", "lse", "entropy"))
        ctx.save_for_backward(hidden, weight, bias, labels, bounds, positions, y, results[0], *packed, cache)
        ctx.options = ignore_index, n_tokens, numbers, *where
        ctx.mark_non_differentiable(*(x for x in (results[1], *results[3:]) if x is not None))
        return results

    @staticmethod
    def backward(ctx, grad_logps, _lse, grad_entropy, *_):
        hidden, weight, bias, labels, bounds, positions, y, result, *packed, cache = ctx.saved_tensors
        _, _, numbers, *where = ctx.options
        needs, incoming = list(ctx.needs_input_grad[1:4]), [grad_logps, grad_entropy]
        if torch.is_grad_enabled() or _is_observed(hidden):
            # With create_graph=True the op is on the new graph, and refuses to be differentiated there.
            saved = _seen(labels, positions, result, packed)
            operands = [hidden, weight, bias, labels, bounds]
            grads = linear_logprob_backward(incoming, operands, [*saved, cache], needs, *ctx.options)
        else:
            problem = Problem.of(hidden, weight, bias, positions, y, numbers)
            arriving = OutputGrads(*_pick(labels, positions, incoming))
            grads = _gradients(problem, bounds, Saved(*packed, cache), arriving, needs, labels.numel(), _Where(*where))
        return (None, *(g if need else None for g, need in zip(grads, needs)), *(None,) * 10)


def _seen(labels: Tensor, positions: Tensor, result: Tensor, packed: list[Tensor | None]) -> list[Tensor]:
    """Logps, lse and entropy [*], which the registered backward takes, of a forward that saved them packed."""
    # PyTorch asks lists without None whether they need gradients: not the operands, but this one, for its first entry.
    return [result] + [
        labels.new_empty(0, dtype=result.dtype) if x is None else _in_place(labels, positions, x, x.dtype)
        for x in packed[1:]
    ]


def _packed(labels: Tensor, ignore_index: int | None, n_tokens: int, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """`_positions`, where somebody may have found them already."""
    if positions is None:
        return _positions(labels, ignore_index, n_tokens)
    flat = labels.reshape(-1).contiguous()
    return positions, flat if positions.numel() == flat.numel() else flat[positions]


def _unpacked(
    labels: Tensor, dtype: torch.dtype, outputs: int, positions: Tensor, values: dict[str, Tensor]
) -> tuple[Tensor | None, ...]:
    """`_results` for callers who look at those they asked for only: the others are None, and so is the lse."""
    if not positions.numel():
        return tuple(_empty_results(labels, dtype, outputs))
    return tuple(
        _in_place(labels, positions, values[name], output_dtype(name, dtype))
        if name in values and name != "lse"
        else None
        for name in ("logps", "lse", *STATISTICS)
    )


# Without the look for transforms of torch.func that `Function.apply` begins with: `_is_observed` has looked.
_apply_linear_logprob = super(torch.autograd.Function, _LinearLogprob).apply


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether there may be no numbers: under a compiler, tracer, dispatch mode or transform, or in a kind of tensor."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
        or any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors if x is not None)
    )


def _is_observed(*tensors: Tensor | None) -> bool:
    """Whether somebody must see an op: what `is_traced` names, or a profiler."""
    return is_traced(*tensors) or torch.autograd._profiler_enabled()


def call_linear_logprob(positions: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None, *others):
    """`linear_logprob`, on the shortest way to the same results; ``positions`` of the labels that count, if known."""
    if _is_observed(hidden, weight, bias, others[0]):
        return linear_logprob(hidden, weight, bias, *others)[:-1]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias)):
        return _apply_linear_logprob(positions, hidden, weight, bias, *others)
    labels, bounds, ignore_index, n_tokens, numbers, outputs, *where = others
    positions, y = _packed(labels, ignore_index, n_tokens, positions)
    problem = Problem.of(hidden, weight, bias, positions, y, numbers)
    values, _ = _forward(problem, bounds, ignore_index, outputs, _Where(*where))
    results = _unpacked(labels, wide_dtype(hidden.dtype, weight.dtype), outputs, positions, values)
    return (*results, _dropped_mass(labels, problem, values))


# logprob


def _logprob(
    logits: Tensor, labels: Tensor, ignore_index: int | None, n_tokens: int, transform: list[float], outputs: int,
    backend: str,
) -> _Results:  # fmt: skip
    """(logps, lse, each of the statistics); see `dpofast.logprob`."""
    positions, y = _positions(labels, ignore_index, n_tokens)
    problem = LogitsProblem(logits, positions, y, Transform(*transform))
    values = _logits_forward(problem, ignore_index, outputs, backend)
    return tuple(_results(labels, wide_dtype(logits.dtype), outputs, positions, values))


def _logits_forward(problem: LogitsProblem, ignore_index: int | None, outputs: int, backend: str) -> dict[str, Tensor]:
    """What the backend makes of the tokens that count, [N]."""
    check_range(problem.labels, problem.n_vocab, ignore_index)
    return registry.get(backend).logits_forward(problem, wanted(outputs)) if problem.n_tokens else {}


def _fake_logprob(logits, labels, ignore_index, n_tokens, transform, outputs, backend):
    return tuple(_empty_results(labels, wide_dtype(logits.dtype), outputs))


def _fill_grad_logits(
    grad_logits: Tensor, problem: LogitsProblem, labels: Tensor, saved: Saved, incoming: OutputGrads,
    ignore_index: int | None, backend: str,
) -> None:  # fmt: skip
    n, n_others = problem.n_tokens, labels.numel() - problem.n_tokens
    if n:
        registry.get(backend).logits_backward(problem, saved, incoming, grad_logits)
    if n_others:
        others = _places(labels.reshape(-1) == ignore_index, n_others)
        if grad_logits.is_contiguous():
            grad_logits.view(-1, grad_logits.shape[-1]).index_fill_(0, others, 0)
        else:
            grad_logits[places(labels.shape, others)] = 0


def _logprob_backward(
    incoming: list[Tensor | None], logits: Tensor, labels: Tensor, saved: list[Tensor], ignore_index: int | None,
    n_tokens: int, transform: list[float], backend: str,
) -> Tensor:  # fmt: skip
    """The gradient of the logits, in new memory; ``saved`` are logps, lse and entropy."""
    grad = logits.new_empty(logits.shape)
    positions, y = _positions(labels, ignore_index, n_tokens)
    problem = LogitsProblem(logits, positions, y, Transform(*transform))
    held, arriving = Saved(*_pick(labels, positions, saved)), OutputGrads(*_pick(labels, positions, incoming))
    _fill_grad_logits(grad, problem, labels, held, arriving, ignore_index, backend)
    return grad


def _fake_logprob_backward(incoming, logits, *_):
    return logits.new_empty(logits.shape)


def _setup_logprob(ctx, inputs, output):
    logits, labels, *options, _, backend = inputs
    logps, lse, entropy, *_ = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, logps, lse, entropy)
    ctx.options = (*options, backend)


def _backward_logprob(ctx, grad_logps, _lse, grad_entropy, *_):
    if grad_logps is None and grad_entropy is None:
        return (None,) * 7
    logits, labels, *saved = ctx.saved_tensors
    return (logprob_backward([grad_logps, grad_entropy], logits, labels, saved, *ctx.options), *(None,) * 6)


logprob = _register(_logprob, _fake_logprob, _backward_logprob, _setup_logprob)
logprob_backward = _register(_logprob_backward, _fake_logprob_backward, _no_second_derivative)


class _Logprob(torch.autograd.Function):
    """`logprob` without PyTorch's dispatcher; as `_LinearLogprob`.

    With ``inplace`` its backward overwrites the logits with their gradient, and no second [*, V] buffer ever exists: an
    op that hands out its input's memory as its output could not be registered.
    """

    @staticmethod
    def forward(ctx, positions, inplace, *inputs):
        logits, labels, ignore_index, n_tokens, transform, outputs, backend = inputs
        positions, y = _packed(labels, ignore_index, n_tokens, positions)
        problem = LogitsProblem(logits, positions, y, Transform(*transform))
        values = _logits_forward(problem, ignore_index, outputs, backend)
        results = _unpacked(labels, wide_dtype(logits.dtype), outputs, positions, values)
        ctx.set_materialize_grads(False)
        packed = (values.get(name) for name in ("logps", "lse", "entropy"))
        ctx.save_for_backward(logits, labels, positions, y, results[0], *packed)
        ctx.options, ctx.inplace, ctx.overwritten = (ignore_index, n_tokens, transform, backend), inplace, False
        ctx.mark_non_differentiable(*(x for x in (results[1], *results[3:]) if x is not None))
        return results

    @staticmethod
    def backward(ctx, grad_logps, _lse, grad_entropy, *_):
        if ctx.inplace and torch.is_grad_enabled():
            raise RuntimeError(
                "dpofast.logprob(inplace_grad=True): second derivatives are not possible; call backward without "
                "create_graph=True, or pass inplace_grad=False"
            )
        if grad_logps is None and grad_entropy is None:
            return (None,) * 9
        if ctx.overwritten:
            raise RuntimeError("dpofast.logprob(inplace_grad=True): a second backward, but the logits are overwritten")
        logits, labels, positions, y, result, *packed = ctx.saved_tensors
        incoming, (ignore_index, _, transform, backend) = [grad_logps, grad_entropy], ctx.options
        if not ctx.inplace and (torch.is_grad_enabled() or _is_observed(logits)):
            saved = _seen(labels, positions, result, packed)
            return (None, None, logprob_backward(incoming, logits, labels, saved, *ctx.options), *(None,) * 6)
        ctx.overwritten = ctx.inplace
        grad = logits.detach() if ctx.inplace else logits.new_empty(logits.shape)
        if ctx.inplace:  # for whoever else keeps the logits: kernels write where PyTorch does not look
            torch.autograd.graph.increment_version(logits)
        problem = LogitsProblem(grad if ctx.inplace else logits, positions, y, Transform(*transform))
        arriving = OutputGrads(*_pick(labels, positions, incoming))
        _fill_grad_logits(grad, problem, labels, Saved(*packed), arriving, ignore_index, backend)
        return (None, None, grad, *(None,) * 6)


_apply_logprob = super(torch.autograd.Function, _Logprob).apply


def call_logprob(positions: Tensor | None, inplace: bool, logits: Tensor, *others):
    """`logprob`, on the shortest way to the same results; ``positions`` of the labels that count, if known."""
    if _is_observed(logits, others[0]):
        return _Logprob.apply(positions, True, logits, *others) if inplace else logprob(logits, *others)
    if torch.is_grad_enabled() and logits.requires_grad:
        return _apply_logprob(positions, inplace, logits, *others)
    labels, ignore_index, n_tokens, transform, outputs, backend = others
    positions, y = _packed(labels, ignore_index, n_tokens, positions)
    problem = LogitsProblem(logits, positions, y, Transform(*transform))
    values = _logits_forward(problem, ignore_index, outputs, backend)
    return _unpacked(labels, wide_dtype(logits.dtype), outputs, positions, values)


# sequence_dpo


def _sequence_dpo(
    logps: Tensor, labels: Tensor, cu_seqlens: Tensor | None, ref_logps: Tensor | None, beta: Tensor | None,
    margin: Tensor | None, weight: Tensor | None, ignore_index: int, loss_type: str, options: list[float],
    f_divergence: str, reduction: str, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, sums, lengths, coefficients) of `dpofast.backends.base.PairsProblem`: its losses, reduced, and the rest.

    The sums are of whole sequences, chosen and rejected ones, and the coefficients are those of the losses' mean.
    """
    problem = PairsProblem(
        logps, labels, cu_seqlens, ref_logps, beta, margin, weight, ignore_index, loss_type, options, f_divergence
    )
    losses, *others = registry.get(backend).sequence_dpo(problem)
    if reduction == "mean" and losses.numel():
        losses = losses.mean()
    elif reduction != "none":
        losses = losses.sum()
    return losses, *others


def _pairs(labels: Tensor, cu_seqlens: Tensor | None) -> int:
    return (labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1) // 2


def _fake_sequence_dpo(logps, labels, cu_seqlens, *others):
    pairs, reduction = _pairs(labels, cu_seqlens), others[-2]
    return (
        logps.new_empty(pairs if reduction == "none" else ()), logps.new_empty(2 * pairs),
        logps.new_empty(2 * pairs, dtype=torch.int64), logps.new_empty(logps.shape),
    )  # fmt: skip


def _sequence_dpo_backward(
    incoming: list[Tensor | None], logps: Tensor, labels: Tensor, cu_seqlens: Tensor | None, coefficients: Tensor,
    ignore_index: int, reduction: str,
) -> Tensor:  # fmt: skip
    """The gradient of logps, which only say whether it has one; ``incoming`` are those of loss and sums."""
    (of_loss, of_sums), grad = incoming, None
    if of_loss is not None:
        if reduction != "mean":
            of_loss = of_loss * _pairs(labels, cu_seqlens)
        if reduction == "none":
            of_loss = _per_token(of_loss.repeat(2), labels, cu_seqlens)
        grad = coefficients * of_loss
    if of_sums is not None:
        each = torch.where(labels != ignore_index, _per_token(of_sums, labels, cu_seqlens), 0.0)
        grad = each if grad is None else grad + each
    return torch.zeros_like(coefficients) if grad is None else grad


def _per_token(x: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """A number of each sequence, for each of its tokens."""
    if cu_seqlens is None:
        return x.unsqueeze(-1)
    return x.repeat_interleave(cu_seqlens.long().diff(), output_size=labels.shape[0])


def _fake_sequence_dpo_backward(incoming, logps, *_):
    return logps.new_empty(logps.shape)


def _setup_sequence_dpo(ctx, inputs, output):
    logps, labels, cu_seqlens, *_, reduction, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logps, labels, cu_seqlens, output[-1])
    ctx.options = inputs[7], reduction


def _sequence_dpo_grads(backward, ctx, incoming: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    if all(x is None for x in incoming):
        return (None,) * 13
    return (backward(incoming, *ctx.saved_tensors, *ctx.options), *(None,) * 12)


def _backward_sequence_dpo(ctx, of_loss, of_sums, *_):
    return _sequence_dpo_grads(sequence_dpo_backward, ctx, [of_loss, of_sums])


sequence_dpo = _register(_sequence_dpo, _fake_sequence_dpo, _backward_sequence_dpo, _setup_sequence_dpo)
sequence_dpo_backward = _register(_sequence_dpo_backward, _fake_sequence_dpo_backward, _no_second_derivative)


class _SequenceDPO(torch.autograd.Function):
    """`sequence_dpo` without PyTorch's dispatcher."""

    @staticmethod
    def forward(ctx, *inputs):
        results = _sequence_dpo(*inputs)
        _setup_sequence_dpo(ctx, inputs, results)
        ctx.mark_non_differentiable(*results[2:])
        return results

    @staticmethod
    def backward(ctx, of_loss, of_sums, *_):
        seen = torch.is_grad_enabled() or _is_observed(of_loss, of_sums)
        return _sequence_dpo_grads(sequence_dpo_backward if seen else _sequence_dpo_backward, ctx, [of_loss, of_sums])


_apply_sequence_dpo = super(torch.autograd.Function, _SequenceDPO).apply


def call_sequence_dpo(problem: PairsProblem, reduction: str, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, sums and lengths of `sequence_dpo` with labels, on the shortest way to them."""
    inputs = *problem, reduction, backend
    if _is_observed(*inputs[:7]):
        return sequence_dpo(*inputs)[:3]
    if torch.is_grad_enabled() and inputs[0].requires_grad:
        return _apply_sequence_dpo(*inputs)[:3]
    return _sequence_dpo(*inputs)[:3]
