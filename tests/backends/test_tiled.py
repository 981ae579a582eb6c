"""The loops over tiles: they make no buffer per tile, and ask a device nothing."""

from __future__ import annotations

import pytest
import torch
from numerics import EVERYTHING, STATISTICS, problem, run
from on_gpu import OnDevice
from watching import Watching

import dpofast
from dpofast.backends import registry
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
