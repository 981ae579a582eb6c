"""The table of losses: formulas written out, gradients, properties, and what must raise."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpofast import losses
from dpofast.losses import (
    LOSSES,
    OPTIONS,
    UNPAIRED_LOSSES,
    RunningMean,
    preference_loss,
    unpaired_preference_loss,
)

EPS, BETA, MARGIN = 0.15, 0.35, 0.4
PAIRS = 5


def pairs(batch: int = PAIRS, seed: int = 0) -> dict[str, torch.Tensor]:
    """Everything a paired loss may be given, in fp64."""
    generator = torch.Generator().manual_seed(seed)

    def logps(scale: float) -> torch.Tensor:
        return -scale * torch.rand(batch, generator=generator, dtype=torch.float64)

    chosen = logps(9.0) - 0.1
    return {
        "chosen_logps": chosen,
        "rejected_logps": logps(9.0) - 0.1,
        "ref_chosen_logps": logps(9.0),
        "ref_rejected_logps": logps(9.0),
        "chosen_lengths": torch.randint(1, 9, (batch,), generator=generator),
        "rejected_lengths": torch.randint(1, 9, (batch,), generator=generator),
        "chosen_nll": -chosen,
    }


def inputs_of(name: str, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the reference, for the losses that refuse one."""
    if LOSSES[name].reference or not LOSSES[name].compares:
        return data
    return {key: value for key, value in data.items() if not key.startswith("ref_")}


def required(name: str) -> dict[str, float]:
    return {"label_smoothing": EPS} if name == "exo_pair" else {}


# Formulas written out on Python floats, for what DPOTrainer does not have. L(x) is -log sigmoid(x).


def L(x: float) -> float:
    return math.log1p(math.exp(-x))


def smooth(x: float, eps: float = EPS) -> float:
    return (1 - eps) * L(x) + eps * L(-x)


def odds(average: float) -> float:
    return math.log(math.exp(average) / (1 - math.exp(average)))


SMOOTH = {"label_smoothing": EPS, "margin": MARGIN}
# name: (options, formula of log pi(y) w and l, log-ratios rw and rl, lengths n and m, mean nll of all tokens)
WRITTEN_OUT = {
    "sigmoid": (SMOOTH, lambda p: smooth(BETA * (p.rw - p.rl) - MARGIN)),
    "sigmoid_norm": (SMOOTH, lambda p: smooth(BETA * (p.rw / p.n - p.rl / p.m) - MARGIN)),
    "hinge": ({"margin": MARGIN}, lambda p: max(0.0, 1 - (BETA * (p.rw - p.rl) - MARGIN))),
    "sft_norm": ({}, lambda p: -p.w / p.n),
    "simpo": (
        {"simpo_gamma": 0.7, **SMOOTH},
        lambda p: smooth(BETA * (p.w / p.n - p.l / p.m) - 0.7 - MARGIN),
    ),
    "alphapo": (
        {"alphapo_alpha": 0.6, "simpo_gamma": 0.7},
        lambda p: L(BETA * (math.exp(p.l / p.m) ** -0.6 - math.exp(p.w / p.n) ** -0.6) / 0.6 - 0.7),
    ),
    "cpo": (
        {"cpo_alpha": 0.5, **SMOOTH},
        lambda p: smooth(BETA * (p.w - p.l) - MARGIN) + 0.5 * p.nll,
    ),
    "orpo": ({}, lambda p: p.nll + BETA * L(odds(p.w / p.n) - odds(p.l / p.m))),
    "dpop": ({"dpop_lambda": 3.0}, lambda p: L(BETA * (p.rw - p.rl - 3.0 * max(0.0, -p.rw)))),
    "cal_dpo": ({}, lambda p: L(p.rw - p.rl) + (p.rw - 0.5 / BETA) ** 2 + (p.rl + 0.5 / BETA) ** 2),
}


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_loss_equals_its_formula_written_out(name):
    data = pairs()
    options, formula = WRITTEN_OUT[name]
    loss = preference_loss(**inputs_of(name, data), loss_type=name, beta=BETA, **options)
    w, l, ref_w, ref_l, n, m, nlls = (value.tolist() for value in data.values())  # noqa: E741
    nll = sum(nlls) / sum(n)
    expected = [
        formula(SimpleNamespace(w=w[i], l=l[i], rw=w[i] - ref_w[i], rl=l[i] - ref_l[i], n=n[i], m=m[i], nll=nll))
        for i in range(PAIRS)
    ]
    assert loss.item() == pytest.approx(sum(expected) / PAIRS, rel=1e-12)


