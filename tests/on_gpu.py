"""A backend on a real GPU for tests whose tensors are on the CPU: everything goes there and comes back.

So that every numeric test of the `backend` fixture runs unchanged on the CUDA and Triton kernels where there is a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpofast.backends.base import (
    Backend,
    InputGrads,
    LogitsProblem,
    OutputGrads,
    PairsProblem,
    PairsResult,
    Problem,
    Saved,
)
from dpofast.plan import Schedule


class OnDevice:
    """`dpofast.backends.base.Backend` of tensors on the CPU, by ``backend`` on ``device``."""

    def __init__(self, backend: Backend, device: str):
        self.backend, self.device = backend, torch.device(device)
        self.pair_losses: tuple[str, ...] = getattr(backend, "pair_losses", ())

    def cache(self, n_bytes: int, _device: torch.device) -> Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8)

    def grad_weight(self, weight: Tensor) -> Tensor:
        return weight.new_empty(weight.shape)

    def forward(
        self, problem: Problem, schedule: Schedule, outputs: tuple[str, ...], cache: Tensor
    ) -> dict[str, Tensor]:
        there = self._there(cache)
        results = self.backend.forward(self._there(problem), schedule, outputs, there)
        cache.copy_(there)
        return {name: x.cpu() for name, x in results.items()}

    def fold(self, problem: Problem, schedule: Schedule, outputs: tuple[str, ...]) -> Tensor:
        return self.backend.fold(self._there(problem), schedule, outputs).cpu()

    def backward(
        self, problem: Problem, schedule: Schedule, saved: Saved, incoming: OutputGrads, grads: InputGrads
    ) -> None:
        there = self._there(grads)
        self.backend.backward(self._there(problem), schedule, self._there(saved), self._there(incoming), there)
        for here, x in zip(grads, there):
            if isinstance(here, Tensor):
                here.copy_(x)

    def logits_forward(self, problem: LogitsProblem, outputs: tuple[str, ...]) -> dict[str, Tensor]:
        return {name: x.cpu() for name, x in self.backend.logits_forward(self._there(problem), outputs).items()}

    def logits_backward(self, problem: LogitsProblem, saved: Saved, incoming: OutputGrads, grad_logits: Tensor) -> None:
        there = self._there(grad_logits)
        self.backend.logits_backward(self._there(problem), self._there(saved), self._there(incoming), there)
        grad_logits.copy_(there)

    def sequence_dpo(self, problem: PairsProblem) -> PairsResult:
        return PairsResult(*(x.cpu() for x in self.backend.sequence_dpo(self._there(problem))))

    def _there(self, x: Any) -> Any:
        """The same on the device: a tensor with its strides and alignment, as kernels must take them, or a tuple with
        some."""
        if isinstance(x, Tensor):
            return self._tensor_there(x)
        if isinstance(x, tuple) and hasattr(x, "_fields"):
            return type(x)(*(self._there(value) for value in x))
        return x

    def _tensor_there(self, x: Tensor) -> Tensor:
        """By the memory that it spans, for an expanded tensor has elements that lie in one place."""
        spans = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) if x.numel() else 0
        lead = x.data_ptr() % 16 // x.itemsize if spans else 0
        memory = torch.empty(lead + spans, dtype=x.dtype, device=self.device)[lead:]
        return memory.copy_(x.as_strided((spans,), (1,))).as_strided(x.shape, x.stride(), lead)
