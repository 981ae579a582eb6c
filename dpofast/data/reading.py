"""Records of a source: read in turn, counted, or picked by number; bad rows stop the reading, or are listed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dpofast.checks import shown, wrong
from dpofast.data import formats, sources
from dpofast.data.records import BadRow, Record, Skipped


def read(
    source: Any, *, format: str | None = None, on_error: str = "raise", check: Callable[[Record], Any] | None = None
) -> Records:
    """The records of files or rows, in whatever format they are.

    Equivalent, for a file of JSON lines, to::

        [normalise(json.loads(line), format, f"{path}:{number}") for number, line in enumerate(open(path), 1)]

    but for the memory: lines are read as they are asked for.

    Args:
        source: a path of JSON lines, a JSON array or Parquet, ``.gz`` too for JSON; several paths; an open file of JSON
            lines; rows as `datasets` has them; any iterable of mappings.
        format: a key of `FORMATS`; None: that of the first row.
        on_error: "raise" stops at the first bad row; "skip" leaves it out and lists it in ``skipped``.
        check: called with each record; one that it refuses by a `BadRow` is a bad row too. With an `Encoder`, "skip"
            leaves out what truncation leaves nothing of.

    Returns:
        `Records`.

    Raises:
        BadRow: while reading, of a row that is no record; a ValueError with file, line and reason.
        ValueError, TypeError: of the arguments.
        OSError: a file that cannot be read.

    Example:
        >>> records = read([{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}])
        >>> records.format, len(records), records[0].where
        ('trl', 1, 'rows:1')
    """
    if format is not None and format not in formats.FORMATS:
        raise wrong("format", f"{format!r}", f"None or one of {', '.join(formats.FORMATS)}")
    if on_error not in ("raise", "skip"):
        raise wrong("on_error", f"{on_error!r}", '"raise" or "skip"')
    if check is not None and not callable(check):
        raise wrong("check", shown(check)[:80], "None or a function of a record, such as an Encoder", TypeError)
    return Records(sources.open_source(source), format, on_error == "skip", check)


class Records:
    """Records of some sources, made by `read`. Iterate it, as often as the source allows; or pick by number.

    ``len`` and picking need files or rows in memory. They make a table of where the lines of JSON files begin, of 8
    bytes a line; with ``on_error="skip"``, in one pass that looks at every row, for a bad one has no number.

    Attributes:
        skipped: the rows left out by the last pass, as ``(file, line, reason)``.
    """

    def __init__(
        self, opened: list[Any], format: str | None, skip: bool, check: Callable[[Record], Any] | None
    ) -> None:
        self._sources, self._format, self._skip, self._given = opened, format, skip, format is not None
        self._check = check
        self.skipped: list[Skipped] = []
        self._ends: np.ndarray | None = None
        self._kept: np.ndarray | None = None

    @property
    def format(self) -> str | None:
        """The format of the rows; None before a stream is read, or where there is no record."""
        if self._format is None and not any(isinstance(each, sources.Stream) for each in self._sources):
            listed = self.skipped
            next(iter(self), None)
            self.skipped = listed
        return self._format

    def __iter__(self) -> Iterator[Record]:
        for _, record in self._numbered():
            yield record

    def __len__(self) -> int:
        self._index()
        return int(self._ends[-1]) if self._kept is None else len(self._kept)  # type: ignore[index]

    def __getitem__(self, i: int) -> Record:
        size = len(self)
        if not -size <= i < size:
            raise IndexError(f"index: got {i}, expected one of {size} records")
        i = i % size if self._kept is None else int(self._kept[i])
        which = int(np.searchsorted(self._ends, i, side="right"))
        before = int(self._ends[which - 1]) if which else 0  # type: ignore[index]
        if self._format is None:
            self.format  # noqa: B018 - of the first row, whichever is picked first
        source = self._sources[which]
        return self._record(source.name, *source.pick(i - before))

    def _index(self) -> None:
        if self._ends is not None:
            return
        ends = np.cumsum([source.count() for source in self._sources], dtype=np.int64)
        if self._skip:
            self._kept = np.fromiter((i for i, _ in self._numbered()), dtype=np.int64)
        self._ends = ends

    def _numbered(self) -> Iterator[tuple[int, Record]]:
        """Records, each with the number of its row among all."""
        self.skipped = skipped = []
        i = -1
        for source in self._sources:
            for line, row in source.rows():
                i += 1
                try:
                    record = self._record(source.name, line, row)
                except BadRow as error:
                    if not self._skip:
                        raise
                    skipped.append(Skipped(source.name, line, error.reason))
                else:
                    yield i, record

    def _record(self, name: str, line: int, row: Any) -> Record:
        if isinstance(row, BadRow):
            raise row
        where = f"{name}:{line}"
        record = formats.normalise(row, self._format if self._given else None, where)
        if not self._given:
            found = formats.detect(row)
            if self._format not in (None, found):
                raise BadRow(
                    where, f"row: got the format {found}, expected {self._format}, as the rows before; give format= or "
                    "split the file by format"
                )  # fmt: skip
            self._format = found
        if self._check is not None:
            self._check(record)
        return record
