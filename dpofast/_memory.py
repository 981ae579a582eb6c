"""How much memory a piece of work takes at its worst moment, for the demo, the benchmark and the tests."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

from dpofast.backends._pages import empty_cache


def _status(key: str) -> int:
    return 1024 * int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def peak_growth(work: Callable[[], object]) -> int | None:
    """Bytes by which ``work`` raises this process's resident memory at its worst moment, without pages of files.

    Linux keeps that mark (VmHWM) and lets a process reset its own. Freed memory that the allocator or dpofast's
    own cache holds is given back first: reusing it would not show. None where there is no such /proc.
    """
    empty_cache()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before, files = _status("VmRSS"), _status("RssFile")
    except (OSError, AttributeError):  # AttributeError: the C library is not glibc
        work()
        return None
    work()
    # Pages of libraries, which a system drops when they are cold, may have come back meanwhile.
    return _status("VmHWM") - before - max(0, _status("RssFile") - files)
