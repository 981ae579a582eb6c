"""The CUDA kernel sequence_dpo against the table of losses and autograd, walked option by option, on the emulator."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from emu import build
from torch import Tensor

import dpofast
from dpofast import _ops, losses, primitive
from dpofast.backends import registry
from dpofast.backends.base import PairsResult
from dpofast.backends.cuda import CudaPasses
from dpofast.backends.tiled import TiledBackend
from dpofast.functional import pairs_problem
from dpofast.losses import LOSSES, REQUIRED
from dpofast.primitive import LogprobOutput

# Losses that the kernel does not have: a pair's loss there depends on the other pairs of its batch.
NOT_CLAIMED = {
    "aot": "sorts the batch",
    "aot_unpaired": "sorts the batch",
    "sft": "a mean over the tokens of the batch",
    "orpo": "has sft in it",
}
CLAIMED = sorted(set(LOSSES) - set(NOT_CLAIMED))

LENGTHS = (270, 0, 33, 300, 1, 31, 64, 20, 257, 2)  # tokens of sequences, [chosen; rejected]; around 32 and 256
NO_LABELS = 7  # a sequence of tokens none of which counts
PAIRS = len(LENGTHS) // 2
PER_PAIR = {
    "beta": [0.1, 0.37, 1.5, 0.02, 0.5],
    "margin": [0.4, -0.3, 0.0, 2.0, 0.1],
    "weight": [0.5, 2.0, 0.0, 1.25, 3.0],
}
# Values other than the default for every option, each with the options it needs beside it.
VALUES: dict[str, list[dict[str, Any]]] = {
    "beta": [{"beta": 0.37}, {"beta": PER_PAIR["beta"]}],
    "label_smoothing": [{"label_smoothing": 0.2}],
    "margin": [{"margin": 0.4}, {"margin": PER_PAIR["margin"]}],
    "weight": [{"weight": PER_PAIR["weight"]}],
    "f_divergence_type": [{"f_divergence_type": name} for name in losses.F_DIVERGENCES[1:]],
    "f_alpha_divergence_coef": [
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": coef} for coef in (0.3, 1.6, 1.0, -0.5)
    ],
    "discopop_tau": [{"discopop_tau": 0.3}],
    "simpo_gamma": [{"simpo_gamma": 0.9}],
    "alphapo_alpha": [{"alphapo_alpha": -0.5}, {"alphapo_alpha": 2.0}],
    "cpo_alpha": [],  # 0 is all that the kernel has: see `least`
    "dpop_lambda": [{"dpop_lambda": 5.0}],
}


def least(loss_type: str) -> dict[str, Any]:
    """The options that the kernel asks for: those without a default, and no mean over the batch."""
    options = LOSSES[loss_type].options
    given = {name: VALUES[name][0][name] for name, default in options.items() if default is REQUIRED}
    return given | ({"cpo_alpha": 0.0} if "cpo_alpha" in options else {})


def cases(loss_type: str) -> list[dict[str, Any]]:
    """No options, each value of each, and the last one of each at once."""
    base, defined = least(loss_type), LOSSES[loss_type].options
    single = [base | value for name in defined for value in VALUES[name]]
    together = base.copy()
    for name in defined:
        together |= VALUES[name][-1] if VALUES[name] else {}
    return [base, *single, together]


CASES = [
    pytest.param(name, options, id=f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items())}")
    for name in CLAIMED
    for options in cases(name)
]


class Batch(NamedTuple):
    logps: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None
    ref_logps: Tensor

    def reference(self, loss_type: str) -> Tensor | None:
        return self.ref_logps if LOSSES[loss_type].reference else None


def batch(layout: str, dtype: torch.dtype, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Batch:
    """Sequences of ``lengths`` tokens, a third without label; what does not count has NaN for a log-prob."""
    g = torch.Generator().manual_seed(seed)
    tokens, labels, sums = [], [], []
    for i, n in enumerate(lengths):
        counts = (torch.rand(n, generator=g) < 0.7) & (i != NO_LABELS)
        if n == 1:
            counts[:] = True
        x = (-0.2 * torch.rand(n, generator=g, dtype=torch.float64)).to(dtype)
        sums.append(x[counts].sum())
        tokens.append(x.masked_fill(~counts, math.nan))
        labels.append(torch.where(counts, torch.randint(100, (n,), generator=g), -100))
    ref = (torch.stack(sums).double() + 3 * torch.randn(len(lengths), generator=g, dtype=torch.float64)).to(dtype)
    if layout == "packed":
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return Batch(torch.cat(tokens), torch.cat(labels), ends, ref)
    padded = [
        torch.nn.utils.rnn.pad_sequence(x, batch_first=True, padding_value=value)
        for x, value in ((tokens, math.nan), (labels, -100))
    ]
    # columns of a wider tensor, as a trainer's shift by one makes them
    logps, labels = (torch.nn.functional.pad(x, (1, 0), value=1)[:, 1:] for x in padded)
    return Batch(logps, labels, None, ref)


def pair_of(x: Batch, i: int) -> Batch:
    """One pair of a padded batch, as a batch."""
    return Batch(*(value if value is None else value[[i, i + PAIRS]] for value in x))


def tensors(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: torch.tensor(x, dtype=dtype) if isinstance(x, list) else x for name, x in options.items()}


def run(library: ModuleType, x: Batch, loss_type: str, options: dict[str, Any], **changes: Any) -> PairsResult:
    (term,) = losses.resolve(loss_type, **options)
    problem = pairs_problem(
        term, x.logps, labels=x.labels, cu_seqlens=x.cu_seqlens, ref_logps=x.reference(loss_type),
        weight=term.options.get("weight"), ignore_index=-100,
    )  # fmt: skip
    return CudaPasses(library).sequence_dpo(problem._replace(**changes))


def table(x: Batch, loss_type: str, options: dict[str, Any]) -> PairsResult:
    """The same from `sequence_logps`, the table and autograd, in fp64."""
    logps = x.logps.double().requires_grad_()
    sums = dpofast.sequence_logps(logps, x.labels, cu_seqlens=x.cu_seqlens)
    ones = torch.ones_like(logps)
    lengths = dpofast.sequence_logps(ones, x.labels, cu_seqlens=x.cu_seqlens).long().chunk(2)
    chosen, rejected = sums.chunk(2)
    refs = x.reference(loss_type)
    options = {name: v.double() if isinstance(v, Tensor) else v for name, v in options.items()}
    values = losses.preference_loss(
        chosen, rejected, *((None, None) if refs is None else refs.double().chunk(2)), loss_type=loss_type,
        chosen_lengths=lengths[0], rejected_lengths=lengths[1], chosen_nll=-chosen, reduction="none", **options,
    )  # fmt: skip
    (coefficients,) = torch.autograd.grad(values.mean(), logps)
    return PairsResult(values.detach(), sums.detach(), torch.cat(lengths), coefficients)


# The kernel computes in fp64 and rounds once: 2^-24, and a little for the argument of an exponential.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2.0**-23}


def assert_same(got: PairsResult, want: PairsResult) -> None:
    for name, x in want._asdict().items():
        y = getattr(got, name)
        if x.is_floating_point():
            x = x.to(y.dtype)
            close = torch.isclose(y, x, rtol=TOLERANCE[y.dtype], atol=1e-15)
            assert close.all(), f"{name}: got {y[~close].tolist()}, expected {x[~close].tolist()}"
        else:
            assert y.dtype == torch.int64 and torch.equal(y, x), name


@pytest.fixture(scope="module")
def library() -> ModuleType:
    if build.compiler() is None:
        pytest.skip("no compiler for the emulator")
    return build.module()


def test_the_kernel_has_every_loss_that_a_pair_decides_alone(library):
    """Which those are, the table itself says: each pair's loss is the same without the others."""
    x = batch("padded", torch.float64)

    def decides_alone(name: str) -> bool:
        alone = [table(pair_of(x, i), name, least(name)).losses for i in range(PAIRS)]
        return torch.allclose(torch.cat(alone), table(x, name, least(name)).losses, rtol=1e-10)

    assert {name for name in LOSSES if decides_alone(name)} == set(library.cuda_pair_losses)
    assert set(LOSSES) - set(library.cuda_pair_losses) == set(NOT_CLAIMED)


