"""The one question that an op asks of the planner."""

from __future__ import annotations

import functools

from dpofast.plan import cpu, cpu_cost, tiled
from dpofast.plan.cost import HOST, DataSheet
from dpofast.plan.schedule import Request, Schedule


def choose(request: Request, backend: str, threads: int = 0, device: DataSheet = HOST) -> Schedule:
    """The schedule of a request on an exact backend, under its budget.

    Each thread's own tiles are not counted against the budget, because results must not depend on the number of
    threads; ``threads`` only adds them to the ``workspace_bytes`` that are reported. ``device`` has the figures by
    which a backend whose products are `torch.mm` chooses its tiles.

    Raises:
        ValueError: if no schedule fits the budget.
    """
    name, _, isa = backend.partition(":")
    return cpu_cost.choose(request, isa, threads) if name == "cpu" else tiled.choose(request, backend, device)


def traced(request: Request, backend: str, threads: int = 0, device: DataSheet = HOST) -> Schedule:
    """`choose` in a graph that `torch.compile` follows, where ``request`` may have symbols for numbers."""
    if backend.startswith("cpu"):
        return cpu.first_fit(request, backend.partition(":")[2], threads)
    return tiled.first_fit(request, backend, device)


chosen = functools.lru_cache(maxsize=1024)(choose)
"""`choose`, remembered: a training loop asks the same again and again, and a small call is over before the answer."""
