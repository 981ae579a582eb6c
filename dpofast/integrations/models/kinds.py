"""What a model is made of and wrapped in: classes of libraries that may be neither imported nor installed."""

from __future__ import annotations

import sys

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dpofast import distributed


def loaded(module: str, name: str) -> type | tuple[()]:
    """A class for `isinstance`. There are no instances of one in a module that nobody has imported."""
    return getattr(sys.modules.get(module), name, ())


def has(model: nn.Module, kind: type | tuple[()]) -> bool:
    return any(isinstance(module, kind) for module in model.modules())


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel or a DeepSpeed engine. FSDP2 adds to a model and wraps nothing."""
    while isinstance(model, (DistributedDataParallel, loaded("deepspeed", "DeepSpeedEngine"))):
        model = model.module
    return model


def is_zero3(head: nn.Linear) -> bool:
    return hasattr(head.weight, "ds_id")


def is_sharded(model: nn.Module, head: nn.Linear) -> bool:
    return is_zero3(head) or has(model, loaded("torch.distributed.fsdp", "FSDPModule"))


def is_wrapped(model: nn.Module, head: nn.Linear) -> bool:
    """Whether a wrapper has a part in the model's forward and backward."""
    return unwrapped(model) is not model or has(model, DistributedDataParallel) or is_sharded(model, head)


def refuse_wrappers_without_a_head(model: nn.Module) -> None:
    """An error where a wrapper keeps the head out of reach."""
    if has(model, loaded("torch.distributed.fsdp", "FullyShardedDataParallel")):
        raise ValueError(
            "model: is in FullyShardedDataParallel (FSDP1), which keeps the head in a flat tensor; shard it with "
            "torch.distributed.fsdp.fully_shard (FSDP2; fsdp_version: 2 in accelerate)"
        )
    if has(model, nn.DataParallel):
        raise ValueError(
            "model: is in DataParallel, whose copies of it on other devices run out of reach; start one process a "
            "device (torchrun or accelerate launch), which wraps it in DistributedDataParallel, or let the process see "
            "one device (CUDA_VISIBLE_DEVICES=0)"
        )


def expect_whole(module: nn.Module, *weights: Tensor) -> None:
    """An error where a weight is still sharded in the forward of ``module``, the head."""
    for weight in weights:
        if distributed.is_dtensor(weight) or weight.dim() != 2:
            raise ValueError(
                f"model: a weight is sharded in the head's own forward, {list(weight.shape)} in {module}; expected "
                "that FSDP2 or ZeRO-3 gathers it there, and no tensor parallelism beside them"
            )
