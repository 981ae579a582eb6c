"""What the demo shows when it is done: tables, and the picture."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dpofast.demo.train import IGNORE, Agreement, HeadCost, History, Score

WINDOW = 8  # steps in a running mean: one step's batch is too small to read anything from

DPOFAST, PLAIN, MASKED, HELD_OUT, INK = "#0072B2", "#9A9A9A", "#6E6E6E", "#D55E00", "#333333"


@dataclass
class Result:
    """All that a run found out."""

    before: Score
    after: Score  # the last of the history's
    held_out_pairs: int
    history: History
    agreement: Agreement
    costs: dict[str, HeadCost]
    head_labels: Tensor  # [2B, T], of the batch that the costs were measured on
    vocabulary: int
    seconds: dict[str, float] = field(default_factory=dict)


def mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB" if size >= 2**20 * 10 else f"{size / 2**20:.1f} MiB"


def signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}"  # + 0.0: no "-0.000"


def verdict(result: Result) -> str:
    """Whether training helped where it was not seen, in a sentence that does not flatter."""
    n = result.held_out_pairs
    accuracy = result.after.reward_accuracy
    error = math.sqrt(0.25 / n)  # of a coin thrown n times
    learned = f"Held-out reward accuracy is {accuracy:.1%} after training; "
    learned += f"a coin gets 50.0% +- {error:.1%} on {n} pairs. "
    errors = (accuracy - 0.5) / error
    if result.after.loss >= result.before.loss:
        learned += "The held-out loss did not fall: what was learned does not carry over to other families. "
    elif errors <= 2:
        learned += "That is within two standard errors of a coin: no evidence that it carries over. "
    else:
        learned += f"That is {errors:.1f} standard errors above a coin, on families that training never saw. "
    gained = round(n * (result.after.preference - result.before.preference))
    shares = f"{result.before.preference:.1%} to {result.after.preference:.1%}, {gained:+d} pairs"
    if gained > 0:
        return learned + f"The share of pairs with the chosen answer more probable rose: {shares}."
    return learned + f"The share of pairs with the chosen answer more probable did not rise: {shares}."


def print_result(console: Console, result: Result) -> None:
    before, after = result.before, result.after
    table = Table(title=f"Held-out rules ({result.held_out_pairs} pairs, other families than in training)")
    for name in ("", "before", "after"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("loss", f"{before.loss:.4f}", f"{after.loss:.4f}")
    table.add_row("reward margin", signed(before.margin), signed(after.margin))
    table.add_row("reward accuracy", "all tied", f"{after.reward_accuracy:.1%}")
    table.add_row("chosen is more probable", f"{before.preference:.1%}", f"{after.preference:.1%}")
    console.print(table)
    console.print(verdict(result))
    console.print()

    a = result.agreement
    console.print(
        f"The same first {a.steps} steps with the plain PyTorch loss, from the same weights: losses differ "
        f"by at most {a.loss_difference:.1e}, single parameters by at most {a.parameter_difference:.1e}. "
        f"The two end {a.distance_apart:.2e} apart after moving {a.distance_moved:.2e} "
        f"({a.distance_apart / a.distance_moved:.1e} of it)."
    )
    console.print()

    positions, tokens = result.head_labels.numel(), int((result.head_labels != IGNORE).sum())
    table = Table(title="The head alone: forward and backward, fp32, head frozen")
    for name in ("", "seconds", "extra memory"):
        table.add_column(name, justify="left" if not name else "right")
    for name, cost in result.costs.items():
        memory = "not measured" if cost.peak_bytes is None else mib(cost.peak_bytes)
        table.add_row(name, f"{cost.seconds:.3f}", memory)
    fast = result.costs["dpofast"]
    for name, cost in result.costs.items():
        if cost is not fast:
            less = ""
            if None not in (cost.peak_bytes, fast.peak_bytes):
                less = f"{cost.peak_bytes / max(fast.peak_bytes, 1):.1f} x less"
            table.add_row(f"dpofast against {name}", f"{cost.seconds / fast.seconds:.2f} x faster", less)
    console.print(table)
    console.print(
        f"{len(result.head_labels) // 2} pairs: {positions:,} positions, {tokens:,} of them answer tokens. The plain "
        "head computes all of them, as most trainers do; told the mask, it computes those of answers, as dpofast does. "
        f"The vocabulary has {result.vocabulary:,} entries: one fp32 tensor of all logits is "
        f"{mib(4.0 * positions * result.vocabulary)}. Seconds are medians of runs in turns; memory is the "
        "process's peak resident size (VmHWM) above its size before the call, the largest of the runs."
    )
    console.print()
    phases = ", ".join(f"{name} {seconds:.0f}" for name, seconds in result.seconds.items())
    console.print(f"Seconds: {phases}; together {sum(result.seconds.values()):.0f}.")


def running_mean(values: list[float]) -> list[float]:
    return [statistics.fmean(values[max(0, i - WINDOW + 1) : i + 1]) for i in range(len(values))]


def curves(axes: Axes, result: Result, name: str, level: float) -> None:
    """One quantity of the history, with its held-out values and the ``level`` it starts from."""
    values = getattr(result.history, name)
    steps, scored = range(1, len(values) + 1), {0: result.before, **result.history.held_out}
    axes.axhline(level, color="#BBBBBB", linestyle="--", linewidth=1, label="no preference yet")
    axes.plot(steps, values, ".", color=DPOFAST, alpha=0.35, label="training, one step")
    axes.plot(steps, running_mean(values), color=DPOFAST, linewidth=2, label=f"mean of {WINDOW} steps")
    held_out = [getattr(score, name) for score in scored.values()]
    axes.plot(list(scored), held_out, "o-", color=HELD_OUT, label="held out, all pairs")
    axes.set_xlabel("step")
    axes.legend(frameon=False, fontsize=9, loc="best")


def bars(axes: Axes, names: list[str], values: list[float], colors: list[str], labels: list[str]) -> None:
    """Bars with their values written on top instead of an axis."""
    drawn = axes.bar(names, values, color=colors, width=0.6)
    axes.bar_label(drawn, labels, padding=3)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.1, y=0.15)


def save_picture(result: Result, path: Path) -> None:
    """Loss and margin over the steps; held-out accuracy, memory and time as bars."""
    style = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "axes.titlesize": 11}
    style |= {
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "text.color": INK,
        "axes.edgecolor": "#777777",
    }
    with rc_context(style):
        figure = Figure(figsize=(11, 7), layout="constrained")
        title = "dpofast demo: SmolLM2-135M learns the lint rules of ruff (DPO)"
        figure.suptitle(title, fontsize=13, x=0.01, ha="left")
        grid = figure.add_gridspec(2, 6)
        curves(figure.add_subplot(grid[0, :3], title="Loss"), result, "loss", math.log(2))
        curves(
            figure.add_subplot(grid[0, 3:], title="Reward margin, chosen less rejected"),
            result,
            "margin",
            0.0,
        )

        before, after = result.before, result.after
        shares = [before.preference, after.preference, after.reward_accuracy]
        names = ["likelier,\nbefore", "likelier,\nafter", "gained more,\nafter"]
        axes = figure.add_subplot(grid[1, :2], title="Held out: the chosen answer")
        bars(axes, names, shares, [PLAIN, HELD_OUT, HELD_OUT], [f"{share:.1%}" for share in shares])
        axes.axhline(0.5, color=INK, linestyle="--", linewidth=1)
        axes.set_ylim(0, 1)

        answers, positions = int((result.head_labels != IGNORE).sum()), result.head_labels.numel()
        names = [
            f"PyTorch,\nall {positions:,}\npositions",
            f"PyTorch,\n{answers:,} answer\ntokens",
            f"dpofast,\n{answers:,} answer\ntokens",
        ]
        colors, costs = [PLAIN, MASKED, DPOFAST], list(result.costs.values())
        peaks = [cost.peak_bytes for cost in costs]
        if None not in peaks:
            axes = figure.add_subplot(grid[1, 2:4], title="Head: extra memory")
            bars(axes, names, peaks, colors, [mib(peak) for peak in peaks])
        axes = figure.add_subplot(grid[1, 4:], title="Head: forward + backward")
        seconds = [cost.seconds for cost in costs]
        bars(axes, names, seconds, colors, [f"{s:.2f} s" for s in seconds])
        figure.savefig(path, dpi=130)
