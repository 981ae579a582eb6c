"""The head's benchmark: time against bare matrix products, errors against fp64, memory against the budget.

    make bench                          all of it, a few minutes
    python bench/head.py --quick        SmolLM2's head only
    python bench/head.py --peers        what others need for the same work, too

Every time is a ratio to ``torch.mm`` of the same shapes, measured in turns in the same run: the machine may be
shared. Prints the table and writes it to bench/results/ with the machine and the date.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
import peers as peer_heads
from states import IGNORE, MODELS, States, load

import dpofast
from dpofast.plan import parse_bytes

RESULTS = Path(__file__).parent / "results"
TARGETS = {
    "bf16, head trained, cached": 0.92,
    "bf16, head frozen": 0.92,
    "bf16, head trained, 32MiB": 1.25,
    "fp32, head trained, cached": 0.85,
    "bf16 d hidden error / plain": 0.2,
    "fp32 d hidden error / plain": 1.0,
    "fp32 d weight error / plain": 1.0,
}


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratio(work: Callable[[], object], base: Callable[[], object], rounds: int) -> tuple[float, float]:
    """(median of the ratios of neighbouring runs, median seconds of ``work``)."""
    work()
    base()
    pairs = [(seconds(base), seconds(work)) for _ in range(rounds)]
    return statistics.median(b / a for a, b in pairs), statistics.median(b for _, b in pairs)


def products(hidden: Tensor, weight: Tensor, count: int) -> Callable[[], None]:
    """One, two or three ``torch.mm`` of the head's shapes: logits, d hidden, d weight."""
    grad = torch.randn(hidden.shape[0], weight.shape[0], dtype=torch.float32).to(hidden.dtype)

    def run() -> None:
        torch.mm(hidden, weight.T)
        if count > 1:
            torch.mm(grad, weight)
        if count > 2:
            torch.mm(grad.T, hidden)

    return run


def step(hidden: Tensor, weight: Tensor, labels: Tensor, train_head: bool, budget: str) -> Callable[[], None]:
    """Forward and backward of `dpofast.linear_logprob`."""
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_(train_head)

    def run() -> None:
        h.grad = w.grad = None
        dpofast.linear_logprob(h, w, labels, memory_budget=budget).logps.sum().backward()

    return run


def dtypes() -> list[tuple[torch.dtype, str]]:
    """Those that PyTorch multiplies at speed here: without AVX512-BF16 its bf16 products take tens of times fp32's."""
    bf16 = [(torch.bfloat16, "bf16")] if dpofast.plan(8, 8, 8, backend="cpu").backend == "cpu:avx512_bf16" else []
    return [*bf16, (torch.float32, "fp32")]


def times(states: States, rounds: int) -> dict[str, tuple[float, float]]:
    """``{row of the table: (ratio, seconds)}``."""
    labels = states.labels
    rows = {}
    for dtype, name in dtypes():
        hidden, weight = states.hidden.to(dtype), states.weight.to(dtype)
        packed = hidden[labels != IGNORE]
        three, two = products(packed, weight, 3), products(packed, weight, 2)
        rows[f"{name}, head trained, cached"] = ratio(step(hidden, weight, labels, True, "4GiB"), three, rounds)
        if name == "bf16":
            rows["bf16, head frozen"] = ratio(step(hidden, weight, labels, False, "1GiB"), two, rounds)
            rows["bf16, head trained, 32MiB"] = ratio(step(hidden, weight, labels, True, "32MiB"), three, rounds)
        dpofast.empty_cache()
    return rows


