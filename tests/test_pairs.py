"""A loss by whole pairs: the numbers of the ordinary way, in three products where that takes four."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys

import pytest
import torch
from torch.nn import functional as F

import dpofast
from dpofast import functional, losses, native, pairs
from dpofast.plan import Request, choose, chosen
from dpofast.plan.cost import DEVICES, HOST
from dpofast.plan.pairs import Pairs, pairs_schedule, sums_bytes

MIB = 1 << 20
H, V, T = 16, 300, 9
LENGTHS = [5, 0, 9, 3, 1, 4, 0, 2, 6, 8]  # five pairs: one of them without tokens but one, one chosen without
PATHS = {
    "dpo": {},
    "ipo, long answers less": {"loss_type": "ipo", "ld_alpha": 0.3},
    "three terms": {"loss_type": ["sigmoid", "sft", "sft_norm"], "loss_weights": [1.0, 0.5, 2.0]},
    "tokens of a whole batch": {"loss_type": "cpo", "cpo_alpha": 0.7, "ref_logps": None},
    "wpo": {"use_weighting": True},
    "weights and margins": {"pair_weight": [0.5, 2.0, 0.0, 1.0, 3.0], "margin": [0.0, 0.4, -0.1, 1.0, 0.2]},
    "sum": {"loss_type": "dpop", "reduction": "sum", "beta": [0.1, 0.5, 2.0, 0.1, 0.3]},
    "a transform": {"temperature": 0.7, "logit_scale": 1.3, "softcap": 5.0},
}


class Batch:
    """Pairs with prompts, completions of several lengths and a bias, in fp64."""

    def __init__(self, seed: int = 0):
        g = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(len(LENGTHS), T, H, generator=g, dtype=torch.float64)
        self.weight = torch.randn(V, H, generator=g, dtype=torch.float64) * 3 / math.sqrt(H)
        self.bias = torch.randn(V, generator=g, dtype=torch.float64)
        self.ref_logps = torch.randn(len(LENGTHS), T, generator=g, dtype=torch.float64) - 5
        self.token_weights = torch.rand(len(LENGTHS), T, generator=g, dtype=torch.float64)
        self.labels = torch.randint(V, (len(LENGTHS), T), generator=g)
        self.labels[torch.arange(T) < T - torch.tensor(LENGTHS)[:, None]] = -100

    def leaves(self, dtype: torch.dtype, bias: bool = True) -> list[torch.Tensor | None]:
        tensors = self.hidden, self.weight, self.bias if bias else None
        return [None if x is None else x.to(dtype).requires_grad_() for x in tensors]

    def run(self, leaves, *, packed: bool = False, by: float = 1.0, **options):
        """The output, and the gradients of the leaves."""
        hidden, weight, bias = leaves
        wide = torch.promote_types(hidden.dtype, torch.float32)
        options = {"ref_logps": self.ref_logps.to(wide)} | {
            name: torch.tensor(x, dtype=wide)
            if name in ("pair_weight", "margin", "beta") and isinstance(x, list)
            else x
            for name, x in options.items()
        }
        labels = self.labels
        if packed:
            ends = torch.arange(0, labels.numel() + 1, T)
            hidden, labels = hidden.flatten(0, 1), labels.flatten()
            options |= {
                name: x.flatten() for name, x in options.items() if isinstance(x, torch.Tensor) and x.dim() == 2
            }
            options["cu_seqlens"] = ends
        out = dpofast.linear_dpo_loss(hidden, weight, labels, bias=bias, **options)
        grads = torch.autograd.grad(out.loss * by, [x for x in leaves if x is not None])
        return out, grads


class Ran(list):
    """The schedules of the losses that ran by whole pairs; none does after ``stop``."""

    stopped = False

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def forced(monkeypatch):
    """Makes losses run by whole pairs, one or two at a time, where they can."""
    ran = Ran()

    def force(request, ordinary, backend, longest_pair, device):
        if ran.stopped:
            return None
        tokens = longest_pair()
        part = request._replace(n_tokens=tokens, entropy=False, budget=1 << 30)
        ran.append(Pairs(chosen(part, backend, device=device), tokens, 0))
        return ran[-1]

    monkeypatch.setattr(functional, "pairs_schedule", force)
    return ran


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("packed", (False, True), ids=("padded", "packed"))
def test_everything_is_what_the_ordinary_way_gives(path, packed, backend, forced):
    batch = Batch()
    options = PATHS[path] | {"backend": backend, "metrics": True, "packed": packed, "by": 0.3}
    got, grads = batch.run(batch.leaves(torch.float64), **options)
    assert len(forced) == 1
    forced.stop()
    want, want_grads = batch.run(batch.leaves(torch.float64), **options)
    torch.testing.assert_close(got._asdict(), want._asdict())
    torch.testing.assert_close(grads, want_grads)


def plain_loss(hidden, weight, bias, labels, ref_logps):
    """DPO as anyone writes it: the product in the inputs' dtype, the softmax in fp32."""
    valid = labels != -100
    logps = F.linear(hidden, weight, bias).float().log_softmax(-1)
    logps = logps.gather(-1, labels.where(valid, 0).unsqueeze(-1)).squeeze(-1)
    chosen, rejected = ((logps - ref_logps) * valid).sum(-1).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("bias", (False, True), ids=("", "bias"))
