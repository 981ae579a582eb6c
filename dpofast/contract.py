"""The numbers by which Python, C++, CUDA and Triton name the same things: the mirror of ``csrc/core/types.h``.

A test holds the two equal (tests/test_contract.py).
"""

from __future__ import annotations

import torch

from dpofast import reference

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""``enum class DType``."""

STATISTICS = tuple(reference.STATISTICS)
"""The optional outputs, in the order of the bits of ``enum Output``."""


FLOOR_LOGP = -1e4
"""Stands for a log-prob of -inf where its exponential is a factor: ``kFloorLogp``."""


class Stat:
    """Rows of the tensor of running statistics, over all entries but the label's: ``enum Stat``."""

    M, SUM, SUM_X, SUM_SQ, SUM_Z, TOP_BEFORE, Z_LABEL, COUNT = range(8)


def flags(names: tuple[str, ...]) -> int:
    """The bit mask of the statistics among ``names``."""
    return sum(1 << i for i, name in enumerate(STATISTICS) if name in names)


def wanted(outputs: int) -> tuple[str, ...]:
    """The statistics that a bit mask asks for."""
    return tuple(name for i, name in enumerate(STATISTICS) if outputs >> i & 1)


def output_dtype(name: str, wide: torch.dtype) -> torch.dtype:
    """The dtype of an output where accumulators are ``wide``."""
    return torch.bool if name in reference.BOOLEAN else wide
