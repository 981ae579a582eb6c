"""The tables of README.md and of docs/, and their figures, from what the benchmarks wrote.

    dpofast bench report                writes the tables and the figures (which need matplotlib); in a checkout
    dpofast bench report --check        says whether the tables are those of the results; in a checkout
    dpofast bench report FILE...        prints the tables of these files

A table stands between ``<!-- results: <file of bench/results/> -->`` and ``<!-- end -->``; so a run on another machine
gets a table of its own by a line in README. ``file#suite`` is that of one suite in a file. A test runs the check.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from dpofast.bench.goals import goal_of
from dpofast.bench.record import RESULTS, Record, Results, read
from dpofast.bench.slopes import LEAST, fit, plain_facts, slopes
from dpofast.bench.workloads import MODELS

PAGES = (
    Path("README.md"),
    *(Path("docs", f"{name}.md") for name in ("design", "shared_prompt", "filter", "train", "data", "benchmarks")),
)
MARKER = re.compile(r"^( *)(<!-- results: (\S+) -->\n).*?( *<!-- end -->)", re.S | re.M)


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    first, *lines = ("| " + " | ".join(cells) + " |" for cells in (header, *rows))
    return "\n".join((first, "|" + "---|" * len(header), *lines)) + "\n"


def goal_text(records: Iterable[Record]) -> str:
    """The goals of these, each once."""
    return " and ".join(dict.fromkeys(goal.text for goal in map(goal_of, records) if goal))


def mib(n_bytes: float | None) -> str:
    return "-" if n_bytes is None else f"{n_bytes / 2**20:,.0f} MiB"


def head_rows() -> Iterable[tuple[str, dict[str, Any]]]:
    """What the table of a head calls a row, and which records it is of."""
    trained = {"metric": "time / products", "head": "trained", "case": "4GiB"}
    three = "time / three `torch.mm`"
    yield f"bf16, head trained, cached: {three}", trained | {"dtype": "bf16"}
    yield "bf16, head frozen: time / two `torch.mm`", {"metric": "time / products", "head": "frozen", "dtype": "bf16"}
    yield f'bf16, head trained, `memory_budget="32MiB"`: {three}', trained | {"dtype": "bf16", "case": "32MiB"}
    yield f"fp32, head trained, cached: {three}", trained | {"dtype": "fp32"}
    against, error = "against fp64 / plain PyTorch's", {"metric": "error / plain PyTorch"}
    yield f"bf16: row error of d hidden {against} in bf16", error | {"dtype": "bf16", "case": "d hidden"}
    yield f"fp32: row error of d hidden {against}", error | {"dtype": "fp32", "case": "d hidden"}
    yield f"fp32: error of d weight {against}", error | {"dtype": "fp32", "case": "d weight"}


def head_table(results: Results) -> str:
    """A row for each number that this machine has, a column for each model."""
    models = [model for model in MODELS if results.where(workload=model)]
    rows = []
    for name, facts in head_rows():
        found = results.where(**facts, provider="dpofast")
        if found:
            rows.append((name, goal_text(found), *(f"{r.value:.2f}" for r in found)))
    peaks = results.where(metric="peak memory", head="trained")
    for n, budget in dict.fromkeys((r.shape[0], r.case) for r in sorted(peaks, key=lambda r: r.shape[0])):
        of = [r for r in peaks if (r.shape[0], r.case) == (n, budget)]
        name = f"measured peak above inputs, outputs, gradients: {n:,} tokens, budget {budget}"
        goal = goal_text(r.of("peak memory / (budget + 32 MiB)", None) for r in of)
        rows.append((name, goal, *(mib(r.value) for r in of)))
    return table(("forward + backward", "goal", *models), rows)


def hardware_table(results: Results) -> str:
    rows = [
        (f"{r.case}, {r.dtype}, large: {r.metric}", goal_text([r]), f"{r.value:.2f}")
        for r in results.where(metric="share of the multiply-adds")
    ]
    for r in results.where(metric="time / plain PyTorch"):
        n, h, v = r.shape
        (more,) = results.where(metric="time - plain PyTorch", shape=r.shape)
        cell = f"{r.value:.2f} ({more.value:+.2f} {more.unit})"
        rows.append((f"N {n}, H {h}, V {v}: time / plain PyTorch", goal_text([r, more]), cell))
    return table(("forward + backward, fp32", "goal", "measured"), rows)


def step_name(facts: Record) -> str:
    return ", ".join(filter(None, (facts.workload, facts.case, facts.dtype)))


def calls_table(results: Results) -> str:
    """A row for each call, a column for each way to the logits."""
    found = results.where(suite="calls")
    ways = {"the product exponentiates": True, "tiles of logits": False}
    rows = []
    for case in dict.fromkeys(r.case for r in found):
        of = {bool(r.tile): r.value for r in found if r.case == case}
        goal = goal_text(r for r in found if r.case == case)
        rows.append((case, goal, *(f"{of[fused]:.2f} ms" for fused in ways.values())))
    return table(("host time, launches emulated", "goal", *ways), rows)


def step_table(results: Results) -> str:
    rows = []
    for r in results.where(metric="time / before"):
        peaks = results.where(metric="peak memory", workload=r.workload, case=r.case, dtype=r.dtype)
        before, after = (next((p.value for p in peaks if (p.provider == "dpofast") == ours), None) for ours in (0, 1))
        share = "-" if None in (before, after) else f"{after / before:.2f}"
        cells = (mib(before).replace(",", ""), mib(after).replace(",", ""))
        rows.append((step_name(r), f"{r.value:.2f}", *cells, share))
    header = ("training step, before", "time after / before", "peak before", "peak after", "after / before")
    return table(header, rows)


def gpu_table(results: Results) -> str:
    """What `make gpu` measured: a column for each workload, the ratio, milliseconds and the peak above the inputs."""
    shapes = dict.fromkeys(r.shape for r in results.where(suite="gpu"))

    def row(name: str, **facts: Any) -> tuple[str, ...]:
        return name, *(cell(results.where(**facts, shape=shape)) for shape in shapes)

    def cell(found: list[Record]) -> str:
        of = {r.metric: r.value for r in found}
        if "time / products" not in of:
            return "failed" if found else "-"
        peak = f", {mib(of['peak memory'])}" if "peak memory" in of else ""
        return f"{of['time / products']:.2f} ({of['time'] * 1e3:.1f} ms{peak})"

    ours = {"provider": "dpofast", "backend": "cuda"}
    rows = [
        row("dpofast, default budget", **ours, case="default budget"),
        row("dpofast, head frozen: time / two products", **ours, head="frozen"),
        row("dpofast, small budget", **ours, case="small budget"),
    ]
    told = {"case": "told which tokens count"}
    for name in dict.fromkeys(r.provider for r in results.where(**told)):
        shown = row(name, **told, provider=name)
        if name != "dpofast" and set(shown[1:]) != {"failed"}:  # what was not there is said in the text
            rows.append(shown)
    return table(("tokens x H x V: time / three `torch.mm`", *(" x ".join(map(str, s)) for s in shapes)), rows)


def steps_table(results: Results) -> str:
    """The fastest of each kind of tiles, for the heads that were measured with tiles that stay in L2."""

    def kind(r: Record) -> str:
        megabytes = 4 * r.tile[0] * r.tile[1] / 2**20
        return "fused" if not megabytes else "25 MB" if megabytes < 26 else "large tiles"

    kinds = ("25 MB", "large tiles", "fused")
    ratios = results.where(metric="time / products")
    rows = []
    for shape, head in dict.fromkeys((r.shape, r.head) for r in ratios if kind(r) == "25 MB"):
        of = [[r.value for r in ratios if (r.shape, r.head, kind(r)) == (shape, head, k)] for k in kinds]
        rows.append((f"{' x '.join(map(str, shape))}, {head}", *(f"{min(values):.2f}" for values in of)))
    return table(("", *kinds), rows)


SHARED = "dpofast, prompt shared"


def prompt_table(results: Results) -> str:
    rows = []
    for r in results.where(metric="tokens / unshared"):
        facts = {"case": r.case, "metric": "time / plain PyTorch"}
        unshared, shared = (results.value(**facts, provider=provider) for provider in ("dpofast", SHARED))
        work, ratio = (results.value(case=r.case, metric=f"{what} / unshared") for what in ("work", "time"))
        rows.append((r.case, *(f"{x:.2f}" for x in (r.value, work, ratio, unshared, shared))))
    header = (
        "sequence",
        "tokens left",
        "multiply-adds left",
        "time, shared / unshared",
        "dpofast, unshared / plain PyTorch",
        "shared / plain PyTorch",
    )
    return table(header, rows)


def filter_table(results: Results) -> str:
    """A row for each number, a column for each model."""
    shown = [r for r in results.where(suite="filter") if " / " in r.metric]
    models = [model for model in MODELS if any(r.workload == model for r in shown)]
    rows = {}
    for r in shown:
        what = ", ".join(filter(None, (r.provider, r.dtype, r.case, "head frozen" * (r.head == "frozen"), r.metric)))
        rows.setdefault(what, {})[r.workload] = "failed" if r.failed else f"{r.value:.2f}"
    cells = ((what, *(of.get(model, "-") for model in models)) for what, of in rows.items())
    return table(("forward + backward", *models), cells)


def cuts_table(results: Results) -> str:
    """A row for each model and cut, a column for each number."""
    rows = {}
    for r in results.where(suite="cuts"):
        rows.setdefault((r.workload, r.case), {})[r.metric] = f"{r.value:.2g}"
    header = next(iter(rows.values()))
    return table(("model", "cut", *header), ((*which, *of.values()) for which, of in rows.items()))


def tiles_table(results: Results) -> str:
    """A row for each model and cut, a column for each number that any of them has."""
    shown = results.where(suite="tiles")
    header = dict.fromkeys(sorted((r.metric for r in shown), key=_union_of))
    rows = {}
    for r in shown:
        rows.setdefault((r.workload, r.case), {})[r.metric] = f"{r.value:.2g}"
    return table(("model", "cut", *header), ((*which, *(of.get(x, "-") for x in header)) for which, of in rows.items()))


def _union_of(metric: str) -> int:
    """Tokens of a union, which stand before other numbers."""
    return int(metric.split()[2]) if metric.startswith("union of") else 1 << 62


def pairs_table(results: Results) -> str:
    rows = []
    for r in results.where(provider="ordinary"):
        pairs = next((x.value for x in results.where(provider="by pairs", dtype=r.dtype, case=r.case)), None)
        cells = ("-", "-") if pairs is None else (f"{pairs:.2f}", f"{pairs / r.value:.2f}")
        rows.append((f"{r.dtype}, {r.case}", f"{r.value:.2f}", *cells))
    return table(("dtype, budget", "the ordinary way", "by whole pairs", "ratio"), rows)


def trainer_table(results: Results) -> str:
    """A row for each model and trainer."""
    rows = []
    for r in results.where(suite="trainer", metric="time"):
        facts = {"workload": r.workload, "provider": r.provider}
        ratio, apart = (results.value(metric=name, **facts) for name in ("time / TRL", "loss, apart from TRL"))
        rows.append((r.workload, r.provider, f"{r.value:.3g} s", f"{ratio:.2f}", f"{apart:.0e}"))
    return table(("model and pairs", "a step of", "time", "time / TRL", "losses apart from TRL's, at most"), rows)


def filter_training_table(results: Results) -> str:
    """A row for each training: its last losses, and how far its curve is from the exact one's."""
    apart = "mean distance of the loss's curve from exact"
    names = ("loss of the last steps", "held-out loss", "held-out margin", apart)
    rows = []
    for case in dict.fromkeys(r.case for r in results.where(suite="filter_training")):
        values = (results.value(suite="filter_training", case=case, metric=name) for name in names)
        rows.append((case, *("-" if x is None else f"{x:.2g}" if x < 0.1 else f"{x:.3f}" for x in values)))
    return table(("training", *names), rows)