def test_gradients_are_as_exact_as_plain_pytorchs(dtype, bias, backend, forced):
    batch = Batch(1)
    leaves = batch.leaves(dtype, bias)
    _, grads = batch.run(leaves, backend=backend, by=0.3)
    assert forced
    batch.hidden, batch.weight, batch.bias = (None if x is None else x.detach().double() for x in leaves)
    forced.stop()
    _, truth = batch.run(batch.leaves(torch.float64, bias), backend="torch", by=0.3)
    loss = 0.3 * plain_loss(*leaves, batch.labels, batch.ref_logps.float())
    plain = torch.autograd.grad(loss, [x for x in leaves if x is not None])
    for got, want, other in zip(grads, truth, plain, strict=True):
        assert got.dtype == dtype
        error, theirs = ((x.double() - want).norm() / want.norm() for x in (got, other))
        assert error <= 2 * theirs + 1e-6


def test_under_autocast_operands_are_cast_and_gradients_are_not(backend, forced):
    batch, dtype = Batch(2), torch.bfloat16
    device = "cpu"
    with torch.autocast(device, dtype):
        _, grads = batch.run(batch.leaves(torch.float32), backend=backend)
    assert forced and all(g.dtype == torch.float32 for g in grads)
    rounded = [x.to(dtype).float().requires_grad_() for x in batch.leaves(torch.float32)]
    _, want = batch.run(rounded, backend=backend)
    for got, exact in zip(grads, want, strict=True):
        assert (got - exact).norm() <= 1e-2 * exact.norm()


def test_logps_and_a_second_backward_have_their_gradients(backend, forced):
    """They cost the ordinary way's products; nobody gets zeros, or the first backward's numbers again."""
    batch = Batch(3)
    leaves = batch.leaves(torch.float64)
    hidden, weight, bias = leaves

    def out():
        return dpofast.linear_dpo_loss(
            hidden, weight, batch.labels, bias=bias, ref_logps=batch.ref_logps, backend=backend
        )  # fmt: skip

    mixed = torch.autograd.grad((out().loss * 0.5 + out().chosen_logps.sum() * 0.1), leaves)
    both = out()
    together = torch.autograd.grad(both.loss * 0.5 + both.chosen_logps.sum() * 0.1, leaves)
    alone = out()
    only = torch.autograd.grad(alone.chosen_logps.sum(), leaves)
    twice = out()
    first = torch.autograd.grad(twice.loss, leaves, retain_graph=True)
    second = torch.autograd.grad(twice.loss * 3, leaves)
    assert len(forced) == 5
    forced.stop()
    ordinary = out()
    want = torch.autograd.grad(ordinary.loss * 0.5 + ordinary.chosen_logps.sum() * 0.1, leaves)
    torch.testing.assert_close(mixed, want)
    torch.testing.assert_close(together, want)
    torch.testing.assert_close(only, torch.autograd.grad(out().chosen_logps.sum(), leaves))
    torch.testing.assert_close(first, torch.autograd.grad(out().loss, leaves))
    torch.testing.assert_close(second, tuple(3 * g for g in first))


@pytest.mark.parametrize("train", ((0, 1, 2), (1, 2), (1,), (2,)))
def test_only_what_is_trained_has_a_gradient(train, backend, forced):
    batch = Batch(4)
    leaves = batch.leaves(torch.float64)
    for i, x in enumerate(leaves):
        x.requires_grad_(i in train)
    hidden, weight, bias = leaves
    loss = dpofast.linear_dpo_loss(hidden, weight, batch.labels, bias=bias, loss_type="simpo", backend=backend).loss
    loss.backward()
    assert forced and [x.grad is not None for x in leaves] == [i in train for i in range(3)]
    forced.stop()
    want = batch.leaves(torch.float64)
    dpofast.linear_dpo_loss(*want[:2], batch.labels, bias=want[2], loss_type="simpo", backend=backend).loss.backward()
    for i in train:
        torch.testing.assert_close(leaves[i].grad, want[i].grad)


