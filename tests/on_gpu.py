"""A backend on a real GPU for tests whose tensors are on the CPU: everything goes there and comes back.

So that every numeric test of the `backend` fixture runs unchanged on the CUDA and Triton kernels where there is a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpofast.backends.tiled import TiledBackend


class OnDevice:
    """The functions of `dpofast.backends.cpu`, by ``backend`` on ``device``."""

    def __init__(self, backend: TiledBackend, device: str):
        self.backend, self.device = backend, torch.device(device)

    def cache_tensor(self, n_bytes: int, _device: torch.device) -> Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8)

    def grad_weight_tensor(self, weight: Tensor) -> Tensor:
        return weight.new_empty(weight.shape)

    def _there(self, x):
        if isinstance(x, Tensor):
            there = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=self.device)
            return there.copy_(x)  # strides and all: kernels must take them as they are
        if isinstance(x, dict):
            return {name: self._there(value) for name, value in x.items()}
        return x

    def _call(self, function: str, args: tuple, written: tuple[int, ...]) -> dict[str, Tensor] | None:
        there = [self._there(x) for x in args]
        results = getattr(self.backend, function)("", *there)
        for i in written:
            if args[i] is not None:
                args[i].copy_(there[i])
        return None if results is None else {name: x.cpu() for name, x in results.items()}

    def forward(self, _isa: str, *args) -> dict[str, Tensor]:
        return self._call("forward", args, (len(args) - 1,))  # the cache

    def backward(self, _isa: str, *args) -> None:
        self._call("backward", args, (-3, -2, -1))  # the gradients

    def rows_forward(self, _isa: str, *args) -> dict[str, Tensor]:
        return self._call("rows_forward", args, ())

    def rows_backward(self, _isa: str, *args) -> None:
        self._call("rows_backward", args, (-1,))
