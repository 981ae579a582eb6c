"""What a training says while it runs: a line of JSON a step, TensorBoard's events, and a bar or lines on the screen."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dpofast.checks import wrong

LINE_EVERY = 10.0  # seconds between lines where there is no terminal for a bar


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of a log."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class JsonLog:
    """A file of lines that is cut to ``length`` bytes, what it had at the checkpoint that a run goes on from."""

    def __init__(self, path: Path, length: int = 0) -> None:
        has = path.stat().st_size if path.exists() else 0
        if has < length:
            raise wrong(
                "log", f"{path} of {has} bytes", f"the {length} bytes that the checkpoint knows; its end is lost"
            )
        self._file = path.open("ab")
        self._file.truncate(length)

    def write(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")

    def sync(self) -> int:
        """Have all on the disk; returns how many bytes that is."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()


def tensorboard(folder: Path, step: int) -> Any:
    """TensorBoard's writer, or None where it is not installed. Events after ``step`` are those of a run that ended."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)


class Screen:
    """A bar where there is a terminal, else a line now and then. Silent on every rank but the first."""

    def __init__(self, console: Console, silent: bool) -> None:
        self.console, self.silent = console, silent
        self._progress: Progress | None = None
        self._said = 0.0

    def say(self, text: str) -> None:
        if not self.silent:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def begin(self, name: str, done: int, total: int) -> None:
        """Begin a phase of ``total`` units, of which some are ``done``."""
        self.end()
        if self.silent:
            return
        if not self.console.is_terminal:
            self.say(f"{name}: {total - done} of {total} to do")
            self._said = time.monotonic()
            return
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=self.console,
        )  # fmt: skip
        self._progress.start()
        self._progress.add_task(name, total=total, completed=done, note="")

    def advance(self, done: int, note: str = "") -> None:
        """Say that ``done`` units of the phase are done, and something about them."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[-1], completed=done, note=note)
        elif not self.silent and time.monotonic() - self._said > LINE_EVERY:
            self.say(f"  {done}  {note}")
            self._said = time.monotonic()

    def end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
