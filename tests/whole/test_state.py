"""What must not change a number: compilation, autocast, modes and transforms of autograd, copies, threads, forks."""

from __future__ import annotations

import copy
import io
import itertools
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import numerics
import pytest
import torch
from numerics import SCHEDULES, STATISTICS, problem
from torch import nn
from torch.autograd import forward_ad
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

import dpofast
from dpofast import DPOLoss, LinearDPOLoss, LinearLogprob, RunningMean, native, reference
from dpofast.integrations import liger

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
V, H = 40, 8


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Products this small are slowest on several threads."""
    with numerics.threads(1):
        yield


def tensors(rows: int = 4, width: int = 5, seed: int = 0, dtype: torch.dtype = FP32):
    """hidden, weight and labels of pairs, with a prompt."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, H, generator=g, dtype=FP64).to(dtype)
    weight = torch.randn(V, H, generator=g, dtype=FP64).to(dtype)
    labels = torch.randint(V, (rows, width), generator=g)
    labels[0, :2] = labels[1, -1] = -100
    return hidden, weight, labels


def same_bits(got, want) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


# torch.compile


class Policy(nn.Module):
    """A model and its loss, as a training step has them."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.head = nn.Embedding(V, H), nn.Linear(H, H), nn.Linear(H, V)
        self.loss = loss

    def forward(self, tokens, labels, ref_hidden=None, ref_weight=None, autocast: bool = False):
        with torch.autocast("cpu", dtype=BF16, enabled=autocast):
            hidden = self.mix(self.embed(tokens)).tanh()
            if isinstance(self.loss, DPOLoss):
                logits = self.head(hidden)
                ref = linear(ref_hidden, ref_weight)
                out = self.loss(logits, labels, ref_logits=ref)
            elif ref_hidden is None:
                out = self.loss(hidden, self.head.weight, labels, bias=self.head.bias)
            else:
                reference = {"ref_hidden": ref_hidden, "ref_weight": ref_weight}
                out = self.loss(hidden, self.head.weight, labels, bias=self.head.bias, **reference)
        return out.loss, out.metrics()


def step(forward, policy: Policy, *args, **kwargs):
    policy.zero_grad()
    loss, metrics = forward(*args, **kwargs)
    loss.backward()
    return loss.detach(), metrics, [p.grad.clone() for p in policy.parameters()]


STEPS = {
    "linear, metrics": (LinearDPOLoss(metrics=True), {}),
    "linear, autocast": (LinearDPOLoss(loss_type=["simpo", "sft"]), {"autocast": True, "free": True}),
    "linear, dynamic": (LinearDPOLoss(ld_alpha=0.5), {"dynamic": True}),
    "logits, dynamic, autocast": (DPOLoss(metrics=True), {"dynamic": True, "autocast": True}),
}


@pytest.mark.parametrize(("loss", "how"), STEPS.values(), ids=STEPS)
def test_a_training_step_with_a_loss_module_compiles_to_one_graph(loss, how):
    torch._dynamo.reset()  # its limit of recompilations counts those of other tests
    policy = Policy(loss)
    compiled = torch.compile(policy.forward, fullgraph=True, dynamic=how.get("dynamic"), backend="aot_eager")
    for rows, width in ((4, 5), (6, 3)):
        hidden, weight, labels = tensors(rows, width)
        ref = () if "free" in how else (hidden, weight)
        args = (labels.clamp(min=0), labels, *ref)
        got, want = (step(f, policy, *args, autocast="autocast" in how) for f in (compiled, policy))
        # the order in which bf16 roundings happen is the compiler's
        within = {"rtol": 2e-2, "atol": 2e-3} if "autocast" in how else {}
        torch.testing.assert_close(got, want, **within)
        assert all(grad.any() for grad in got[2])


def test_a_training_step_with_inductor_equals_eager():
    torch._dynamo.reset()
    policy = Policy(LinearDPOLoss())
    compiled = torch.compile(policy.forward, fullgraph=True)
    hidden, weight, labels = tensors()
    args = (labels.clamp(min=0), labels, hidden, weight)
    torch.testing.assert_close(step(compiled, policy, *args), step(policy, policy, *args))


# Autocast


@pytest.mark.parametrize("autocast", (None, BF16, FP16), ids=("off", "bf16", "fp16"))
def test_autocast_follows_linear_for_every_combination_of_dtypes(backend, autocast):
    """The backward outside the region, as torch recommends. Where F.linear wants one dtype, hidden's and weight's are
    promoted; fp64 is left alone."""
    everything = FP32, BF16, FP16, FP64
    hidden, weight, labels = tensors(2, 3, dtype=FP64)
    bias = torch.linspace(-1, 1, V, dtype=FP64)
    compared = 0
    for dtypes in itertools.product(everything, everything, (None, *everything)):
        values = [x.to(d) for x, d in zip((hidden, weight, bias), dtypes) if d]

        def leaves(values=values):
            return [x.clone().requires_grad_() for x in values]

        inputs, region = leaves(), torch.autocast("cpu", dtype=autocast or BF16, enabled=autocast is not None)
        with region:
            logps = dpofast.linear_logprob(
                inputs[0], inputs[1], labels, bias=inputs[2] if len(inputs) == 3 else None, backend=backend
            ).logps
        grads = torch.autograd.grad(logps.sum(), inputs)
        assert [g.dtype for g in grads] == [x.dtype for x in inputs], dtypes
        assert logps.dtype == (FP64 if FP64 in dtypes[:2] else FP32), dtypes
        inputs = leaves()
        try:
            with region:
                logits = linear(*inputs)
        except RuntimeError as error:
            assert "dtype" in str(error)
            continue
        assert logps.dtype == torch.promote_types(logits.dtype, FP32), dtypes
        # Trained as well: on a GPU what is kept for a backward comes from another pass over the logits.
        cast = [x.to(logits.dtype).requires_grad_() for x in values]
        cast_bias = cast[2] if len(cast) == 3 else None
        same_bits(logps, dpofast.linear_logprob(*cast[:2], labels, bias=cast_bias, backend=backend).logps)
        eps = torch.finfo(logits.dtype).eps
        wanted = reference.logprob(logits, labels).logps
        scale = float(logits.detach().abs().max())
        torch.testing.assert_close(logps, wanted, rtol=0, atol=4 * eps * scale + 1e-12)
        for got, want in zip(grads, torch.autograd.grad(wanted.sum(), inputs)):
            eps = max(eps, torch.finfo(want.dtype).eps)
            torch.testing.assert_close(got, want, rtol=0, atol=8 * eps * scale * float(want.abs().max() + 1))
        compared += 1
    assert compared == (8 if autocast is None else 38)


@pytest.mark.parametrize("autocast", (BF16, FP16), ids=("bf16", "fp16"))
def test_a_loss_under_autocast_is_that_of_inputs_cast_before_and_comes_out_in_fp32(autocast):
    hidden, weight, labels = tensors()
    with torch.autocast("cpu", dtype=autocast):
        out = dpofast.linear_dpo_loss(hidden, weight, labels, ref_hidden=hidden + 0.1, ref_weight=weight, metrics=True)
    cast = (x.to(autocast) for x in (hidden, weight))
    ref = {"ref_hidden": (hidden + 0.1).to(autocast), "ref_weight": weight.to(autocast)}
    same_bits(out._asdict(), dpofast.linear_dpo_loss(*cast, labels, **ref, metrics=True)._asdict())
    assert all(x.dtype == FP32 for x in out if x is not None and x.is_floating_point())


# Modes


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_no_mode_changes_a_number(backend, mode):
    """Statistics too; and nothing of it needs a gradient."""
    hidden, weight, labels = tensors()
    hidden.requires_grad_(), weight.requires_grad_()
    options = {"ref_hidden": hidden, "ref_weight": weight * 0.9, "metrics": True, "backend": backend}
    want = dpofast.linear_dpo_loss(hidden, weight, labels, **options)
    with mode():
        got = dpofast.linear_dpo_loss(hidden, weight, labels, **options)
        logits = dpofast.logprob(linear(hidden, weight), labels, backend=backend, outputs=STATISTICS)
    torch.testing.assert_close(got._asdict(), want._asdict(), rtol=1e-6, atol=1e-6)
    results = [x for x in (*got, *logits) if x is not None]
    assert want.loss.requires_grad and not any(x.requires_grad for x in results)
    assert all(x.is_inference() == (mode is torch.inference_mode) for x in results)


def test_inference_tensors_are_refused_where_torch_refuses_them_and_only_there():
    hidden, weight, labels = tensors()
    labels = labels.clamp(min=0)
    with torch.inference_mode():
        frozen_hidden, frozen_labels, ref = hidden.clone(), labels.clone(), torch.zeros(4)
    trained = weight.clone().requires_grad_()
    for h, y in ((frozen_hidden, labels), (hidden, frozen_labels)):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            dpofast.linear_logprob(h, trained, y)
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            linear(h, trained).log_softmax(-1).gather(-1, y.unsqueeze(-1))
    out = [dpofast.linear_dpo_loss(hidden, trained, labels, ref_logps=x).loss for x in (ref, torch.zeros(4))]
    same_bits(*(torch.autograd.grad(x, trained) for x in out))
    out = [
        dpofast.linear_dpo_loss(hidden, trained, labels, ref_hidden=x, ref_weight=weight).loss
        for x in (frozen_hidden, hidden)
    ]
    same_bits(*(torch.autograd.grad(x, trained) for x in out))


# Transforms of autograd


def of_hidden(module, **options):
    """Of either module's linear_logprob, and of the loss: functions of hidden alone."""
    _, weight, labels = tensors(dtype=FP64)
    return lambda hidden: module.linear_logprob(hidden, weight, labels, **options).logps


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda h: f(h).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones(4, 5, dtype=FP64))[0],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda h: f(h).sum())(x),
    "vmap": lambda f, x: torch.vmap(f)(torch.stack([x, 2 * x])),
    "vmap of grad": lambda f, x: torch.vmap(torch.func.grad(lambda h: f(h).sum()))(torch.stack([x, 2 * x])),
    "forward_ad": lambda f, x: dual(f, x),
    "second derivative": lambda f, x: twice(f, x),
}


