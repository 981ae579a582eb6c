"""What numeric tests share: problems, the fp64 truth, plain PyTorch, and how far from the truth is too far.

A backend may be at most twice as far from the truth (`dpofast.reference` in fp64) as plain PyTorch in the
problem's own dtype is, plus a few roundings of its accumulator.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math

import torch
from torch import Tensor

import dpofast
from dpofast import contract, primitive, reference
from dpofast.plan import Request, Schedule, choose

STATISTICS = contract.STATISTICS
SHORT = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
EVERYTHING = {"bias": True, "softcap": 4.0, "temperature": 0.7, "logit_scale": 1.3}


@dataclasses.dataclass
class Problem:
    """Inputs of linear_logprob, the incoming gradients, and the options; ``labels`` hold some -100."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    grad_logps: Tensor
    grad_entropy: Tensor | None
    options: dict

    def to(self, dtype: torch.dtype) -> Problem:
        bias = None if self.bias is None else self.bias.to(dtype)
        return dataclasses.replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias)


def problem(
    n: int, h: int, v: int, dtype: torch.dtype = torch.float32, weight_dtype: torch.dtype | None = None, *,
    bias: bool = False, entropy: bool = False, masked: bool = True, seed: int = 0, **options,
) -> Problem:  # fmt: skip
    """n completion tokens [n + masked ones, h] against a head [v, h] whose logits have a spread of about 3."""
    g = torch.Generator().manual_seed(seed)
    total = n + (n + 3) // 3 if masked else n
    labels = torch.randint(v, (total,), generator=g)
    labels[torch.randperm(total, generator=g)[n:]] = -100
    hidden = torch.randn(total, h, generator=g, dtype=torch.float64)
    weight = torch.randn(v, h, generator=g, dtype=torch.float64) * 3 / math.sqrt(h)
    b = torch.randn(v, generator=g, dtype=torch.float64)
    c = torch.randn(total, generator=g, dtype=torch.float64)
    e = torch.randn(total, generator=g, dtype=torch.float64)
    wide = weight_dtype or dtype
    return Problem(
        hidden.to(dtype), weight.to(wide), b.to(wide) if bias else None, labels, c, e if entropy else None, options
    )


def run(function, p: Problem, *, train=("hidden", "weight", "bias"), outputs=STATISTICS, **more) -> dict[str, Tensor]:
    """Values by name, and gradients as "d hidden" and so on, for those inputs that ``train`` names."""
    names = ("hidden", "weight", "bias")
    inputs = {name: getattr(p, name) for name in names}
    inputs = {name: None if x is None else x.detach().requires_grad_(name in train) for name, x in inputs.items()}
    out = function(
        inputs["hidden"], inputs["weight"], p.labels, bias=inputs["bias"], outputs=outputs, **p.options, **more
    )
    results = {name: x.detach() for name, x in out._asdict().items() if x is not None}
    wanted = [name for name in names if name in train and inputs[name] is not None]
    if wanted:
        loss = (out.logps * p.grad_logps.to(out.logps.dtype)).sum()
        if p.grad_entropy is not None:
            loss = loss + (out.entropy * p.grad_entropy.to(out.logps.dtype)).sum()
        grads = torch.autograd.grad(loss, [inputs[name] for name in wanted])
        results |= {f"d {name}": g for name, g in zip(wanted, grads)}
    return results


@contextlib.contextmanager
def threads(n: int):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# PyTorch's own work here is so small that a second thread costs ten times what it saves.


@threads(1)
def truth(p: Problem, **kwargs) -> dict[str, Tensor]:
    return run(reference.linear_logprob, p.to(torch.float64), **kwargs)


