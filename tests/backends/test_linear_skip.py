"""Gradients of the tiles that matter (linear_skip) against fp64: in Triton's interpreter, or on a Hopper GPU.

The interpreter has no bf16 products: operands are fp16 there.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

import triton
from dpofast.kernels import linear_keep
from dpofast.kernels import linear_skip as kernels
from torch import Tensor
from watching import Watching

import dpofast
from dpofast import primitive
from dpofast.backends import registry
from dpofast.backends.base import InputGrads, OutputGrads, Problem, Saved, Transform
from dpofast.backends.gpu import GpuPasses
from dpofast.backends.tiled import Kept, TiledBackend
from dpofast.grad_filter import TOLERANCE, square_budget
from dpofast.plan import Request, Schedule, cost
from dpofast.plan import tiled as planner

if linear_keep.TensorDescriptor is None:
    pytest.skip("this Triton has no tensor descriptors", allow_module_level=True)
INTERPRETED = triton.knobs.runtime.interpret
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
if not INTERPRETED and not linear_keep.supported(DEVICE, torch.bfloat16, 64):
    pytest.skip("needs a GPU of compute capability 9", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16
ROUNDING = torch.finfo(DTYPE).eps
ROWS, WIDTH = kernels.ROWS, kernels.WIDTH
CUT = 2.0**-4


class Case(NamedTuple):
    hidden: Tensor  # [1, n + 3, H]
    weight: Tensor
    positions: Tensor
    labels: Tensor
    transform: Transform = Transform(1.1, 1.2)

    @property
    def scale(self) -> float:
        return self.transform.logit_scale / self.transform.temperature

    @property
    def tokens(self) -> Tensor:
        return self.hidden[0, self.positions]


def case(n: int = 300, h: int = 24, v: int = 1100, seed: int = 0) -> Case:
    """Two kinds of tokens, one behind the other, each with a vocabulary of its own: few tiles matter to both."""
    make = torch.Generator().manual_seed(seed)
    kind = torch.arange(n + 3) * 2 // (n + 3)
    hidden = 0.1 * torch.randn(n + 3, h, generator=make)
    hidden[:, 0], hidden[:, 1] = 3.0 * (kind == 0), 3.0 * (kind == 1)
    weight = torch.randn(v, h, generator=make) * h**-0.5
    weight[:, :2] = -0.4  # fp16, which is all that the interpreter multiplies, cannot hold more
    words = torch.randperm(v, generator=make)[: 2 * (v // 8)].view(2, -1)
    for i, mine in enumerate(words):
        weight[mine, i] = 1.0
    positions = torch.randperm(n + 3, generator=make)[:n].sort().values
    labels = words[kind[positions], torch.randint(0, v // 8, (n,), generator=make)]
    labels[::50] = torch.randint(0, v, (len(labels[::50]),), generator=make)
    hidden, weight = (x.to(DEVICE, DTYPE) for x in (hidden, weight))
    return Case(hidden.unsqueeze(0), weight, positions.to(DEVICE), labels.to(DEVICE))


class Result(NamedTuple):
    values: dict[str, Tensor]
    hidden: Tensor  # gradients
    weight: Tensor | None
    kept: Kept

    @property
    def dropped(self) -> Tensor:
        return self.values["dropped_mass"].double()


def schedule_of(n: int, h: int, v: int, to_weight: bool = True) -> Schedule:
    request = Request(n, h, v, DTYPE, DTYPE, 1 << 30, True, to_weight, fuses=True, filters=True)
    traits = planner.tiled_traits("triton", DTYPE, DTYPE)
    found = planner.candidates(request, traits, cost.DEVICES["h100"])
    return next(c.schedule for c in found if c.schedule.filters)


def run(p: Case, cut: float = CUT, c: Tensor | None = None, to_weight: bool = True) -> Result:
    """Forward and backward of a call whose schedule filters; nothing may be left of what the cache held before."""
    n, (v, h) = len(p.labels), p.weight.shape
    schedule = schedule_of(n, h, v, to_weight)
    problem = Problem(p.hidden, p.weight, None, p.positions, p.labels, p.transform, cut)
    engine = TiledBackend(GpuPasses(thread_blocks=4))
    cache = torch.full((schedule.cache_bytes,), 255, dtype=torch.uint8, device=DEVICE)
    values = engine.forward(problem, schedule, (), cache)
    saved = Saved(values["logps"], values["lse"], cache=cache)
    grads = InputGrads(torch.zeros_like(p.hidden), torch.full_like(p.weight, math.nan) if to_weight else None)
    c = torch.ones(n, device=DEVICE) if c is None else c
    engine.backward(problem, schedule, saved, OutputGrads(c), grads)
    return Result(values, grads.hidden, grads.weight, Kept.within(cache, n, p.weight))


class Definition(NamedTuple):
    logps: Tensor
    dropped: Tensor
    hidden: Tensor
    weight: Tensor
    matters: Tensor  # [tiles of tokens, tiles of the vocabulary]


def definition(p: Case, order: Tensor, cut: float, c: Tensor) -> Definition:
    """In fp64, with the vocabulary in an order; which tiles matter is decided here."""
    h, w = p.tokens.double(), p.weight.double()
    n, v, tiles = len(h), len(w), -(-len(w) // WIDTH)
    rows = torch.arange(n, device=DEVICE)
    probs = (p.scale * h @ w.T).softmax(1)
    is_label = torch.zeros_like(probs).scatter_(1, p.labels.unsqueeze(1), 1.0)

    def of_tiles(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x[:, order], (0, tiles * WIDTH - v)).view(n, tiles, WIDTH).sum(2)

    mass = of_tiles(probs * (1 - is_label))
    share = mass / mass.sum(1, keepdim=True)
    budget = square_budget(cut, tiles)
    levels = torch.tensor([(budget * 2.0**-k) ** 0.5 for k in range(16)], device=DEVICE)[:, None, None]
    stays = (share.square() * (share <= levels)).sum(2) <= budget
    threshold = (levels.squeeze(2) * stays).amax(0)
    own = (share > threshold.unsqueeze(1)) | (of_tiles(is_label) > 0)
    matters = torch.stack([x.any(0) for x in own.split(ROWS)])
    of_token = matters.repeat_interleave(ROWS, 0)[:n]
    dropped = (mass * ~of_token).sum(1)
    kept = torch.empty_like(probs)
    kept[:, order] = of_token.repeat_interleave(WIDTH, 1)[:, :v] * probs[:, order]
    g = p.scale * c.double()[:, None] * (is_label - kept - dropped[:, None] / v)
    logps = (p.scale * h @ w.T).log_softmax(1)[rows, p.labels]
    return Definition(logps, dropped, g @ w, g.T @ h, matters)


def listed(lists: Tensor) -> Tensor:
    """The tiles in lists, as a table of which are there."""
    table = torch.zeros(len(lists), lists.shape[1] - 1, dtype=torch.bool, device=lists.device)
    for row, (count, *places) in zip(table, lists.tolist(), strict=True):
        assert places[:count] == sorted(places[:count])
        row[places[:count]] = True
    return table


def random(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def assert_as_defined(p: Case, got: Result, c: Tensor, cut: float = CUT) -> Definition:
    want = definition(p, got.kept.order, cut, c)
    assert torch.equal(listed(got.kept.of_tokens), want.matters)
    assert torch.equal(listed(got.kept.of_vocab), want.matters.T)
    torch.testing.assert_close(got.values["logps"].double(), want.logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.dropped, want.dropped, rtol=1e-4, atol=1e-9)
    error = (got.hidden[0, p.positions] - want.hidden).norm(dim=1) / want.hidden.norm(dim=1)
    assert error.max() < 8 * ROUNDING
    assert got.weight is None or (got.weight - want.weight).norm() / want.weight.norm() < 2 * ROUNDING
    return want


SIZES = ((300, 24, 1100), (129, 8, 1025), (7, 264, 640), (1, 16, 300), (128, 520, 256), (260, 40, 2000))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradients_are_those_of_the_tiles_that_matter(sizes):
    p, c = case(*sizes), random(sizes[0])
    want = assert_as_defined(p, run(p, c=c), c)
    assert sizes[0] < 300 or 0.1 < want.matters.float().mean() < 0.9


def test_a_frozen_head_has_the_same_gradient_of_hidden():
    p, c = case(), random(300)
    got = run(p, c=c, to_weight=False)
    assert_as_defined(p, got, c)
    assert torch.equal(got.hidden, run(p, c=c).hidden)


@pytest.mark.parametrize("cut", (0.9, 2.0**-6, 2.0**-10, 2.0**-40))
def test_any_cut(cut):
    p, c = case(), random(300)
    assert_as_defined(p, run(p, cut, c), c, cut)


def logits_case(z: Tensor, labels: Tensor) -> Case:
    """Hidden states that are logits: the head is the identity, and d hidden the gradient of the logits."""
    identity = torch.eye(z.shape[1], device=DEVICE, dtype=DTYPE)
    positions = torch.arange(len(z), device=DEVICE)
    return Case(z.to(DEVICE, DTYPE).unsqueeze(0), identity, positions, labels.to(DEVICE), Transform())


def of_all_kinds(v: int = 640) -> Case:
    """From flat to nearly certain, each kind in tiles of tokens of its own and all of them in the last."""
    make = torch.Generator().manual_seed(0)
    steepness = torch.tensor([0.0, 0.5, 1.5, 2.5]).repeat_interleave(ROWS)
    steepness = torch.cat((steepness, torch.rand(40, generator=make) * 2.5))
    rank = torch.arange(v).float().div(8).add(1).log()
    z = -steepness[:, None] * rank + 0.1 * torch.randn(len(steepness), v, generator=make)
    labels = torch.randint(0, 12, (len(steepness),), generator=make)
    z[::9, 3], labels[::9] = 9.0, 3
    return logits_case(z - z[:, :12].mean(1, keepdim=True), labels)


@pytest.mark.parametrize("cut", (2.0**-4, 2.0**-9))
def test_no_token_misses_the_promise(cut):
    """The 2-norm of the error is at most sqrt(cut / 8) of the gradient of a token's logits, which adds up to zero."""
    p = of_all_kinds()
    got = run(p, cut)
    z = p.tokens.double()
    want = -z.softmax(1)
    want[torch.arange(len(z)), p.labels] += 1
    off = (got.hidden[0].double() - want).norm(dim=1) / want.norm(dim=1)
    assert off.max() <= (cut * TOLERANCE) ** 0.5 + 2 * ROUNDING
    rest = want[torch.arange(len(z)), p.labels]
    assert (got.dropped <= TOLERANCE * rest * (1 + 1e-5)).all()
    assert got.hidden.double().sum(2).abs().max() < 4 * ROUNDING
    if cut > 2.0**-9:
        assert 0 < (got.dropped == 0).sum() < len(z)


