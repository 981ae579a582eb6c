"""Filtered gradients: their time against exact ones and the bare products, and their errors against plain PyTorch's.

    dpofast bench filter                 SmolLM2's head and Gemma-3's, about half an hour
    dpofast bench filter --quick         SmolLM2's head only, fewer rounds

Real hidden states, since random ones are flat. Times are ratios to three ``torch.mm`` in fp32 of the same run: on a CPU
without AVX512-BF16 nothing in PyTorch is faster. Errors are those of the gradients of the sum of logps.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator

import torch
from torch import Tensor

import dpofast
from dpofast import grad_filter
from dpofast.bench import record
from dpofast.bench.measure import DTYPES, error, exact, first_line, machine, seconds
from dpofast.bench.providers import PEERS, Products, ours, plain_logps, training_step
from dpofast.bench.record import Record
from dpofast.bench.workloads import IGNORE, MODELS, States, load

EXACT, AUTO, CUT = "exact", 'grad_filter="auto"', "grad_filter=2**-14"
WAYS = {EXACT: None, AUTO: "auto", CUT: 2.0**-14}
IN = {"fp32": (EXACT, CUT), "bf16": (EXACT, AUTO)}  # in fp32 "auto" is exact
BUDGET = "4GiB"
PARTS = ("times", "peers", "errors")
FLAT = 0.02  # times a real model's hidden states: their logits are nearly all the same


def base(states: States, dtype: str) -> Record:
    backend = dpofast.plan(8, 8, 8, dtype, backend="cpu").backend
    facts = Record("filter", workload=states.name, shape=states.shape, provider="dpofast", backend=backend, dtype=dtype)
    return facts._replace(head="trained")


def times(states: States, rounds: int) -> Iterator[list[Record]]:
    hidden, labels = states.completion
    products = Products(hidden, states.weight).first(3)
    for dtype, ways in IN.items():
        h, w = hidden.to(DTYPES[dtype]), states.weight.to(DTYPES[dtype])
        runs = {
            base(states, dtype)._replace(case=way, head=head): training_step(
                ours(memory_budget=BUDGET, grad_filter=WAYS[way]), h, w, labels, head == "trained"
            )[0]
            for way in ways
            for head in ("trained", "frozen")
        }
        yield from _against(runs, products, rounds)
        flat = {way: training_step(ours(grad_filter=WAYS[way]), h * FLAT, w, labels)[0] for way in ways}
        took = _in_turns(flat, rounds)
        ratio = statistics.median(b / a for a, b in zip(took[EXACT], took[ways[1]], strict=True))
        yield [base(states, dtype)._replace(case=f"{ways[1]}, flat states").of("time / exact", ratio)]
        dpofast.empty_cache()


def peers(states: States, rounds: int) -> Iterator[list[Record]]:
    """In fp32, as their users call them: TRL on every position, cut-cross-entropy told which tokens count."""
    packed, packed_labels = states.completion
    products = Products(packed, states.weight).first(3)
    for name, hidden, labels in (
        ("cut-cross-entropy", packed, packed_labels),
        ("TRL", states.hidden, states.labels),
    ):
        facts = base(states, "fp32")._replace(provider=name, backend="")
        run, _ = training_step(PEERS[name], hidden, states.weight, labels)
        try:
            yield from _against({facts: run}, products, max(2, rounds // 3))
        except (ImportError, AttributeError, RuntimeError, TypeError) as failure:
            yield [facts._replace(metric="time / products", failed=first_line(failure))]


def _against(runs, products, rounds: int) -> Iterator[list[Record]]:
    took = _in_turns({None: products} | runs, rounds)
    for facts in runs:
        ratios = [b / a for a, b in zip(took[None], took[facts], strict=True)]
        quartiles = statistics.quantiles(ratios)
        yield [
            facts.of("time / products", statistics.median(ratios), spread=(quartiles[2] - quartiles[0]) / 2),
            facts.of("time", statistics.median(took[facts]), "s"),
        ]


def _in_turns(runs, rounds: int) -> dict:
    took = {name: [] for name in runs}
    for i in range(rounds + 1):  # the first is a warm-up
        for name, run in runs.items():
            one = seconds(run)
            if i:
                took[name].append(one)
    return took


def errors(states: States, n: int) -> Iterator[list[Record]]:
    """Of the first n tokens, as shares of plain PyTorch's in the same dtype; and whether they lean to a side."""
    hidden, labels = (x[:n] for x in states.completion)
    hidden, weight = hidden.bfloat16(), states.weight.bfloat16()
    _, *want = exact(hidden, weight, labels, torch.ones(n, dtype=torch.float64))
    plain, filtered = (
        _off(provider, hidden, weight, labels, want)
        for provider in (lambda h, w, y: plain_logps(h, w, y).sum(), ours(grad_filter="auto"))
    )
    facts = base(states, "bf16")._replace(case=AUTO, shape=(n, *states.shape[1:]))
    yield [
        facts.of(f"{name} / plain PyTorch", filtered[name] / plain[name]) for name in plain if name.startswith("error")
    ]
    yield [facts.of(name, x) for name, x in filtered.items()]
    beside = facts._replace(provider="plain PyTorch", backend="", case="")
    yield [beside.of(name, x) for name, x in plain.items()]
    out = dpofast.linear_logprob(
        hidden, weight.detach().requires_grad_(), labels, grad_filter="auto", outputs=("dropped_mass",)
    )
    share = out.dropped_mass / -out.logps.detach().expm1()
    yield [facts.of("dropped share, mean", share.mean().item()), facts.of("dropped share, largest", share.max().item())]
    yield [facts.of("entries kept, share", _kept(hidden, weight, labels))]


