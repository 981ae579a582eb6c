"""Checkpoints on disk: whole or not there. A folder is written beside its place, synced, and renamed into it.

A checkpoint is a folder ``step-00000040``: what the model's own library saves, ``trainer.pt`` beside it, and
``manifest.json``, which is written last and has the size and the SHA-256 of every other file. A process may end at any
moment: the folder then has its last name and is complete, or the name of an unfinished one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

MANIFEST = "manifest.json"
STATE = "trainer.pt"
_NAME = re.compile(r"step-(\d{8})")
_UNFINISHED, _REMOVED, _DAMAGED = ".unfinished", ".removed", ".damaged"
_MARGIN = 64 << 20  # bytes that stay free: logs, and files of others


class NoRoom(OSError):
    """There is no room for a checkpoint. The one before it is untouched."""


class Unreadable(ValueError):
    """A checkpoint that is not what was written."""


def folder_of(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def steps(root: Path) -> list[int]:
    """Steps of the checkpoints in ``root``, the newest first."""
    names = (_NAME.fullmatch(path.name) for path in root.iterdir()) if root.is_dir() else ()
    return sorted((int(name[1]) for name in names if name), reverse=True)


def clear(root: Path) -> list[Path]:
    """Remove what a process left that ended while it wrote or removed; returns what it had not written to its end."""
    unfinished = sorted(root.glob(f"*{_UNFINISHED}"))
    for path in (*unfinished, *root.glob(f"*{_REMOVED}")):
        shutil.rmtree(path)
    return unfinished


def set_aside(folder: Path) -> Path:
    """Give an unreadable checkpoint another name, under which nothing looks for it and nothing removes it."""
    aside = folder.with_name(folder.name + _DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    return folder.rename(aside)


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write(root: Path, step: int, fill: Callable[[Path], None], expected: int) -> Path:
    """Write what ``fill`` puts into a folder as the checkpoint of ``step``, or raise and leave nothing of it.

    Args:
        root: the folder of all checkpoints.
        fill: is given an empty folder.
        expected: bytes that it will take, for which there must be room before anything is written.

    Raises:
        NoRoom: less than ``expected`` is free, or the disk was full before the end.
    """
    root.mkdir(parents=True, exist_ok=True)
    target = folder_of(root, step)
    draft = target.with_name(target.name + _UNFINISHED)
    shutil.rmtree(draft, ignore_errors=True)
    free = shutil.disk_usage(root).free
    if free < expected + _MARGIN:
        raise NoRoom(f"{_room(root, step, expected, free)}; nothing was written")
    draft.mkdir()
    try:
        fill(draft)
        (draft / MANIFEST).write_text(json.dumps({"files": _digests(draft)}, indent=1))
        for path in draft.rglob("*"):
            _sync(path)
        _sync(draft)
    except OSError as error:
        free = shutil.disk_usage(root).free
        shutil.rmtree(draft, ignore_errors=True)
        raise NoRoom(f"{_room(root, step, expected, free)}; writing stopped: {error}") from error
    draft.rename(target)
    _sync(root)
    return target


def _room(root: Path, step: int, expected: int, free: int) -> str:
    return (
        f"{root}: no checkpoint of step {step}, which takes about {expected / 2**20:,.0f} MiB where "
        f"{free / 2**20:,.0f} MiB are free. What was saved before it is whole: make room, and go on with --resume"
    )


def check(folder: Path) -> None:
    """Raise `Unreadable` where a file is missing, of another size or of another content than was written."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        raise Unreadable(f"{folder}: has no readable {MANIFEST} ({error})") from error
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            raise Unreadable(f"{path}: is missing")
        if path.stat().st_size != size:
            raise Unreadable(f"{path}: has {path.stat().st_size} bytes, {size} were written")
        if sha256(path) != digest:
            raise Unreadable(f"{path}: its content is not what was written")


def remove_but(root: Path, keep: set[int]) -> None:
    """Remove checkpoints of other steps than these."""
    for step in set(steps(root)) - keep:
        path = folder_of(root, step)
        gone = path.with_name(path.name + _REMOVED)
        path.rename(gone)  # at once, so that no half of it keeps the name
        shutil.rmtree(gone)


def _digests(folder: Path) -> dict[str, tuple[int, str]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): (path.stat().st_size, sha256(path)) for path in files}


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
