"""The tables of README.md and the figure on its first screen, from what the benchmarks wrote.

    python bench/report.py              writes README's tables, and docs/step.svg (which needs matplotlib)
    python bench/report.py --check      says whether README's tables are those of the results

A table stands between ``<!-- results: <file of bench/results/> -->`` and ``<!-- end -->``; so a run on another machine
gets a table of its own by a line in README. A test runs the check.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README, FIGURE, RESULTS = ROOT / "README.md", ROOT / "docs" / "step.svg", ROOT / "bench" / "results"
MARKER = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.S)

HEAD_ROWS = {  # key: (what README calls it, the goal, is the number or its detail shown)
    "bf16, head trained, cached": ("bf16, head trained, cached: time / three `torch.mm`", "0.92", "value"),
    "bf16, head frozen": ("bf16, head frozen: time / two `torch.mm`", "0.92", "value"),
    "bf16, head trained, 32MiB": (
        'bf16, head trained, `memory_budget="32MiB"`: time / three `torch.mm`', "1.25", "value",
    ),
    "fp32, head trained, cached": ("fp32, head trained, cached: time / three `torch.mm`", "0.85", "value"),
    "bf16 d hidden error / plain": (
        "bf16: row error of d hidden against fp64 / plain PyTorch's in bf16", "0.2", "value",
    ),
    "fp32 d hidden error / plain": ("fp32: row error of d hidden against fp64 / plain PyTorch's", "1.0", "value"),
    "fp32 d weight error / plain": ("fp32: error of d weight against fp64 / plain PyTorch's", "1.0", "value"),
    **{
        f"bf16 workspace, trained, {n} tokens, {budget}": (
            f"measured peak above inputs, outputs, gradients: {n:,} tokens, budget {budget}", "budget + 32 MiB", "MiB",
        )
        for n in (1000, 8000) for budget in ("32MiB", "256MiB")
    },
}  # fmt: skip
AVX2_GOALS = {"fp32, head trained, cached": "0.80 and 0.62"}
HARDWARE_GOALS = {"N 8, H 16, V 100": "0.3 ms more", "N 32, H 64, V 1000": "1.5", "N 256, H 256, V 4096": "0.9",
                  "N 2048, H 64, V 1000": "0.9"}  # fmt: skip
SHARE_GOALS = {"micro-kernel": "0.88", "whole op": "0.80"}


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ("| " + " | ".join(cells) + " |" for cells in (header, *rows))
    first = next(lines)
    return "\n".join((first, "|" + "---|" * len(header), *lines)) + "\n"


def head_table(report: dict[str, Any]) -> str:
    """A row for each number that this machine has, a column for each model."""
    models = {"smollm2": "SmolLM2", "gemma3": "Gemma-3"}
    goals = AVX2_GOALS if report["machine"]["backend"] == "cpu:avx2" else {}
    rows = []
    for key, (name, goal, shown) in HEAD_ROWS.items():
        found = [report["results"][model].get(key) for model in models]
        if None not in found:
            cells = (f"{value:.2f}" if shown == "value" else f"{detail:.0f} MiB" for value, detail in found)
            rows.append((name, goals.get(key, goal), *cells))
    return table(("forward + backward", "goal", *models.values()), rows)


def hardware_table(report: dict[str, Any]) -> str:
    results, rows = report["results"], []
    for name, goal in SHARE_GOALS.items():
        rows.append(
            (
                f"{name}, fp32, large: share of the multiply-adds",
                goal,
                f"{results[f'{name}, fp32 / multiply-adds']:.2f}",
            )
        )
    for name, goal in HARDWARE_GOALS.items():
        value, more = results[f"{name} / plain PyTorch"], results[f"{name}: ms more than plain PyTorch"]
        rows.append((f"{name}: time / plain PyTorch", goal, f"{value:.2f} ({more:+.2f} ms)"))
    return table(("forward + backward, fp32", "goal", "measured"), rows)


def step_row(name: str, result: dict[str, Any]) -> str:
    before, after = (result["peak_bytes"][way] for way in ("before", "after"))
    peaks = ("-", "-", "-") if None in (before, after) else (
        f"{before / 2**20:.0f} MiB", f"{after / 2**20:.0f} MiB", f"{after / before:.2f}"
    )  # fmt: skip
    return f"| {name} | {result['time_ratio']:.2f} | {' | '.join(peaks)} |"


STEP_HEADER = table(
    ("training step, before", "time after / before", "peak before", "peak after", "after / before"), []
).rstrip()


def step_table(report: dict[str, Any]) -> str:
    return "\n".join((STEP_HEADER, *(step_row(name, result) for name, result in report["results"].items()))) + "\n"


GPU_ROWS = {
    "head trained, default budget, cuda": "dpofast, default budget",
    "head frozen, cuda": "dpofast, head frozen: time / two products",
    "head trained, small budget, cuda": "dpofast, small budget",
}


def gpu_table(report: dict[str, Any]) -> str:
    """What `make gpu` measured: a column for each workload, the ratio, milliseconds and the peak above the inputs."""

    def cell(result: dict[str, Any] | None) -> str:
        if not result or "failed" in result:
            return "failed" if result else "-"
        peak = f", {result['peak_bytes'] / 2**20:,.0f} MiB" if result.get("peak_bytes") else ""
        return f"{result['ratio_to_floor']:.2f} ({result['seconds'] * 1e3:.1f} ms{peak})"

    rows = [(shown, *(cell(w.get(key)) for w in report["workloads"].values())) for key, shown in GPU_ROWS.items()]
    peers = report["peers"]
    for key in dict.fromkeys(key for rows_of in peers.values() for key in rows_of):
        name = key.removeprefix("peer ").removesuffix(", told which tokens count")
        shown = [cell(peers.get(w, {}).get(key)) for w in report["workloads"]]
        if name != "dpofast" and set(shown) != {"failed"}:  # what was not there is said in the text
            rows.append((name, *shown))
    bare = [w["bare products"] for w in report["workloads"].values()]
    sizes = (f"{b['tokens']} x {b['hidden']} x {b['vocab']}" for b in bare)
    return table(("tokens x H x V: time / three `torch.mm`", *sizes), rows)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "gpu": gpu_table, "head": head_table, "hardware": hardware_table, "step": step_table,
}  # fmt: skip


def load(file: str) -> dict[str, Any]:
    return json.loads((RESULTS / file).read_text())


def with_tables(text: str) -> str:
    """README's text with every table made anew."""

    def fill(m: re.Match) -> str:
        return m.group(1) + TABLES[m.group(2).partition("-")[0]](load(m.group(2))) + m.group(3)

    return MARKER.sub(fill, text)