def exact_gradients(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """d sum(logps) / d hidden and / d weight in fp64, by chunks of tokens."""
    w = weight.double()
    d_hidden, d_weight = [], torch.zeros_like(w)
    for h, y in zip(hidden.double().split(128), labels.split(128)):
        g = -torch.softmax(h @ w.T, dim=-1)
        g[torch.arange(len(y)), y] += 1
        d_hidden.append(g @ w)
        d_weight += g.T @ h
    return torch.cat(d_hidden), d_weight


def gradients(head: Callable[..., Tensor], hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    h, w = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    head(h, w, labels).sum().backward()
    return h.grad, w.grad


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What people write: the logits in the inputs' dtype, log-softmax in fp32."""
    return F.linear(hidden, weight).float().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def row_error(got: Tensor, exact: Tensor) -> float:
    """Mean over rows of the relative error of a row."""
    return float(((got.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).mean())


def total_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def errors(states: States) -> dict[str, tuple[float, float]]:
    """``{row of the table: (ratio to plain PyTorch's error, our error)}``."""
    rows = {}

    def ours(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return dpofast.linear_logprob(h, w, y, memory_budget="4GiB").logps

    for dtype, name in dtypes():
        hidden, labels = states.completion
        hidden, weight = hidden.to(dtype), states.weight.to(dtype)
        exact_h, exact_w = exact_gradients(hidden, weight, labels)
        our_h, our_w = gradients(ours, hidden, weight, labels)
        plain_h, plain_w = gradients(plain, hidden, weight, labels)
        mine = row_error(our_h, exact_h)
        rows[f"{name} d hidden error / plain"] = mine / row_error(plain_h, exact_h), mine
        mine = total_error(our_w, exact_w)
        rows[f"{name} d weight error / plain"] = mine / total_error(plain_w, exact_w), mine
    return rows


PEAK = """
import sys, torch
from dpofast._memory import peak_growth
import dpofast
from dpofast.plan import parse_bytes
name, n, budget, train_head = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4] == "1"
saved = torch.load(sys.argv[5])
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


def workspace(states: States, n_tokens: int, budget: str, train_head: bool, folder: Path) -> int:
    """Measured peak bytes above inputs, outputs and gradients, in a process of its own. Linux only."""
    file = folder / f"{states.name}.pt"
    if not file.exists():
        hidden, labels = states.completion
        torch.save({"hidden": hidden.bfloat16(), "weight": states.weight.bfloat16(), "labels": labels}, file)
    command = [sys.executable, "-c", PEAK, states.name, str(n_tokens), budget, str(int(train_head)), str(file)]
    # In `folder`: beside the sources, `-c` would import those instead of the installed package.
    return int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder).stdout)


def memory(states: States, budgets: tuple[str, ...], n_tokens: tuple[int, ...]) -> dict[str, tuple[float, float]]:
    """``{row of the table: (measured bytes / (budget + 32 MiB), measured MiB)}``."""
    import tempfile

    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for budget in budgets:
            for n in n_tokens:
                for train_head in (True, False):
                    used = workspace(states, n, budget, train_head, Path(folder))
                    allowed = parse_bytes(budget) + (32 << 20)
                    head = "trained" if train_head else "frozen"
                    rows[f"bf16 workspace, {head}, {n} tokens, {budget}"] = used / allowed, used / 2**20
    return rows


def machine() -> dict[str, str]:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "threads": str(torch.get_num_threads()),
        "backend": dpofast.plan(8, 8, 8, backend="cpu").backend,
        "torch": torch.__version__,
        "dpofast": dpofast.__version__,
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="SmolLM2's head only, fewer rounds")
    parser.add_argument("--peers", action="store_true", help="also time the other libraries that import here")
    parser.add_argument("--tokens", type=int, default=1000, help="completion tokens (default 1000)")
    parser.add_argument("--rounds", type=int, default=15, help="runs per row, median taken (default 15)")
    parser.add_argument("--out", type=Path, default=None, help="where the results go (default bench/results/)")
    args = parser.parse_args()

    about = machine()
    print(" ".join(f"{key}={value}" for key, value in about.items()), flush=True)
    results: dict[str, dict[str, tuple[float, float]]] = {}
    for name in MODELS[:1] if args.quick else MODELS:
        states = load(name, args.tokens)
        print(f"{name}: {len(states.labels)} positions, {args.tokens} completion tokens, "
              f"H {states.weight.shape[1]}, V {states.weight.shape[0]}", flush=True)  # fmt: skip
        rounds = 3 if args.quick else args.rounds
        rows = times(states, rounds)
        rows |= errors(states)
        rows |= memory(states, ("32MiB", "256MiB"), (1000, 8000))
        if args.peers:
            rows |= peer_heads.times(states, rounds, ratio, products)
        results[name] = rows
        for row, (value, detail) in rows.items():
            unit = "s" if "head" in row or "peer" in row else "MiB" if "workspace" in row else ""
            limit = 1.0 if "workspace" in row else TARGETS.get(row)
            verdict = "" if limit is None else f"at most {limit:<5} {'ok' if value <= limit else 'ABOVE'}"
            print(f"  {row:<52} {value:7.3f}   ({detail:.3g} {unit})   {verdict}", flush=True)

    out = args.out or RESULTS / f"head-{about['date']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": about, "tokens": args.tokens, "results": results}, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
