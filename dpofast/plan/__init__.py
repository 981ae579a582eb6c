"""Schedules and tiles: what a call will do, how much memory it will take, and roughly how long.

`choose` is what the op runs on; `dpofast.plan.report.plan` is the same answer with its reasons, for people.
"""

from dpofast.plan.choice import choose, chosen, traced
from dpofast.plan.schedule import DEFAULT_MEMORY_BUDGET, Request, Schedule, parse_bytes
from dpofast.plan.tiled import cached_columns, can_fuse

__all__ = [
    "DEFAULT_MEMORY_BUDGET",
    "Request",
    "Schedule",
    "cached_columns",
    "can_fuse",
    "choose",
    "chosen",
    "parse_bytes",
    "traced",
]
