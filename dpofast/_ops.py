"""The registered ops: schema, fake kernel, autograd, and the hand-over to a backend. Arguments were checked.

``torch.compile(fullgraph=True)`` sees each op as opaque, with static shapes: what depends on the number of
completion tokens stays inside, in the cache buffer, whose size in bytes is an argument.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from dpofast import _backend
from dpofast.backends._tensors import STATISTICS, wide_dtype
from dpofast.backends.tiled import TiledBackend
from dpofast.backends.torch import TorchPasses
from dpofast.plan import Choice


def _module(backend: str):
    """What runs an exact backend, and the instruction set that it is told."""
    if backend in _backend.added:
        return _backend.added[backend], ""
    name, _, isa = backend.partition(":")
    if name == "cpu":
        from dpofast.backends import cpu

        return cpu, isa
    return _tiled(name), ""


@functools.cache
def _tiled(name: str) -> TiledBackend:
    if name == "cuda":
        from dpofast.backends.cuda import CudaPasses

        return TiledBackend(CudaPasses(_backend._C))
    if name == "triton":
        from dpofast.backends.triton import TritonBackend, TritonPasses

        return TritonBackend(TritonPasses())
    return TiledBackend(TorchPasses())


def wanted(outputs: int) -> tuple[str, ...]:
    """The statistics that a bit mask asks for."""
    return tuple(name for i, name in enumerate(STATISTICS) if outputs >> i & 1)


def _rows(labels: Tensor, ignore_index: int | None, n_tokens: int) -> tuple[Tensor, Tensor]:
    """Positions of the labels that count, and these labels; waits for the device only if ``n_tokens`` is -1, unknown"""
    flat = labels.reshape(-1).long().contiguous()
    positions = torch.arange(flat.numel(), device=flat.device)
    if ignore_index is None or n_tokens == flat.numel():
        return positions, flat
    if n_tokens < 0:
        rows = torch.nonzero(flat != ignore_index).squeeze(-1)
    else:  # each position goes to its place among those that count, the others to a place too many
        counts = flat != ignore_index
        place = torch.where(counts, counts.cumsum(0) - 1, n_tokens)
        rows = torch.empty(n_tokens + 1, dtype=torch.int64, device=flat.device).scatter_(0, place, positions)[:-1]
    return rows, flat[rows]


def _checked_rows(labels: Tensor, ignore_index: int | None, n_tokens: int, n_vocab: int) -> tuple[Tensor, Tensor]:
    """`_rows` of a forward; their backward need not look again."""
    rows, y = _rows(labels, ignore_index, n_tokens)
    if y.numel() and (y.device.type == "cpu" or os.environ.get("DPOFAST_CHECK_LABELS") == "1"):
        low, high = map(int, torch.aminmax(y))
        if low < 0 or high >= n_vocab:
            bad = low if low < 0 else high
            raise ValueError(
                f"labels: got {bad}, expected values in [0, {n_vocab}) (the rows of weight) or "
                f"ignore_index={ignore_index}"
            )
    return rows, y


def _empty_results(labels: Tensor, dtype: torch.dtype, outputs: int) -> list[Tensor]:
    """logps, lse in its two parts, then the four statistics: labels' shape where wanted, no elements where not."""
    names = wanted(outputs)
    results = [labels.new_zeros(shape, dtype=dtype) for shape in (labels.shape, (*labels.shape, 2))]
    for name in STATISTICS:
        kind = torch.bool if name == "is_top1" else dtype
        results.append(labels.new_zeros(labels.shape, dtype=kind) if name in names else labels.new_empty(0, dtype=kind))
    return results


