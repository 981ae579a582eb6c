"""The Triton kernels in Triton's interpreter, on the CPU: masks, indices, the algebra, the order of sums.

fp32, fp16 and fp64 only: the interpreter's bf16 products are silently wrong. Registers and shared memory are
test_triton_aot.py's; races and speed need a GPU.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

pytest.importorskip("triton")

import numerics
import triton
import triton.language as tl
from dpofast.kernels import device, launch
from dpofast.kernels import linear_logprob_backward as backwards
from dpofast.kernels import linear_logprob_forward as forwards
from numerics import EVERYTHING, SCHEDULES, problem, run_forced

import dpofast
from dpofast.backends import registry
from dpofast.backends.base import Problem
from dpofast.backends.triton import TritonBackend, TritonPasses
from dpofast.plan import Schedule

NAME = "triton:interpret"
FP16, FP32, FP64 = torch.float16, torch.float32, torch.float64
IDS = {FP16: "fp16", FP32: "fp32", FP64: "fp64"}
TILE = launch.TILES["interpreter"]["backward", False][0]

if not triton.knobs.runtime.interpret:  # conftest.py asks for it where there is no GPU
    pytest.skip("the kernels run on a GPU here, as backend triton:gpu", allow_module_level=True)

# Kernels may make an inf or a NaN on the way to where() throwing it away, which NumPy remarks on and a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def backend(monkeypatch) -> str:
    """`dpofast.linear_logprob(..., backend=NAME)`, with rows split: 6 programs to keep busy."""
    monkeypatch.setitem(registry.added, NAME, TritonBackend(TritonPasses(thread_blocks=6)))
    with numerics.threads(1):
        yield NAME


def test_kernels_are_interpreted():
    assert type(device.expm1).__name__ == "InterpretedFunction", "Triton was imported before this file"


# Every schedule.

PLAIN, ALL_OPTIONS = {}, EVERYTHING | {"entropy": True}


# An entropy gradient has the logits computed again, so that what was kept is only used without one.
@pytest.mark.parametrize("options", (PLAIN, EVERYTHING, ALL_OPTIONS), ids=("plain", "transform", "every option"))
@pytest.mark.parametrize("dtype", (FP32, FP16), ids=IDS.get)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_as_good_as_plain_pytorch(schedule, dtype, options):
    p = problem(20, 24, 150, dtype, **options)
    outputs = numerics.STATISTICS if options else ()
    if schedule == "mixed":  # no budget leaves room for some of so small a g: two blocks of 64 of 150 columns
        with numerics.recorded_choices(Schedule("mixed", 64, 0, 20 * 128 * dtype.itemsize, 0, 128 / 150)):
            got = numerics.run(dpofast.linear_logprob, p, backend=NAME, outputs=outputs)
    else:
        got = run_forced(schedule, p, NAME, outputs)
    numerics.assert_as_good_as_plain(p, got, train=SCHEDULES[schedule][0], outputs=outputs)


@pytest.mark.parametrize("schedule", ("score", "cached", "recompute"))
def test_fp64_stays_fp64(schedule):
    p = problem(9, 8, 70, FP64, **ALL_OPTIONS)
    numerics.assert_as_good_as_plain(p, run_forced(schedule, p, NAME), train=SCHEDULES[schedule][0])


def on(schedule: str, p: numerics.Problem, outputs=(), train=None, block=64, token_chunk=0) -> dict[str, torch.Tensor]:
    """linear_logprob made to run on a schedule that keeps nothing, whatever the budget."""
    with numerics.recorded_choices(Schedule(schedule, block, token_chunk, 0, 0, 0.0)):
        train = SCHEDULES[schedule][0] if train is None else train
        return numerics.run(dpofast.linear_logprob, p, backend=NAME, outputs=outputs, train=train)


SIZES = ((1, 1, 1), (5, 3, 1), (16, 16, 32), (17, 17, 33), (15, 31, 31), (33, 8, 129))


@pytest.mark.parametrize("dtype", (FP32, FP16), ids=IDS.get)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes_around_those_of_a_tile(sizes, dtype):
    """V = 1 included, where every log-prob is 0 and so is every gradient."""
    p = problem(*sizes, dtype, bias=True, seed=3)
    got = on("recompute", p, numerics.STATISTICS)
    numerics.assert_as_good_as_plain(p, got)
    assert not got["d hidden"][p.labels == -100].any()


@pytest.mark.parametrize(("block", "token_chunk"), ((24, 16), (32, 0), (40, 7), (40, 20), (1000, 0), (1000, 7)))
def test_any_block_and_chunk_gives_the_gradients(block, token_chunk):
    p = problem(41, 20, 81, bias=True, softcap=4.0, entropy=True)
    got = on("recompute", p, ("entropy",), block=block, token_chunk=token_chunk)
    numerics.assert_as_good_as_plain(p, got, outputs=("entropy",))


@pytest.mark.parametrize("train", (("hidden",), ("weight",), ("bias",), ("hidden", "bias")), ids="+".join)
def test_each_gradient_alone(train):
    p = problem(20, 24, 70, bias=True)
    numerics.assert_as_good_as_plain(p, on("recompute", p, train=train, token_chunk=16), train=train, outputs=())


def test_entropy_gradient_alone():
    p = problem(20, 24, 70, entropy=True)
    p.grad_logps.zero_()
    numerics.assert_as_good_as_plain(p, on("recompute", p, ("entropy",)), outputs=("entropy",))


@pytest.mark.parametrize("dtypes", ((FP16, FP32), (FP32, FP16)), ids=("fp16 x fp32", "fp32 x fp16"))
def test_two_dtypes_are_promoted(dtypes):
    p = problem(20, 24, 70, *dtypes, bias=True)
    numerics.assert_as_good_as_plain(p, on("recompute", p), outputs=())


def test_strides_are_followed_without_a_copy():
    p = problem(22, 32, 70)
    hidden = p.hidden.reshape(2, 15, 32).transpose(0, 1)  # rows that no single stride describes
    labels, c = p.labels.reshape(2, 15).T, p.grad_logps.reshape(2, 15).T
    strided = numerics.dataclasses.replace(p, hidden=hidden, labels=labels, grad_logps=c)
    strided.weight = p.weight.T.contiguous().T
    got, want = on("recompute", strided), on("recompute", p)
    # Not to the bit: the interpreter's products are NumPy's, whose BLAS may add up strided operands in another order.
    torch.testing.assert_close(got["logps"].T.reshape(-1), want["logps"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got["d hidden"].transpose(0, 1).reshape(30, 32), want["d hidden"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got["d weight"], want["d weight"], rtol=1e-4, atol=1e-5)  # tokens in another order


# Values.

V = 100
SPECIAL = {
    "first logit -inf": {0: -math.inf},
    "a whole tile -inf": dict.fromkeys(range(64), -math.inf),
    "all but one -inf": dict.fromkeys([i for i in range(V) if i != 50], -math.inf),
    "all -inf": dict.fromkeys(range(V), -math.inf),
    "+inf": {7: math.inf},
    "NaN in the last tile": {99: math.nan},
    "NaN and +inf": {7: math.nan, 60: math.inf},
    "a whole tile NaN": dict.fromkeys(range(32, 64), math.nan),
    "huge": {5: 3e38},
}


@pytest.mark.parametrize("schedule", ("score", "cached", "recompute"))
@pytest.mark.parametrize("values", SPECIAL.values(), ids=SPECIAL)
def test_special_logits_give_what_pytorch_gives(values, schedule):
    p = problem(9, 8, V, bias=True)
    for at, value in values.items():
        p.bias[at] = value
    p.labels[p.labels != -100] = torch.tensor([0, 7, 31, 32, 50, 60, 99, 98, 5])
    train = SCHEDULES[schedule][0]
    got = run_forced("cached", p, NAME, ()) if schedule == "cached" else on(schedule, p)
    want = numerics.truth(p, train=train, outputs=())
    other = numerics.plain(p, train=train, outputs=())
    limits = {}
    for name in want:
        numerics.assert_same_special_values(name, got[name], other[name])
        error = (other[name].double() - want[name].double()).abs()
        limits[name] = 2 * float(error.nan_to_num(0, 0, 0).max()) + 1e-5 * (1 + numerics._scale(want[name]))
    numerics.assert_close(got, want, limits)


@pytest.mark.parametrize("schedule", ("cached", "recompute"))
def test_a_logit_of_minus_inf_adds_nothing_to_the_gradient_of_the_entropy(schedule):
    """0 log 0 is 0: as with a logit whose probability underflows."""
    p = problem(9, 8, V, bias=True, entropy=True)
    p.labels[p.labels != -100] = 50
    runs = []
    for low in (-1e6, -math.inf):
        p.bias[40:44] = low
        outputs = ("entropy",)
        runs.append(run_forced("cached", p, NAME, outputs) if schedule == "cached" else on(schedule, p, outputs))
    assert all(x.isfinite().all() and torch.equal(runs[1][name], x) for name, x in runs[0].items())


def test_only_the_first_of_equal_maxima_is_the_top():
    hidden, weight = torch.ones(4, 8), torch.zeros(90, 8)
    weight[[20, 21, 70]] = 1.0
    out = dpofast.linear_logprob(hidden, weight, torch.tensor([20, 21, 70, 0]), outputs=("is_top1",), backend=NAME)
    assert out.is_top1.tolist() == [True, False, False, False]


@pytest.mark.parametrize("gap", (20.0, 60.0))
@pytest.mark.parametrize("schedule", ("cached", "recompute"))
def test_a_confident_token_keeps_its_relative_precision(schedule, gap):
    """1 - p is e^-20 or e^-60, where z_label - lse and 1 - p in fp32 would be all rounding."""
    p = problem(20, 16, 70, bias=True, masked=False)
    p.weight.mul_(0.05)
    p.labels[:] = 45
    p.bias[45] = gap
    got = run_forced("cached", p, NAME, ()) if schedule == "cached" else on("recompute", p)
    want = numerics.truth(p, outputs=())
    if gap == 60:  # p rounds to 1 in fp64: its truth is -sum of the others' odds
        z = p.hidden.double() @ p.weight.double().T + p.bias.double()
        odds = (z - z[:, 45:46]).exp()
        odds[:, 45] = 0
        want["logps"] = -odds.sum(-1)
        g = -odds
        g[:, 45] = odds.sum(-1)
        g *= p.grad_logps.unsqueeze(-1)
        want["d hidden"], want["d weight"], want["d bias"] = g @ p.weight.double(), g.T @ p.hidden.double(), g.sum(0)
    for name, x in want.items():
        error = float((got[name].double() - x).abs().max() / x.abs().max())
        assert 0 < error < 1e-5, (name, error)


def test_a_label_out_of_range_makes_its_row_nan_and_no_other():
    """A device is not asked for its labels beforehand."""
    hidden, weight, y = torch.randn(6, 8), torch.randn(40, 8), torch.tensor([0, 40, -1, 39, 63, 1 << 40])
    case = Problem(hidden, weight, None, torch.arange(6), y)
    out = registry.added[NAME].forward(case, Schedule.of("score", (64, 0, 0)), (), None)
    want = (hidden @ weight.T).log_softmax(-1)[[0, 3], [0, 39]]
    assert out["logps"].isnan().tolist() == [False, True, True, False, True, True]
    torch.testing.assert_close(out["logps"][[0, 3]], want)


def test_the_same_bits_every_time_and_close_ones_for_any_number_of_programs(monkeypatch):
    p = problem(20, 24, 150, **ALL_OPTIONS)
    runs = {}
    for programs in (1, 6, 6, 1000):
        monkeypatch.setitem(registry.added, NAME, TritonBackend(TritonPasses(programs)))
        got = on("recompute", p, numerics.STATISTICS)
        for name, x in runs.setdefault(programs, got).items():
            assert torch.equal(got[name], x), name
        numerics.assert_as_good_as_plain(p, got)


@triton.jit
def _functions_kernel(x, expm1, tanh, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(expm1 + at, device.expm1(tl.load(x + at)))
    tl.store(tanh + at, device.tanh(tl.load(x + at)))


@pytest.mark.parametrize("dtype", (FP32, FP64), ids=IDS.get)
def test_expm1_and_tanh_are_as_exact_as_their_arguments(dtype):
    x = torch.cat([sign * torch.logspace(-30, 1.3, 1000, dtype=dtype) for sign in (1, -1)])
    x = torch.cat(
        (
            x,
            torch.tensor(
                [0.0, 0.5, -0.5, 0.49999997, -0.49999997, 88.0, -1e4, 1e4, math.inf, -math.inf, math.nan], dtype=dtype
            ),
        )
    )
    x = torch.cat((x, x.new_zeros(2048 - x.numel())))
    expm1, tanh = torch.empty_like(x), torch.empty_like(x)
    _functions_kernel[(1,)](x, expm1, tanh, N=2048)
    tiny = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(expm1, x.double().expm1().to(dtype), rtol=tiny, atol=0, equal_nan=True)
    torch.testing.assert_close(tanh, x.double().tanh().to(dtype), rtol=tiny, atol=0, equal_nan=True)


# From logits.


@pytest.mark.parametrize("dtype", (FP32, FP16, FP64), ids=IDS.get)
@pytest.mark.parametrize("v", (1, 17, 4200))
def test_logprob_from_rows_at_any_offset(v, dtype):
    """Rows of every other place of a wider tensor, some of them masked; a row of 4200 is split."""
    g = torch.Generator().manual_seed(v)
    wide = (3 * torch.randn(3, 4, v + 5, generator=g)).to(dtype)
    labels = torch.randint(v, (3, 2), generator=g)
    labels[1, 1] = -100
    c, e = torch.randn(3, 2, generator=g, dtype=FP64), torch.randn(3, 2, generator=g, dtype=FP64)
    runs = {}
    for name, function, inputs in (
        ("got", lambda *a, **k: dpofast.logprob(*a, backend=NAME, **k), wide),
        ("in place", lambda *a, **k: dpofast.logprob(*a, backend=NAME, inplace_grad=True, **k), wide.clone()),
        ("plain", dpofast.reference.logprob, wide),
        ("truth", dpofast.reference.logprob, wide.double()),
    ):
        logits = inputs[:, ::2, 3 : v + 3].detach().requires_grad_()
        out = function(logits, labels, temperature=0.7, softcap=5.0, outputs=numerics.STATISTICS)
        loss = (out.logps * c.to(out.logps.dtype)).sum() + (out.entropy * e.to(out.logps.dtype)).sum()
        values = {k: x.detach() for k, x in out._asdict().items() if x is not None}
        runs[name] = values | {"d logits": torch.autograd.grad(loss, logits)[0]}
    tiny = 1e-12 if dtype == FP64 else 16 * torch.finfo(FP32).eps
    limits = {}
    for name, x in runs["truth"].items():
        error = float((runs["plain"][name].double() - x.double()).abs().max())
        limits[name] = 0.0 if name == "is_top1" else 2 * error + tiny * numerics._scale(x)
    numerics.assert_close(runs["got"], runs["truth"], limits)
    numerics.assert_close(runs["in place"], runs["truth"], limits)
    assert not runs["got"]["d logits"][1, 1].any()


@pytest.mark.parametrize("inplace_grad", (False, True), ids=("new memory", "in place"))
def test_rows_with_logits_of_minus_inf_under_gradients_of_logps_and_entropy_at_once(inplace_grad):
    """Against the truth; the last label is at one of them."""
    g = torch.Generator().manual_seed(0)
    values, labels = 3 * torch.randn(6, 4200, generator=g), torch.tensor([3, 4, 4199, -100, 77, 5])
    values[:, 2000:4100] = values[:, 5] = -math.inf
    runs = []
    for function, dtype, options in (
        (dpofast.reference.logprob, FP64, {}),
        (dpofast.logprob, FP32, {"backend": NAME, "inplace_grad": inplace_grad}),
    ):
        leaf = values.to(dtype).requires_grad_()
        out = function(leaf * 1, labels, outputs=("entropy",), **options)
        (grad,) = torch.autograd.grad(out.logps.sum() + 2 * out.entropy.sum(), leaf)
        runs.append({"logps": out.logps.detach(), "entropy": out.entropy.detach(), "d logits": grad})
    want, got = runs
    assert want["d logits"].isfinite().all()
    numerics.assert_close(got, want, {"logps": 1e-5, "entropy": 1e-5, "d logits": 1e-6})


# Tiles.


def test_tiles_are_fixed_unless_tuning_is_asked_for(monkeypatch):
    def never(_tile):
        raise AssertionError("launched for a choice that has been made")

    monkeypatch.delenv("DPOFAST_AUTOTUNE", raising=False)
    monkeypatch.setattr(launch, "architecture", lambda _: "sm_90")
    for kernel, dtype, plain in itertools.product(("forward", "backward"), (FP16, FP32), (True, False)):
        tile = launch.choose_tile(kernel, torch.device("cuda"), dtype, plain, (1, 1, 1), never)
        assert tile == launch.candidates("sm_90", kernel, dtype, plain)[0]
        assert tile.plain == (plain and dtype == FP16)


def test_second_products_go_through_whole_blocks_of_a_tile():
    """They load no more of g than was written."""
    every = {tile for arch in launch.TILES.values() for tiles in arch.values() for tile in tiles}
    assert all(tile.v % tile.k == 0 and tile.n % tile.k == 0 for tile in every if tile.k)
    assert all(64 % tile.h == 0 for tile in every if tile.plain)  # as is_plain has it


# What takes registers, one at a time.
NOT_PLAIN = {
    "softcap": ({"softcap": 5.0}, {"forward", "backward"}),
    "statistics": ({"outputs": numerics.STATISTICS}, {"forward"}),
    "gradient of the entropy": ({"entropy": True, "outputs": ("entropy",)}, {"forward", "backward"}),
    "hidden size": ({"h": 80}, {"forward", "backward"}),
    "every other of hidden": ({"hidden": lambda x: x.repeat_interleave(2, -1)[..., ::2]}, {"forward", "backward"}),
    "hidden unaligned": ({"hidden": lambda x: torch.nn.functional.pad(x, (0, 1))[..., :-1]}, {"forward", "backward"}),
    "weight unaligned": ({"weight": lambda x: torch.nn.functional.pad(x, (0, 1))[:, :-1]}, {"forward", "backward"}),
    "weight transposed": ({"weight": lambda x: x.T.contiguous().T}, {"forward", "backward"}),
}


@pytest.mark.parametrize(("what", "general"), (({}, set()), *NOT_PLAIN.values()), ids=("plain", *NOT_PLAIN))
def test_a_tile_for_plain_calls_is_taken_by_no_other(what, general, monkeypatch):
    found = {}

    def choose_tile(kernel, *arguments):
        found[kernel] = arguments[2]
        return launch.choose_tile(kernel, *arguments)

    monkeypatch.setattr(forwards, "choose_tile", choose_tile)
    monkeypatch.setattr(backwards, "choose_tile", choose_tile)
    options = {name: what[name] for name in ("softcap", "entropy") if name in what}
    p = problem(20, what.get("h", 64), 150, FP16, bias=True, **options)
    changes = {name: what[name](getattr(p, name)) for name in ("hidden", "weight") if name in what}
    on("recompute", numerics.dataclasses.replace(p, **changes), what.get("outputs", ()))
    assert found == {kernel: kernel not in general for kernel in ("forward", "backward")}


def test_tuning_times_once_for_each_kernel_dtype_and_class_of_shape(monkeypatch):
    monkeypatch.setenv("DPOFAST_AUTOTUNE", "1")
    monkeypatch.setattr(launch, "architecture", lambda _: "sm_90")
    monkeypatch.setattr(launch, "_fastest", {})
    timed = []

    def slower_each_time(run):
        run()
        return -len(timed)

    monkeypatch.setattr(launch, "time_of", slower_each_time)
    for kernel, dtype, shape in (
        ("forward", FP16, (1000, 150_000, 4096)),
        ("forward", FP16, (1024, 200_000, 4096)),  # of the same class
        ("forward", FP16, (1025, 150_000, 4096)),
        ("forward", FP32, (1000, 150_000, 4096)),
        ("backward", FP16, (1000, 150_000, 4096)),
    ):
        before = len(timed)
        tile = launch.choose_tile(kernel, torch.device("cuda"), dtype, True, shape, timed.append)
        candidates = launch.candidates("sm_90", kernel, dtype, True)
        assert tile == candidates[-1]  # the last, which the clock above prefers
        assert timed[before:] == ([] if shape[0] == 1024 else list(candidates))


def test_tuning_leaves_the_results_alone(monkeypatch):
    p = problem(20, 24, 150, bias=True)
    want = on("recompute", p, block=64, token_chunk=16)
    smaller = TILE._replace(n=32, c=16)
    tiles = {key: (*tiles, smaller) for key, tiles in launch.TILES["interpreter"].items()}
    monkeypatch.setitem(launch.TILES, "interpreter", tiles)
    monkeypatch.setenv("DPOFAST_AUTOTUNE", "1")
    monkeypatch.setattr(launch, "_fastest", {})
    clock = iter(range(100))
    monkeypatch.setattr(launch, "time_of", lambda run: (run(), next(clock))[1])
    got = on("recompute", p, block=64, token_chunk=16)
    assert len(launch._fastest) == 2 and all(torch.equal(got[name], x) for name, x in want.items())


@pytest.mark.parametrize(
    ("capability", "name"),
    (
        ((8, 0), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 3), "sm_100"),
        ((12, 1), "sm_120"),
        ((8, 6), "other"),
        ((7, 5), "other"),
    ),
)
def test_architectures_have_the_tiles_of_their_family(monkeypatch, capability, name):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    launch.architecture.cache_clear()
    assert launch.architecture(torch.device("cuda", 0)) == name
    launch.architecture.cache_clear()
