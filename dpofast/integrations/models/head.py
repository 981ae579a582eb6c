"""Where a model's head is, and the product that it makes where the model calls it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dpofast.integrations.models.adapters import active_adapters, base_of, class_of, with_adapters
from dpofast.integrations.models.kinds import is_zero3, refuse_wrappers_without_a_head, unwrapped


class Head(NamedTuple):
    """What a model calls for its logits, and the linear layer in it. They differ where PEFT has put an adapter."""

    module: nn.Module
    linear: nn.Linear


def find_head(model: nn.Module) -> nn.Linear:
    """The language-model head: an `nn.Linear`.

    Args:
        model: with a ``get_output_embeddings``; inside PEFT, DistributedDataParallel or a DeepSpeed engine, too. Of a
            head that PEFT trains as a whole (``modules_to_save``), the copy that is active. Under FSDP2
            (``fully_shard``) and ZeRO-3, its weight is sharded.

    Raises:
        ValueError: no head; one with an active adapter on it, quantised, or offloaded; a model with an encoder, in
            DataParallel or in FSDP1.
    """
    head = find(model)
    if active_adapters(head.module):
        raise ValueError(
            f"model: the head of {type(unwrapped(model)).__name__} carries an adapter ({class_of(head.module)}), which "
            "its weight does not show; use head_inputs, model_logprob or model_dpo_loss, which apply it, or merge it"
        )
    return head.linear


def find(model: nn.Module) -> Head:
    """The head, with an adapter or without; errors as `find_head` has them."""
    refuse_wrappers_without_a_head(model)
    bare = unwrapped(model)
    name = type(bare).__name__
    module = _output_embeddings(bare)
    if hasattr(module, "modules_to_save"):  # peft's wrapper of a module that is trained as a whole
        enabled = module.active_adapters and not module.disable_adapters
        module = module.modules_to_save[module.active_adapters[0]] if enabled else module.original_module
    head = Head(module, base_of(module, name))
    weight = head.linear.weight
    if type(head.linear).forward is not nn.Linear.forward or not weight.is_floating_point():
        raise ValueError(
            f"model: the head of {name} is a {type(head.linear).__name__} of {weight.dtype}; expected a plain "
            "nn.Linear. Leave a quantised head in its own dtype (llm_int8_skip_modules, modules_to_not_convert), or "
            "dequantise it"
        )
    if weight.is_meta or (weight.numel() == 0 and not is_zero3(head.linear)):
        where = "on the meta device" if weight.is_meta else "sharded away"
        raise ValueError(
            f"model: the head of {name} is {where}; keep it on one device (device_map), or gather it and call "
            "linear_logprob inside the gathering context"
        )
    return head


def _output_embeddings(bare: nn.Module) -> nn.Module:
    """What a model itself calls its head; an error where there is none, or one that is not a language model's."""
    name = type(bare).__name__
    module = bare.get_output_embeddings() if hasattr(bare, "get_output_embeddings") else None
    if module is None:
        inner = next((m for m in bare.modules() if _has_head(m)), None)
        if inner is not None:
            raise ValueError(
                f"model: {name} has a {type(inner).__name__} in it and no get_output_embeddings of its own; pass the "
                f"{type(inner).__name__}, or give {name} a get_output_embeddings if it has a part in the logits"
            )
        raise ValueError(f"model: {name} has no output embeddings; expected a causal language model with its head")
    if getattr(getattr(bare, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"model: {name} has an encoder, whose decoder's labels are not its shifted inputs; call its decoder "
            "yourself and pass the hidden states to linear_logprob"
        )
    return module


def _has_head(module: nn.Module) -> bool:
    return hasattr(module, "get_output_embeddings") and module.get_output_embeddings() is not None


def as_linear(head: Head, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden, weight and bias whose product is that of the head, called here and now."""
    hidden, weight, bias = with_adapters(*head, hidden)
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and torch.float64 not in (hidden.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return hidden, weight, bias
