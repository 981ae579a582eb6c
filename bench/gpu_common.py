"""What the scripts of bench/gpu.sh share: the device's clock, and a rehearsal without a GPU.

In a rehearsal tensors are on the CPU, backend "cuda" is the emulator of tests/emu, and sizes are tiny: it shows that a
script runs to its end, and nothing else.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


def cuda_library(rehearse: bool) -> Any:
    """The module that has the launchers of the CUDA kernels; in a rehearsal, the emulator's."""
    if not rehearse:
        from dpofast import _C

        return _C
    sys.path.append(str(ROOT / "tests"))
    from emu import build

    return build.module()


def device_for(rehearse: bool) -> torch.device:
    """The GPU; in a rehearsal the CPU, with the emulator in the place of backend "cuda"."""
    if not rehearse:
        return torch.device("cuda", torch.cuda.current_device())
    from dpofast.backends import registry
    from dpofast.backends.cuda import CudaPasses
    from dpofast.backends.tiled import TiledBackend

    registry.added["cuda"] = TiledBackend(CudaPasses(cuda_library(True), thread_blocks=8))
    return torch.device("cpu")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Timer:
    """Seconds of one call, by the device's own clock where it has one."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def __call__(self, work: Callable[[], object]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def median(self, work: Callable[[], object], rounds: int = 5, warm: int = 2) -> float:
        for _ in range(warm):
            work()
        return statistics.median(self(work) for _ in range(rounds))


def first_line(error: BaseException, length: int = 200) -> str:
    """A failure in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:length]}"
