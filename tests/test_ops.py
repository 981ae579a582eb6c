"""The registered ops under PyTorch's own machinery: opcheck, torch.compile, double backward."""

from __future__ import annotations

import pytest
import torch
from numerics import STATISTICS

import dpofast
from dpofast import _ops, native
from dpofast.plan import Request, choose, cost

TRANSFORM = [0.7, 1.3, 4.0]  # temperature, logit scale, softcap
OPCHECK = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def inputs(dtype=torch.float32, grad: bool = True):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 6, 8, generator=g).to(dtype), torch.randn(40, 8, generator=g).to(dtype)
    bias, labels = torch.randn(40, generator=g).to(dtype), torch.randint(40, (2, 6), generator=g)
    labels[0, :3] = -100
    return *(x.requires_grad_(grad) for x in (hidden, weight, bias)), labels


def choice(backend: str, budget: int, train_head: bool = True, n: int = 12):
    sizes = n, 8, 40, torch.float32, torch.float32, budget
    return choose(Request(*sizes, to_weight=train_head, outputs=4, entropy=True), backend)


@pytest.mark.parametrize("with_bias", (False, True), ids=("", "bias"))
@pytest.mark.parametrize("outputs", (0, 15), ids=("logps", "all outputs"))
@pytest.mark.parametrize("train_head", (False, True), ids=("frozen head", "head"))
def test_opcheck_linear_logprob(backend, train_head, outputs, with_bias):
    _, weight, bias, _ = inputs()
    # Whole vectors of tokens, none masked: opcheck compares every byte of the cache, written or not.
    hidden, labels = torch.randn(2, 8, 8, requires_grad=True), torch.arange(16).view(2, 8)
    plan = choice(backend, 1 << 20, train_head, n=16)
    assert plan.name == ("cached" if train_head else "jacobian")
    args = (
        hidden, weight if train_head else weight.detach(),
        (bias if train_head else bias.detach()) if with_bias else None,
        labels, None, -100, -1, [*TRANSFORM, 0.0], outputs, backend, plan.name, plan.sizes, "",
    )  # fmt: skip
    torch.library.opcheck(_ops.linear_logprob, args, test_utils=OPCHECK)


@pytest.mark.parametrize("needs", ([True, True, True], [True, False, False], [False, True, False]))
@pytest.mark.parametrize("entropy", (False, True), ids=("logps", "entropy"))
def test_opcheck_linear_logprob_backward(backend, entropy, needs):
    hidden, weight, bias, labels = inputs(grad=False)
    plan = choice(backend, 1 << 20)
    options, how = (-100, -1, [*TRANSFORM, 0.0]), (backend, plan.name, plan.sizes, "")
    logps, lse, h, *_, cache = _ops.linear_logprob(hidden, weight, bias, labels, None, *options, 15, *how)
    c = torch.randn(2, 6)
    operands, saved = [hidden, weight, bias, labels, None], [logps, lse, h, cache]
    args = ([c, c if entropy else None], operands, saved, needs, *options, *how)
    torch.library.opcheck(_ops.linear_logprob_backward, args, test_utils=OPCHECK)


@pytest.mark.parametrize("outputs", (0, 15), ids=("logps", "all outputs"))
def test_opcheck_logprob(backend, outputs):
    labels = inputs()[3]
    logits = torch.randn(2, 6, 40, requires_grad=True)
    torch.library.opcheck(_ops.logprob, (logits, labels, -100, -1, TRANSFORM, outputs, backend), test_utils=OPCHECK)


@pytest.mark.parametrize("entropy", (False, True), ids=("logps", "entropy"))
def test_opcheck_logprob_backward(backend, entropy):
    labels = inputs()[3]
    logits, c = torch.randn(2, 6, 40), torch.randn(2, 6)
    options = (-100, -1, TRANSFORM)
    logps, lse, h, *_ = _ops.logprob(logits, labels, *options, 15, backend)
    args = ([c, c if entropy else None], logits, labels, [logps, lse, h], *options, backend)
    torch.library.opcheck(_ops.logprob_backward, args, test_utils=OPCHECK)


def step(hidden, weight, bias, labels, **options):
    """A training step's shape: something before the op, something after it."""
    out = dpofast.linear_logprob(hidden * 1.5, weight, labels, bias=bias, outputs=STATISTICS, softcap=5.0, **options)
    return (out.logps.sum(-1).sigmoid() + 0.1 * out.entropy.sum(-1)).sum(), out.is_top1


def gradients(function, args, **options):
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in args]
    loss, *_ = function(*leaves, **options)
    loss.backward()
    return [loss.detach(), *(x.grad for x in leaves if x.is_floating_point())]


def assert_same(got, want):
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_linear_logprob_compiles_to_one_graph(backend, dynamic):
    if dynamic and backend.startswith("cpu:") and backend != f"cpu:{native.cpu_isas()[0]}":
        pytest.skip("the graph is the same for every instruction set")
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    args = inputs()
    assert_same(gradients(compiled, args, backend=backend), gradients(step, args, backend=backend))
    hidden, weight, bias, labels = args
    other = hidden[:, :5], weight, bias, labels[:, 1:]
    assert_same(gradients(compiled, other, backend=backend), gradients(step, other, backend=backend))