def _results(labels: Tensor, dtype: torch.dtype, outputs: int, rows: Tensor, values: dict[str, Tensor]) -> list[Tensor]:
    """`_empty_results` with the values of ``rows``, which may be none, in their places."""
    if rows.numel() < labels.numel() or not values:
        results = _empty_results(labels, dtype, outputs)
        for name, out in zip(("logps", "lse", *STATISTICS), results):
            if name in values:
                out.view(-1, *values[name].shape[1:])[rows] = values[name].to(out.dtype)
        return results
    results = []
    for name in ("logps", "lse", *STATISTICS):
        kind = torch.bool if name == "is_top1" else dtype
        if name in values:
            x = values[name].to(kind)
            results.append((x if labels.ndim == 1 else x.reshape((*labels.shape, *x.shape[1:]))).contiguous())
        else:
            results.append(labels.new_empty(0, dtype=kind))
    return results


def _gather(rows: Tensor, labels: Tensor, **full: Tensor | None) -> dict[str, Tensor]:
    present = {name: x for name, x in full.items() if x is not None and x.numel()}
    if labels.ndim != 1:
        present = {name: x.reshape(labels.numel(), *x.shape[labels.ndim :]) for name, x in present.items()}
    flat = {name: x.contiguous() for name, x in present.items()}
    return flat if rows.numel() == labels.numel() else {name: x[rows] for name, x in flat.items()}


def _linear_logprob(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int | None, n_tokens: int,
    temperature: float, logit_scale: float, softcap: float, outputs: int, backend: str, schedule: str, block: int,
    token_chunk: int, cache_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(logps, lse, entropy, log_sum_sq_probs, mean_logits, is_top1, cache); see `dpofast.linear_logprob`."""
    rows, y = _checked_rows(labels, ignore_index, n_tokens, weight.shape[0])
    module, isa = _module(backend)
    cache, values = module.cache_tensor(cache_bytes, hidden.device), {}
    if rows.numel():
        choice = Choice(schedule, block, token_chunk, cache_bytes, 0, 0.0)
        transform = (temperature, logit_scale, softcap)
        values = module.forward(isa, hidden, weight, bias, rows, y, transform, wanted(outputs), choice, cache)
    return (*_results(labels, wide_dtype(hidden.dtype, weight.dtype), outputs, rows, values), cache)


linear_logprob = torch.library.custom_op("dpofast::linear_logprob", _linear_logprob, mutates_args=())


@linear_logprob.register_fake
def _(hidden, weight, bias, labels, ignore_index, n_tokens, temperature, logit_scale, softcap, outputs, backend,
      schedule, block, token_chunk, cache_bytes):  # fmt: skip
    results = _empty_results(labels, wide_dtype(hidden.dtype, weight.dtype), outputs)
    return (*results, hidden.new_empty(cache_bytes, dtype=torch.uint8))


def _linear_logprob_backward(
    grad_logps: Tensor | None, grad_entropy: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None,
    labels: Tensor, logps: Tensor, lse: Tensor, entropy: Tensor, cache: Tensor, needs: list[bool],
    ignore_index: int | None, n_tokens: int, temperature: float, logit_scale: float, softcap: float, backend: str,
    schedule: str, block: int, token_chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden, weight and bias; those that ``needs`` does not ask for have no elements."""
    module, isa = _module(backend)
    grads = _empty_grads(hidden, weight, bias, [needs[0], False, needs[2]])
    if needs[1]:
        grads[1] = module.grad_weight_tensor(weight)
    rows, y = _rows(labels, ignore_index, n_tokens)
    if not rows.numel() or (grad_logps is None and grad_entropy is None):
        return tuple(g.zero_() for g in grads)
    choice = Choice(schedule, block, token_chunk, cache.numel(), 0, 0.0)
    if needs[0] and rows.numel() < labels.numel():
        grads[0].zero_()
    packed = _gather(rows, labels, logps=logps, lse=lse, entropy=entropy)
    incoming = _gather(rows, labels, logps=grad_logps, entropy=grad_entropy)
    module.backward(
        isa, hidden, weight, bias, rows, y, (temperature, logit_scale, softcap), choice, cache, packed,
        incoming.get("logps"), incoming.get("entropy"), *(g if need else None for g, need in zip(grads, needs)),
    )  # fmt: skip
    return tuple(grads)


linear_logprob_backward = torch.library.custom_op(
    "dpofast::linear_logprob_backward", _linear_logprob_backward, mutates_args=()
)


def _empty_grads(hidden, weight, bias, needs) -> list[Tensor]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    like = (hidden, weight, weight if bias is None else bias)
    return [x.new_empty(shape if need else (0,)) for x, shape, need in zip(like, shapes, needs)]


@linear_logprob_backward.register_fake
def _(grad_logps, grad_entropy, hidden, weight, bias, labels, logps, lse, entropy, cache, needs, ignore_index,
      n_tokens, temperature, logit_scale, softcap, backend, schedule, block, token_chunk):  # fmt: skip
    return tuple(_empty_grads(hidden, weight, bias, needs))


def _setup(ctx, inputs, output):
    hidden, weight, bias, labels, *shared = inputs[:9]
    _, backend, schedule, block, token_chunk, _ = inputs[9:]
    logps, lse, entropy, *_, cache = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, labels, logps, lse, entropy, cache)
    ctx.options = (*shared, backend, schedule, block, token_chunk)


