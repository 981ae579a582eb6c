"""Memory for the two largest buffers that is not faulted in anew on every step.

A buffer of hundreds of MB costs a page fault and a cleared page for each of its pages, which shows in a profile of
the whole computation. So the last cache and the last gradient of the head stay mapped, once nobody uses them any
more, and the next call takes their pages, as with the caching allocator of ``torch.cuda``. What stays never exceeds
what the call before it needed.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
import threading

import torch
from torch import Tensor

_SMALL = 1 << 20  # bytes; below, malloc reuses its own pages
_lock = threading.Lock()
_spare: dict[str, list[mmap.mmap]] = {}  # by use: the last mapping, if any


def _map(n_bytes: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(-1, n_bytes)
    pages = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # private: a fork must not share it
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages (gVisor, some of WSL): small ones will do
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _references(holder: list[mmap.mmap]) -> int:
    return sys.getrefcount(holder[0])


# A tensor made by frombuffer holds a reference to its mapping for as long as the storage lives.
_UNUSED = _references([mmap.mmap(-1, mmap.PAGESIZE)])


def empty(shape: tuple[int, ...], dtype: torch.dtype, use: str) -> Tensor:
    """An uninitialised tensor, on the pages that the last tensor of the same ``use`` left if they fit and are free."""
    n_bytes = dtype.itemsize
    for size in shape:
        n_bytes *= size
    if n_bytes < _SMALL:
        return torch.empty(shape, dtype=dtype)
    with _lock:
        last = _spare.setdefault(use, [])
        if not last or not n_bytes <= len(last[0]) <= 2 * n_bytes or _references(last) != _UNUSED:
            last.clear()  # its pages go back before the new ones come, unless a tensor still holds them
            last.append(_map(n_bytes))
        return torch.frombuffer(last[0], dtype=dtype, count=n_bytes // dtype.itemsize).view(shape)


def empty_cache() -> None:
    """Gives memory that stays mapped between calls back to the system; what a tensor still uses goes with the tensor.

    Example:
        >>> import dpofast
        >>> dpofast.empty_cache()
    """
    with _lock:
        _spare.clear()
