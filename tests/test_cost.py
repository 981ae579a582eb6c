"""The cost model of schedules over tiles: its bytes are those that the schedules really ask for."""

from __future__ import annotations

import numerics
import pytest
import torch
from emu import build
from numerics import SCHEDULES, problem, recorded_choices

import dpofast
from dpofast import _backend
from dpofast.backends.tiled import TiledBackend
from dpofast.backends.torch import TorchPasses
from dpofast.plan import Request, cached_columns, cost
from dpofast.plan.tiled import tiled_traits


class Counting:
    """Passes that add up the bytes of what they are handed: each operand and each result, in full."""

    def __init__(self, inner):
        self.inner, self.bytes, self.launches = inner, 0, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def _count(self, *tensors):
        self.launches += 1
        self.bytes += sum(t.numel() * t.element_size() for t in tensors)

    def product(self, a, b, out):
        self._count(a, b, out)
        self.inner.product(a, b, out)

    def accumulate(self, sums, a, b):
        self._count(a, b, sums, sums)
        self.inner.accumulate(sums, a, b)

    def fold(self, tile, stats, outputs, exps):
        self._count(tile.x, *(() if exps is None else (exps.tile(tile.v0, tile.v0 + tile.x.shape[1]),)))
        self.inner.fold(tile, stats, outputs, exps)

    def finish(self, *args):
        self._count()
        return self.inner.finish(*args)

    def seal(self, *args):
        self._count()
        self.inner.seal(*args)

    def grad(self, tile, *args):
        self._count(tile.x, args[-1])
        self.inner.grad(tile, *args)


DTYPES = {"torch": torch.float32, "cuda:emu": torch.bfloat16}


@pytest.fixture(params=DTYPES)
def counting(request):
    if request.param == "torch":
        passes = TorchPasses()
    elif build.compiler():
        passes = _backend.added[request.getfixturevalue("emulator")].passes
    else:
        pytest.skip("no compiler for the emulator")
    _backend.added["counting"] = TiledBackend(Counting(passes))
    yield _backend.added["counting"].passes, DTYPES[request.param]
    del _backend.added["counting"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_predicted_bytes_are_those_that_the_schedule_moves(counting, schedule):
    passes, dtype = counting
    n, h, v = 150, 40, 1001
    p = problem(n, h, v, dtype)
    how = numerics.forced(schedule, p, "counting", outputs=())
    with recorded_choices() as ran:
        numerics.run(dpofast.linear_logprob, p, backend="counting", outputs=(), **how)
    traits = tiled_traits("counting", dtype, dtype)
    wanted = ("hidden" in how["train"], "weight" in how["train"])
    columns, _ = cached_columns(ran[0], n, v, traits.elem)
    moved = cost.traffic(ran[0], columns, Request(n, h, v, dtype, dtype, 1 << 30, *wanted), traits)
    assert (moved.total, moved.launches) == (passes.bytes, passes.launches), ran[0]


def test_a_device_that_is_not_here_is_planned_for():
    args = (8192, 4096, 151936, "bf16")
    plans = {name: dpofast.plan(*args, device=name, memory_budget="4GiB") for name in cost.DEVICES}
    for name, p in plans.items():
        assert p.backend == f"cuda on {name}" and p.schedule == "cached" and p.gemms == 3
        assert p.floor_seconds < p.predicted_seconds < 2 * p.floor_seconds
        assert p.token_chunk * p.block * 4 <= cost.DEVICES[name].l2_bytes // 2
        assert "from the data sheet" in str(p)
    assert plans["h200"].predicted_seconds < plans["h100"].predicted_seconds < plans["a100"].predicted_seconds
    assert round(plans["h100"].floor_seconds * 1e3) == 42  # what the efficiency is from: TRL's issue 7244


@pytest.mark.parametrize(
    ("budget", "train_head", "schedule"),
    [("4GiB", True, "cached"), ("1GiB", True, "mixed"), ("512MiB", True, "recompute"), ("1GiB", False, "jacobian")],
)
def test_schedules_on_a_gpu(budget, train_head, schedule):
    p = dpofast.plan(8192, 4096, 151936, "bf16", device="h100", memory_budget=budget, train_head=train_head)
    assert p.schedule == schedule and p.cache_bytes + p.workspace_bytes <= p.memory_budget


@pytest.mark.parametrize(("device", "backend"), [("h900", "auto"), ("h100", "cpu")])
def test_a_device_that_is_unknown_or_of_another_backend_is_refused(device, backend):
    with pytest.raises(ValueError, match=f"device: got '{device}' with backend='{backend}', expected one of a100"):
        dpofast.plan(8, 8, 8, device=device, backend=backend)
