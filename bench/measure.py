"""How bench/ measures: clocks, runs in turns, memory, errors against fp64, and what the machine is.

In a rehearsal of a GPU's script tensors are on the CPU, backend "cuda" is the emulator of tests/emu, and sizes are
tiny: it shows that the script runs to its end, and nothing else. It needs a checkout, as the current folder.
"""

from __future__ import annotations

import datetime
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import dpofast
from dpofast.bench.record import Record

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Work = Callable[[], object]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Timer:
    """Seconds of one call, by the device's own clock where it has one."""

    def __init__(self, device: torch.device = CPU):
        self.cuda = device.type == "cuda"

    def __call__(self, work: Work) -> float:
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

    def median(self, work: Work, rounds: int = 5, warm: int = 2) -> float:
        for _ in range(warm):
            work()
        return statistics.median(self(work) for _ in range(rounds))


seconds = Timer()


class Turns(NamedTuple):
    """Medians of runs in turns: the machine may be shared, and neighbouring runs share what it was busy with."""

    ratio: float
    spread: float | None  # of the ratio: half the distance between its quartiles
    seconds: float
    base_seconds: float

    def records(self, of: Record, base: str = "products") -> list[Record]:
        return [of.of(f"time / {base}", self.ratio, spread=self.spread), of.of("time", self.seconds, "s")]


def in_turns(work: Work, base: Work, rounds: int, timer: Timer = seconds, warm: int = 1) -> Turns:
    for _ in range(warm):
        work()
        base()
    pairs = [(timer(base), timer(work)) for _ in range(rounds)]
    ratios = [b / a for a, b in pairs]
    quartiles = statistics.quantiles(ratios) if rounds > 1 else None
    return Turns(
        statistics.median(ratios),
        (quartiles[2] - quartiles[0]) / 2 if quartiles else None,
        statistics.median(b for _, b in pairs),
        statistics.median(a for a, _ in pairs),
    )


def gpu_peak(work: Work, leaves: tuple[Tensor, ...]) -> int:
    """Bytes at the worst moment of a step, above its inputs: gradients are in it."""
    for leaf in leaves:
        leaf.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def exact(hidden: Tensor, weight: Tensor, labels: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logps, and d hidden and d weight of their sum times c: fp64 by plain PyTorch, a few rows of logits at a time."""
    h, w = hidden.double(), weight.double()
    logps = torch.zeros(len(h), dtype=torch.float64, device=h.device)
    d_hidden, d_weight = torch.zeros_like(h), torch.zeros_like(w)
    rows = (labels >= 0).nonzero().squeeze(-1)
    for part in rows.split(128):
        log_p = (h[part] @ w.T).log_softmax(-1)
        logps[part] = log_p.gather(1, labels[part].unsqueeze(1)).squeeze(1)
        g = log_p.exp_().neg_()
        g.scatter_add_(1, labels[part].unsqueeze(1), torch.ones_like(g[:, :1]))
        g *= c[part].unsqueeze(1)
        d_hidden[part] = g @ w
        d_weight += g.T @ h[part]
    return logps, d_hidden, d_weight


def error(got: Tensor, want: Tensor) -> float:
    """Relative, of the whole tensor; NaN where anything is not finite."""
    return ((got.double() - want).norm() / want.norm()).item()


def row_error(got: Tensor, want: Tensor) -> float:
    """Mean over rows of the relative error of a row."""
    return ((got.double() - want).norm(dim=-1) / want.norm(dim=-1)).mean().item()


def machine(device: torch.device = CPU) -> dict[str, str]:
    """What a file of results says about where they come from."""
    facts = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "dpofast": dpofast.__version__,
    }
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
        gpu = {"driver": driver[0] if driver else "unknown", "cuda": str(torch.version.cuda)}
        return {"device": torch.cuda.get_device_name(device)} | facts | gpu
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    backend = dpofast.plan(8, 8, 8, backend="cpu").backend
    return {"device": name, "threads": str(torch.get_num_threads()), "backend": backend} | facts


def cuda_library(rehearse: bool) -> Any:
    """The module that has the launchers of the CUDA kernels; in a rehearsal, the emulator's."""
    if not rehearse:
        from dpofast import _C

        return _C
    sys.path.append(str(Path("tests").resolve()))
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
    return CPU


def first_line(error: BaseException, length: int = 200) -> str:
    """A failure in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:length]}"
