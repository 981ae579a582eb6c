"""The head's benchmark: time against bare matrix products, errors against fp64, memory against the budget.

    make bench                        all of it, a few minutes
    dpofast bench head --quick        SmolLM2's head only
    dpofast bench                     everybody else, too

Every time is a ratio to ``torch.mm`` of the same shapes, measured in turns in the same run: the machine may be
shared. Prints the numbers and writes them with the machine and the date.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import dpofast
from dpofast.bench import record
from dpofast.bench.measure import DTYPES, error, exact, in_turns, machine, row_error
from dpofast.bench.providers import Products, ours, plain_logps, training_step
from dpofast.bench.record import Record
from dpofast.bench.workloads import IGNORE, MODELS, States, load
from dpofast.plan import parse_bytes

SPARE = 32 << 20  # bytes that a step may take above its budget


def dtypes() -> tuple[str, ...]:
    """The dtypes that PyTorch multiplies at speed: without AVX512-BF16 a bf16 product takes tens of times fp32's."""
    fast = dpofast.plan(8, 8, 8, backend="cpu").backend == "cpu:avx512_bf16"
    return ("bf16", "fp32") if fast else ("fp32",)


def base(states: States, dtype: str) -> Record:
    """The facts of what dpofast does with these states."""
    backend = dpofast.plan(8, 8, 8, dtype, backend="cpu").backend
    return Record("head", workload=states.name, shape=states.shape, provider="dpofast", backend=backend, dtype=dtype)


def times(states: States, rounds: int) -> Iterator[list[Record]]:
    """Times of a trained head everything of which is kept; in bf16 of a frozen one and of a small budget, too."""
    cases = (("trained", "4GiB", DTYPES), ("frozen", "1GiB", ("bf16",)), ("trained", "32MiB", ("bf16",)))
    for name in dtypes():
        hidden, weight = states.hidden.to(DTYPES[name]), states.weight.to(DTYPES[name])
        products = Products(hidden[states.labels != IGNORE], weight)
        for head, budget, those in cases:
            if name in those:
                run, _ = training_step(ours(memory_budget=budget), hidden, weight, states.labels, head == "trained")
                facts = base(states, name)._replace(head=head, case=budget)
                turns = in_turns(run, products.first(3 if head == "trained" else 2), rounds)
                yield turns.records(facts)
        dpofast.empty_cache()


def errors(states: States) -> Iterator[list[Record]]:
    """Errors of the gradients of the sum of logps, and their ratios to plain PyTorch's."""

    def plain(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return plain_logps(h, w, y).sum()

    for name in dtypes():
        hidden, labels = states.completion
        hidden, weight = hidden.to(DTYPES[name]), states.weight.to(DTYPES[name])
        _, *want = exact(hidden, weight, labels, torch.ones(len(labels), dtype=torch.float64))
        off = []
        for provider in (ours(memory_budget="4GiB"), plain):
            run, leaves = training_step(provider, hidden, weight, labels)
            run()
            off.append([measure(leaf.grad, x) for measure, leaf, x in zip((row_error, error), leaves, want)])
        for case, mine, theirs in zip(("d hidden", "d weight"), *off):
            facts = base(states, name)._replace(head="trained", case=case)
            yield [facts.of("error / plain PyTorch", mine / theirs), facts.of("error", mine)]


PEAK = """
import sys, torch
from dpofast._memory import peak_growth
import dpofast
n, budget, train_head = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "trained"
saved = torch.load(sys.argv[4])
hidden = saved["hidden"].repeat(-(-n // len(saved["hidden"])), 1)[:n].clone().requires_grad_()
labels = saved["labels"].repeat(-(-n // len(saved["labels"])))[:n].clone()
weight = saved["weight"].requires_grad_(train_head)
del saved
kept = []
def work():
    logps = dpofast.linear_logprob(hidden, weight, labels, memory_budget=budget).logps
    logps.sum().backward()
    kept.append(logps.detach())
# Threads, autograd's engine and the allocator come to life in a small call, so that they are not counted.
dpofast.linear_logprob(hidden[:64], weight.detach(), labels[:64]).logps.sum().backward()
hidden.grad = None
growth = peak_growth(work)
alive = sum(t.numel() * t.element_size() for t in (hidden.grad, weight.grad, *kept) if t is not None)
print(growth - alive)
"""


def memory(states: States) -> Iterator[list[Record]]:
    """Measured peaks above inputs, outputs and gradients, each in a process of its own. Linux only."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "states.pt")
        hidden, labels = states.completion
        torch.save({"hidden": hidden.bfloat16(), "weight": states.weight.bfloat16(), "labels": labels}, file)
        for budget in ("32MiB", "256MiB"):
            for n in (1000, 8000):
                for head in ("trained", "frozen"):
                    command = [sys.executable, "-c", PEAK, str(n), budget, head, str(file)]
                    # In `folder`: beside the sources, `-c` would import those instead of the installed package.
                    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder)
                    used = int(done.stdout)
                    facts = base(states, "bf16")._replace(shape=(n, *states.shape[1:]), head=head, case=budget)
                    share = used / (parse_bytes(budget) + SPARE)
                    yield [facts.of("peak memory / (budget + 32 MiB)", share), facts.of("peak memory", used, "B")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="SmolLM2's head only, fewer rounds")
    parser.add_argument("--tokens", type=int, default=1000, help="completion tokens (default 1000)")
    parser.add_argument("--rounds", type=int, default=15, help="runs per row, median taken (default 15)")
    record.add_out(parser)
    args = parser.parse_args()
    results, out = record.begin(args.out, "head", machine())
    rounds = 3 if args.quick else args.rounds
    for name in MODELS[:1] if args.quick else MODELS:
        states = load(name, args.tokens)
        print(f"{name}: {len(states.labels)} positions, {args.tokens} completion tokens", flush=True)
        results.add(times(states, rounds))
        results.add(errors(states))
        results.add(memory(states))
    results.save(out)


if __name__ == "__main__":
    main()
