"""Log-probabilities and losses of a Transformers model, whatever its head does, without its logits.

Families differ in what they do between the last hidden state and the logits: a bias, a softcap, a scale under one of
half a dozen names, multiplied or divided, before the head or after it. So nothing is read from a config. The model runs
as it is, only with its head standing aside: that shows the exact hidden states that the head would have had, and
what the model makes of known logits, one row of them, shows the transform. A model that does anything else to its
logits (masks, cuts, mixes them) is refused, never approximated.

Works wherever there is a model to call: Transformers' Trainer, Lightning, a plain loop; see ``examples/``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dpofast import losses
from dpofast.functional import DPOLossOutput, head_options, linear_dpo_loss, make_objective
from dpofast.primitive import LogprobOutput, linear_logprob

__all__ = ["HeadInputs", "find_head", "head_inputs", "model_dpo_loss", "model_logprob"]


class HeadInputs(NamedTuple):
    """What `linear_logprob` needs of a model and a batch: ``z = softcap tanh(logit_scale (h W^T + b) / softcap)``."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None


def find_head(model: nn.Module) -> nn.Linear:
    """The language-model head: an `nn.Linear` with its data at hand.

    Args:
        model: with a ``get_output_embeddings``; inside PEFT or DistributedDataParallel, too. Of a head that PEFT trains
            as a whole (``modules_to_save``), the copy that is active.

    Raises:
        ValueError: no head; one with an adapter on it, quantised, sharded, or offloaded; a model with an encoder.
    """
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    head = bare.get_output_embeddings() if hasattr(bare, "get_output_embeddings") else None
    name = type(bare).__name__
    if head is None:
        raise ValueError(f"model: {name} has no output embeddings; expected a causal language model with its head")
    if getattr(getattr(bare, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"model: {name} has an encoder, whose decoder's labels are not its shifted inputs; call its decoder "
            "yourself and pass the hidden states to linear_logprob"
        )
    if hasattr(head, "modules_to_save"):  # peft's wrapper of a module that is trained as a whole
        enabled = head.active_adapters and not head.disable_adapters
        head = head.modules_to_save[head.active_adapters[0]] if enabled else head.original_module
    if hasattr(head, "base_layer"):
        raise ValueError(
            f"model: the head of {name} carries an adapter ({type(head).__name__}), which its weight does not show; "
            "take it out of target_modules, train it whole with modules_to_save, or merge the adapter"
        )
    if type(head).forward is not nn.Linear.forward or not head.weight.is_floating_point():
        raise ValueError(
            f"model: the head of {name} is a {type(head).__name__} of {head.weight.dtype}; expected a plain nn.Linear. "
            "Leave a quantised head in its own dtype (llm_int8_skip_modules, modules_to_not_convert), or dequantise it"
        )
    if head.weight.is_meta or head.weight.numel() == 0:
        where = "on the meta device" if head.weight.is_meta else "sharded away"
        raise ValueError(
            f"model: the head of {name} is {where}; keep it on one device (device_map), or gather it and call "
            "linear_logprob inside the gathering context"
        )
    return head


def head_inputs(model: nn.Module, **inputs: Any) -> HeadInputs:
    """Run ``model(**inputs)`` up to its head.

    Hooks, adapters, checkpointing and wrappers all act as ever, since it is the model's own forward that runs.

    Args:
        model: as in `find_head`. DistributedDataParallel without ``find_unused_parameters``, which looks for the
            parameters in the graph of the logits.
        inputs: what the model takes: input_ids, attention_mask, ...; no labels. ``use_cache`` is False if not given.

    Returns:
        `HeadInputs`, hidden ``[*, T, H]`` with its graph.

    Raises:
        ValueError: as `find_head`; a model that does not call its head once, or does something else to its logits.
    """
    if "labels" in inputs:
        raise ValueError("labels: the model would compute a loss of its own from logits; pass them beside the inputs")
    head = find_head(model)
    probe = _probe(head.weight)
    with _standing_aside(head, probe) as seen:
        output = model(**{"use_cache": False, **inputs})
    if len(seen) != 1:
        raise ValueError(f"model: {type(model).__name__} called its head {len(seen)} times; expected once")
    logits = output["logits"] if isinstance(output, Mapping) else output[0]
    logit_scale, softcap = _read_transform(probe, logits, type(model).__name__)
    return HeadInputs(seen[0], head.weight, head.bias, logit_scale, softcap)


_TINY, _HUGE = 2.0**-12, 2.0**20
"""A logit so small that tanh is linear there (to 2^-24 for caps >= 1), and one so large that it is 1; powers of two,
so that a scale is read exactly."""


def _probe(weight: Tensor) -> Tensor:
    """Known logits ``[1, 1, V]``: tiny, huge, then a ramp over a range where a softcap bends."""
    probe = torch.linspace(-40, 40, weight.shape[0], device=weight.device, dtype=torch.float32)
    probe[:2] = torch.tensor([_TINY, _HUGE])[: probe.shape[0]]
    return probe.reshape(1, 1, -1)


def _read_transform(probe: Tensor, logits: Tensor, name: str) -> tuple[float, float | None]:
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
        if torch.allclose(z, wanted, rtol=1e-4, atol=1e-5):
            return scale, softcap
    raise ValueError(
        f"model: {name} does more to its logits than scale and softcap them (known logits {list(probe.shape)} came "
        f"back as {list(logits.shape)}, or changed otherwise); use dpofast.logprob on its logits"
    )


@contextmanager
def _standing_aside(head: nn.Module, probe: Tensor) -> Iterator[list[Tensor]]:
    """Let ``head`` note what it is given and return ``probe``."""
    seen: list[Tensor] = []
    before = vars(head).get("forward")  # an instance attribute only where a hook has put one

    def note(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return probe

    head.forward = note
    try:
        yield seen
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


def model_logprob(
    model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, *, temperature: float = 1.0, **options: Any
) -> LogprobOutput:
    """Log-probabilities of ``labels`` under a model, shifted as its own loss shifts them.

    Equivalent to::

        logits = model(**inputs).logits[:, :-1]
        logps = logits.log_softmax(-1).gather(-1, labels[:, 1:, None])[..., 0]  # 0 where labels are -100

    Args:
        model: a causal language model, as in `find_head`.
        inputs: what it takes: ``{"input_ids": ..., "attention_mask": ...}``.
        labels: ``[B, T]``, the input ids, with -100 at prompt and padding.
        temperature, options: as in `linear_logprob`, but bias, logit_scale and softcap, which are the model's.

    Returns:
        `LogprobOutput` of tensors ``[B, T - 1]``: position t is the log-probability of label t + 1.

    Raises:
        ValueError, TypeError: as `head_inputs` and `linear_logprob`.
    """
    _refuse_transform(options)
    head = head_inputs(model, **inputs)
    hidden = _shifted(head.hidden, labels)
    return linear_logprob(
        hidden, head.weight, labels[:, 1:].to(hidden.device), bias=head.bias, temperature=temperature,
        logit_scale=head.logit_scale, softcap=head.softcap, **options,
    )  # fmt: skip


def model_dpo_loss(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,
    *,
    ref_model: nn.Module | None = None,
    ref_logps: Tensor | None = None,
    **options: Any,
) -> DPOLossOutput:
    """A preference loss of a model and a batch ``[chosen; rejected]``.

    Equivalent to `dpofast.dpo_loss` of ``model(**inputs).logits[:, :-1]`` and ``labels[:, 1:]``.

    Args:
        model, inputs: as in `model_logprob`, 2B sequences.
        labels: ``[2B, T]``, the input ids, with -100 at prompt and padding.
        ref_model: the reference, run without gradient. None for a PEFT model: itself with its adapters disabled. Or
        ref_logps: of the reference, ``[2B, T - 1]`` as `model_logprob` returns them, or summed ``[2B]``.
        options: as in `linear_dpo_loss`, but for the head's own: bias, logit_scale, softcap.

    Both models are run as they are: dropout, if they have any, is yours to turn off.

    Returns:
        `DPOLossOutput`.

    Raises:
        ValueError, TypeError: as `head_inputs` and `linear_dpo_loss`.
    """
    _refuse_transform(options)
    if ref_model is not None and ref_logps is not None:
        raise ValueError("ref_logps and ref_model are both given; pass one of them")
    names = head_options(linear_logprob)
    terms = make_objective(**{name: value for name, value in options.items() if name not in names}).terms
    disabled = nullcontext()
    if ref_model is None and ref_logps is None and any(term.loss.reference for term in terms):
        bare = model.module if isinstance(model, DistributedDataParallel) else model
        if hasattr(bare, "disable_adapter"):
            ref_model, disabled = bare, bare.disable_adapter()
    losses.check_reference(terms, ref_model is not None or ref_logps is not None, "ref_model or ref_logps")
    if ref_model is not None:
        with torch.no_grad(), disabled:
            scoring = {name: value for name, value in options.items() if name in names}
            ref_logps = model_logprob(ref_model, inputs, labels, **scoring).logps
    head = head_inputs(model, **inputs)
    hidden = _shifted(head.hidden, labels)
    return linear_dpo_loss(
        hidden, head.weight, labels[:, 1:].to(hidden.device), bias=head.bias, ref_logps=ref_logps,
        logit_scale=head.logit_scale, softcap=head.softcap, **options,
    )  # fmt: skip


def _refuse_transform(options: Mapping[str, Any]) -> None:
    for name in ("bias", "logit_scale", "softcap"):
        if name in options:
            raise TypeError(f"{name}={options[name]!r} is the model's own; it is read from the model")


def _shifted(hidden: Tensor, labels: Tensor) -> Tensor:
    if labels.dim() != 2 or hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels: got shape {list(labels.shape)}, expected {list(hidden.shape[:-1])}, that of the positions that "
            "reach the head (no pre-shifted labels, and no logits_to_keep or prompt learning, which change them)"
        )
    return hidden[:, :-1]