def test_every_option_of_the_table_has_values_here():
    assert {name for loss in LOSSES.values() for name in loss.options} == set(VALUES)
    assert set(losses.F_DIVERGENCES) == {"reverse_kl", *(v["f_divergence_type"] for v in VALUES["f_divergence_type"])}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize(("loss_type", "options"), CASES)
def test_losses_sums_and_coefficients_are_the_tables_and_autograds(library, loss_type, options, dtype):
    options = tensors(options, dtype)
    for seed, layout in enumerate(("padded", "packed")):
        library.set_seed(seed)
        x = batch(layout, dtype, seed=seed)
        got = run(library, x, loss_type, options)
        assert_same(got, table(x, loss_type, options))
        assert got.coefficients.shape == x.logps.shape
        assert (got.coefficients[x.labels == -100] == 0).all()


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_any_label_may_be_the_one_that_does_not_count(library, layout):
    x = batch(layout, torch.float32)
    want = run(library, x, "sigmoid_norm", {})
    got = run(library, x, "sigmoid_norm", {}, labels=torch.where(x.labels != -100, 3, 7), ignore_index=7)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_bits_depend_neither_on_the_order_of_threads_nor_on_the_other_pairs(library):
    x = batch("packed", torch.float32)
    runs = []
    for seed in range(6):
        library.set_seed(seed)
        runs.append(run(library, x, "sigmoid", {}))
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(other, runs[0]))
    got = run(library, pair_of(batch("padded", torch.float32), 3), "sigmoid", {})
    assert torch.equal(got.losses, runs[0].losses[3:4])
    assert torch.equal(got.sums, runs[0].sums[[3, 3 + PAIRS]])


