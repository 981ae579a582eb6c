"""How far off the CPU's cost model is: predicted over measured times of a grid of heads, and of real ones filtered.

    dpofast bench cost --out FILE --seconds 200       a piece: what FILE has is not measured again
    DPOFAST_CPU_ISA=avx2 dpofast bench cost ...       on another instruction set

Times are of forward and backward, medians after a first call. The machine's rates, which predictions are made from, are
measured anew beside each case, since a shared machine is not the same from one minute to the next. Hidden states of the
grid are random: nothing but a filter depends on them. Peers' rows say how far their algorithms' prices are from their
code: less than 1 is time that an algorithm would not need.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import dpofast
from dpofast.bench import record
from dpofast.bench.measure import DTYPES, first_line, machine, seconds
from dpofast.bench.providers import PEERS, ours, training_step
from dpofast.bench.record import Record, Results
from dpofast.bench.workloads import MODELS, load
from dpofast.plan import rates

Shape = tuple[int, int, int]  # completion tokens, hidden size, vocabulary

SHAPES: tuple[Shape, ...] = (
    (256, 576, 32000), (512, 576, 49152), (1024, 576, 49152), (2048, 576, 32000), (4096, 576, 49152),
    (8192, 576, 32000), (256, 640, 262144), (1024, 640, 262144), (2048, 640, 128256), (256, 1024, 151936),
    (1024, 1024, 151936), (2048, 1024, 49152), (4096, 1024, 32000), (256, 2048, 49152), (512, 2048, 32000),
    (1024, 2048, 128256),
)  # fmt: skip
WAYS = (("trained", "1GiB"), ("frozen", "1GiB"), ("scored", "1GiB"), ("trained", "64MiB"), ("frozen", "16MiB"))
"""The head, and the budget. Each shape has the first, and two others, by turns."""
LARGEST = 3 << 30  # bytes of the head, its gradient and the cache
CUT = 2.0**-14
SCALES = (1.0, 0.7)  # of a real model's hidden states: smaller ones are flatter, so that more is kept
PEER_SHAPES: tuple[Shape, ...] = ((256, 576, 32000), (512, 576, 49152))
WITHIN = (0.10, 0.25)


class Case(NamedTuple):
    shape: Shape
    dtype: str
    head: str
    budget: str
    threads: int
    model: str = ""  # whose hidden states they are, with a filter
    scale: float = 1.0
    peer: str = ""

    @property
    def facts(self) -> Record:
        filtered = f", grad_filter=2^-14, states x {self.scale}" if self.model else ""
        backend = "" if self.peer else dpofast.plan(8, 8, 8, self.dtype, backend="cpu").backend
        return Record(
            "cost", workload=self.model, shape=self.shape, provider=self.peer or "dpofast", head=self.head,
            dtype=self.dtype, backend=backend,
            case=f"{self.budget}{filtered}, {self.threads} thread{'s' * (self.threads > 1)}",
        )  # fmt: skip


def grid(threads: tuple[int, ...]) -> Iterator[Case]:
    """A third of it is in every third of the cases; numbers of threads take turns."""
    for turn in range(3):
        for i, shape in enumerate(SHAPES):
            for k, dtype in enumerate(("bf16", "fp32")):
                needed = 2 * shape[1] * shape[2] * DTYPES[dtype].itemsize + (1 << 30)
                ways = (WAYS[0], WAYS[1 + (i + k) % 4], WAYS[1 + (i + k + 2) % 4])
                if needed <= LARGEST:
                    yield Case(shape, dtype, *ways[(turn + i) % 3], threads[(turn + i + k) % len(threads)])


def filtered(threads: tuple[int, ...]) -> Iterator[Case]:
    shapes = {"SmolLM2": (1000, 576, 49152), "Gemma-3": (1000, 640, 262144)}
    for model in MODELS:
        for n in threads:
            for scale in SCALES:
                yield Case(shapes[model], "bf16", "trained", "1GiB", n, model, scale)
            yield Case(shapes[model], "fp32", "trained", "1GiB", n, model)
            yield Case(shapes[model], "bf16", "frozen", "1GiB", n, model)


def others(threads: tuple[int, ...]) -> Iterator[Case]:
    for shape in PEER_SHAPES:
        for peer in ("plain PyTorch", "TRL", "Liger", "cut-cross-entropy"):
            yield from (Case(shape, dtype, "trained", "", n, peer=peer) for dtype in ("fp32", "bf16") for n in threads)


PARTS = {"grid": grid, "filter": filtered, "peers": others}


states_of = functools.lru_cache(maxsize=1)(load)


def tensors(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the head, labels."""
    if case.model:
        states = states_of(case.model, case.shape[0])
        hidden, labels = states.completion
        return hidden * case.scale, states.weight, labels
    n, h, v = case.shape
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, h, generator=g), torch.empty(v, h).normal_(0, 2 / h**0.5, generator=g)
    return hidden, weight, torch.randint(v, (n,), generator=g)


