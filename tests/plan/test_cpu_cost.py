"""The CPU's cost model: what it counts, and how predictions move with a problem. `dpofast bench cost` measures."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import dpofast
from dpofast import native
from dpofast.plan import Request, choose, cpu, cpu_cost, rates
from dpofast.plan.cpu_cost import Prices, Work
from dpofast.plan.rates import Rates

ISAS = native.cpu_isas()
DTYPES = (torch.bfloat16, torch.float32)
RATES = Rates(kernel=1e11, core=1e11, bandwidth=2e10, fresh=2e9, threads=2)
TRAIN = {"scored": (False, False), "frozen": (True, False), "trained": (True, True)}

every_kind = pytest.mark.parametrize(("isa", "dtype"), list(itertools.product(ISAS, DTYPES)))


def request_for(n=1000, h=576, v=49152, dtype=torch.float32, budget=1 << 30, head="trained", **more) -> Request:
    return Request(n, h, v, dtype, dtype, budget, *TRAIN[head], **more)


def costs(request: Request, isa: str, at: Rates = RATES, kept: float = cpu_cost.KEPT) -> dict:
    """Seconds of each candidate, the chosen first."""
    return {c: cpu_cost.cost(request, c, isa, at, kept).seconds for c in cpu.candidates(request, isa, at.threads)}


def test_all_work_has_a_price_or_a_rate():
    assert Work._fields == (*Prices._fields, "bytes", "steps")
    for prices in (cpu_cost.BF16, cpu_cost.AVX512, cpu_cost.AVX2):
        assert all(0 < price < 1000 for price in prices)


@every_kind
@pytest.mark.parametrize("head", TRAIN)
@pytest.mark.parametrize("budget", (1 << 30, 48 << 20, 12 << 20))
def test_more_work_takes_longer(isa, dtype, head, budget):
    """More tokens, rows or columns; for the same schedule, since another may be the better one."""

    def seconds(**sizes) -> dict:
        request = request_for(dtype=dtype, head=head, budget=budget, **sizes)
        found: dict = {}
        for c, took in costs(request, isa).items():
            found.setdefault((c.name, c.block), took)
        return found

    base = seconds()
    for larger in ({"n": 1900}, {"h": 1100}, {"v": 98304}):
        more = seconds(**larger)
        both = base.keys() & more.keys()
        assert both
        assert all(more[key] > 1.5 * base[key] for key in both)


@every_kind
def test_faster_machines_are_faster(isa, dtype):
    request = request_for(dtype=dtype, budget=48 << 20)
    base = costs(request, isa)
    for field in ("kernel", "core", "bandwidth"):
        better = costs(request, isa, RATES._replace(**{field: 2 * getattr(RATES, field)}))
        assert all(0.5 * base[c] <= better[c] < base[c] for c in base)
    one = costs(request, isa, RATES._replace(threads=1))
    slower = {(c.name, c.block, c.token_chunk): took for c, took in one.items()}
    assert all(took < slower[c[:3]] < 2 * took for c, took in base.items())


@every_kind
@pytest.mark.parametrize("head", TRAIN)
def test_products_are_those_of_the_schedule(isa, dtype, head):
    """Operations of products are the table's, but for tiles that a dimension does not fill."""
    for budget, n in itertools.product((1 << 30, 48 << 20, 6 << 20), (64, 1000)):
        request = request_for(n, 640, 32000, dtype, budget, head)
        for c in cpu.candidates(request, isa, 1):
            counter = cpu_cost._Counter(request, c, cpu.TRAITS[isa, dtype, dtype], cpu_cost.KEPT)
            flops = counter.forward().flops + counter.backward().flops
            assert flops / request.flops == pytest.approx(c.products(request.n_grads), rel=0.05)
            assert flops >= (1 - 1e-9) * c.products(request.n_grads) * request.flops


@pytest.mark.parametrize("isa", ISAS)
def test_memory_is_moved_once_where_all_is_cached(isa):
    """W twice, d weight once, exponentials there and back; a frozen head's W once."""
    request = request_for(1024, 576, 49152)
    head, (first, *_) = 4 * 576 * 49152, costs(request, isa)
    assert first.cached_share == 1
    moved = cpu_cost.cost(request, first, isa, RATES).bytes
    assert moved == 3 * head + 2 * 4 * 1024 * 49152
    frozen = request_for(1024, 576, 49152, head="frozen")
    assert cpu_cost.cost(frozen, next(iter(costs(frozen, isa))), isa, RATES).bytes == head


