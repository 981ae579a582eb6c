"""Filtered gradients: their definition in fp64, the bound that every token keeps, and where they must be exact."""

from __future__ import annotations

import math
from typing import NamedTuple

import numerics
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import dpofast
from dpofast import grad_filter, losses
from dpofast.plan import cpu

CUT = 2.0**-9
DOUBLE = torch.float64


class Case(NamedTuple):
    """A head, tokens, the gradients that arrive, and the options of `dpofast.linear_logprob`."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    c: Tensor
    bias: Tensor | None
    options: dict

    def to(self, dtype: torch.dtype) -> Case:
        hidden, weight, bias = (None if x is None else x.to(dtype) for x in (self.hidden, self.weight, self.bias))
        return self._replace(hidden=hidden, weight=weight, bias=bias)


def case(n=150, h=40, v=3000, spread=6.0, bias=False, seed=0, **options) -> Case:
    """Logits with a spread that leaves most of the mass to some of the vocabulary; fp64."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(*shape, generator=g, dtype=DOUBLE) for shape in ((n, h), (v, h)))
    labels, c = torch.randint(v, (n,), generator=g), torch.randn(n, generator=g, dtype=DOUBLE)
    b = torch.randn(v, generator=g, dtype=DOUBLE) if bias else None
    return Case(hidden, weight * spread / math.sqrt(h), labels, c, b, options)


