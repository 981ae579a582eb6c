"""Cases of test_vocabulary_parallel.py, on every rank: a head in slices equals the whole head in one process."""

from __future__ import annotations

import itertools
import math
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
from ranks import launch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import dpofast
from dpofast import native, reference
from dpofast.plan import Request, choose

H, V = 24, 203
STATISTICS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def rank_and_size() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def slices(kind: str, n_vocab: int = V) -> list[slice]:
    """Each rank's rows of the head: equal but for the last, very uneven, or none at all on a rank."""
    size = dist.get_world_size()
    if kind == "even":
        ends = [-(-n_vocab * (i + 1) // size) for i in range(size)]
    elif kind == "uneven":
        ends = [n_vocab - (size - 1 - i) for i in range(size)]  # all but one row for the first, one for each other
    else:
        ends = [0, *(-(-n_vocab * (i + 1) // (size - 1)) for i in range(size - 1))]
    return [slice(a, b) for a, b in itertools.pairwise([0, *ends])]


def problem(dtype=torch.float32, *, bias=True, scale=1.0, length=7):
    """The same on every rank: the seed is."""
    hidden = (torch.randn(3, length, H) * scale).to(dtype)
    weight = torch.randn(V, H).to(dtype)
    labels = torch.randint(0, V, (3, length))
    labels[0, :4] = labels[2, -1] = -100
    labels[1, 0], labels[1, 1] = 0, V - 1  # the ends of the vocabulary
    return hidden, weight, (torch.randn(V) * scale).to(dtype) if bias else None, labels


def both(hidden, weight, bias, labels, part: slice, *, train=(True, True), entropy=True, **options):
    """Results and gradients of the slices together, of one process, and of fp64; d weight and d bias of ``part``."""
    mix = torch.randn(2, *labels.shape, dtype=torch.float64)

    def run(function, dtype=None, rows=slice(None), **more):
        h = hidden.detach().to(dtype or hidden.dtype).requires_grad_(train[0])
        w = weight[rows].detach().to(dtype or weight.dtype).requires_grad_(train[1])
        b = None if bias is None else bias[rows].detach().to(dtype or bias.dtype).requires_grad_(train[1])
        out = function(h, w, labels, bias=b, outputs=STATISTICS, **options, **more)
        loss = (out.logps.double() * mix[0]).sum()
        if entropy:
            loss = loss + (out.entropy.double() * mix[1]).sum()
        loss.backward()
        grads = [h.grad, *((x.grad if rows != slice(None) else x.grad[part]) if x.grad is not None else None
                           for x in (w, b) if x is not None)]  # fmt: skip
        return [*out[:5], *(g for g in grads if g is not None)]

    where = {name: options.pop(name) for name in ("backend", "memory_budget") if name in options}
    group = options.pop("group", dist.group.WORLD)
    sharded = run(dpofast.linear_logprob, rows=part, group=group, **where)
    return sharded, run(dpofast.linear_logprob, **where), run(reference.linear_logprob, torch.float64)


def check(sharded, single, exact, dtype=torch.float32):
    """As near to fp64 as one process is, but for the rounding of another order of sums."""
    eps = torch.finfo(dtype).eps
    for ours, one, truth in zip(sharded, single, exact, strict=True):
        assert ours.dtype == one.dtype and ours.shape == one.shape, (ours.dtype, one.dtype)
        if ours.dtype == torch.bool:
            assert torch.equal(ours, truth)
        elif ours.numel():
            scale = truth.abs().max().item()
            error, bound = ((x.double() - truth).abs().max().item() for x in (ours, one))
            assert error <= 2 * bound + 8 * eps * scale, (error, bound, scale)


def backends() -> list[str]:
    return [*(f"cpu:{isa}" for isa in native.cpu_isas()), "torch"]


def equals_one_process():
    """Every backend, every division of the vocabulary, with every transform."""
    rank, size = rank_and_size()
    for backend, kind in itertools.product(backends(), ("even", "uneven", "none")):
        part = slices(kind)[rank]
        check(*both(*problem(), part, backend=backend, temperature=0.7, logit_scale=1.3, softcap=9.0))
    if size == 2:
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            check(*both(*problem(dtype, bias=False), slices("uneven")[rank]), dtype=dtype)


def every_rank_has_the_same_bits():
    rank, size = rank_and_size()
    sharded, *_ = both(*problem(), slices("uneven")[rank])
    for result in sharded[:6]:  # logps, statistics, d hidden
        everyone = [torch.empty_like(result) for _ in range(size)]
        dist.all_gather(everyone, result.contiguous())
        assert all(torch.equal(everyone[0], other) for other in everyone)


def only_one_of_them_trains():
    rank, _ = rank_and_size()
    for train in ((True, False), (False, True)):
        check(*both(*problem(), slices("even")[rank], train=train, entropy=False))


def a_confident_token_keeps_its_precision():
    """log p of a label that has nearly all of the probability, on another rank than what little is left."""
    rank, _ = rank_and_size()
    hidden, weight = torch.ones(1, 1, 1), torch.linspace(-21, -20, V).unsqueeze(-1)
    weight[-1] = 0
    part = slices("even")[rank]
    labels = torch.tensor([[V - 1]])
    logps = dpofast.linear_logprob(hidden, weight[part], labels, group=dist.group.WORLD).logps
    truth = -torch.log1p(torch.exp(weight[:-1].double()).sum()).item()
    assert math.isclose(logps.item(), truth, rel_tol=1e-6), (logps.item(), truth)


def large_logits_and_infinities():
    rank, _ = rank_and_size()
    hidden, weight, bias, labels = problem(scale=30.0)
    nobodys = [v for v in range(V) if not (labels == v).any()]
    bias[nobodys[0]] = bias[nobodys[-1]] = -math.inf
    sharded, single, exact = both(hidden, weight, bias, labels, slices("even")[rank], entropy=False)
    check(sharded[:1], single[:1], exact[:1])
    check(sharded[5:7], single[5:7], exact[5:7])


def no_completion_tokens():
    rank, _ = rank_and_size()
    hidden, weight, bias, labels = problem()
    labels.fill_(-100)
    sharded, single, _ = both(hidden, weight, bias, labels, slices("even")[rank])
    for ours, one in zip(sharded, single, strict=True):
        assert torch.equal(ours, one) and not ours.any()
    empty = dpofast.linear_logprob(hidden[:0], weight[slices("even")[rank]], labels[:0], group=dist.group.WORLD)
    assert empty.logps.shape == (0, 7)


def a_budget_that_needs_token_chunks():
    rank, _ = rank_and_size()
    hidden, weight, _, labels = problem(bias=False, length=200)
    n, parts = int((labels != -100).sum()), slices("even")
    packed = n * H * 8  # the tokens, and the sums of their gradient
    for backend, train in itertools.product(backends(), ((True, True), (True, False))):

        def chunk(budget: int, backend=backend, train=train) -> int:
            """How many tokens at a time; 0: all, or the budget is too small."""
            with suppress(ValueError):
                sizes = n, H, parts[0].stop, hidden.dtype, weight.dtype, budget - packed
                request = Request(*sizes, *train, outputs=5, entropy=True, keeps=False)
                return choose(request, backend).token_chunk % n
            return 0

        budget = next(b for b in range(packed + 1024, 1 << 20, 1024) if chunk(b))
        check(*both(hidden, weight, None, labels, parts[rank], backend=backend, train=train, memory_budget=budget))


def a_loss_on_top():
    """linear_dpo_loss(group=) with a reference, and the gradient of a model below: the same as one process's."""
    rank, _ = rank_and_size()
    part = slices("even")[rank]
    weight, ref_weight, below = torch.randn(V, H), torch.randn(V, H), torch.randn(H, H)
    x, labels = torch.randn(4, 6, H), torch.randint(0, V, (4, 6))

    def run(rows, **group):
        a, w = below.clone().requires_grad_(), weight[rows].clone().requires_grad_()
        out = dpofast.linear_dpo_loss(
            x @ a, w, labels, ref_hidden=x, ref_weight=ref_weight[rows], metrics=True, use_weighting=True, **group
        )
        out.loss.backward()
        return [*out, *out.metrics().values(), a.grad, w.grad[part] if rows == slice(None) else w.grad]

    for ours, one in zip(run(part, group=dist.group.WORLD), run(slice(None)), strict=True):
        torch.testing.assert_close(ours, one, rtol=1e-5, atol=1e-6)


def a_group_of_some_ranks_and_a_mesh():
    """Two groups at work at once, each with its own problem; and the same group as a one-dimensional mesh."""
    rank, size = rank_and_size()
    if size == 2:
        mesh = init_device_mesh("cpu", (2,))
        check(*both(*problem(), slices("even")[rank], group=mesh))
        return
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    row, column = divmod(rank, 2)
    torch.manual_seed(row)
    hidden, weight, bias, labels = problem()
    cut = 50 + 70 * row
    check(*both(hidden, weight, bias, labels, (slice(0, cut), slice(cut, V))[column], group=mesh["tp"]))
    raises("group: got a DeviceMesh of 2 dimensions.*slice it", hidden, weight, labels, group=mesh)
    dist.barrier()


def a_dtensor_is_understood():
    """Rows sharded by DTensor, uneven by its rule, some ranks with none: used where they lie, and the gradient too."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    for n_vocab in (V, size + 1):
        hidden, weight, bias = torch.randn(5, H), torch.randn(n_vocab, H), torch.randn(n_vocab)
        labels = torch.randint(0, n_vocab, (5,))
        w, b = (distribute_tensor(x, mesh, [Shard(0)]).requires_grad_() for x in (weight, bias))
        h = hidden.clone().requires_grad_()
        whole = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        with forbidden_to_gather_more_than(5 * 8 * size):
            out = dpofast.linear_logprob(h, w, labels, bias=b).logps
            out.sum().backward()
        one = dpofast.linear_logprob(whole[0], whole[1], labels, bias=whole[2]).logps
        one.sum().backward()
        torch.testing.assert_close(out, one, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(h.grad, whole[0].grad, rtol=1e-5, atol=1e-6)
        for sharded, single in zip((w, b), whole[1:]):
            assert isinstance(sharded.grad, DTensor) and sharded.grad.placements == (Shard(0),)
            torch.testing.assert_close(sharded.grad.full_tensor(), single.grad, rtol=1e-5, atol=1e-6)
        replicated = distribute_tensor(hidden, mesh, [Replicate()]).requires_grad_()
        dpofast.linear_logprob(replicated, w, labels, bias=b).logps.sum().backward()
        torch.testing.assert_close(replicated.grad.to_local(), whole[0].grad, rtol=1e-5, atol=1e-6)
    raises(r"weight: got a DTensor.*expected its rows", h, distribute_tensor(weight, mesh, [Replicate()]), labels)
    raises(r"weight: got a DTensor.*expected its rows", h, distribute_tensor(weight, mesh, [Shard(1)]), labels)
    raises(r"bias: expected a DTensor", h, w, labels, bias=bias)
    raises(r"hidden: got a DTensor.*redistribute", distribute_tensor(hidden, mesh, [Shard(0)]), w, labels, bias=b)
    other = dist.new_group(list(range(size)))
    raises(r"group: not the one that weight", h, w, labels, bias=b, group=other)


class forbidden_to_gather_more_than:
    """No collective in its body moves more numbers than this, all ranks' together: O(tokens), not O(vocabulary)."""

    def __init__(self, numbers: int):
        self.numbers, self.moved = numbers, 0

    def __enter__(self):
        self.real = dist.all_gather, dist.all_reduce

        def all_gather(parts, x, **more):
            self.moved = max(self.moved, x.numel() * len(parts))
            return self.real[0](parts, x, **more)

        def all_reduce(x, **more):
            self.moved = max(self.moved, x.numel())
            return self.real[1](x, **more)

        dist.all_gather, dist.all_reduce = all_gather, all_reduce

    def __exit__(self, *_):
        dist.all_gather, dist.all_reduce = self.real
        assert 0 < self.moved <= max(self.numbers, 5 * H), self.moved


def compiled_whole():
    """torch.compile(fullgraph=True) around a step."""
    rank, _ = rank_and_size()
    part, (hidden, weight, _, labels) = slices("uneven")[rank], problem(bias=False)

    def step(h, w):
        return dpofast.linear_logprob(h, w, labels, group=dist.group.WORLD).logps.sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        h, w = hidden.clone().requires_grad_(), weight[part].clone().requires_grad_()
        loss = function(h, w)
        loss.backward()
        results.append((loss.detach(), h.grad, w.grad))
    for ours, compiled in zip(*results):
        assert torch.equal(ours, compiled)


def raises(match: str, *args, **options):
    with pytest.raises((TypeError, ValueError), match=match):
        dpofast.linear_logprob(*args, **options)


def errors_come_to_every_rank():
    """What is wrong on one rank is an error on all, at once, and the next call works."""
    rank, size = rank_and_size()
    hidden, weight, bias, labels = problem()
    part = slices("even")[rank]
    good = dict(hidden=hidden, weight=weight[part], labels=labels, bias=bias[part], group=dist.group.WORLD)
    last = rank == size - 1
    wrong_on_the_last = {
        "hidden": ("hidden: got dtype torch.int64", hidden.long()),
        "weight": (r"weight: got a tensor on the meta device", weight[part].to("meta")),
        "bias": (r"bias: got shape \(203,\)", bias),
        "softcap": ("softcap: got -1", -1.0),
        "backend": ("backend: ", "no such"),
        "memory_budget": ("memory_budget: ", 100),
    }
    for name, (message, value) in wrong_on_the_last.items():
        expected = message if last else f"group: its rank {size - 1} refuses the call: {message}"
        raises(expected, **{**good, name: value} if last else good)
    for name, message, value in (
        ("labels", f"group: its ranks 0 and {size - 1} differ in the labels.*data-parallel", labels.flip(0)),
        ("hidden", f"group: its ranks 0 and {size - 1} differ in the options, dtypes or gradients",
         hidden.clone().requires_grad_()),
        ("temperature", f"group: its ranks 0 and {size - 1} differ in the options", 0.5),
    ):  # fmt: skip
        raises(message, **{**good, name: value} if last else good)
    fewer = good | dict(hidden=hidden[:2], labels=labels[:2])
    raises(r"group: its ranks 0 and \d differ in the number of positions \(21 and 14\)", **fewer if last else good)
    raises("group: its ranks 0 and 1 have the same rows of weight.*203", **good | dict(weight=weight, bias=bias))
    raises(r"labels: got 203, expected values in \[0, 203\)", **good | dict(labels=torch.where(labels == 0, V, labels)))
    raises("group: got int, expected a torch.distributed.ProcessGroup", **good | dict(group=3))
    dpofast.linear_logprob(**good)
    errors_of_a_loss_come_too(good, size, last)


def errors_of_a_loss_come_too(good: dict, size: int, last: bool) -> None:
    """What the loss itself refuses, too, before any rank waits for the others."""
    good = good | dict(hidden=good["hidden"][:2], labels=good["labels"][:2], ref_logps=torch.zeros(2))
    wrong_on_the_last = {
        "labels": ("labels: got dtype", good["labels"].float()),
        "beta": ("beta: got -1", -1.0),
        "cu_seqlens": ("cu_seqlens: got shape", torch.tensor([0, 2])),
    }
    for name, (message, value) in wrong_on_the_last.items():
        expected = message if last else f"group: its rank {size - 1} refuses the call: {message}"
        with pytest.raises((TypeError, ValueError), match=expected):
            dpofast.linear_dpo_loss(**(good | {name: value} if last else good))
    assert dpofast.linear_dpo_loss(**good).loss.isfinite()


CASES = {case.__name__: case for case in (
    equals_one_process, every_rank_has_the_same_bits, only_one_of_them_trains, a_confident_token_keeps_its_precision,
    large_logits_and_infinities, no_completion_tokens, a_budget_that_needs_token_chunks, a_loss_on_top,
    a_group_of_some_ranks_and_a_mesh, a_dtensor_is_understood, compiled_whole, errors_come_to_every_rank,
)}  # fmt: skip

if __name__ == "__main__":
    launch.main(CASES)