def draw(report: dict[str, Any]) -> None:
    """TRL's step, with dpofast and without it: seconds and peak memory."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"svg.hashsalt": "dpofast", "svg.fonttype": "none", "font.size": 11})
    rows = {"TRL's DPOTrainer": "TRL DPOTrainer, bf16", "with LoRA": "TRL DPOTrainer, LoRA, bf16"}
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    for axes, (title, unit, number) in zip(figure.subplots(1, 2), (
        ("time of a training step", "s", lambda r, way: min(r["seconds"][way])),
        ("peak memory of the step", "MiB", lambda r, way: r["peak_bytes"][way] / 2**20),
    )):  # fmt: skip
        for i, row in enumerate(rows.values()):
            result = report["results"][row]
            for k, (way, colour) in enumerate((("before", "#b8bec6"), ("after", "#1b7f5c"))):
                value = number(result, way)
                axes.barh(2.6 * i + k, value, color=colour)
                label = f"{value:.1f} {unit}" if unit == "s" else f"{value:.0f} {unit}"
                label += " with dpofast" if way == "after" else " without"
                axes.text(value * 1.02, 2.6 * i + k, label, va="center", fontsize=9)
        axes.set_title(title, fontsize=11)
        axes.set_yticks([2.6 * i + 0.5 for i in range(len(rows))], list(rows))
        axes.set_xticks([])
        axes.margins(x=0.4)
        axes.invert_yaxis()
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    figure.savefig(FIGURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if README's tables are others")
    args = parser.parse_args()
    old = README.read_text()
    new = with_tables(old)
    if args.check:
        sys.exit(0 if new == old else "README.md has other tables than bench/results/: run python bench/report.py")
    README.write_text(new)
    draw(load(next(m.group(2) for m in MARKER.finditer(new) if m.group(2).startswith("step"))))
    print(f"written: {README.name}, {FIGURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
