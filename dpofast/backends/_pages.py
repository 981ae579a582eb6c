"""Memory for the cached schedules that is not faulted in anew on every step.

A cache of hundreds of MB costs a page fault and a cleared page for each of its pages, a tenth of the whole
computation on some machines, so the last one is kept for the next call, like the caching allocator of
``torch.cuda``. It never exceeds the memory budget of the call that asked for it.
"""

from __future__ import annotations

import mmap
import sys
import threading

import torch
from torch import Tensor

_SMALL = 1 << 20  # below it, malloc reuses its own pages
_lock = threading.Lock()
_kept: list[mmap.mmap] = []  # the last mapping, if any


def _references(holder: list[mmap.mmap]) -> int:
    return sys.getrefcount(holder[0])


# A tensor made by frombuffer holds a reference to its mapping for as long as the storage lives.
_UNUSED = _references([mmap.mmap(-1, mmap.PAGESIZE)])


def cache_tensor(n_bytes: int) -> Tensor:
    """uint8 [n_bytes], uninitialised, page-aligned if it is large."""
    if n_bytes < _SMALL:
        return torch.empty(n_bytes, dtype=torch.uint8)
    with _lock:
        if not _kept or not n_bytes <= len(_kept[0]) <= 2 * n_bytes or _references(_kept) != _UNUSED:
            _kept.clear()  # its pages go back before the new ones come, unless a tensor still holds them
            _kept.append(mmap.mmap(-1, n_bytes))
            if hasattr(mmap, "MADV_HUGEPAGE"):
                _kept[0].madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(_kept[0], dtype=torch.uint8, count=n_bytes)


def empty_cache() -> None:
    """Gives the memory that is kept between calls back to the system, unless a graph still holds it.

    Example:
        >>> import dpofast
        >>> dpofast.empty_cache()
    """
    with _lock:
        _kept.clear()
