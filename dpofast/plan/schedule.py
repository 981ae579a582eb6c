"""What a call asks for, and how it will run: the two nouns that a planner stands between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

DEFAULT_MEMORY_BUDGET = 1 << 30
"""Bytes of workspace beyond inputs, outputs and gradients, unless ``memory_budget`` or a GPU says otherwise: see
`dpofast.plan.cost.DataSheet.default_budget`."""


class Request(NamedTuple):
    """What a schedule depends on. Plain numbers, so that it can be remembered, and passes through ``torch.compile``."""

    n_tokens: int  # completion tokens
    n_hidden: int
    n_vocab: int
    hidden_dtype: torch.dtype
    weight_dtype: torch.dtype
    budget: int = DEFAULT_MEMORY_BUDGET  # bytes of workspace, without each thread's own tiles (about 100 KiB)
    to_hidden: bool = True  # its gradient will be wanted
    to_weight: bool = True  # the head's, or its bias's
    outputs: int = 0  # running numbers of the optional statistics
    entropy: bool = False  # its gradient may be wanted
    as_is: bool = True  # the head's columns have unit stride
    keeps: bool = True  # schedules may keep something of the logits from the forward to the backward
    fuses: bool = False  # the product may exponentiate itself: see `Schedule.is_fused`
    filters: bool = False  # gradients may leave entries out: what is kept for the backward are the others

    @property
    def is_plain(self) -> bool:
        """Nothing is asked but log-probs and their gradients, in a call whose product may exponentiate itself."""
        return self.fuses and not self.entropy and not self.outputs

    @property
    def n_grads(self) -> int:
        return self.to_hidden + self.to_weight

    @property
    def flops(self) -> float:
        """Operations of one product."""
        return 2.0 * self.n_tokens * self.n_hidden * self.n_vocab


class Schedule(NamedTuple):
    """How an op will run. Plain numbers, so that it passes through ``torch.compile``."""

    name: str  # score | jacobian | cached | mixed | filtered | recompute | recompute-split
    block: int  # vocabulary rows per block; 0: the product exponentiates itself, and there are no tiles of logits
    token_chunk: int  # completion tokens at a time, where the schedule allows it; 0: all
    cache_bytes: int  # kept from the forward to the backward
    workspace_bytes: int  # the larger of forward's and backward's, without the cache
    cached_share: float  # of the vocabulary
    scores_fused: bool = False  # the forward's product exponentiates itself, and the backward has tiles of ``block``

    @classmethod
    def of(cls, name: str, sizes: Sequence[int]) -> Schedule:
        """The schedule that an op is told of by its name, and `sizes`, of which the last may be left out."""
        return cls(name, sizes[0], sizes[1], sizes[2], 0, 0.0, len(sizes) > 3 and sizes[3] > 0)

    @property
    def sizes(self) -> list[int]:
        return [self.block, self.token_chunk, self.cache_bytes, int(self.scores_fused)]

    @property
    def keeps_jacobian(self) -> bool:
        """The cache is d logps / d hidden."""
        return self.name == "jacobian"

    @property
    def keeps_exps(self) -> bool:
        """The cache is the exponentials of some blocks of the vocabulary, or what was made of them."""
        return self.name in ("cached", "mixed", "filtered")

    @property
    def filters(self) -> bool:
        """The cache is the entries that a filter keeps or, where they are too many, and on a GPU, exponentials."""
        return self.name == "filtered"

    @property
    def keeps_nothing(self) -> bool:
        return not (self.keeps_jacobian or self.keeps_exps)

    @property
    def is_fused(self) -> bool:
        """The forward is one launch a chunk of tokens: a product whose epilogue folds and exponentiates its results."""
        return self.scores_fused or self.block == 0

    @property
    def splits_backward(self) -> bool:
        """D hidden is made before the head's gradient, from logits of its own."""
        return self.name == "recompute-split"

    def products(self, n_grads: int) -> float:
        """How many of N x H x V each, forward and backward."""
        if self.keeps_jacobian or not n_grads:
            return 1.0 + n_grads
        if self.splits_backward:
            return 1.0 + 2 * n_grads
        return 1.0 + n_grads + (1 - self.cached_share)

    def chunks(self, n: int) -> list[slice]:
        """The n tokens, as many at a time as the schedule takes."""
        size = self.token_chunk or n
        return [slice(i, min(n, i + size)) for i in range(0, n, size)]


def parse_bytes(value: int | str | None, name: str = "memory_budget", default: int = DEFAULT_MEMORY_BUDGET) -> int:
    """Bytes from an int or a string such as ``"512MiB"``, ``"1.5GB"``; None is the default."""
    if value is None:
        return default
    if isinstance(value, str):
        text = value.strip()
        units = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1, "": 1}
        unit = next(u for u in units if text.endswith(u))
        try:
            value = int(float(text[: len(text) - len(unit)]) * units[unit])
        except (ValueError, OverflowError):
            raise ValueError(f"{name}: got {text!r}, expected bytes or a size such as '512MiB'") from None
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an int (bytes) or a string such as '512MiB'")
    if value <= 0:
        raise ValueError(f"{name}: got {value}, expected a positive number of bytes")
    return value


def too_little(request: Request, needed: int) -> ValueError:
    """The error where not even ``needed`` bytes, the least there is, fit the budget."""
    return ValueError(
        f"memory_budget: {request.budget} bytes cannot be met for {request.n_tokens} completion tokens, hidden size "
        f"{request.n_hidden} and vocabulary {request.n_vocab}; the smallest workspace is about {needed} bytes: raise "
        "memory_budget or pass fewer sequences at a time"
    )


def up(x: int, to: int) -> int:
    """The least multiple of ``to`` that is at least x."""
    return (x + to - 1) // to * to


def ceil_div(x: int, by: int) -> int:
    return -(-x // by)