def cost_table(results: Results) -> str:
    """A row for each dtype, head and peer: how many cases there are, and how far off predictions are."""
    found: dict[str, list[float]] = {}
    for r in results.where(metric="predicted / measured"):
        what = f"{r.dtype}, head {r.head}{', filtered' * bool(r.workload)}" if r.provider == "dpofast" else r.provider
        if r.value:
            found.setdefault(what, []).append(r.value)
    rows = (
        (what, str(len(of)), *(f"{sum(abs(x - 1) <= off for x in of)}" for off in (0.1, 0.25)),
         f"{min(of):.2f} to {max(of):.2f}")
        for what, of in sorted(found.items())
    )  # fmt: skip
    return table(("predicted / measured", "cases", "within 10 %", "within 25 %", "all"), rows)


def sweep_table(results: Results) -> str:
    """A row for each provider and dtype: the ratios by size, and the lines through times and peaks."""
    sizes = sorted({r.shape[0] for r in results.where(suite="sweep")})
    times, peaks = (slopes(results, metric) for metric in ("time", "peak memory"))
    rows = []
    for facts in dict.fromkeys(plain_facts(r) for r in results.where(suite="sweep")):
        same = {name: getattr(facts, name) for name in ("provider", "dtype", "case")}
        of = {n: results.where(shape=(n, *facts.shape), **same) for n in sizes}
        ratios = ({r.metric: r for r in of[n]} for n in sizes)
        cells = (f"{r['time / products'].value:.2f}" if "time / products" in r else "-" for r in ratios)
        t, m = (found.get(facts._replace(metric=name, unit=unit)) for found, name, unit in (
            (times, "time", "s"), (peaks, "peak memory", "B")
        ))  # fmt: skip
        lines = (
            f"{t.fixed * 1e3:.1f} + {t.each * 1e6:.1f} N/1000 (within {t.off:.0%})" if t else "-",
            f"{m.fixed / 2**20:.0f} + {m.each * 1000 / 2**20:.1f} N/1000" if m else "-",
        )
        why = "; ".join(dict.fromkeys(f"{n:,}: {r.failed}" for n in sizes for r in of[n] if r.failed)) or "-"
        v = f"V {facts.shape[-1]}"
        rows.append((", ".join(filter(None, (facts.provider, facts.dtype, v, facts.case))), *cells, *lines, why))
    columns = (f"N {n:,}" for n in sizes)
    return table(("time / products", *columns, "time, ms", "peak memory, MiB", "not measured"), rows)