def dual(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def twice(f, x):
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    return torch.autograd.grad(grad.pow(2).sum(), x)[0]


MUST_RAISE = {
    "jvp": "hidden: forward-mode differentiation .* is not implemented; use reverse mode",
    "jacfwd": "hidden: forward-mode differentiation .* is not implemented; use reverse mode",
    "forward_ad": "hidden: forward-mode differentiation .* is not implemented; use reverse mode",
    "second derivative": "second derivatives .*create_graph=True",
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_gives_the_references_numbers_or_an_error_but_never_others(backend, name):
    transform, x = TRANSFORMS[name], tensors(dtype=FP64)[0]
    f = of_hidden(dpofast, backend=backend)
    if name in MUST_RAISE:
        with pytest.raises(RuntimeError, match=MUST_RAISE[name]):
            transform(f, x)
        return
    try:
        got = transform(f, x)
    except RuntimeError as error:  # of torch.func, which has no rule for a custom op's backward
        assert "functorch" in str(error)
        return
    torch.testing.assert_close(got, transform(of_hidden(reference), x))


@pytest.mark.parametrize("argument", ("hidden", "weight", "bias", "logits", "logits in place"))
def test_no_tangent_is_dropped(argument):
    hidden, weight, labels = tensors()
    inputs = {"hidden": hidden, "weight": weight, "bias": torch.zeros(V)}
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=f"^{argument.split()[0]}: forward-mode"):
        if "logits" in argument:
            logits = forward_ad.make_dual(linear(hidden, weight), torch.ones(4, 5, V))
            dpofast.logprob(logits, labels, inplace_grad="place" in argument)
        else:
            inputs[argument] = forward_ad.make_dual(inputs[argument], torch.ones_like(inputs[argument]))
            dpofast.linear_logprob(**inputs, labels=labels)


def test_no_tangent_is_dropped_in_a_compiled_graph():
    torch._dynamo.reset()
    hidden = tensors()[0]
    f = of_hidden(dpofast)
    compiled = torch.compile(lambda x: torch.func.jvp(f, (x,), (x,))[1], backend="aot_eager")
    with pytest.raises(RuntimeError, match="hidden: forward-mode"):
        compiled(hidden.double())


def test_sums_and_losses_of_log_probabilities_take_tangents_as_plain_torch_does():
    logps = -tensors(dtype=FP64)[0][..., 0].abs()
    labels = tensors()[2]

    def loss(logps):
        sums = dpofast.sequence_logps(logps, labels, ld_alpha=0.5)
        return dpofast.preference_loss(*sums.chunk(2), torch.zeros(2).double(), torch.zeros(2).double())

    gradient = torch.func.grad(loss)(logps)
    _, tangent = torch.func.jvp(loss, (logps,), (logps,))
    torch.testing.assert_close(tangent, (gradient * logps).sum())
    many = torch.vmap(loss)(torch.stack([logps, 2 * logps]))
    torch.testing.assert_close(many, torch.stack([loss(logps), loss(2 * logps)]))


@pytest.mark.parametrize("name", ("linear_dpo_loss", "dpo_loss"))
def test_a_loss_has_no_second_derivative(backend, name):
    hidden, weight, labels = tensors()
    hidden.requires_grad_()
    first = (hidden, weight) if name == "linear_dpo_loss" else (linear(hidden, weight),)
    loss = getattr(dpofast, name)(*first, labels, ref_logps=torch.zeros(4), backend=backend).loss
    with pytest.raises(RuntimeError, match=r"second derivatives .*create_graph=True"):
        torch.autograd.grad(loss, hidden, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("reentrant", (False, True))
def test_a_checkpointed_loss_has_the_same_gradients(backend, reentrant):
    hidden, weight, labels = tensors()
    inputs = hidden.requires_grad_(), weight.requires_grad_()

    def loss(hidden, weight):
        return dpofast.linear_dpo_loss(hidden, weight, labels, ref_logps=torch.zeros(4), backend=backend).loss

    grads = []
    for out in (loss(*inputs), checkpoint(loss, *inputs, use_reentrant=reentrant)):
        out.backward()
        grads.append([x.grad for x in inputs])
        hidden.grad = weight.grad = None
    same_bits(*grads)


def test_functional_call_sees_the_parameters_it_is_given():
    hidden, weight, labels = tensors()
    policy = Policy(LinearDPOLoss())
    other = {name: 0.5 * p.detach() for name, p in policy.named_parameters()}
    args = labels.clamp(min=0), labels, hidden, weight
    got = torch.func.functional_call(policy, other, args)[0]
    replaced = copy.deepcopy(policy)
    replaced.load_state_dict(other)
    same_bits(got, replaced(*args)[0])
    assert got != policy(*args)[0]


@pytest.mark.parametrize("packed", (False, True))
def test_gradcheck_of_a_loss(backend, packed):
    hidden, weight, labels = tensors(4, 3, dtype=FP64)
    keep = labels != -100
    ends = torch.nn.functional.pad(keep.sum(-1).cumsum(0), (1, 0)) if packed else None
    hidden, labels = (hidden[keep], labels[keep]) if packed else (hidden, labels)
    module = LinearDPOLoss(loss_type=["sigmoid", "sft"], beta=0.7, softcap=5.0, backend=backend)

    def loss(hidden, weight):
        return module(hidden, weight, labels, ref_logps=torch.zeros(4, dtype=FP64), cu_seqlens=ends).loss

    assert torch.autograd.gradcheck(
        loss, (hidden.requires_grad_(), weight[:, :].requires_grad_()), fast_mode=True, nondet_tol=0
    )


# What one call leaves for another


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if "score" not in name])
def test_a_second_backward_of_any_schedule_gives_the_bits_of_the_first(backend, schedule):
    """And one in between, of another graph of the same sizes, changes nothing."""
    p = problem(150, 37, 1001, bias=True)
    how = numerics.forced(schedule, p, backend)

    def forward(scale):
        inputs = {
            name: (getattr(p, name) * scale).requires_grad_(name in how["train"])
            for name in ("hidden", "weight", "bias")
        }
        options = {"memory_budget": how["memory_budget"], "outputs": STATISTICS, "backend": backend}
        logps = dpofast.linear_logprob(**inputs, labels=p.labels, **options).logps
        return logps, [inputs[name] for name in how["train"]]

    def backward(logps, inputs, keep):
        return torch.autograd.grad((logps * p.grad_logps).sum(), inputs, retain_graph=keep)

    with numerics.recorded_choices() as choices:
        first, other = forward(1.0), forward(0.5)
    n = int((p.labels != -100).sum())
    assert len(choices) == 2 and all(SCHEDULES[schedule][1](choice, n) for choice in choices)
    once = backward(*first, keep=True)
    between = backward(*other, keep=False)
    same_bits(backward(*first, keep=False), once)
    same_bits(between, backward(*forward(0.5), keep=False))
    assert not torch.equal(once[0], between[0])


