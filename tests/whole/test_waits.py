"""Calls as a user makes them, beside a device that is not asked: nothing is waited for but the count of the labels."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dpofast
from dpofast import _ops, primitive
from dpofast.backends import registry
from dpofast.backends.tiled import TiledBackend
from dpofast.plan import Schedule, cost

aten = torch.ops.aten
QUESTIONS = {
    aten._local_scalar_dense.default: "a number",
    aten.nonzero.default: "a count",
    aten.lift_fresh.default: "a copy of Python numbers",
    aten.equal.default: "a comparison",
    aten.is_nonzero.default: "a condition",
}
PAIRS, WIDTH, H, V = 3, 8, 16, 300
H100 = cost.DEVICES["h100"]


class Asked(TorchDispatchMode):
    """What a GPU would have to finish for, in order."""

    def __init__(self):
        super().__init__()
        self.questions: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in QUESTIONS:
            self.questions.append(QUESTIONS[function])
        return function(*args, **(kwargs or {}))


@pytest.fixture
def gpu(request, emulator, monkeypatch):
    """Backend "cuda" on tensors of the CPU: the emulator's kernels, an H100's plans, and no look at labels."""
    engine = registry.added[emulator]
    monkeypatch.setitem(registry.added, "cuda", TiledBackend(engine.passes))
    monkeypatch.setattr(registry, "pair_losses", lambda _: engine.pair_losses)
    monkeypatch.setattr(_ops, "check_range", lambda *_: None)
    monkeypatch.setattr(_ops, "_is_observed", lambda *_: False)  # the shortest way, though somebody looks
    monkeypatch.setattr(cost, "device_of", lambda _: H100._replace(fuses=False))
    return monkeypatch


def batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * PAIRS, WIDTH, H, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=g).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(V, (2 * PAIRS, WIDTH), generator=g)


def asked_by(call, *leaves: torch.Tensor) -> list[str]:
    with Asked() as asked:
        torch.autograd.grad(call(), leaves)
    return asked.questions


HEADS = {  # block, token_chunk and numbers kept of a token
    "cached": (64, 20, V + 4 + 1),
    "mixed": (64, 20, 128 + 1),
    "recompute": (64, 20, 0),
    "recompute-split": (64, 20, 0),
    "jacobian": (64, 20, H + 1),
}


@pytest.mark.parametrize("ignore_index", (None, -100))
@pytest.mark.parametrize("statistics", ((), ("entropy", "is_top1", "mean_logits", "log_sum_sq_probs")))
@pytest.mark.parametrize("name", HEADS)
def test_a_head_waits_for_the_count_of_its_labels(gpu, name, statistics, ignore_index):
    block, chunk, kept = HEADS[name]

    def chosen(request, *_, **__):
        return Schedule.of(name, (block, chunk, request.n_tokens * kept * 4))

    gpu.setattr(primitive, "chosen", chosen)
    hidden, weight, labels = batch()
    weight.requires_grad_(name != "jacobian")
    if ignore_index is not None:
        labels[:, :3] = ignore_index

    def loss():
        how = {"outputs": statistics, "softcap": 20.0 if statistics else None}
        out = dpofast.linear_logprob(hidden, weight, labels, ignore_index=ignore_index, backend="cuda", **how)
        return out.logps.sum() + (out.entropy.sum() if statistics else 0.0)

    leaves = [x for x in (hidden, weight) if x.requires_grad]
    assert asked_by(loss, *leaves) == (["a count"] if ignore_index else [])


@pytest.mark.parametrize("head", ("trained", "frozen"))
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
def test_a_product_that_exponentiates_waits_for_nothing(gpu, head):
    from dpofast.kernels import linear_keep

    launched = []
    for kernel in ("pack_tokens", "linear_keep", "seal"):  # they wait for nothing, and the interpreter does
        gpu.setattr(linear_keep, kernel, lambda *_, kernel=kernel, **__: launched.append(kernel))
    gpu.setattr(cost, "device_of", lambda _: H100)
    hidden, weight, labels = batch(torch.bfloat16)
    leaves = (hidden,) if head == "frozen" else (hidden, weight)
    weight = weight.detach() if head == "frozen" else weight

    def loss():
        return dpofast.linear_logprob(hidden, weight, labels, ignore_index=None, backend="cuda").logps.sum()

    assert asked_by(loss, *leaves) == []
    assert launched == ["pack_tokens", "linear_keep", "seal"]


@pytest.mark.parametrize("layout", ("padded", "packed"))
@pytest.mark.parametrize("by", ("kernel", "table"))
def test_a_loss_waits_for_the_count_of_its_labels(gpu, layout, by):
    if by == "table":
        gpu.setattr(registry, "pair_losses", lambda _: ())
    hidden, weight, labels = batch()
    labels[:, :3] = -100
    ref_logps, packed = torch.randn(2 * PAIRS), {}
    given = hidden
    if layout == "packed":
        given, labels = hidden.flatten(0, 1), labels.flatten()
        packed = {"cu_seqlens": torch.arange(0, len(labels) + 1, WIDTH)}

    def loss():
        return dpofast.linear_dpo_loss(given, weight, labels, ref_logps=ref_logps, backend="cuda", **packed).loss

    assert asked_by(loss, hidden, weight) == ["a count"]


def test_logits_wait_for_the_count_of_their_labels(gpu):
    logits, labels = torch.randn(2 * PAIRS, WIDTH, V, requires_grad=True), batch()[2]
    for ignore_index in (None, -100):
        if ignore_index is not None:
            labels[:, :3] = ignore_index

        def loss(ignore_index=ignore_index):
            return dpofast.logprob(logits, labels, ignore_index=ignore_index, backend="cuda").logps.sum()

        assert asked_by(loss, logits) == (["a count"] if ignore_index else [])


@pytest.mark.parametrize("planted", (lambda x: x[[0]], lambda x: x.sum().item(), lambda x: torch.tensor([1.0]) + x))
def test_a_planted_question_is_seen(gpu, planted):
    hidden, weight, labels = batch()
    finish = TiledBackend.forward

    def forward(self, *args):
        planted(args[0].hidden.detach())
        return finish(self, *args)

    gpu.setattr(TiledBackend, "forward", forward)

    def loss():
        return dpofast.linear_logprob(hidden, weight, labels, ignore_index=None, backend="cuda").logps.sum()

    assert asked_by(loss, hidden, weight)


class Launches(TorchDispatchMode):
    """Operators that a GPU would run a kernel for: those that make no view and no memory alone."""

    FREE = ("empty", "empty_like", "new_empty", "detach", "_unsafe_view", "empty_strided")

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = any(isinstance(x, torch.Tensor) for x in torch.utils._pytree.tree_leaves(out))
        if made and function not in QUESTIONS and not function.is_view and function._opname not in self.FREE:
            self.names.append(function._opname)
        return out


def test_two_launches_and_two_of_rewards_follow_the_log_probs(gpu):
    """The kernel `sequence_dpo` and the mean; then one that scales the coefficients in the backward."""
    hidden, weight, labels = batch()
    labels[:, :3] = -100
    ref_logps, kernels = torch.randn(2 * PAIRS), []
    launch = registry.added["cuda"].passes._launch
    gpu.setattr(
        registry.added["cuda"].passes, "_launch", lambda name, *args: kernels.append(name) or launch(name, *args)
    )
    with Launches() as alone:
        logps = dpofast.linear_logprob(hidden, weight, labels, backend="cuda").logps
    of_head = list(kernels)
    with Launches() as whole:
        loss = dpofast.linear_dpo_loss(hidden, weight, labels, ref_logps=ref_logps, backend="cuda").loss
    assert kernels[len(of_head) :] == [*of_head, "sequence_dpo"]
    behind = whole.names[len(alone.names) :]
    assert whole.names[: len(alone.names)] == alone.names and behind[0] == "mean" and len(behind) == 3, behind
    with Launches() as backward_alone:
        torch.autograd.grad(logps, (hidden, weight), torch.ones_like(logps))
    with Launches() as backward:
        torch.autograd.grad(loss, (hidden, weight))
    more = len(backward.names) - len(backward_alone.names)
    assert more <= 2, (backward.names, backward_alone.names)  # one is the 1.0 that a loss's gradient begins with
