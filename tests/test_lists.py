"""Losses of lists: a Python loop over the lists in fp64, pairs to the bit, gradients, edges, and what must raise."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dpofast import losses
from dpofast.lists import LIST_LOSSES, Lists, list_preference_loss, list_score_loss
from dpofast.losses import preference_loss

BETA, MARGIN = 0.35, 0.4
SIZES = [3, 1, 2, 5, 2]
quick = settings(max_examples=40, deadline=None)


def numbers(n: int, seed: int = 0, scale: float = 4.0) -> torch.Tensor:
    return scale * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grades(n: int, seed: int = 0) -> torch.Tensor:
    """Small integers, of which some are equal."""
    return torch.randint(4, (n,), generator=torch.Generator().manual_seed(seed)).double()


def with_scores(name: str, scores: torch.Tensor) -> dict[str, torch.Tensor]:
    return {} if name == "softmax_dpo" else {"scores": scores}


# Formulas of one list, on Python floats: r the log-ratios, psi the scores or None, best first without them


def softmax_dpo(r, psi, beta, margin=0.0):
    rejected = sum(math.exp(beta * (x - r[0]) + margin) for x in r[1:])
    return math.log1p(rejected)


def worse(psi, i, j):
    return j > i if psi is None else psi[j] < psi[i]


def plackett_luce(r, psi, beta):
    total = 0.0
    for i, x in enumerate(r):
        left = sum(math.exp(beta * y) for j, y in enumerate(r) if worse(psi, i, j))
        total -= math.log(math.exp(beta * x) / (math.exp(beta * x) + left))
    return total


def lipo_lambda(r, psi, beta):
    by_reward = sorted(range(len(r)), key=lambda i: -r[i])
    discount = [math.log2(1 + 1 + by_reward.index(i)) for i in range(len(r))]
    total = 0.0
    for i in range(len(r)):
        for j in range(len(r)):
            if psi[i] > psi[j]:
                weight = abs(2 ** psi[i] - 2 ** psi[j]) * abs(1 / discount[i] - 1 / discount[j])
                total += weight * math.log1p(math.exp(-beta * (r[i] - r[j])))
    return total


def listnet(r, psi, beta):
    target, share = (
        [math.exp(x) / sum(math.exp(y) for y in values) for x in values] for values in (psi, [beta * x for x in r])
    )
    return -sum(t * math.log(p) for t, p in zip(target, share))


FORMULAS = {f.__name__: f for f in (softmax_dpo, plackett_luce, lipo_lambda, listnet)}
WITHOUT_SCORES = ("softmax_dpo", "plackett_luce")


def by_loop(name, r, sizes, psi, beta, **options):
    """A loss for each list, one list at a time."""
    rows, grades = r.split(sizes), [None] * len(sizes) if psi is None else [x.tolist() for x in psi.split(sizes)]
    betas = beta.tolist() if isinstance(beta, torch.Tensor) else [beta] * len(sizes)
    found = [FORMULAS[name](x.tolist(), g, b, **options) for x, g, b in zip(rows, grades, betas)]
    return torch.tensor(found, dtype=torch.float64)


def test_every_loss_has_a_formula_here_a_paper_and_an_equation():
    assert set(FORMULAS) == set(LIST_LOSSES)
    for name, loss in LIST_LOSSES.items():
        assert name == loss.name and loss.paper and loss.equation and set(loss.options) <= set(losses.OPTIONS)


ragged = st.lists(st.integers(1, 7), min_size=1, max_size=6)


@quick
@given(ragged, st.integers(0, 2**31), st.booleans())
@pytest.mark.parametrize("name", FORMULAS)
def test_ragged_lists_equal_a_loop_over_them(name, sizes, seed, scored):
    n = sum(sizes)
    logps, ref, psi = numbers(n, seed), numbers(n, seed + 1), grades(n, seed)
    if name in WITHOUT_SCORES and not (scored and name == "plackett_luce"):
        psi = None
    given = {} if psi is None else {"scores": psi}
    beta = numbers(len(sizes), seed).abs() / 4 + 0.1
    for b in (BETA, beta):
        got = list_preference_loss(
            logps, sizes, ref_logps=ref, loss_type=name, beta=b, reduction="none", **given
        )  # fmt: skip
        torch.testing.assert_close(got, by_loop(name, logps - ref, sizes, psi, b), rtol=1e-11, atol=1e-11)


@quick
@given(ragged, st.integers(0, 2**31))
@pytest.mark.parametrize("name", FORMULAS)
def test_interleaved_answers_are_the_same_lists(name, sizes, seed):
    """As share_prompt wants them: the first answers of all lists, then the second ones, and so on."""
    n = sum(sizes)
    scores, psi = numbers(n, seed).requires_grad_(), grades(n, seed)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    order = [starts[i] + place for place in range(max(sizes)) for i in range(len(sizes)) if place < sizes[i]]
    results = []
    for index in (slice(None), order):
        given = with_scores(name, psi[index])
        loss = list_score_loss(
            scores[index], sizes, loss_type=name, interleaved=index is order, reduction="none", **given
        )
        results.append((loss, *torch.autograd.grad(loss.sum(), scores)))
    assert all(map(torch.equal, *results))
    made_of = Lists(sizes, interleaved=True)
    assert made_of.together(scores[order]).equal(scores) and made_of.apart(scores).equal(scores[order])


def test_margin_and_weight_are_those_of_each_list():
    r, margin, weight = numbers(13), numbers(5, 1), numbers(5, 2).abs()
    ref = torch.zeros_like(r)
    got = list_preference_loss(r, SIZES, ref_logps=ref, beta=BETA, margin=margin, weight=weight, reduction="sum")
    rows = zip(r.split(SIZES), margin.tolist(), weight.tolist())
    want = sum(w * softmax_dpo(x.tolist(), None, BETA, m) for x, m, w in rows)
    assert got.item() == pytest.approx(want, rel=1e-12)
    same = list_preference_loss(r, SIZES, ref_logps=ref, beta=BETA, margin=MARGIN, reduction="mean")
    assert same.item() == pytest.approx(sum(softmax_dpo(x.tolist(), None, BETA, MARGIN) for x in r.split(SIZES)) / 5)


# Pairs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", WITHOUT_SCORES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_list_of_two_is_its_pair_to_the_bit(name, interleaved, dtype):
    """Losses and gradients, those of beta and margin included; among the pairs are far ones, infinite ones and ties."""
    pairs, scale = 200, 60.0
    logps, ref = numbers(2 * pairs, 0, scale).view(2, pairs), numbers(2 * pairs, 1, scale).view(2, pairs)
    logps[0, 0], logps[1, 1], logps[:, 2], ref[:, 2] = -torch.inf, -torch.inf, -1.0, -1.0
    beta, margin = numbers(pairs, 2, 0.1).abs() + 0.01, numbers(pairs, 3, 0.5)
    options = {"beta": beta, **({"margin": margin} if name == "softmax_dpo" else {})}
    results = []
    for of_pairs in (True, False):
        leaves = [x.to(dtype).requires_grad_() for x in (logps, *options.values())]
        more = {"reduction": "none", **dict(zip(options, leaves[1:]))}
        if of_pairs:
            loss = preference_loss(*leaves[0], *ref.to(dtype), **more)
        else:
            flat = (leaves[0] if interleaved else leaves[0].T).reshape(-1)
            flat_ref = (ref.to(dtype) if interleaved else ref.to(dtype).T).reshape(-1)
            loss = list_preference_loss(flat, 2, ref_logps=flat_ref, loss_type=name, interleaved=interleaved, **more)
        results.append((loss, *torch.autograd.grad(loss.sum(), leaves)))
    for pair, listed in zip(*results):
        torch.testing.assert_close(listed, pair, rtol=0, atol=0, equal_nan=True)
    assert results[0][0][0].isinf() and results[0][0][1] == 0 and not results[0][1].isnan().any()


def test_lipo_of_two_is_the_pairs_loss_times_its_gain_and_discount():
    r, psi = numbers(2), torch.tensor([1.0, 0.0])
    pair = F.softplus(-BETA * (r[0] - r[1]))
    got = list_score_loss(r, [2], scores=psi, loss_type="lipo_lambda", beta=BETA)
    torch.testing.assert_close(got, pair * (1 - 1 / math.log2(3)))


def test_scores_of_a_model_equal_cross_entropy():
    outputs = numbers(12)
    want = F.cross_entropy(2.0 * outputs.view(3, 4), torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(list_score_loss(outputs, 4, beta=2.0), want)
    torch.testing.assert_close(list_score_loss(outputs, 4), list_preference_loss(
        outputs, 4, ref_logps=torch.zeros_like(outputs), beta=1.0))  # fmt: skip


# Gradients


@pytest.mark.parametrize(
    ("name", "scored"),
    [
        ("softmax_dpo", False),
        ("plackett_luce", False),
        ("plackett_luce", True),
        ("lipo_lambda", True),
        ("listnet", True),
    ],
)
def test_gradients(name, scored):
    given = {"scores": grades(13)} if scored else {}
    leaves = {"logps": numbers(13, 1), "beta": numbers(5, 2).abs() + 0.1, "weight": numbers(5, 3).abs()}
    if name == "softmax_dpo":
        leaves["margin"] = numbers(5, 4)
    leaves = {key: x.requires_grad_() for key, x in leaves.items()}

    def function(*values):
        return list_preference_loss(
            sizes=SIZES, ref_logps=numbers(13, 5), loss_type=name, reduction="sum", **given, **dict(zip(leaves, values))
        )

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


# Properties


@quick
@given(ragged, st.integers(0, 2**31), st.randoms())
@pytest.mark.parametrize("name", FORMULAS)
def test_the_order_of_lists_and_that_of_answers_with_scores_do_not_matter(name, sizes, seed, random):
    """Of softmax-DPO, the order of the rejected answers; of the others all orders."""
    n = sum(sizes)
    r, psi = numbers(n, seed), grades(n, seed)
    lists = [list(range(sum(sizes[:i]), sum(sizes[: i + 1]))) for i in range(len(sizes))]
    for answers in lists:
        head = answers[:1] if name == "softmax_dpo" else []
        tail = answers[len(head) :]
        random.shuffle(tail)
        answers[:] = head + tail
    random.shuffle(lists)
    order = [i for answers in lists for i in answers]
    got = list_score_loss(r[order], [len(x) for x in lists], loss_type=name, **with_scores(name, psi[order]))
    torch.testing.assert_close(got, list_score_loss(r, sizes, loss_type=name, **with_scores(name, psi)))


@quick
@given(st.integers(2, 7), st.integers(0, 2**31), st.floats(-50, 50))
@pytest.mark.parametrize("name", FORMULAS)
def test_a_constant_of_the_prompt_does_not_matter(name, size, seed, constant):
    r, given = numbers(size, seed), with_scores(name, grades(size, seed))
    shifted = list_score_loss(r + constant, size, loss_type=name, **given)
    torch.testing.assert_close(shifted, list_score_loss(r, size, loss_type=name, **given), rtol=1e-9, atol=1e-9)


def test_plackett_luce_is_a_distribution_over_rankings():
    """Over all orders of four answers, the probabilities add up to 1."""
    r = numbers(4, scale=1.0)
    nll = [list_score_loss(r[list(order)], 4, loss_type="plackett_luce") for order in itertools.permutations(range(4))]
    assert torch.stack(nll).neg().exp().sum().item() == pytest.approx(1.0, rel=1e-12)


def test_a_step_down_lipos_gradient_reorders_a_list():
    """The gradient points to the better answer, and not to what is equally good."""
    r, psi = torch.zeros(3, dtype=torch.float64, requires_grad=True), torch.tensor([0.0, 2.0, 2.0])
    (grad,) = torch.autograd.grad(list_score_loss(r, 3, scores=psi, loss_type="lipo_lambda"), r)
    assert grad[0] > 0 and grad[1] < 0 and grad[2] < 0


# Edges


@pytest.mark.parametrize("name", FORMULAS)
def test_lists_of_one_and_equal_scores_have_no_loss_and_no_gradient(name):
    r = numbers(5).requires_grad_()
    found = [list_score_loss(r, 1, loss_type=name, reduction="none", **with_scores(name, grades(5)))]
    if name in ("plackett_luce", "lipo_lambda"):  # all tie
        found.append(list_score_loss(r, [2, 3], scores=torch.ones(5), loss_type=name, reduction="none"))
    for loss in found:
        assert loss.eq(0).all() and torch.autograd.grad(loss.sum(), r)[0].eq(0).all()


@pytest.mark.parametrize("name", FORMULAS)
def test_an_empty_batch_is_a_differentiable_zero(name):
    empty = torch.zeros(0, requires_grad=True)
    for sizes in ([], torch.zeros(0, dtype=torch.long), 3):
        loss = list_preference_loss(
            empty, sizes, ref_logps=torch.zeros(0), loss_type=name, **with_scores(name, torch.zeros(0))
        )
        assert loss.item() == 0 and loss.requires_grad
        loss.backward()


@pytest.mark.parametrize("name", FORMULAS)
def test_far_and_infinite_log_probs_give_no_nan(name):
    """Of one answer that the policy holds impossible: infinite loss if it is the best, else finite; and 3000 nats."""
    psi, far = torch.tensor([2.0, 1.0, 0.0, 1.0]), torch.tensor([-3000.0, 0.0, -90.0, -1e-8])
    best, worst = torch.tensor([-torch.inf, -1.0, -2.0, -3.0]), torch.tensor([-1.0, -1.5, -torch.inf, -3.0])
    for r, is_finite in ((far, True), (best, False), (worst, name != "listnet")):
        r = r.requires_grad_()
        loss = list_score_loss(r, 4, loss_type=name, **with_scores(name, psi))
        assert loss.isfinite() == is_finite and not loss.isnan()
        if is_finite:
            assert torch.autograd.grad(loss, r)[0].isfinite().all()


def test_an_impossible_answer_that_listnet_does_not_want_costs_nothing():
    """Its share of the target is 0 in fp32, and 0 times infinity would be nan."""
    r = torch.tensor([-1.0, -torch.inf], requires_grad=True)
    loss = list_score_loss(r, 2, scores=torch.tensor([1000.0, 0.0]), loss_type="listnet")
    assert loss.item() == 0 and torch.autograd.grad(loss, r)[0].eq(0).all()


def test_16_bits_are_computed_in_fp32():
    r, psi = numbers(13).bfloat16(), grades(13)
    for name in FORMULAS:
        options = {"loss_type": name, **with_scores(name, psi.bfloat16())}
        loss = list_score_loss(r, SIZES, **options)
        assert loss.dtype == torch.float32 and loss.equal(list_score_loss(r.float(), SIZES, **options))


def test_a_combination_is_the_weighted_sum():
    r, psi = numbers(13), grades(13)
    loss = list_score_loss(
        r, SIZES, scores=psi, loss_type=["listnet", "softmax_dpo"], loss_weights=[2.0, 0.5], margin={"softmax_dpo": 0.3}
    )
    want = 2 * list_score_loss(r, SIZES, scores=psi, loss_type="listnet") + 0.5 * list_score_loss(r, SIZES, margin=0.3)
    torch.testing.assert_close(loss, want)


@pytest.mark.parametrize("name", FORMULAS)
def test_compiles_without_a_graph_break(name):
    r, given = numbers(13), with_scores(name, grades(13))
    compiled = torch.compile(
        lambda x: list_score_loss(x, SIZES, loss_type=name, **given), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(r), list_score_loss(r, SIZES, loss_type=name, **given))


# What must raise, and what it must say

X = torch.zeros(3)
BAD = [
    ({"loss_type": "sigmoid"}, ValueError, "loss_type: got 'sigmoid', expected one of lipo_lambda"),
    ({"beta": 0.0}, ValueError, "beta: got 0.0"),
    ({"beta": torch.ones(3)}, ValueError, r"beta: got shape \(3,\), expected \(2,\), one for each"),
    ({"weight": torch.ones(3)}, ValueError, r"weight: got shape \(3,\), expected \(2,\)"),
    ({"weight": 2.0}, TypeError, "weight: got float"),
    ({"margin": 0.1, "loss_type": "plackett_luce"}, ValueError, "margin: not defined.*it is for softmax_dpo"),
    ({"label_smoothing": 0.1}, ValueError, "label_smoothing: not defined for loss_type='softmax_dpo'"),
    ({"gamma": 0.1}, TypeError, "gamma: not an option"),
    ({"reduction": "batchmean"}, ValueError, "reduction: got 'batchmean'"),
    ({"sizes": [2, 2]}, ValueError, "sizes: got 4 in all, expected 3, as many as there are in logps"),
    ({"sizes": [3, 0]}, ValueError, "sizes: got 0 among them"),
    ({"sizes": 2}, ValueError, "sizes: got 2, expected a number >= 1 that divides the 3 in logps"),
    ({"sizes": 0}, ValueError, "sizes: got 0, expected a number >= 1"),
    ({"sizes": True}, TypeError, "sizes: got bool True"),
    ({"sizes": None}, TypeError, "sizes: got NoneType"),
    ({"sizes": [1.0, 2.0]}, TypeError, "sizes: got list"),
    ({"sizes": torch.tensor([1.0, 2.0])}, TypeError, "sizes: got shape .* of torch.float32"),
    ({"sizes": torch.tensor([[1, 2]])}, TypeError, r"sizes: got shape \(1, 2\)"),
    ({"interleaved": 1}, TypeError, "interleaved: got int 1"),
    ({"ref_logps": None}, ValueError, "ref_logps: is None; pass the reference's, or call list_score_loss"),
    ({"ref_logps": torch.zeros(2)}, ValueError, r"ref_logps: got shape \(2,\)"),
    ({"logps": torch.zeros(3, 1)}, ValueError, r"logps: got shape \(3, 1\)"),
    ({"logps": torch.zeros(3, dtype=torch.long)}, TypeError, "logps: got dtype torch.int64"),
    ({"scores": X}, ValueError, "scores: loss_type=.*does not look at them"),
    ({"loss_type": "lipo_lambda"}, ValueError, r"scores: is None, and loss_type=\['lipo_lambda'\] needs it"),
    ({"loss_type": "listnet", "scores": torch.zeros(2)}, ValueError, r"scores: got shape \(2,\)"),
    ({"loss_type": "listnet", "scores": X > 0}, TypeError, "scores: got dtype torch.bool"),
    ({"loss_type": "listnet", "scores": [0.0, 1.0, 2.0]}, TypeError, "scores: got list"),
]


@pytest.mark.parametrize("change, error, message", BAD)
def test_what_cannot_be_raises_and_names_the_argument(change, error, message):
    with pytest.raises(error, match=f"^{message}"):
        list_preference_loss(**{"logps": X, "sizes": [1, 2], "ref_logps": X, **change})
