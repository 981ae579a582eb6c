"""linear_logprob on every backend and schedule: accuracy, gradients, bits, properties, edges, errors."""

from __future__ import annotations

import itertools
import math

import hypothesis.strategies as st
import numerics
import pytest
import torch
from hypothesis import given, settings
from numerics import EVERYTHING, SCHEDULES, SHORT, STATISTICS, problem, run, run_forced

import dpofast
from dpofast import reference

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize("dtype", SHORT, ids=SHORT.values())

# completion tokens, H, V: a panel is 8 to 64 tokens, a vector 4 to 16, a block 192 vocabulary rows
SHAPES = {
    "one of each": (1, 1, 1),
    "one token": (1, 16, 300),
    "one vocabulary row": (20, 8, 1),
    "tiny and odd": (5, 3, 7),
    "whole panels and blocks": (64, 32, 384),
    "one more than whole": (65, 33, 385),
    "one fewer than whole": (63, 31, 383),
    "three panels, nine blocks": (130, 20, 1601),
    "deep": (17, 1100, 50),  # more k than one pass of gemm_panel takes, in bf16 too
}
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "temperature": {"temperature": 0.6},
    "logit_scale": {"logit_scale": -0.5},
    "all": EVERYTHING,
}


def linear_logprob(p, **kwargs):
    return run(dpofast.linear_logprob, p, **kwargs)


# Accuracy


@DTYPES
@pytest.mark.parametrize("options", ({}, EVERYTHING), ids=("plain", "all"))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_results_are_as_near_to_the_truth_as_plain_pytorchs(backend, shape, options, dtype):
    p = problem(*shape, dtype, entropy=bool(options), **options)
    numerics.assert_as_good_as_plain(p, linear_logprob(p, backend=backend))


@DTYPES
@pytest.mark.parametrize("entropy", (False, True), ids=("logps", "entropy"))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_option_is_as_near_to_the_truth_as_plain_pytorch(backend, options, entropy, dtype):
    p = problem(45, 24, 450, dtype, entropy=entropy, **options)
    numerics.assert_as_good_as_plain(p, linear_logprob(p, backend=backend))


@pytest.mark.parametrize(
    "dtypes", list(itertools.product(SHORT, SHORT)), ids=lambda pair: "-".join(SHORT[d] for d in pair)
)
def test_dtypes_of_hidden_and_weight_may_differ(backend, dtypes):
    p = problem(21, 19, 210, *dtypes, bias=True)
    got = linear_logprob(p, backend=backend)
    assert got["logps"].dtype == (FP64 if FP64 in dtypes else FP32)
    assert (got["d hidden"].dtype, got["d weight"].dtype, got["d bias"].dtype) == (*dtypes, dtypes[1])
    numerics.assert_as_good_as_plain(p, got)


@DTYPES
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_schedule_is_as_near_to_the_truth_as_plain_pytorch(backend, schedule, dtype):
    for entropy, options in ((False, {}), (False, EVERYTHING), (True, EVERYTHING)):
        p = problem(150, 37, 1001, dtype, entropy=entropy, **options)
        got = run_forced(schedule, p, backend)
        numerics.assert_as_good_as_plain(p, got, train=SCHEDULES[schedule][0])


@pytest.mark.parametrize("dtype", (FP32, BF16, FP64), ids=("fp32", "bf16", "fp64"))
@pytest.mark.parametrize("schedule", ("score", "cached", "jacobian", "recompute"))
def test_logits_that_climb_or_fall_through_the_vocabulary(backend, schedule, dtype):
    """The running maximum moves in every block: a little, by more than the slack it is given, and far."""
    for per_block in (5, 14, -14):
        p = problem(40, 16, 2003, dtype, bias=True)
        p.bias += (torch.arange(2003, dtype=FP64) / 192 * per_block).to(dtype)
        numerics.assert_as_good_as_plain(p, run_forced(schedule, p, backend), train=SCHEDULES[schedule][0])


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if "score" not in s])
def test_bf16_gradients_have_no_bias(backend, schedule):
    """Rounding errors must average out: a gradient that is systematically short, or shifted, does not."""
    train = SCHEDULES[schedule][0]
    p = problem(300, 64, 1500, BF16, bias=True)
    got, want = run_forced(schedule, p, backend), numerics.truth(p, train=train)
    other = numerics.plain(p, train=train)
    for name in (f"d {x}" for x in train):
        error, exact = got[name].double() - want[name], want[name]
        shrinkage = float((error * exact).sum() / (exact * exact).sum())
        assert abs(shrinkage) < 4e-4, (name, shrinkage)  # truncation to bf16 instead of rounding: 2e-3
        spread = float((other[name].double() - exact).pow(2).mean().sqrt()) / math.sqrt(exact.numel())
        assert abs(float(error.mean())) < 5 * spread, (name, float(error.mean()), spread)


