"""How bench/ measures: clocks, runs in turns, memory, errors against fp64, and what the machine is.

In a rehearsal of a GPU's script tensors are on the CPU, backend "cuda" is the emulator of tests/emu, and sizes are
tiny: it shows that the script runs to its end, and nothing else. It needs a checkout, as the current folder.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import platform
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import dpofast
from dpofast.bench.record import Record

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Imported once, in a process that does nothing else and that others are forked from. Not dpofast: that process looks in
# the current folder first, and a checkout's ./dpofast has no kernels.
PRELOAD = ["trl.trainer.dpo_trainer", "peft", "liger_kernel.chunked_loss", "transformers.models.llama.modeling_llama"]
VOCAB_BLOCK = 8192  # columns of fp64 logits at a time: of 1,000 tokens 64 MB
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
    low: float | None  # of the seconds: their 20th and 80th percentile
    high: float | None

    def records(self, of: Record, base: str = "products", what: str = "time") -> list[Record]:
        return [
            of.of(f"{what} / {base}", self.ratio, spread=self.spread),
            of.of(what, self.seconds, "s", low=self.low, high=self.high),
        ]


def in_turns(work: Work, base: Work, rounds: int, timer: Timer = seconds, warm: int = 1) -> Turns:
    return all_in_turns((work,), base, rounds, timer, warm)[0]


def all_in_turns(works: Sequence[Work], base: Work, rounds: int, timer: Timer = seconds, warm: int = 1) -> list[Turns]:
    for work in (*works, base) * warm:
        work()
    rows = [[timer(work) for work in (base, *works)] for _ in range(rounds)]
    bases, *columns = zip(*rows)
    return [_turns(bases, column) for column in columns]


def _turns(bases: Sequence[float], times: Sequence[float]) -> Turns:
    ratios = [b / a for a, b in zip(bases, times)]
    several = len(ratios) > 1
    quartiles = statistics.quantiles(ratios) if several else None
    fifths = statistics.quantiles(times, n=5, method="inclusive") if several else (None,)
    return Turns(
        statistics.median(ratios),
        (quartiles[2] - quartiles[0]) / 2 if quartiles else None,
        statistics.median(times),
        statistics.median(bases),
        fifths[0],
        fifths[-1],
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
    """logps, and d hidden and d weight of their sum times c: in fp64, a block of the vocabulary at a time."""
    rows = labels >= 0
    h, y, c = hidden[rows].double(), labels[rows], c[rows].unsqueeze(1)
    blocks = range(0, len(weight), VOCAB_BLOCK)
    lse, z_label = torch.full_like(h[:, 0], -torch.inf), torch.zeros_like(h[:, 0])

    def logits(start: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        w = weight[start : start + VOCAB_BLOCK].double()
        here = ((y >= start) & (y < start + len(w))).nonzero().squeeze(1)
        return w, h @ w.T, here, y[here] - start

    for start in blocks:
        _, z, here, columns = logits(start)
        lse = torch.logaddexp(lse, z.logsumexp(1))
        z_label[here] = z[here, columns]
    logps, d_hidden = (torch.zeros(x, dtype=torch.float64, device=h.device) for x in (labels.shape, hidden.shape))
    logps[rows] = z_label - lse
    d_rows, d_weight = torch.zeros_like(h), torch.zeros(weight.shape, dtype=torch.float64, device=h.device)
    for start in blocks:
        w, z, here, columns = logits(start)
        g = z.sub_(lse.unsqueeze(1)).exp_().neg_()
        g[here, columns] += 1
        g *= c
        d_rows.addmm_(g, w)
        torch.mm(g.T, h, out=d_weight[start : start + VOCAB_BLOCK])
    d_hidden[rows] = d_rows
    return logps, d_hidden, d_weight


def error(got: Tensor, want: Tensor) -> float:
    """Relative, of the whole tensor; NaN where anything is not finite."""
    parts = zip(got.split(VOCAB_BLOCK), want.split(VOCAB_BLOCK))  # a head in fp64 is gigabytes
    off = torch.stack([(a.double() - b).norm() for a, b in parts]).norm()
    return (off / want.norm()).item()


def row_error(got: Tensor, want: Tensor) -> float:
    """Mean over rows of the relative error of a row."""
    return ((got.double() - want).norm(dim=-1) / want.norm(dim=-1)).mean().item()


def in_a_process_of_its_own(work: Callable[..., Any], *args: Any, limit_s: float | None = None) -> Any:
    """What ``work`` returns in a new process.

    Raises:
        TimeoutError: it took longer than ``limit_s``.
        RuntimeError: it failed, or its process died.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, work, args))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit_s):
            raise TimeoutError(f"it took more than {limit_s:.0f} s")
        value, failure = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"its process ended with exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    if failure:
        raise RuntimeError(failure)
    return value


def _answer(sender: Any, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        sender.send((work(*args), ""))
    except Exception as failure:  # of whatever library
        traceback.print_exc()
        sender.send((None, first_line(failure)))


@contextlib.contextmanager
def at_most(n_bytes: int) -> Iterator[None]:
    """Let this process take so many bytes more (Linux); what wants more raises MemoryError."""
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    now = 1024 * int(re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    resource.setrlimit(resource.RLIMIT_DATA, (now + n_bytes, hard))
    try:
        yield
    except (RuntimeError, MemoryError) as failure:
        if isinstance(failure, RuntimeError) and "can't allocate memory" not in str(failure):
            raise
        raise MemoryError(f"it takes more than {n_bytes / 2**20:,.0f} MiB") from failure
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


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
