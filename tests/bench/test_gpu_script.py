"""bench/gpu.sh rehearsed on the CPU: the day there is a GPU is not the day to find its mistakes."""

from __future__ import annotations

import hashlib
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


# ---- Beside a GPU that is not there ----

NVIDIA_SMI = """#!/bin/sh
case "$*" in
  *name*) echo "NVIDIA H100 80GB HBM3, 580.00, 9.0, 1980 MHz, 700.00 W" ;;
  *) echo 9.0 ;;
esac
"""
SANITIZER = """#!/bin/sh
[ "$1" = --help ] && { echo "  --kernel-regex arg"; exit; }
echo "sanitizer $*" >> "$CALLS"
while [ "${1#*python}" = "$1" ]; do shift; done
exec "$@"
"""
PYTHON = """#!/bin/sh
case "$*" in
  *cuda.is_available* | *"import pybind11"*) exit 0 ;;
  *"pip install"*)
    echo "build for $TORCH_CUDA_ARCH_LIST" >> "$CALLS"
    [ -n "$BUILDS" ] || { echo "nvcc fatal: there is no compiler"; exit 1; }
    while [ "$1" != --target ]; do shift; done
    cp -r "$BUILDS" "$2"; exit ;;
esac
exec {python} "$@"
"""
STAND_IN = """
import json, os, pathlib, sys, tarfile
name = pathlib.Path(__file__).stem
with open(os.environ["CALLS"], "a") as calls:
    print(name, *sys.argv[1:], file=calls)
out = pathlib.Path(os.environ["OUT"])
done = tarfile.open(out / "gpu-logs.tar.gz").getnames() if (out / "gpu-logs.tar.gz").exists() else []
print("before this one:", *sorted(x for x in done if x.endswith(".done")))
if "--out" in sys.argv:
    to = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
    text = {"machine": {"device": "none"}, "records": [{"suite": name}]}
    to.write_text(json.dumps(text) if to.suffix == ".json" else "products")
sys.exit(name == os.environ.get("FAILS"))
"""
WITHOUT_TESTS = "info smoke ratios gemm steps profile peers triton memcheck racecheck bench"


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def stand_in_site(site: Path) -> Path:
    """A package that says it has the CUDA kernels, whose benchmarks note that they were called."""
    modules = ("smoke", "gemm", "steps", "profile", "kernels")
    for module in ("env_info", "bench/gpu", *(f"bench/gpu_{name}" for name in modules)):
        executable(site / "dpofast" / f"{module}.py", STAND_IN)
    (site / "dpofast" / "__init__.py").touch()
    (site / "dpofast" / "bench" / "__init__.py").touch()
    (site / "dpofast" / "_C.py").write_text("cuda_logprob_fold = None\n")
    return site


def beside_a_gpu(tree: Path, **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """The script in a checkout of its own, which has C++ sources and nothing else; and what was called."""
    executable(tree / "bench" / "gpu.sh", SCRIPT.read_text())
    (tree / "csrc").mkdir(exist_ok=True)
    (tree / "csrc" / "one.cpp").write_text("int one;\n")
    (tree / "setup.py").touch()
    executable(tree / "bin" / "nvidia-smi", NVIDIA_SMI)
    executable(tree / "bin" / "compute-sanitizer", SANITIZER)
    python = executable(tree / "bin" / "python", PYTHON.replace("{python}", sys.executable))
    calls, out = tree / "calls", tree / "out"
    calls.write_text("")
    env = {name: value for name, value in os.environ.items() if name not in ("REHEARSE", "TORCH_CUDA_ARCH_LIST")}
    env |= {"PATH": f"{tree / 'bin'}:{env['PATH']}", "PYTHON": str(python), "OUT": str(out), "CALLS": str(calls)}
    command = ["bash", str(tree / "bench" / "gpu.sh")]
    done = subprocess.run(command, env=env | environment, capture_output=True, text=True, timeout=120, check=False)
    return done, calls.read_text().splitlines()


@needs_tools
def test_a_build_that_fails_ends_it_at_once(tmp_path):
    done, calls = beside_a_gpu(tmp_path, BUILDS="")
    assert done.returncode == 1 and calls == ["build for 9.0"], done.stdout + done.stderr
    report = (tmp_path / "out" / "gpu-report.txt").read_text()
    assert "NVIDIA H100" in report and "site: the build FAILED" in report and "there is no compiler" in report


@needs_tools
def test_the_whole_script_leaves_what_it_has_after_every_step(tmp_path):
    """Built, for no site was brought along; one step fails, and those behind it run."""
    built = stand_in_site(tmp_path / "built")
    done, calls = beside_a_gpu(tmp_path, BUILDS=str(built), STEPS=WITHOUT_TESTS, FAILS="gpu_gemm")
    report = (tmp_path / "out" / "gpu-report.txt").read_text()
    assert done.returncode == 0 and "site: built" in report, done.stdout + done.stderr
    steps = ["info", "smoke", "ratios", "steps", "profile", "peers", "triton", "triton.ratios", "memcheck", "racecheck"]
    for name in (*steps, "bench"):
        assert f"== {name}: ok" in report, report
    assert "== gemm: FAILED, exit 1" in report
    began = [line for line in report.splitlines() if line.startswith("before this one:")]
    for i, line in enumerate(began):  # each begins when the results of those before it are there
        before = [f"./{name}.done" for name in (*steps, "bench")[: i if i < 4 else i - 1]]
        assert line.split()[3:] == sorted(before), (i, line)
    assert len(began) == len(steps) + 2
    tools = [line.split()[2] for line in calls if line.startswith("sanitizer")]
    assert tools == ["memcheck", "racecheck"] and all("--kernel-regex kns=logprob" in c for c in calls if "--tool" in c)
    records = json.loads((tmp_path / "out" / "gpu-results.json").read_text())["records"]
    assert [r["suite"] for r in records] == ["gpu", "gpu_gemm", "gpu", "gpu", "gpu_steps", "gpu"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "gpu-report.txt", "gpu-results.json", "gpu-profile.txt", "gpu-logs.tar.gz",
    }  # fmt: skip
    again, calls = beside_a_gpu(tmp_path, BUILDS="", BUDGET="5")
    assert not calls and "site: build/gpu/site" in again.stdout
    for name in (*steps, "bench"):
        assert f"== {name}: done before" in again.stdout, again.stdout
    assert "== gemm: no time left" in again.stdout and again.returncode == 0


@needs_tools
@pytest.mark.parametrize("of", ("these sources", "other sources"))
def test_a_site_that_was_brought_along_is_taken_if_it_is_of_these_sources(tmp_path, of):
    site = stand_in_site(tmp_path / ".gpu" / "site")
    beside_a_gpu(tmp_path, BUILDS="", STEPS="no such step")  # which writes the sources
    digest = hashlib.sha256((tmp_path / "csrc" / "one.cpp").read_bytes()).hexdigest()
    (site / "sources.sha256").write_text(digest if of == "these sources" else "0" * 64)
    done, calls = beside_a_gpu(tmp_path, BUILDS=str(stand_in_site(tmp_path / "built")), STEPS="info")
    assert done.returncode == 0 and [c.split()[0] for c in calls][-1] == "env_info", done.stdout + done.stderr
    assert ("build for 9.0" in calls) == (of == "other sources")
    assert ("is of other C++ and CUDA sources" in done.stdout) == (of == "other sources")
