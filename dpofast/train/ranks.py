"""The processes of a training: one, or those that torchrun or accelerate launch has started."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among ``world``, and the device that it trains on."""

    device: torch.device
    rank: int = 0
    world: int = 1
    joined: bool = False  # here, and so to be left here

    @property
    def first(self) -> bool:
        """Whether this process writes, and talks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in fp64."""
        values = values.detach().to("cpu" if self.device.type == "cpu" else self.device, torch.float64)
        if self.world > 1:
            dist.all_reduce(values)
        return values.cpu()

    def any(self, flag: bool) -> bool:
        """Whether it is true on any rank."""
        return bool(self.sum(torch.tensor(float(flag))))

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def of_first(self, work: Callable[[], Any]) -> Any:
        """What ``work`` returns on the first rank, which alone does it; what it raises there is raised everywhere."""
        if self.world == 1:
            return work()
        box: list[Any] = [None, None]
        if self.first:
            try:
                box[0] = work()
            except (OSError, ValueError) as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        return box[0]


def start(device: str) -> Ranks:
    """Join the others, if there are any. ``device`` is "cpu", "cuda", or "" for cuda where there is one."""
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    world, rank, local = (int(os.environ.get(name, default)) for name, default in _ENVIRONMENT.items())
    where = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(where)
    joins = world > 1 and not dist.is_initialized()
    if joins:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return Ranks(where, rank, world, joins)


_ENVIRONMENT = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}


def leave(here: Ranks) -> None:
    """Leave the others, if `start` joined them."""
    if here.joined:
        # gloo's threads drop the tensors of the last exchange, for which they need Python's lock, and the end of the
        # group waits for the threads and holds that lock; here they have the time
        dist.barrier()
        dist.destroy_process_group()
