"""How near the CPU kernels are to the hardware, and what a small call costs.

    python bench/hardware.py            a minute; writes bench/results/hardware-<date>.json

Shares are of a loop of independent multiply-adds on one core, measured in the same run: the micro-kernel on operands in
the caches, and forward and backward of a trained head (three products). Small problems are forward and backward against
plain PyTorch, told which positions count; medians of runs in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from head import RESULTS, machine, plain, ratio, seconds, step
from states import load

import dpofast
from dpofast import _C
from dpofast.contract import DTYPE_CODES

SMALL = ((8, 16, 100), (32, 64, 1000), (256, 256, 4096), (2048, 64, 1000))  # N, H, V
GOALS = {"micro-kernel": 0.88, "whole op": 0.80}


def shares(rounds: int) -> dict[str, float]:
    """Of the multiply-adds of as many cores as there are threads; fp32."""
    states = load("smollm2", 1000)
    work = step(states.hidden.float(), states.weight.float(), states.labels, True, "4GiB")
    (n, h), v = states.completion[0].shape, states.weight.shape[0]
    work()
    isa = dpofast.plan(n, h, v, "fp32", backend="cpu").backend.partition(":")[2]
    threads, kernel, whole = torch.get_num_threads(), [], []
    for _ in range(rounds):
        core, micro_kernel = _C.peak(isa, DTYPE_CODES[torch.float32], DTYPE_CODES[torch.float32])
        kernel.append(micro_kernel / core)
        whole.append(6 * n * h * v / seconds(work) / (threads * core))
    return {"micro-kernel": statistics.median(kernel), "whole op": statistics.median(whole)}


def small(n: int, h: int, v: int, rounds: int) -> tuple[float, float]:
    """(time / plain PyTorch's, seconds) of n tokens' forward and backward, fp32."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(n, h, generator=g, requires_grad=True),
        torch.randn(v, h, generator=g, requires_grad=True),
    )
    labels = torch.randint(v, (n,), generator=g)

    def run(head) -> None:
        hidden.grad = weight.grad = None
        head(hidden, weight, labels).sum().backward()

    def repeat(head):
        return lambda: [run(head) for _ in range(max(1, 2**24 // (n * h * v)))]

    times = max(1, 2**24 // (n * h * v))
    value, taken = ratio(repeat(lambda *x: dpofast.linear_logprob(*x).logps), repeat(plain), rounds)
    return value, taken / times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31, help="runs per row, median taken (default 31)")
    parser.add_argument("--out", type=Path, default=None, help="where the results go (default bench/results/)")
    args = parser.parse_args()
    about = machine()
    print(" ".join(f"{key}={value}" for key, value in about.items()), flush=True)
    rows = {}
    for name, share in shares(max(3, args.rounds // 4)).items():
        rows[f"{name}, fp32 / multiply-adds"] = share
        print(f"  {name:<12} {share:6.3f} of a core's multiply-adds (goal {GOALS[name]})", flush=True)
    for n, h, v in SMALL:
        value, taken = small(n, h, v, args.rounds)
        rows[f"N {n}, H {h}, V {v} / plain PyTorch"] = value
        rows[f"N {n}, H {h}, V {v}: ms more than plain PyTorch"] = 1e3 * taken * (1 - 1 / value)
        print(f"  N {n:<5} H {h:<4} V {v:<5} {value:6.3f} of plain PyTorch, {1e3 * taken:.3f} ms, "
              f"{1e3 * taken * (1 - 1 / value):+.3f} ms", flush=True)  # fmt: skip
    out = args.out or RESULTS / f"hardware-{about['date']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": about, "results": rows}, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
