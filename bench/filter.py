"""Filtered gradients: their time against exact ones and the bare products, and their errors against plain PyTorch's.

    dpofast bench filter                 SmolLM2's head and Gemma-3's, about half an hour
    dpofast bench filter --quick         SmolLM2's head only, fewer rounds
    dpofast bench filter --parts tiles --tokens 8192    what could be left out on a GPU

Real hidden states, since random ones are flat. Times are ratios to three ``torch.mm`` of the same run, in the dtype of
the call or in fp32, whichever is faster: only CPUs with AVX512-BF16 or AMX gain by bf16. Errors are those of the
gradients of the sum of logps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import dpofast
from dpofast.bench import record
from dpofast.bench.measure import DTYPES, error, exact, first_line, in_turns, machine, row_error, seconds
from dpofast.bench.providers import PEERS, Products, ours, plain_logps, training_step
from dpofast.bench.record import Record
from dpofast.bench.tiles import tiles
from dpofast.bench.workloads import FLAT, MODELS, States, load

AUTO, CUT = 'grad_filter="auto"', "grad_filter=2**-14"
FILTERS = {"fp32": (CUT, 2.0**-14), "bf16": (AUTO, "auto")}  # in fp32 "auto" is exact
CUTS = (12, 14, 15, 16, 18, 20, 24)  # 2**-12 and so on
BUDGET = "4GiB"


def base(states: States, dtype: str, **facts) -> Record:
    backend = dpofast.plan(8, 8, 8, dtype, backend="cpu").backend
    of = Record("filter", workload=states.name, shape=states.shape, provider="dpofast", backend=backend, dtype=dtype)
    return of._replace(head="trained")._replace(**facts)


def times(states: States, rounds: int) -> Iterator[list[Record]]:
    hidden, labels = states.completion
    for dtype, (name, value) in FILTERS.items():
        h, w = hidden.to(DTYPES[dtype]), states.weight.to(DTYPES[dtype])
        products = bare_products(states, dtype)
        for head in ("trained", "frozen"):
            for case, how in (("exact", None), (name, value)):
                run, _ = training_step(ours(memory_budget=BUDGET, grad_filter=how), h, w, labels, head == "trained")
                yield in_turns(run, products, rounds).records(base(states, dtype, case=case, head=head))
        filtered, same = (
            training_step(ours(memory_budget=BUDGET, grad_filter=how), h * FLAT, w, labels)[0] for how in (value, None)
        )
        facts = base(states, dtype, case=f"{name}, flat states")
        yield in_turns(filtered, same, rounds, warm=2).records(facts, base="exact")
        dpofast.empty_cache()


def bare_products(states: States, dtype: str) -> Callable[[], None]:
    """The three products of the completion's tokens, in ``dtype`` or in fp32, whichever is faster here."""
    made = [
        Products(states.completion[0].to(DTYPES[name]), states.weight.to(DTYPES[name]))
        for name in dict.fromkeys((dtype, "fp32"))
    ]
    return min(made, key=lambda products: seconds.median(products.first(1), 2, 1)).first(3)


