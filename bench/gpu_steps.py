"""Whole steps of the head, by schedule and size of tile, and what the host takes: how a GPU's tiles were chosen.

    python bench/gpu_steps.py --out steps.json
    python bench/gpu_steps.py --rehearse       on the CPU, the kernels emulated, tiny

A schedule is forced, whatever the planner would take. Ratios are medians in turns with three (two, of a frozen head)
bare ``torch.mm`` of the same shapes. Shapes come from the most to the least telling; those left after --seconds are not
run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_common import Timer, device_for, first_line, synchronize
from torch import Tensor

import dpofast
from dpofast import primitive
from dpofast.backends import registry
from dpofast.plan import Schedule, cost
from dpofast.plan.schedule import up

SHAPES = ((8192, 4096, 151936), (1638, 1024, 151936), (2900, 1152, 262144), (5700, 4096, 128256))  # N, H, V
TINY = ((24, 16, 1000),)
TILES = (0, 25, 150, 300, 600)  # MB of fp32 logits; 0: none, the product exponentiates


def forced(name: str, n: int, h: int, v: int, chunk: int, megabytes: float) -> Schedule:
    block = min(v, max(64, int(megabytes * 2**20) // (4 * chunk) // 64 * 64)) if megabytes else 0
    kept = {"cached": up(v, 8) * 2, "jacobian": h * 4}.get(name)
    return Schedule.of(name, (block, chunk, n * kept + n * 4 if kept else 0))


class Step:
    """Forward and backward of the head on random operands, and the bare products beside it."""

    def __init__(self, device: torch.device, n: int, h: int, v: int):
        self.timer, self.shape = Timer(device), (n, h, v)
        made = {"device": device, "dtype": torch.bfloat16}
        self.hidden = torch.randn(n, h, **made)
        self.weight = torch.randn(v, h, **made) * h**-0.5
        self.labels = torch.randint(v, (n,), device=device)
        self.g, self.logits = torch.randn(n, v, **made), torch.empty(n, v, **made)
        self.d_hidden, self.d_weight = torch.empty_like(self.hidden), torch.empty_like(self.weight)

    def bare(self, count: int) -> None:
        torch.mm(self.hidden, self.weight.T, out=self.logits)
        torch.mm(self.g, self.weight, out=self.d_hidden)
        if count > 2:
            torch.mm(self.g.T, self.hidden, out=self.d_weight)

    def run(self, schedule: Schedule, backend: str, rounds: int) -> dict[str, Any]:
        trained = not schedule.keeps_jacobian
        hidden, weight = self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_(trained)

        def forward() -> Tensor:
            return dpofast.linear_logprob(hidden, weight, self.labels, ignore_index=None, backend=backend).logps.sum()

        def step() -> None:
            hidden.grad = weight.grad = None
            forward().backward()

        def bare() -> None:
            self.bare(3 if trained else 2)

        planned, primitive.chosen = primitive.chosen, lambda *args, **kwargs: schedule
        try:
            for work in (step, bare, step, bare):
                work()
            pairs = [(self.timer(bare), self.timer(step)) for _ in range(rounds)]
        finally:
            primitive.chosen = planned
        return {
            "shape": self.shape, "schedule": schedule.name, "chunk": schedule.token_chunk, "block": schedule.block,
            "backend": backend, "seconds": statistics.median(s for _, s in pairs),
            "ratio": statistics.median(s / b for b, s in pairs),
        }  # fmt: skip


def cases(n: int, h: int, v: int, fuses: bool, tiles: tuple[float, ...], older: bool) -> Iterator[tuple[Schedule, str]]:
    for megabytes in tiles if fuses else tiles[1:]:
        yield forced("cached", n, h, v, n, megabytes), "cuda"
        yield forced("jacobian", n, h, v, n, megabytes), "cuda"
    for backend in ("cuda", "triton") if older else ("cuda",):
        yield forced("recompute", n, h, v, n, tiles[2]), backend


def host(device: torch.device, n: int, h: int, v: int, count: int) -> Iterator[dict[str, Any]]:
    """Seconds of the host in one call, and with its wait for the device."""
    made = {"device": device, "dtype": torch.bfloat16}
    hidden = torch.randn(16, n // 16, h, **made).requires_grad_()
    weight = (torch.randn(v, h, **made) * h**-0.5).requires_grad_()
    labels, ref_logps = torch.randint(v, (16, n // 16), device=device), torch.randn(16, device=device)

    def forward() -> Tensor:
        return dpofast.linear_logprob(hidden, weight, labels, backend="cuda").logps.sum()

    def backward_of(loss: Tensor) -> None:
        hidden.grad = weight.grad = None
        loss.backward()

    calls: dict[str, Callable[[], object]] = {
        "forward": forward,
        "forward + backward": lambda: backward_of(forward()),
        "step of linear_dpo_loss": lambda: backward_of(
            dpofast.linear_dpo_loss(hidden, weight, labels, ref_logps=ref_logps, backend="cuda").loss
        ),
    }
    for name, call in calls.items():
        for _ in range(3):
            call()
        synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            call()
        queued = (time.perf_counter() - start) / count
        synchronize(device)
        done = (time.perf_counter() - start) / count
        yield {"name": name, "shape": (n, h, v), "seconds": queued, "seconds_with_device": done}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=None, help="the JSON file")
    parser.add_argument("--seconds", type=float, default=40, help="begin nothing after this time (default 40)")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU")
    args = parser.parse_args()
    began, device = time.monotonic(), device_for(args.rehearse)
    fuses = cost.device_of(device).fuses
    older = not args.rehearse and not registry.why_not("triton", device.type)
    tiles = (0, 0.002, 0.01) if args.rehearse else TILES
    rounds, results = 1 if args.rehearse else 5, {"host": [], "steps": []}

    for entry in host(device, *((32, 8, 200) if args.rehearse else (64, 1024, 32000)), 2 if args.rehearse else 40):
        results["host"].append(entry)
        print(
            f"host, {entry['name']:<24} {entry['shape']} {entry['seconds'] * 1e6:6.0f} us a call, "
            f"{entry['seconds_with_device'] * 1e6:6.0f} with the device",
            flush=True,
        )
    for shape in TINY if args.rehearse else SHAPES:
        step = Step(device, *shape)
        for schedule, backend in cases(*shape, fuses, tiles, older):
            if time.monotonic() - began > args.seconds:
                print("no time left")
                break
            try:
                result = step.run(schedule, backend, rounds)
                print(
                    f"{shape} {backend} {schedule.name:<10} chunk {schedule.token_chunk:<5} block {schedule.block:<6} "
                    f"{result['seconds'] * 1e3:8.2f} ms, ratio {result['ratio']:.3f}",
                    flush=True,
                )
            except Exception as error:
                result = {"shape": shape, "schedule": schedule.name, "failed": first_line(error)}
                print(shape, schedule.name, result["failed"], flush=True)
            results["steps"].append(result)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")
        step = None
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
