"""A whole training: what it is of, the run, and what is written when it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from dpofast.train import log, ranks, report
from dpofast.train.checkpoint import sha256
from dpofast.train.config import Config
from dpofast.train.engine import Context, Outcome, Training
from dpofast.train.references import combined, model_identity
from dpofast.train.stop import asked_by_signals


def train(config: Config) -> Outcome:
    """Train as ``config`` says, on this process or, under torchrun, on this rank.

    Args:
        config: the options; see `Config`.

    Returns:
        `Outcome`: after which step it ended, and why. The model is in ``out/last``, and with held-out data
        ``out/best`` is the best.

    Raises:
        ValueError, TypeError: an option, a record or a file that is not what it should be.
        dpofast.train.checkpoint.NoRoom: no room for a checkpoint; the one before is whole.
        FloatingPointError: a loss or a gradient that is not finite.
    """
    disable_progress_bar()  # of files read and written: the screen has one of its own
    here = ranks.start(config.check().device)
    screen = log.Screen(Console(), silent=not here.first)
    out = Path(config.out)
    with asked_by_signals() as stop:
        if here.first:
            out.mkdir(parents=True, exist_ok=True)
        identity = {**here.of_first(lambda: identity_of(config)), "world": here.world}
        training = Training(config, Context(here, screen, stop), identity)
        outcome = training.run()
    if here.first:
        finish(training, outcome)
        screen.say(f"{outcome}. The model is in {out / 'last'}; see {out / 'summary.md'}")
    ranks.leave(here)  # not after an error, which the others may not know of: who started them ends them
    return outcome


def identity_of(config: Config) -> dict[str, str]:
    """Hashes of what a run is of: what a checkpoint and the reference's log-probs are only good for."""
    model = model_identity(config.model)
    encoding = {
        "max_length": config.max_length,
        "truncation": config.truncation,
        "tokenizer of": model,
        "share_prompt": config.share_prompt,
    }
    return {
        "model": model,
        "reference": model_identity(config.reference) if config.reference else model,
        "data": combined([[sha256(Path(path)) for path in paths] for paths in (config.data, config.eval_data)]),
        "encoding": combined([json.dumps(encoding)]),
        "precision": config.precision,
    }


def finish(training: Training, outcome: Outcome) -> None:
    """Write the summary and the picture."""
    config, out = training.config, training.out
    entries = log.read(out / "log.jsonl")
    facts: dict[str, Any] = {"ended": outcome, "records": training.feed.records, "ranks": training.ranks.world}
    if training.feed.skipped:
        listed = "; ".join(f"{bad.file}:{bad.line} {bad.reason}" for bad in training.feed.skipped[:10])
        facts["bad records left out"] = f"{len(training.feed.skipped)}: {listed}"
    steps = [entry for entry in entries if "loss" in entry]
    if steps:
        seconds = sum(entry["seconds"] for entry in steps)
        facts["tokens"] = f"{steps[-1]['tokens']:,} in {seconds:,.0f} s of training"
    if config.picture and entries and report.save_picture(entries, out / "curves.png"):
        facts["curves"] = "![curves](curves.png)"
    (out / "summary.md").write_text(report.summary(config, entries, facts), encoding="utf-8")