def test_gradients_and_caches_that_are_still_in_use_keep_their_pages(cpu_backend):
    """Both are over a MiB, where pages go from one call to the next (dpofast.backends._pages)."""
    problems = [problem(70, 64, 5000, seed=seed) for seed in (0, 1)]

    def forward(p):
        weight = p.weight.clone().requires_grad_()
        return dpofast.linear_logprob(p.hidden, weight, p.labels, backend=cpu_backend).logps.sum(), weight

    want = []
    for p in problems:
        logps, weight = forward(p)
        want.append(torch.autograd.grad(logps, weight)[0].clone())
    (a, weight_a), (b, weight_b) = map(forward, problems)  # two caches at once
    row = torch.autograd.grad(b, weight_b)[0][4321]  # a part of a gradient, which holds all of it
    array = torch.autograd.grad(a, weight_a)[0].numpy()
    for p in problems:
        torch.autograd.grad(*forward(p))
    same_bits(torch.from_numpy(array), want[0])
    same_bits(row, want[1][4321])


def test_hooks_see_and_change_gradients(backend):
    hidden, weight, labels = tensors()
    hidden.requires_grad_(), weight.requires_grad_()

    def loss():
        return dpofast.linear_dpo_loss(hidden, weight, labels, ref_logps=torch.zeros(4), backend=backend).loss

    want = torch.autograd.grad(loss(), (hidden, weight))
    seen = []
    hidden.register_hook(lambda grad: 2 * grad)

    def as_an_optimizer_in_the_backward_does(parameter):
        seen.append(parameter.grad)
        parameter.grad = None

    weight.register_post_accumulate_grad_hook(as_an_optimizer_in_the_backward_does)
    for _ in range(2):
        hidden.grad = None
        loss().backward()
        same_bits(hidden.grad, 2 * want[0])
        assert weight.grad is None
    same_bits(seen, [want[1]] * 2)


