"""Where rows come from: files of JSON lines, a JSON array, Parquet, rows in memory, a stream.

Nothing here knows a format. A row is a mapping, or the `BadRow` that says why a line is none.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from dpofast.checks import shown, wrong
from dpofast.data.records import BadRow

BOM, BOM_16 = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
ARRAY_LIMIT = 1 << 30  # bytes of a JSON array, whose rows take a few times as much in memory


# JSON


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(
            f"keys: got {next(key for key in keys if keys.count(key) > 1)!r} twice in one object, expected it once"
        )
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates)


def decode(line: bytes | str, where: str) -> Any:
    """The value of a line of JSON; a BadRow says why there is none."""
    try:
        return _DECODER.decode(line.decode() if isinstance(line, bytes) else line)
    except UnicodeDecodeError as error:
        hint = "; save the file as UTF-8" if line[:2] in BOM_16 else ""
        raise BadRow(where, f"not UTF-8: byte 0x{line[error.start]:02x} at byte {error.start + 1}{hint}") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise BadRow(where, f"no JSON: {error.msg} at {place}") from None
    except RecursionError:
        raise BadRow(where, "no JSON that can be read: nested too deeply") from None
    except ValueError as error:  # of the hook, and of integers with thousands of digits
        raise BadRow(where, str(error)) from None


def numbered_lines(file: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Lines that are not blank and their numbers from 1, the first without a byte-order mark."""
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(BOM if isinstance(line, bytes) else "\ufeff")
        if line.strip():
            yield number, line


def _row(line: bytes | str, where: str) -> Any:
    try:
        return decode(line, where)
    except BadRow as error:
        return error


# Sources: name, rows() and, where rows can be picked, count() and pick(i)


class Lines:
    """A file of JSON lines. Where lines begin, 8 bytes a line, is looked up when rows are first picked."""

    def __init__(self, path: str) -> None:
        self.name = path
        self._starts: np.ndarray | None = None
        self._blank: np.ndarray
        self._stamp: tuple[int, int]

    def rows(self) -> Iterator[tuple[int, Any]]:
        with _opened(self.name) as file:
            for number, line in numbered_lines(file):
                yield number, _row(line, f"{self.name}:{number}")

    def count(self) -> int:
        return len(self._table())

    def pick(self, i: int) -> tuple[int, Any]:
        start = int(self._table()[i])
        if self._stamp != _stamp(self.name):
            raise wrong(
                "source", f"{self.name}, which changed after its lines were counted", "a file at rest; read it anew"
            )
        with open(self.name, "rb") as file:  # anew each time: processes that share one would move each other's place
            file.seek(start)
            line = file.readline()
        before = int(np.searchsorted(self._blank - np.arange(len(self._blank)), i, side="right"))
        number = i + before + 1
        return number, _row(line.removeprefix(BOM) if number == 1 else line, f"{self.name}:{number}")

    def _table(self) -> np.ndarray:
        if self._starts is None:
            if self.name.endswith(".gz"):
                raise TypeError(
                    f"source: got {self.name}, which can be read in its order alone; gunzip it to pick or shuffle rows"
                )
            self._stamp = _stamp(self.name)
            starts, blank, place = array("q"), array("q"), 0
            with open(self.name, "rb") as file:
                for number, line in enumerate(file):
                    if (line.removeprefix(BOM) if number == 0 else line).strip():
                        starts.append(place)
                    else:
                        blank.append(number)
                    place += len(line)
            self._blank = np.array(blank, dtype=np.int64)
            self._starts = np.array(starts, dtype=np.int64)
        return self._starts


def _stamp(path: str) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


@contextlib.contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            yield file  # type: ignore[misc]
    except (EOFError, zlib.error) as error:
        raise OSError(f"source: {path} is damaged, or was not written to its end: {error}") from error


