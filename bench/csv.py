"""Records as CSV, in the columns that the visualiser of Liger-Kernel's benchmarks reads.

    dpofast bench csv RECORD.json ... > all_benchmark_data.csv

Times are its metric "speed" in ms, peaks of memory its "memory" in MB; other metrics keep their names and units. x is
the number of tokens or of pairs, the vocabulary, or the share of the prompt; records that have none are left out, and
those that failed. Where it has 20 % and 80 % of the runs stand these, or quartiles, if the record has them. The name
of a provider says all that tells its records apart, since the visualiser draws one line a name.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from dpofast.bench.record import Record, Results, read

COLUMNS = (
    "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit", "x_name", "x_label",
    "x_value", "y_value_50", "y_value_20", "y_value_80", "extra_benchmark_config_str", "gpu_name", "timestamp",
    "liger_version",
)  # fmt: skip
NAMES = {"time": "speed", "peak memory": "memory"}
UNITS = {"s": ("ms", 1e3), "B": ("MB", 2**-20)}  # its MB are of 2**20 bytes, too


def x_of(r: Record) -> tuple[str, str, int] | None:
    """Name, label and value of what a record is plotted against."""
    if r.suite == "vocabulary":
        return "V", "vocabulary", r.shape[2]
    if r.pairs:
        return "B", "pairs", r.pairs
    if r.suite == "all":
        return "prompt", "share of the prompt, %", r.prompt
    if r.shape:
        return "N", "completion tokens", r.shape[0]
    share, _, what = r.case.partition(" % ")
    return ("prompt", "share of the prompt, %", int(share)) if what == "prompt" else None


def row(r: Record, machine: dict[str, str]) -> dict[str, object] | None:
    """A record's line; None where there is nothing to plot."""
    x = x_of(r)
    if x is None or r.value is None:
        return None
    unit, scale = UNITS.get(r.unit, (r.unit, 1))
    sizes = dict(zip("NHV", r.shape))
    facts = {k: v for k, v in r._asdict().items() if k in ("workload", "backend", "head", "dtype", "schedule") and v}
    case = "" if r.suite == "prompt" else r.case
    sizes = sizes if x[0] != "B" else sizes | {"N": r.shape[0] // r.pairs}  # of a pair
    fixed = " x ".join(f"{k} {v}" for k, v in sizes.items() if k != x[0])
    told = (r.provider, r.workload, r.states, fixed, r.backend, r.head, r.dtype, case, r.run and f"run {r.run}")
    tile = r.tile and " x ".join(map(str, r.tile))
    spread = r.spread or 0
    values = (r.value, *(y if y is not None else r.value + d for y, d in ((r.low, -spread), (r.high, spread))))
    forward = r.metric.startswith("forward")
    metric = r.metric.replace("forward", "time") if forward else r.metric
    cells = (
        r.suite, ", ".join(str(x) for x in (*told, r.schedule, tile) if x), "forward" if forward else "full",
        NAMES.get(metric, metric), unit,
        *x, *(y * scale for y in values), json.dumps(sizes | facts | {"case": r.case}), machine["device"],
        f"{machine['date']} 00:00:00", machine.get("liger-kernel", ""),
    )  # fmt: skip
    return dict(zip(COLUMNS, cells, strict=True))


def rows(results: Results) -> Iterator[dict[str, object]]:
    """The lines of all records that have something to plot."""
    return (found for r in results.records if (found := row(r, results.machine)))


def write(files: Iterable[Path], to: object = None) -> None:
    """CSV of these records; on standard output by default."""
    writer = csv.DictWriter(to or sys.stdout, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for file in files:
        writer.writerows(rows(read(file)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="RECORD.json", help="what a benchmark wrote")
    write(parser.parse_args().files)


if __name__ == "__main__":
    main()