# Copies


def copies(module: nn.Module) -> list[nn.Module]:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)]


def call(module: nn.Module):
    hidden, weight, labels = tensors()
    if isinstance(module, LinearLogprob):
        return module(hidden, weight, labels)._asdict()
    if isinstance(module, LinearDPOLoss):
        return module(hidden, weight, labels, ref_logps=torch.zeros(4))._asdict()
    if isinstance(module, DPOLoss):
        return module(linear(hidden, weight), labels, ref_logps=torch.zeros(4))._asdict()
    if isinstance(module, liger.LigerFusedLinearKTOLoss):
        return module(hidden, weight, labels, preference_labels=torch.tensor([True, False, True, True]))
    ref = {"ref_input": hidden + 0.1, "ref_weight": weight} if getattr(module, "use_ref_model", False) else {}
    return module(weight, hidden, labels, **ref)


MODULES = {
    "LinearLogprob": LinearLogprob(temperature=0.7, outputs=STATISTICS),
    "LinearDPOLoss": LinearDPOLoss(
        loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5], margin={"sigmoid": 0.2}, ld_alpha=0.3, metrics=True
    ),
    "DPOLoss": DPOLoss(loss_type="ipo", softcap=4.0),
    "LigerDPO": liger.LigerFusedLinearDPOLoss(beta=0.3, loss_type=["sigmoid", "hinge"], loss_weights=[1.0, 0.5]),
    "LigerCPO": liger.LigerFusedLinearCPOLoss(beta=0.3, alpha=0.5),
    "LigerSimPO": liger.LigerFusedLinearSimPOLoss(gamma=0.7),
    "LigerORPO": liger.LigerFusedLinearORPOLoss(beta=0.3),
    "LigerKTO": liger.LigerFusedLinearKTOLoss(beta=0.3),
}


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_a_copy_of_a_loss_gives_the_same_bits(module):
    want = call(module)
    others = copies(module)
    for other in others:
        same_bits(call(other), want)
        assert repr(other) == repr(module)
    # no parameters and no buffers: a checkpoint of a model with such a loss in it loads where there was none
    assert not module.state_dict()
    others[0].load_state_dict(module.state_dict())
    others[0].to(torch.bfloat16).eval()
    same_bits(call(others[0]), want)