def kept_share(hidden: Tensor, weight: Tensor, labels: Tensor, filters: dict) -> float:
    """What a filter keeps of the entries; all of them where the call has exact gradients."""
    h = hidden.detach().requires_grad_()
    dropped = dpofast.linear_logprob(h, weight, labels, outputs=("dropped_mass",), **filters).dropped_mass
    if not dropped.any():
        return 1.0
    h, y = hidden[::8].float(), labels[::8].unsqueeze(1)
    others = (h @ weight.float().T).softmax(-1).scatter_(1, y, 0.0)
    kept = (others > CUT * others.sum(1, keepdim=True)) | (dropped[::8].unsqueeze(1) == 0)
    return kept.double().mean().item()


def measure(case: Case, rounds: int) -> list[Record]:
    torch.set_num_threads(case.threads)
    hidden, weight, labels = tensors(case)
    hidden, weight = hidden.to(DTYPES[case.dtype]), weight.to(DTYPES[case.dtype])
    how = {"memory_budget": case.budget, "backend": "cpu"} | ({"grad_filter": CUT} if case.model else {})
    kept = kept_share(hidden, weight, labels, how) if case.model else None
    provider = PEERS[case.peer] if case.peer else ours(**how)
    run, leaves = training_step(provider, hidden, weight, labels, case.head == "trained")

    def score() -> object:
        with torch.no_grad():
            return provider(*leaves, labels)

    work = score if case.head == "scored" else run
    plans = [planned(case, kept)]
    try:
        took = [seconds(work)]
    except (ImportError, AttributeError, RuntimeError, TypeError) as failure:
        return [case.facts._replace(metric="predicted / measured", failed=first_line(failure))]
    took = [seconds(work) for _ in range(2 if took[0] > 2 else rounds)]
    plans.append(planned(case, kept))
    measured, predicted = statistics.median(took), statistics.mean(seconds for _, seconds in plans)
    facts = case.facts._replace(schedule=plans[0][0])
    found = [facts.of("predicted / measured", predicted / measured), facts.of("time", measured, "s")]
    return found if kept is None else [*found, facts.of("entries kept, share", kept)]


def planned(case: Case, kept: float | None) -> tuple[str, float]:
    """The schedule and its predicted seconds, at rates measured now."""
    rates.forget()
    more = {} if kept is None else {"grad_filter": CUT, "kept": kept}
    if case.peer:
        more |= {"with_peers": True, "longest_pair": case.shape[0]}
    plan = dpofast.plan(
        *case.shape, case.dtype, backend="cpu", train_hidden=case.head != "scored", train_head=case.head == "trained",
        memory_budget=case.budget or None, **more,
    )  # fmt: skip
    if case.peer:
        return "", next(peer.seconds for peer in plan.peers if peer.name == case.peer)
    return plan.schedule, plan.predicted_seconds


def summary(results: Results) -> Iterator[str]:
    """The shares of cases that are near."""
    ratios = [r for r in results.where(metric="predicted / measured") if r.value]
    groups = {(r.provider, r.dtype, bool(r.workload)) for r in ratios}
    for group in sorted(groups):
        of = [r.value for r in ratios if (r.provider, r.dtype, bool(r.workload)) == group]
        near = ", ".join(f"{share(of, off):.0%} within {off:.0%}" for off in WITHIN)
        name = f"{group[0]}, {group[1]}{', filtered' * group[2]}"
        yield f"{name}: {len(of)} cases, {near}, {min(of):.2f} to {max(of):.2f}, median {statistics.median(of):.2f}"


def share(ratios: list[float], off: float) -> float:
    """Of those that are no further off than that."""
    return sum(abs(x - 1) <= off for x in ratios) / len(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=200, help="no case begins later than this (default 200)")
    parser.add_argument("--rounds", type=int, default=3, help="runs per case, median taken (default 3)")
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2), help="numbers of threads (default 1 and 2)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="some of them (default: all)")
    record.add_out(parser)
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    results, out = record.begin(args.out, "cost", machine())
    if out.exists():
        results = Results(results.machine, record.read(out).records)
    known = {(r.provider, r.workload, r.shape, r.head, r.dtype, r.backend, r.case) for r in results.records}
    cases = [case for part in args.parts for case in PARTS[part](tuple(args.threads))]
    for case in cases:
        f = case.facts
        if (f.provider, f.workload, f.shape, f.head, f.dtype, f.backend, f.case) in known:
            continue
        if time.monotonic() > end:
            print("more is left: run it again")
            break
        results.add([measure(case, args.rounds)])
        results.save(out)
        dpofast.empty_cache()
    print("\n".join(summary(results)))


if __name__ == "__main__":
    main()