def test_bco_equals_its_formula_written_out():
    logps, ref = torch.tensor([-3.0, -5.0, -1.0]).double(), torch.tensor([-4.0, -2.0, -1.5]).double()
    good = torch.tensor([True, False, False])
    loss = unpaired_preference_loss(
        logps, ref, good, loss_type="bco", beta=BETA, reward_shift=0.3, desirable_weight=2.0
    )
    expected = 2 * L(BETA * 1.0 - 0.3) + L(-(BETA * -3.0 - 0.3)) + L(-(BETA * 0.5 - 0.3))
    assert loss.item() == pytest.approx(expected / 3, rel=1e-12)


def test_every_loss_has_a_paper_an_equation_and_options_that_are_described():
    for table in (LOSSES, UNPAIRED_LOSSES):
        for name, loss in table.items():
            assert name == loss.name and loss.paper and loss.equation
            assert set(loss.options) <= set(OPTIONS) and "beta" in loss.options
    used = {option for table in (LOSSES, UNPAIRED_LOSSES) for loss in table.values() for option in loss.options}
    assert used == set(OPTIONS)


# Gradients, by walking the table

SAMPLES = {
    "beta": [0.7, "pairs"],
    "label_smoothing": [0.2],
    "margin": [0.3, "pairs"],
    "weight": ["pairs"],
    "f_divergence_type": ["forward_kl", "js_divergence", "alpha_divergence"],
    "f_alpha_divergence_coef": [-0.5, 1.6],
    "discopop_tau": [0.8],
    "simpo_gamma": [1.1],
    "alphapo_alpha": [-0.4],
    "cpo_alpha": [0.2],
    "dpop_lambda": [5.0],
    "desirable_weight": [1.7],
    "undesirable_weight": [0.4],
}


def sample(option: str, value: object, batch: int = PAIRS) -> dict[str, object]:
    if value == "pairs":
        value = torch.linspace(0.2, 1.4, batch, dtype=torch.float64, requires_grad=True)
    extra = {"f_divergence_type": "alpha_divergence"} if option == "f_alpha_divergence_coef" else {}
    return {option: value, **extra}


def walk(table):
    for name, loss in table.items():
        yield name, "beta", 0.5
        for option in loss.options:
            for value in SAMPLES[option]:
                if value != "pairs" or "weight" in loss.options:
                    yield name, option, value


@pytest.mark.parametrize("name, option, value", list(walk(LOSSES)))
def test_gradient_of_every_paired_loss_and_option(name, option, value):
    data = inputs_of(name, pairs())
    options = {**required(name), **sample(option, value)}
    leaves = {key: data[key].clone().requires_grad_() for key in ("chosen_logps", "rejected_logps")}
    fixed = {key: data[key] for key in data if key not in leaves and key != "chosen_nll"}
    per_pair = [key for key, x in options.items() if isinstance(x, torch.Tensor)]

    def function(chosen, rejected, *tensors):
        return preference_loss(
            chosen,
            rejected,
            **fixed,
            loss_type=name,
            chosen_nll=-chosen,
            **{**options, **dict(zip(per_pair, tensors, strict=True))},
            reduction="none",
        )

    assert torch.autograd.gradcheck(function, (*leaves.values(), *(options[key] for key in per_pair)))


@pytest.mark.parametrize("name, option, value", list(walk(UNPAIRED_LOSSES)))
def test_gradient_of_every_unpaired_loss_and_option(name, option, value):
    data, options = pairs(), sample(option, value)
    good = torch.tensor([True, False, False, True, True])
    state = {key: 0.4 for key in UNPAIRED_LOSSES[name].needs}

    def function(logps):
        return unpaired_preference_loss(
            logps, data["ref_chosen_logps"], good, loss_type=name, **state, **options, reduction="none"
        )

    assert torch.autograd.gradcheck(function, data["chosen_logps"].clone().requires_grad_())


# An option that is accepted changes the number: nothing is silently ignored


@pytest.mark.parametrize("name, option, value", [case for case in walk(LOSSES) if case[0] not in ("sft", "sft_norm")])
def test_every_option_that_is_accepted_has_an_effect(name, option, value):
    data = inputs_of(name, pairs())
    # with alpha_divergence as the common ground, its coefficient is an option like the others
    base = {**required(name), **({"f_divergence_type": "alpha_divergence"} if "coef" in option else {})}
    plain = preference_loss(**data, loss_type=name, **base)
    assert not torch.equal(plain, preference_loss(**data, loss_type=name, **{**base, **sample(option, value)}))


