"""bench/gpu.sh rehearsed on the CPU: the day there is a GPU is not the day to find its mistakes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from emu import build

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"
needs_tools = pytest.mark.skipif(
    not build.compiler() or not shutil.which("timeout") or not shutil.which("bash"), reason="no compiler or no bash"
)


def run(out: Path, **environment: str) -> subprocess.CompletedProcess:
    command = ["bash", str(SCRIPT)]
    # On one thread: sizes are tiny, and beside other work threads that wait for each other take ten times as long.
    rehearsal = {"PYTHON": sys.executable, "OUT": str(out), "REHEARSE": "1", "OMP_NUM_THREADS": "1"}
    env = os.environ | rehearsal | environment
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)


@needs_tools
def test_every_step_runs_and_its_results_are_there(tmp_path):
    build.module()  # not in a step's time
    steps = "info smoke ratios gemm steps profile tests-cuda memcheck"  # each script once, with every kind of result
    done = run(tmp_path, STEPS=steps)
    assert done.returncode == 0, done.stdout + done.stderr
    report = (tmp_path / "gpu-report.txt").read_text()
    for step in steps.split():
        assert f"== {step}: ok" in report, report
    results = json.loads((tmp_path / "gpu-results.json").read_text())
    records = results["records"]
    # Peers may be missing.
    assert not [r for r in records if "failed" in r and r.get("provider", "dpofast") == "dpofast"]
    assert {r["suite"] for r in records} == {"gpu", "gemm", "steps", "host"}
    assert "cached" in {r.get("schedule") for r in records if r.get("workload") == "tiny"}
    assert {r["case"] for r in records if r["suite"] == "host"} >= {"forward", "forward + backward"}
    assert "products" in (tmp_path / "gpu-profile.txt").read_text()
    with tarfile.open(tmp_path / "gpu-logs.tar.gz") as logs:
        assert {f"./{step}.log" for step in steps.split()} <= set(logs.getnames())
    assert len(list(tmp_path.iterdir())) <= 8
    assert all(path.is_file() for path in tmp_path.iterdir())


@needs_tools
def test_a_step_that_there_is_not_is_refused(tmp_path):
    done = run(tmp_path, STEPS="info smok")
    assert done.returncode == 1
    assert "no step smok" in done.stderr


@needs_tools
def test_without_a_gpu_it_says_so(tmp_path):
    done = run(tmp_path, REHEARSE="", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "sees no CUDA GPU" in done.stderr