def test_bf16_logps_have_no_bias(backend):
    p = problem(300, 64, 1500, BF16)
    error = linear_logprob(p, backend=backend)["logps"].double() - numerics.truth(p)["logps"]
    assert abs(float(error.mean())) < 1e-6 and float(error.abs().max()) < 2e-5  # logits in bf16: 2e-2


# Gradients


@pytest.mark.parametrize("entropy", (False, True), ids=("logps", "entropy"))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("exact_backend", ("cpu:scalar", "torch"))
@pytest.mark.parametrize("train", ("hidden weight bias", "hidden", "weight bias", "bias"))
def test_gradcheck(exact_backend, options, entropy, train):
    p = problem(5, 3, 11, FP64, **options)
    if train == "bias" and p.bias is None:
        pytest.skip("no bias")
    inputs = [
        None if x is None else x.requires_grad_(name in train.split())
        for name, x in (("hidden", p.hidden), ("weight", p.weight), ("bias", p.bias))
    ]

    def function(hidden, weight, bias):
        out = dpofast.linear_logprob(
            hidden, weight, p.labels, bias=bias, backend=exact_backend, outputs=("entropy",), **p.options
        )
        return (out.logps, out.entropy) if entropy else out.logps

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_all_schedules_give_the_same_gradients(backend, schedule):
    """In fp64, where only the order of sums differs."""
    p = problem(150, 21, 801, FP64, **EVERYTHING)
    got, want = run_forced(schedule, p, backend), numerics.truth(p, train=SCHEDULES[schedule][0])
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=1e-11, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def test_only_the_gradients_asked_for_are_computed(backend):
    """autograd.grad of one input, in a graph that would train all of them."""
    p = problem(40, 12, 230, FP64, **EVERYTHING)
    want = numerics.truth(p)
    inputs = {"hidden": p.hidden, "weight": p.weight, "bias": p.bias}
    for name in inputs:
        leaves = {k: x.detach().requires_grad_() for k, x in inputs.items()}
        logps = dpofast.linear_logprob(
            leaves["hidden"], leaves["weight"], p.labels, bias=leaves["bias"], backend=backend, **p.options
        ).logps
        (grad,) = torch.autograd.grad((logps * p.grad_logps).sum(), leaves[name])
        torch.testing.assert_close(grad, want[f"d {name}"])


def test_backward_twice_gives_the_same_and_accumulates(backend):
    p = problem(40, 12, 230)
    hidden, weight = p.hidden.requires_grad_(), p.weight.requires_grad_()
    loss = dpofast.linear_logprob(hidden, weight, p.labels, backend=backend).logps.sum()
    loss.backward(retain_graph=True)
    once = hidden.grad.clone(), weight.grad.clone()
    loss.backward()
    assert torch.equal(hidden.grad, 2 * once[0]) and torch.equal(weight.grad, 2 * once[1])


def test_a_weight_tied_to_an_embedding_gets_both_gradients(backend):
    weight = torch.randn(50, 8, dtype=FP64, requires_grad=True)
    tokens, labels = torch.randint(50, (2, 9)), torch.randint(50, (2, 9))
    labels[0, :4] = -100

    def grad(function, **kwargs):
        hidden = torch.nn.functional.embedding(tokens, weight).tanh()
        return torch.autograd.grad(function(hidden, weight, labels, **kwargs).logps.sum(), weight)[0]

    torch.testing.assert_close(
        grad(dpofast.linear_logprob, backend=backend), grad(reference.linear_logprob), rtol=1e-11, atol=1e-12
    )


# Confident tokens


def confident(distance: float, n: int = 20, v: int = 300):
    """Tokens whose label leads every other logit by exactly ``distance``; products are exact in any dtype."""
    h = 8
    labels = torch.arange(n) * 13 % v
    weight = torch.zeros(v, h)
    weight[:, 1] = torch.arange(v) % 5 - 2.0
    hidden = torch.zeros(n, h)
    hidden[:, 0] = 1
    bias = torch.zeros(v)
    # each token has one label of its own: column 2 + t % 6 holds the lead
    for t in range(n):
        weight[labels[t], 2 + t % 6] = distance if t < 6 else 0
    keep = slice(0, 6)
    hidden[torch.arange(n), 2 + torch.arange(n) % 6] = 1
    return hidden[keep], weight, bias, labels[keep]


