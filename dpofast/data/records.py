"""One record of preference data, whatever file it came from; and the error of a row that is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Messages = tuple[Mapping[str, Any], ...]
"""Turns of a conversation: ``role``, ``content`` and what else the chat template reads, such as ``tool_calls``."""


@dataclass(frozen=True)
class Record:
    """A prompt and its answers, as text or as messages.

    Attributes:
        prompt: a text, or the messages before the answers.
        answers: the best first; texts where the prompt is one, otherwise the messages of each answer.
        scores: of each answer, higher is better, not increasing; None where the data has none.
        label: of a single answer, whether it is good; None for two answers and more.
        weight: of the record in the loss.
        margin: by which the chosen answer should win.
        where: ``"file:line"``.
        columns: the columns that have no place above, such as ``tools``, which a chat template reads.
    """

    prompt: str | Messages
    answers: tuple[str | Messages, ...]
    scores: tuple[float, ...] | None = None
    label: bool | None = None
    weight: float | None = None
    margin: float | None = None
    where: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)


class BadRow(ValueError):
    """A row that is no record: ``where``, ``"file:line"``, and ``reason``."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"data: {where}: {reason}")
        self.where, self.reason = where, reason

    def __reduce__(self) -> tuple[type[BadRow], tuple[str, str]]:
        return BadRow, (self.where, self.reason)  # for a DataLoader's workers, whose errors are pickled


class Skipped(NamedTuple):
    """A row that ``on_error="skip"`` left out."""

    file: str
    line: int
    reason: str
