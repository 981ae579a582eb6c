"""What PEFT puts on a head: a LoRA adapter, or rows of the weight that are trained alone. Anything else is refused."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpofast.integrations.models.kinds import expect_whole, loaded


def class_of(module: nn.Module) -> str:
    """The class with its module, for messages: peft.tuners.lora.layer.Linear's own name says little."""
    return f"{type(module).__module__}.{type(module).__name__}"


def _is_lora(module: nn.Module) -> bool:
    """Whether the forward is LoRA's, which is made again here, and no other. FSDP2 makes a class of its own of it."""
    lora = loaded("peft.tuners.lora.layer", "Linear")
    return isinstance(module, lora) and type(module).forward is lora.forward


def _token_layer(module: nn.Module) -> nn.Module | None:
    """PEFT's layer that has some rows of a weight replaced: trainable_token_indices, or a TrainableTokensConfig."""
    if isinstance(module, loaded("peft.utils.other", "TrainableTokensWrapper")):
        module = module.token_adapter
    return module if isinstance(module, loaded("peft.tuners.trainable_tokens.layer", "TrainableTokensLayer")) else None


def base_of(module: nn.Module, name: str) -> nn.Module:
    """The layer that an adapter is on; an error where the adapter does what nothing here can repeat.

    ``name`` is the model's, for messages.
    """
    layer = _token_layer(module) or module
    if not hasattr(layer, "base_layer"):
        return module
    active = active_adapters(module)
    variants = [type(v).__name__ for n, v in getattr(layer, "lora_variant", {}).items() if n in active]
    if active and (variants or not (_is_lora(layer) or _token_layer(layer))):
        raise ValueError(
            f"model: the head of {name} carries an adapter that is neither plain LoRA nor trainable_token_indices "
            f"({', '.join([class_of(layer), *variants])}); take it out of target_modules, train the head whole with "
            "modules_to_save, or merge the adapter"
        )
    if _token_layer(layer) and len(active) > 1:
        raise ValueError(f"model: the head of {name} has rows of several adapters ({', '.join(active)}); activate one")
    return layer.base_layer


def active_adapters(module: nn.Module) -> list[str]:
    """The adapters by which the head is more than its weight."""
    layer = _token_layer(module) or module
    if not hasattr(layer, "base_layer") or layer.disable_adapters or layer.merged:
        return []
    owned = getattr(layer, layer.adapter_layer_names[0])
    return [name for name in layer.active_adapters if name in owned]


def with_adapters(module: nn.Module, linear: nn.Linear, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden, weight and bias whose product is that of ``module``, which is ``linear`` or an adapter on it."""
    tokens = _token_layer(module)
    layer = tokens or module
    if layer is not linear and layer.disable_adapters and layer.merged:
        layer.unmerge()  # as its own forward does
    names = active_adapters(module)
    if names and tokens:
        return hidden, tokens.get_merged_weights(names), None  # the layer has no bias in its product either
    return _with_lora(module, names, linear, hidden) if names else (hidden, linear.weight, linear.bias)


def _with_lora(
    module: nn.Module, names: list[str], linear: nn.Linear, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden, weight and bias of plain LoRA.

    LoRA's ``h W^T + s (h A^T) B^T`` is ``[h, s h A^T] [W, B]^T``: so B is not lost in the rounding of W, and dropout
    remains that of the adapter's path alone. [W, B] is a copy of the head, and so is its gradient.
    """
    weight, bias = linear.weight, linear.bias
    low, high = [module.lora_A[n] for n in names], [module.lora_B[n] for n in names]
    expect_whole(module, weight, *(layer.weight for layer in (*low, *high)))
    dropped = [module.lora_dropout[n](hidden.to(down.weight.dtype)) for n, down in zip(names, low)]
    paths = [down(x) * module.scaling[n] for n, down, x in zip(names, low, dropped)]
    hidden = torch.cat([hidden, *(path.to(hidden.dtype) for path in paths)], -1)
    weight = torch.cat([weight, *(up.weight.to(weight.dtype) for up in high)], 1)
    for n, up in zip(names, high):
        if up.bias is not None:
            extra = up.bias * module.scaling[n]
            bias = extra if bias is None else bias + extra
    return hidden, weight, bias