HALVES = ("hidden", "weight")
Cells = dict[str, Record]
"""Records of the same facts, by their metrics."""


def shown(of: Cells, metric: str, form: Callable[[float], str] = "{:.2f}".format) -> str:
    return form(of[metric].value) if metric in of and not of[metric].failed else "-"


def not_measured(cells: dict[str, Cells]) -> str:
    """Why numbers are missing, by the columns that they are missing in."""
    return "; ".join(f"{name}: {r.failed}" for name, of in cells.items() for r in of.values() if r.failed) or "-"


def all_table(results: Results) -> str:
    """A row for each head and provider: ratios with prompts and on flat states, memory, errors."""
    rows: dict[tuple[str, ...], dict[str, Cells]] = {}
    columns = {}
    for r in results.where(suite="all"):
        n, _, v = r.shape
        column = r.states or f"{r.prompt} % prompt"
        columns[column] = r.states, r.prompt
        row = rows.setdefault((f"{r.workload}, {n:,} tokens, V {v}, {r.dtype}", r.provider, r.case), {})
        row.setdefault(column, {})[r.metric] = r
    names = sorted(columns, key=columns.get)
    cells = []
    for which, of in rows.items():
        first = of.get(names[0], {})
        numbers = (
            shown(first, "peak memory", mib),
            *(shown(first, f"error of d {x}", "{:.1e}".format) for x in HALVES),
        )
        ratios = (shown(of.get(name, {}), "time / products") for name in names)
        cells.append((*which, *ratios, shown(first, "forward / products"), *numbers, not_measured(of)))
    last = ("forward alone", "peak", *(f"error of d {x}" for x in HALVES), "not measured")
    return table(("head", "who", "what does not count", *(f"time, {name}" for name in names), *last), cells)


