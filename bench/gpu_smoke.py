"""Does it run on this GPU, and is it right: the public call against float64, one line a case, in a few seconds.

    dpofast bench gpu_smoke                   every backend that is here
    dpofast bench gpu_smoke --backends cuda
    dpofast bench gpu_smoke --rehearse        on the CPU, backend "cuda" emulated

An error is ``norm(out - exact) / norm(exact)``. A case that fails or raises does not stop the others; the exit status
is 1 if there was one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

import dpofast
from dpofast.backends import registry
from dpofast.bench.measure import DTYPES, device_for, error, exact, first_line, synchronize

# Three times what rounding the results and one factor to 16 bits costs. Logits are summed in fp32.
LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
LIMIT_LOGPS = 1e-5
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Case(NamedTuple):
    n: int  # tokens, of which the first fifth does not count
    h: int
    v: int
    dtype: torch.dtype
    train_head: bool
    schedule: str
    budget: int

    def __str__(self) -> str:
        head = "trained" if self.train_head else "frozen"
        return (
            f"{NAMES[self.dtype]} {head:<7} n {self.n:<4} h {self.h:<4} v {self.v:<5} "
            f"{self.schedule:<15} {self.budget / 2**20:7.1f} MiB"
        )


SCHEDULES = {True: ("cached", "mixed", "recompute", "recompute-split"), False: ("jacobian", "recompute")}


def budgets(n: int, h: int, v: int, dtype: torch.dtype, train_head: bool, backend: str) -> dict[str, int]:
    """The largest budget, by steps of a twelfth, with which each schedule is chosen."""
    found, budget = {}, 1 << 30
    while True:
        try:
            plan = dpofast.plan(n, h, v, dtype, train_head=train_head, memory_budget=budget, backend=backend)
        except ValueError:  # too little for any
            return found
        found.setdefault(plan.schedule, budget)
        if len(found) == len(SCHEDULES[train_head]):
            return found
        budget = budget * 11 // 12


def cases(backend: str, rehearse: bool) -> Iterator[Case]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    n, h, v = (40, 64, 1001) if rehearse else (600, 1024, 32001)
    dtypes = (bf16,) if rehearse else (bf16, fp16, fp32)
    # One token: cuBLAS takes a path for it that no other size takes. The last has rows of logits that are aligned.
    for n_, h_, v_, those in ((n, h, v, dtypes), (1, h, v, (bf16,)), (3 * n, h // 2, v - 1, (bf16,))):
        for dtype in those:
            for train_head in (True, False):
                for schedule, budget in budgets(n_ - n_ // 5, h_, v_, dtype, train_head, backend).items():
                    yield Case(n_, h_, v_, dtype, train_head, schedule, budget)


def run(case: Case, backend: str, device: torch.device) -> tuple[bool, str]:
    generator = torch.Generator(device).manual_seed(case.n + case.v)
    # Logits of a few units, and probabilities as uneven as a model's.
    hidden = torch.randn(case.n, case.h, generator=generator, device=device).to(case.dtype)
    weight = (torch.randn(case.v, case.h, generator=generator, device=device) * 3 * case.h**-0.5).to(case.dtype)
    labels = torch.randint(case.v, (case.n,), generator=generator, device=device)
    labels[-1] = case.v - 1
    labels[: case.n // 5] = -100
    c = torch.rand(case.n, generator=generator, device=device) + 0.5
    logps, d_hidden, d_weight = exact(hidden, weight, labels, c.double())
    h, w = hidden.requires_grad_(), weight.requires_grad_(case.train_head)
    out = dpofast.linear_logprob(h, w, labels, backend=backend, memory_budget=case.budget)
    (out.logps * c).sum().backward()
    synchronize(device)
    errors = {"logps": error(out.logps, logps), "d hidden": error(h.grad, d_hidden)}
    if case.train_head:
        errors["d weight"] = error(w.grad, d_weight)
    limit = LIMITS[case.dtype]
    right = all(off <= (LIMIT_LOGPS if name == "logps" else limit) for name, off in errors.items())  # NaN: wrong
    return right, "  ".join(f"{name} {off:.1e}" for name, off in errors.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", default="cuda,torch,triton", help="of these, those that are here")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU")
    args = parser.parse_args()
    device = device_for(args.rehearse)
    failed = 0
    for backend in args.backends.split(","):
        why_not = None if backend in registry.added else registry.why_not(backend, device.type)
        if why_not:
            print(f"FAIL {backend}: {why_not}" if backend == "cuda" else f"---- {backend}: {why_not}", flush=True)
            failed += backend == "cuda"
            continue
        for case in cases(backend, args.rehearse):
            start = time.perf_counter()
            try:
                right, text = run(case, backend, device)
            except Exception as failure:
                right, text = False, first_line(failure)
            failed += not right
            print(
                f"{'OK  ' if right else 'FAIL'} {backend:<6} {case} {text}  ({time.perf_counter() - start:.2f}s)",
                flush=True,
            )
    print(f"{failed} failed" if failed else "all right", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
