"""Ctrl-C and SIGTERM: the first asks the training to save and leave, the second leaves at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """What was asked: ``signal`` is None, or the number of the first signal that came."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def asked_by_signals() -> Iterator[Stop]:
    """Within, SIGINT and SIGTERM are noted; a second one does what it did before."""
    stop = Stop()

    def note(number: int, _frame: FrameType | None) -> None:
        stop.signal = number
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {each: signal.signal(each, note) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