@pytest.mark.parametrize("tiles", [1, 50, 2000, 100_000])
@pytest.mark.parametrize("cut", [2.0**-6, 2.0**-14, 2.0**-20])
def test_a_budget_keeps_the_tolerance_whatever_the_number_of_tiles(cut, tiles):
    """The most that can be dropped is as many equal masses as there are tiles."""
    equal = math.sqrt(square_budget(cut, tiles) / tiles)
    assert 0 < equal * tiles <= TOLERANCE * (1 + 1e-12) and square_budget(cut, tiles) <= cut * TOLERANCE


def test_what_is_dropped_is_given_back_in_equal_parts():
    p = of_all_kinds()
    got, v = run(p), len(p.weight)
    skipped = ~listed(got.kept.of_tokens)
    assert skipped.any() and got.kept.order.sort().values.equal(torch.arange(v, device=DEVICE))
    for tile, columns in enumerate(skipped):
        of_columns = columns.repeat_interleave(WIDTH)[:v]
        rows = got.hidden[0, tile * ROWS : (tile + 1) * ROWS][:, got.kept.order[of_columns]].double()
        same = -got.dropped[tile * ROWS : (tile + 1) * ROWS, None].expand_as(rows) / v
        torch.testing.assert_close(rows, same, rtol=4 * ROUNDING, atol=1e-7)