# Properties


@st.composite
def batches(draw):
    return pairs(draw(st.integers(1, 6)), draw(st.integers(0, 10_000)))


quick = settings(max_examples=25, deadline=None)


def swapped(data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    def other(key: str) -> str:
        if "chosen" in key:
            return key.replace("chosen", "rejected")
        return key.replace("rejected", "chosen")

    return {other(key): value for key, value in data.items() if key != "chosen_nll"}


@quick
@given(batches(), st.floats(0.01, 5.0), st.sampled_from(["sigmoid", "sigmoid_norm", "simpo"]))
def test_swapping_chosen_and_rejected_negates_the_logit(data, beta, name):
    """L(-x) - L(x) = x, with no margin; the logit is what the logistic losses compare."""
    options = {"loss_type": name, "beta": beta, "reduction": "none"}
    if name == "simpo":
        options["simpo_gamma"] = 0.0
    data = inputs_of(name, data)
    difference = preference_loss(**swapped(data), **options) - preference_loss(**data, **options)
    chosen, rejected = data["chosen_logps"], data["rejected_logps"]
    if LOSSES[name].reference:
        chosen, rejected = chosen - data["ref_chosen_logps"], rejected - data["ref_rejected_logps"]
    if name != "sigmoid":
        chosen, rejected = chosen / data["chosen_lengths"], rejected / data["rejected_lengths"]
    torch.testing.assert_close(difference, beta * (chosen - rejected))


@quick
@given(
    batches(),
    st.floats(0.01, 5.0),
    st.sampled_from(["sigmoid", "sigmoid_norm", "robust", "aot", "aot_unpaired"]),
)
def test_policy_equal_to_reference_gives_log_2(data, beta, name):
    data |= {"ref_chosen_logps": data["chosen_logps"], "ref_rejected_logps": data["rejected_logps"]}
    loss = preference_loss(**data, loss_type=name, beta=beta)
    torch.testing.assert_close(loss, torch.tensor(math.log(2), dtype=torch.float64), rtol=1e-15, atol=0)


@quick
@given(batches(), st.sampled_from(sorted(set(LOSSES) - {"aot", "aot_unpaired"})))
def test_a_batch_is_its_pairs_one_by_one(data, name):
    """Up to the supervised term, which is a mean over the tokens of the batch by definition."""
    data = {**inputs_of(name, data), "chosen_lengths": torch.full_like(data["chosen_lengths"], 3)}
    options = {"loss_type": name, **required(name), "reduction": "none"}
    together = preference_loss(**data, **options)
    apart = [
        preference_loss(**{key: value[i : i + 1] for key, value in data.items()}, **options)
        for i in range(len(together))
    ]
    torch.testing.assert_close(together, torch.cat(apart))
    torch.testing.assert_close(preference_loss(**data, **{**options, "reduction": "mean"}), together.mean())
    torch.testing.assert_close(preference_loss(**data, **{**options, "reduction": "sum"}), together.sum())


@quick
@given(batches(), st.sampled_from(sorted(LOSSES)), st.randoms())
def test_the_order_of_the_pairs_does_not_matter(data, name, random):
    order = list(range(len(data["chosen_logps"])))
    random.shuffle(order)
    data, options = inputs_of(name, data), {"loss_type": name, **required(name)}
    shuffled = {key: value[order] for key, value in data.items()}
    torch.testing.assert_close(preference_loss(**shuffled, **options), preference_loss(**data, **options))


@quick
@given(batches(), st.lists(st.floats(-2, 2), min_size=2, max_size=2))
def test_a_combination_is_the_weighted_sum(data, weights):
    options = {"loss_type": ["sigmoid", "ipo"], "loss_weights": weights, "beta": {"sigmoid": 0.3}}
    first = preference_loss(**data, loss_type="sigmoid", beta=0.3)
    second = preference_loss(**data, loss_type="ipo")
    torch.testing.assert_close(preference_loss(**data, **options), weights[0] * first + weights[1] * second)


@pytest.mark.parametrize("divergence", losses.F_DIVERGENCES)
def test_f_divergence_scores_are_0_at_0_and_increase(divergence):
    zero, ratios = torch.zeros(31, dtype=torch.float64), torch.linspace(-3, 3, 31, dtype=torch.float64)
    scores = -preference_loss(
        ratios, zero, zero, zero, loss_type="hinge", f_divergence_type=divergence, beta=1e-3, reduction="none"
    )
    assert scores[15].item() == pytest.approx(-1, rel=1e-12) and (scores.diff() > 0).all()


def test_alpha_divergence_near_1_is_reverse_kl():
    options = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1 + 1e-5}
    data = pairs()
    torch.testing.assert_close(preference_loss(**data, **options), preference_loss(**data), rtol=1e-4, atol=1e-4)