@pytest.mark.parametrize("distance", (34.0, 50.0, 80.0))
@pytest.mark.parametrize("schedule", ("cached", "jacobian", "recompute"))
def test_a_confident_label_keeps_its_relative_precision(backend, schedule, distance):
    """1 - p is below 1e-12: plain fp32 gives log p = 0 and no gradient at all."""
    hidden, weight, bias, labels = confident(distance)
    n = labels.numel()
    p = numerics.Problem(hidden, weight, bias, labels, torch.ones(n), None, {})
    got = run_forced(schedule, p, backend, outputs=())
    exact = -torch.log1p(299 * torch.exp(torch.tensor(-distance, dtype=FP64))).expand(n)
    assert float(exact.exp()[0]) > 1 - 1e-12
    torch.testing.assert_close(got["logps"].double(), exact, rtol=1e-5, atol=0)

    # d logp / d hidden = (1 - p) (W[label] - mean of the others' W)
    others = (weight.double().sum(0) - weight[labels].double()) / 299
    want = -torch.expm1(exact)[:, None] * (weight[labels].double() - others)
    lead = want.abs() > 1e-3 * want.abs().amax(-1, keepdim=True)
    assert (got["d hidden"][lead].sign() == want[lead].sign()).all() and lead.any(-1).all()
    torch.testing.assert_close(got["d hidden"].double()[lead], want[lead], rtol=1e-4, atol=0)

    plain = numerics.plain(p, outputs=())
    assert (plain["logps"] == 0).all() and (plain["d hidden"].abs() < 1e-6 * want.abs().amax()).any()


# Bits


@pytest.mark.parametrize("dtype", (FP32, BF16, FP64), ids=("fp32", "bf16", "fp64"))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_bits_depend_neither_on_the_threads_nor_on_the_run(cpu_backend, schedule, dtype):
    p = problem(140, 40, 1201, dtype, bias=True)
    choices = []
    with numerics.threads(1):
        first = run_forced(schedule, p, cpu_backend, choices=choices)
    for n_threads in (2, 3, 4, 4, 1):
        with numerics.threads(n_threads):
            again = run_forced(schedule, p, cpu_backend, replay=choices[0])
        for name, x in first.items():
            assert torch.equal(again[name], x), f"{name} differs with {n_threads} threads"


def test_the_same_bits_come_out_of_every_run(backend):
    p = problem(140, 40, 1201, BF16, bias=True)
    first, second = linear_logprob(p, backend=backend), linear_logprob(p, backend=backend)
    for name, x in first.items():
        assert torch.equal(second[name], x), name


@pytest.mark.parametrize("dtype", (FP32, BF16, FP64), ids=("fp32", "bf16", "fp64"))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_padding_changes_no_bit(cpu_backend, schedule, dtype):
    p = problem(70, 24, 601, dtype, masked=False, **EVERYTHING)
    want = run_forced(schedule, p, cpu_backend)
    g = torch.Generator().manual_seed(1)
    where = torch.randperm(160, generator=g)[:70].sort().values

    def padded(x, fill):
        out = torch.full((160, *x.shape[1:]), fill, dtype=x.dtype)
        out[where] = x
        return out

    q = numerics.dataclasses.replace(
        p, hidden=padded(p.hidden, math.nan), labels=padded(p.labels, -100), grad_logps=padded(p.grad_logps, math.pi)
    )
    got = run_forced(schedule, q, cpu_backend)
    for name, x in want.items():
        rows = got[name] if name in ("d weight", "d bias") else got[name][where]
        assert torch.equal(rows, x), name
    ignored = torch.ones(160, dtype=torch.bool)
    ignored[where] = False
    for name in set(want) - {"d weight", "d bias"}:
        assert (got[name][ignored] == 0).all(), name


def test_without_an_ignore_index_every_label_counts(backend):
    p = problem(40, 12, 230, masked=False)
    want = linear_logprob(p, backend=backend)
    p.options["ignore_index"] = None
    got = linear_logprob(p, backend=backend)
    assert all(torch.equal(got[name], x) for name, x in want.items())
    p.labels[3] = -100
    with pytest.raises(ValueError, match=r"labels: got -100, expected values in \[0, 230\)"):
        linear_logprob(p, backend=backend)


# Properties


quick = settings(max_examples=6, deadline=None, derandomize=True)
seeds = st.integers(0, 2**20)


def small(seed: int, dtype=FP64, **options) -> numerics.Problem:
    g = torch.Generator().manual_seed(seed)
    n, h, v = (int(torch.randint(1, top, (), generator=g)) for top in (90, 40, 500))
    return problem(n, h, v, dtype, seed=seed, **options)


def assert_same(got, want, rtol=1e-9, atol=1e-10):
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@quick
@given(seed=seeds, shift=st.floats(-50, 50))
def check_shift(backend, seed, shift):
    p = small(seed, bias=True)
    got = linear_logprob(numerics.dataclasses.replace(p, bias=p.bias + shift), backend=backend)
    want = linear_logprob(p, backend=backend)
    want["mean_logits"] = torch.where(p.labels != -100, want["mean_logits"] + shift, 0)
    assert_same(got, want)


@quick
@given(seed=seeds)
def check_rows(backend, seed):
    p = small(seed, entropy=True, **EVERYTHING)
    order = torch.randperm(p.labels.numel(), generator=torch.Generator().manual_seed(seed))
    q = numerics.dataclasses.replace(
        p, hidden=p.hidden[order], labels=p.labels[order], grad_logps=p.grad_logps[order],
        grad_entropy=p.grad_entropy[order],
    )  # fmt: skip
    want = linear_logprob(p, backend=backend)
    want = {name: x if name in ("d weight", "d bias") else x[order] for name, x in want.items()}
    assert_same(linear_logprob(q, backend=backend), want)


