"""The backend fixture, and the run's last lines: which backends the numeric tests met here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # numerics.py, which --import-mode=importlib does not put there
pytest.register_assert_rewrite("numerics")

import numerics  # noqa: E402

from dpofast import _backend  # noqa: E402

KNOWN = ("cpu:avx512_bf16", "cpu:avx512", "cpu:avx2", "cpu:scalar", "torch")
PRESENT = ("torch", *(f"cpu:{isa}" for isa in _backend.cpu_isas()))
CPU = PRESENT[1:]

_RAN = pytest.StashKey[set]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RAN] = set()


@pytest.fixture(params=PRESENT)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend that this machine can run."""
    request.config.stash[_RAN].add(request.param)
    with numerics.threads(1 if request.param == "torch" else torch.get_num_threads()):
        yield request.param


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