# Edges


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_log_ratios_give_no_nan(name):
    """Differences of thousands of nats happen on long completions."""
    extreme = torch.tensor([-3000.0, -90.0, 0.0, -1e-8], requires_grad=True)
    flipped = extreme.detach().flip(0).requires_grad_()
    data = dict.fromkeys(pairs(), torch.zeros(4))
    data |= {"chosen_logps": extreme, "rejected_logps": flipped, "chosen_nll": -extreme}
    for options in ({}, {"f_divergence_type": "forward_kl"}, {"f_divergence_type": "alpha_divergence"}):
        if set(options) <= set(LOSSES[name].options):
            options = {**required(name), **options, **({"discopop_tau": 0.05} if name == "discopop" else {})}
            if name == "alphapo":  # exp(-alpha a) of a mean of -3000 nats is beyond fp32 by definition
                options["alphapo_alpha"] = 0.01
            loss = preference_loss(**inputs_of(name, data), loss_type=name, **options)
            assert not loss.isnan()
            if loss.isfinite():
                grads = torch.autograd.grad(loss, (extreme, flipped), allow_unused=True, retain_graph=True)
                assert all(grad is None or not grad.isnan().any() for grad in grads)


@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_batch_is_a_differentiable_zero(name):
    data = {key: value[:0].requires_grad_(value.is_floating_point()) for key, value in pairs().items()}
    loss = preference_loss(**inputs_of(name, data), loss_type=name, **required(name))
    assert loss.item() == 0 and loss.requires_grad
    loss.backward()


def test_half_precision_is_computed_in_fp32():
    data = {key: value.bfloat16() if value.is_floating_point() else value for key, value in pairs().items()}
    loss = preference_loss(**data, loss_type=["sigmoid", "ipo"])
    wide = {key: value.float() if value.is_floating_point() else value for key, value in data.items()}
    assert loss.dtype == torch.float32 and loss.equal(preference_loss(**wide, loss_type=["sigmoid", "ipo"]))


def test_kl_is_averaged_clamped_and_without_gradient():
    logps, good = torch.zeros(2, requires_grad=True), torch.tensor([True, False])
    kl = torch.tensor([[3.0], [-1.0]], requires_grad=True)
    loss = unpaired_preference_loss(logps, torch.zeros(2), good, kl=kl, reduction="none")
    torch.testing.assert_close(loss, torch.sigmoid(torch.tensor([0.1, -0.1])))
    assert torch.autograd.grad(loss.sum(), kl, allow_unused=True) == (None,)
    assert unpaired_preference_loss(logps, torch.zeros(2), good, kl=-5.0).item() == 0.5


@pytest.mark.parametrize("shape", [(0,), (0, 1), (2, 0)], ids=str)
def test_kl_of_no_mismatched_completions_is_0(shape):
    """A micro-batch may have none of them."""
    logps, ref, good = torch.tensor([-1.0, -4.0]), torch.tensor([-2.0, -2.0]), torch.tensor([True, False])
    results = []
    for kl in (torch.empty(shape), 0.0):
        leaf = logps.clone().requires_grad_()
        loss = unpaired_preference_loss(leaf, ref, good, kl=kl)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    assert results[0][0].isfinite() and all(map(torch.equal, *results))


def test_running_mean_is_that_of_all_rewards_and_is_frozen_in_eval_mode():
    rewards = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (3, 1, 0, 6)]
    running = RunningMean()
    for values in rewards:
        latest = running.update(values)
    torch.testing.assert_close(latest, torch.cat(rewards).mean())
    restored = RunningMean()
    restored.load_state_dict(running.state_dict())
    torch.testing.assert_close(restored.update(torch.tensor([4.0])), torch.cat([*rewards, torch.tensor([4.0])]).mean())
    assert running.eval().update(torch.tensor([100.0])).equal(latest)