@quick
@given(seed=seeds)
def check_vocabulary(backend, seed):
    p = small(seed, entropy=True, **EVERYTHING)
    order = torch.randperm(p.weight.shape[0], generator=torch.Generator().manual_seed(seed))
    labels = torch.where(p.labels == -100, -100, order.argsort()[p.labels.clamp(min=0)])
    q = numerics.dataclasses.replace(p, weight=p.weight[order], bias=p.bias[order], labels=labels)
    want = linear_logprob(p, backend=backend)
    want = {name: x[order] if name in ("d weight", "d bias") else x for name, x in want.items()}
    assert_same(linear_logprob(q, backend=backend), want)


@quick
@given(
    seed=seeds,
    budget=st.integers(1 << 12, 1 << 24),
    train=st.sampled_from([(), ("hidden",), ("hidden", "weight", "bias")]),
)
def check_budget(backend, seed, budget, train):
    p = small(seed, **EVERYTHING)
    try:
        got = linear_logprob(p, train=train, backend=backend, memory_budget=budget)
    except ValueError as error:
        assert "memory_budget" in str(error) and budget < 1 << 21
        return
    assert_same(got, linear_logprob(p, train=train, backend=backend))


@quick
@given(seed=seeds)
def check_concatenation(backend, seed):
    p = small(seed, FP32, **EVERYTHING)
    cut = p.labels.numel() // 2
    both = linear_logprob(p, backend=backend)
    halves = [
        linear_logprob(
            numerics.dataclasses.replace(
                p, hidden=p.hidden[part], labels=p.labels[part], grad_logps=p.grad_logps[part]
            ),
            backend=backend,
        )
        for part in (slice(0, cut), slice(cut, None))
    ]
    for name, x in both.items():
        if name in ("d weight", "d bias"):
            torch.testing.assert_close(halves[0][name] + halves[1][name], x, rtol=1e-4, atol=1e-4)
        elif backend == "torch" or backend.endswith(":gpu"):  # BLAS picks its kernel by the shape
            torch.testing.assert_close(torch.cat([half[name] for half in halves]), x, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(torch.cat([half[name] for half in halves]), x), name


@quick
@given(seed=seeds)
def check_masked(backend, seed):
    p = small(seed, FP32, entropy=True, **EVERYTHING)
    got = linear_logprob(p, backend=backend)
    masked = p.labels == -100
    assert masked.any() and all((got[name][masked] == 0).all() for name in ("logps", "d hidden", *STATISTICS))
    assert (got["d hidden"][~masked].abs().sum(-1) > 0).all() or p.weight.shape[0] == 1


@pytest.mark.parametrize(
    "check", (check_shift, check_rows, check_vocabulary, check_budget, check_concatenation, check_masked)
)
def test_property(backend, check):
    check(backend=backend)


# Edges


def test_no_tokens_at_all(backend):
    hidden, weight = torch.randn(2, 0, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    out = dpofast.linear_logprob(
        hidden, weight, torch.empty(2, 0, dtype=torch.long), backend=backend, outputs=STATISTICS
    )
    assert all(x.shape == (2, 0) for x in out if x is not None)
    out.logps.sum().backward()
    assert hidden.grad.shape == (2, 0, 8) and torch.equal(weight.grad, torch.zeros(20, 8))


@pytest.mark.parametrize("train", (("hidden", "weight", "bias"), ("hidden",)), ids=("all", "frozen head"))
def test_everything_masked_is_a_differentiable_zero(backend, train):
    p = problem(12, 8, 30, bias=True, entropy=True)
    got = linear_logprob(
        numerics.dataclasses.replace(p, labels=torch.full_like(p.labels, -100)), backend=backend, train=train
    )
    assert {f"d {name}" for name in train} < got.keys()
    assert all((x == 0).all() for x in got.values())


@pytest.mark.parametrize("v", (1, 2, 191, 192, 193, 385))
def test_first_and_last_label(backend, v):
    p = problem(10, 8, v, masked=False)
    p.labels[::2], p.labels[1::2] = 0, v - 1
    numerics.assert_as_good_as_plain(p, linear_logprob(p, backend=backend))


@pytest.mark.parametrize("bad", (50, 51, 1 << 40, -1, -101))
@pytest.mark.parametrize("ignored", (-100, 7))
def test_a_label_out_of_range_is_an_error_and_nothing_is_written(backend, bad, ignored):
    labels = torch.tensor([[3, 4], [bad, 7]])
    hidden, weight = torch.randn(2, 2, 8, requires_grad=True), torch.randn(50, 8)
    with pytest.raises(ValueError, match=rf"labels: got {bad}, expected values in \[0, 50\).*ignore_index={ignored}"):
        dpofast.linear_logprob(hidden, weight, labels, ignore_index=ignored, backend=backend)
    assert hidden.grad is None


def test_ignore_index_is_free(backend):
    p = problem(12, 8, 30, FP64)
    want = linear_logprob(p, backend=backend)
    for ignored in (-1, 30, 10**9, 0):
        labels = torch.where(p.labels == -100, ignored, p.labels)
        q = numerics.dataclasses.replace(p, labels=labels, options={"ignore_index": ignored})
        got = linear_logprob(q, backend=backend)
        if ignored:
            assert_same(got, want)
        assert_same(got, numerics.truth(q))


def with_bias(values: dict[int, float], v: int = 400, n: int = 9, dtype=FP32, **options) -> numerics.Problem:
    """Logits that are ``values`` where named, and finite elsewhere."""
    p = problem(n, 8, v, dtype, bias=True, **options)
    for at, value in values.items():
        p.bias[at] = value
    return p


SPECIAL = {
    "first logit -inf": {0: -math.inf},
    "last logit -inf": {399: -math.inf},
    "a whole block -inf": dict.fromkeys(range(192), -math.inf),
    "all but one -inf": dict.fromkeys([i for i in range(400) if i != 250], -math.inf),
    "all -inf": dict.fromkeys(range(400), -math.inf),
    "+inf": {7: math.inf},
    "+inf in the last block": {399: math.inf},
    "NaN": {7: math.nan},
    "NaN in the last block": {399: math.nan},
    "NaN and +inf": {7: math.nan, 300: math.inf},
    "-inf and NaN": {0: -math.inf, 398: math.nan},
    "huge": {5: 3e38},
}


@pytest.mark.parametrize("schedule", ("score", "cached", "recompute", "jacobian"))
@pytest.mark.parametrize("values", SPECIAL.values(), ids=SPECIAL)
def test_special_logits_give_what_pytorch_gives(backend, values, schedule):
    p = with_bias(values)
    p.labels[p.labels != -100] = torch.tensor([0, 7, 191, 192, 250, 300, 399, 398, 5])
    outputs = () if schedule == "jacobian" else ("log_sum_sq_probs", "mean_logits")
    got = run_forced(schedule, p, backend, outputs)
    train = SCHEDULES[schedule][0]
    want = numerics.truth(p, train=train, outputs=outputs)
    other = numerics.plain(p, train=train, outputs=outputs)
    limits = {}
    for name in ("logps", "d hidden", "d weight", "d bias"):
        if name not in want:
            continue
        numerics.assert_same_special_values(name, got[name], other[name])
        error = (other[name].double() - want[name].double()).abs()
        limits[name] = 2 * float(error.nan_to_num(0, 0, 0).max()) + 1e-5 * (1 + numerics._scale(want[name]))
    numerics.assert_close({k: got[k] for k in limits}, {k: want[k] for k in limits}, limits)


MINUS_INF = {"some": (0, 5, *range(192, 384), 700, 1000), "all but one": (*range(500), *range(501, 1001))}


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if "score" not in s])
@pytest.mark.parametrize("where", MINUS_INF.values(), ids=MINUS_INF)
def test_logits_of_minus_inf_under_gradients_of_logps_and_entropy_at_once(backend, where, schedule):
    """p log p is 0 there, with gradient 0, and a label there has a gradient as any; 0 * -inf would be NaN."""
    p = problem(150, 37, 1001, bias=True, entropy=True)
    p.bias[list(where)] = -math.inf
    counted = torch.nonzero(p.labels != -100).squeeze(-1)
    p.labels[counted[:4]] = torch.tensor([0, 200, 500, 1000])
    got = run_forced(schedule, p, backend, ("entropy",))
    assert all(x.isfinite().all() for name, x in got.items() if name != "logps")
    numerics.assert_as_good_as_plain(p, got, train=SCHEDULES[schedule][0], outputs=("entropy",))


