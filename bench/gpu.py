"""The GPU benchmark: the head's time against bare matrix products and against the predictions, peers beside it.

    python bench/gpu.py                    every workload, the shortest first; results after each
    python bench/gpu.py --only qwen3       workloads whose name has this in it
    python bench/gpu.py --device cpu --tiny     a rehearsal of the script itself; nothing it prints is a GPU's

Times are medians by CUDA events, as ratios to ``torch.mm`` of the same shapes in turns in the same run. Results already
in the file are kept, so a run that was cut off goes on where it ended. Writes JSON, a table and, where matplotlib is
installed, a picture to bench/results/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from peers import PEERS
from torch import Tensor

import dpofast
from dpofast import _backend
from dpofast.plan import cost

RESULTS = Path(__file__).parent / "results"


class Workload(NamedTuple):
    """One micro-batch of a real training, in numbers."""

    name: str
    hidden: int
    vocab: int
    positions: int
    prompt: float  # share of the positions that do not count


WORKLOADS = (
    Workload("qwen3-0.6b short answers", 1024, 151936, 16 * 512, 0.8),
    Workload("gemma-3-1b chat", 1152, 262144, 4 * 1024, 0.3),
    Workload("llama-3-8b SimPO", 4096, 128256, 4 * 2048, 0.3),
    Workload("zephyr-7b UltraFeedback", 4096, 32000, 16 * 1024, 0.3),
    Workload("qwen2.5-vl page to text", 2048, 151936, 2 * 4096, 0.9),
    Workload("8192 tokens, V 151936, H 4096", 4096, 151936, 8192, 0.0),
    Workload("llama-3.1-8b long context", 4096, 128256, 2 * 65536, 0.97),
    Workload("tulu-3-70b", 8192, 128264, 2 * 2048, 0.3),
)
TINY = (Workload("tiny", 64, 1000, 400, 0.3),)

# (row, head trained, budget, products of the schedule, goal as a ratio to these products)
ROWS = (
    ("head trained, g kept", True, "16GiB", 3, 1.10),
    ("head frozen", False, "4GiB", 2, 1.10),
    ("head trained, small budget", True, "small", 4, 1.15),
)


class Timer:
    """Seconds of one call, by the device's own clock where it has one."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def __call__(self, work: Callable[[], object]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def in_turns(timer: Timer, work: Callable[[], object], base: Callable[[], object], rounds: int) -> dict[str, float]:
    for f in (work, base, work, base):
        f()
    pairs = [(timer(base), timer(work)) for _ in range(rounds)]
    return {
        "ratio": statistics.median(b / a for a, b in pairs),
        "seconds": statistics.median(b for _, b in pairs),
        "products_seconds": statistics.median(a for a, _ in pairs),
    }


def products(hidden: Tensor, weight: Tensor, count: int) -> Callable[[], None]:
    """One to four ``torch.mm`` of the head's shapes: logits (twice where recomputed), d hidden, d weight."""
    n, v = hidden.shape[0], weight.shape[0]
    logits = torch.empty(n, v, dtype=hidden.dtype, device=hidden.device)
    grad = torch.randn(n, v, device=hidden.device, dtype=hidden.dtype)

    def run() -> None:
        for _ in range(max(1, count - 2)):
            torch.mm(hidden, weight.T, out=logits)
        if count > 1:
            torch.mm(grad, weight)
        if count > 2:
            torch.mm(grad.T, hidden)

    return run


def peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - before