def vocabulary_of(r: Record) -> int:
    return r.shape[2]


def pairs_of(r: Record) -> int:
    return r.pairs


def axis_table(suite: str, what: str, size: Callable[[Record], int], results: Results) -> str:
    """A row for each provider: ratio and peak by size, and the lines through times and peaks."""
    rows: dict[tuple[str, ...], dict[int, Cells]] = {}
    for r in results.where(suite=suite):
        rows.setdefault((r.provider, r.case, r.dtype), {}).setdefault(size(r), {})[r.metric] = r
    sizes = sorted({x for of in rows.values() for x in of})
    cells = []
    for which, of in rows.items():
        numbers = (
            f"{shown(of.get(x, {}), 'time / products')} ({shown(of.get(x, {}), 'peak memory', mib)})" for x in sizes
        )
        lines = (
            line(of, "time", 1e3, sizes[0]),
            line(of, "peak memory", 2**-20, sizes[0]),
        )
        cells.append((*which, *numbers, *lines, not_measured({f"{x:,}": found for x, found in of.items()})))
    last = (f"time, ms, x {what} / {sizes[0]:,}", f"peak, MiB, x {what} / {sizes[0]:,}", "not measured")
    return table(("who", "what does not count", "dtype", *(f"{what} {x:,}" for x in sizes), *last), cells)