def first_tokens(p: Case, backend: str) -> list[int]:
    """Those that a kernel of ``backend`` takes first; few tokens have none."""
    panel, n = cpu.TRAITS[backend.partition(":")[2], p.hidden.dtype, p.weight.dtype].panel, len(p.labels)
    panels = -(-n // panel)
    count = panel * -(-panels // cpu.PANELS_A_FIRST_PANEL) if panels >= cpu.FIRST_PANELS else 0
    return [i * n // count for i in range(count)]


def shares(dropped: Tensor, cut: float) -> Tensor:
    """What each entry gets of the mass that is given back; ``dropped`` [S, V] in shares of q = 1 - p[label]."""
    v, most = dropped.shape[1], cut / grad_filter.TOLERANCE
    equal = torch.full((v,), 1 / v, dtype=DOUBLE)
    if most <= 1 / v or not dropped.sum() > 0:
        return equal
    found = dropped.sum(0) / dropped.sum()
    squares = (found**2).sum()
    part = 1 if squares <= most else math.sqrt((most - 1 / v) / (squares - 1 / v))
    return part * found + (1 - part) * equal


def definition(p: Case, cut: float, backend: str) -> dict[str, Tensor]:
    """Gradients and the dropped mass, in fp64 from the inputs' values."""
    hidden, weight = p.hidden.double(), p.weight.double()
    x = hidden @ weight.T + (0 if p.bias is None else p.bias.double())
    softcap, temperature = p.options.get("softcap"), p.options.get("temperature", 1.0)
    scale = p.options.get("logit_scale", 1.0)
    bent = torch.tanh(scale * x / softcap) if softcap else None
    z = (scale * x if bent is None else softcap * bent) / temperature
    slope = scale / temperature * (torch.ones_like(z) if bent is None else 1 - bent**2)
    others = z.softmax(-1).scatter(1, p.labels.unsqueeze(1), 0.0)
    left = others.sum(1, keepdim=True)
    keeps = others > cut * left
    dropped = (others * ~keeps).sum(1, keepdim=True)
    dense = dropped > grad_filter.TOLERANCE * left
    keeps, dropped = keeps | dense, dropped * ~dense
    g = (-others * keeps).scatter(1, p.labels.unsqueeze(1), left) * slope
    if not softcap:
        first = first_tokens(p, backend)
        g = g - dropped * slope * shares((others * ~keeps / left)[first], cut)
    g = g * p.c.unsqueeze(1)
    return {"hidden": g @ weight, "weight": g.T @ hidden, "bias": g.sum(0), "dropped_mass": dropped.squeeze(1)}


def ours(p: Case, cut, train=("hidden", "weight", "bias"), **how) -> dict[str, Tensor]:
    leaves = {name: getattr(p, name) for name in ("hidden", "weight", "bias")}
    leaves = {name: None if x is None else x.detach().requires_grad_(name in train) for name, x in leaves.items()}
    out = dpofast.linear_logprob(
        leaves["hidden"], leaves["weight"], p.labels, bias=leaves["bias"], grad_filter=cut,
        outputs=("dropped_mass",), **p.options, **how,
    )  # fmt: skip
    (out.logps * p.c.to(out.logps.dtype)).sum().backward()
    grads = {name: x.grad for name, x in leaves.items() if x is not None and name in train}
    return grads | {"dropped_mass": out.dropped_mass, "logps": out.logps.detach()}


def assert_as_defined(got: dict[str, Tensor], want: dict[str, Tensor], rtol: float) -> None:
    for name, x in want.items():
        if name in got:
            off = (got[name].double() - x).norm() / x.norm()
            # what is dropped is what is kept subtracted from 1
            assert off <= (5 * rtol if name == "dropped_mass" else rtol), f"{name}: off by {off:.2e}"


OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.8, "logit_scale": 1.2},
    "softcap": {"softcap": 20.0, "temperature": 0.9},
    "everything": {"bias": True, "softcap": 20.0, "temperature": 0.9, "logit_scale": 1.1},
    "one token": {"n": 1},
    "two panels": {"n": 17},
    "a part of a panel": {"n": 131},
    "a small vocabulary": {"v": 150},
    "a vocabulary of odd blocks": {"v": 193},
    "one piece more": {"v": 8 * 192 + 1},
    "an odd hidden size": {"h": 33},
    "two chunks of columns": {"h": 130},
}


def test_where_entries_have_no_room_exponentials_are_kept_and_nothing_is_dropped(cpu_backend):
    """The kernels would filter into any cache, in a workspace that such a plan does not count."""
    p, kept = case().to(torch.float32), {}
    for exponent in range(36, 48):  # 256 KiB to 12 MiB
        with numerics.recorded_choices() as choices:
            try:
                got = ours(p, CUT, backend=cpu_backend, memory_budget=int(2 ** (exponent / 2)))
            except ValueError:
                continue
        dropped = 0.0 if got["dropped_mass"] is None else float(got["dropped_mass"].max())
        assert choices[0].filters or not dropped, choices
        kept[choices[0].filters] = choices[0].keeps_exps
    assert kept == {False: True, True: True} and dropped > 0


@pytest.mark.parametrize("of", OPTIONS.values(), ids=OPTIONS)
def test_gradients_are_those_of_the_definition(cpu_backend, of):
    p = case(**of)
    want = definition(p, CUT, cpu_backend)
    assert 0 < want["dropped_mass"].max() < 0.125
    assert_as_defined(ours(p, CUT, backend=cpu_backend), want, 1e-12)


@pytest.mark.parametrize("train", [("hidden",), ("weight",), ("bias",), ("hidden", "bias")], ids=" and ".join)
def test_so_are_those_of_some_inputs_alone(cpu_backend, train):
    p = case(bias=True)
    got = ours(p, CUT, train, backend=cpu_backend)
    assert set(train) <= set(got)
    assert_as_defined(got, definition(p, CUT, cpu_backend), 1e-12)


def test_so_are_those_of_strided_inputs_and_of_labels_that_do_not_count(cpu_backend):
    p = case()
    want = definition(p, CUT, cpu_backend)
    hidden = torch.zeros(10, 30, 2 * p.hidden.shape[1], dtype=DOUBLE)[..., ::2]
    labels = torch.full((10, 30), -100)
    counts = torch.arange(300).view(10, 30) % 2 == 1
    hidden[counts], labels[counts] = p.hidden, p.labels
    hidden.requires_grad_()
    weight = p.weight.T.contiguous().T.requires_grad_()
    out = dpofast.linear_logprob(
        hidden, weight, labels, grad_filter=CUT, outputs=("dropped_mass",), backend=cpu_backend
    )
    (out.logps[counts] * p.c).sum().backward()
    got = {"hidden": hidden.grad[counts], "weight": weight.grad, "dropped_mass": out.dropped_mass[counts]}
    assert_as_defined(got, want, 1e-12)
    assert not hidden.grad[~counts].any() and not out.dropped_mass[~counts].any()


def flat_and_peaked(**more) -> tuple[Case, Tensor]:
    """Every third token has a flat distribution: it drops too much, and there are too few of them to give up."""
    p = case(n=96, spread=8.0, **more)
    flat = torch.arange(96) % 12 == 5
    return p._replace(hidden=torch.where(flat.unsqueeze(1), p.hidden * 0.02, p.hidden)), flat


@pytest.mark.parametrize("of", [{}, {"bias": True}, {"softcap": 20.0}, {"v": 193 * 5, "h": 70}], ids=str)
def test_flat_tokens_keep_everything_beside_others_that_do_not(cpu_backend, of):
    p, flat = flat_and_peaked(**of)
    p = p._replace(c=p.c.abs() + 0.1)
    want = definition(p, CUT, cpu_backend)
    got = ours(p, CUT, backend=cpu_backend)
    assert (got["dropped_mass"][flat] == 0).all() and (got["dropped_mass"][~flat] > 0).sum() > 60
    assert_as_defined(got, want, 1e-12)
    exact = ours(p, None, backend=cpu_backend)
    assert_close(got["hidden"][flat], exact["hidden"][flat])


@pytest.mark.parametrize("cut", [2.0**-6, 2.0**-9, 2.0**-14])
def test_no_token_is_further_off_than_promised(cpu_backend, cut):
    """With the identity for a head, d hidden is the gradient of the logits."""
    v = 1000
    z = torch.randn(200, v, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    z *= torch.linspace(5, 12, 200, dtype=DOUBLE).unsqueeze(1)
    z[7::20] *= 0.1  # flat ones
    p = Case(z, torch.eye(v, dtype=DOUBLE), z.argsort(-1)[:, :: -7 % v][:, 0], torch.ones(200, dtype=DOUBLE), None, {})
    got, exact = ours(p, cut, ("hidden",), backend=cpu_backend), ours(p, None, ("hidden",), backend=cpu_backend)
    off = (got["hidden"] - exact["hidden"]).norm(dim=1) / exact["hidden"].norm(dim=1)
    assert off.max() <= 2 * math.sqrt(cut * grad_filter.TOLERANCE)
    assert (off > 1e-3 * math.sqrt(cut * grad_filter.TOLERANCE)).sum() > 20  # some of it is used
    assert got["hidden"].sum(1).abs().max() < 1e-12  # as the exact gradient, it adds up to zero


DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
)


@pytest.mark.parametrize(("hidden", "weight"), DTYPES, ids=str)
def test_each_dtype_adds_its_own_rounding_only(cpu_backend, hidden, weight):
    p = case(h=130, bias=True)
    p = p._replace(hidden=p.hidden.to(hidden), weight=p.weight.to(weight), bias=p.bias.to(weight))
    got = ours(p, CUT, backend=cpu_backend)
    want = definition(p, CUT, cpu_backend)
    assert_as_defined(
        got, want | {"hidden": want["hidden"], "weight": want["weight"]}, rtol=of_rounding(hidden, weight)
    )
    assert got["hidden"].dtype == hidden and got["weight"].dtype == weight


def of_rounding(*dtypes: torch.dtype) -> float:
    return max(2e-5, *(torch.finfo(dtype).eps for dtype in dtypes))


def test_auto_filters_in_sixteen_bits_and_is_exact_in_more(cpu_backend):
    p = case(spread=9.0, v=5000)
    exact, got = (ours(p.to(torch.float32), how, backend=cpu_backend) for how in (None, "auto"))
    assert all(torch.equal(got[name], exact[name]) for name in exact)
    for dtype, cut in grad_filter.AUTO.items():
        got, named = (ours(p.to(dtype), how, backend=cpu_backend) for how in ("auto", cut))
        assert got["dropped_mass"].max() > 0
        assert all(torch.equal(got[name], named[name]) for name in got)
        capped = p.to(dtype)._replace(options={"softcap": 30.0})
        got, named = (ours(capped, how, backend=cpu_backend) for how in ("auto", cut / 4))
        assert all(torch.equal(got[name], named[name]) for name in got)


def test_log_probs_and_statistics_have_the_same_bits(cpu_backend):
    p = numerics.problem(150, 40, 3000)
    exact, filtered = (
        numerics.run(dpofast.linear_logprob, p, backend=cpu_backend, grad_filter=how) for how in (None, CUT)
    )
    assert all(torch.equal(exact[name], filtered[name]) for name in ("logps", *numerics.STATISTICS))
    assert not torch.equal(exact["d hidden"], filtered["d hidden"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads(cpu_backend, dtype):
    p, _ = flat_and_peaked(bias=True, v=5000)
    found = []
    for threads in (1, 2, 3, 2):
        with numerics.threads(threads):
            found.append(ours(p.to(dtype), CUT, backend=cpu_backend))
    assert all(torch.equal(x[name], found[0][name]) for x in found for name in x)


def test_flat_states_are_exact(cpu_backend):
    p = case(n=200, spread=0.05)
    got, exact = (ours(p, how, backend=cpu_backend) for how in (CUT, None))
    assert not got["dropped_mass"].any()
    assert_as_defined(got, {name: exact[name] for name in ("hidden", "weight")}, 1e-13)


@pytest.mark.parametrize("budget", ["1MiB", "3MiB", "4MiB", "6MiB", "12MiB", "1GiB"])
def test_a_budget_decides_how_many_are_filtered_and_never_what_is_right(cpu_backend, budget):
    p = case(n=400)
    got = ours(p.to(torch.float32), CUT, backend=cpu_backend, memory_budget=budget)
    exact, filtered = (definition(p.to(torch.float32), cut, cpu_backend) for cut in (0.0, CUT))
    dense = got["dropped_mass"] == 0
    want = torch.where(dense.unsqueeze(1), exact["hidden"], filtered["hidden"])
    assert_as_defined(got, {"hidden": want}, 2e-5)
    assert dense.all() == (budget == "1MiB") and dense.any() == (budget == "1MiB")


def test_what_turns_out_to_be_too_small_makes_room(cpu_backend):
    """The smallest budget with which a plan filters is enough for nearly all tokens: entries of the first rows go."""
    p, cut = case(n=400, v=20000, spread=4.5).to(torch.float32), 2.0**-14
    plans = {
        mib: dpofast.plan(400, 40, 20000, memory_budget=mib << 20, grad_filter=cut, backend=cpu_backend).schedule
        for mib in range(1, 30)
    }
    budget = min(mib for mib, schedule in plans.items() if schedule == "filtered")
    assert budget > 2
    got = ours(p, cut, backend=cpu_backend, memory_budget=budget << 20)
    filters = got["dropped_mass"] > 0
    assert filters.double().mean() > 0.9
    exact, filtered = (definition(p, of, cpu_backend)["hidden"] for of in (0.0, cut))
    assert_as_defined(got, {"hidden": torch.where(filters.unsqueeze(1), filtered, exact)}, 2e-5)


def test_a_panel_without_room_keeps_everything(cpu_backend):
    """Tokens that the first ones do not stand for: they need more room than a small budget has."""
    p = case(n=400, spread=14.0)
    crowded = (torch.arange(400) > 50) & (torch.arange(400) < 75)
    p = p._replace(hidden=torch.where(crowded.unsqueeze(1), p.hidden * 0.15, p.hidden))
    want, cut, filtered = definition(p, 0.0, cpu_backend), 2.0**-30, set()
    for budget in range(2 << 20, 10 << 20, 1 << 19):
        got = ours(p, cut, backend=cpu_backend, memory_budget=budget)
        filtered.add((got["dropped_mass"] > 0).sum().item())
        assert_as_defined(got, {"hidden": want["hidden"], "weight": want["weight"]}, 1e-6)
    assert 0 in filtered and len(filtered) > 2, filtered  # none, all but panels without room, all but the crowded


def test_where_nothing_is_dropped_nothing_is_given_back(cpu_backend):
    """A tenth of the vocabulary is equally likely, and the rest impossible."""
    p = case(spread=0.05, bias=True)
    bias = torch.full_like(p.bias, -math.inf)
    bias[:300] = 0.0
    p = p._replace(bias=bias, labels=p.labels % 300)
    with numerics.recorded_choices() as choices:
        got = ours(p, CUT, backend=cpu_backend)
    exact = ours(p, None, backend=cpu_backend)
    assert choices[0].filters and got["dropped_mass"].max() < 1e-14  # what is kept, subtracted from 1
    assert_as_defined(got, {name: exact[name] for name in ("hidden", "weight", "bias")}, 1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_comes_out_where_it_does_without_a_filter(cpu_backend, bad):
    p = case(bias=True)
    hidden, bias = p.hidden.clone(), p.bias.clone()
    hidden[70, 3] = bad
    bias[5:400] = -math.inf
    p = p._replace(hidden=hidden, bias=bias, labels=p.labels.clamp(min=400)).to(torch.float32)
    got, exact = (ours(p, how, backend=cpu_backend) for how in (CUT, None))
    for name in ("hidden", "weight", "bias", "logps"):
        assert torch.equal(got[name].isnan(), exact[name].isnan()), name
    assert got["dropped_mass"][70] == 0 and got["dropped_mass"][:70].all()


def test_a_label_that_is_certain_or_impossible_has_the_exact_gradient(cpu_backend):
    p = case(bias=True)
    bias = p.bias.clone()
    bias[:2] = torch.tensor([80.0, -math.inf])
    labels = p.labels.clone()
    labels[:75], labels[75] = 0, 1
    p = p._replace(bias=bias, labels=labels)
    got, exact = (ours(p, how, ("hidden",), backend=cpu_backend) for how in (CUT, None))
    off = (got["hidden"] - exact["hidden"])[:75].norm(dim=1) / exact["hidden"][:75].norm(dim=1)
    assert off.max() < 0.05
    assert torch.isfinite(got["hidden"]).all() == torch.isfinite(exact["hidden"]).all()


def test_a_gradient_of_the_entropy_makes_all_of_them_exact(cpu_backend):
    p = numerics.problem(150, 40, 3000, entropy=True)
    exact, filtered = (
        numerics.run(dpofast.linear_logprob, p, backend=cpu_backend, grad_filter=how) for how in (None, CUT)
    )
    for name in ("d hidden", "d weight"):
        assert_close(filtered[name], exact[name], rtol=1e-4, atol=1e-5)


def test_without_a_gradient_nothing_is_dropped(cpu_backend):
    p = case()
    out = dpofast.linear_logprob(p.hidden, p.weight, p.labels, grad_filter=CUT, outputs=("dropped_mass",))
    assert out.dropped_mass.shape == out.logps.shape and not out.dropped_mass.any()


def test_no_tokens_have_no_gradient(cpu_backend):
    p = case(n=4)._replace(labels=torch.full((4,), -100))
    got = ours(p, CUT, backend=cpu_backend)
    assert not any(got[name].any() for name in ("hidden", "weight", "dropped_mass"))


def pairs(dtype=torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    p = case(n=128, spread=9.0, v=5000)
    return p.hidden.view(8, 16, -1).to(dtype), p.weight.to(dtype), p.labels.view(8, 16)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "simpo"])
def test_a_loss_takes_it_and_says_the_same(loss_type):
    hidden, weight, labels = pairs()
    needs_reference = losses.LOSSES[loss_type].reference
    reference = {"ref_logps": torch.zeros(8)} if needs_reference else {}
    found = []
    for how in (None, "auto"):
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        loss = dpofast.linear_dpo_loss(*leaves, labels, loss_type=loss_type, grad_filter=how, **reference).loss
        loss.backward()
        found.append((loss.detach(), leaves[0].grad.float(), leaves[1].grad.float()))
    (loss, *exact), (same, *filtered) = found
    assert torch.equal(loss, same)
    for a, b in zip(exact, filtered):
        assert 0 < (a - b).norm() / a.norm() < 1e-2


def test_a_module_has_it_too():
    hidden, weight, labels = pairs()
    loss = dpofast.LinearDPOLoss(loss_type="simpo", grad_filter="auto")(hidden, weight.requires_grad_(), labels).loss
    loss.backward()
    with pytest.raises(ValueError, match="grad_filter: got 2.0, expected None"):
        dpofast.LinearDPOLoss(grad_filter=2.0)


def test_a_compiled_call_has_the_same_bits(cpu_backend):
    p = case().to(torch.float32)

    def work(hidden: Tensor, weight: Tensor) -> Tensor:
        out = dpofast.linear_logprob(
            hidden, weight, p.labels, grad_filter=CUT, ignore_index=None, backend=cpu_backend, outputs=("dropped_mass",)
        )
        return out.logps.sum() + out.dropped_mass.sum()

    found = []
    for function in (work, torch.compile(work, fullgraph=True, backend="aot_eager")):
        leaves = p.hidden.detach().requires_grad_(), p.weight.detach().requires_grad_()
        value = function(*leaves)
        value.backward()
        found.append((value.detach(), leaves[0].grad, leaves[1].grad))
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("options", [{}, {"bias": True, "softcap": 20.0}, {"n": 1}], ids=str)
@pytest.mark.parametrize("how", ["auto", CUT])
def test_where_there_is_no_filter_gradients_are_exact(how, options, backend):
    if backend.startswith("cpu:"):
        pytest.skip("this backend has a filter")
    p = case(**options)
    p = p.to(torch.float32 if how == CUT else torch.bfloat16)
    got, exact = (ours(p, value, backend=backend) for value in (how, None))
    assert not got["dropped_mass"].any()
    for name, x in exact.items():
        assert torch.equal(got[name], x), name


def test_a_head_in_slices_has_no_filter():
    with pytest.raises(ValueError, match="grad_filter: not available with group"):
        grad_filter.check_group(sharded=True)


@pytest.mark.parametrize("value", ["high", 0.0, 1.0, -1e-3, math.nan, True, (0.1,)], ids=str)
def test_values_that_are_no_cut_are_refused(value):
    p = case()
    with pytest.raises(
        (ValueError, TypeError), match='grad_filter: got .*expected None .exact gradients., "auto" or a cut'
    ):
        ours(p, value)


def test_logits_that_exist_have_no_filter():
    with pytest.raises(ValueError, match="grad_filter: got 'auto', expected None: the gradient of logits that exist"):
        dpofast.logprob(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), grad_filter="auto")