def _off(provider, hidden: Tensor, weight: Tensor, labels: Tensor, want: list[Tensor]) -> dict[str, float]:
    run, (h, w) = training_step(provider, hidden, weight, labels)
    run()
    rows = (h.grad.double() - want[0]).norm(dim=-1) / want[0].norm(dim=-1)
    # Of each token, or row of the vocabulary: entries of one are not independent.
    signed = {
        "d hidden": (h.grad.double() - want[0]).mean(-1) / want[0].abs().mean(),
        "d weight": (w.grad.double() - want[1]).mean(-1) / want[1].abs().mean(),
    }
    means = {f"signed error of {name}, mean": x.mean().item() for name, x in signed.items()}
    of = {f"signed error of {name}, standard error": (x.std() / len(x) ** 0.5).item() for name, x in signed.items()}
    return {
        "error of d hidden, mean": rows.mean().item(),
        "error of d hidden, p99": rows.quantile(0.99).item(),
        "error of d weight": error(w.grad, want[1]),
    } | dict(sorted((means | of).items()))


def _kept(hidden: Tensor, weight: Tensor, labels: Tensor) -> float:
    kept = 0
    for h, y in zip(hidden.float().split(32), labels.split(32)):
        others = (h @ weight.float().T).softmax(-1).scatter_(1, y.unsqueeze(1), 0.0)
        kept += (others > grad_filter.AUTO[torch.bfloat16] * others.sum(1, keepdim=True)).sum().item()
    return kept / (len(hidden) * len(weight))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="SmolLM2's head only, fewer rounds")
    parser.add_argument("--tokens", type=int, default=1000, help="completion tokens (default 1000)")
    parser.add_argument("--rounds", type=int, default=7, help="runs per row, median taken (default 7)")
    parser.add_argument("--error-tokens", type=int, default=256, help="tokens for errors (default 256): bf16 is slow")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="some of the parts (default: all)")
    record.add_out(parser)
    args = parser.parse_args()
    results, out = record.begin(args.out, "filter", machine())
    rounds = 3 if args.quick else args.rounds
    for name in MODELS[:1] if args.quick else MODELS:
        states = load(name, args.tokens)
        print(f"{name}: {len(states.labels)} positions, {int((states.labels != IGNORE).sum())} completion tokens")
        parts = {"times": (times, rounds), "peers": (peers, rounds), "errors": (errors, args.error_tokens)}
        for part in args.parts:
            measure, size = parts[part]
            results.add(measure(states, size))
            results.save(out)  # a part takes minutes


if __name__ == "__main__":
    main()
