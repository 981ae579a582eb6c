"""The trained model: loaded, with a LoRA or without, wrapped for several ranks, and saved as its library does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from dpofast.checks import wrong
from dpofast.train.config import Config
from dpofast.train.freezing import freeze_below, halve_frozen_products, layers_of, places_of_adapters
from dpofast.train.ranks import Ranks

_DROPOUT = ("attention_dropout", "dropout", "activation_dropout", "resid_dropout", "p")


def load_tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    if not (Path(folder) / "tokenizer_config.json").is_file():
        raise wrong("model", repr(folder), "a folder with a tokenizer, as save_pretrained writes it")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load(folder: str, config: Config, argument: str = "model") -> nn.Module:
    """A model of Transformers in eval mode, in fp32; frozen weights under autocast are bf16."""
    from transformers import AutoModelForCausalLM

    halved = config.precision == "bf16" and config.lora_rank > 0
    dtype = torch.bfloat16 if halved else torch.float32
    path = _existing(argument, folder)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True).eval()


def load_trained(folder: str, argument: str) -> nn.Module:
    """A model in fp32 and eval mode, or one with the LoRA whose adapter is in ``folder``."""
    adapter = Path(folder) / "adapter_config.json"
    if not adapter.is_file():
        return load(folder, Config(), argument)
    from peft import PeftModel

    base = load(json.loads(adapter.read_text())["base_model_name_or_path"], Config(), argument)
    return PeftModel.from_pretrained(base, folder).eval()


def trained(config: Config, checkpoint: Path | None) -> nn.Module:
    """The model to train, as it begins or as ``checkpoint`` has it."""
    if config.lora_rank == 0:
        model = load(config.model if checkpoint is None else str(checkpoint), config)
        if config.last_layers:
            freeze_below(model, config.last_layers)
            whole = config.shard or config.cache_frozen == "fp32"  # FSDP2 wants one dtype in a layer
            if config.precision == "bf16" and not whole:
                halve_frozen_products(model)
    else:
        model = _with_adapter(load(config.model, config), config, checkpoint)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.lora_rank and not config.last_layers:
            model.enable_input_require_grads()
    model.train()
    if not config.dropout:
        _without_dropout(model)
    return model


def wrapped(model: nn.Module, config: Config, ranks: Ranks) -> nn.Module:
    """What is called in training: the model, on several ranks in DistributedDataParallel or sharded where it is."""
    model.to(ranks.device)
    if ranks.world == 1:
        return model
    if not config.shard:
        return DistributedDataParallel(model)
    for layer in layers_of(model).values():
        fully_shard(layer)
    return fully_shard(model)


@contextmanager
def without_exchange(model: nn.Module) -> Iterator[None]:
    """Within, a backward adds up gradients on this rank alone."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)
    else:
        yield


def whole_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """``(weights, optimizer)`` to save: those of a sharded model gathered, on the first rank; None for all weights."""
    if not isinstance(model, FSDPModule):
        return None, optimizer.state_dict()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    if not optimizer.state:  # before the first step, where asking for it would take one
        return weights, optimizer.state_dict()
    return weights, get_optimizer_state_dict(model, optimizer, options=options)


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, kept: dict[str, Any]) -> None:
    """Go on from what `whole_state` gave for the optimizer."""
    if not isinstance(model, FSDPModule):
        optimizer.load_state_dict(kept)
    elif kept["state"]:
        set_optimizer_state_dict(model, optimizer, kept, options=StateDictOptions(full_state_dict=True))


def save(model: nn.Module, weights: dict[str, Any] | None, tokenizer: Any, folder: Path) -> None:
    """Save the model as Transformers does, or its adapter as PEFT does, and the tokenizer."""
    from safetensors import SafetensorError

    try:
        model.save_pretrained(folder, **({} if weights is None else {"state_dict": weights}))
    except SafetensorError as error:  # its word for a write that fails
        raise OSError(f"the model: {error}") from error
    tokenizer.save_pretrained(folder)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _with_adapter(base: nn.Module, config: Config, checkpoint: Path | None) -> nn.Module:
    from peft import LoraConfig, PeftModel, get_peft_model

    if checkpoint is not None:
        return PeftModel.from_pretrained(base, checkpoint, is_trainable=True)
    return get_peft_model(
        base,
        LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha or 2 * config.lora_rank,
            lora_dropout=config.lora_dropout,
            task_type="CAUSAL_LM",
            **places_of_adapters(base, config.lora_targets, config.last_layers),
        ),
    )


def _without_dropout(model: nn.Module) -> None:
    """Turn off all dropout but that of a LoRA, which has an option of its own."""
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            continue
        for attribute in _DROPOUT:
            if isinstance(vars(module).get(attribute), float):
                setattr(module, attribute, 0.0)


def _existing(argument: str, folder: str) -> str:
    if not (Path(folder) / "config.json").is_file():
        raise wrong(argument, repr(folder), "a folder with a config.json, as save_pretrained writes it")
    return folder