def extreme(dtype: torch.dtype) -> Batch:
    """Pairs of one token each whose log-ratios, log-probs and margins are +-1e3 and 0, in every combination."""
    sides = [(-1e3, 0.0), (-1e3, -1e3), (-1e3, -2e3), (0.0, 0.0), (0.0, -1e3), (0.0, 1e3)]  # logp, ref_logp
    chosen, rejected = zip(*((a, b) for a in sides for b in sides))
    both = torch.tensor(chosen + rejected, dtype=dtype)
    return Batch(both[:, :1], torch.ones(len(both), 1, dtype=torch.long), None, both[:, 1].contiguous())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("loss_type", CLAIMED)
def test_extreme_margins_give_no_nan(library, loss_type, dtype):
    x = extreme(dtype)
    for options in cases(loss_type):
        # beta 1, so that nothing makes the margins small; alpha 2 has its own test, below
        options = tensors(options, dtype) | {"beta": 1.0, "weight": None}
        options = {name: 0.7 if isinstance(value, Tensor) else value for name, value in options.items()}
        if options.get("alphapo_alpha") == 2.0:
            continue
        if loss_type == "sft_norm":
            del options["beta"]
        got, want = run(library, x, loss_type, options), table(x, loss_type, options)
        assert not any(value.isnan().any() for value in got), options
        assert_same(got, want)


def test_a_gradient_that_has_vanished_stays_zero_where_its_reward_overflows(library):
    """exp(2e4) is inf in fp64: the reward of the rejected completion is -inf, and the loss is 0 and flat."""
    x = Batch(torch.tensor([[-1.0], [-1e4]], dtype=torch.float64), torch.ones(2, 1, dtype=torch.long), None, None)
    got = run(library, x, "alphapo", {"alphapo_alpha": 2.0})
    assert got.losses.tolist() == [0.0] and got.coefficients.tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("loss_type", CLAIMED)
