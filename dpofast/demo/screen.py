"""Progress: what runs, how far it is, how long it will still take. A moving bar; lines where there is no terminal."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from dpofast.train import log

LINE_EVERY = 4.0  # seconds between lines where there is no terminal for a bar


class Bar:
    """How far one phase is. It moves with the clock, and what is done (`advance`) corrects how fast."""

    def __init__(self, name: str, expected: float, total: int | None) -> None:
        self.name, self.expected, self.total, self.note = name, expected, total, ""
        self.start, self.done, self.at = time.perf_counter(), 0, 0.0

    def advance(self, units: int = 1, note: str = "") -> None:
        """Say that ``units`` more of the total are done, and something about them."""
        self.done += units
        self.at, self.note = self.elapsed, note

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    @property
    def left(self) -> float:
        """Seconds, by what is done so far; by the estimate before anything is."""
        whole = self.at * self.total / self.done if self.done and self.total else self.expected
        return max(0.0, whole - self.elapsed)

    @property
    def share(self) -> float:
        elapsed = self.elapsed
        return min(0.99, elapsed / (elapsed + self.left + 1e-9))  # full only when the phase has ended

    @property
    def text(self) -> str:
        left = f"about {self.left:.0f} s left" if self.left >= 1 else "nearly done"
        return f"{left}  {self.note}".rstrip()


class Screen(log.Screen):
    """Shows each phase while it runs, and keeps its seconds; also where a training shows what it does."""

    def __init__(self, console: Console, expected: Mapping[str, float] | None = None) -> None:
        super().__init__(console, silent=False)
        self.expected = dict(expected or {})  # seconds of a phase, by its name
        self.seconds: dict[str, float] = {}
        self._phase = ExitStack()
        self._bar: Bar | None = None

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Bar]:
        """A phase; its bar follows what is done of ``total``, if given, and before that what is expected.

        One that comes again, as a training's reference, finds its work done.
        """
        expected = 1.0 if name in self.seconds else self.expected.get(name, 1.0)
        bar = Bar(name, expected, total)
        shown = self._moving(bar) if self.console.is_terminal else self._lines(bar)
        with shown:
            yield bar
        self.seconds[name] = self.seconds.get(name, 0.0) + bar.elapsed

    # As a training calls it

    def begin(self, name: str, done: int, total: int) -> None:
        """Begin a phase of ``total`` units."""
        self._bar = self._phase.enter_context(self.phase(name, total))

    def advance(self, done: int, note: str = "") -> None:
        """Say that ``done`` units of the phase are done, and something about them."""
        if self._bar is not None:
            self._bar.advance(done - self._bar.done, note)

    def end(self) -> None:
        self._phase.close()
        self._bar = None

    @contextmanager
    def _moving(self, bar: Bar) -> Iterator[None]:
        ended = False

        def render() -> Table:
            row = Table.grid(padding=(0, 1))
            share, text = (1.0, bar.note) if ended else (bar.share, bar.text)
            drawn = ProgressBar(total=1.0, completed=share, width=24)
            row.add_row(f"{bar.name:<28}", drawn, f"{bar.elapsed:4.0f} s", text)
            return row

        with Live(console=self.console, get_renderable=render, refresh_per_second=8):
            yield
            ended = True

    @contextmanager
    def _lines(self, bar: Bar) -> Iterator[None]:
        self.console.print(f"{bar.name}: {bar.text}")
        ended = threading.Event()

        def talk() -> None:
            while not ended.wait(LINE_EVERY):
                self.console.print(f"  {bar.share:4.0%}  {bar.text}")

        thread = threading.Thread(target=talk, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
        self.console.print(f"  done in {bar.elapsed:.1f} s  {bar.note}".rstrip())
