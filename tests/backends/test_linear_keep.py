"""The kernels of linear_keep against fp64: in Triton's interpreter where there is no GPU, else on a Hopper GPU.

The interpreter has no bf16 products: operands are fp16 there. The cache is bf16 wherever its bits are looked at.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

import triton
from dpofast.kernels import linear_keep as kernels

from dpofast.backends.base import InputGrads, OutputGrads, Saved, Transform
from dpofast.backends.base import Problem as HeadProblem
from dpofast.backends.gpu import GpuPasses
from dpofast.backends.tiled import TiledBackend
from dpofast.plan import Request, Schedule, cost
from dpofast.plan import choose as plan
from dpofast.plan.schedule import up

if kernels.TensorDescriptor is None:
    pytest.skip("this Triton has no tensor descriptors", allow_module_level=True)
INTERPRETED = triton.knobs.runtime.interpret if hasattr(triton, "knobs") else not torch.cuda.is_available()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
if not INTERPRETED and not kernels.supported(DEVICE, torch.bfloat16, 64):
    pytest.skip("needs a GPU of compute capability 9", allow_module_level=True)

# Kernels may make an inf or a NaN on the way, which NumPy remarks on and a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DTYPES = (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16)
WIDTH = kernels.WIDTH
ROUNDING = 2.0**-7 if INTERPRETED else 2.0**-8  # of bf16: the interpreter truncates


class Problem(NamedTuple):
    hidden: torch.Tensor  # [rows, H], of which `offsets` picks
    offsets: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    scale: float

    def tokens(self) -> torch.Tensor:
        return self.hidden.view(-1, self.hidden.shape[-1])[self.offsets // self.hidden.shape[-1]]

    def z(self) -> torch.Tensor:
        return self.scale * (self.tokens().double() @ self.weight.double().T)


def problem(
    n: int, n_hidden: int, v: int, dtype: torch.dtype = DTYPES[-1], scale: float = 1.3, seed: int = 0
) -> Problem:
    make = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n + 5, n_hidden, generator=make).to(DEVICE, dtype)
    weight = (torch.randn(v, n_hidden, generator=make) * 2 * n_hidden**-0.5).to(DEVICE, dtype)
    offsets = (torch.randperm(n + 5, generator=make)[:n] * n_hidden).to(DEVICE)
    labels = torch.randint(0, v, (n,), generator=make)
    labels[0], labels[-1] = 0, v - 1  # in the first tile, and in the last, which may be ragged
    return Problem(hidden, offsets, weight, labels.to(DEVICE), scale)


class Result(NamedTuple):
    z_label: torch.Tensor
    sums: torch.Tensor
    shifts: torch.Tensor
    e: torch.Tensor | None
    logps: torch.Tensor
    lse: torch.Tensor
    factor: torch.Tensor | None
    padding: torch.Tensor | None

    def grad(self) -> torch.Tensor:
        """d logps / d (hidden weight^T)."""
        return self.factor.double()[:, None] * self.e.double()


def run(p: Problem, keep: bool = True, before_seal=None, form: kernels.Form = kernels.FORM) -> Result:
    n, (v, n_hidden) = p.labels.numel(), p.weight.shape
    nan = {"device": DEVICE, "dtype": torch.float32, "fill_value": math.nan}
    packed = torch.full((n, n_hidden), math.nan, device=DEVICE, dtype=p.weight.dtype)
    z_label, logps, lse = torch.full((n,), **nan), torch.full((n,), **nan), torch.full((n, 2), **nan)
    sums, shifts = (torch.full((kernels.tiles(v, form), n), **nan) for _ in range(2))
    e = factor = padding = None
    if keep:
        ld = -(-v // 8) * 8 + 8
        storage = torch.full((n, ld), math.nan, device=DEVICE, dtype=torch.bfloat16)
        e, padding, factor = storage[:, :v], storage[:, v:], torch.full((n,), **nan)
    kernels.pack_tokens(p.hidden, p.offsets, p.weight, p.labels, p.scale, packed, z_label)
    assert torch.equal(packed.nan_to_num(), p.tokens().to(packed.dtype).nan_to_num())
    partials = kernels.Partials(z_label, sums, shifts)
    kernels.linear_keep(packed, p.weight, p.labels, p.scale, partials, e, form)
    got = Result(z_label, sums, shifts, e, logps, lse, factor, padding)
    if before_seal is not None:
        before_seal(got)
    kernels.seal(partials, e, p.labels, p.scale, logps, lse, factor, form)
    return got


def true_logps(z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """With the relative precision of a certain token."""
    rows = torch.arange(len(z), device=z.device)
    rest = z.clone()
    rest[rows, labels] = -math.inf
    return -torch.nn.functional.softplus(rest.logsumexp(1) - z[rows, labels], threshold=1000)


def check(p: Problem, got: Result) -> None:
    z = p.z()
    rows = torch.arange(len(z), device=z.device)
    torch.testing.assert_close(got.z_label.double(), z[rows, p.labels], rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(got.logps.double(), true_logps(z, p.labels), rtol=3e-5, atol=0)
    torch.testing.assert_close(got.lse.double().sum(1), z.logsumexp(1), rtol=2e-6, atol=2e-5)
    assert not got.lse.isnan().any()
    if got.e is None:
        return
    # -scale p, and scale (1 - p) at the label. Every entry is rounded to bf16, once more where its row was scaled.
    rest = z.clone()
    rest[rows, p.labels] = -math.inf
    expected = -(z - z.logsumexp(1, keepdim=True)).exp()
    expected[rows, p.labels] = (rest.logsumexp(1) - z.logsumexp(1)).exp()
    torch.testing.assert_close(got.grad(), p.scale * expected, rtol=2 * ROUNDING + 1e-3, atol=1e-30)


SIZES = ((1, 8, 1), (1, 16, 2), (5, 24, WIDTH), (7, 64, WIDTH + 1), (129, 72, 2 * WIDTH - 1), (37, 40, 700))


@pytest.mark.parametrize("keep", (True, False), ids=("keep", "score"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes_around_those_of_a_tile(sizes, dtype, keep):
    p = problem(*sizes, dtype)
    check(p, run(p, keep))


@pytest.mark.parametrize("form", (kernels.FORM._replace(pieces=1), kernels.FORM._replace(early=True, group=2)), ids=str)
def test_other_forms(form):
    p = problem(20, 24, 1100)
    check(p, run(p, form=form))


@pytest.mark.skipif(INTERPRETED, reason="minutes in the interpreter")
@pytest.mark.parametrize("sizes", ((300, 1032, 32001), (1000, 520, 20000), (64, 4096, 128256)), ids=str)
def test_sizes_of_models(sizes):
    p = problem(*sizes)
    check(p, run(p))
    check(p, run(p, keep=False))


def test_what_the_product_leaves():
    """e and its sums before they are sealed: the label's entry 0, one shift, sums of what is not yet rounded."""
    p = problem(33, 32, 3 * WIDTH + 9)
    z, rows = p.z(), torch.arange(33, device=DEVICE)
    seen = []

    def look(got):
        assert torch.equal(got.shifts, got.z_label.expand_as(got.shifts))
        e = (z - got.z_label.double()[:, None]).exp()
        e[rows, p.labels] = 0
        torch.testing.assert_close(got.e.double(), e, rtol=ROUNDING + 1e-4, atol=0)
        sums = torch.stack([x.sum(1) for x in e.split(WIDTH, 1)])
        torch.testing.assert_close(got.sums.double(), sums, rtol=2e-5, atol=0)
        assert not got.e[rows, p.labels].any()
        seen.append(1)

    got = run(p, before_seal=look)
    assert seen
    check(p, got)


