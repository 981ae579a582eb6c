"""How near the CPU kernels are to the hardware, and what a small call costs.

    dpofast bench hardware            a minute

Shares are of a loop of independent multiply-adds on one core, measured in the same run: the micro-kernel on operands in
the caches, and forward and backward of a trained head (three products). Small problems are forward and backward against
plain PyTorch, told which positions count; medians of runs in turns.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator

import torch

import dpofast
from dpofast.bench import record
from dpofast.bench.measure import in_turns, machine, seconds
from dpofast.bench.providers import Provider, ours, plain_logps, training_step
from dpofast.bench.record import Record
from dpofast.bench.workloads import load
from dpofast.contract import DTYPE_CODES
from dpofast.native import C

SMALL = ((8, 16, 100), (32, 64, 1000), (256, 256, 4096), (2048, 64, 1000))  # N, H, V
BASE = Record("hardware", provider="dpofast", head="trained", dtype="fp32")


def shares(rounds: int) -> Iterator[list[Record]]:
    """Shares of the multiply-adds of as many cores as there are threads."""
    states = load("SmolLM2", 1000)
    work, _ = training_step(ours(memory_budget="4GiB"), states.hidden, states.weight, states.labels)
    n, h, v = states.shape
    work()
    backend = dpofast.plan(n, h, v, "fp32", backend="cpu").backend
    isa, threads = backend.partition(":")[2], torch.get_num_threads()
    found: dict[str, list[float]] = {"micro-kernel": [], "whole op": []}
    for _ in range(rounds):
        core, micro_kernel = C.peak(isa, DTYPE_CODES[torch.float32], DTYPE_CODES[torch.float32])
        found["micro-kernel"].append(micro_kernel / core)
        found["whole op"].append(6 * n * h * v / seconds(work) / (threads * core))
    for case, each in found.items():
        facts = BASE._replace(workload=states.name, shape=states.shape, backend=backend, case=case)
        yield [facts.of("share of the multiply-adds", statistics.median(each))]


def small(shape: tuple[int, int, int], rounds: int) -> list[Record]:
    """Forward and backward of n tokens."""
    n, h, v = shape
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, h, generator=g), torch.randn(v, h, generator=g)
    labels = torch.randint(v, (n,), generator=g)
    count = max(1, 2**24 // (n * h * v))  # calls in a run, so that it is longer than the clock's steps

    def repeat(provider: Provider):
        run, _ = training_step(provider, hidden, weight, labels)
        return lambda: [run() for _ in range(count)]

    turns = in_turns(repeat(ours()), repeat(lambda *x: plain_logps(*x).sum()), rounds)
    took = turns.seconds / count
    facts = BASE._replace(shape=shape, backend=dpofast.plan(*shape, "fp32", backend="cpu").backend)
    more = facts.of("time - plain PyTorch", 1e3 * took * (1 - 1 / turns.ratio), "ms")
    return [*turns._replace(seconds=took).records(facts, "plain PyTorch"), more]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31, help="runs per row, median taken (default 31)")
    record.add_out(parser)
    args = parser.parse_args()
    results, out = record.begin(args.out, "hardware", machine())
    results.add(shares(max(3, args.rounds // 4)))
    results.add(small(shape, args.rounds) for shape in SMALL)
    results.save(out)


if __name__ == "__main__":
    main()
