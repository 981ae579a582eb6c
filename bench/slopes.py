"""Straight lines through what a record has at several numbers of tokens N: time = a + b N, memory = c + d N."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dpofast.bench.record import Record, Results

LEAST = 3  # sizes that a line is fitted to: through two points there is always one


class Slope(NamedTuple):
    """value = fixed + each * N, over these numbers of tokens."""

    fixed: float
    each: float
    off: float  # the largest relative distance of a value from the line
    first: int
    last: int


def fit(sizes: Sequence[int], values: Sequence[float]) -> Slope:
    """The line whose distances, divided by N, have the least sum of squares: so that no size outweighs the others."""
    if len(set(sizes)) < LEAST:
        raise ValueError(f"sizes: got {sorted(set(sizes))}, expected at least {LEAST} different ones")
    n, y = np.asarray(sizes, float), np.asarray(values, float)
    fixed, each = np.linalg.lstsq(np.stack((1 / n, np.ones_like(n)), 1), y / n, rcond=None)[0]
    off = np.abs(fixed + each * n - y).max() if not y.all() else np.abs((fixed + each * n) / y - 1).max()
    return Slope(float(fixed), float(each), float(off), min(sizes), max(sizes))


def plain_facts(r: Record) -> Record:
    """What a record has in common with those of other sizes and metrics."""
    return r._replace(
        metric="", unit="", value=None, spread=None, low=None, high=None, run=0, schedule="", tile=(),
        shape=r.shape[1:], failed="",
    )  # fmt: skip


def series(results: Results, metric: str) -> Iterator[tuple[Record, list[Record]]]:
    """What records of a metric share that differ in their number of tokens alone, and these by it.

    Where one size has several, which differ in tiles or runs, there is no such series.
    """
    found: dict[Record, list[Record]] = {}
    for r in results.where(metric=metric, failed=""):
        if r.shape:
            facts = plain_facts(r)._replace(metric=metric, unit=r.unit)
            found.setdefault(facts, []).append(r)
    for facts, records in found.items():
        if len({r.shape[0] for r in records}) == len(records):
            yield facts, sorted(records, key=lambda r: r.shape[0])


def slopes(results: Results, metric: str) -> dict[Record, Slope]:
    """The lines of all series that have enough sizes."""
    return {
        facts: fit([r.shape[0] for r in records], [r.value for r in records])
        for facts, records in series(results, metric)
        if len(records) >= LEAST
    }
