"""A loss by whole pairs against the same loss in the ordinary way, under budgets that hold no cache of all tokens.

    dpofast bench pairs --tokens 2000

Both in turns, as ratios to the three bare products of the same run.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator

import torch

import dpofast
from dpofast import functional
from dpofast.bench import record
from dpofast.bench.measure import DTYPES, machine, seconds
from dpofast.bench.providers import Products
from dpofast.bench.record import Record

BUDGETS = {"fp32": ("64MiB", "128MiB", "256MiB"), "bf16": ("160MiB", "192MiB")}
EVERYTHING = "1GiB"
"""Holds the exponentials of all tokens: what the ordinary way takes then says what a product made again costs."""
N_PAIRS = 10


def step(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, budget: str) -> Callable[[], None]:
    def work() -> None:
        for leaf in (hidden, weight):
            leaf.grad = None
        loss = dpofast.linear_dpo_loss(hidden, weight, labels, loss_type="simpo", memory_budget=budget).loss
        loss.backward()

    return work


def in_the_ordinary_way(work: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        schedule = functional.pairs_schedule
        functional.pairs_schedule = lambda *_: None
        try:
            work()
        finally:
            functional.pairs_schedule = schedule

    return run


def times(n: int, h: int, v: int, rounds: int) -> Iterator[list[Record]]:
    torch.manual_seed(0)
    hidden = torch.randn(2 * N_PAIRS, n // (2 * N_PAIRS), h)
    weight, labels = torch.randn(v, h) * 0.1, torch.randint(v, hidden.shape[:2])
    bare = Products(hidden.view(-1, h), weight).first(3)  # in fp32 also for bf16, which few CPUs multiply faster
    for dtype, budgets in BUDGETS.items():
        x, w = (t.to(DTYPES[dtype]).requires_grad_() for t in (hidden, weight))
        for budget in (*budgets, EVERYTHING):
            work = step(x, w, labels, budget)
            runs = {"ordinary": in_the_ordinary_way(work)} | ({"by pairs": work} if budget != EVERYTHING else {})
            found = {name: [] for name in runs}
            for i in range(rounds + 1):  # the first is a warm-up; who comes first changes
                base = seconds(bare)
                for name in list(runs)[:: 1 if i % 2 else -1]:
                    found[name].append(seconds(runs[name]) / base)
            backend = dpofast.plan(8, 8, 8, dtype, backend="cpu").backend
            facts = Record("pairs", shape=(n, h, v), backend=backend, head="trained", dtype=dtype, case=budget)
            yield [
                facts._replace(provider=name).of("time / products", statistics.median(values[1:]))
                for name, values in found.items()
            ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2000, help="completion tokens (default 2000)")
    parser.add_argument("--rounds", type=int, default=5, help="runs per row, median taken (default 5)")
    record.add_out(parser)
    args = parser.parse_args()
    results, out = record.begin(args.out, "pairs", machine())
    sys.modules[functional.pairs_schedule.__module__].WORTHWHILE = math.inf  # whatever the planner thinks of it
    results.add(times(args.tokens, 576, 49152, args.rounds))
    results.save(out)


if __name__ == "__main__":
    main()
