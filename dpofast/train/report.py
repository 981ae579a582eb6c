"""What is left of a training for people: a summary in Markdown and the curves as a picture."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpofast.env_info import env_info
from dpofast.train.config import Config

PACKAGES = ("torch", "transformers", "peft", "numpy")
_TRAINING, _HELD_OUT = "#0072B2", "#D55E00"
_WINDOW = 10  # steps in a running mean: a single batch is too small to read anything from
_CURVES = (("loss", "Loss"), ("rewards/margins", "Reward margin"), ("rewards/accuracies", "Reward accuracy"),
           ("rewards/ndcg", "Reward nDCG"))  # fmt: skip


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean of a sample, and its standard error; nan where there are fewer than two."""
    n = len(values)
    if n == 0:
        return math.nan, math.nan
    mean = math.fsum(values) / n
    if n == 1:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1) / n)


def share_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The share of ones in a sample of ones and zeros, and its standard error by Agresti and Coull, never 0."""
    n = len(values)
    if n == 0:
        return math.nan, math.nan
    hits = math.fsum(values)
    middle = (hits + 2) / (n + 4)
    return hits / n, math.sqrt(middle * (1 - middle) / (n + 4))


def summary(config: Config, entries: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """The summary of a run: ``entries`` are its log, ``facts`` what else is known of it, by name."""
    lines = ["# A run of dpofast train", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    evaluations = [entry for entry in entries if "eval/loss" in entry]
    if evaluations:
        lines += ["", "## Held out", "", *_evaluations(evaluations)]
    steps = [entry for entry in entries if "loss" in entry]
    if steps:
        lines += ["", "## Training", "", *_steps(steps)]
    lines += ["", "## Options", "", "| option | value |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in config.as_dict().items() if value != _default(name)]
    lines += ["", "All others have their default.", "", "## Machine and versions", "", *_machine()]
    return "\n".join(lines) + "\n"


def _evaluations(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    names = [name for name in entries[-1] if name.startswith("eval/") and f"{name}/error" in entries[-1]]
    count = entries[-1]["eval/records"]
    head = [name.removeprefix("eval/") for name in names]
    lines = [f"{count} records; after each mean its standard error over them.", ""]
    lines += [f"| step | {' | '.join(head)} |", f"|---|{'---|' * len(head)}"]
    for entry in entries:
        cells = [f"{entry[name]:.4f} ± {entry[name + '/error']:.4f}" for name in names]
        lines.append(f"| {entry['step']} | {' | '.join(cells)} |")
    return lines


def _steps(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    first, last = entries[:_WINDOW], entries[-_WINDOW:]
    names = [name for name in entries[-1] if name == "loss" or name.startswith(("rewards/", "logps/"))]
    lines = [
        f"Means over the first and the last {len(last)} of {len(entries)} steps, each with its standard error.",
        "",
    ]
    lines += ["| | first | last |", "|---|---|---|"]
    for name in names:
        cells = [
            "{:.4f} ± {:.4f}".format(*mean_and_error([e[name] for e in part if name in e])) for part in (first, last)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _machine() -> list[str]:
    info = env_info()
    lines = [f"- dpofast {info['versions']['dpofast']}, Python {info['versions']['python']}"]
    found = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES if importlib.util.find_spec(name)]
    cpu, gpus = info["cpu"], info["gpu"]["devices"]
    lines.append(f"- {', '.join(found)}")
    lines.append(f"- {cpu['model']}, {cpu['usable cores']} cores usable, {cpu['torch threads']} threads")
    return [*lines, f"- GPUs: {gpus}"] if gpus else lines


def _default(name: str) -> Any:
    return getattr(Config(), name)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|")


def save_picture(entries: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw loss, margin and accuracy over the steps; False where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    curves = [(name, title) for name, title in _CURVES if any(name in e or f"eval/{name}" in e for e in entries)]
    figure = Figure(figsize=(4.5 * len(curves), 3.5), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves):
        steps = [(entry["step"], entry[name]) for entry in entries if name in entry]
        if steps:
            at, values = zip(*steps)
            means = [
                math.fsum(part) / len(part)
                for part in (values[max(0, i - _WINDOW + 1) : i + 1] for i in range(len(values)))
            ]
            axes.plot(at, values, ".", color=_TRAINING, alpha=0.3, label="training, a step")
            axes.plot(at, means, color=_TRAINING, label=f"mean of {_WINDOW} steps")
        held = [(e["step"], e[f"eval/{name}"], e[f"eval/{name}/error"]) for e in entries if f"eval/{name}" in e]
        if held:
            at, values, errors = zip(*held)
            axes.errorbar(at, values, errors, fmt="o-", color=_HELD_OUT, capsize=3, label="held out ± 1 error")
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    return True