def line(of: dict[int, Cells], metric: str, scale: float, unit: int) -> str:
    """The line through a metric's values, a + b x, with x in ``unit``; and how far off the farthest is."""
    values = {x: cells[metric].value * scale for x, cells in of.items() if metric in cells and not cells[metric].failed}
    if len(values) < LEAST:
        return "-"
    fixed, each, off, *_ = fit(list(values), list(values.values()))
    return f"{fixed:.0f} + {each * unit:.1f} x (within {off:.0%})"


def data_table(results: Results) -> str:
    """A row for each way of reading a file."""
    rows = [(r.workload, r.case, f"{r.value / 2**20:.0f} MiB") for r in results.where(suite="data")]
    return table(("file", "process", "resident memory, at most"), rows)


TABLES: dict[str, Callable[[Results], str]] = {
    "gpu": gpu_table, "head": head_table, "hardware": hardware_table, "calls": calls_table,
    "step": step_table, "steps": steps_table,
    "filter": filter_table, "cuts": cuts_table, "tiles": tiles_table, "pairs": pairs_table, "prompt": prompt_table,
    "filter_training": filter_training_table, "trainer": trainer_table, "cost": cost_table, "sweep": sweep_table,
    "data": data_table, "all": all_table,
    "vocabulary": partial(axis_table, "vocabulary", "V", vocabulary_of),
    "dpo": partial(axis_table, "dpo", "pairs", pairs_of),
}  # fmt: skip


def table_of(results: Results, suite: str = "") -> str:
    """The table of a suite; of the first in a file that has one."""
    return TABLES[suite or next(r.suite for r in results.records if r.suite in TABLES)](results)


def with_tables(text: str, load: Callable[[str], Results] = lambda file: read(RESULTS / file)) -> str:
    """A page's text with every table made anew."""

    def fill(m: re.Match) -> str:
        file, _, suite = m.group(3).partition("#")
        lines = table_of(load(file), suite).splitlines(keepends=True)
        return m.group(1) + m.group(2) + "".join(m.group(1) + line for line in lines) + m.group(4)

    return MARKER.sub(fill, text)


def results_of(suite: str) -> Results:
    """The first that a page names, of README and docs/ in turn."""
    named = (m.group(3).partition("#") for page in PAGES for m in MARKER.finditer(page.read_text()))
    return read(
        RESULTS / next(file for file, _, of in named if of == suite or (not of and file.startswith(f"{suite}-")))
    )


def figure(width: float, height: float) -> Any:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"svg.hashsalt": "dpofast", "svg.fonttype": "none", "font.size": 11})
    return Figure(figsize=(width, height), layout="constrained")


STYLES = ("-", "--", ":", "-.")
COLOURS = ("#4878a8", "#d0803a", "#8f6bb0", "#a8484f", "#7f7f3f", "#4fa6a6", "#555555")


def ours(r: Record) -> bool:
    return r.provider.startswith("dpofast")


def colour_of(r: Record, others: list[str]) -> str:
    return "#1b7f5c" if ours(r) else COLOURS[others.index(r.provider) % len(COLOURS)]


def draw_prompt(results: Results) -> Any:
    """The time of a step against the share of the prompt."""
    drawn = figure(6, 3)
    axes = drawn.subplots()
    left = results.where(metric="tokens / unshared")
    shares = [int(r.case.partition(" ")[0]) for r in left]
    for provider, colour, name in (
        ("dpofast", "#b8bec6", "dpofast"),
        (SHARED, "#1b7f5c", "dpofast, share_prompt=True"),
    ):
        values = [r.value for r in results.where(metric="time / plain PyTorch", provider=provider)]
        axes.plot(shares, values, color=colour, marker="o", label=name)
    unshared = results.where(metric="time / plain PyTorch", provider="dpofast")
    counted = [r.value * work.value for r, work in zip(unshared, results.where(metric="work / unshared"), strict=True)]
    axes.plot(shares, counted, color="#1b7f5c", linewidth=0.8, linestyle="--", label="by its multiply-adds")
    axes.axhline(1.0, color="#555555", linewidth=0.8, linestyle=":", label="plain PyTorch")
    axes.set_xlabel("share of the prompt in a sequence, %")
    axes.set_ylabel("time of a step")
    axes.set_ylim(0, 1.1)
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    axes.spines[["top", "right"]].set_visible(False)
    return drawn


