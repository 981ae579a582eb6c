"""Other libraries' ways: the memory that is said of them is what their code takes, and their prices are ordered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import dpofast
from dpofast.bench import record
from dpofast.bench.providers import PEERS, training_step
from dpofast.plan import Request, cost, peers
from dpofast.plan.rates import Rates

CPU = peers.Cpu(Rates(1e11, 1e11, 2e10, 2e9, 2), mm=2e11)
MEASURED = record.read(Path(__file__).parents[2] / "bench" / "results" / "gpu-h100-2026-11-26.json")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def request_for(n, h, v, dtype, train_head=True, train_hidden=True) -> Request:
    return Request(n, h, v, dtype, dtype, 1 << 30, train_hidden, train_head)


def peak(work) -> int:
    """Bytes of tensors at the worst moment of ``work``, by the allocator's own account."""
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        work()
    events = (e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]")
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("train_head", (True, False))
@pytest.mark.parametrize("name", ("plain PyTorch", "TRL", "Liger"))
def test_peak_memory_is_what_the_code_takes(name, train_head, dtype):
    if name != "plain PyTorch":
        pytest.importorskip({"TRL": "trl", "Liger": "liger_kernel"}[name])
    n, h, v = 192, 64, 6000
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, h, generator=g).to(DTYPES[dtype])
    weight = torch.randn(v, h, generator=g).to(DTYPES[dtype])
    run, leaves = training_step(PEERS[name], hidden, weight, torch.randint(v, (n,), generator=g), train_head)

    def step() -> None:
        run()
        for leaf in leaves:
            leaf.grad = None

    found = peers.peers(request_for(n, h, v, DTYPES[dtype], train_head), CPU, n, longest_pair=n)
    predicted = next(p for p in found if p.name == name).peak_bytes
    assert peak(step) == pytest.approx(predicted, rel=0.05)


@pytest.mark.parametrize("name", ("plain PyTorch", "Liger", "cut-cross-entropy", "cut-cross-entropy, exact"))
def test_peak_memory_on_a_gpu_is_what_was_measured(name):
    """On an H100, bf16, head trained; Liger ran with all tokens as one pair."""
    found = MEASURED.where(metric="peak memory", provider=name, case="told which tokens count")
    assert len(found) >= 3
    for r in found:
        request = request_for(*r.shape, torch.bfloat16)
        of = peers.peers(request, peers.Gpu(cost.DEVICES["h100"], 2), r.shape[0], longest_pair=r.shape[0])
        assert next(p for p in of if p.name == name).peak_bytes == pytest.approx(r.value, rel=0.12)


MACHINES = {"cpu": CPU, "gpu": peers.Gpu(cost.DEVICES["h100"], 2)}


@pytest.mark.parametrize("machine", MACHINES)
def test_more_work_costs_more(machine):
    def of(n, h, v, **train) -> list[peers.Peer]:
        return peers.peers(request_for(n, h, v, torch.bfloat16, **train), MACHINES[machine], n)

    base = of(2048, 1024, 65536)
    for sizes in ((4096, 1024, 65536), (2048, 2048, 65536), (2048, 1024, 131072)):
        for small, large in zip(base, of(*sizes), strict=True):
            assert small.name == large.name and small.products == large.products
            assert small.seconds < large.seconds and small.bytes_moved < large.bytes_moved
    for less in (of(2048, 1024, 65536, train_head=False), of(2048, 1024, 65536, train_head=False, train_hidden=False)):
        for a, b in zip(base, less, strict=True):
            assert (b.products, b.seconds, b.bytes_moved) < (a.products, a.seconds, a.bytes_moved)
            assert b.peak_bytes <= a.peak_bytes


def test_who_is_not_told_which_tokens_count_works_on_all():
    request = request_for(1000, 576, 49152, torch.bfloat16)
    on_cpu = {p.name: p.tokens for p in peers.peers(request, CPU, 3000)}
    assert on_cpu == {"plain PyTorch": 3000, "TRL": 3000, "Liger": 3000, "cut-cross-entropy": 1000}
    on_gpu = {p.name: p.tokens for p in peers.peers(request, MACHINES["gpu"], 3000)}
    assert on_gpu["TRL"] == on_gpu["cut-cross-entropy, exact"] == 1000 and on_gpu["Liger"] == 3000


def test_products_are_those_of_their_sources():
    for train_head, wanted in ((True, (3, 4, 3, 3)), (False, (2, 3, 2, 2))):
        request = request_for(1000, 576, 49152, torch.float32, train_head)
        assert tuple(p.products for p in peers.peers(request, CPU, 1000)) == wanted
    exact = next(
        p for p in peers.peers(request_for(64, 64, 640, torch.bfloat16), MACHINES["gpu"], 64) if "exact" in p.name
    )
    assert exact.products == 4


def test_a_plan_prints_them_beside_its_own_way():
    p = dpofast.plan(1000, 576, 49152, backend="cpu", threads=1, with_peers=True, positions=2500)
    table = p.peers_table().splitlines()
    assert table[1].startswith("dpofast, cached") and len(table) == 2 + len(p.peers) and str(p).endswith(table[-1])
    assert all(peer.name in line for peer, line in zip(p.peers, table[2:], strict=True))
    assert [row["name"] for row in p.as_dict()["peers"]] == [peer.name for peer in p.peers]
    with pytest.raises(ValueError, match="with_peers: not available on backend 'torch'"):
        dpofast.plan(8, 8, 8, backend="torch", with_peers=True)
