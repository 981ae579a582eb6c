"""logprob, from logits that exist: accuracy, gradients in new memory and in place, edges."""

from __future__ import annotations

import math

import numerics
import pytest
import torch
from numerics import EVERYTHING, SHORT, STATISTICS

import dpofast
from dpofast import reference

DTYPES = pytest.mark.parametrize("dtype", SHORT, ids=SHORT.values())
TRANSFORM = {name: x for name, x in EVERYTHING.items() if name != "bias"}
INPLACE = pytest.mark.parametrize("inplace_grad", (False, True), ids=("new memory", "in place"))


def case(n: int, v: int, dtype=torch.float32, seed: int = 0):
    """Logits [n, v] with a spread of 3, labels with every fourth masked, and incoming gradients."""
    g = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(n, v, generator=g, dtype=torch.float64)).to(dtype)
    labels = torch.randint(v, (n,), generator=g)
    labels[3::4] = -100
    return (
        logits,
        labels,
        torch.randn(n, generator=g, dtype=torch.float64),
        torch.randn(n, generator=g, dtype=torch.float64),
    )


def run(function, logits, labels, c, e, *, outputs=STATISTICS, **options):
    """Values by name and "d logits". The logits a backward may overwrite are a copy."""
    leaf = logits.detach().requires_grad_()
    out = function(leaf * 1, labels, outputs=outputs, **options)
    loss = (out.logps * c.to(out.logps.dtype)).sum()
    if e is not None:
        loss = loss + (out.entropy * e.to(out.logps.dtype)).sum()
    results = {name: x.detach() for name, x in out._asdict().items() if x is not None}
    return results | {"d logits": torch.autograd.grad(loss, leaf)[0]}


def assert_as_good_as_plain(got, logits, labels, c, e, **options):
    """Logits are given, so plain PyTorch's arithmetic is fp32 (fp64) as ours; only d logits is rounded."""
    want = run(reference.logprob, logits.double(), labels, c, e, **options)
    plain = run(reference.logprob, logits, labels, c, e, **options)
    tiny = 1e-12 if logits.dtype == torch.float64 else 16 * torch.finfo(torch.float32).eps
    limits = {}
    for name, x in want.items():
        error = (plain[name].double() - x.double()).abs()
        error = float(error[error.isfinite()].max()) if error.isfinite().any() else 0.0
        limits[name] = 0.0 if name == "is_top1" else 2 * error + tiny * (1 + numerics._scale(x))
    numerics.assert_close(got, want, limits)


@DTYPES
@pytest.mark.parametrize("v", (1, 2, 15, 17, 511, 512, 513, 1024, 1500))
def test_results_are_as_near_to_the_truth_as_plain_pytorchs(backend, v, dtype):
    for options, with_entropy, inplace in (({}, False, False), (TRANSFORM, True, False), (TRANSFORM, False, True)):
        logits, labels, c, e = case(9, v, dtype)
        labels[0], labels[1] = 0, v - 1
        e = e if with_entropy else None
        got = run(dpofast.logprob, logits, labels, c, e, backend=backend, inplace_grad=inplace, **options)
        assert got["logps"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert got["d logits"].dtype == dtype
        assert_as_good_as_plain(got, logits, labels, c, e, **options)


@pytest.mark.parametrize("per_chunk", (5, 14, -14, 40))
def test_logits_that_climb_or_fall_through_the_vocabulary(backend, per_chunk):
    logits, labels, c, e = case(12, 2050)
    logits += torch.arange(2050) / 512 * per_chunk
    got = run(dpofast.logprob, logits, labels, c, e, backend=backend)
    assert_as_good_as_plain(got, logits, labels, c, e)


@pytest.mark.parametrize("entropy", (False, True), ids=("logps", "entropy"))
@pytest.mark.parametrize("options", ({}, {"softcap": 2.0}, {"temperature": 0.6}, {"logit_scale": -0.5}, TRANSFORM))
@pytest.mark.parametrize("exact_backend", ("cpu:scalar", "torch"))
def test_gradcheck(exact_backend, options, entropy):
    logits, labels, _, _ = case(5, 7, torch.float64)

    def function(x):
        out = dpofast.logprob(x, labels, outputs=("entropy",), backend=exact_backend, **options)
        return out.logps * 2 + (out.entropy if entropy else 0)

    assert torch.autograd.gradcheck(function, logits.requires_grad_())


@DTYPES
@pytest.mark.parametrize("entropy", (False, True), ids=("logps", "entropy"))
def test_the_gradient_in_place_is_the_same_and_overwrites_the_logits(backend, dtype, entropy):
    logits, labels, c, e = case(21, 1030, dtype)
    e = e if entropy else None
    want = run(dpofast.logprob, logits, labels, c, e, backend=backend)["d logits"]
    leaf = logits.clone().requires_grad_()
    used = leaf * 1
    before = used.data_ptr()
    out = dpofast.logprob(used, labels, backend=backend, inplace_grad=True, outputs=("entropy",))
    loss = (out.logps * c).sum() + (0 if e is None else (out.entropy * e).sum())
    assert torch.equal(used, logits)
    loss.backward(retain_graph=True)
    assert used.data_ptr() == before and torch.equal(used.detach(), want)
    assert torch.equal(leaf.grad, want)
    with pytest.raises(RuntimeError, match="second backward, but the logits are overwritten"):
        loss.backward()
    assert torch.equal(used.detach(), want)


def test_what_else_needs_the_logits_notices_that_they_are_gone(backend):
    leaf = torch.randn(3, 20, requires_grad=True)
    logits = leaf * 1
    other = logits.pow(2).sum()  # keeps the logits for its own backward, which runs after
    loss = dpofast.logprob(logits, torch.arange(3), backend=backend, inplace_grad=True).logps.sum() + other
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@INPLACE
def test_one_row_of_memory_seen_as_many_gets_each_rows_gradient(backend, inplace_grad):
    """Rows of an expanded tensor share memory, so there is no place for their gradients in it."""
    row = torch.randn(1, 20, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(6)
    loss = dpofast.logprob((row * 1).expand(6, 20), labels, backend=backend, inplace_grad=inplace_grad).logps.sum()
    want = torch.autograd.grad(row.log_softmax(-1).expand(6, 20).gather(-1, labels[:, None]).sum(), row)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, row)[0], want)