def test_there_is_no_graph_left_behind(forced):
    """What the backward gives away is not held by the graph, nor are the inputs."""
    batch = Batch()
    hidden, weight, bias = batch.leaves(torch.float32)
    out = dpofast.linear_dpo_loss(hidden, weight, batch.labels, bias=bias, ref_logps=batch.ref_logps.float())
    call = out.loss.grad_fn
    assert call.left.weight is not None and call.call.head.weight is None
    out.loss.backward()
    assert call.left is None


LEARNED = torch.ones(len(LENGTHS), T, requires_grad=True)
REFUSED = {
    "a loss of each pair": {"reduction": "none"},
    "a loss that sorts the batch": {"loss_type": "aot"},
    "weights that are learned": {"token_weights": LEARNED},
    "a beta that is learned": {"beta": torch.tensor(0.1, requires_grad=True)},
    "a frozen head": {"train": False},
}


@pytest.mark.parametrize("why", REFUSED)
def test_others_go_the_ordinary_way(why, forced):
    options = dict(REFUSED[why])
    batch, train = Batch(), options.pop("train", True)
    hidden, weight = batch.hidden.float().requires_grad_(), batch.weight.float().requires_grad_(train)
    loss = dpofast.linear_dpo_loss(hidden, weight, batch.labels, ref_logps=batch.ref_logps.float(), **options).loss
    loss.sum().backward()
    assert not forced and hidden.grad.any()


def test_a_loss_that_someone_registered_goes_the_ordinary_way(forced, monkeypatch):
    """Nobody can know that it looks at each pair alone."""

    @losses.register("none", "of all pairs")
    def _of_all_pairs(delta, *, beta):
        return (beta * (delta - delta.mean())) ** 2

    try:
        batch = Batch()
        batch.run(batch.leaves(torch.float32), loss_type="of_all_pairs")
    finally:
        del losses.LOSSES["of_all_pairs"]
    assert not forced


def test_a_compiled_graph_and_a_transform_do_not_see_pairs(forced):
    batch = Batch()
    hidden, weight, _ = batch.leaves(torch.float32)

    def loss(weight):
        return dpofast.linear_dpo_loss(hidden, weight, batch.labels, loss_type="simpo", backend="torch").loss

    torch.compile(loss, backend="aot_eager")(weight).backward()
    assert not forced and weight.grad.any()
    with contextlib.suppress(RuntimeError):  # torch.func's own words on what it cannot follow
        torch.func.grad(loss)(weight.detach())
    assert not forced


@pytest.mark.parametrize("most", (1, 4, 7, 100))
def test_parts_are_neighbours_that_fit(most):
    counts = [3, 0, 4, 1, 1, 5, 0]
    parts = pairs._parts(counts, most)
    ends = [0, *itertools.accumulate(counts)]
    assert [x for p in parts for x in range(p.start, p.stop)] == list(range(14))
    for p in parts:
        assert p.start in ends and p.stop in ends and (p.stop - p.start <= most or p.stop - p.start in counts)
    for p, following in itertools.pairwise(parts):
        joined = next(count for end, count in zip(ends, counts) if end == following.start and count)
        assert p.stop - p.start + joined > most  # the next pair had no room
    assert pairs._parts([], 4) == pairs._parts([0, 0], 4) == []


# When it is taken

BF16, FP32, FP16 = torch.bfloat16, torch.float32, torch.float16
CPU = f"cpu:{native.cpu_isas()[0]}" if native.cpu_isas() else "torch"


def asked(n=4000, h=576, v=49152, budget=256 * MIB, dtype=FP32, longest=200, backend=CPU, device=HOST, **more):
    return by_pairs(Request(n, h, v, dtype, dtype, budget, **more), backend, longest, device)


def by_pairs(request, backend, longest, device):
    return pairs_schedule(request, choose(request, backend, device=device), backend, lambda: longest, device)


