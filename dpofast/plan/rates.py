"""What a CPU does in a second: the five numbers that the CPU's cost model is scaled by.

They are measured where a plan is printed. Schedules are chosen by `NOMINAL`, since they may depend neither on what a
machine is busy with nor on the number of threads.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from dpofast import native
from dpofast.contract import DTYPE_CODES

_COPIED = 40 << 20  # bytes of each of two buffers: together more than the L3 cache that a few cores share
_MM = (256, 576, 1024)  # tokens, hidden size, vocabulary: 0.3 GFLOP, which a slow bf16 product still ends in time


class Rates(NamedTuple):
    """Of one machine, in the dtypes of one problem."""

    kernel: float  # flop/s of the micro-kernel on one core, on operands in its caches
    core: float  # flop/s of fp32 multiply-adds on one core, which passes over logits are counted in
    bandwidth: float  # bytes/s that a copy reads and writes in memory, all threads together
    fresh: float  # bytes/s of the first write to memory that the system has just handed out
    threads: int


def measured(isa: str, hidden: torch.dtype, weight: torch.dtype, threads: int) -> Rates:
    """Rates of this machine, here and now: about 0.1 s the first time."""
    core, _ = peak(isa, torch.float32, torch.float32)
    _, kernel = peak(isa, hidden, weight)
    return Rates(kernel, core, *_memory(threads), threads)


@functools.lru_cache(maxsize=64)
def peak(isa: str, hidden: torch.dtype, weight: torch.dtype) -> tuple[float, float]:
    """Flop/s of one core's multiply-adds and of the micro-kernel on it, in these dtypes: about 30 ms."""
    return native.C.peak(isa, DTYPE_CODES[hidden], DTYPE_CODES[weight])


@functools.lru_cache(maxsize=8)
def _memory(threads: int) -> tuple[float, float]:
    """Bytes/s of a copy and of first writes. The best of some: a copy is over before the machine turns to it alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        source = torch.empty(_COPIED, dtype=torch.uint8)
        first = _seconds(lambda: source.fill_(1))
        target = source.clone()
        copied = min(_seconds(lambda: target.copy_(source)) for _ in range(5))
    finally:
        torch.set_num_threads(before)
    return 2 * _COPIED / copied, _COPIED / first


@functools.lru_cache(maxsize=16)
def mm(dtype: torch.dtype, threads: int) -> float:
    """Flop/s of `torch.mm` with all threads, of a product in the caches: what other libraries multiply with."""
    n, h, v = _MM
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = torch.ones(n, h, dtype=dtype), torch.ones(v, h, dtype=dtype)
        took = min(_seconds(lambda: torch.mm(a, b.T)) for _ in range(3))
    finally:
        torch.set_num_threads(before)
    return 2.0 * n * h * v / took


def forget() -> None:
    """Rates are measured anew when they are next asked for."""
    for function in (peak, _memory, mm):
        function.cache_clear()


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