def test_rows_of_the_head_that_nobody_keeps_have_their_part_of_what_is_dropped():
    p = case()
    got = run(p)
    nobody = ~listed(got.kept.of_tokens).any(0).repeat_interleave(WIDTH)[: len(p.weight)]
    want = -p.scale * (got.dropped / len(p.weight)) @ p.tokens.double()
    rows = got.weight[got.kept.order[nobody]].double()
    assert len(rows) and want.norm() > 0
    assert (rows - want).norm(dim=1).max() < 4 * ROUNDING * want.norm()


def test_a_flat_distribution_keeps_everything():
    got = run(logits_case(torch.zeros(130, 1000), torch.arange(130)), 0.5)
    assert listed(got.kept.of_tokens).all() and not got.dropped.any()


def test_what_is_certain_has_a_gradient_of_full_relative_precision():
    """And where the others' probabilities are 0 nothing is NaN."""
    z = torch.zeros(6, 600)
    z[:, 0] = torch.tensor([4.0, 12.0, 30.0, 60.0, 200.0, 2000.0])
    p = logits_case(z, torch.zeros(6, dtype=torch.int64))
    got = run(p)
    rest = -torch.expm1(z.double().log_softmax(1)[:, 0]).to(DEVICE)
    torch.testing.assert_close(got.hidden[0, :3, 0].double(), rest[:3], rtol=4 * ROUNDING, atol=6e-8)
    assert torch.isfinite(got.hidden).all() and torch.isfinite(got.weight).all()