def test_a_copy_of_a_running_mean_goes_on_where_the_original_was():
    running, fresh = RunningMean(), RunningMean()
    running.update(torch.tensor([1.0, 2.0, 6.0]))
    buffer = io.BytesIO()
    torch.save(running.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer))
    others = [*copies(running), fresh]
    want = running.update(torch.tensor([-7.0]))
    assert want == 0.5
    for other in others:
        assert other.mean == 3.0 and other.count == 3  # a copy, not a view
        same_bits(other.update(torch.tensor([-7.0])), want)
    frozen = copy.deepcopy(running).eval()
    assert [pickle.loads(pickle.dumps(frozen)).update(torch.ones(1)) for _ in range(2)] == [0.5, 0.5]


@pytest.mark.parametrize("convert", (nn.Module.bfloat16, nn.Module.half, nn.Module.double, nn.Module.cpu))
def test_a_running_mean_stays_exact_in_a_model_that_is_converted(convert):
    """In bf16 the mean of 0, 1, ..., 999 stands still at 256."""
    model = nn.ModuleDict({"layer": nn.Linear(2, 2), "shift": RunningMean()})
    model["shift"].update(torch.tensor([0.1]))
    before = model["shift"].mean.clone()
    running = convert(model)["shift"]
    same_bits(running.mean, before)
    for reward in range(1000):
        running.update(torch.tensor([float(reward)]))
    assert running.mean.item() == pytest.approx((499500 + 0.1) / 1001, rel=1e-5)