def inputs(w: Workload, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(w.positions, w.hidden, generator=g).to(device, torch.bfloat16)
    weight = (torch.randn(w.vocab, w.hidden, generator=g) * w.hidden**-0.5).to(device, torch.bfloat16)
    labels = torch.randint(w.vocab, (w.positions,), generator=g)
    labels[torch.rand(w.positions, generator=g) < w.prompt] = -100
    return hidden, weight, labels.to(device)


def training_step(head: Callable[..., Tensor], hidden: Tensor, weight: Tensor, labels: Tensor, train_head: bool):
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_(train_head)

    def run() -> None:
        h.grad = w.grad = None
        head(h, w, labels).backward()

    return run


def small_budget(w: Workload) -> str:
    """Room for the sums and the tiles and hardly for g: what "32MiB" is to a small model."""
    return f"{max(64, 48 * w.positions * w.hidden >> 20)}MiB"


def measure(w: Workload, device: torch.device, backends: list[str], rounds: int, with_peers: bool):
    """Yields (row, result) pairs."""
    hidden, weight, labels = inputs(w, device)
    packed, timer = hidden[labels != -100], Timer(device)
    name = torch.cuda.get_device_name(device).lower().replace(" ", "") if device.type == "cuda" else ""
    known = next((key for key in cost.DEVICES if key in name), None)
    for row, train_head, budget, count, goal in ROWS:
        budget = small_budget(w) if budget == "small" else budget
        for backend in backends:

            def head(h, wt, y, backend=backend, budget=budget):
                return dpofast.linear_logprob(h, wt, y, backend=backend, memory_budget=budget).logps.sum()

            try:
                run = training_step(head, hidden, weight, labels, train_head)
                result = in_turns(timer, run, products(packed, weight, count), rounds)
                result |= {"goal": goal, "products": count, "budget": budget, "peak_bytes": peak_bytes(run, device)}
            except (RuntimeError, ValueError, torch.cuda.OutOfMemoryError) as error:
                result = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            if known and backend == "cuda":
                plan = dpofast.plan(
                    len(packed), w.hidden, w.vocab, "bf16", train_head=train_head, memory_budget=budget, device=known
                )
                result |= {"schedule": plan.schedule, "predicted_seconds": plan.predicted_seconds}
            yield f"{row}, {backend}", result
    if device.type == "cuda":
        yield from from_logits(w, device, timer, rounds)
    for peer, head in PEERS.items() if with_peers else ():
        try:
            run = training_step(head, packed, weight, labels[labels != -100], True)
            result = in_turns(timer, run, products(packed, weight, 3), max(3, rounds // 3))
            result["peak_bytes"] = peak_bytes(run, device)
        except (ImportError, AttributeError, RuntimeError, TypeError, ValueError, torch.cuda.OutOfMemoryError) as error:
            result = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        yield f"peer {peer}, told which tokens count", result


def from_logits(w: Workload, device: torch.device, timer: Timer, rounds: int):
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
    bandwidth = 2 * n_bytes / result["products_seconds"]
    share = 3 * n_bytes / result["seconds"] / bandwidth
    yield "from logits, share of copy bandwidth", {"share": share, "copy_bandwidth": bandwidth, "goal": 0.85}


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


def table(results: dict) -> str:
    lines = ["| workload | row | ratio to the products | goal | ms | predicted ms | peak MiB |", "|---" * 7 + "|"]
    for workload, rows in results["workloads"].items():
        for row, r in rows.items():
            if "failed" in r:
                lines.append(f"| {workload} | {row} | failed: {r['failed']} | | | | |")
                continue
            ratio = r.get("ratio", r.get("share"))
            predicted = f"{r['predicted_seconds'] * 1e3:.1f}" if r.get("predicted_seconds") else ""
            peak = f"{r['peak_bytes'] / 2**20:.0f}" if r.get("peak_bytes") else ""
            ms = f"{r['seconds'] * 1e3:.2f}" if "seconds" in r else ""
            lines.append(f"| {workload} | {row} | {ratio:.3f} | {r.get('goal', '')} | {ms} | {predicted} | {peak} |")
    return "\n".join(lines) + "\n"


def picture(results: dict, file: Path) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    bars = [(f"{w}\n{row}", r["ratio"]) for w, rows in results["workloads"].items() for row, r in rows.items()
            if "ratio" in r]  # fmt: skip
    figure, axes = plt.subplots(figsize=(9, 0.6 + 0.32 * len(bars)), layout="constrained")
    axes.barh([name for name, _ in bars][::-1], [ratio for _, ratio in bars][::-1])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("time / the bare matrix products of the schedule")
    axes.set_title(f"{results['about']['device']}, {results['about']['date']}")
    axes.tick_params(labelsize=6)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:1, or cpu for a rehearsal")
    parser.add_argument("--only", default="", help="workloads whose name has this in it")
    parser.add_argument("--rounds", type=int, default=15, help="runs a row, median taken (default 15)")
    parser.add_argument("--seconds", type=float, default=300, help="begin no workload after this time (default 300)")
    parser.add_argument("--tiny", action="store_true", help="one tiny workload: a rehearsal")
    parser.add_argument("--no-peers", action="store_true", help="dpofast alone")
    parser.add_argument("--out", type=Path, default=None, help="the JSON file (default: in bench/results/)")
    args = parser.parse_args()

    began = time.monotonic()
    device = torch.device(args.device)
    facts = about(device)
    name = facts["device"].lower().replace(" ", "-")
    out = args.out or RESULTS / f"gpu-{name}-{facts['date']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(out.read_text()) if out.exists() else {"about": facts, "workloads": {}, "complete": []}
    backends = [b for b in ("cuda", "triton", "torch") if not _backend._why_not(b, device.type)]
    print(" ".join(f"{key}={value}" for key, value in facts.items()), "backends:", *backends, flush=True)
    for w in TINY if args.tiny else [w for w in WORKLOADS if args.only in w.name]:
        if time.monotonic() - began > args.seconds:
            print(f"out of time before {w.name}; run again to go on")
            break
        if w.name in results["complete"]:
            continue
        done = results["workloads"].setdefault(w.name, {})
        for row, result in measure(w, device, backends, args.rounds, not args.no_peers):
            done[row] = result
            print(f"{w.name:<32} {row:<44} {json.dumps(result)}", flush=True)
            out.write_text(json.dumps(results, indent=1) + "\n")
        results["complete"].append(w.name)
    out.write_text(json.dumps(results, indent=1) + "\n")
    out.with_suffix(".md").write_text(table(results))
    picture(results, out.with_suffix(".png"))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
