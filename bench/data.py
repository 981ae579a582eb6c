"""How much memory reading preference data takes: a file of JSON lines, streamed, and picked from in a random order.

    dpofast bench data --gigabytes 5 --scratch /tmp    some minutes; the file is written there, and removed at the end

Each number is the largest resident memory (VmHWM, on Linux) of a Python of its own, PyTorch included, which dpofast
imports.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from dpofast.bench import record
from dpofast.bench.measure import machine
from dpofast.bench.record import Record

LETTERS = 5_000  # of a line, half of them in the prompt
WAYS = {
    "import dpofast.data": "",
    "all records in their order": "assert sum(1 for _ in data.read(path)) == lines",
    "20,000 in a random order": """
picked = {found.where for found in itertools.islice(data.shuffle(data.read(path)), 20_000)}
assert len(picked) == min(20_000, lines)
""",
}
PROGRAM = """
import itertools, sys
from pathlib import Path
from dpofast import data
path, lines = sys.argv[1], int(sys.argv[2])
{}
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""


def write(path: Path, size: int) -> int:
    """Write at least ``size`` bytes of pairs, no two lines the same; returns how many lines there are."""
    lines = 0
    with path.open("w") as file:
        while file.tell() < size:
            pair = {"prompt": f"{lines} " + "p" * (LETTERS // 2), "chosen": "c" * (LETTERS // 4)}
            file.write(json.dumps(pair | {"rejected": "r" * (LETTERS // 4)}) + "\n")
            lines += 1
    return lines


def peak(way: str, path: Path, lines: int) -> int:
    """Bytes of a process at its largest."""
    command = [sys.executable, "-P", "-c", PROGRAM.format(WAYS[way]), str(path), str(lines)]
    return 1024 * int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=5.0, help="size of the file (default 5)")
    parser.add_argument("--scratch", type=Path, default=None, help="where the file may lie for a while")
    record.add_out(parser)
    args = parser.parse_args()
    results, out = record.begin(args.out, "data", machine())
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        path = Path(folder, "pairs.jsonl")
        lines = write(path, int(args.gigabytes * 1e9))
        facts = Record("data", workload=f"{path.stat().st_size / 1e9:.3g} GB, {lines:,} lines")
        results.add([facts.of("resident memory", peak(way, path, lines), "B", case=way)] for way in WAYS)
    results.save(out)


if __name__ == "__main__":
    main()