@INPLACE
def test_masked_rows_get_a_gradient_of_exactly_zero(backend, inplace_grad):
    logits, labels, c, e = case(9, 600)
    got = run(dpofast.logprob, logits, labels, c, e, backend=backend, inplace_grad=inplace_grad)
    masked = labels == -100
    assert masked.any() and all((x[masked] == 0).all() for x in got.values())
    labels[:] = -100
    got = run(dpofast.logprob, logits, labels, c, e, backend=backend, inplace_grad=inplace_grad)
    assert all((x == 0).all() for x in got.values())


def test_no_rows_at_all(backend):
    logits = torch.randn(2, 0, 7, requires_grad=True)
    out = dpofast.logprob(logits, torch.empty(2, 0, dtype=torch.long), backend=backend)
    out.logps.sum().backward()
    assert out.logps.shape == (2, 0) and logits.grad.shape == (2, 0, 7)


STRIDED = {
    "all but the last token": lambda x: torch.cat([x, x[:, :1]], 1)[:, :-1],
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "part of a wider vocabulary": lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2],
    "columns apart": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


@INPLACE
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("make", STRIDED.values(), ids=STRIDED)
def test_logits_of_any_strides(backend, make, dtype, inplace_grad):
    logits, labels, c, _ = case(12, 531, dtype)
    logits, labels, c = logits.view(3, 4, 531), labels.view(3, 4), c.view(3, 4)
    want = run(dpofast.logprob, logits, labels, c, None, backend=backend)
    leaf = logits.clone().requires_grad_()
    strided = make(leaf * 1)
    assert not strided.is_contiguous()
    out = dpofast.logprob(strided, labels, backend=backend, inplace_grad=inplace_grad)
    assert torch.equal(out.logps, want["logps"])
    (out.logps * c.float()).sum().backward()
    assert torch.equal(leaf.grad, want["d logits"])


def test_one_row_without_leading_dimensions(backend):
    logits = torch.randn(9, requires_grad=True)
    out = dpofast.logprob(logits, torch.tensor(4), backend=backend, outputs=("entropy",))
    want = logits.log_softmax(-1)[4]
    torch.testing.assert_close(out.logps, want)
    torch.testing.assert_close(torch.autograd.grad(out.logps, logits)[0], torch.autograd.grad(want, logits)[0])