def test_dynamic_shapes_compile_once():
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    hidden, weight, bias, labels = inputs()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (6, 5, 4):
            args = hidden[:, :n].clone(), weight, bias, labels[:, :n].clone()
            assert_same(gradients(compiled, args), gradients(step, args))


@pytest.mark.parametrize("how", ("frozen head", "small budget", "small budget, tiles", "default backend", "env"))
def test_other_ways_compile_too(how, monkeypatch):
    hidden, weight, bias, labels = inputs()
    options = {"memory_budget": "60KiB"} if "small" in how else {}
    options |= {"backend": "torch"} if "tiles" in how else {}
    if how == "env":
        monkeypatch.setenv("DPOFAST_CPU_ISA", "scalar")
    frozen = how == "frozen head"

    def loss(hidden):
        return step(hidden, weight.detach() if frozen else weight, None if frozen else bias, labels, **options)[0]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(loss(hidden), hidden)[0]
    torch.testing.assert_close(torch.autograd.grad(compiled(hidden), hidden)[0], want)


def test_score_compiles_to_one_graph():
    hidden, weight, _, labels = inputs(grad=False)

    def score(hidden, labels):
        return dpofast.linear_logprob(hidden, weight, labels).logps.sum(-1)

    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(hidden, labels), score(hidden, labels))


def test_everything_masked_and_bad_labels_in_a_compiled_step():
    hidden, weight, bias, labels = inputs()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    masked = hidden, weight, bias, torch.full_like(labels, -100)
    assert all((g == 0).all() for g in gradients(compiled, masked)[1:])
    with pytest.raises(ValueError, match="labels: got 40"):
        compiled(hidden, weight, bias, torch.full_like(labels, 40))


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_logprob_compiles_to_one_graph(backend, dynamic):
    def loss(logits, labels):
        out = dpofast.logprob(logits * 2, labels, outputs=("entropy",), temperature=0.7, backend=backend)
        return (out.logps.sum(-1).sigmoid() + 0.1 * out.entropy.sum(-1)).sum(), out

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    labels = inputs()[3]
    for n in (6, 5):
        args = torch.randn(2, n, 40), labels[:, :n]
        assert_same(gradients(compiled, args), gradients(loss, args))


def test_inplace_grad_refuses_to_compile():
    def loss(logits, labels):
        return dpofast.logprob(logits * 2, labels, inplace_grad=True).logps.sum()

    known = "inplace_grad: True is not possible under torch.compile"
    if torch.__version__ < "2.9":  # which names the type alone of what is raised while it traces
        known = "ExceptionVariable.*ValueError"
    with pytest.raises(Exception, match=known):
        torch.compile(loss, fullgraph=True, backend="aot_eager")(torch.randn(3, 8, requires_grad=True), torch.arange(3))


def test_inductor():
    """The default compiler, in bf16 under dynamic shapes."""
    args = inputs(torch.bfloat16)
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    assert_same(gradients(compiled, args), gradients(step, args))


def test_autocast_inside_a_compiled_step(backend):
    hidden, weight, bias, labels = inputs()

    def loss(hidden, weight, bias, labels):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return step(hidden, weight, bias, labels, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same(gradients(compiled, (hidden, weight, bias, labels)), gradients(loss, (hidden, weight, bias, labels)))


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_a_graph_that_is_planned_for_a_gpu(dynamic, monkeypatch):
    """The planner has more to try there, and a graph goes the same way through it for any number of tokens."""
    monkeypatch.setattr(cost, "_device_of", lambda device: cost.DEVICES["h100"])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    hidden, weight, bias, labels = inputs()
    for rows in (2, 1):
        given = hidden[:rows].detach().requires_grad_(), weight, bias, labels[:rows]
        got, want = (
            gradients(lambda *x: compiled(*x, backend="torch"), given),
            gradients(lambda *x: step(*x, backend="torch"), given),
        )
        assert_same(got, want)


@pytest.mark.parametrize("what", ("linear_logprob", "logprob", "logprob in place"))
def test_a_second_derivative_is_an_error(backend, what):
    hidden, weight, _, labels = inputs()
    if what == "linear_logprob":
        logps = dpofast.linear_logprob(hidden, weight, labels, backend=backend).logps
    else:
        logps = dpofast.logprob(hidden @ weight.T, labels, backend=backend, inplace_grad="place" in what).logps
    with pytest.raises(RuntimeError, match=r"second derivatives .*create_graph=True"):
        torch.autograd.grad(logps.sum(), hidden, create_graph=True)[0].sum().backward()


def test_checkpointing_recomputes_the_same(backend):
    hidden, weight, bias, labels = inputs()

    def loss(hidden):
        return step(hidden, weight, bias, labels, backend=backend)[0]

    want = torch.autograd.grad(loss(hidden), hidden)[0]
    again = torch.utils.checkpoint.checkpoint(loss, hidden, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again, hidden)[0], want, rtol=0, atol=0)