def _plain_linear_logprob(hidden, weight, labels, *, bias=None, **options):
    """As anyone writes it: the product in the inputs' dtype, the softmax in fp32."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    logits = torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return reference.logprob(logits, labels, **options)


@threads(1)
def plain(p: Problem, **kwargs) -> dict[str, Tensor]:
    return run(_plain_linear_logprob, p, **kwargs)


def _describe(name: str, got: Tensor, want: Tensor, error: Tensor) -> str:
    at = int(error.flatten().argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), want.shape))
    return f"{name}{list(where)}: got {float(got.flatten()[at])!r}, expected {float(want.flatten()[at])!r}"


def assert_same_special_values(name: str, got: Tensor, want: Tensor) -> None:
    for what, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differs = test(got) != test(want)
        assert not differs.any(), f"{what} at different places: " + _describe(name, got, want, differs.double())


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], limits: dict[str, float]) -> None:
    """Each named result within ``limits[name]`` of ``want``, absolute; prints the worst element."""
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].shape == x.shape, (name, got[name].shape, x.shape)
        y, x = got[name].double(), x.double()
        assert_same_special_values(name, y, x)
        error = torch.where(x.isfinite(), (y - x).abs(), 0.0)
        worst = float(error.max()) if error.numel() else 0.0
        assert worst <= limits[name], f"{_describe(name, y, x, error)}; error {worst:.3g} > {limits[name]:.3g}"


def _scale(x: Tensor) -> float:
    x = x.double()
    x = x[x.isfinite()]
    return float(x.abs().max()) if x.numel() else 0.0


def _roundings(p: Problem) -> float:
    """The tiny term, relative: a few roundings of the accumulator. In fp64, plain PyTorch is the truth itself."""
    return 1e-12 if torch.float64 in (p.hidden.dtype, p.weight.dtype) else 16 * torch.finfo(torch.float32).eps


def _last_place(got: Tensor, want: Tensor) -> float:
    """A unit and a quarter in the last place of the largest of 16-bit results: where plain PyTorch happens to be within
    half of one, two roundings of operands and one of the result are still as good."""
    scale = _scale(want)
    return (
        1.25 * torch.finfo(got.dtype).eps * 2 ** math.floor(math.log2(scale))
        if got.element_size() == 2 and scale
        else 0.0
    )


def assert_as_good_as_plain(p: Problem, got: dict[str, Tensor], **kwargs) -> None:
    want, other = truth(p, **kwargs), plain(p, **kwargs)
    limits = {}
    for name, x in want.items():
        error = (other[name].double() - x.double()).abs()
        error = float(error[error.isfinite()].max()) if error.isfinite().any() else 0.0
        limits[name] = (
            0.0 if name == "is_top1" else max(2 * error + _roundings(p) * _scale(x), _last_place(got[name], x))
        )
    assert_close(got, want, limits)


@contextlib.contextmanager
def recorded_choices(replay: Schedule | None = None):
    """The schedules that linear_logprob really runs on; with ``replay``, it is made to run on that one."""
    choices = []

    def recording(*args, **kwargs):
        choices.append(replay or choose(*args, **kwargs))
        return choices[-1]

    before, primitive.chosen = primitive.chosen, recording
    try:
        yield choices
    finally:
        primitive.chosen = before


# What a schedule's name in the tests means: which inputs train, and what its plan looks like.
SCHEDULES = {
    "score": ((), lambda c, n: c.name == "score" and not 0 < c.token_chunk < n),
    "score, chunked": ((), lambda c, n: c.name == "score" and 0 < c.token_chunk < n),
    "jacobian": (("hidden",), lambda c, n: c.name == "jacobian"),
    "recompute, frozen head, chunked": (
        ("hidden",),
        lambda c, n: c.name == "recompute" and 0 < c.token_chunk < n,
    ),
    "cached": (("hidden", "weight", "bias"), lambda c, n: c.name == "cached"),
    "mixed": (
        ("hidden", "weight", "bias"),
        lambda c, n: c.name == "mixed" and 0 < c.cached_share < 1,
    ),
    "recompute": (("hidden", "weight", "bias"), lambda c, n: c.name == "recompute" and not c.cache_bytes),
    "recompute-split": (("hidden", "weight", "bias"), lambda c, n: c.name == "recompute-split"),
    "cached, frozen hidden": (("weight", "bias"), lambda c, n: c.name == "cached"),
    "recompute, frozen hidden": (("weight", "bias"), lambda c, n: c.name == "recompute"),
}


@functools.cache
def _budget(schedule: str, n: int, backend: str, **shape) -> int:
    """The largest budget, of a fine grid, that gives this schedule."""
    is_it = SCHEDULES[schedule][1]
    for step in (1.1, 1.005):
        budget = 1 << 26
        while budget > 1 << 8:
            with contextlib.suppress(ValueError):
                if is_it(choose(Request(n, budget=budget, **shape), backend), n):
                    return budget
            budget = int(budget / step)
    raise AssertionError(f"no budget gives {schedule!r} on {backend}")


def forced(schedule: str, p: Problem, backend: str, outputs=STATISTICS) -> dict:
    """``train`` and ``memory_budget`` under which ``p`` gets this schedule."""
    train = SCHEDULES[schedule][0]
    budget = _budget(
        schedule, int((p.labels != -100).sum()), backend, n_hidden=p.weight.shape[1], n_vocab=p.weight.shape[0],
        hidden_dtype=p.hidden.dtype, weight_dtype=p.weight.dtype, to_hidden="hidden" in train,
        to_weight="weight" in train,
        as_is=p.weight.stride(1) == 1, outputs=len(outputs) + ("is_top1" in outputs),  # it has two running numbers
        entropy="entropy" in outputs,
    )  # fmt: skip
    return {"train": train, "memory_budget": budget}


def run_forced(
    schedule: str, p: Problem, backend: str, outputs=STATISTICS, replay=None, choices=None
) -> dict[str, Tensor]:
    """linear_logprob under this schedule; fails if another one ran. Appends what ran to ``choices``."""
    how = forced(schedule, p, backend, outputs)
    with recorded_choices(replay) as ran:
        results = run(dpofast.linear_logprob, p, backend=backend, outputs=outputs, **how)
    n = int((p.labels != -100).sum())
    assert len(ran) == 1 and SCHEDULES[schedule][1](ran[0], n), (schedule, ran)
    if choices is not None:
        choices += ran
    return results
