"""A model is run with its head standing aside; what it makes of known logits says what it does to its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpofast.integrations.models.head import as_linear, find
from dpofast.integrations.models.kinds import is_sharded
from dpofast.integrations.models.positions import watching_positions


class HeadInputs(NamedTuple):
    """What `linear_logprob` needs of a model and a batch: ``z = softcap tanh(logit_scale (h W^T + b) / softcap)``.

    Attributes:
        hidden, weight, bias: as the model's head multiplies them: in the autocast dtype where the head runs under
            autocast; with an adapter, of its effective weight.
        logit_scale, softcap: the transform.
        aux_loss: the loss of a mixture's routers, where the model returns one; add it with its coefficient.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    aux_loss: Tensor | None = None


def head_inputs(model: nn.Module, **inputs: Any) -> HeadInputs:
    """Run ``model(**inputs)`` up to its head.

    Hooks, adapters and checkpointing all act as ever, since it is the model's own forward that runs.

    Args:
        model: as in `find_head`, but not sharded: an FSDP2 or ZeRO-3 head is gone when the forward is over.
            DistributedDataParallel without ``find_unused_parameters``, which looks for the parameters in the graph of
            the logits. `model_logprob` and `model_dpo_loss` know neither limit.
        inputs: what the model takes: input_ids, attention_mask, ...; no labels. ``use_cache`` is False if not given.

    Returns:
        `HeadInputs`, hidden ``[*, T, H]`` with its graph.

    Raises:
        ValueError: as `find_head`; a model that does not call its head once, or does something else to its logits.
    """
    head = find(model)
    if is_sharded(model, head.linear):
        raise ValueError(
            "model: is sharded, and its head is gone when the forward is over; use model_logprob or model_dpo_loss"
        )
    seen: list[tuple[Tensor, Tensor, Tensor | None]] = []
    probe = known_logits(head.linear.weight)

    def note(hidden: Tensor) -> Tensor:
        seen.append(as_linear(head, hidden))  # here, for what is around the head (autocast) is gone afterwards
        return probe

    output = run_with(model, head.module, inputs, note)
    expect_once(model, len(seen))
    logits = logits_of(output)
    logit_scale, softcap = read_transform(probe, logits, type(model).__name__)
    if logits.requires_grad:
        raise more_than_a_transform(type(model).__name__, "with something that has a gradient")
    return HeadInputs(*seen[0], logit_scale, softcap, aux_loss_of(output))


# A run without the head


def run_with(model: nn.Module, head: nn.Module, inputs: Mapping[str, Any], stand_in: Callable[[Tensor], Tensor]) -> Any:
    """The output of ``model(**inputs)``, where ``stand_in`` does what ``head`` would do."""
    if "labels" in inputs:
        raise ValueError("labels: the model would compute a loss of its own from logits; pass them beside the inputs")
    with _standing_aside(head, stand_in), watching_positions(model, inputs):
        return model(**{"use_cache": False, **inputs})


@contextmanager
def _standing_aside(head: nn.Module, stand_in: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let ``head`` do what ``stand_in`` does."""
    before = vars(head).get("forward")  # an instance attribute only where a hook has put one
    head.forward = stand_in
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


def expect_once(model: nn.Module, times: int) -> None:
    if times != 1:
        raise ValueError(f"model: {type(model).__name__} called its head {times} times; expected once")


def logits_of(output: Any) -> Tensor:
    return output["logits"] if isinstance(output, Mapping) else output[0]


def aux_loss_of(output: Any) -> Tensor | None:
    """The loss of a mixture's routers, which Transformers' models return with ``output_router_logits``."""
    found = output.get("aux_loss") if isinstance(output, Mapping) else None
    return found if isinstance(found, Tensor) else None


# Known logits


_TINY, _HUGE = 2.0**-12, 2.0**20
"""A logit so small that tanh is linear there (to 2^-24 for caps >= 1), and one so large that it is 1; powers of two,
so that a scale is read exactly."""


def known_logits(weight: Tensor) -> Tensor:
    """A row ``[1, 1, V]`` for a head of this weight: tiny, huge, then a ramp over a range where a softcap bends."""
    probe = torch.linspace(-40, 40, weight.shape[0], device=weight.device, dtype=torch.float32)
    probe[:2] = torch.tensor([_TINY, _HUGE])[: probe.shape[0]]
    return probe.reshape(1, 1, -1)


def read_transform(probe: Tensor, logits: Tensor, name: str) -> tuple[float, float | None]:
    """The scale and the softcap that turned ``probe`` into ``logits``; an error where no two numbers did."""
    if logits.shape == probe.shape and probe.numel() >= 2:
        z = logits.detach().float().flatten()
        tiny, huge = z[:2].tolist()
        scale, softcap = tiny / _TINY, None
        if huge < 0.5 * _HUGE * scale:
            softcap = huge
        wanted = probe.flatten() * scale
        if softcap is not None:
            wanted = softcap * torch.tanh(wanted / softcap)
        if scale and torch.allclose(z, wanted, rtol=1e-4, atol=1e-5):
            return scale, softcap
    raise more_than_a_transform(
        name, f"known logits {list(probe.shape)} came back as {list(logits.shape)}, or changed otherwise"
    )


def more_than_a_transform(name: str, how: str) -> ValueError:
    return ValueError(
        f"model: {name} does more to its logits than scale and softcap them ({how}); use dpofast.logprob on its logits"
    )