@pytest.mark.parametrize("schedule", ("cached", "recompute", "jacobian"))
def test_logits_far_from_zero_cost_no_more_than_in_plain_pytorch(backend, schedule):
    p = with_bias(dict.fromkeys(range(400), -3e4))
    numerics.assert_as_good_as_plain(p, run_forced(schedule, p, backend, ()), train=SCHEDULES[schedule][0], outputs=())


@pytest.mark.parametrize("dtype", (FP32, BF16, FP64), ids=("fp32", "bf16", "fp64"))
def test_a_weight_row_of_minus_inf_spoils_only_its_column_of_d_hidden(backend, dtype):
    """hidden > 0 in a column where one row of W is -inf: p of that row is 0, as in PyTorch."""
    p = problem(11, 8, 200, dtype, masked=False, bias=True)
    p.hidden[:, 0] = p.hidden[:, 0].abs() + 0.5
    p.weight[5, 0] = -math.inf
    p.labels[p.labels == 5] = 6
    got, want = linear_logprob(p, backend=backend), numerics.plain(p)
    for name in ("logps", "d hidden", "d weight", "d bias"):
        numerics.assert_same_special_values(name, got[name], want[name])


@pytest.mark.parametrize("softcap", (None, 5.0))
def test_a_nan_token_spoils_only_its_own_row(backend, softcap):
    p = problem(70, 8, 300, masked=False, softcap=softcap)
    p.hidden[33] = math.nan
    got = linear_logprob(p, backend=backend)
    want = numerics.plain(p)
    for name in ("logps", "d hidden", "d weight"):
        numerics.assert_same_special_values(name, got[name], want[name])
    assert not got["is_top1"][33]


