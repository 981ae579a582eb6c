"""What vocabulary-parallel heads ask of a backend, in one process: statistics of slices, and gradients of slices."""

from __future__ import annotations

import itertools

import pytest
import torch

from dpofast import distributed, reference
from dpofast.backends import registry
from dpofast.backends.base import InputGrads, OutputGrads, Problem, Saved, Transform
from dpofast.backends.torch import TorchPasses
from dpofast.contract import STATISTICS
from dpofast.plan import Request, choose

N, H, V = 21, 40, 331
TRANSFORM = Transform(0.8, 1.2, 7.0)


@pytest.fixture
def problem():
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(N, H), torch.randn(V, H), torch.randn(V)
    labels = torch.randint(0, V, (N,))
    labels[:4] = torch.tensor([0, V - 1, 100, 99])
    hidden[4] *= 40  # a row with one label that has all the probability
    labels[4] = (hidden[4] @ weight.T).argmax()
    labels[6:8] = torch.tensor([20, 250])  # equally likely, and more than all others: the first of them is top 1
    weight[250], bias[labels[6:8]] = weight[20], 0
    hidden[6:8] = 0.4 * weight[20]
    return hidden, weight, bias, labels


DIVISIONS = pytest.mark.parametrize("bounds", ([0, 100, V], [0, 1, 2, V - 1, V], [0, V]))


@DIVISIONS
@pytest.mark.parametrize("outputs", ((), STATISTICS))
def test_slices_fold_and_differentiate_to_the_whole(backend, problem, bounds, outputs):
    check_slices(backend, problem, bounds, outputs)


@DIVISIONS
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's kernels are not interpreted here")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of values that where() throws away
def test_slices_of_triton(problem, bounds, monkeypatch):
    triton = pytest.importorskip("dpofast.backends.triton", exc_type=ImportError)
    monkeypatch.setitem(registry.added, "triton:here", triton.TritonBackend(triton.TritonPasses(thread_blocks=6)))
    check_slices("triton:here", problem, bounds, STATISTICS)


def check_slices(backend, problem, bounds, outputs):
    hidden, weight, bias, labels = problem
    engine = registry.get(backend)
    rows, ends = torch.arange(N), torch.tensor(bounds)
    incoming = OutputGrads(torch.randn(N), torch.randn(N) if outputs else None)

    exact = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    want = reference.linear_logprob(
        exact[0], exact[1], labels, bias=exact[2], outputs=STATISTICS, **TRANSFORM._asdict()
    )
    loss = (want.logps * incoming[0]).sum() + ((want.entropy * incoming[1]).sum() if outputs else 0)
    d_hidden, d_weight, d_bias = torch.autograd.grad(loss, exact)

    def choice(size: int):
        sizes = N, H, size, hidden.dtype, weight.dtype
        return choose(Request(*sizes, budget=1 << 20, outputs=5, entropy=True, keeps=False), backend)

    def parts():
        for a, b in itertools.pairwise(bounds):
            local = distributed._local(labels, a, b - a)
            yield slice(a, b), Problem(hidden, weight[a:b], bias[a:b], rows, local, TRANSFORM), choice(b - a)

    stats = torch.stack([engine.fold(case, how, outputs) for _, case, how in parts()])
    owner = torch.searchsorted(ends[1:], labels, right=True)
    results = TorchPasses().finish(distributed._merge(stats, owner), labels, V, outputs)
    # Where BLAS picks a kernel by the shape, two equal logits of two slices may differ in their last bit.
    ties = slice(6, 8 if backend.endswith(":gpu") else 6)
    for name in ("logps", *outputs):
        if name == "is_top1":
            results[name][ties] = getattr(want, name)[ties]
        torch.testing.assert_close(results[name].double(), getattr(want, name).double(), rtol=2e-5, atol=2e-5)
    if outputs:
        assert results["is_top1"][6] and not results["is_top1"][7]
    assert results["logps"][4] < 0 or want.logps[4] == 0  # not rounded away

    saved = Saved(
        **{name: results[name].float() for name in ("logps", "lse", *(("entropy",) if outputs else ()))},
        cache=engine.cache(0, hidden.device),
    )
    sums = torch.zeros(N, H)
    for part, case, how in parts():
        grads = InputGrads(torch.zeros(N, H), torch.empty_like(weight[part]), torch.empty_like(bias[part]))
        engine.backward(case, how, saved, incoming, grads)
        sums += grads.hidden
        torch.testing.assert_close(grads.weight.double(), d_weight[part], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(grads.bias.double(), d_bias[part], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums.double(), d_hidden, rtol=1e-4, atol=1e-4)


def test_a_backend_writes_d_hidden_in_the_dtype_it_is_given(backend):
    """So that the shares of a 16-bit gradient are added up before they are rounded."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, H).bfloat16(), torch.randn(V, H).bfloat16()
    labels, rows = torch.randint(0, V, (N,)), torch.arange(N)
    engine, case = registry.get(backend), Problem(hidden, weight, None, rows, labels)
    how = choose(Request(N, H, V, hidden.dtype, weight.dtype, 1 << 20, to_weight=False, keeps=False), backend)
    cache = engine.cache(0, hidden.device)
    saved = Saved(**engine.forward(case, how, (), cache), cache=cache)
    wide, narrow = torch.zeros(N, H), torch.zeros(N, H, dtype=torch.bfloat16)
    for out in (wide, narrow):
        engine.backward(case, how, saved, OutputGrads(torch.ones(N)), InputGrads(out))
    assert torch.equal(wide.bfloat16(), narrow) and not torch.equal(wide, narrow.float())


def test_the_largest_entry_of_a_slice_is_exact(backend):
    """The CPU's running m may stay up to 8 below the largest z; a second largest label must not pass for the first."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, H) / 4, torch.randn(V, H)
    largest = (hidden @ weight.T).topk(2).indices
    engine = registry.get(backend)
    request = Request(N, H, V, hidden.dtype, weight.dtype, 1 << 20, False, False, outputs=2, keeps=False)
    how = choose(request, backend)._replace(block=2)
    for place, labels in enumerate(largest.T.contiguous()):
        stats = engine.fold(Problem(hidden, weight, None, torch.arange(N), labels), how, ("is_top1",))
        merged = distributed._merge(stats.unsqueeze(0), torch.zeros_like(labels))
        top = TorchPasses().finish(merged, labels, V, ("is_top1",))["is_top1"]
        assert top.all() if place == 0 else not top.any()
