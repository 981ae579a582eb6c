"""Whole steps of the head, by schedule and size of tile, and what the host takes: how a GPU's tiles were chosen.

    dpofast bench gpu_steps --out steps.json
    dpofast bench gpu_steps --rehearse       on the CPU, the kernels emulated, tiny

A schedule is forced, whatever the planner would take. Ratios are medians in turns with three (two, of a frozen head)
bare ``torch.mm`` of the same shapes. Shapes come from the most to the least telling; those left after --seconds are not
run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import dpofast
from dpofast import primitive
from dpofast.backends import registry
from dpofast.bench import record
from dpofast.bench.measure import Timer, device_for, first_line, in_turns, machine, synchronize
from dpofast.bench.providers import Products, ours, training_step
from dpofast.bench.record import Record
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
        self.products = Products(self.hidden, self.weight, reuse=True)

    def run(self, schedule: Schedule, backend: str, rounds: int) -> list[Record]:
        trained = not schedule.keeps_jacobian
        facts = Record("steps", "time", shape=self.shape, provider="dpofast", backend=backend, dtype="bf16")
        tile = schedule.token_chunk, schedule.block
        facts = facts._replace(head="trained" if trained else "frozen", schedule=schedule.name, tile=tile)
        facts = facts._replace(case="scored by the fused product" if schedule.scores_fused else "")
        provider = ours(ignore_index=None, backend=backend)
        step, _ = training_step(provider, self.hidden, self.weight, self.labels, trained)
        planned, primitive.chosen = primitive.chosen, lambda *args, **kwargs: schedule
        try:
            turns = in_turns(step, self.products.first(3 if trained else 2), rounds, self.timer, warm=2)
        except Exception as failure:
            return [facts._replace(failed=first_line(failure))]
        finally:
            primitive.chosen = planned
        return turns.records(facts)


def cases(n: int, h: int, v: int, fuses: bool, tiles: tuple[float, ...], older: bool) -> Iterator[tuple[Schedule, str]]:
    for megabytes in tiles if fuses else tiles[1:]:
        yield forced("cached", n, h, v, n, megabytes), "cuda"
        yield forced("jacobian", n, h, v, n, megabytes), "cuda"
    recompute = forced("recompute", n, h, v, n, tiles[2])
    if fuses:
        yield recompute._replace(scores_fused=True), "cuda"
    for backend in ("cuda", "triton") if older else ("cuda",):
        yield recompute, backend


def host(device: torch.device, n: int, h: int, v: int, count: int) -> Iterator[list[Record]]:
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
        facts = Record("host", shape=(n, h, v), provider="dpofast", backend="cuda", dtype="bf16", case=name)
        yield [facts.of("time of the host", queued, "s"), facts.of("time", done, "s")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    record.add_out(parser)
    parser.add_argument("--seconds", type=float, default=40, help="begin nothing after this time (default 40)")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU")
    args = parser.parse_args()
    began, device = time.monotonic(), device_for(args.rehearse)
    fuses = cost.device_of(device).fuses
    older = not args.rehearse and not registry.why_not("triton", device.type)
    tiles = (0, 0.002, 0.01) if args.rehearse else TILES
    rounds = 1 if args.rehearse else 5
    results, out = record.begin(args.out, "steps", machine(device))
    results.add(host(device, *((32, 8, 200, 2) if args.rehearse else (64, 1024, 32000, 40))))
    for shape in TINY if args.rehearse else SHAPES:
        step = Step(device, *shape)
        for schedule, backend in cases(*shape, fuses, tiles, older):
            if time.monotonic() - began > args.seconds:
                print("no time left")
                break
            results.add([step.run(schedule, backend, rounds)])
        results.save(out)
        step = None
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