def test_a_running_mean_may_be_fed_under_any_mode():
    running = RunningMean()
    with torch.inference_mode():
        rewards = torch.tensor([2.0, 4.0])
        running.update(rewards)
    running.update(rewards)
    with torch.autocast("cpu", dtype=BF16):
        running.update(torch.tensor([3.001, 3.002]))
    logps = torch.zeros(2, requires_grad=True)
    loss = dpofast.unpaired_preference_loss(
        logps, torch.zeros(2), torch.tensor([True, False]), loss_type="bco", reward_shift=running.eval()
    )
    loss.backward()
    assert running.mean.item() == pytest.approx((2 * 6 + 6.003) / 6, rel=1e-6)
    assert logps.grad.all() and not running.mean.requires_grad


# Threads


def threaded(backend: str, n_threads: int, threads_each: int, rounds: int) -> None:
    """Losses of different shapes, forward and backward, at once, against the same one after the other."""
    shapes = ((16, 64, 5000, FP32), (9, 17, 333, FP64), (13, 40, 1501, BF16), (16, 56, 5000, FP32))
    problems = []
    for seed, (width, h, v, dtype) in enumerate(shapes):
        g = torch.Generator().manual_seed(seed)
        hidden, weight = (torch.randn(*size, generator=g).to(dtype) for size in ((4, width, h), (v, h)))
        problems.append((hidden, weight, torch.randint(v, (4, width), generator=g)))

    def loss(p):
        hidden, weight = p[0].clone().requires_grad_(), p[1].clone().requires_grad_()
        out = dpofast.linear_dpo_loss(hidden, weight, p[2], ref_logps=torch.zeros(4), backend=backend, metrics=True)
        return [*(x.detach() for x in out if x is not None), *torch.autograd.grad(out.loss, (hidden, weight))]

    with numerics.threads(threads_each):
        want = [[x.clone() for x in loss(p)] for p in problems]
    start = threading.Barrier(n_threads)

    def work(k):
        torch.set_num_threads(threads_each)  # of this thread
        start.wait()
        for _ in range(rounds):
            same_bits(loss(problems[k]), want[k])

    with ThreadPoolExecutor(n_threads) as pool:
        assert list(pool.map(work, range(n_threads))) == [None] * n_threads