def draw_step(results: Results) -> Any:
    """TRL's step, with dpofast and without it: seconds and peak memory."""
    rows = {"TRL's DPOTrainer": "", "with LoRA": "LoRA"}
    drawn = figure(8, 2.6)
    for axes, (title, metric, number) in zip(drawn.subplots(1, 2), (
        ("time of a training step", "time", "{:.1f} s"),
        ("peak memory of the step", "peak memory", "{:.0f} MiB"),
    )):  # fmt: skip
        for i, case in enumerate(rows.values()):
            for k, (provider, colour) in enumerate((("TRL", "#b8bec6"), ("dpofast", "#1b7f5c"))):
                facts = {"workload": "TRL DPOTrainer", "dtype": "bf16", "case": case, "provider": provider}
                value = min(r.value for r in results.where(metric=metric, **facts))
                value = value / 2**20 if metric == "peak memory" else value
                axes.barh(2.6 * i + k, value, color=colour)
                label = number.format(value) + (" with dpofast" if provider == "dpofast" else " without")
                axes.text(value * 1.02, 2.6 * i + k, label, va="center", fontsize=9)
        axes.set_title(title, fontsize=11)
        axes.set_yticks([2.6 * i + 0.5 for i in range(len(rows))], list(rows))
        axes.set_xticks([])
        axes.margins(x=0.4)
        axes.invert_yaxis()
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    return drawn


def draw_axis(suite: str, label: str, size: Callable[[Record], int], results: Results) -> Any:
    """Time and peak memory of each provider against vocabulary or pairs."""
    drawn = figure(10, 4)
    found = results.where(suite=suite, failed="")
    others = sorted({r.provider for r in found if not ours(r)})
    for axes, (metric, name, scale) in zip(drawn.subplots(1, 2), (
        ("time", "time of a step, ms", 1e3), ("peak memory", "peak above inputs, MiB", 2**-20),
    )):  # fmt: skip
        of = [r for r in found if r.metric == metric]
        mine = list(dict.fromkeys(r.provider for r in of if ours(r)))
        for r in {r.provider: r for r in of}.values():
            points = sorted((size(x), x.value * scale) for x in of if x.provider == r.provider)
            style = STYLES[mine.index(r.provider) % len(STYLES)] if ours(r) else "-"
            look = {"color": colour_of(r, others), "marker": "o", "markersize": 4, "linewidth": 1.5}
            axes.plot(*zip(*points), style, label=r.provider, **look)
        axes.set(xscale="log", yscale="log", xlabel=label, title=name)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawn


ON_AXES: dict[str, Callable[[Results], Any]] = {
    "vocabulary": partial(draw_axis, "vocabulary", "vocabulary", vocabulary_of),
    "dpo": partial(draw_axis, "dpo", "pairs", pairs_of),
}
"""Pictures on the page of all records."""
FIGURES = {"step": draw_step, "prompt": draw_prompt}
"""A picture in docs/ for each suite that has one."""


def draw(suite: str, folder: Path) -> None:
    FIGURES[suite](results_of(suite)).savefig(folder / f"{suite}.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="print the tables of these files only")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page has other tables")
    args = parser.parse_args()
    if args.files:
        print("\n".join(table_of(read(file)) for file in args.files), end="")
        return
    if not RESULTS.is_dir():
        parser.error(f"no {RESULTS} here: run it in a checkout, or name files of results")
    for page in PAGES:
        old = page.read_text()
        new = with_tables(old)
        if args.check and new != old:
            sys.exit(f"{page} has other tables than {RESULTS}: run dpofast bench report")
        if not args.check:
            page.write_text(new)
    if not args.check:
        for suite in FIGURES:
            draw(suite, Path("docs"))
    print(f"{', '.join(map(str, PAGES))}: {'up to date' if args.check else 'written, and their figures'}")


if __name__ == "__main__":
    main()