def _backward(ctx, grad_logps, _lse, grad_entropy, *_):
    hidden, weight, bias, labels, logps, lse, entropy, cache = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    # With create_graph=True the op is on the new graph, and refuses to be differentiated there.
    backward = linear_logprob_backward if torch.is_grad_enabled() or _is_observed(hidden) else _linear_logprob_backward
    grads = backward(
        grad_logps, grad_entropy, hidden, weight, bias, labels, logps, lse, entropy, cache, needs, *ctx.options
    )
    return (*(g if need else None for g, need in zip(grads, needs)), *(None,) * 12)


linear_logprob.register_autograd(_backward, setup_context=_setup)


class _LinearLogprob(torch.autograd.Function):
    """`linear_logprob` without PyTorch's dispatcher, whose way to a Python op is longer than a small head takes."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _linear_logprob(*inputs)
        _setup(ctx, inputs, output)
        _, lse, _, *others = output
        ctx.mark_non_differentiable(lse, *others)
        return output

    backward = staticmethod(_backward)


# Without the look for transforms of torch.func that `Function.apply` begins with: `_is_observed` has looked.
_apply_linear_logprob = super(torch.autograd.Function, _LinearLogprob).apply


def _is_observed(*tensors: Tensor | None) -> bool:
    """Whether somebody must see an op: a compiler, tracer, profiler, dispatch mode, transform or kind of tensor."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
        or torch.autograd._profiler_enabled()
        or any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors if x is not None)
    )


def call_linear_logprob(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *options):
    """`linear_logprob`, on the shortest way to the same results."""
    if _is_observed(hidden, weight, bias, labels):
        return linear_logprob(hidden, weight, bias, labels, *options)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias)):
        return _apply_linear_logprob(hidden, weight, bias, labels, *options)
    return _linear_logprob(hidden, weight, bias, labels, *options)