@pytest.mark.parametrize("backend", (CPU, "torch"))
def test_it_is_taken_where_the_ordinary_way_makes_logits_twice(backend):
    assert asked(budget=4096 * MIB, backend=backend) is None
    found = asked(backend=backend)
    assert found.schedule.name == "cached" and found.schedule.cached_share == 1 and found.tokens < 4000
    assert found.schedule.products(2) == 3


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("mib", (64, 128, 192, 256, 512, 1024))
def test_it_keeps_to_the_budget(mib, dtype, monkeypatch):
    monkeypatch.setattr(sys.modules[Pairs.__module__], "WORTHWHILE", 10.0)  # dpofast.plan is a function, too
    found = asked(budget=mib * MIB, dtype=dtype)
    request = Request(4000, 576, 49152, dtype, dtype, mib * MIB)
    assert sums_bytes(request) == 4000 * 576 * 4 + (49152 * 576 * 4 if dtype == BF16 else 0)
    if found is None:
        longest_pair = 200 * (49152 + 576) * dtype.itemsize
        assert choose(request, CPU).cached_share == 1 or sums_bytes(request) + longest_pair > mib * MIB - 4 * MIB
        return
    picked = found.tokens * 576 * dtype.itemsize
    ours = choose(request._replace(n_tokens=found.tokens, budget=1 << 40), CPU)
    assert found.kept_bytes == sums_bytes(request)
    assert found.schedule.cache_bytes + found.kept_bytes + picked + ours.workspace_bytes < (mib + 4) * MIB


def test_nobody_counts_a_pairs_tokens_where_everything_is_kept():
    """The count waits for a GPU."""

    def never() -> int:
        raise AssertionError("asked for the longest pair")

    request = Request(1000, 576, 49152, FP32, FP32, 1 << 30)
    kept = choose(request, CPU)
    assert kept.cached_share == 1 and pairs_schedule(request, kept, CPU, never, HOST) is None
    frozen = request._replace(to_weight=False)
    assert pairs_schedule(frozen, choose(frozen, CPU), CPU, never, HOST) is None


@pytest.mark.parametrize("backend", (CPU, "torch"))
def test_a_filter_goes_first_where_there_is_one(backend, forced):
    batch = Batch()
    leaves = batch.hidden.bfloat16().requires_grad_(), batch.weight.bfloat16().requires_grad_()
    options = {"ref_logps": batch.ref_logps.float(), "grad_filter": "auto", "backend": backend}
    dpofast.linear_dpo_loss(*leaves, batch.labels, **options).loss.backward()
    assert bool(forced) == (backend == "torch")


def test_it_is_not_taken_where_nothing_is_gained():
    assert asked(dtype=FP16) is None  # its small gradients need the backward's factor
    assert asked(to_weight=False) is None
    assert asked(keeps=False) is None  # the head is sharded
    assert asked(longest=4000) is None  # one pair is everything
    assert asked(n=4000, budget=118 * MIB, dtype=BF16, longest=2) is None  # the sums alone have no room


def test_on_a_gpu_it_is_taken_beyond_the_budget_by_the_model():
    request = Request(65536, 4096, 151936, BF16, BF16, DEVICES["h100"].default_budget)
    found = by_pairs(request, "cuda", 2048, DEVICES["h100"])
    assert found and found.schedule.cached_share == 1 and found.tokens >= 2048
    assert by_pairs(request._replace(n_tokens=8192), "cuda", 2048, DEVICES["h100"]) is None


def test_a_plan_says_how_a_loss_would_run():
    options = {"dtype": "fp32", "backend": CPU}
    small = dpofast.plan(4000, 576, 49152, memory_budget="256MiB", longest_pair=200, **options)
    assert f"by whole pairs, up to {asked().tokens} tokens at a time: 3.00 products" in str(small)
    assert "as above" in dpofast.plan(400, 576, 49152, longest_pair=200, **options).pairs
    assert dpofast.plan(400, 576, 49152, **options).pairs is None


def test_the_loss_takes_it_by_itself(monkeypatch):
    """And the same numbers come out of half the budget's worth of exponentials."""
    seen, run = [], pairs.PairsCall.loss_and_scores

    def spy(self, evaluate):
        seen.append(self.pairs)
        return run(self, evaluate)

    monkeypatch.setattr(pairs.PairsCall, "loss_and_scores", spy)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, 256, 64, generator=g).requires_grad_()
    weight = (torch.randn(8000, 64, generator=g) * 0.3).requires_grad_()
    labels = torch.randint(8000, (8, 256), generator=g)
    grads = []
    for budget in ("20MiB", "1GiB"):
        loss = dpofast.linear_dpo_loss(hidden, weight, labels, loss_type="simpo", memory_budget=budget).loss
        grads.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    assert len(seen) == 1 and seen[0].tokens == 512
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-7)
