"""A model in a wrapper (DistributedDataParallel, FSDP2, DeepSpeed): its numbers are computed where its head would be.

A sharded head is at hand in its own forward and backward only, and a wrapper learns from the logits' graph which
parameters a backward will reach, and when. So the results' graph begins behind the logits', as that of a loss of the
logits would, and the results' gradient travels through the logits; see `_Transfer`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpofast.integrations.models.head import Head, as_linear
from dpofast.integrations.models.kinds import expect_whole, unwrapped
from dpofast.integrations.models.probe import (
    HeadInputs,
    aux_loss_of,
    expect_once,
    known_logits,
    logits_of,
    more_than_a_transform,
    read_transform,
    run_with,
)

transforms: WeakKeyDictionary[nn.Module, tuple[float, float | None]] = WeakKeyDictionary()
"""Scale and softcap behind each head that has been met in a wrapper."""


def results_in_wrapper(
    model: nn.Module, head: Head, inputs: Mapping[str, Any], compute: Callable[[HeadInputs], Any]
) -> Any:
    """The named tuple that ``compute`` returns in the head's place, with the model's own ``aux_loss`` in it."""
    transform = _transform_behind(model, head, inputs)
    transfer = _Transfer()

    def stand_in(hidden: Tensor) -> Tensor:
        expect_whole(head.module, head.linear.weight)
        results = compute(HeadInputs(*as_linear(head, hidden), *transform))
        return transfer.ticket(known_logits(head.linear.weight), results)

    passage = _Passage(model, head.module, transform[0])
    output = passage.run(inputs, stand_in)
    found = passage.transform()
    if found != transform:
        del transforms[head.module]
        raise ValueError(
            f"model: scale and softcap of the logits are {found} and were {transform} at the call before; they may "
            "not change under a sharded head"
        )
    return transfer.claim(logits_of(output))._replace(aux_loss=aux_loss_of(output))


def _transform_behind(model: nn.Module, head: Head, inputs: Mapping[str, Any]) -> tuple[float, float | None]:
    """Scale and softcap, which a head's place has to know before there are logits; takes a forward, the first time."""

    def stand_in(_hidden: Tensor) -> Tensor:
        expect_whole(head.module, head.linear.weight)
        return known_logits(head.linear.weight)

    if head.module not in transforms:
        passage = _Passage(unwrapped(model), head.module, 1.0)
        with torch.no_grad(), _same_random_numbers():
            passage.run(inputs, stand_in)
        transforms[head.module] = passage.transform()
    return transforms[head.module]


