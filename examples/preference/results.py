"""What an example found, as a table and a picture: before and after training, with sampling errors and baselines."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workbench import STARTED, Workbench

_BEFORE, _AFTER = "#0072B2", "#D55E00"


def mean_and_error(values: Sequence[float], groups: Sequence[str]) -> tuple[float, float]:
    """The mean over items and its standard error, clustered by group: items of a group are no independent draws.

    With residuals r of n items in G groups the error is ``sqrt(G / (G - 1) * sum_g (sum_{i in g} r_i)**2) / n``, the
    cluster-robust variance of a mean (Cameron and Miller, A Practitioner's Guide to Cluster-Robust Inference, 2015);
    nan with one group.
    """
    n, mean = len(values), math.fsum(values) / len(values)
    sums: dict[str, float] = defaultdict(float)
    for value, group in zip(values, groups, strict=True):
        sums[group] += value - mean
    G = len(sums)
    return mean, math.sqrt(G / (G - 1) * math.fsum(s * s for s in sums.values())) / n if G > 1 else math.nan


def preferred(lines: Sequence[Mapping[str, Any]], average: bool = False) -> tuple[list[float], int]:
    """Whether each first answer is above all others, by log-prob or by that over its length; and how many are level.

    ``lines`` are what `Workbench.score` gives. A first answer that is level with the best of the others is not above.
    """
    values, ties = [], 0
    for line in lines:
        first, *others = [a / (n if average else 1) for a, n in zip(line["logps"], line["lengths"])]
        values.append(float(first > max(others)))
        ties += first == max(others)
    return values, ties


def rewarded(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> tuple[list[float], int]:
    """Whether each first answer gained more log-prob than all others, what trainers call the accuracy; and ties."""
    gains = [
        {"logps": [a - b for a, b in zip(new["logps"], old["logps"])], "lengths": new["lengths"]}
        for old, new in zip(before, after, strict=True)
    ]
    return preferred(gains)


@dataclass(frozen=True)
class Figure:
    """A number of each held-out item, before training and after it.

    Attributes:
        name: what is measured.
        before, after: of each item; for a share 0 or 1. ``before`` is None where there is nothing before.
        groups: of each item.
        baseline: what somebody has who knows nothing, such as 0.5 for pairs; None where there is no such thing.
        ties: how many items were level, before and after; None where nothing can be.
        unit: "share", which is shown in per cent, or what else it is.
    """

    name: str
    before: Sequence[float] | None
    after: Sequence[float]
    groups: Sequence[str]
    baseline: float | None = None
    ties: tuple[int, int] | None = None
    unit: str = "share"

    @property
    def ends(self) -> tuple[tuple[float, float] | None, tuple[float, float]]:
        """Mean and error before and after."""
        before = None if self.before is None else mean_and_error(self.before, self.groups)
        return before, mean_and_error(self.after, self.groups)

    @property
    def change(self) -> tuple[float, float] | None:
        """Mean and error of the items' differences: smaller than the two errors suggest, for the items are the same."""
        if self.before is None:
            return None
        return mean_and_error([b - a for a, b in zip(self.before, self.after, strict=True)], self.groups)

    def cells(self) -> list[str]:
        before, after = self.ends
        ties = "" if self.ties is None else f"{self.ties[0]}, {self.ties[1]}"
        baseline = "" if self.baseline is None else self._number(self.baseline)
        shown = [self._with_error(each) for each in (before, after)]
        change = self._with_error(self.change, "+")
        return [self.name, f"{len(self.after)}", f"{len(set(self.groups))}", ties, baseline, *shown, change]

    def _with_error(self, found: tuple[float, float] | None, sign: str = "") -> str:
        if found is None:
            return ""
        error = "" if math.isnan(found[1]) else f" ± {self._number(found[1])}"
        return self._number(found[0], sign) + error

    def _number(self, value: float, sign: str = "") -> str:
        return f"{value:{sign}.1%}" if self.unit == "share" else f"{value:{sign}.3f}"


@dataclass
class Report:
    """The table, the picture and the remarks of one run."""

    bench: Workbench
    title: str
    group: str  # what a group is, such as "family of rules"
    packages: Sequence[str] = ()  # distributions that the data is from
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def write(self) -> Path:
        """Write ``results/NAME.md`` and ``results/NAME.svg`` and print the table; returns the first."""
        folder: Path = self.bench.args.results
        folder.mkdir(parents=True, exist_ok=True)
        picture = folder / f"{self.bench.name}.svg"
        draw(self.figures, self.title, picture, self.bench.name)
        text = "\n".join([f"# {self.title}", "", *self._table(), "", *self._remarks(), "",
                          f"![before and after]({picture.name})", "", *self._run()]) + "\n"  # fmt: skip
        path = picture.with_suffix(".md")
        path.write_text(text, encoding="utf-8")
        print(text)
        return path

    def _table(self) -> list[str]:
        head = ["held out", "items", "groups", "ties before, after", "baseline", "before", "after", "change"]
        rows = [head, ["---"] * len(head), *(figure.cells() for figure in self.figures)]
        return [f"| {' | '.join(row)} |" for row in rows]

    def _remarks(self) -> list[str]:
        errors = (
            f"After ± is one standard error, clustered by group; a group is a {self.group}, and whole groups are held "
            "out. The error of a change is that of the items' own differences. A tie counts as a miss. With few groups "
            "errors are too small rather than too large."
        )
        return [errors, *(line for note in self.notes for line in ("", note))]

    def _run(self) -> list[str]:
        from dpofast.env_info import env_info

        info, args = env_info(), self.bench.args
        names = ("torch", "transformers", "peft", *self.packages)
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
        cpu = info["cpu"]
        phases = ", ".join(f"{name} {seconds:.0f}" for name, seconds in self.bench.seconds.items())
        whole = time.perf_counter() - STARTED
        return [
            f"- {datetime.date.today()}, {cpu['model']}, {cpu['usable cores']} cores, {self.bench.precision}"
            f"{', --tiny' if args.tiny else ''}, seed {args.seed}",
            f"- dpofast {info['versions']['dpofast']}, Python {info['versions']['python']}, {versions}",
            f"- {whole:.0f} seconds: {phases}",
        ]


def draw(figures: Sequence[Figure], title: str, path: Path, salt: str) -> None:
    """Draw each figure before and after, those of a unit on one axis; ``salt`` makes the file's names."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    parts = {unit: [figure for figure in figures if figure.unit == unit] for unit in _units(figures)}
    heights = [len(part) + 1 for part in parts.values()]
    canvas = Canvas(figsize=(8, 0.42 * sum(heights) + 1), layout="constrained")
    rows = canvas.subplots(len(parts), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (unit, part) in zip(rows, parts.items()):
        _draw_part(axes, unit, part)
    canvas.suptitle(title, fontsize=11)
    drawn = [axes.get_legend_handles_labels() for axes in rows]
    once = {label: handle for handles, labels in drawn for handle, label in zip(handles, labels)}
    canvas.legend(once.values(), once.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        canvas.savefig(path, metadata={"Date": None})


def _units(figures: Sequence[Figure]) -> list[str]:
    return list(dict.fromkeys(figure.unit for figure in figures))


def _draw_part(axes: Any, unit: str, figures: Sequence[Figure]) -> None:
    scale = 100 if unit == "share" else 1
    for i, figure in enumerate(figures):
        for found, shift, color, label in zip(figure.ends, (-0.12, 0.12), (_BEFORE, _AFTER), ("before", "after")):
            if found is not None:
                error = 0.0 if math.isnan(found[1]) else found[1]
                axes.errorbar(scale * found[0], i + shift, xerr=scale * error, fmt="o", color=color, capsize=3,
                              label=f"{label} ± 1 standard error")  # fmt: skip
        if figure.baseline is not None:
            ends = [i - 0.35, i + 0.35]
            axes.plot([scale * figure.baseline] * 2, ends, color="0.5", linestyle=":", label="baseline")
    axes.set_yticks(range(len(figures)), [figure.name for figure in figures], fontsize=9)
    axes.set_ylim(len(figures) - 0.5, -0.5)
    axes.set_xlabel("per cent" if unit == "share" else unit, fontsize=9)
