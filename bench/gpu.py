"""The GPU benchmark: the head's time against bare matrix products and against the predictions, peers beside it.

    dpofast bench gpu                          every workload; results after each row
    dpofast bench gpu --only 8192,qwen3        workloads whose name has one of these in it
    dpofast bench gpu --peers                  the other libraries alone
    dpofast bench gpu --rehearse               a rehearsal of the script itself on the CPU

Times are medians by CUDA events. A row is timed in turns with the bare products of its gradients (three ``torch.mm`` in
bf16, two with a frozen head), and its time is given as a ratio to these and to the products of its own schedule, which
may make logits more than once. Rows already in the file are kept, so a run that was cut off goes on where it ended.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import dpofast
from dpofast.backends import registry
from dpofast.bench import record
from dpofast.bench.measure import Timer, Turns, Work, device_for, first_line, gpu_peak, in_turns, machine
from dpofast.bench.providers import PEERS, PEERS_ON_GPU, Products, Provider, ours, training_step
from dpofast.bench.record import Record
from dpofast.bench.workloads import IGNORE, TINY, WORKLOADS, Workload
from dpofast.plan import cost

SLOW = 0.1  # seconds: what takes longer is run three times only
CASES = (  # (its name, head, budget)
    ("g kept", "trained", "16GiB"),
    ("", "frozen", "4GiB"),
    ("default budget", "trained", None),
    ("small budget", "trained", "small"),
)
Row = tuple[Record, Callable[[Record], list[Record]]]  # its facts, and what measures it


class Bench:
    """One workload on one device."""

    def __init__(self, w: Workload, device: torch.device, rounds: int):
        hidden, self.weight, labels = w.inputs(device)
        counts = labels != IGNORE
        self.packed, self.packed_labels = hidden[counts], labels[counts]
        self.hidden, self.labels, self.device, self.rounds = hidden, labels, device, rounds
        self.timer, self.products = Timer(device), Products(self.packed, self.weight, reuse=True)
        self.bare_seconds = [self.timer.median(product) for product in self.products.each]
        self.shape = len(self.packed), w.hidden, w.vocab
        self.facts = Record("gpu", "time", workload=w.name, shape=self.shape, dtype="bf16")
        name = torch.cuda.get_device_name(device).lower().replace(" ", "") if device.type == "cuda" else ""
        self.sheet = next((key for key in cost.DEVICES if key in name), None)

    def turns(self, work: Work, base: Work) -> Turns:
        for f in (work, base):
            f()
        return in_turns(work, base, min(self.rounds, 3) if self.timer(work) > SLOW else self.rounds, self.timer)

    def peak(self, of: Record, work: Work, leaves: tuple[Tensor, ...]) -> list[Record]:
        return [of.of("peak memory", gpu_peak(work, leaves), "B")] if self.device.type == "cuda" else []

    def rows(self, backends: list[str]) -> Iterator[Row]:
        """dpofast's."""
        yield self.facts._replace(provider="torch.mm"), self.bare
        for case, head, budget in CASES:
            for backend in backends:
                facts = self.facts._replace(provider="dpofast", backend=backend, head=head, case=case)
                yield facts, lambda facts, budget=budget: self.step(facts, budget)
        if self.device.type == "cuda":
            yield self.facts._replace(provider="dpofast", backend="cuda", case="from logits"), self.from_logits

    def peers(self) -> Iterator[Row]:
        """The other libraries, told which tokens count; and dpofast on what they are given."""
        facts = self.facts._replace(head="trained", case="told which tokens count")
        best = ours(backend="cuda", memory_budget="16GiB", ignore_index=None)
        yield facts._replace(provider="dpofast", backend="cuda"), lambda facts: self.peer(facts, best)
        for name, provider in (PEERS_ON_GPU if self.device.type == "cuda" else PEERS).items():
            yield facts._replace(provider=name), lambda facts, provider=provider: self.peer(facts, provider)

    def bare(self, facts: Record) -> list[Record]:
        n, h, v = self.shape
        names = ("time of logits", "time of d hidden", "time of d weight")
        times = [facts.of(name, s, "s") for name, s in zip(names, self.bare_seconds)]
        return [*times, facts.of("speed", 3 * 2e-12 * n * h * v / sum(self.bare_seconds), "TFLOP/s")]

    def step(self, facts: Record, budget: str | None) -> list[Record]:
        n, h, v = self.shape
        if budget == "small":  # room for the sums and the tiles and hardly for g, what "32MiB" is to a small model
            budget = f"{max(64, 48 * n * h >> 20)}MiB"
        how = {"train_head": facts.head == "trained", "memory_budget": budget}
        plan = dpofast.plan(n, h, v, "bf16", backend=facts.backend, **how)
        provider = ours(backend=facts.backend, memory_budget=budget)
        run, leaves = training_step(provider, self.hidden, self.weight, self.labels, how["train_head"])
        turns = self.turns(run, self.products.first(plan.floor_products))
        # Products above the floor are logits made again.
        again = (plan.products - plan.floor_products) * self.bare_seconds[0]
        facts = facts._replace(schedule=plan.schedule, tile=(plan.token_chunk, plan.block))
        found = [
            *self.timed(facts, turns),
            facts.of("time / schedule's products", turns.seconds / (turns.base_seconds + again)),
            facts.of("products", plan.products),
            facts.of("budget", plan.memory_budget, "B"),
            *self.peak(facts, run, leaves),
            facts.of("gradients", sum(x.nbytes for x in leaves if x.requires_grad), "B"),
        ]
        if self.sheet and facts.backend == "cuda":
            on_paper = dpofast.plan(n, h, v, "bf16", device=self.sheet, **how)
            found.append(facts.of("predicted time", on_paper.predicted_seconds, "s"))
        return found

    @staticmethod
    def timed(facts: Record, turns: Turns) -> list[Record]:
        return [*turns.records(facts), facts.of("time of the products", turns.base_seconds, "s")]

    def peer(self, facts: Record, provider: Provider) -> list[Record]:
        run, leaves = training_step(provider, self.packed, self.weight, self.packed_labels)
        return [*self.timed(facts, self.turns(run, self.products.first(3))), *self.peak(facts, run, leaves)]

    def from_logits(self, facts: Record) -> list[Record]:
        """Share of copy bandwidth: forward reads the logits once, backward reads and writes them once."""
        n, v = min(4096, len(self.hidden)), self.shape[2]
        logits = torch.randn(n, v, device=self.device, dtype=torch.bfloat16).requires_grad_()
        labels = torch.randint(v, (n,), device=self.device)
        copy_to = torch.empty_like(logits)

        def run() -> None:
            logits.grad = None
            dpofast.logprob(logits, labels, ignore_index=None).logps.sum().backward()

        turns = self.turns(run, lambda: copy_to.copy_(logits.detach()))
        bandwidth = 2 * logits.nbytes / turns.base_seconds
        return [
            facts.of("share of copy bandwidth", 3 * logits.nbytes / turns.seconds / bandwidth),
            facts.of("time", turns.seconds, "s"),
            facts.of("copy bandwidth", bandwidth, "B/s"),
        ]


