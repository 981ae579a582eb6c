"""Everybody's time and memory against the number of tokens N and the vocabulary V, and the lines through them.

    dpofast bench sweep                          N 256, 1024, 4096, 16384; fp32, and bf16 where PyTorch has it fast
    dpofast bench sweep --seconds 200            begins no point later than that; run it again to go on
    dpofast bench sweep --vocab 32768 131072     other vocabularies

Hidden states and head of SmolLM2 (H 576): its tokens repeat beyond the first thousand, and a V that is not its own has
the first rows of its head, or them again. Forward and backward, head trained, everybody told which tokens count. Time
is a ratio to three ``torch.mm`` in the same dtype and run, of 1,024 tokens at a time, in turns. Memory is the growth of
the resident set at its worst, above inputs and gradients. Each provider runs in a process of its own. A point that the
one before says to be beyond a limit is left out, and the record says so.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from torch import Tensor

import dpofast
from dpofast._memory import peak_growth
from dpofast.bench import record
from dpofast.bench.filter import FILTERS
from dpofast.bench.head import dtypes
from dpofast.bench.measure import DTYPES, error, exact, first_line, in_turns, machine, row_error, seconds
from dpofast.bench.providers import PEERS, Products, Provider, ours, training_step
from dpofast.bench.record import Record, Results
from dpofast.bench.workloads import MODELS, load
from dpofast.plan import parse_bytes

TOKENS = (256, 1024, 4096, 16384)
AT_ONCE = 1024  # tokens of the bare products
BUDGET = "256MiB"
FILTERED = "dpofast, grad_filter"
PROVIDERS = ("dpofast", FILTERED, *PEERS)
OTHER_LOSS = ("Liger",)  # a loss of pairs, whose gradients are not those of the sum


def provider(name: str, dtype: str) -> Provider:
    """A function that returns the negative sum of the log-probs, but for those of `OTHER_LOSS`."""
    if name in PEERS:
        return PEERS[name]
    how = ours(memory_budget=BUDGET, grad_filter=FILTERS[dtype][1] if name == FILTERED else None)
    return lambda h, w, y: -how(h, w, y)


def facts_of(name: str, dtype: str, shape: tuple[int, int, int]) -> Record:
    mine = name.startswith("dpofast")
    backend = dpofast.plan(8, 8, 8, dtype, backend="cpu").backend if mine else ""
    case = ", ".join((BUDGET, FILTERS[dtype][0])[: 1 + (name == FILTERED)]) if mine else ""
    facts = Record("sweep", workload=MODELS[0], shape=shape, provider=name, backend=backend, head="trained")
    return facts._replace(dtype=dtype, case=case)


def tensors(file: Path, dtype: str, n: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [N, H], weight [V, H] and labels [N], repeated or cut."""
    saved = torch.load(file)

    def as_many(x: Tensor, count: int) -> Tensor:
        return torch.cat([x] * -(-count // len(x)))[:count].clone()

    hidden, weight = (as_many(saved[name], count).to(DTYPES[dtype]) for name, count in (("hidden", n), ("weight", v)))
    return hidden, weight, as_many(saved["labels"], n) % v


def point(file: Path, facts: Record, with_error: bool) -> list[Record]:
    """What one provider takes at one size. Runs in the provider's process."""
    n, _, v = facts.shape
    hidden, weight, labels = tensors(file, facts.dtype, n, v)
    work = provider(facts.provider, facts.dtype)
    # Threads, libraries and compilers come to life in a small call, so that they are not counted.
    training_step(work, hidden[:64], weight, labels[:64])[0]()
    run, leaves = training_step(work, hidden, weight, labels)
    growth = peak_growth(run)
    found = [] if growth is None else [facts.of("peak memory", growth - sum(x.grad.nbytes for x in leaves), "B")]
    if with_error:
        _, *want = exact(hidden, weight, labels, -torch.ones(n, dtype=torch.float64))
        found += [
            facts.of("error of d hidden", row_error(leaves[0].grad, want[0])),
            facts.of("error of d weight", error(leaves[1].grad, want[1])),
        ]
        del want
    some = hidden[:AT_ONCE]
    products, scale = Products(some, weight, reuse=True).first(3), len(some) / n
    products()
    took = seconds(run)
    turns = in_turns(run, products, 5 if took < 1 else 3 if took < 5 else 1, warm=0)
    spread = turns.spread and turns.spread * scale
    return [*turns._replace(ratio=turns.ratio * scale, spread=spread).records(facts), *found]


def beyond(before: list[Record], n: int, limits: dict[str, float]) -> str:
    """Why a point of n tokens is left out, from what the one before took; empty if it is not."""
    for r in before:
        if r.failed:
            return r.failed
        expected = r.value * n / r.shape[0]
        if expected > limits.get(r.metric, expected):
            what = f"{expected:.0f} s" if r.unit == "s" else f"{expected / 2**20:.0f} MiB"
            return f"left out: {what} expected from {r.shape[0]:,} tokens"
    return ""


def points(
    done: Results, file: Path, series: list[Record], limits: dict[str, float], end: float
) -> Iterator[list[Record]]:
    """One provider's points by size, those that are not there yet, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        before: list[Record] = []
        for i, facts in enumerate(series):
            same = facts._asdict().items() - {("metric", ""), ("value", None), ("unit", "")}
            there = [r for r in done.records if same <= r._replace(spread=None, failed="")._asdict().items()]
            if not there:
                if time.monotonic() > end:
                    return
                why = beyond(before, facts.shape[0], limits)
                there = [facts._replace(metric="time", failed=why)] if why else attempt(pool, file, facts, i == 0)
                yield there
            before = there


def attempt(pool: ProcessPoolExecutor, file: Path, facts: Record, smallest: bool) -> list[Record]:
    try:
        return pool.submit(point, file, facts, smallest and facts.provider not in OTHER_LOSS).result()
    except (ImportError, AttributeError, RuntimeError, TypeError, ValueError, BrokenProcessPool) as failure:
        return [facts._replace(metric="time", failed=first_line(failure))]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=TOKENS, help=f"N (default {' '.join(map(str, TOKENS))})"
    )
    parser.add_argument("--vocab", type=int, nargs="+", default=None, help="V (default: the model's own, 49152)")
    parser.add_argument("--dtypes", nargs="+", default=dtypes(), choices=("fp32", "bf16"))
    parser.add_argument("--providers", nargs="+", default=PROVIDERS, choices=PROVIDERS, metavar="NAME")
    parser.add_argument("--seconds", type=float, default=3600, help="begin no point after this time (default 3600)")
    parser.add_argument("--limit-seconds", type=float, default=20, help="leave out longer steps (default 20)")
    parser.add_argument("--limit-memory", type=parse_bytes, default="2GiB", help="and larger ones (default 2GiB)")
    record.add_out(parser)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    end = time.monotonic() + args.seconds
    results, out = record.begin(args.out, "sweep", machine())
    if out.exists():
        results = record.read(out)
    limits = {"time": args.limit_seconds, "peak memory": args.limit_memory}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "states.pt")
        states = load(MODELS[0], AT_ONCE)
        hidden, labels = states.completion
        torch.save({"hidden": hidden, "weight": states.weight, "labels": labels}, file)
        _, h, own = states.shape
        for v in args.vocab or (own,):
            for dtype in args.dtypes:
                for name in args.providers:
                    series = [facts_of(name, dtype, (n, h, v)) for n in sorted(args.tokens)]
                    for found in points(results, file, series, limits, end):
                        results.add([found])
                        results.save(out)
    if time.monotonic() > end:
        print("out of time; run again to go on")


if __name__ == "__main__":
    main()
