"""What only a real GPU can show: devices, streams, graphs, memory, that nothing waits. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

import dpofast
from dpofast import reference
from dpofast.backends import registry
from dpofast.plan import Schedule, cost

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

HERE = torch.cuda.is_available()
GPU = [name for name in ("cuda", "triton", "torch") if HERE and not registry.why_not(name, "cuda")]


def inputs(n=500, h=256, v=5000, dtype=torch.bfloat16, device="cuda"):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, h, generator=g).to(device, dtype).requires_grad_()
    weight = (torch.randn(v, h, generator=g) * 0.1).to(device, dtype).requires_grad_()
    labels = torch.randint(v, (n,), generator=g).to(device)
    labels[::5] = -100
    return hidden, weight, labels


def step(hidden, weight, labels, **options):
    out = dpofast.linear_logprob(hidden, weight, labels, outputs=("entropy",), **options)
    return (out.logps.detach(), *torch.autograd.grad((out.logps * 0.3).sum(), (hidden, weight)))


def assert_near(got, want):
    for x, y in zip(got, want):
        torch.testing.assert_close(x.cpu().double(), y.cpu().double(), rtol=0.03, atol=0.02)


def exact(hidden, weight, labels):
    hidden, weight = (x.detach().double().cpu().requires_grad_() for x in (hidden, weight))
    out = reference.linear_logprob(hidden, weight, labels.cpu())
    return (out.logps.detach(), *torch.autograd.grad((out.logps * 0.3).sum(), (hidden, weight)))


@pytest.mark.parametrize("budget", ("1GiB", "24MiB"))
@pytest.mark.parametrize("backend", GPU)
def test_the_public_call_on_gpu_tensors(backend, budget):
    args = inputs()
    assert_near(step(*args, backend=backend, memory_budget=budget), exact(*args))


def test_auto_takes_the_compiled_kernels_where_they_are():
    assert registry.resolve("auto", "cuda") == GPU[0]


@pytest.mark.parametrize("backend", GPU)
def test_the_budget_is_kept(backend):
    hidden, weight, labels = inputs(n=4000, h=512, v=32000)
    for budget in (64 << 20, 512 << 20):
        step(hidden, weight, labels, backend=backend, memory_budget=budget)  # cuBLAS takes its own workspace once
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = step(hidden, weight, labels, backend=backend, memory_budget=budget)
        peak = torch.cuda.max_memory_allocated() - before - sum(x.numel() * x.element_size() for x in kept)
        assert peak <= budget + (8 << 20), f"{peak / 2**20:.0f} MiB"


@pytest.mark.parametrize("backend", GPU)
def test_packed_rows_never_wait_for_the_device(backend):
    hidden, weight, labels = inputs()
    keep = labels != -100
    hidden, labels = hidden.detach()[keep].requires_grad_(), labels[keep]
    step(hidden, weight, labels, backend=backend, ignore_index=None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step(hidden, weight, labels, backend=backend, ignore_index=None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_near(got, exact(hidden, weight, labels))


@pytest.mark.parametrize("backend", GPU)
def test_packed_rows_can_be_captured_in_a_graph(backend):
    hidden, weight, labels = inputs()
    keep = labels != -100
    hidden, labels = hidden.detach()[keep].requires_grad_(), labels[keep]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(hidden, weight, labels, backend=backend, ignore_index=None)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(hidden, weight, labels, backend=backend, ignore_index=None)
    with torch.no_grad():
        hidden.mul_(0.5)
    graph.replay()
    assert_near(got, exact(hidden, weight, labels))


@pytest.mark.parametrize("backend", GPU)
def test_a_stream_of_ones_own(backend):
    args = inputs()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = step(*args, backend=backend)
    stream.synchronize()
    assert_near(got, exact(*args))


@pytest.mark.parametrize("backend", GPU)
def test_a_label_out_of_range_makes_its_row_nan_or_raises_when_checked(backend, monkeypatch):
    hidden, weight, labels = inputs()
    labels[7], labels[8] = 5000, -1
    logps = dpofast.linear_logprob(hidden, weight, labels, backend=backend).logps
    bad = torch.zeros_like(labels, dtype=torch.bool)
    bad[7:9] = True
    assert torch.equal(logps.isnan(), bad)
    monkeypatch.setenv("DPOFAST_CHECK_LABELS", "1")
    with pytest.raises(ValueError, match="labels: got -1, expected values in"):
        dpofast.linear_logprob(hidden, weight, labels, backend=backend)


@pytest.mark.parametrize("backend", GPU)
def test_the_same_bits_come_out_of_every_run(backend):
    args = inputs()
    first, second = step(*args, backend=backend), step(*args, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(first, second))


@pytest.mark.parametrize("backend", GPU)
def test_a_compiled_step(backend):
    args = inputs()
    compiled = torch.compile(lambda *x: dpofast.linear_logprob(*x, backend=backend).logps.sum(), fullgraph=True)
    got = torch.autograd.grad(compiled(*args), args[:2])
    want = torch.autograd.grad(dpofast.linear_logprob(*args, backend=backend).logps.sum(), args[:2])
    assert_near(got, want)


def test_tensors_on_two_devices_are_refused():
    hidden, weight, labels = inputs()
    with pytest.raises(ValueError, match="weight: got device cpu, expected cuda:0"):
        dpofast.linear_logprob(hidden, weight.cpu(), labels)
    with pytest.raises(ValueError, match="labels: got device cpu"):
        dpofast.linear_logprob(hidden, weight, labels.cpu())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_tensors_device_is_used_whatever_the_current_one_is():
    args = inputs(device="cuda:1")
    assert_near(step(*args), exact(*args))


SIZES = {  # block, token_chunk and bytes kept of one token and 32001 rows of the head; block 0, or a last 1: fused
    "cached": (8192, 1, 32008 * 2 + 4),
    "cached, fused": (0, 1, 32008 * 2 + 4),
    "mixed": (8192, 1, 16384 * 2 + 4),
    "recompute": (8192, 1, 0),
    "recompute, fused": (8192, 1, 0, 1),
    "recompute-split": (8192, 1, 0),
    "jacobian": (8192, 1, 256 * 4 + 4),
    "jacobian, fused": (0, 1, 256 * 4 + 4),
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("backend", [name for name in GPU if name != "torch"])
def test_one_token_on_every_schedule(backend, name, monkeypatch):
    """Products of one row: cuBLAS has other ways for them."""
    hidden, weight, labels = inputs(n=1, v=32001)
    labels[0] = 32000
    if "fused" in name and not cost.device_of(hidden.device).fuses:
        pytest.skip("nothing is fused on this GPU")
    schedule = Schedule.of(name.partition(",")[0], SIZES[name])
    monkeypatch.setattr("dpofast.primitive.chosen", lambda *args, **kwargs: schedule)
    weight.requires_grad_(not schedule.keeps_jacobian)
    wanted = (hidden,) if schedule.keeps_jacobian else (hidden, weight)
    out = dpofast.linear_logprob(hidden, weight, labels, backend=backend)
    assert_near((out.logps, *torch.autograd.grad(out.logps.sum() * 0.3, wanted)), exact(hidden, weight, labels))


def test_more_than_2_to_the_31_logits():
    n, v = 20_000, 120_000
    logits = torch.zeros(n, v, device="cuda", dtype=torch.bfloat16)
    rows = torch.arange(n, device="cuda")
    logits[:, v - 1] = (rows % 13 - 6).bfloat16()  # each row is known by its label's logit ..
    logits[:, 7] = (rows % 11 + 8).bfloat16()  # .. and by one that outweighs the zeros
    labels = torch.full((n,), v - 1, device="cuda")
    logps = dpofast.logprob(logits, labels, ignore_index=None).logps
    own, other = (rows % 13 - 6).double(), (rows % 11 + 8).double()
    lse = (v - 2 + own.exp() + other.exp()).log()
    torch.testing.assert_close(logps.double(), own - lse, rtol=1e-5, atol=1e-5)
