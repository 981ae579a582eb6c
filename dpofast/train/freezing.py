"""Where a model is trained that is not trained whole: in its last layers, by their own weights or by adapters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dpofast.checks import wrong


def _base_of(model: nn.Module) -> nn.Module:
    """The model of Transformers inside PEFT's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of the model's body, which Transformers calls by the name of their class; by their own names."""
    classes = set(getattr(_base_of(model), "_no_split_modules", None) or ())
    return {name: module for name, module in model.named_modules() if type(module).__name__ in classes}


def last_layers(model: nn.Module, count: int) -> dict[str, nn.Module]:
    """The last layers; an error where there are not so many, or not in one list."""
    layers = layers_of(model)
    lists = {name.rpartition(".")[0] for name in layers}
    if not 0 < count <= len(layers) or len(lists) != 1:
        expected = f"1 to {len(layers)}" if len(lists) == 1 else "0: the model does not have its layers in one list"
        raise wrong("last_layers", f"{count}", expected)
    return dict(list(layers.items())[-count:])


def freeze_below(model: nn.Module, count: int) -> None:
    """Leave gradients to the last ``count`` layers and to what comes after them.

    Frozen is every weight that the lowest of these layers is given something of: the layers below it, the embeddings,
    and so a head that is tied to them.
    """
    last = last_layers(model, count)
    below = {parameter for layer in list(layers_of(model).values())[:-count] for parameter in layer.parameters()}

    def note(_layer: nn.Module, args: Any, kwargs: Any) -> None:
        below.update(parameter for x in (*args, *kwargs.values()) for parameter in _made_of(x))

    lowest = next(iter(last.values()))
    hook = lowest.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.enable_grad():
            token = torch.zeros(1, 1, dtype=torch.long)
            model(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False)
    finally:
        hook.remove()
    for parameter in below:
        parameter.requires_grad_(False)


def _made_of(value: Any) -> Iterator[nn.Parameter]:
    """The parameters that a tensor, or those in a tuple, have gradients for."""
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from _made_of(each)
    waiting, seen = [value.grad_fn] if isinstance(value, torch.Tensor) else [], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
            if hasattr(node, "variable"):
                yield node.variable


def halve_frozen_products(model: nn.Module) -> None:
    """bf16 for weights of linear layers that are frozen: what autocast makes of them anyway, at each call."""
    for layer in layers_of(model).values():
        for module in layer.modules():
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                module.to(torch.bfloat16)


def places_of_adapters(base: nn.Module, targets: list[str], count: int) -> dict[str, Any]:
    """Which modules get an adapter, as PEFT is told: ``targets``, if ``count`` is not 0 of so many last layers."""
    from transformers.pytorch_utils import Conv1D

    if not count:
        return {"target_modules": targets[0] if targets == ["all-linear"] else targets}
    last = last_layers(base, count)
    if targets == ["all-linear"]:  # which PEFT does not take for some layers
        inside = (named for layer in last.values() for named in layer.named_modules())
        targets = sorted({name.rpartition(".")[2] for name, x in inside if isinstance(x, (nn.Linear, Conv1D))})
    paths = [name.split(".") for name in last]
    places = {"layers_to_transform": [int(path[-1]) for path in paths], "layers_pattern": paths[0][-2]}
    return {"target_modules": targets, **places}
