"""The loops over tiles: they make no buffer per tile, and ask a device nothing."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from numerics import EVERYTHING, STATISTICS, problem, run
from on_gpu import OnDevice
from watching import Watching

import dpofast
from dpofast.backends import cuda, registry
from dpofast.backends.base import InputGrads, OutputGrads, Problem, Saved
from dpofast.backends.tiled import TiledBackend
from dpofast.backends.torch import TorchPasses
from dpofast.plan import Schedule


@pytest.fixture(params=("torch", "cuda:emu"))
def passes(request):
    if request.param == "torch":
        return TorchPasses()
    return registry.added[request.getfixturevalue("emulator")].passes


@pytest.mark.parametrize("schedule", ("score", "jacobian", "cached", "mixed", "recompute", "recompute-split"))
def test_the_number_of_buffers_does_not_depend_on_the_number_of_tiles(passes, schedule):
    """In fp32; backend torch has its temporaries for each tile, which are few and counted by the planner."""
    n, h, v = 96, 16, 1024
    p = problem(n, h, v, masked=False)
    rows = torch.arange(n)

    def buffers(block: int) -> int:
        columns = {"cached": v, "mixed": 512}.get(schedule, 0)
        cache = torch.empty(n * ((columns if schedule != "jacobian" else h) + 1) * 4, dtype=torch.uint8)
        how = Schedule.of(schedule, (block, n if schedule != "recompute-split" else n // 2, cache.numel()))
        case, engine = Problem(p.hidden, p.weight, None, rows, p.labels), TiledBackend(passes)
        with Watching(size=n) as watching:
            saved = engine.forward(case, how, (), cache)
            if schedule != "score":
                grads = InputGrads(torch.empty(n, h), None if schedule == "jacobian" else torch.empty(v, h))
                engine.backward(case, how, Saved(**saved, cache=cache), OutputGrads(torch.ones(n)), grads)
        assert not watching.waits
        return watching.buffers

    few, many = buffers(512), buffers(128)
    if isinstance(passes, TorchPasses) and type(passes) is TorchPasses:
        assert many > few  # so that the count can see one
    else:
        assert many == few


class Aligned:
    """Passes that note operands and results of products whose rows do not begin 16 bytes apart."""

    def __init__(self, inner):
        self.inner, self.products, self.odd = inner, 0, []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def _look(self, *tensors):
        self.products += 1
        for x in tensors:
            rows = x.T if x.stride(0) == 1 else x
            if rows.shape[0] > 1 and rows.stride(0) * x.itemsize % 16:
                self.odd.append((tuple(x.shape), x.stride()))

    def product(self, a, b, out):
        self._look(a, b, out)
        self.inner.product(a, b, out)

    def accumulate(self, sums, a, b):
        self._look(sums, a, b)
        self.inner.accumulate(sums, a, b)


@pytest.mark.parametrize("schedule", ("score", "jacobian", "cached", "mixed", "recompute", "recompute-split"))
def test_rows_of_every_product_begin_16_bytes_apart(passes, schedule):
    """Of a vocabulary that is no multiple of anything: cuBLAS has slow kernels for rows that begin elsewhere."""
    n, h, v, block = 21, 16, 1003, 1003 if schedule != "mixed" else 504
    p, dtype = problem(n, h, v, torch.bfloat16, masked=False), passes.product_dtype(torch.bfloat16, torch.bfloat16)
    rows = {"cached": 1008, "mixed": 504}.get(schedule, 0) * dtype.itemsize or h * 4
    cache = torch.empty(n * (rows + 4), dtype=torch.uint8)
    how = Schedule.of(schedule, (block, n if schedule != "recompute-split" else 11, cache.numel()))
    looking = Aligned(passes)
    case, engine = Problem(p.hidden, p.weight, None, torch.arange(n), p.labels), TiledBackend(looking)
    saved = engine.forward(case, how, (), cache)
    if schedule != "score":
        d_weight = None if schedule == "jacobian" else torch.empty(v, h, dtype=torch.bfloat16)
        grads = InputGrads(torch.empty(n, h, dtype=torch.bfloat16), d_weight)
        engine.backward(case, how, Saved(**saved, cache=cache), OutputGrads(torch.ones(n)), grads)
    assert looking.products and not looking.odd


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("outputs", ((), ("entropy",)), ids=("logps", "statistics"))
def test_what_is_kept_is_outgrown_by_what_is_not(passes, outputs, dtype):
    """Exponentials of the first columns, of rows whose largest logits, 90 above, come behind them."""
    n, h, v, block = 24, 16, 384, 128
    p = problem(n, h, v, masked=False)
    hidden, weight = p.hidden.to(dtype), p.weight.to(dtype)
    hidden[:, 0], weight[:, 0] = torch.arange(n).remainder(2), 0.0  # every second row grows
    weight[block * 2 :, 0] = 90.0
    labels = torch.arange(n) * v // n
    columns = passes.product_dtype(dtype, dtype).itemsize * block * 2
    how = Schedule.of("mixed", (block, n, n * (columns + 4)))
    cache = torch.empty(how.cache_bytes, dtype=torch.uint8)
    case, engine = Problem(hidden, weight, None, torch.arange(n), labels), TiledBackend(passes)
    saved = engine.forward(case, how, outputs, cache)
    grads = InputGrads(torch.empty_like(hidden), torch.empty_like(weight))
    kept = Saved(saved["logps"], saved["lse"], cache=cache)
    engine.backward(case, how, kept, OutputGrads(torch.ones(n)), grads)
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    logps = (exact[0] @ exact[1].T).log_softmax(-1)[torch.arange(n), labels]
    torch.testing.assert_close(saved["logps"].double(), logps.detach(), rtol=1e-5, atol=1e-5)
    rounding = 1e-4 if dtype == torch.float32 else 2e-2
    for got, want in zip(grads, torch.autograd.grad(logps.sum(), exact)):
        got, want = got.double()[:, 1:], want[:, 1:]  # in the first column 90s cancel
        error = (got - want).norm(dim=1) / want.norm(dim=1).clamp(min=1e-2)
        assert error.max() < rounding


@pytest.mark.parametrize("current", (0, 1))
def test_a_launch_is_on_the_device_of_its_tensors(monkeypatch, current):
    """And on that device's current stream, whatever device is current."""
    seen, entered = [], []

    @contextlib.contextmanager
    def enter(device):
        entered.append(device.index)
        yield
        entered.append("left")

    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 700 + index, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", enter)
    library = SimpleNamespace(cuda_one=lambda args: seen.append((args, list(entered))))
    cuda.launch(library, "one", torch.device("cuda", 1), {"n": 3})
    assert seen == [({"n": 3, "stream": 701}, [] if current == 1 else [1])]
    cuda.launch(library, "one", torch.device("cpu"), {"n": 4})
    assert seen[1][0] == {"n": 4, "stream": None}


