"""The C++ core under AddressSanitizer and UBSan: the kernels' own tests, once per instruction set."""

import os
import subprocess
from pathlib import Path

import pytest

from dpofast import _C

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def program():
    """Build tests/sanitize/test_kernels.cpp and csrc/cpu/ with the sanitizers, outside any calling make."""
    target = "build/sanitize/test_kernels"
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS")}
    command = ["make", f"-j{os.environ.get('MAX_JOBS') or os.cpu_count()}", target]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / target


@pytest.mark.parametrize("isa", _C.cpu_isas())
def test_kernels_are_clean_under_sanitizers(program, isa):
    done = subprocess.run([program, isa], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "ok"
