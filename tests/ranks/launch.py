"""Several processes through ``torchrun``, as a user starts them: how a test runs a script on every rank, and how a
script runs its cases.

A script ends with ``launch.main(CASES)``, a mapping of names to functions without arguments. Every rank runs them in
order. The first that fails on any rank ends them all, since the others may be inside a collective by then.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

HERE = Path(__file__).parent
HANG = 60  # seconds after which a collective, and so a test, has hung


def torchrun(script: str, n: int, cwd: Path, *arguments: str, timeout: float = 240) -> set[str]:
    """Run a ``script`` of this folder on ``n`` ranks, in ``cwd``: the cases that passed everywhere.

    Raises if one failed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    command += [str(HERE / script), *arguments]
    folders = os.environ.get("PYTHONPATH"), str(HERE.parent), str(HERE.parents[1] / "examples")
    path = os.pathsep.join(filter(None, folders))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise AssertionError(f"{script} on {n} ranks:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}")
    return {line.removeprefix("passed ") for line in done.stdout.splitlines() if line.startswith("passed ")}


def main(cases: Mapping[str, Callable[[], None]]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=HANG))
    for name in sys.argv[1:] or cases:
        torch.manual_seed(0)
        cases[name]()
        dist.barrier()
        if dist.get_rank() == 0:
            print("passed", name, flush=True)
    dist.destroy_process_group()