@pytest.mark.parametrize("distance", (34.0, 60.0))
def test_a_confident_label_keeps_its_relative_precision(backend, distance):
    logits = torch.zeros(2, 700)
    labels = torch.tensor([0, 650])
    logits[torch.arange(2), labels] = distance
    got = run(dpofast.logprob, logits, labels, torch.ones(2), None, backend=backend)
    exact = -math.log1p(699 * math.exp(-distance))
    torch.testing.assert_close(got["logps"].double(), torch.full((2,), exact, dtype=torch.float64), rtol=1e-5, atol=0)
    own = got["d logits"].double()[torch.arange(2), labels]
    torch.testing.assert_close(own, torch.full((2,), -math.expm1(exact), dtype=torch.float64), rtol=1e-5, atol=0)
    assert (run(reference.logprob, logits, labels, torch.ones(2), None)["logps"] == 0).all()  # plain PyTorch loses it


SPECIAL = {
    "first -inf": ([0], -math.inf),
    "last -inf": ([599], -math.inf),
    "a whole chunk -inf": (range(512), -math.inf),
    "all -inf": (range(600), -math.inf),
    "+inf": ([5], math.inf),
    "NaN": ([599], math.nan),
    "NaN first": ([0], math.nan),
}


@pytest.mark.parametrize(("where", "value"), SPECIAL.values(), ids=SPECIAL)
def test_special_logits_give_what_pytorch_gives(backend, where, value):
    logits, _, c, _ = case(6, 600)
    labels = torch.tensor([0, 5, 511, 512, 599, 300])
    logits[:, list(where)] = value
    got = run(dpofast.logprob, logits, labels, c, None, backend=backend, outputs=())
    want = run(reference.logprob, logits, labels, c, None, outputs=())
    numerics.assert_close(got, want, {"logps": 1e-4, "d logits": 1e-5})


MINUS_INF = {"some": (0, 5, *range(512, 1024), 1499), "all but one": (*range(700), *range(701, 1500))}


@INPLACE
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=("fp32", "bf16", "fp64"))
@pytest.mark.parametrize("where", MINUS_INF.values(), ids=MINUS_INF)
def test_logits_of_minus_inf_under_gradients_of_logps_and_entropy_at_once(backend, where, dtype, inplace_grad):
    """p log p is 0 there, with gradient 0, and a label there has a gradient as any; 0 * -inf would be NaN."""
    logits, labels, c, e = case(13, 1500, dtype)
    logits[:, list(where)] = -math.inf
    labels[:3] = torch.tensor([0, 700, 1499])
    options = {"outputs": ("entropy",), "temperature": 0.7}
    got = run(dpofast.logprob, logits, labels, c, e, backend=backend, inplace_grad=inplace_grad, **options)
    assert got["entropy"].isfinite().all() and got["d logits"].isfinite().all()
    assert_as_good_as_plain(got, logits, labels, c, e, **options)


def test_the_bits_depend_neither_on_the_threads_nor_on_the_run(cpu_backend):
    logits, labels, c, e = case(40, 1500, torch.bfloat16)
    runs = []
    for n in (1, 2, 3, 4, 1):
        with numerics.threads(n):
            runs.append(run(dpofast.logprob, logits, labels, c, e, backend=cpu_backend))
    for name, x in runs[0].items():
        assert all(torch.equal(other[name], x) for other in runs[1:]), name


L, Y = torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.long)
ERRORS = [
    (TypeError, "logits: got list", {"logits": [0.0]}),
    (TypeError, "logits: got dtype torch.int64", {"logits": L.long()}),
    (ValueError, "logits: got a tensor on the meta device", {"logits": L.to("meta")}),
    (ValueError, r"logits: got shape \(\), expected", {"logits": torch.tensor(0.0)}),
    (ValueError, r"logits: got shape \(2, 3, 0\), expected \[\*, n\] with n >= 1", {"logits": L[..., :0]}),
    (ValueError, r"labels: got shape \(2, 2\)", {"labels": Y[:, 1:]}),
    (TypeError, "labels: got dtype torch.float64", {"labels": Y.double()}),
    (ValueError, r"labels: got 8, expected values in \[0, 8\)", {"labels": Y + 8}),
    (ValueError, "labels: got -1", {"labels": Y - 1}),
    (ValueError, "temperature: got 0", {"temperature": 0}),
    (ValueError, "softcap: got 0", {"softcap": 0}),
    (ValueError, "outputs: got 'x'", {"outputs": ("x",)}),
    (ValueError, "grad_filter: got 'high'", {"grad_filter": "high"}),
    (ValueError, "backend: got 'x'", {"backend": "x"}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "change"), ERRORS, ids=[m for _, m, _ in ERRORS])
def test_errors_name_the_argument(error, message, change):
    with pytest.raises(error, match=message):
        dpofast.logprob(**({"logits": L, "labels": Y} | change))