@pytest.mark.parametrize("keep", (True, False), ids=("keep", "score"))
@pytest.mark.parametrize("excess", (30.0, 50.0, 80.0, 120.0, 3000.0))
def test_rows_that_outgrow_their_shift(excess, keep):
    """Entries of other tiles that exceed the label's z by much; also where another row of the tile does not."""
    p = problem(10, 32, 4 * WIDTH + 50, scale=1.0)
    p.weight[:, 0] = 0
    p.hidden[:, 0] = 0
    p.hidden.view(-1, 32)[p.offsets[2:5] // 32, 0] = 1
    p.weight[2 * WIDTH + 7, 0] = excess  # one entry of a middle tile
    p.weight[-3, 0] = excess - 2  # and of the last
    for i in range(2, 5):
        p.labels[i] = i
    got = run(p, keep)
    assert (got.shifts > got.z_label + 20).any() == (excess > 40)
    check(p, got)


def test_labels_that_are_certain():
    """S is 0 where everything else underflows: logp is 0, and no NaN. At 60, it is not."""
    p = problem(6, 16, 2 * WIDTH + 3, scale=1.0)
    p.weight.zero_()
    p.weight[:, 0] = -1
    p.weight[p.labels, 0] = 0
    p.hidden.zero_()
    p.hidden.view(-1, 16)[p.offsets // 16, 0] = torch.tensor([60.0, 80, 500, 1000, 70, 0], device=DEVICE).to(p.hidden)
    p.labels.fill_(0)
    p.weight[0, 0] = 0
    p.weight[1:, 0] = -1
    got = run(p)
    assert (got.logps[2:4] == 0).all() and not got.grad()[2:4].any()
    torch.testing.assert_close(
        got.logps.double(), true_logps(p.z(), p.labels).where(got.logps != 0, 0), rtol=3e-5, atol=0
    )
    assert (got.logps[[0, 1, 4, 5]] < 0).all()


@pytest.mark.parametrize("keep", (True, False), ids=("keep", "score"))
def test_bad_labels_and_numbers(keep):
    """NaN wherever PyTorch has one, and in no other row."""
    p = problem(9, 16, 3 * WIDTH)
    v = p.weight.shape[0]
    p.labels[1], p.labels[2], p.labels[3] = -1, v, 2**40
    p.weight[:, 0] = 0
    p.hidden[:, 0] = 0
    p.weight[200, 0] = 1
    at = p.offsets // 16
    p.hidden[at[4], 0] = math.inf  # inf * 0 is NaN, in every entry
    p.hidden[at[5], 1] = math.nan
    got = run(p, keep)
    bad = torch.zeros(9, dtype=torch.bool, device=DEVICE)
    bad[1:6] = True
    assert torch.equal(got.logps.isnan(), bad) and torch.equal(got.lse.sum(1).isnan(), bad)
    if keep:
        assert torch.equal(got.factor.isnan(), bad)
        assert torch.equal(got.grad().isnan().any(1), bad)


@pytest.mark.parametrize("where", ("label", "another", "both"))
@pytest.mark.parametrize("sign", (1, -1), ids=("inf", "-inf"))
def test_infinite_logits(sign, where):
    """As log_softmax: NaN of a row with +inf; -inf of a label, or 0 of a probability, where z is -inf."""
    p = problem(4, 8, 2 * WIDTH + 5, scale=1.0)
    p.labels[:] = torch.tensor([3, WIDTH + 2, 2 * WIDTH + 1, 9])
    p.hidden.abs_().add_(0.1)
    p.weight[5:7].abs_()
    chosen = {"label": p.labels[:3], "another": torch.tensor([5, 2 * WIDTH]), "both": torch.tensor([3, 5, 2 * WIDTH])}
    p.weight[chosen[where].to(DEVICE)] = sign * math.inf
    z = p.z()
    expected = z.log_softmax(1)[torch.arange(4, device=DEVICE), p.labels]
    got = run(p)
    torch.testing.assert_close(got.logps.double(), expected, rtol=3e-5, atol=0, equal_nan=True)
    assert torch.equal(got.factor.isnan(), expected.isnan())


def test_a_tile_of_nothing_but_minus_infinity():
    p = problem(3, 8, 3 * WIDTH, scale=1.0)
    p.hidden.abs_().add_(0.1)
    p.weight[WIDTH : 2 * WIDTH] = -math.inf
    p.labels[:] = torch.tensor([3, WIDTH + 2, 2 * WIDTH + 1])
    got = run(p)
    expected = p.z().log_softmax(1)[torch.arange(3, device=DEVICE), p.labels]
    torch.testing.assert_close(got.logps.double(), expected, rtol=3e-5, atol=0)
    torch.testing.assert_close(got.lse.double().sum(1), p.z().logsumexp(1), rtol=2e-6, atol=2e-5)
    assert not got.grad().isnan().any()


def test_only_the_padding_of_the_last_16_bytes_is_touched():
    """A store of the TMA ends at a multiple of 16 bytes."""
    got = run(problem(20, 16, 333))
    assert got.padding[:, -8:].isnan().all()


def test_rows_of_hidden_anywhere_in_memory():
    """Offsets that are not multiples of H, and a weight with a gap between its rows."""
    p = problem(6, 24, 150)
    storage = torch.zeros(400, device=DEVICE, dtype=p.hidden.dtype).normal_()
    offsets = torch.tensor([0, 3, 50, 51, 200, 376], device=DEVICE)
    rows = torch.stack([storage[i : i + 24] for i in offsets.tolist()])
    weight = torch.zeros(150, 32, device=DEVICE, dtype=p.weight.dtype)
    weight[:, :24] = p.weight
    packed, z_label = torch.empty(6, 24, device=DEVICE, dtype=p.weight.dtype), torch.empty(6, device=DEVICE)
    hidden = storage.as_strided((6, 24), (1, 1))
    kernels.pack_tokens(hidden, offsets, weight[:, :24], p.labels, p.scale, packed, z_label)
    assert torch.equal(packed, rows)
    z = p.scale * (rows.double() * p.weight.double()[p.labels]).sum(1)
    torch.testing.assert_close(z_label.double(), z, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
def test_a_new_n_does_not_compile_again():
    run(problem(64, 64, 1000))
    compiled = [len(k.device_caches[DEVICE.index or 0][0]) for k in (kernels.linear_keep_kernel, kernels.seal_kernel)]
    for n in (1, 63, 80, 130):
        run(problem(n, 72, 1001))
    again = [len(k.device_caches[DEVICE.index or 0][0]) for k in (kernels.linear_keep_kernel, kernels.seal_kernel)]
    assert again == compiled


def test_what_is_supported():
    assert not kernels.supported(torch.device("cpu"), torch.bfloat16, 64)
    if not INTERPRETED:
        x = torch.empty(4, 64, device=DEVICE, dtype=torch.bfloat16)
        assert kernels.supported(DEVICE, torch.bfloat16, 64, x)
        assert not kernels.supported(DEVICE, torch.float32, 64) and not kernels.supported(DEVICE, torch.bfloat16, 60)
        assert not kernels.supported(DEVICE, torch.bfloat16, 56, x[:, 4:60]) and not kernels.supported(
            DEVICE, torch.bfloat16, 64, x.T
        )


BLOCKS = {"cached": 0, "jacobian": 0, "score": 0, "recompute": 64, "recompute-split": 128}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_loops_that_run_on_it(name, monkeypatch):
    """Forward and backward of a whole call, in chunks of tokens, against the reference."""
    n, n_hidden, v, chunk = 70, 24, 523, 70 if name in ("cached", "score") else 40
    given = problem(n, n_hidden, v, scale=0.25)  # fp16 could not hold more
    hidden = given.hidden.view(1, n + 5, n_hidden)
    positions = given.offsets // n_hidden
    case = HeadProblem(hidden, given.weight, None, positions, given.labels, Transform(logit_scale=0.25))
    engine = TiledBackend(GpuPasses(thread_blocks=4))
    cache = torch.empty(
        n * (up(v, 8) * 2 if name == "cached" else n_hidden * 4) + n * 4, dtype=torch.uint8, device=DEVICE
    )
    keeps = BLOCKS[name] == 0 and name != "score"
    how = Schedule.of(name, (BLOCKS[name], chunk, cache.numel() if keeps else 0, 1))
    with monkeypatch.context() as patch:
        patch.setattr(GpuPasses, "fold", None)  # no tile of the forward is folded
        values = engine.forward(case, how, (), cache)

    exact = [x.double().requires_grad_() for x in (hidden, given.weight)]
    c = torch.randn(n, device=DEVICE)
    logps = (0.25 * exact[0][0, positions] @ exact[1].T).log_softmax(-1).gather(1, given.labels[:, None]).squeeze(1)
    d_hidden, d_weight = torch.autograd.grad((logps * c).sum(), exact)
    torch.testing.assert_close(values["logps"].double(), logps.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values["lse"].sum(1).double(), given.z().logsumexp(1), rtol=1e-5, atol=1e-5)
    if name == "score":
        return
    grads = InputGrads(torch.zeros_like(hidden), None if name == "jacobian" else torch.zeros_like(given.weight))
    engine.backward(case, how, Saved(**values, cache=cache), OutputGrads(c), grads)
    for got, want in zip(grads[:2], (d_hidden, d_weight)):
        if got is not None:
            assert (got - want).norm() / want.norm() < 0.01


def score(hidden: torch.Tensor, weight: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    case = HeadProblem(hidden, weight, None, positions, labels)
    return TiledBackend(GpuPasses(thread_blocks=4)).forward(case, Schedule.of("score", (0, 0, 0)), (), None)["logps"]


@pytest.mark.parametrize("given", ("every second column", "a weight off 16 bytes", "rows of three dimensions"))
def test_operands_are_brought_into_the_shape_that_the_kernels_take(given, monkeypatch):
    n, n_hidden, v = 6, 16, 150
    p, positions = problem(n, n_hidden, v), torch.tensor([0, 3, 4, 7, 9, 10], device=DEVICE)
    hidden = torch.zeros(4, 3, 2 * n_hidden, device=DEVICE, dtype=p.hidden.dtype)
    hidden[..., ::2] = p.hidden.new_empty(4, 3, n_hidden).normal_()
    hidden = hidden[..., ::2] if given == "every second column" else hidden[..., ::2].contiguous()
    weight = torch.zeros(v * n_hidden + 8, device=DEVICE, dtype=p.weight.dtype)
    weight = weight[1 if "off" in given else 8 :][: v * n_hidden].view(v, n_hidden).copy_(p.weight)
    if "three" in given:  # not one after the other in memory
        hidden = hidden.transpose(0, 1)
    seen, multiply = [], kernels.linear_keep
    monkeypatch.setattr(kernels, "linear_keep", lambda *args: seen.append(args[:2]) or multiply(*args))
    got = score(hidden, weight, positions, p.labels)
    ((packed, multiplied),) = seen
    assert packed.data_ptr() % 16 == multiplied.data_ptr() % 16 == 0
    z = hidden.reshape(-1, n_hidden)[positions].double() @ weight.double().T
    want = z.log_softmax(-1).gather(1, p.labels[:, None]).squeeze(1)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_what_a_score_allocates_is_planned(monkeypatch):
    for name in ("pack_tokens", "linear_keep", "seal"):
        monkeypatch.setattr(kernels, name, lambda *_, **__: None)
    made: dict[int, torch.Tensor] = {}

    class Allocated(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                made.setdefault(out.untyped_storage().data_ptr(), out)
            return out

    n, n_hidden, v = 200, 64, 20000
    given = [torch.empty(n, n_hidden, dtype=torch.bfloat16), torch.empty(v, n_hidden, dtype=torch.bfloat16)]
    positions, labels = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    with Allocated():
        score(*given, positions, labels)
    known = {x.untyped_storage().data_ptr() for x in (*given, positions, labels)}
    allocated = sum(x.untyped_storage().nbytes() for pointer, x in made.items() if pointer not in known)
    request = Request(n, n_hidden, v, torch.bfloat16, torch.bfloat16, 1 << 30, False, False, fuses=True)
    planned = plan(request, "cuda", device=cost.DEVICES["h100"])
    assert planned.is_fused and allocated <= planned.workspace_bytes < 1.1 * allocated
    again = request._replace(to_hidden=True, to_weight=True, budget=allocated * 3)
    least = plan(again, "cuda", device=cost.DEVICES["h100"])
    assert least.scores_fused and least.workspace_bytes >= allocated
