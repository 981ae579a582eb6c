"""The GPU benchmark: the head's time against bare matrix products and against the predictions, peers beside it.

    python bench/gpu.py                    every workload; results after each row
    python bench/gpu.py --only 8192,qwen3  workloads whose name has one of these in it
    python bench/gpu.py --peers            the other libraries alone
    python bench/gpu.py --rehearse         a rehearsal of the script itself on the CPU

Times are medians by CUDA events. A row is timed in turns with the bare products of its gradients (three ``torch.mm`` in
bf16, two with a frozen head), and its time is given as a ratio to these and to the products of its own schedule, which
may make logits more than once. Results already in the file are kept, so a run that was cut off goes on where it ended.
Writes JSON, a table and, where matplotlib is installed, a picture to bench/results/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_common import Timer, device_for, first_line, synchronize
from peers import ON_GPU, PEERS
from torch import Tensor

import dpofast
from dpofast.backends import registry
from dpofast.plan import cost

RESULTS = Path(__file__).parent / "results"
SLOW = 0.1  # seconds: what takes longer is run three times only


class Workload(NamedTuple):
    """One micro-batch of a real training, in numbers."""

    name: str
    hidden: int
    vocab: int
    positions: int
    prompt: float  # share of the positions that do not count


WORKLOADS = (
    Workload("8192 tokens, V 151936, H 4096", 4096, 151936, 8192, 0.0),
    Workload("llama-3-8b SimPO", 4096, 128256, 4 * 2048, 0.3),
    Workload("qwen3-0.6b short answers", 1024, 151936, 16 * 512, 0.8),
    Workload("gemma-3-1b chat", 1152, 262144, 4 * 1024, 0.3),
    Workload("zephyr-7b UltraFeedback", 4096, 32000, 16 * 1024, 0.3),
    Workload("qwen2.5-vl page to text", 2048, 151936, 2 * 4096, 0.9),
    Workload("llama-3.1-8b long context", 4096, 128256, 2 * 65536, 0.97),
    Workload("tulu-3-70b", 8192, 128264, 2 * 2048, 0.3),
)
TINY = (Workload("tiny", 64, 1000, 120, 0.3),)
WITH_TORCH = ("qwen3-0.6b short answers", "tiny")  # backend "torch" multiplies in fp32: timed once

# (row, head trained, budget, goal as a ratio to the products of its schedule)
ROWS = (
    ("head trained, g kept", True, "16GiB", 1.10),
    ("head frozen", False, "4GiB", 1.10),
    ("head trained, default budget", True, None, None),
    ("head trained, small budget", True, "small", 1.15),
)


class Bare:
    """``torch.mm`` of the head's shapes in bf16, into memory that is there: logits, d hidden, d weight."""

    def __init__(self, hidden: Tensor, weight: Tensor, timer: Timer):
        n, v = hidden.shape[0], weight.shape[0]
        logits, grad = (hidden.new_empty(n, v) for _ in range(2))
        torch.nn.init.normal_(grad)
        d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)
        self.products = (
            lambda: torch.mm(hidden, weight.T, out=logits),
            lambda: torch.mm(grad, weight, out=d_hidden),
            lambda: torch.mm(grad.T, hidden, out=d_weight),
        )
        self.seconds = [timer.median(product) for product in self.products]

    def first(self, count: int) -> Callable[[], None]:
        def run() -> None:
            for product in self.products[:count]:
                product()

        return run


def in_turns(timer: Timer, work: Callable[[], object], base: Callable[[], object], rounds: int) -> dict[str, float]:
    for f in (work, base, base):
        f()
    rounds = min(rounds, 3) if timer(work) > SLOW else rounds
    pairs = [(timer(base), timer(work)) for _ in range(rounds)]
    return {
        "ratio_to_floor": statistics.median(b / a for a, b in pairs),
        "seconds": statistics.median(b for _, b in pairs),
        "floor_seconds": statistics.median(a for a, _ in pairs),
    }