class Rows:
    """Rows in memory, such as a list, a `datasets.Dataset` or a JSON array; numbered from 1."""

    def __init__(self, name: str, rows: Any) -> None:
        self.name, self._rows = name, rows

    def rows(self) -> Iterator[tuple[int, Any]]:
        yield from enumerate(self._rows, 1)

    def count(self) -> int:
        return len(self._rows)

    def pick(self, i: int) -> tuple[int, Any]:
        return i + 1, self._rows[i]


class Stream:
    """An open file of JSON lines, or any iterable of rows: read in its order, and once if it is an iterator."""

    def __init__(self, name: str, rows: Iterable[Any]) -> None:
        self.name, self._rows = name, rows
        self._once, self._read = iter(rows) is rows, False

    def rows(self) -> Iterator[tuple[int, Any]]:
        if self._once and self._read:
            raise wrong("source", "a stream that was read before", "one that can be read again, such as a file's path")
        self._read = True
        if hasattr(self._rows, "read"):
            yield from ((n, _row(line, f"{self.name}:{n}")) for n, line in numbered_lines(self._rows))
        else:
            yield from enumerate(self._rows, 1)

    def count(self) -> int:
        raise TypeError(f"source: got {type(self._rows).__name__}, which can be read in its order alone; pass a path")

    def pick(self, i: int) -> tuple[int, Any]:
        raise TypeError(f"source: got {type(self._rows).__name__}, which can be read in its order alone; pass a path")


class Parquet:
    """A Parquet file, read by row groups; rows are numbered from 1."""

    BATCH = 256  # rows in memory at a time

    def __init__(self, path: str) -> None:
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise ImportError("source: reading Parquet needs pyarrow: pip install 'dpofast[data]'") from error
        self.name, self._module = path, parquet
        file = parquet.ParquetFile(path)
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self._group: tuple[int, Any] = -1, None
        file.close()

    def rows(self) -> Iterator[tuple[int, Any]]:
        number = 0
        with self._module.ParquetFile(self.name) as file:
            for batch in file.iter_batches(self.BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row

    def count(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def pick(self, i: int) -> tuple[int, Any]:
        group = int(np.searchsorted(self._ends, i, side="right"))
        if self._group[0] != group:  # the last group is kept, as Arrow
            with self._module.ParquetFile(self.name) as file:
                self._group = group, file.read_row_group(group)
        table = self._group[1]
        return i + 1, table.slice(i - int(self._ends[group]) + len(table), 1).to_pylist()[0]


def open_source(source: Any) -> list[Any]:
    """What to read, as sources: a path, several, an open file, or rows."""
    if isinstance(source, (str, os.PathLike)):
        return [_open_path(os.fspath(source))]
    if isinstance(source, io.TextIOWrapper):
        source = source.buffer  # its bytes, which alone say where UTF-8 is wrong
    if isinstance(source, (bytes, Mapping)) or not isinstance(source, Iterable):
        raise wrong("source", shown(source)[:80], "a path, several, an open file, or an iterable of rows", TypeError)
    if isinstance(source, (list, tuple)) and source and all(isinstance(x, (str, os.PathLike)) for x in source):
        return [_open_path(os.fspath(path)) for path in source]
    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        return [Rows("rows", source)]
    name = getattr(source, "name", None)
    return [Stream(name if isinstance(name, str) else "stream", source)]


def _open_path(path: str) -> Any:
    if path.endswith(".parquet"):
        return Parquet(path)
    with _opened(path) as file:
        head = file.read(4096).removeprefix(BOM).lstrip()
    return Rows(path, _array(path)) if head.startswith(b"[") else Lines(path)


def _array(path: str) -> list[Any]:
    """The rows of a JSON array, which is in memory as a whole."""
    with _opened(path) as file:
        content = file.read(ARRAY_LIMIT + 1)
    if len(content) > ARRAY_LIMIT:
        size = f"{ARRAY_LIMIT / 2**30:g} GiB"
        raise wrong(
            "source", f"{path}, a JSON array of more than {size}, which is read as a whole",
            "a smaller one, or JSON lines; write them by jq -c '.[]'",
        )  # fmt: skip
    return decode(content.removeprefix(BOM), path)
