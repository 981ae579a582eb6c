"""Pages that are kept between calls: what the system may refuse."""

from __future__ import annotations

import mmap

import pytest
import torch
from numerics import problem, run

import dpofast


@pytest.mark.skipif(not hasattr(mmap.mmap, "madvise"), reason="no advice on this system")
def test_a_system_that_takes_no_advice_gives_pages_all_the_same(cpu_backend, monkeypatch):
    """As gVisor and some WSL kernels, which know no huge pages. The cache and the gradient are over a MiB here."""
    p = problem(70, 64, 5000)
    want = run(dpofast.linear_logprob, p, backend=cpu_backend)
    refused = []

    class Refusing(mmap.mmap):
        def madvise(self, *advice):
            refused.append(advice)
            raise OSError(22, "Invalid argument")

    dpofast.empty_cache()
    monkeypatch.setattr(mmap, "mmap", Refusing)
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 14, raising=False)
    try:
        got = run(dpofast.linear_logprob, p, backend=cpu_backend)
    finally:
        dpofast.empty_cache()
    assert len(refused) >= 2  # workspaces of more than a MiB ask for it, too
    assert all(torch.equal(got[name], x) for name, x in want.items())