@every_kind
def test_a_filter_is_worth_what_it_leaves_out(isa, dtype):
    """The fewer entries are kept the faster; where too many are, a call is exact, and asked some tokens first."""
    request = request_for(dtype=dtype, filters=True)
    chosen = next(cpu.candidates(request, isa, 2))
    exact = cpu_cost.cost(request, chosen._replace(name="cached"), isa, RATES).seconds
    took = [cpu_cost.cost(request, chosen, isa, RATES, kept).seconds for kept in (0.0, 0.003, 0.01, 0.1, 0.5)]
    assert chosen.filters and took == sorted(took) and took[2] < 0.7 * exact
    assert exact < took[-1] < 1.1 * exact


@every_kind
def test_a_filter_looks_at_all_logits_and_multiplies_what_it_keeps(isa, dtype):
    request = request_for(1024, 576, 32000, dtype, filters=True)
    chosen = next(cpu.candidates(request, isa, 2))
    counter = cpu_cost._Counter(request, chosen, cpu.TRAITS[isa, dtype, dtype], 0.02)
    forward, backward, logits = counter.forward(), counter.backward(), 1024 * 32000
    # some tokens were asked first, and then what they drop
    first = forward.scan - logits
    assert 0 < first < 0.2 * logits and forward.fold == logits + 2 * first and not forward.keep
    assert backward.entry == pytest.approx(0.02 * logits * 576 * 2) and not backward.flops
    assert forward.sort == backward.sort == pytest.approx(0.02 * logits)


def cheapest(request: Request, isa: str) -> tuple[float, float]:
    """Seconds of the chosen schedule, and of the fastest that fits."""
    found = costs(request, isa, cpu_cost.nominal(request, isa))
    if any(s.filters for s in found):
        found = {s: took for s, took in found.items() if s.filters or s.keeps_jacobian}
    chosen = choose(request, f"cpu:{isa}", 1)
    return found[chosen], min(found.values())


@every_kind
@pytest.mark.parametrize("head", TRAIN)
@pytest.mark.parametrize("filters", (False, True))
def test_the_chosen_schedule_is_the_cheapest_that_fits(isa, dtype, head, filters):
    for n, h, mib in itertools.product((17, 256, 4096), (576, 2048), (4, 8, 16, 64, 256, 1024)):
        request = request_for(n, h, 32000, dtype, mib << 20, head, filters=filters and head != "scored")
        try:
            chosen, fastest = cheapest(request, isa)
        except ValueError:
            continue  # nothing fits
        assert chosen <= cpu_cost.AS_FAST * fastest, (n, h, mib)


@pytest.mark.parametrize("isa", ISAS)
def test_a_smaller_block_is_taken_where_it_saves_a_product(isa):
    """d logps / d hidden of a frozen head fits in smaller blocks only."""
    request = request_for(256, 2048, 32000, budget=8 << 20, head="frozen")
    schedule = choose(request, f"cpu:{isa}", 1)
    assert schedule.keeps_jacobian and schedule.block < cpu.GROUP_ROWS
    assert not cpu.first_fit(request, isa, 1).keeps_jacobian


def test_a_plan_has_the_considered_schedules_and_says_what_is_assumed_of_a_filter():
    p = dpofast.plan(1000, 576, 49152, "bf16", backend="cpu", threads=2, grad_filter="auto", kept=0.02)
    assert p.kept == 0.02 and "keeps 2.00% of the entries: assumed" in str(p) and p.products == pytest.approx(1.04)
    exact = dpofast.plan(1000, 576, 49152, "bf16", backend="cpu", threads=2)
    assert exact.kept is None and p.predicted_seconds < exact.predicted_seconds
    assert [c.is_chosen for c in exact.considered].count(True) == 1 and len(exact.considered) > 1
    assert all(0 < c.memory_bytes <= p.memory_budget and 0 < c.seconds < math.inf for c in exact.considered)
    assert dpofast.plan(1000, 576, 49152, "fp32", backend="cpu", grad_filter="auto").kept is None  # exact
    with pytest.raises(ValueError, match="kept: got 1.5"):
        dpofast.plan(8, 8, 8, grad_filter=0.1, kept=1.5)
    assert dpofast.plan(8, 8, 8, backend="torch", grad_filter=0.1).kept is None  # exact


def test_rates_are_measured_once_until_they_are_forgotten():
    rates.forget()
    isa = ISAS[0]
    first = rates.measured(isa, torch.float32, torch.float32, 1)
    assert all(1e6 < rate < 1e15 for rate in first[:4]) and first.threads == 1
    assert rates.measured(isa, torch.float32, torch.float32, 1) == first
    before = torch.get_num_threads()
    rates.forget()
    assert rates.measured(isa, torch.float32, torch.float32, 2) != first
    assert torch.get_num_threads() == before and rates.mm(torch.float32, 1) > 1e6