def _same_random_numbers():
    """A context in which random numbers are drawn for nothing."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None or device.type == "mps":  # which has no such wrappers, and no fork either
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[torch.accelerator.current_device_index()], device_type=device.type)


# The way of a gradient


class _Transfer:
    """Takes results out of the head's place, and brings their gradient back to it through the logits.

    The forward leaves the results here, and lets a `_Ticket` through the model and its wrappers as its logits. Outside,
    `_Claim` gives out the results for these. The backward goes the other way: the claim leaves the gradient of the
    results here, and the ticket fetches it.
    """

    def __init__(self) -> None:
        self.results: Any = None
        self.grads: tuple[Tensor | None, ...] = ()

    def ticket(self, logits: Tensor, results: Any) -> Tensor:
        """``logits``, in whose place ``results``, a named tuple, wait for their gradient."""
        self.results = results
        return _Ticket.apply(self, logits, *(x for x in results if _is_waiting(x)))

    def claim(self, logits: Tensor) -> Any:
        """The results, whose gradient goes through ``logits``, which were made of the ticket."""
        results, self.results = self.results, None
        values = [None if x is None else x.detach() for x in results]
        where = [i for i, x in enumerate(results) if _is_waiting(x)]
        if where:
            for i, x in zip(where, _Claim.apply(self, logits, *(values[i] for i in where))):
                values[i] = x
        return type(results)(*values)


def _is_waiting(result: Tensor | None) -> bool:
    return result is not None and result.requires_grad


class _Ticket(torch.autograd.Function):
    """Known logits, whose gradient is only a factor of the one that waits in ``transfer`` for ``results``.

    DistributedDataParallel finds every parameter in its graph. FSDP2 and ZeRO-3 gather a weight when the gradient of
    its module's output arrives, and the gradient of what was computed there waits for that. A DeepSpeed engine divides
    the gradient of its outputs by the number of accumulated batches, and does so here: the gradient of the first logit
    is the factor.
    """

    @staticmethod
    def forward(ctx, transfer: _Transfer, probe: Tensor, *results: Tensor) -> Tensor:
        ctx.transfer = transfer
        return probe.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        factor = grad.flatten()[0]
        return (None, None, *(g if g is None else g * factor.to(g.dtype) for g in ctx.transfer.grads))


class _Claim(torch.autograd.Function):
    """``results``, whose gradient goes into ``transfer``; the ticket, in ``logits``, gets 1 for a factor."""

    @staticmethod
    def forward(ctx, transfer: _Transfer, logits: Tensor, *results: Tensor) -> tuple[Tensor, ...]:
        ctx.transfer = transfer
        ctx.shape, ctx.options = logits.shape, {"dtype": logits.dtype, "device": logits.device}
        ctx.set_materialize_grads(False)
        return tuple(result.clone() for result in results)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None):
        ctx.transfer.grads = grads
        ticket = torch.zeros(ctx.shape, **ctx.options)
        ticket.view(-1)[0] = 1
        return (None, ticket, *(None for _ in grads))


# The way of the logits


class _Passage:
    """One forward with a stand-in for the head, watched at each place that its logits come by.

    FSDP2 rounds what a module returns (`MixedPrecisionPolicy.output_dtype`), the head and the model alike; between the
    two the logits here are exact. ``scale`` is what the model multiplies them by.

    Attributes:
        probes: what the stand-in returned.
        entered: the same, exact, as the model got it from the head's wrapper.
        inner: what the model made of it, before the model's own wrapper.
    """

    def __init__(self, model: nn.Module, head: nn.Module, scale: float) -> None:
        self.model, self.head, self.scale = model, head, scale
        self.probes: list[Tensor] = []
        self.entered: list[Tensor] = []
        self.inner: list[Tensor] = []

    def run(self, inputs: Mapping[str, Any], stand_in: Callable[[Tensor], Tensor]) -> Any:
        """The output of ``model(**inputs)``; an error where its logits are not the stand-in's, transformed."""

        def noted(hidden: Tensor) -> Tensor:
            self.probes.append(stand_in(hidden))
            return self.probes[-1]

        owner = _owner_of_head(unwrapped(self.model))
        hooks = (
            self.head.register_forward_hook(self._enter),
            owner.register_forward_hook(self._leave, prepend=True),
        )
        try:
            output = run_with(self.model, self.head, inputs, noted)
        finally:
            for hook in hooks:
                hook.remove()
        expect_once(self.model, len(self.probes))
        if len(self.entered) != 1 or len(self.inner) != 1:
            raise ValueError(
                f"model: {type(self.model).__name__} does not run the hooks of its head and of "
                f"{type(owner).__name__}; compile its layers and not the whole of it"
            )
        self._check(logits_of(output))
        return output

    def transform(self) -> tuple[float, float | None]:
        """The scale and the softcap, once the model has run."""
        return read_transform(self.probes[0].detach(), self.inner[0], type(self.model).__name__)

    def _enter(self, _head: nn.Module, _args: Any, hooked: Any) -> Tensor:
        expect_once(self.model, len(self.probes))
        if not _is_rounded(hooked, self.probes[0]):
            raise self._refusal("a hook changes what the head returns")
        self.entered.append(_Exact.apply(hooked, self.probes[0].detach(), self.scale))
        return self.entered[-1]

    def _leave(self, _owner: nn.Module, _args: Any, output: Any) -> None:
        self.inner.append(logits_of(output))

    def _check(self, outer: Tensor) -> None:
        """Errors for logits that have other numbers outside the wrappers, or gradients that go another way."""
        (entered,), (inner,) = self.entered, self.inner
        if not _is_rounded(outer, inner):
            raise self._refusal("after its own forward")
        needed = entered.requires_grad
        if needed != inner.requires_grad or needed != outer.requires_grad:
            raise self._refusal("with something that has a gradient" if not needed else "without a graph")
        if needed and not _comes_from(entered.grad_fn, inner.grad_fn):
            raise self._refusal("with something that has a gradient")

    def _refusal(self, how: str) -> ValueError:
        return more_than_a_transform(type(self.model).__name__, how)


class _Exact(torch.autograd.Function):
    """``probe`` again, where the wrapper of the head has rounded it; what comes next scales logits by ``scale``."""

    @staticmethod
    def forward(ctx, rounded: Tensor, probe: Tensor, scale: float) -> Tensor:
        ctx.dtype, ctx.scale = rounded.dtype, scale
        return probe.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return (grad / ctx.scale).to(ctx.dtype), None, None


def _owner_of_head(bare: nn.Module) -> nn.Module:
    """The innermost of the models that call the head their own, whose output is what the head's logits became."""
    head = bare.get_output_embeddings()
    owners = [m for m in bare.modules() if hasattr(type(m), "get_output_embeddings")]
    return next((m for m in reversed(owners) if m.get_output_embeddings() is head), bare)


def _is_rounded(found: Any, exact: Tensor) -> bool:
    """Whether ``found`` is ``exact``, rounded to its dtype if at all."""
    return isinstance(found, Tensor) and found.shape == exact.shape and torch.equal(found, exact.to(found.dtype))


def _comes_from(source: torch.autograd.graph.Node, node: torch.autograd.graph.Node) -> bool:
    """Whether nothing that has a gradient, but ``source``, leads to ``node``."""
    waiting, found = [node], False
    while waiting:
        node = waiting.pop()
        if node is source:
            found = True
        elif not node.next_functions:
            return False
        else:
            waiting.extend(before for before, _ in node.next_functions if before is not None)
    return found
