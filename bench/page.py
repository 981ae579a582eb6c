"""One HTML page of records, with tables and pictures, that needs no network.

    dpofast bench page                        bench/results/index.html, of the records there; in a checkout
    dpofast bench page RECORD.json ... --out page.html

Needs matplotlib and markdown-it-py (``pip install dpofast[bench]``).
"""

from __future__ import annotations

import argparse
import html
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpofast.bench import report
from dpofast.bench.record import RESULTS, Record, Results, read
from dpofast.bench.report import STYLES, colour_of, ours
from dpofast.bench.slopes import series

PAGE = RESULTS / "index.html"
TITLES = {
    "head": "A head, forward and backward", "filter": "Filtered gradients", "cuts": "What cuts keep and drop",
    "tiles": "What a filter could leave out in whole tiles", "filter_training": "Trainings with filtered gradients",
    "step": "A whole training step", "prompt": "The prompt of a pair once", "pairs": "A loss by whole pairs",
    "hardware": "What the machine could do", "gpu": "A head on a GPU", "steps": "Tiles on a GPU",
    "sweep": "Time and memory against tokens", "all": "Everybody on the same heads, forward and backward",
    "vocabulary": "Time and memory against the vocabulary", "dpo": "DPO's loss: time and memory against pairs",
}  # fmt: skip
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .7rem; text-align: left; font-size: 14px; }
h2 { margin-top: 3rem; border-top: 2px solid #1b7f5c; padding-top: 1rem; } svg { max-width: 100%; height: auto; }
.machine { color: #555; }
"""


def panels(results: Results) -> dict[tuple[str, float, str, int], list[tuple[Record, list[Record]]]]:
    """What a record has at several sizes: by what is measured, its scale, dtype and vocabulary."""
    found: dict[tuple[str, float, str, int], list[tuple[Record, list[Record]]]] = {}
    for metric, name, scale in (("time", "time, ms", 1e3), ("peak memory", "peak memory, MiB", 2**-20)):
        for facts, of in series(results, metric):
            if len(of) > 1:
                found.setdefault((name, scale, facts.dtype, facts.shape[-1]), []).append((facts, of))
    return found


def draw_sizes(results: Results) -> Any | None:
    """Time and peak memory against tokens, for everything that a record has at several sizes."""
    from matplotlib.ticker import NullLocator, StrMethodFormatter

    shown = panels(results)
    if not shown:
        return None
    rows = -(-len(shown) // 2)
    drawn = report.figure(10, 3.8 * rows)
    grid = drawn.subplots(rows, 2, squeeze=False).flat
    others = sorted({f.provider for of in shown.values() for f, _ in of if not ours(f)})
    for axes, ((name, scale, dtype, vocab), of) in zip(grid, shown.items()):
        mine = [facts for facts, _ in of if ours(facts)]
        for facts, records in of:
            label = ", ".join(x for x in (facts.provider, facts.head * (facts.head == "frozen"), facts.case) if x)
            style = STYLES[mine.index(facts) % len(STYLES)] if ours(facts) else "-"
            sizes, values = zip(*((r.shape[0], r.value * scale) for r in records))
            axes.plot(sizes, values, style, color=colour_of(facts, others), marker="o", markersize=3, label=label)
        axes.set(xscale="log", yscale="log", xlabel="completion tokens", title=f"{name}: {dtype}, V {vocab}")
        axes.set_xticks(sorted({r.shape[0] for _, records in of for r in records}))
        axes.xaxis.set_minor_locator(NullLocator())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.legend(frameon=False, fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in drawn.axes[len(shown) :]:
        axes.set_visible(False)
    return drawn


MARKERS, FILLS = ("s", "^", "D", "v", "P", "X"), ("full", "none", "left", "bottom")
SAME = ("workload", "states", "prompt", "provider", "backend", "head", "dtype", "case")


def draw_errors(results: Results) -> Any | None:
    """Error of d hidden against time, of whatever has both."""
    points = []
    for r in results.where(failed=""):
        if r.metric in ("error of d hidden, mean", "error of d hidden"):
            same = {name: getattr(r, name) for name in SAME}
            found = results.where(metric="time / products", **same, failed="")
            # A benchmark of one size may take its errors from fewer tokens than its times.
            found = [t for t in found if t.shape == r.shape] or found[:1]
            points += [(r, found[0].value, r.value)] if found else []
    if len(points) < 2:
        return None
    drawn = report.figure(9, 4.5)
    axes = drawn.subplots()
    others = sorted({r.provider for r, *_ in points if not ours(r)})
    kinds = list(dict.fromkeys((r.workload, r.states, r.dtype) for r, *_ in points))
    mine = list(dict.fromkeys((r.provider, r.case) for r, *_ in points if ours(r)))
    for r, x, y in points:
        colour, kind = colour_of(r, others), kinds.index((r.workload, r.states, r.dtype))
        marker = MARKERS[mine.index((r.provider, r.case)) % len(MARKERS)] if ours(r) else "o"
        label = ", ".join(filter(None, (r.provider, r.case if ours(r) else "")))
        axes.plot(x, y, marker, fillstyle=FILLS[kind % len(FILLS)], color=colour, label=label)
    axes.set(xscale="log", yscale="log", xlabel="time / the bare products", ylabel="error of d hidden")
    fills = zip(("full", "hollow", "left half", "lower half"), kinds)
    axes.set_title("; ".join(f"{fill}: {', '.join(filter(None, kind))}" for fill, kind in fills), fontsize=8)
    labelled = dict(zip(*axes.get_legend_handles_labels()[::-1]))
    axes.legend(labelled.values(), labelled, frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    return drawn


def draw_whole_step(results: Results) -> Any | None:
    rows = {case for facts in results.where(workload="TRL DPOTrainer", dtype="bf16") for case in [facts.case]}
    return report.draw_step(results) if {"", "LoRA"} <= rows else None


DRAWN = report.FIGURES | report.ON_AXES | {"step": draw_whole_step}
"""The picture of a suite that has one of its own."""


def svg(figure: Any) -> str:
    """A figure as an element of a page, without what its header refers to."""
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", written.getvalue(), flags=re.S)
    return text[text.index("<svg") :]


def numbered(pictures: list[str]) -> Iterator[str]:
    """Pictures whose ids differ: those of one document must."""
    for i, picture in enumerate(pictures):
        yield re.sub(r'(id="|href="#|url\(#)', rf"\g<1>f{i}-", picture)


def everything(results: Results) -> str:
    """All numbers, in the fields that any of them has."""
    fields = [f for f in Record._fields if any(getattr(r, f) != Record._field_defaults.get(f) for r in results.records)]

    def cell(r: Record, field: str) -> str:
        value = getattr(r, field)
        if isinstance(value, float):
            return f"{value:.4g}"
        return " x ".join(map(str, value)) if isinstance(value, tuple) else "" if value is None else str(value)

    lines = ("".join(f"<td>{html.escape(cell(r, f))}</td>" for f in fields) for r in results.records)
    head = "".join(f"<th>{f}</th>" for f in fields)
    rows = "\n".join(f"<tr>{line}</tr>" for line in lines)
    summary = f"<summary>all {len(results.records)} numbers</summary>"
    return f"<details>{summary}<table>\n<tr>{head}</tr>\n{rows}\n</table></details>\n"


def section(name: str, results: Results) -> str:
    """A record's part of the page: where it comes from, tables, pictures, all numbers."""
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("js-default")
    facts = ", ".join(f"{key} {value}" for key, value in results.machine.items() if key != "date")
    parts = [f"<h2>{html.escape(name)}</h2>\n"]
    parts.append(f'<p class="machine">{html.escape(results.machine["date"])}: {html.escape(facts)}</p>\n')
    for suite in dict.fromkeys(r.suite for r in results.records if r.suite in report.TABLES):
        parts.append(f"<h3>{TITLES.get(suite, suite)}</h3>\n{markdown.render(report.table_of(results, suite))}")
        figure = DRAWN[suite](results) if suite in DRAWN else None
        parts.append(svg(figure) if figure else "")
    parts += [svg(figure) for draw in (draw_sizes, draw_errors) if (figure := draw(results))]
    return "".join(parts) + everything(results)


def page(files: list[Path]) -> str:
    """The page of these records, the newest first."""
    found = sorted(
        ((read(file), file.name) for file in files), key=lambda x: (x[0].machine["date"], x[1]), reverse=True
    )
    sections = "\n".join(numbered([section(name, results) for results, name in found]))
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>dpofast: benchmarks</title>\n'
        f"<style>{STYLE}</style></head>\n<body>\n<h1>dpofast: benchmarks</h1>\n"
        "<p>Times are ratios to bare matrix products of the same run, unless a unit says otherwise: the machines are "
        "shared. Made by <code>dpofast bench page</code> from the JSON records beside it.</p>\n"
        f"{sections}</body>\n</html>\n"
    )


def committed() -> list[Path]:
    """The records of a checkout; one file there has tables of columns instead."""
    return [file for file in sorted(RESULTS.glob("*.json")) if "records" in json.loads(file.read_text())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="RECORD.json", help="default: those of bench/results/")
    parser.add_argument("--out", type=Path, default=PAGE, help=f"default: {PAGE}")
    args = parser.parse_args()
    if not args.files and not RESULTS.is_dir():
        parser.error(f"no {RESULTS} here: run it in a checkout, or name files of results")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page(args.files or committed()))
    print(f"{args.out}: {args.out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