def peak_bytes(work: Callable[[], object], leaves: tuple[Tensor, ...], device: torch.device) -> int | None:
    """At the worst moment of a step, above its inputs: gradients are in it."""
    for leaf in leaves:
        leaf.grad = None
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def inputs(w: Workload, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(w.positions, w.hidden, generator=g, device=device, dtype=torch.bfloat16)
    weight = torch.randn(w.vocab, w.hidden, generator=g, device=device, dtype=torch.bfloat16).mul_(w.hidden**-0.5)
    labels = torch.randint(w.vocab, (w.positions,), generator=g, device=device)
    labels[torch.rand(w.positions, generator=g, device=device) < w.prompt] = -100
    return hidden, weight, labels


def training_step(head: Callable[..., Tensor], hidden: Tensor, weight: Tensor, labels: Tensor, train_head: bool):
    """One forward and backward, and the leaves that it leaves gradients at."""
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_(train_head)

    def run() -> None:
        h.grad = w.grad = None
        head(h, w, labels).backward()

    return run, (h, w)


def small_budget(n: int, hidden: int) -> str:
    """For n completion tokens: room for the sums and the tiles and hardly for g, what "32MiB" is to a small model."""
    return f"{max(64, 48 * n * hidden >> 20)}MiB"


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return measure()
    except Exception as error:  # of whatever library
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return {"failed": first_line(error)}


def measure(w: Workload, device: torch.device, backends: list[str], rounds: int) -> Iterator[tuple[str, dict]]:
    """Yields (row, result) pairs."""
    hidden, weight, labels = inputs(w, device)
    packed, timer = hidden[labels != -100], Timer(device)
    n = len(packed)
    bare = Bare(packed, weight, timer)
    names = ("logits", "d hidden", "d weight")
    products = {f"{name}_seconds": seconds for name, seconds in zip(names, bare.seconds)}
    sizes = {"tokens": n, "hidden": w.hidden, "vocab": w.vocab}
    yield "bare products", products | {"tflops": 3 * 2e-12 * n * w.hidden * w.vocab / sum(bare.seconds)} | sizes
    chip = torch.cuda.get_device_name(device).lower().replace(" ", "") if device.type == "cuda" else ""
    known = next((key for key in cost.DEVICES if key in chip), None)

    def row(backend: str, train_head: bool, budget: str | None) -> dict[str, Any]:
        def head(h: Tensor, wt: Tensor, y: Tensor) -> Tensor:
            return dpofast.linear_logprob(h, wt, y, backend=backend, memory_budget=budget).logps.sum()

        how = {"train_head": train_head, "memory_budget": budget}
        plan = dpofast.plan(n, w.hidden, w.vocab, "bf16", backend=backend, **how)
        run, leaves = training_step(head, hidden, weight, labels, train_head)
        result = in_turns(timer, run, bare.first(plan.floor_gemms), rounds)
        # Products above the floor are logits made again.
        again = (plan.gemms - plan.floor_gemms) * bare.seconds[0]
        own = result["floor_seconds"] + again
        result |= {"ratio": result["seconds"] / own, "products": plan.gemms, "schedule": plan.schedule}
        result |= {"block": plan.block, "chunk": plan.token_chunk, "budget": plan.memory_budget}
        result["peak_bytes"] = peak_bytes(run, leaves, device)
        result["gradient_bytes"] = sum(x.nbytes for x in leaves if x.requires_grad)
        if known and backend == "cuda":
            on_paper = dpofast.plan(n, w.hidden, w.vocab, "bf16", device=known, **how)
            result["predicted_seconds"] = on_paper.predicted_seconds
        return result

    for name, train_head, budget, goal in ROWS:
        budget = small_budget(n, w.hidden) if budget == "small" else budget
        for backend in backends:
            if backend != "torch" or w.name in WITH_TORCH:
                yield f"{name}, {backend}", attempt(lambda: row(backend, train_head, budget) | {"goal": goal})  # noqa: B023
    if device.type == "cuda":
        yield "from logits, share of copy bandwidth", attempt(lambda: from_logits(w, device, timer, rounds))


def measure_peers(w: Workload, device: torch.device, rounds: int) -> Iterator[tuple[str, dict]]:
    """The other libraries, told which tokens count; and dpofast on what they are given."""
    hidden, weight, labels = inputs(w, device)
    hidden, labels, timer = hidden[labels != -100], labels[labels != -100], Timer(device)
    bare = Bare(hidden, weight, timer)

    def ours(h: Tensor, wt: Tensor, y: Tensor) -> Tensor:
        return dpofast.linear_logprob(h, wt, y, backend="cuda", memory_budget="16GiB", ignore_index=None).logps.sum()

    for name, head in ({"dpofast": ours} | (ON_GPU if device.type == "cuda" else PEERS)).items():

        def row(head: Callable[..., Tensor] = head) -> dict[str, Any]:
            run, leaves = training_step(head, hidden, weight, labels, True)
            result = in_turns(timer, run, bare.first(3), rounds)
            return result | {"products": 3, "peak_bytes": peak_bytes(run, leaves, device)}

        yield f"peer {name}, told which tokens count", attempt(row)


def from_logits(w: Workload, device: torch.device, timer: Timer, rounds: int) -> dict[str, float]:
    """Share of copy bandwidth: forward reads the logits once, backward reads and writes them once."""
    n = min(4096, w.positions)
    logits = torch.randn(n, w.vocab, device=device, dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(w.vocab, (n,), device=device)
    copy_to = torch.empty_like(logits)
    n_bytes = logits.numel() * logits.element_size()

    def run() -> None:
        logits.grad = None
        dpofast.logprob(logits, labels, ignore_index=None).logps.sum().backward()

    result = in_turns(timer, run, lambda: copy_to.copy_(logits.detach()), rounds)
    bandwidth = 2 * n_bytes / result["floor_seconds"]
    share = 3 * n_bytes / result["seconds"] / bandwidth
    return {"share": share, "seconds": result["seconds"], "copy_bandwidth": bandwidth, "goal": 0.85}


def about(device: torch.device) -> dict[str, str]:
    facts = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "dpofast": dpofast.__version__,
        "device": platform.processor() or platform.machine(),
    }
    if device.type == "cuda":
        import subprocess

        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
        facts |= {"device": torch.cuda.get_device_name(device), "driver": driver[0] if driver else "unknown"}
        facts |= {"cuda": str(torch.version.cuda)}
    return facts


COLUMNS = ("workload", "row", "ratio to three (two) products", "to its schedule's", "products", "goal", "ms",
           "predicted ms", "peak MiB", "schedule")  # fmt: skip


def cells(r: dict) -> list[str]:
    """A row of the table, after its names."""
    if "failed" in r:
        return [f"failed: {r['failed']}".replace("|", "/")] + [""] * 7
    ms, mib, last = 1e3, 2**-20, r.get("schedule", "")
    if "tflops" in r:
        last = f"{r['tflops']:.0f} TFLOP/s: " + " ".join(f"{r[k] * 1e3:.2f}" for k in r if k.endswith("_seconds"))
    if "share" in r:
        last = f"share {r['share']:.2f} of {r['copy_bandwidth'] / 1e9:.0f} GB/s"
    if r.get("block"):
        last += f" {r['chunk'] or 'all'} x {r['block']}"

    def number(key: str, digits: int, factor: float = 1.0) -> str:
        return f"{r[key] * factor:.{digits}f}" if r.get(key) is not None else ""

    return [
        number("ratio_to_floor", 3), number("ratio", 3), number("products", 2), number("goal", 2),
        number("seconds", 2, ms), number("predicted_seconds", 2, ms), number("peak_bytes", 0, mib), last,
    ]  # fmt: skip


def table(results: dict) -> str:
    lines = [" | ".join(("", *COLUMNS, "")).strip(), "|---" * len(COLUMNS) + "|"]
    for workload, rows in results["workloads"].items():
        lines += [" | ".join(("", workload, row, *cells(r), "")).strip() for row, r in rows.items()]
    return "\n".join(lines) + "\n"


def picture(results: dict, file: Path) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    bars = [(f"{w}\n{row}", r["ratio_to_floor"]) for w, rows in results["workloads"].items() for row, r in rows.items()
            if "ratio_to_floor" in r]  # fmt: skip
    if not bars:
        return
    figure, axes = plt.subplots(figsize=(9, 0.6 + 0.32 * len(bars)), layout="constrained")
    axes.barh([name for name, _ in bars][::-1], [ratio for _, ratio in bars][::-1])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("time / the bare matrix products of the gradients")
    axes.set_title(f"{results['about']['device']}, {results['about']['date']}")
    axes.tick_params(labelsize=6)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="workloads whose name has one of these in it, separated by commas")
    parser.add_argument("--backends", default="cuda,triton,torch", help="of these, those that are here")
    parser.add_argument("--rounds", type=int, default=7, help="runs a row, median taken (default 7)")
    parser.add_argument("--seconds", type=float, default=300, help="begin no row after this time (default 300)")
    parser.add_argument("--peers", action="store_true", help="the other libraries alone")
    parser.add_argument("--rehearse", action="store_true", help="one tiny workload on the CPU")
    parser.add_argument("--no-picture", action="store_true")
    parser.add_argument("--out", type=Path, default=None, help="the JSON file (default: in bench/results/)")
    args = parser.parse_args()

    end = time.monotonic() + args.seconds
    device = device_for(args.rehearse)
    facts = about(device)
    name = facts["device"].lower().replace(" ", "-")
    out = args.out or RESULTS / f"gpu-{name}-{facts['date']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(out.read_text()) if out.exists() else {"about": facts, "workloads": {}, "complete": []}
    backends = [b for b in args.backends.split(",") if b in registry.added or not registry.why_not(b, device.type)]
    print(" ".join(f"{key}={value}" for key, value in facts.items()), "backends:", *backends, flush=True)

    def write() -> None:
        out.write_text(json.dumps(results, indent=1) + "\n")
        out.with_suffix(".md").write_text(table(results))

    for w in TINY if args.rehearse else [w for w in WORKLOADS if any(x in w.name for x in args.only.split(","))]:
        kind = f"{w.name}, {'peers' if args.peers else ' '.join(backends)}"
        if kind in results["complete"]:
            continue
        done = results["workloads"].setdefault(w.name, {})
        print(f"{w.name}\n  {'row':<44} {' '.join(f'{x:>7}' for x in HEADINGS)}", flush=True)
        rows = measure_peers(w, device, args.rounds) if args.peers else measure(w, device, backends, args.rounds)
        for row, result in rows:
            done[row] = result
            *numbers, last = cells(result)
            print(f"  {row:<44} {' '.join(f'{x:>7}' for x in numbers)} {last}", flush=True)
            write()
            if time.monotonic() > end:
                print("out of time; run again to go on")
                return
        results["complete"].append(kind)
        synchronize(device)
    write()
    if not args.no_picture:
        picture(results, out.with_suffix(".png"))
    print(f"written to {out}")


HEADINGS = ("floor x", "own x", "prods", "goal", "ms", "pred ms", "MiB")

if __name__ == "__main__":
    main()
