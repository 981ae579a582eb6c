"""The CUDA kernels on the emulator, under AddressSanitizer and UBSan, and the emulator's own word for what it catches.

The numeric tests of the package meet the same kernels as backend "cuda:emu", without sanitizers.
"""

from __future__ import annotations

import subprocess

import numerics
import pytest
import torch
from emu import build

import dpofast
from dpofast.backends import registry

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")

# what is planted, and the word for it; None: the program itself sees it in the results
PLANTED = {
    "race": None,
    "uninitialised": None,
    "left by another block": None,
    "exit before a barrier": "threads wait for one that has exited",
    "exit before a shuffle": "threads wait for one that has exited",
    "two barriers": "threads wait at different barriers",
    "a barrier and a shuffle": "threads wait for one that has exited",
    "part of a warp": "a shuffle of part of a warp",
    "out of bounds": "heap-buffer-overflow",
    "out of shared bounds": "use-after-poison",
    "too much shared memory": "more shared memory than a kernel may declare",
    "misaligned": "misaligned address",
}


@pytest.fixture(scope="module")
def program():
    return build.program()


def _run(program, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=600, check=False)


def test_kernels_agree_with_double_arithmetic_in_any_order_of_threads(program):
    done = _run(program, "kernels")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "ok"


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_caught(program, name):
    done = _run(program, "planted", name)
    if PLANTED[name] is None:
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == "caught", done.stdout + done.stderr
    else:
        assert done.returncode != 0 and PLANTED[name] in done.stderr, done.stdout + done.stderr


class _Recording:
    """A library of launchers that remembers into how many parts each call cut its rows."""

    def __init__(self, library):
        self.library, self.splits = library, []

    def __getattr__(self, name):
        def launch(args):
            self.splits.append(args.get("splits", 1))
            getattr(self.library, name)(args)

        return launch


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=("fp64", "bf16"))
def test_few_long_rows_are_split_and_merged(emulator, monkeypatch, dtype):
    """The driver's part of it: how rows are cut, and the partials it allocates."""
    passes = registry.added[emulator].passes
    recording = _Recording(passes._library)
    monkeypatch.setattr(passes, "_library", recording)
    # not fp32: the limit would be one of torch.mm, whose sums over 9001 terms are longer than plain PyTorch's
    p = numerics.problem(7, 16, 9001, dtype, entropy=True, **numerics.EVERYTHING)
    got = numerics.run(dpofast.linear_logprob, p, backend=emulator)
    assert max(recording.splits) > 1
    numerics.assert_as_good_as_plain(p, got)


def test_the_bits_do_not_depend_on_the_order_of_threads_and_blocks(emulator):
    p = numerics.problem(20, 16, 1201, torch.bfloat16, entropy=True, **numerics.EVERYTHING)
    library = registry.added[emulator].passes._library
    results = []
    try:
        for seed in (1, 2, 3):
            library.set_seed(seed)
            results.append(numerics.run(dpofast.linear_logprob, p, backend=emulator))
    finally:
        library.set_seed(1)
    for again in results[1:]:
        for name, x in results[0].items():
            assert torch.equal(again[name], x), name
