"""A file of what was computed once: what it is of, and records of one size, which are only ever added at its end.

The first line is JSON, the identity of what the records are of; a file of another identity is refused, never used. A
process that ends while it writes leaves at most a part of a record, which the next one cuts off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpofast.train.checkpoint import NoRoom

_FORMAT = 1


class Ledger:
    """The records of a file.

    Attributes:
        found: the records ``[N]`` that were there when it was opened.

    Args:
        argument: the option by which the user named the file, for errors.
        path: the file, which is begun where it is not there.
        identity: what the records are of.
        record: the type of a record.
        writes: False on a rank that only reads.

    Raises:
        ValueError: the file is of another identity, or no such file at all; it stays as it is.
    """

    def __init__(
        self, argument: str, path: Path, identity: Mapping[str, Any], record: np.dtype, writes: bool = True
    ) -> None:
        self.argument, self.path, self.record, self.writes = argument, path, record, writes
        self.found = np.empty(0, record)
        header = json.dumps({"format": _FORMAT, **identity}, sort_keys=True).encode() + b"\n"
        self._begin_of_records = len(header)
        if not path.exists():
            if writes:
                self._begin(header)
            return
        first, newline, records = path.read_bytes().partition(b"\n")
        self._expect_identity(first + newline, header)
        whole = len(records) // record.itemsize * record.itemsize
        self.found = np.frombuffer(records[:whole], record)
        if whole < len(records):
            self.cut(len(self.found))

    def cut(self, count: int) -> None:
        """Leave the first ``count`` records in the file; nothing on a rank that does not write."""
        if self.writes:
            os.truncate(self.path, self._begin_of_records + count * self.record.itemsize)

    def append(self, records: Sequence[tuple[Any, ...]]) -> None:
        """Add records at the end; nothing on a rank that does not write."""
        if self.writes and records:
            append(self.path, np.array(records, self.record).tobytes())

    def sync(self) -> None:
        """Have all that was added on the disk."""
        if self.writes:
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def _begin(self, header: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(self.path.name + ".unfinished")
        with draft.open("wb") as file:
            file.write(header)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.path)

    def _expect_identity(self, found: bytes, header: bytes) -> None:
        try:
            before = json.loads(found)
        except ValueError as error:
            raise ValueError(f"{self.argument}: {self.path} is no file of what was computed before ({error}); "
                             "remove it, or name another") from error  # fmt: skip
        now = json.loads(header)
        other = [name for name in now if before.get(name) != now[name]] if isinstance(before, dict) else ["format"]
        if other:
            raise ValueError(
                f"{self.argument}: {self.path} was made with another {', '.join(other)}, and would be wrong here; "
                "remove that file, or name another"
            )


def append(path: Path, content: bytes) -> None:
    """Write ``content`` at a file's end; `NoRoom` where the disk is full."""
    try:
        with path.open("ab") as file:
            file.write(content)
    except OSError as error:
        raise NoRoom(f"{path}: writing stopped: {error}. What was saved before it is whole: make room, and go on with "
                     "--resume") from error  # fmt: skip