def test_is_top1_takes_the_first_maximum(backend):
    weight = torch.tensor([1.0, 2, 2, 0, 2]).repeat(80)[:, None]
    labels = torch.arange(400)
    out = dpofast.linear_logprob(torch.ones(400, 1), weight, labels, outputs=("is_top1",), backend=backend)
    assert torch.equal(out.is_top1, labels == 1)
    out = dpofast.linear_logprob(torch.zeros(400, 1), weight, labels, outputs=("is_top1",), backend=backend)
    assert torch.equal(out.is_top1, labels == 0)


STRIDED = {
    "expanded": lambda x: x[:1].expand(6, 4, 10),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns apart": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "columns far apart": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "part of a buffer": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 1))[:, 1:-1, 3:-2],
    "every other row": lambda x: x.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize("dtype", (FP32, BF16, FP64), ids=("fp32", "bf16", "fp64"))
@pytest.mark.parametrize("make", STRIDED.values(), ids=STRIDED)
def test_hidden_of_any_strides(backend, make, dtype):
    p = problem(24, 10, 210, dtype, masked=False)
    labels = p.labels.view(6, 4).clone()
    labels[1, 2] = labels[5] = -100
    hidden = make(p.hidden.view(6, 4, 10))
    c = p.grad_logps.view(6, 4)
    views = numerics.dataclasses.replace(p, hidden=hidden, labels=labels, grad_logps=c)
    plain = numerics.dataclasses.replace(views, hidden=hidden.contiguous())
    got, want = linear_logprob(views, backend=backend), linear_logprob(plain, backend=backend)
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", (FP32, BF16, FP64), ids=("fp32", "bf16", "fp64"))
@pytest.mark.parametrize("schedule", ("cached", "jacobian", "recompute", "score"))
def test_weight_of_any_strides(backend, schedule, dtype):
    p = problem(70, 12, 401, dtype, bias=True)
    for weight in (
        p.weight.T.contiguous().T,
        torch.nn.functional.pad(p.weight, (1, 3))[:, 1:-3],
        p.weight.repeat_interleave(3, 0)[::3],
        p.weight.repeat_interleave(2, 1)[:, ::2],
    ):
        assert not weight.is_contiguous()
        q = numerics.dataclasses.replace(p, weight=weight, bias=p.bias.repeat_interleave(2)[::2])
        numerics.assert_as_good_as_plain(q, run_forced(schedule, q, backend), train=SCHEDULES[schedule][0])


@pytest.mark.parametrize("dtype", (torch.int32, torch.int16, torch.uint8, torch.int64))
def test_labels_of_any_integer_type_and_strides(backend, dtype):
    p = problem(24, 10, 250, masked=False)
    want = linear_logprob(p, backend=backend)["logps"]
    labels = p.labels.to(dtype).repeat_interleave(2)[::2]
    assert not labels.is_contiguous()
    out = dpofast.linear_logprob(p.hidden, p.weight, labels, backend=backend)
    assert torch.equal(out.logps, want)


def test_no_uint8_label_is_taken_for_ignore_index(backend):
    """-100 is 156 in eight bits."""
    labels = torch.tensor([156, 3], dtype=torch.uint8)
    out = dpofast.linear_logprob(torch.ones(2, 4), torch.ones(200, 4), labels, backend=backend)
    torch.testing.assert_close(out.logps, torch.full((2,), -math.log(200)))


def test_one_token_without_leading_dimensions(backend):
    hidden, weight = torch.randn(8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    out = dpofast.linear_logprob(hidden, weight, torch.tensor(3), backend=backend, outputs=STATISTICS)
    want = (hidden @ weight.T).log_softmax(-1)[3]
    assert out.logps.shape == () and out.entropy.shape == ()
    torch.testing.assert_close(out.logps, want)
    got = torch.autograd.grad(out.logps, (hidden, weight))
    for x, y in zip(got, torch.autograd.grad(want, (hidden, weight))):
        torch.testing.assert_close(x, y)


def test_more_leading_dimensions(backend):
    p = problem(24, 10, 50, masked=False)
    want = linear_logprob(p, backend=backend)["logps"]
    out = dpofast.linear_logprob(p.hidden.view(2, 1, 3, 4, 10), p.weight, p.labels.view(2, 1, 3, 4), backend=backend)
    assert torch.equal(out.logps, want.view(2, 1, 3, 4))


@pytest.mark.parametrize("dtype", (BF16, FP16), ids=("bf16", "fp16"))
@pytest.mark.parametrize("inputs", ((FP32, FP32), (FP32, BF16), (BF16, FP16)), ids=("fp32", "mixed", "16 bits"))
def test_autocast_is_the_same_as_casting_first(backend, inputs, dtype):
    p = problem(30, 12, 230, *inputs, bias=True)
    want = linear_logprob(p.to(dtype), backend=backend)
    with torch.autocast("cpu", dtype=dtype):
        got = linear_logprob(p, backend=backend)  # its backward inside the region too
    for name in ("logps", "entropy", "is_top1"):
        assert torch.equal(got[name], want[name]), name
    for name in ("hidden", "weight", "bias"):
        assert got[f"d {name}"].dtype == getattr(p, name).dtype
        assert torch.equal(got[f"d {name}"], want[f"d {name}"].to(getattr(p, name).dtype)), name


def test_autocast_leaves_fp64_alone(backend):
    p = problem(30, 12, 230, FP64, bias=True)
    want = linear_logprob(p, backend=backend)
    with torch.autocast("cpu", dtype=BF16):
        got = linear_logprob(p, backend=backend)
    for name, x in want.items():
        assert torch.equal(got[name], x), name


def test_the_bias_may_have_a_dtype_of_its_own(backend):
    p = problem(30, 12, 230, BF16, bias=True)
    q = numerics.dataclasses.replace(p, bias=p.bias.float() + 0.01)
    got = linear_logprob(q, backend=backend)
    want = numerics.truth(q)
    torch.testing.assert_close(got["logps"].double(), want["logps"], rtol=1e-5, atol=1e-5)
    assert got["d bias"].dtype == FP32


def test_outputs_come_only_when_asked_for(backend):
    p = problem(12, 8, 30)
    want = linear_logprob(p, backend=backend)
    for names in itertools.chain.from_iterable(itertools.combinations(reference.OUTPUTS, k) for k in range(6)):
        out = dpofast.linear_logprob(p.hidden, p.weight, p.labels, outputs=names, backend=backend)
        for name in reference.OUTPUTS:
            x = getattr(out, name)
            if name not in names:
                assert x is None
            elif name == "dropped_mass":
                assert torch.equal(x, torch.zeros_like(out.logps))
            else:
                assert torch.equal(x, want[name]), name


def test_only_logps_and_entropy_are_differentiable(backend):
    hidden = torch.randn(5, 8, requires_grad=True)
    out = dpofast.linear_logprob(
        hidden, torch.randn(20, 8), torch.arange(5), outputs=reference.OUTPUTS, backend=backend
    )
    differentiable = {name for name, x in out._asdict().items() if x.requires_grad}
    assert differentiable == {"logps", "entropy"}


def test_no_grad_mode_keeps_nothing(backend):
    hidden = torch.randn(5, 8, requires_grad=True)
    with torch.no_grad(), numerics.recorded_choices() as choices:
        out = dpofast.linear_logprob(hidden, torch.randn(20, 8), torch.arange(5), backend=backend)
    assert choices[0].name == "score" and not out.logps.requires_grad


def test_subclasses_of_weight_work(backend):
    head = torch.nn.Linear(8, 20)
    out = dpofast.linear_logprob(torch.randn(3, 8), head.weight, torch.arange(3), bias=head.bias, backend=backend)
    out.logps.sum().backward()
    assert head.weight.grad.shape == (20, 8) and head.bias.grad.shape == (20,)


# Errors


H8, W8, Y8 = torch.zeros(2, 3, 8), torch.zeros(20, 8), torch.zeros(2, 3, dtype=torch.long)
ERRORS = [
    (TypeError, "hidden: got list", {"hidden": [1.0]}),
    (TypeError, r"hidden: got dtype torch.int64.*dequantise", {"hidden": H8.long()}),
    (TypeError, r"hidden: got dtype torch.complex64", {"hidden": H8.to(torch.complex64)}),
    (ValueError, r"hidden: got shape \(\)", {"hidden": torch.tensor(1.0)}),
    (ValueError, "hidden: got a tensor on the meta device", {"hidden": H8.to("meta")}),
    (TypeError, "weight: got NoneType", {"weight": None}),
    (TypeError, r"weight: got dtype torch.int8.*dequantise", {"weight": W8.to(torch.int8)}),
    (TypeError, r"weight: got dtype torch.float8_e4m3fn", {"weight": W8.to(torch.float8_e4m3fn)}),
    (ValueError, r"weight: got shape \(20,\), expected 2 dimensions", {"weight": W8[:, 0]}),
    (ValueError, r"weight: got shape \(20, 7\), expected \[V, 8\]", {"weight": W8[:, 1:]}),
    (ValueError, r"weight: got shape \(0, 8\), expected at least one", {"weight": W8[:0]}),
    (ValueError, r"hidden: got shape \(2, 3, 0\)", {"weight": W8[:, :0], "hidden": H8[..., :0]}),
    (ValueError, "weight: got a tensor on the meta device", {"weight": W8.to("meta")}),
    (TypeError, "bias: got float", {"bias": 0.0}),
    (TypeError, r"bias: got dtype torch.int64", {"bias": torch.zeros(20, dtype=torch.long)}),
    (ValueError, r"bias: got shape \(19,\), expected \(20,\)", {"bias": torch.zeros(19)}),
    (ValueError, r"bias: got shape \(1, 20\)", {"bias": torch.zeros(1, 20)}),
    (ValueError, "bias: got a tensor on the meta device", {"bias": torch.zeros(20, device="meta")}),
    (TypeError, "labels: got list", {"labels": [[0, 0, 0]]}),
    (TypeError, r"labels: got dtype torch.float32", {"labels": Y8.float()}),
    (TypeError, r"labels: got dtype torch.bool", {"labels": Y8.bool()}),
    (ValueError, r"labels: got shape \(2, 2\), expected \(2, 3\)", {"labels": Y8[:, 1:]}),
    (ValueError, r"labels: got shape \(6,\)", {"labels": Y8.view(-1)}),
    (ValueError, "labels: got device meta, expected cpu", {"labels": Y8.to("meta")}),
    (ValueError, "temperature: got 0", {"temperature": 0.0}),
    (ValueError, "temperature: got -1", {"temperature": -1}),
    (ValueError, "temperature: got inf", {"temperature": math.inf}),
    (TypeError, "temperature: got NoneType", {"temperature": None}),
    (TypeError, "temperature: got bool", {"temperature": True}),
    (TypeError, "logit_scale: got str", {"logit_scale": "1"}),
    (ValueError, "logit_scale: got nan", {"logit_scale": math.nan}),
    (TypeError, "softcap: got Tensor", {"softcap": torch.tensor(1.0)}),
    (ValueError, "softcap: got 0", {"softcap": 0.0}),
    (ValueError, "softcap: got -3", {"softcap": -3.0}),
    (TypeError, "outputs: got the string 'entropy'", {"outputs": "entropy"}),
    (ValueError, "outputs: got 'entropies', expected names among entropy", {"outputs": ("entropy", "entropies")}),
    (ValueError, "grad_filter: got 'high'", {"grad_filter": "high"}),
    (TypeError, "group: ", {"group": object()}),
    (ValueError, "backend: got 'gpu'", {"backend": "gpu"}),
    (ValueError, "backend: got 'torch:avx2'", {"backend": "torch:avx2"}),
    (ValueError, "backend.*'sse9'.*expected one of", {"backend": "cpu:sse9"}),
    (ValueError, "memory_budget: got 0", {"memory_budget": 0}),
    (ValueError, "memory_budget: got -1", {"memory_budget": -1}),
    (TypeError, "memory_budget: got float", {"memory_budget": 1.5}),
    (TypeError, "memory_budget: got bool", {"memory_budget": True}),
    (ValueError, "memory_budget: got 'lots'", {"memory_budget": "lots"}),
    (ValueError, "memory_budget: got 'inf'", {"memory_budget": "inf"}),
    (ValueError, "memory_budget: got 'nanGiB'", {"memory_budget": "nanGiB"}),
    (ValueError, "memory_budget: got ''", {"memory_budget": ""}),
    (ValueError, "memory_budget: .*smallest.*raise memory_budget", {"memory_budget": "64B"}),
    (ValueError, "memory_budget: .*smallest.*raise memory_budget", {"memory_budget": "64B", "backend": "torch"}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "change"), ERRORS, ids=[m for _, m, _ in ERRORS])
def test_errors_name_the_argument(error, message, change):
    arguments = {"hidden": H8, "weight": W8, "labels": Y8} | change
    with pytest.raises(error, match=message):
        dpofast.linear_logprob(**arguments)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantised_weight_is_refused():
    weight = torch.quantize_per_tensor(W8, 1.0, 0, torch.quint8)
    with pytest.raises(TypeError, match=r"weight: got dtype torch.quint8.*dequantise"):
        dpofast.linear_logprob(H8, weight, Y8)


def test_a_dtensor_of_one_device_is_its_local_tensor_and_beside_a_plain_weight_is_refused():
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        weight, hidden = (DTensor.from_local(x, DeviceMesh("cpu", [0]), [Replicate()]) for x in (W8, H8))
        logps = dpofast.linear_logprob(H8, weight, Y8).logps
        torch.testing.assert_close(logps, torch.full((2, 3), -math.log(20)))
        with pytest.raises(TypeError, match=r"hidden: got a DTensor.*full_tensor"):
            dpofast.linear_logprob(hidden, W8, Y8)
    finally:
        torch.distributed.destroy_process_group()