def test_bco_takes_in_its_rewards_before_it_shifts_by_their_mean():
    logps, ref = torch.tensor([-1.0, -4.0], requires_grad=True), torch.tensor([-2.0, -2.0])
    good, running = torch.tensor([True, False]), RunningMean()
    running.update(torch.tensor([0.6, 0.2]))
    loss = unpaired_preference_loss(logps, ref, good, loss_type="bco", beta=0.5, reward_shift=running)
    shift = (0.6 + 0.2 + 0.5 - 1.0) / 4
    assert running.mean.item() == pytest.approx(shift) and not running.mean.requires_grad
    assert loss.item() == pytest.approx((L(0.5 - shift) + L(1.0 + shift)) / 2)


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "orpo", "alphapo", "discopop", "aot"])
def test_compiles_without_a_graph_break(name):
    data = inputs_of(name, pairs())
    options = {"loss_type": name, "beta": 0.3}
    compiled = torch.compile(lambda **kw: preference_loss(**kw, **options), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**data), preference_loss(**data, **options))


# What must raise, and what it must say

X = torch.zeros(3)
BAD = [
    ({"loss_type": "dpo"}, ValueError, "loss_type: got 'dpo', expected one of alphapo"),
    ({"loss_type": []}, ValueError, "loss_type: got an empty list"),
    ({"loss_type": None}, TypeError, "loss_type: got NoneType"),
    (
        {"loss_type": ["sigmoid", "hinge"], "loss_weights": [1.0]},
        ValueError,
        "loss_weights: got 1 numbers, expected 2",
    ),
    ({"loss_weights": [math.nan]}, ValueError, "loss_weights: got nan"),
    ({"loss_weights": ["1"]}, ValueError, "loss_weights: got '1'"),
    ({"beta": 0.0}, ValueError, "beta: got 0.0, expected a finite number > 0"),
    ({"beta": -1}, ValueError, "beta: got -1"),
    ({"beta": math.nan}, ValueError, "beta: got nan"),
    ({"beta": math.inf}, ValueError, "beta: got inf"),
    ({"beta": "0.1"}, TypeError, "beta: got str '0.1'"),
    ({"beta": True}, TypeError, "beta: got bool True"),
    ({"beta": torch.ones(2)}, ValueError, r"beta: got shape \(2,\), expected \(3,\)"),
    ({"beta": torch.ones(3, dtype=torch.long)}, TypeError, "beta: got a tensor"),
    (
        {"beta": torch.ones(3), "loss_type": "aot"},
        TypeError,
        "beta: got a tensor, .* for loss_type='aot'",
    ),
    ({"gamma": 1.0}, TypeError, "gamma: not an option"),
    ({"label_smoothing": 0.5}, ValueError, r"label_smoothing: got 0.5, expected a number in \[0, 0.5\)"),
    ({"label_smoothing": -0.1}, ValueError, "label_smoothing: got -0.1"),
    (
        {"label_smoothing": 0.1, "loss_type": "hinge"},
        ValueError,
        "label_smoothing: not defined for loss_type='hinge'",
    ),
    (
        {"label_smoothing": 0.1, "loss_type": ["sigmoid", "hinge"]},
        ValueError,
        "not defined for loss_type='hinge'.*name: value",
    ),
    ({"label_smoothing": {"ipo": 0.1}}, ValueError, r"label_smoothing: names \['ipo'\]"),
    ({"label_smoothing": 0.1, "loss_type": "sft"}, ValueError, "not defined for loss_type='sft'"),
    (
        {"loss_type": "exo_pair"},
        ValueError,
        "label_smoothing: must be given, and not be 0, for loss_type='exo_pair'",
    ),
    (
        {"loss_type": "exo_pair", "label_smoothing": {"exo_pair": 0.0}},
        ValueError,
        "label_smoothing: must be given",
    ),
    ({"margin": math.inf}, ValueError, "margin: got inf"),
    ({"margin": 0.1, "loss_type": "ipo"}, ValueError, "margin: not defined for loss_type='ipo'"),
    ({"weight": 2.0}, TypeError, r"weight: got float 2.0, expected a floating tensor \[B\]"),
    (
        {"weight": torch.ones(3), "loss_type": "aot_unpaired"},
        ValueError,
        "weight: not defined for",
    ),
    ({"weight": torch.ones(4)}, ValueError, r"weight: got shape \(4,\)"),
    ({"f_divergence_type": "kl"}, ValueError, "f_divergence_type: got 'kl', expected one of"),
    ({"f_divergence_type": 1}, TypeError, "f_divergence_type: got int 1"),
    (
        {"f_divergence_type": "forward_kl", "loss_type": "nca_pair"},
        ValueError,
        "not defined for loss_type='nca_pair'",
    ),
    ({"f_alpha_divergence_coef": 0.3}, ValueError, "f_alpha_divergence_coef: defined for"),
    ({"discopop_tau": 0.05}, ValueError, "discopop_tau: not defined for loss_type='sigmoid'"),
    ({"simpo_gamma": -1.0, "loss_type": "simpo"}, ValueError, "simpo_gamma: got -1.0"),
    ({"alphapo_alpha": 0, "loss_type": "alphapo"}, ValueError, "alphapo_alpha: got 0"),
    ({"reduction": "avg"}, ValueError, "reduction: got 'avg', expected one of"),
    ({"ref_chosen_logps": None}, ValueError, "ref_chosen_logps: goes with ref_rejected_logps"),
    (
        {"ref_chosen_logps": None, "ref_rejected_logps": None},
        ValueError,
        "needs a reference model; pass ref_chosen",
    ),
    ({"loss_type": "simpo"}, ValueError, "uses no reference model, and one was given"),
    ({"loss_type": "ipo", "chosen_lengths": None}, ValueError, "chosen_lengths: is None"),
    ({"loss_type": "sft", "chosen_nll": None}, ValueError, "chosen_nll: is None"),
    ({"rejected_logps": torch.zeros(2)}, ValueError, r"rejected_logps: got shape \(2,\)"),
    ({"chosen_logps": torch.zeros(3, 1)}, ValueError, r"chosen_logps: got shape \(3, 1\)"),
    ({"chosen_logps": torch.zeros(3, dtype=torch.long)}, TypeError, "chosen_logps: got dtype torch.int64"),
    ({"ref_chosen_logps": [0.0, 0.0, 0.0]}, TypeError, "ref_chosen_logps: got list"),
]


