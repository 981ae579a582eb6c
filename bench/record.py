"""A measurement, and the file that a benchmark writes: what a number is of stands in fields, never in a name.

A file is ``{"machine": {...}, "records": [...]}``, a record a line, without the fields that have their defaults.
bench/results/gpu-h100-sweep-2026-11-26.json has tables of columns instead: only the test of the cost model reads it,
and as records its hundreds of numbers would all repeat the same facts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from dpofast.bench import goals

RESULTS = Path("bench", "results")


class Record(NamedTuple):
    """A number and what it is of."""

    suite: str
    metric: str = ""  # "time", "time / products", "peak memory"
    value: float | None = None  # None: it failed
    unit: str = ""  # "s", "ms", "B", "TFLOP/s", "B/s"; a ratio has none
    workload: str = ""  # the model, the training or the trainer
    states: str = ""  # "flat": not as the model left them
    shape: tuple[int, ...] = ()  # of a head: tokens that count, hidden size, vocabulary
    prompt: int = 0  # per cent of the positions, which do not count
    pairs: int = 0  # of sequences that the tokens are in
    provider: str = ""  # whose code ran
    backend: str = ""  # dpofast's
    head: str = ""  # "trained" or "frozen"
    dtype: str = ""
    case: str = ""  # what else tells it from the others: a memory budget, one of several results, LoRA
    schedule: str = ""
    tile: tuple[int, ...] = ()  # tokens and columns of logits at a time
    run: int = 0  # which of several, where each is a record
    spread: float | None = None  # of a median: half the distance between the quartiles
    low: float | None = None  # of a median: the 20th percentile
    high: float | None = None  # and the 80th
    failed: str = ""  # why there is no value

    def of(self, metric: str, value: float | None, unit: str = "", **more: Any) -> Record:
        """Another number of the same facts."""
        return self._replace(metric=metric, value=value, unit=unit, **more)

    def __str__(self) -> str:
        if self.failed:
            return f"failed: {self.failed}"
        value, unit = (self.value / 2**20, "MiB") if self.unit == "B" else (self.value, self.unit)
        number = f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
        spread = f" ±{self.spread:.2g}" if self.spread is not None else ""
        goal = goals.goal_of(self)
        verdict = f" (goal {goal.text}{'' if goal.met(self.value) else ': MISSED'})" if goal else ""
        return f"{self.metric} {number}{spread}{' ' * bool(unit)}{unit}{verdict}"


class Results(NamedTuple):
    """What one run on one machine found."""

    machine: dict[str, str]
    records: list[Record]

    def where(self, **facts: Any) -> list[Record]:
        """The records that have these fields."""
        return [r for r in self.records if all(getattr(r, name) == wanted for name, wanted in facts.items())]

    def value(self, **facts: Any) -> float | None:
        """The value of the only record that has these fields; None where there is none."""
        found = self.where(**facts)
        if len(found) > 1:
            raise ValueError(f"{facts}: {len(found)} records have them, expected one")
        return found[0].value if found else None

    def add(self, rows: Iterable[list[Record]]) -> None:
        """Keep records, and print a line for each row: numbers of the same facts."""
        for row in rows:
            r = row[0]
            run = r.run and f"run {r.run}"
            rows = (r.prompt and f"{r.prompt} % prompt", r.pairs and f"{r.pairs} pairs")
            facts = (r.workload, r.states, r.shape, *rows, r.provider, r.backend, r.head, r.dtype, r.case, r.schedule)
            facts = (*facts, r.tile, run)
            words = (" x ".join(map(str, fact)) if isinstance(fact, tuple) else str(fact) for fact in facts if fact)
            print(f"  {', '.join(words)}: {'; '.join(map(str, row))}", flush=True)
            self.records.extend(row)

    def save(self, file: Path) -> None:
        """Write the file."""
        defaults = Record._field_defaults
        rows = ({k: v for k, v in r._asdict().items() if k not in defaults or v != defaults[k]} for r in self.records)
        records = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f'{{\n "machine": {json.dumps(self.machine)},\n "records": [\n{records}\n ]\n}}\n')


def read(file: Path) -> Results:
    """Read what `Results.save` wrote."""
    written = json.loads(file.read_text())
    rows = ({k: tuple(v) if isinstance(v, list) else v for k, v in row.items()} for row in written["records"])
    return Results(written["machine"], [Record(**row) for row in rows])


def add_out(parser: argparse.ArgumentParser) -> None:
    """The option ``--out``, which `begin` takes."""
    where = "the JSON file (default: named for benchmark and date, in ./bench/results where that is, else in .)"
    parser.add_argument("--out", type=Path, default=None, help=where)


def begin(out: Path | None, suite: str, machine: dict[str, str]) -> tuple[Results, Path]:
    """Results without records, and the file for them; both are printed."""
    file = out or (RESULTS if RESULTS.is_dir() else Path()) / f"{suite}-{machine['date']}.json"
    facts = " ".join(f"{key}={value}" for key, value in machine.items())
    print(f"{facts}\nresults go to {file}", flush=True)
    return Results(machine, []), file