@pytest.mark.parametrize("n_threads", (2, 4))
def test_losses_in_several_threads_at_once_have_the_bits_of_one_after_the_other(cpu_backend, n_threads):
    threaded(cpu_backend, n_threads, threads_each=2, rounds=4)


@pytest.mark.parametrize("n_threads", (2, 4))
def test_losses_in_several_threads_at_once_on_backend_torch(n_threads):
    threaded("torch", n_threads, threads_each=1, rounds=4)


FORKED = """
    import multiprocessing, sys
    import torch, dpofast
    from dpofast import native

    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 20, 64, generator=g).requires_grad_()
    weight = torch.randn(5000, 64, generator=g).requires_grad_()  # d weight and cache are over a MiB: shared pages
    labels = torch.randint(5000, (4, 20), generator=g)

    def grads(backend, loss, scale=1.0):
        if loss:
            out = dpofast.linear_dpo_loss(hidden, weight, labels, ref_logps=torch.zeros(4), backend=backend).loss
        else:
            out = dpofast.linear_logprob(hidden, weight, labels, backend=backend).logps.sum()
        return torch.autograd.grad(scale * out, (hidden, weight))

    def in_child(backend, loss, queue):
        if loss:
            torch.set_num_threads(1)
        globals().pop("kept")  # now the child may write there
        queue.put([x.numpy().tobytes() for x in grads(backend, loss)])
        grads(backend, loss, scale=3.0)

    torch.set_num_threads(2)
    fork = multiprocessing.get_context("fork")
    cases = [(f"cpu:{isa}", False) for isa in native.cpu_isas()[:2]] + [("auto", True), ("torch", True)]
    for backend, loss in cases:
        torch.set_num_threads(1 if backend == "torch" else 2)
        kept = grads(backend, loss)
        want = [x.numpy().tobytes() for x in kept]
        queue = fork.Queue()
        child = fork.Process(target=in_child, args=(backend, loss, queue))
        child.start()
        got = queue.get(timeout=60)
        child.join(60)
        assert got == want, (backend, loss, "the child has other bits")
        assert child.exitcode == 0, (backend, loss, child.exitcode)
        assert [x.numpy().tobytes() for x in kept] == want, (backend, loss, "the child wrote into the parent's pages")
    print("all", len(cases))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_computes_after_its_parent_has(tmp_path):
    """The CPU kernels start their threads in each call, so that none is missing in the child. PyTorch's own OpenMP
    threads are: a child in which PyTorch itself runs on several hangs with or without dpofast, and needs
    ``torch.set_num_threads(1)``, as data-loading workers have it."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(FORKED)],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,  # beside the sources these would be imported
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.split() == ["all", str(len(native.cpu_isas()[:2]) + 2)], done.stderr