@pytest.mark.parametrize("budget", (1 << 30, 1 << 17))
def test_a_backend_behind_a_device_is_the_same_backend(budget):
    """What carries the numeric tests to a GPU, here with the CPU as the other device."""
    registry.added["torch:behind"] = OnDevice(TiledBackend(TorchPasses()), "cpu")
    registry.added["torch:direct"] = TiledBackend(TorchPasses())
    try:
        p = problem(90, 16, 700, entropy=False, **EVERYTHING)
        results = [
            run(dpofast.linear_logprob, p, outputs=STATISTICS, backend=name, memory_budget=budget)
            for name in ("torch:behind", "torch:direct")
        ]
        logits = torch.randn(9, 30)
        rows = [dpofast.logprob(logits, torch.arange(9), backend=n).logps for n in ("torch:behind", "torch:direct")]
        case, how = Problem(p.hidden, p.weight, None, torch.arange(90), p.labels), Schedule.of("score", (64, 0, 0))
        stats = [registry.added[n].fold(case, how, ()) for n in ("torch:behind", "torch:direct")]
    finally:
        del registry.added["torch:behind"], registry.added["torch:direct"]
    assert all(torch.equal(results[0][name], x) for name, x in results[1].items())
    assert torch.equal(*rows) and torch.equal(*stats)