def test_what_is_not_finite_comes_out_where_it_does_without_a_filter():
    """Of labels out of range, too; tokens beside them have what they have alone."""
    p = case()
    p.labels[1], p.labels[2] = -1, len(p.weight)
    p.hidden[0, p.positions[5], 2] = math.nan
    p.hidden[0, p.positions[6], 3] = math.inf
    got = run(p)
    bad = torch.zeros(300, dtype=torch.bool, device=DEVICE)
    bad[[1, 2, 5, 6]] = True
    assert torch.equal(got.values["logps"].isnan(), bad)
    assert torch.equal(got.hidden[0, p.positions].isnan().any(1), bad)
    assert got.weight.isnan().all() and not got.dropped[bad].any()
    assert listed(got.kept.of_tokens)[0].all()


def test_the_label_of_a_token_is_never_dropped():
    """Not even one that is next to impossible."""
    z = torch.full((130, 600), -1.5)
    z[:, :WIDTH] = 2.5
    z[7, 500] = -2.5
    labels = torch.zeros(130, dtype=torch.int64)
    labels[7] = 500
    got = run(logits_case(z, labels), 0.9)
    assert not listed(got.kept.of_tokens).all()
    assert got.hidden[0, 7, 500].item() == pytest.approx(1.0, rel=1e-3)


def test_nothing_is_asked_of_the_device():
    p = case()
    schedule = schedule_of(300, 24, 1100)
    cache = torch.empty(schedule.cache_bytes, dtype=torch.uint8, device=DEVICE)
    problem = Problem(p.hidden, p.weight, None, p.positions, p.labels, p.transform, CUT)
    engine = TiledBackend(GpuPasses(thread_blocks=4))
    with Watching(size=1) as watching:
        values = engine.forward(problem, schedule, (), cache)
        saved = Saved(values["logps"], values["lse"], cache=cache)
        grads = InputGrads(torch.empty_like(p.hidden), torch.empty_like(p.weight))
        engine.backward(problem, schedule, saved, OutputGrads(torch.ones(300, device=DEVICE)), grads)
    assert watching.buffers and not watching.waits