def peers(states: States, rounds: int) -> Iterator[list[Record]]:
    """As their users call them: TRL on every position, cut-cross-entropy told which tokens count."""
    for dtype in FILTERS:
        products, weight = bare_products(states, dtype), states.weight.to(DTYPES[dtype])
        for name, inputs in (("cut-cross-entropy", states.completion), ("TRL", (states.hidden, states.labels))):
            facts = base(states, dtype, provider=name, backend="")
            hidden, labels = inputs
            run, _ = training_step(PEERS[name], hidden.to(DTYPES[dtype]), weight, labels)
            try:
                yield in_turns(run, products, max(2, rounds // 3)).records(facts)
            except (ImportError, AttributeError, RuntimeError, TypeError) as failure:
                yield [facts._replace(metric="time / products", failed=first_line(failure))]


def errors(states: States, n: int) -> Iterator[list[Record]]:
    """Of "auto" in bf16, as shares of plain PyTorch's in bf16; and whether they lean to a side."""
    hidden, labels = (x[:n] for x in states.completion)
    hidden, weight = hidden.bfloat16(), states.weight.bfloat16()
    _, *want = exact(hidden, weight, labels, torch.ones(n, dtype=torch.float64))
    plain, filtered = (
        _off(provider, hidden, weight, labels, want)
        for provider in (lambda h, w, y: plain_logps(h, w, y).sum(), ours(grad_filter="auto"))
    )
    facts = base(states, "bf16", case=AUTO, shape=(n, *states.shape[1:]))
    yield [facts.of(f"{name} / plain PyTorch", filtered[name] / x) for name, x in plain.items() if "signed" not in name]
    yield [facts.of(name, x) for name, x in filtered.items()]
    yield [facts._replace(provider="plain PyTorch", backend="", case="").of(name, x) for name, x in plain.items()]


def _off(provider, hidden: Tensor, weight: Tensor, labels: Tensor, want: list[Tensor]) -> dict[str, float]:
    run, (h, w) = training_step(provider, hidden, weight, labels)
    run()
    rows = (h.grad.double() - want[0]).norm(dim=-1) / want[0].norm(dim=-1)
    found = {"error of d hidden, mean": rows.mean(), "error of d hidden, p99": rows.quantile(0.99)}
    found["error of d weight"] = torch.tensor(error(w.grad, want[1]))
    for name, grad, exactly in (("d hidden", h.grad, want[0]), ("d weight", w.grad, want[1])):
        # The mean of a token's, or of a row's: entries of one are not independent.
        signed = (grad.double() - exactly).mean(-1) / exactly.abs().mean()
        found[f"signed error of {name}, mean"] = signed.mean()
        found[f"signed error of {name}, standard error"] = signed.std() / len(signed) ** 0.5
    return {name: x.item() for name, x in found.items()}


def cuts(states: States, n: int) -> Iterator[list[Record]]:
    """What cuts keep and drop in fp32, and the error of d hidden: the mass given back, in equal parts, or left out."""
    hidden, labels = (x[:n] for x in states.completion)
    logps, want, _ = exact(hidden, states.weight, labels, torch.ones(n, dtype=torch.float64))
    for exponent in CUTS:
        h = hidden.detach().requires_grad_()
        out = dpofast.linear_logprob(h, states.weight, labels, grad_filter=2.0**-exponent, outputs=("dropped_mass",))
        out.logps.sum().backward()
        mass = out.dropped_mass.unsqueeze(1)
        kept, dropped = _kept_and_dropped(hidden, states.weight, labels, 2.0**-exponent)
        dropped *= mass > 0
        share = out.dropped_mass / -logps.expm1()
        facts = base(states, "fp32", suite="cuts", case=f"2^-{exponent}", shape=(n, *states.shape[1:]))
        yield [
            facts.of("entries kept, share", kept),
            facts.of("tokens that drop nothing, share", (mass == 0).double().mean().item()),
            facts.of("dropped share, mean", share.mean().item()),
            facts.of("dropped share, largest", share.max().item()),
            facts.of("error, given back", row_error(h.grad, want)),
            facts.of("error, in equal parts", row_error(want + dropped - mass * states.weight.mean(0), want)),
            facts.of("error, left out", row_error(want + dropped, want)),
        ]


def _kept_and_dropped(hidden: Tensor, weight: Tensor, labels: Tensor, cut: float) -> tuple[float, Tensor]:
    """The share of entries above a cut; and what those below add to d hidden [N, H]."""
    kept, dropped = 0, []
    for h, y in zip(hidden.split(32), labels.split(32)):
        others = (h @ weight.T).softmax(-1).scatter_(1, y.unsqueeze(1), 0.0)
        keeps = others > cut * others.sum(1, keepdim=True)
        kept += keeps.sum().item()
        dropped.append(others.masked_fill_(keeps, 0.0) @ weight)
    return kept / (len(hidden) * len(weight)), torch.cat(dropped)


def skipped(states: States, _: int) -> Iterator[list[Record]]:
    return tiles(states, base(states, "fp32", backend="", provider="", head=""))


PARTS = {"times": times, "peers": peers, "errors": errors, "cuts": cuts, "tiles": skipped}
ORDINARY = tuple(PARTS)[:-1]  # tiles want thousands of tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="SmolLM2's head only, fewer rounds")
    parser.add_argument("--tokens", type=int, default=1000, help="completion tokens (default 1000)")
    parser.add_argument("--rounds", type=int, default=7, help="runs per row, median taken (default 7)")
    parser.add_argument("--error-tokens", type=int, default=256, help="tokens for errors (default 256): bf16 is slow")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=ORDINARY, help="default: all but tiles")
    record.add_out(parser)
    args = parser.parse_args()
    results, out = record.begin(args.out, "filter", machine())
    rounds = 3 if args.quick else args.rounds
    for name in MODELS[:1] if args.quick else MODELS:
        states = load(name, args.tokens)
        print(f"{name}: {len(states.labels)} positions, {args.tokens} completion tokens", flush=True)
        for part in args.parts:
            results.add(PARTS[part](states, rounds if part in ("times", "peers") else args.error_tokens))
            results.save(out)  # a part takes minutes


if __name__ == "__main__":
    main()