@pytest.mark.parametrize("change, error, message", BAD)
def test_bad_input_raises_and_names_itself(change, error, message):
    with pytest.raises(error, match=message):
        preference_loss(**{**dict.fromkeys(pairs(), X), **change})


UNPAIRED_BAD = [
    (
        {"loss_type": "sigmoid"},
        ValueError,
        "loss_type: got 'sigmoid', expected one of apo_zero_unpaired",
    ),
    ({"loss_type": ["kto"]}, TypeError, "expected one name"),
    ({"kl": None}, ValueError, "kl: loss_type='kto' needs it"),
    ({"loss_type": "apo_zero_unpaired"}, ValueError, "kl: loss_type='apo_zero_unpaired' does not take it"),
    ({"loss_type": "bco", "kl": None}, ValueError, "reward_shift: loss_type='bco' needs it"),
    ({"reward_shift": 0.0}, ValueError, "reward_shift: loss_type='kto' does not take it"),
    (
        {"loss_type": "bco", "kl": None, "reward_shift": torch.zeros(0)},
        ValueError,
        r"reward_shift: got shape \(0,\), expected one value, or \(3,\)",
    ),
    (
        {"loss_type": "bco", "kl": None, "reward_shift": torch.zeros(3, 1)},
        ValueError,
        r"reward_shift: got shape \(3, 1\)",
    ),
    ({"is_chosen": torch.ones(3)}, TypeError, "is_chosen: got dtype torch.float32, expected torch.bool"),
    ({"is_chosen": torch.ones(2, dtype=torch.bool)}, ValueError, "is_chosen: got shape"),
    ({"label_smoothing": 0.1}, ValueError, "label_smoothing: not defined for loss_type='kto'"),
    ({"desirable_weight": -1.0}, ValueError, "desirable_weight: got -1.0"),
    ({"beta": 0}, ValueError, "beta: got 0"),
]


@pytest.mark.parametrize("change, error, message", UNPAIRED_BAD)
def test_bad_unpaired_input_raises_and_names_itself(change, error, message):
    good = torch.ones(3, dtype=torch.bool)
    with pytest.raises(error, match=message):
        unpaired_preference_loss(**{"logps": X, "ref_logps": X, "is_chosen": good, "kl": 0.0, **change})