@pytest.mark.skipif(INTERPRETED, reason="there is no device to wait for")
def test_a_device_is_not_waited_for():
    p = case()
    run(p)  # kernels are compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = run(p)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_as_defined(p, got, torch.ones(300, device=DEVICE))


# The public call, where a device is taken for a Hopper


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setitem(registry.added, "triton:skips", TiledBackend(GpuPasses(thread_blocks=4)))
    monkeypatch.setattr(primitive, "can_fuse", lambda *_: True)
    # As if it paid for the few tokens here.
    best_of = planner.best_of
    skips = lambda found: [c for c in found if c.schedule.filters]  # noqa: E731
    monkeypatch.setattr(planner, "best_of", lambda found, *how: best_of(skips(all_of := list(found)) or all_of, *how))
    sheet = cost.DEVICES["h100"]
    for function in ("device_of", "_device_of"):
        monkeypatch.setattr(cost, function, lambda _: sheet)
    primitive.chosen.cache_clear()
    planner._best.cache_clear()
    yield "triton:skips"
    primitive.chosen.cache_clear()
    planner._best.cache_clear()


def call(p: Case, backend: str, **options) -> tuple[Tensor, ...]:
    labels = torch.full((1, len(p.hidden[0])), -100, device=DEVICE)
    labels[0, p.positions] = p.labels
    leaves = p.hidden.detach().requires_grad_(), p.weight.detach().requires_grad_()
    out = dpofast.linear_logprob(
        *leaves, labels, backend=backend, temperature=1.1, logit_scale=1.2, outputs=("dropped_mass",), **options
    )
    return out.logps.detach(), out.dropped_mass, *torch.autograd.grad(out.logps.sum(), leaves)


def test_a_call_says_what_it_dropped(hopper):
    p = case()
    logps, dropped, d_hidden, d_weight = call(p, hopper, grad_filter=CUT)
    got = run(p)
    # Not to the bit: the interpreter's products are NumPy's, which depend on where operands lie.
    close = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(logps[0, p.positions], got.values["logps"], **close)
    torch.testing.assert_close(dropped[0, p.positions], got.values["dropped_mass"], **close)
    torch.testing.assert_close(d_hidden, got.hidden, **close)
    torch.testing.assert_close(d_weight, got.weight, **close)
    assert (dropped[0, p.positions] > 0).any()


ELSEWHERE = {"memory_budget": "1MiB"}, {"bias": torch.zeros(1100)}, {"softcap": 30.0}


@pytest.mark.parametrize("options", ELSEWHERE, ids=("budget", "bias", "softcap"))
def test_where_tiles_cannot_be_skipped_gradients_are_exact(hopper, options):
    filtered, exact = (call(case(), hopper, grad_filter=how, **options) for how in (CUT, None))
    assert all(torch.equal(x, y) for x, y in zip(filtered, exact)) and not filtered[1].any()


def test_a_compiled_call_has_the_same_bits(hopper):
    p = case()

    def work(hidden: Tensor, weight: Tensor) -> Tensor:
        out = dpofast.linear_logprob(
            hidden, weight, p.labels, grad_filter=CUT, ignore_index=None, backend=hopper, outputs=("dropped_mass",)
        )
        return out.logps.sum() + out.dropped_mass.sum()

    found = []
    for function in (work, torch.compile(work, fullgraph=True, backend="aot_eager")):
        leaves = p.tokens.requires_grad_(), p.weight.detach().requires_grad_()
        value = function(*leaves)
        value.backward()
        found.append((value.detach(), leaves[0].grad, leaves[1].grad))
    assert all(torch.equal(a, b) for a, b in zip(*found))