def attempt(facts: Record, work: Callable[[Record], list[Record]]) -> list[Record]:
    try:
        return work(facts)
    except Exception as error:  # of whatever library
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return [facts._replace(failed=first_line(error))]


def key(r: Record) -> tuple[str, ...]:
    """What a row is known by before it is measured."""
    return r.workload, r.provider, r.backend, r.head, r.case


def fill(results: record.Results, rows: Iterable[Row], end: float, out: Path) -> bool:
    """Measure the rows that are not there yet; False if the time is over before."""
    done = {key(r) for r in results.records}
    for facts, work in rows:
        if key(facts) not in done:
            if time.monotonic() > end:
                return False
            results.add([attempt(facts, work)])
            results.save(out)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="workloads whose name has one of these in it, separated by commas")
    parser.add_argument("--backends", default="cuda,triton,torch", help="of these, those that are here")
    parser.add_argument("--rounds", type=int, default=7, help="runs a row, median taken (default 7)")
    parser.add_argument("--seconds", type=float, default=300, help="begin no row after this time (default 300)")
    parser.add_argument("--peers", action="store_true", help="the other libraries alone")
    parser.add_argument("--rehearse", action="store_true", help="one tiny workload on the CPU")
    record.add_out(parser)
    args = parser.parse_args()

    end = time.monotonic() + args.seconds
    device = device_for(args.rehearse)
    results, out = record.begin(args.out, "gpu", machine(device))
    if out.exists():
        results = record.read(out)
    backends = [b for b in args.backends.split(",") if b in registry.added or not registry.why_not(b, device.type)]
    for w in TINY if args.rehearse else [w for w in WORKLOADS if any(x in w.name for x in args.only.split(","))]:
        bench = Bench(w, device, args.rounds)
        rows = bench.peers() if args.peers else bench.rows([b for b in backends if b != "torch" or w.with_torch])
        if not fill(results, rows, end, out):
            print("out of time; run again to go on")
            return
        del bench, rows  # before the next one's tensors are made


if __name__ == "__main__":
    main()
