"""The carrier of tests/on_gpu.py, which takes the numeric tests to a GPU, tried with the emulator in its place."""

from __future__ import annotations

import numerics
import pytest
import torch
from emu import build
from on_gpu import OnDevice
from torch import Tensor

import dpofast
from dpofast import reference
from dpofast.backends import registry
from dpofast.backends.cuda import CudaPasses
from dpofast.backends.tiled import TiledBackend

pytestmark = pytest.mark.skipif(not build.compiler(), reason="no C++ compiler")
CARRIED = "carried"


@pytest.fixture
def carried(monkeypatch):
    emulated = OnDevice(TiledBackend(CudaPasses(build.module(), thread_blocks=8)), "cpu")
    monkeypatch.setitem(registry.added, CARRIED, emulated)
    with numerics.threads(1):
        yield emulated


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


STRIDED = {
    "contiguous": lambda: randn(2, 9, 16),
    "transposed": lambda: randn(9, 2, 16).transpose(0, 1),
    "every second column": lambda: randn(2, 9, 32)[..., ::2],
    "expanded": lambda: randn(1, 9, 16).expand(2, 9, 16),
    "one row seen as many": lambda: randn(16).expand(2, 9, 16),
    "off any alignment": lambda: randn(2, 9, 19)[..., 1:17],
    "empty": lambda: randn(2, 0, 16),
}


@pytest.mark.parametrize("strides", STRIDED)
def test_a_tensor_keeps_its_strides_and_alignment(carried, strides):
    x = STRIDED[strides]()
    there = carried._there(x)
    assert torch.equal(there, x) and there.stride() == x.stride()
    assert not x.numel() or (there.data_ptr() != x.data_ptr() and there.data_ptr() % 16 == x.data_ptr() % 16)


def results(linear_logprob, hidden, weight, bias, labels, **options):
    """logps and entropy, and the gradients of a sum of both."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
    out = linear_logprob(*leaves[:2], labels, bias=leaves[2], outputs=("entropy",), **options)
    counted = labels != -100
    loss = (out.logps * torch.linspace(0.5, 1, out.logps.numel()).view_as(out.logps))[counted].sum()
    return out.logps[counted], out.entropy[counted], *torch.autograd.grad(loss + out.entropy[counted].sum(), leaves)


@pytest.mark.parametrize("budget", ("1GiB", "40KiB"))
@pytest.mark.parametrize("strides", ("transposed", "every second column", "expanded", "one row seen as many"))
def test_hidden_of_any_strides_bias_and_entropy(carried, strides, budget):
    hidden, weight, bias = STRIDED[strides](), randn(301, 16, seed=1), randn(301, seed=2)
    labels = torch.arange(18).view(2, 9)
    labels[0, :4] = -100
    got = results(dpofast.linear_logprob, hidden, weight, bias, labels, backend=CARRIED, memory_budget=budget)
    want = results(reference.linear_logprob, hidden, weight, bias, labels)
    for x, y in zip(got, want):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_logits_off_any_alignment(carried):
    logits = randn(7, 304)[:, 1:-2].requires_grad_()
    labels = torch.arange(7)
    got = dpofast.logprob(logits, labels, backend=CARRIED).logps
    want = logits.log_softmax(-1)[labels, labels]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), logits)[0] for x in (got, want)))


def test_a_slice_of_the_vocabulary(carried):
    hidden, weight, labels = randn(5, 16), randn(301, 16, seed=1), torch.arange(5)
    whole = dpofast.linear_logprob(hidden, weight, labels, backend=CARRIED, ignore_index=None).logps
    torch.testing.assert_close(whole, (hidden @ weight.T).log_softmax(-1)[labels, labels])
