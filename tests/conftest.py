"""The backend fixture, and the run's last lines: which backends the numeric tests met here."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton is imported, by whichever package comes first: its kernels are then interpreted.
    os.environ["TRITON_INTERPRET"] = "1"

# numerics.py, emu/ and others, which --import-mode=importlib does not put there; and the examples, which are tested
EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path += [str(Path(__file__).parent), str(EXAMPLES), str(EXAMPLES / "preference")]
pytest.register_assert_rewrite("numerics", "training")

import numerics  # noqa: E402
from emu import build  # noqa: E402
from on_gpu import OnDevice  # noqa: E402

from dpofast import native  # noqa: E402
from dpofast.backends import registry  # noqa: E402
from dpofast.backends.cuda import CudaPasses  # noqa: E402
from dpofast.backends.tiled import TiledBackend  # noqa: E402

EMULATOR = "cuda:emu"  # the CUDA kernels on the CPU: see emu/cuda_emu.h
ON_GPU = {"cuda:gpu": "cuda", "triton:gpu": "triton"}  # real kernels, see on_gpu.py
KNOWN = ("cpu:avx512_bf16", "cpu:avx512", "cpu:avx2", "cpu:neon", "cpu:scalar", "torch", EMULATOR, *ON_GPU)
CPU = tuple(f"cpu:{isa}" for isa in native.cpu_isas())
GPU = tuple(name for name, real in ON_GPU.items() if torch.cuda.is_available() and not registry.why_not(real, "cuda"))
PRESENT = ("torch", *CPU, *((EMULATOR,) if build.compiler() else ()), *GPU)
# A minute or more of one core, the longest first.
LONGEST = tuple(
    f"test_{name}.py" for name in ("sanitize", "primitive", "triton_aot", "gpu_script", "memory", "sharded", "triton")
)

_RAN = pytest.StashKey[set]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RAN] = set()
    workers = os.environ.get("PYTEST_XDIST_WORKER_COUNT")
    if workers:  # this process is one of them: they share the cores
        torch.set_num_threads(max(1, torch.get_num_threads() // int(workers)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes begin first, so that no process is left alone with one of them at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist: what it returns to the first one
        session.config.workeroutput["backends"] = sorted(session.config.stash[_RAN])


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, which need not be there
def pytest_testnodedown(node: object, error: object) -> None:
    node.config.stash[_RAN].update(getattr(node, "workeroutput", {}).get("backends", ()))  # nothing from a crashed one


@pytest.fixture(scope="session")
def emulator() -> str:
    """The backend whose kernels the emulator runs, compiled when a test first wants it."""
    # 8 blocks: few enough that ordinary tests meet one block a row, enough that a few long rows are split
    registry.added[EMULATOR] = TiledBackend(CudaPasses(build.module(), thread_blocks=8))
    return EMULATOR


@pytest.fixture(params=PRESENT)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend that this machine can run."""
    if request.param == EMULATOR:
        request.getfixturevalue("emulator")
    if request.param in GPU:
        registry.added[request.param] = OnDevice(registry.get(ON_GPU[request.param]), "cuda")
    request.config.stash[_RAN].add(request.param)
    with numerics.threads(torch.get_num_threads() if request.param in CPU else 1):
        yield request.param


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """For tiny models in whole trainers: products this small are slowest on several threads, and each trainer collects
    garbage, of all of torch."""
    gc.freeze()
    with numerics.threads(1):
        yield
    gc.unfreeze()


@pytest.fixture(params=CPU)
def cpu_backend(request: pytest.FixtureRequest) -> str:
    """Every instruction set of the compiled kernels that this machine has."""
    request.config.stash[_RAN].add(request.param)
    return request.param


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    ran = config.stash[_RAN]
    if not ran:
        return
    terminalreporter.section("backends")
    for name in KNOWN:
        state = "ran" if name in ran else "not run" if name in PRESENT else "not present on this machine"
        terminalreporter.write_line(f"{name:<16} {state}")