@torch.library.custom_op("dpofast::logprob", mutates_args=())
def logprob(
    logits: Tensor, labels: Tensor, ignore_index: int | None, n_tokens: int, temperature: float, logit_scale: float,
    softcap: float, outputs: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(logps, lse, entropy, log_sum_sq_probs, mean_logits, is_top1); see `dpofast.logprob`."""
    rows, y = _checked_rows(labels, ignore_index, n_tokens, logits.shape[-1])
    values = {}
    if rows.numel():
        module, isa = _module(backend)
        values = module.rows_forward(isa, logits, rows, y, (temperature, logit_scale, softcap), wanted(outputs))
    return tuple(_results(labels, wide_dtype(logits.dtype), outputs, rows, values))


@logprob.register_fake
def _(logits, labels, ignore_index, n_tokens, temperature, logit_scale, softcap, outputs, backend):
    return tuple(_empty_results(labels, wide_dtype(logits.dtype), outputs))


def _fill_grad_logits(
    grad_logits,
    grad_logps,
    grad_entropy,
    logits,
    labels,
    logps,
    lse,
    entropy,
    ignore_index,
    n_tokens,
    transform,
    backend,
) -> None:
    rows, y = _rows(labels, ignore_index, n_tokens)
    module, isa = _module(backend)
    packed = _gather(rows, labels, logps=logps, lse=lse, entropy=entropy)
    incoming = _gather(rows, labels, logps=grad_logps, entropy=grad_entropy)
    if rows.numel():
        module.rows_backward(
            isa, logits, rows, y, transform, packed, incoming.get("logps"), incoming.get("entropy"), grad_logits
        )
    if ignore_index is not None:
        grad_logits.masked_fill_((labels == ignore_index).unsqueeze(-1), 0)


@torch.library.custom_op("dpofast::logprob_backward", mutates_args=())
def logprob_backward(
    grad_logps: Tensor | None, grad_entropy: Tensor | None, logits: Tensor, labels: Tensor, logps: Tensor, lse: Tensor,
    entropy: Tensor, ignore_index: int | None, n_tokens: int, temperature: float, logit_scale: float, softcap: float,
    backend: str,
) -> Tensor:  # fmt: skip
    """The gradient of the logits, in new memory."""
    grad = logits.new_empty(logits.shape)
    _fill_grad_logits(
        grad, grad_logps, grad_entropy, logits, labels, logps, lse, entropy, ignore_index, n_tokens,
        (temperature, logit_scale, softcap), backend,
    )  # fmt: skip
    return grad


@logprob_backward.register_fake
def _(grad_logps, grad_entropy, logits, labels, logps, lse, entropy, ignore_index, n_tokens, temperature, logit_scale,
      softcap, backend):  # fmt: skip
    return logits.new_empty(logits.shape)


def _setup_logprob(ctx, inputs, output):
    logits, labels, *options, _, backend = inputs
    logps, lse, entropy, *_ = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, logps, lse, entropy)
    ctx.options = (*options, backend)


def _backward_logprob(ctx, grad_logps, _lse, grad_entropy, *_):
    if grad_logps is None and grad_entropy is None:
        return (None,) * 9
    return (logprob_backward(grad_logps, grad_entropy, *ctx.saved_tensors, *ctx.options), *(None,) * 8)


logprob.register_autograd(_backward_logprob, setup_context=_setup_logprob)


class InplaceLogprob(torch.autograd.Function):
    """`logprob` whose backward overwrites the logits with their gradient: no second [*, V] buffer ever exists.

    Eager only, since an op that hands out its input's memory as its output cannot be registered.
    """

    @staticmethod
    def forward(ctx, logits, labels, ignore_index, n_tokens, temperature, logit_scale, softcap, outputs, backend):
        results = logprob(logits, labels, ignore_index, n_tokens, temperature, logit_scale, softcap, outputs, backend)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, labels, *results[:3])
        ctx.options = (ignore_index, n_tokens, (temperature, logit_scale, softcap), backend)
        ctx.mark_non_differentiable(results[1], *results[3:])
        ctx.overwritten = False
        return results

    @staticmethod
    def backward(ctx, grad_logps, _lse, grad_entropy, *_):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "dpofast.logprob(inplace_grad=True): second derivatives are not possible; call backward without "
                "create_graph=True, or pass inplace_grad=False"
            )
        if grad_logps is None and grad_entropy is None:
            return (None,) * 9
        if ctx.overwritten:
            raise RuntimeError("dpofast.logprob(inplace_grad=True): a second backward, but the logits are overwritten")
        ctx.overwritten = True
        logits, labels, logps, lse, entropy = ctx.saved_tensors
        grad = logits.detach()
        _fill_grad_logits(grad, grad_logps, grad_entropy, grad, labels, logps, lse, entropy, *ctx.options)
        return (grad, *(None,) * 8)


def _no_second_derivative(ctx, *_):
    raise RuntimeError(
        "dpofast: second derivatives of log-probs are not implemented; call backward without create_graph=True, "
        "or use dpofast.reference for a problem small enough"
    )


for _op in (linear_logprob_backward, logprob_backward):
    _op.register_autograd(_no_second_derivative)