def test_nan_of_a_token_that_counts_reaches_its_pairs_loss_and_no_other(library, loss_type):
    x = batch("padded", torch.float64)
    x.logps[0, x.labels[0] != -100] = math.nan
    got = run(library, x, loss_type, least(loss_type))
    assert got.losses.isnan().tolist() == [True, False, False, False, False]


def test_batches_without_pairs_or_tokens(library):
    for pairs, width in ((0, 0), (0, 5), (3, 0)):
        x = Batch(torch.zeros(2 * pairs, width), torch.zeros(2 * pairs, width).long(), None, torch.zeros(2 * pairs))
        got = run(library, x, "sigmoid", {})
        assert got.coefficients.shape == (2 * pairs, width)
        torch.testing.assert_close(got.losses, torch.full((pairs,), math.log(2)))
        assert got.lengths.tolist() == got.sums.tolist() == [0] * 2 * pairs


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_nvcc_needs_no_stack_and_spills_nothing(tmp_path):
    flags = ["-O3", "-std=c++17", "-Xptxas=-v", f"-I{build.ROOT / 'csrc'}", "-c", "-o", tmp_path / "out.o"]
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("89", "90a")]
    source = build.ROOT / "csrc" / "cuda" / "sequence_dpo.cu"
    done = subprocess.run(["nvcc", *flags, *targets, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert used == [("0", "0", "0")] * 4, done.stderr  # fp32 and fp64, for each architecture


# `linear_dpo_loss` and `dpo_loss` on a backend that has the kernel

ON_GPU = torch.cuda.is_available() and registry.why_not("cuda", "cuda") is None
ENGINES = (["cuda:emu"] if build.compiler() else []) + (["cuda:gpu"] if ON_GPU else [])
on_every_engine = pytest.mark.parametrize("backend", ENGINES, indirect=True)
on_the_emulator = pytest.mark.skipif(build.compiler() is None, reason="no compiler for the emulator")
VOCABULARY, HIDDEN = 11, 4


def public(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Options of `cases` as `dpofast.linear_dpo_loss` has them."""
    return {"pair_weight" if name == "weight" else name: x for name, x in tensors(options, dtype).items()}


class Call(NamedTuple):
    """A call of `linear_dpo_loss` or of `dpo_loss`."""

    function: str
    layout: str
    dtype: torch.dtype

    def __call__(self, backend: str, loss_type: str, **options: Any) -> tuple[dpofast.DPOLossOutput, list[Tensor]]:
        """The output, and what it can be differentiated by."""
        x = batch(self.layout, self.dtype, lengths=(6, 0, 9, 2, 1, 7, 4, 3, 5, 2))
        g = torch.Generator().manual_seed(1)
        hidden = torch.randn(*x.labels.shape, HIDDEN, generator=g, dtype=torch.float64).to(self.dtype)
        weight = torch.randn(VOCABULARY, HIDDEN, generator=g, dtype=torch.float64).to(self.dtype)
        labels = torch.where(x.labels == -100, -100, x.labels % VOCABULARY)
        ref = {"ref_logps": x.ref_logps} if LOSSES[loss_type].reference else {}
        common = {"cu_seqlens": x.cu_seqlens, "backend": backend, "loss_type": loss_type, **ref, **options}
        if self.function == "dpo_loss":
            leaves = [(hidden @ weight.T).requires_grad_()]
            return dpofast.dpo_loss(*leaves, labels, **common), leaves
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]
        return dpofast.linear_dpo_loss(*leaves, labels, **common), leaves


CALLS = [
    Call(function, layout, dtype)
    for function in ("linear_dpo_loss", "dpo_loss")
    for layout in ("padded", "packed")
    for dtype in (torch.float32, torch.float64)
]
LINEAR = CALLS[0]


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The losses that a call had of the kernel, as they come."""
    seen, method = [], TiledBackend.sequence_dpo

    def spy(self, problem):
        seen.append(problem.loss_type)
        return method(self, problem)

    monkeypatch.setattr(TiledBackend, "sequence_dpo", spy)
    return seen


@contextmanager
def by_the_table():
    """As if no backend had losses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "pair_losses", lambda _: ())
        yield


def differentiable(out: dpofast.DPOLossOutput) -> Tensor:
    """All that has a gradient, each with a weight of its own."""
    parts = [torch.atleast_1d(out.loss), out.chosen_logps, out.rejected_logps]
    factors = [torch.linspace(0.5, 1.5, len(x), dtype=x.dtype) for x in parts]
    return sum(scale * (x * f).sum() for scale, x, f in zip((1.0, 0.03, -0.02), parts, factors))


def assert_like_the_table(call: Call, backend: str, launches: list[str], loss_type: str, **options: Any) -> None:
    got, leaves = call(backend, loss_type, **options)
    assert launches == [loss_type]
    with by_the_table():
        want, others = call(backend, loss_type, **options)
    assert launches == [loss_type]
    near = {"rtol": 3e-5, "atol": 3e-5} if call.dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-12}
    for name, y in want._asdict().items():
        x = getattr(got, name)
        assert (x is None) == (y is None), name
        if y is not None:
            torch.testing.assert_close(x, y, **near, msg=lambda text, name=name: f"{name}: {text}")
            assert x.requires_grad == y.requires_grad, name
    torch.testing.assert_close(got.metrics(), want.metrics(), **near)
    for f in (lambda out: out.loss.sum(), differentiable):
        grads = (torch.autograd.grad(f(o), x, retain_graph=True) for o, x in ((got, leaves), (want, others)))
        for x, y in zip(*grads, strict=True):
            scale = max(1.0, y.abs().max().item())
            torch.testing.assert_close(x / scale, y / scale, **near)


@on_every_engine
@pytest.mark.parametrize("loss_type", CLAIMED)
def test_a_loss_through_the_kernel_is_the_tables(backend, launches, loss_type):
    """For every option of it, with each reduction, from hidden states and from logits, padded and packed."""
    for i, options in enumerate(cases(loss_type)):
        call, reduction = CALLS[i % len(CALLS)], losses.REDUCTIONS[i % 3]
        options = public(options, call.dtype)
        launches.clear()
        assert_like_the_table(call, backend, launches, loss_type, reduction=reduction, metrics=i % 2 == 0, **options)


@on_every_engine
@pytest.mark.parametrize("reduction", losses.REDUCTIONS)
@pytest.mark.parametrize("call", CALLS, ids=lambda c: f"{c.function}-{c.layout}-{c.dtype}")
def test_every_way_to_the_kernel(backend, launches, call, reduction):
    assert_like_the_table(call, backend, launches, "sigmoid_norm", reduction=reduction, metrics=True, beta=0.4)


@on_every_engine
def test_an_option_of_no_dimensions_is_every_pairs(backend, launches):
    for options in ({"beta": torch.tensor(0.3, dtype=torch.float64)}, {"margin": torch.tensor(0.2)}):
        launches.clear()
        assert_like_the_table(LINEAR, backend, launches, "sigmoid", **options)


@on_every_engine
def test_a_reference_by_token_is_summed_first(backend, launches):
    labels = batch("padded", torch.float32, lengths=(6, 0, 9, 2, 1, 7, 4, 3, 5, 2)).labels
    ref_logps = -torch.rand(labels.shape)
    assert_like_the_table(LINEAR, backend, launches, "sigmoid", ref_logps=ref_logps)
    launches.clear()
    hidden, head = torch.randn(*labels.shape, HIDDEN), torch.randn(VOCABULARY, HIDDEN)
    assert_like_the_table(LINEAR, backend, launches, "sigmoid", ref_logps=None, ref_hidden=hidden, ref_weight=head)
    launches.clear()
    # a supervised loss has no reference, and the output still has the one it was given
    assert_like_the_table(LINEAR, backend, launches, "sft_norm", ref_logps=ref_logps)


@on_every_engine
@pytest.mark.parametrize("name", CLAIMED)
def test_a_batch_without_pairs_and_one_without_tokens(backend, launches, name):
    ref = LOSSES[name].reference
    for pairs, width in ((0, 5), (2, 3), (2, 0)):
        labels = torch.full((2 * pairs, width), -100)
        hidden = torch.randn(2 * pairs, width, HIDDEN, requires_grad=True)
        out = dpofast.linear_dpo_loss(
            hidden, torch.ones(VOCABULARY, HIDDEN), labels, ref_logps=torch.zeros(2 * pairs) if ref else None,
            backend=backend, loss_type=name, metrics=True, **least(name),
        )  # fmt: skip
        out.loss.backward()
        assert out.loss.isfinite() and (pairs or out.loss.item() == 0) and not hidden.grad.any()
        assert all(value.isfinite() for value in out.metrics().values())
    assert len(launches) == 3


FULL = torch.ones(PAIRS)
PRESENT_WAY = [
    *((name, {}) for name in NOT_CLAIMED),
    ("cpo", {}),  # cpo_alpha is 1
    ("sigmoid", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    ("sigmoid", {"loss_type": ["sigmoid"], "loss_weights": [2.0]}),
    ("sigmoid", {"token_weights": torch.ones(10, 9)}),
    ("sigmoid", {"ld_alpha": 0.5}),
    ("sigmoid", {"use_weighting": True}),
    ("sigmoid", {"beta": FULL.clone().requires_grad_()}),  # learned
    ("sigmoid", {"margin": FULL.double()}),  # makes the loss fp64
    ("sigmoid", {"ref_logps": torch.zeros(10).double()}),
    ("sigmoid", {"backend": "torch"}),
]  # fmt: skip


@on_the_emulator
@pytest.mark.parametrize("name, options", PRESENT_WAY, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_what_the_kernel_lacks_goes_by_the_table(emulator, launches, name, options):
    function = dpofast.linear_dpo_loss
    x = batch("padded", torch.float32, lengths=(6, 0, 9, 2, 1, 7, 4, 3, 5, 2))
    labels = torch.where(x.labels == -100, -100, x.labels % VOCABULARY)
    hidden = torch.randn(*labels.shape, HIDDEN, requires_grad=True)
    ref = {"ref_logps": x.ref_logps} if LOSSES[name].reference else {}
    common = {"loss_type": name, "backend": emulator, **ref, **options}
    out = function(hidden, torch.randn(VOCABULARY, HIDDEN), labels, **common)
    out.loss.backward()
    assert not launches and out.loss.isfinite()
    if "beta" in options:
        assert options["beta"].grad is not None


@on_the_emulator
def test_another_loss_of_the_same_name_goes_by_the_table(emulator, launches, monkeypatch):
    monkeypatch.setitem(LOSSES, "sigmoid", replace(LOSSES["sigmoid"], fn=lambda delta, **_: delta))
    LINEAR(emulator, "sigmoid")
    assert not launches


@on_the_emulator
def test_a_loss_is_two_launches_behind_its_log_probs(emulator):
    assert launched(emulator) == (["sequence_dpo", "mean", "sub", "mul"], ["mul"])  # sub and mul: the rewards
    with by_the_table():
        forward, backward = launched(emulator)
    assert len(forward) + len(backward) >= 25, (forward, backward)


# What PyTorch does on the host alone, unless it copies
FREE = {
    "chunk", "contiguous", "detach", "empty", "empty_like", "expand", "item", "narrow", "new_empty", "promote_types",
    "reshape", "result_type", "select", "slice", "split", "to", "unsqueeze", "view",
}  # fmt: skip


def launched(backend: str) -> tuple[list[str], list[str]]:
    """Operators behind 8192 log-probs that do something to tensors: of `dpo_loss`, and of its backward."""
    logps, labels, ref = torch.rand(8, 1024).neg().requires_grad_(), torch.ones(8, 1024).long(), torch.randn(8)
    kernels, library = [], registry.get(backend).passes._library
    kernel = library.cuda_sequence_dpo

    def operators(f):
        kernels.clear()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            result = f()
        events = [e for e in profile.events() if e.name.startswith("aten::") and not is_aten(e.cpu_parent)]
        return result, [*kernels, *(e.name.removeprefix("aten::") for e in events if works(e))]

    def is_aten(event) -> bool:
        return event is not None and (event.name.startswith("aten::") or is_aten(event.cpu_parent))

    def works(event) -> bool:
        copies = event.name == "aten::copy_" or any(works(child) for child in event.cpu_children)
        return copies if event.name.removeprefix("aten::") in FREE | {"as_strided", "empty_strided"} else True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "cuda_sequence_dpo", lambda args: (kernels.append("sequence_dpo"), kernel(args)))
        patch.setattr(primitive.LogitsScorer, "score", lambda *_: LogprobOutput(logps))
        logits, one = torch.empty(8, 1024, 1), torch.ones(())
        out, forward = operators(lambda: dpofast.dpo_loss(logits, labels, ref_logps=ref, backend=backend))
        _, backward = operators(lambda: torch.autograd.grad(out.loss, logps, one))
    return forward, backward


@on_the_emulator
@pytest.mark.parametrize("reduction", losses.REDUCTIONS)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_opcheck(emulator, layout, reduction):
    x = batch(layout, torch.float64, lengths=(6, 0, 9, 2, 1, 7, 4, 3, 5, 2))
    logps = x.logps.nan_to_num().contiguous().requires_grad_()
    labels = x.labels.contiguous()
    beta, weight = (torch.tensor(PER_PAIR[name], dtype=torch.float64) for name in ("beta", "weight"))
    numbers = [0.0, 0.3, 0.1, 0.0, 0.0, 0.0, 0.0, 0.5]
    how = (-100, "sigmoid", numbers, "reverse_kl", reduction, emulator)
    args = (logps, labels, x.cu_seqlens, x.ref_logps, beta, None, weight, *how)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(_ops.sequence_dpo, args, test_utils=checks)
    loss, sums, _, coefficients = (x.detach() for x in _ops.sequence_dpo(*args))
    for incoming in ([loss, sums], [loss, None], [None, sums]):
        args = (incoming, logps.detach(), labels, x.cu_seqlens, coefficients, -100, reduction)
        torch.library.opcheck(_ops.sequence_dpo_backward, args, test_utils=checks)


@on_the_emulator
@pytest.mark.parametrize("packed", [False, True])
def test_it_compiles_to_one_graph(emulator, launches, packed):
    x = batch("packed" if packed else "padded", torch.float64, lengths=(6, 0, 9, 2, 1, 7, 4, 3, 5, 2))
    labels = torch.where(x.labels == -100, -100, x.labels % VOCABULARY).contiguous()
    weight = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64)
    hidden = torch.randn(*labels.shape, HIDDEN, dtype=torch.float64, requires_grad=True)

    def loss(hidden):
        out = dpofast.linear_dpo_loss(
            hidden * 1.5, weight, labels, ref_logps=x.ref_logps, cu_seqlens=x.cu_seqlens, backend=emulator, beta=0.3
        )
        return out.loss + 0.01 * out.chosen_logps.sum(), out.chosen_rewards

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    want, got = loss(hidden), compiled(hidden)
    assert len(launches) == 2
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(value[0], hidden)[0] for value in (got, want)]
    torch.testing.assert_close(*grads)


@on_the_emulator
def test_second_derivatives_are_refused(emulator):
    logps = torch.rand(4, 3).neg().requires_grad_()
    problem = pairs_problem(
        losses.resolve("sigmoid")[0], logps, labels=torch.ones(4, 3).long(), cu_seqlens=None, ref_logps=torch.zeros(4),
        weight=None, ignore_index=-100,
    )  # fmt: skip
    for reduction in losses.REDUCTIONS:
        loss, sums, _ = _ops.call_sequence_dpo(problem, reduction, emulator)
        for value in (loss.sum(), sums.sum()):
            (grad,) = torch.autograd.grad(value, logps, create_graph=True)
            assert torch.equal(grad.detach(), torch.autograd.grad(value, logps, retain_graph=True)[0])
            with pytest.raises(RuntimeError, match="second derivatives"):
                grad.sum().backward(retain_graph=True)
