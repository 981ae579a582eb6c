"""Where the time of a training step goes on a GPU: its kernels by name, and the gaps between them.

    dpofast bench gpu_profile --out profile.txt
    dpofast bench gpu_profile --rehearse          on the CPU, where there are operators and no kernels

A step is forward and backward of `dpofast.linear_logprob` in bf16, with a trained head and with a frozen one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import dpofast
from dpofast.bench.measure import Timer, device_for, first_line, synchronize
from dpofast.bench.providers import ours, training_step

SHAPES = ((8192, 4096, 151936), (1638, 1024, 151936))  # tokens, H, V


def step_of(shape: tuple[int, int, int], train_head: bool, backend: str, budget: str, device: torch.device):
    n, h, v = shape
    hidden = torch.randn(n, h, device=device, dtype=torch.bfloat16)
    weight = torch.randn(v, h, device=device, dtype=torch.bfloat16).mul_(h**-0.5)
    labels = torch.randint(v, (n,), device=device)
    return training_step(ours(backend=backend, memory_budget=budget), hidden, weight, labels, train_head)[0]


def spans_of(recorded: profile, device: torch.device) -> list[tuple[float, float, str]]:
    """(start, end, name) of everything that ran on the device, in microseconds and in order."""
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    events: Any = recorded.events()
    return sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in events
        if e.device_type == kind and not getattr(e, "is_user_annotation", False)
    )


def by_name(spans: list[tuple[float, float, str]], rows: int) -> list[str]:
    total, times = sum(b - a for a, b, _ in spans) or 1.0, defaultdict(list)
    for a, b, name in spans:
        times[name].append(b - a)
    ranked = sorted(times.items(), key=lambda item: -sum(item[1]))
    lines = [f"{'ms':>9} {'share':>6} {'count':>6} {'us each':>9}  kernel"]
    for name, each in ranked[:rows]:
        short = name if len(name) <= 150 else name[:110] + " .. " + name[-36:]
        mean = sum(each) / len(each)
        lines.append(f"{sum(each) / 1e3:9.3f} {sum(each) / total:6.1%} {len(each):6d} {mean:9.1f}  {short}")
    return lines


def gaps(spans: list[tuple[float, float, str]], rows: int) -> list[str]:
    """Idle time between the first kernel and the last, and its longest pieces."""
    if not spans:
        return ["no kernels were seen"]
    found, end, busy, before = [], spans[0][0], 0.0, ""
    for a, b, name in spans:
        if a > end:
            found.append((a - end, before, name))
        busy += max(0.0, b - max(a, end))
        if b > end:
            end, before = b, name
    whole = end - spans[0][0]
    lines = [
        f"first to last kernel {whole / 1e3:.3f} ms, busy {busy / 1e3:.3f}, idle {(whole - busy) / 1e3:.3f} "
        f"({1 - busy / max(whole, 1e-9):.1%}) in {len(found)} gaps"
    ]
    for length, left, right in sorted(found, reverse=True)[:rows]:
        lines.append(f"{length:9.1f} us idle between {left[:60]} and {right[:60]}")
    return lines


def report(shape: tuple[int, int, int], train_head: bool, args: argparse.Namespace, device: torch.device) -> list[str]:
    budget = args.budget or ("16GiB" if train_head else "4GiB")
    step = step_of(shape, train_head, args.backend, budget, device)
    plan = dpofast.plan(*shape, "bf16", train_head=train_head, memory_budget=budget, backend=args.backend)
    alone = Timer(device).median(step, 1 if args.rehearse else 5, 1 if args.rehearse else 3)
    synchronize(device)
    start = time.perf_counter()
    step()
    host = time.perf_counter() - start
    synchronize(device)
    on_device = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *on_device]) as recorded:
        step()
        synchronize(device)
    spans = spans_of(recorded, device)
    title = (
        f"{shape[0]} x {shape[1]} x {shape[2]}, head {'trained' if train_head else 'frozen'}, {args.backend}, {budget}"
    )
    return [
        f"=== {title}: {plan.schedule}, {plan.token_chunk} x {plan.block}, {plan.products:.2f} products",
        f"without the profiler {alone * 1e3:.3f} ms; the host is done after {host * 1e3:.3f} ms; kernels "
        f"{sum(b - a for a, b, _ in spans) / 1e3:.3f} ms in {len(spans)} launches",
        *gaps(spans, 8),
        *by_name(spans, 24),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=None, help="a text file")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--budget", default=None, help="default: 16GiB, with a frozen head 4GiB")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU")
    args = parser.parse_args()
    device, failed, text = device_for(args.rehearse), False, ""
    for shape in ((16, 8, 300),) if args.rehearse else SHAPES:
        for train_head in (True, False):
            try:
                lines = report(shape, train_head, args, device)
            except Exception as error:
                failed, lines = True, [f"=== {shape}, {'trained' if train_head else 'frozen'}: {first_line(error)}"]
            print("\n".join(lines), flush=True)
            text += "\n".join(lines) + "\n"
            if args.out is not None:
                args.out.write_text(text)
    sys.exit(failed)


if __name__ == "__main__":
    main()
