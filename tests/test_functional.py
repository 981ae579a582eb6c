"""Sums per sequence, and the losses from hidden states and from logits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dpofast
from dpofast import losses, primitive, reference
from dpofast.functional import DPOLossOutput, dpo_loss, linear_dpo_loss
from dpofast.sequences import sequence_logps, wpo_weights

V, H, T = 7, 4, 6
quick = settings(max_examples=20, deadline=None)


class Batch:
    """Pairs with prompts and completions of several lengths, in fp64."""

    def __init__(self, lengths: list[int], seed: int = 0, width: int = T) -> None:
        generator = torch.Generator().manual_seed(seed)
        sequences = len(lengths)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden, self.ref_hidden = normal(sequences, width, H), normal(sequences, width, H)
        self.weight, self.ref_weight, self.bias = normal(V, H), normal(V, H), normal(V)
        self.labels = torch.randint(V, (sequences, width), generator=generator)
        position = torch.arange(width).expand(sequences, width)
        lengths = torch.tensor(lengths)[:, None]
        # one token of prompt before an odd completion, none before an even one
        self.labels[(position < lengths % 2) | (position >= lengths + lengths % 2)] = -100

    def reference(self) -> dict[str, torch.Tensor]:
        return {"ref_hidden": self.ref_hidden, "ref_weight": self.ref_weight}

    def loss(self, **options) -> DPOLossOutput:
        return linear_dpo_loss(self.hidden, self.weight, self.labels, **{**self.reference(), **options})

    def packed(self, **options) -> DPOLossOutput:
        """The same without padding, as cu_seqlens has it."""
        keep = [row != -100 for row in self.labels]
        counts = torch.tensor([0, *(int(row.sum()) for row in keep)])
        rows = torch.stack(keep)
        return linear_dpo_loss(
            self.hidden[rows],
            self.weight,
            self.labels[rows],
            **{"ref_hidden": self.ref_hidden[rows], "ref_weight": self.ref_weight, **options},
            cu_seqlens=counts.cumsum(0).int(),
        )


def assert_same(a: DPOLossOutput, b: DPOLossOutput) -> None:
    torch.testing.assert_close(a._asdict(), b._asdict())
    assert {name for name, x in a._asdict().items() if x is None} == {n for n, x in b._asdict().items() if x is None}


LENGTHS = [5, 1, 3, 4, 0, 2]
# every path of the function: sums, averages, nll, weights, ld_alpha, statistics
PATHS = [
    {},
    {"loss_type": "ipo", "ld_alpha": 0.3, "metrics": True},
    {"loss_type": ["sigmoid", "sft", "sft_norm"], "loss_weights": [1.0, 0.5, 2.0], "ld_alpha": 0.0},
    {"loss_type": "sigmoid", "use_weighting": True, "metrics": True},
    {"loss_type": "sppo_hard", "use_weighting": True, "pair_weight": torch.tensor([0.5, 2.0, 0.0]).double()},
    {"margin": torch.tensor([0.0, 0.4, -0.1]), "beta": torch.tensor([0.1, 0.5, 2.0]), "reduction": "sum"},
    {"temperature": 0.7, "logit_scale": 1.3, "softcap": 5.0},
]


# sequence_logps


def by_hand(logps, labels, ld_alpha=None, average=False, weights=None):
    """A loop over the tokens, as the definition reads."""
    lengths = [sum(y != -100 for y in row) for row in labels.tolist()]
    out, pairs = [], len(lengths) // 2
    for i, row in enumerate(labels.tolist()):
        shared = min(lengths[i], lengths[(i + pairs) % len(lengths)]) if ld_alpha is not None else T
        total, seen = 0.0, 0
        for t, y in enumerate(row):
            if y != -100:
                seen += 1
                factor = (1.0 if seen <= shared else ld_alpha) * (1.0 if weights is None else weights[i, t].item())
                total += factor * logps[i, t].item()
        out.append(total / max(lengths[i], 1) if average else total)
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("ld_alpha", [None, 0.0, 0.35, 1.0])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_sequence_logps_equals_a_loop_over_the_tokens_padded_and_packed(ld_alpha, average, weighted):
    batch = Batch(LENGTHS)
    logps, labels = -batch.hidden[..., 0].abs(), batch.labels
    weights = batch.hidden[..., 1] if weighted else None
    options = {"ld_alpha": ld_alpha, "average": average}
    expected = by_hand(logps, labels, weights=weights, **options)
    torch.testing.assert_close(sequence_logps(logps, labels, token_weights=weights, **options), expected)
    # packed, prompts and padding still among the rows
    flat = None if weights is None else weights.flatten()
    ends = torch.arange(0, labels.numel() + 1, T)
    packed = sequence_logps(logps.flatten(), labels.flatten(), cu_seqlens=ends, token_weights=flat, **options)
    torch.testing.assert_close(packed, expected)


@pytest.mark.parametrize("packed", [False, True])
def test_gradient_of_sequence_logps(packed):
    batch = Batch(LENGTHS)
    logps = batch.hidden[..., 0]
    cu_seqlens = torch.arange(0, logps.numel() + 1, T) if packed else None
    shape = (-1,) if packed else logps.shape
    labels = batch.labels.reshape(shape)

    def function(logps):
        return sequence_logps(logps, labels, cu_seqlens=cu_seqlens, ld_alpha=0.3, average=True)

    assert torch.autograd.gradcheck(function, logps.reshape(shape).clone().requires_grad_())


def test_masked_tokens_are_not_looked_at():
    """A nan where the label is ignored reaches neither the sum nor the gradient."""
    logps = torch.tensor([[math.nan, -1.0], [-2.0, -math.inf]], requires_grad=True)
    sums = sequence_logps(logps, torch.tensor([[-100, 1], [1, -100]]))
    assert sums.tolist() == [-1.0, -2.0]
    assert torch.autograd.grad(sums.sum(), logps)[0].tolist() == [[0.0, 1.0], [1.0, 0.0]]


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{}, {"average": True}, {"ld_alpha": 0.0}, {"ld_alpha": 0.3}], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_no_factor_of_a_token_that_does_not_count_is_looked_at(garbage, options, packed):
    """Not the log-probability, not the weight; and their gradients are exactly 0 there."""
    batch = Batch(LENGTHS)
    shape, masked = ((-1,) if packed else (6, T)), batch.labels == -100
    if packed:
        options = {**options, "cu_seqlens": torch.arange(0, masked.numel() + 1, T)}
    runs = []
    for filler in (1.0, garbage):
        leaves = [-batch.hidden[..., i].abs().masked_fill(masked, filler) for i in (0, 1)]
        leaves = [x.reshape(shape).requires_grad_() for x in leaves]
        sums = sequence_logps(leaves[0], batch.labels.reshape(shape), token_weights=leaves[1], **options)
        runs.append((sums.detach(), *torch.autograd.grad((sums * torch.arange(1, 7)).sum(), leaves)))
    for want, got in zip(*runs, strict=True):
        assert want.isfinite().all() and got.equal(want)
    assert all(not grad.reshape(6, T)[masked].any() for grad in runs[1][1:])


def test_ld_alpha_0_leaves_out_the_tail_even_where_it_is_impossible():
    logps = torch.tensor([[-1.0, -math.inf], [-2.0, 0.0]], requires_grad=True)
    labels = torch.tensor([[1, 2], [3, -100]])
    sums = sequence_logps(logps, labels, ld_alpha=0.0)
    assert sums.tolist() == [-1.0, -2.0]
    assert torch.autograd.grad(sums.sum(), logps)[0].tolist() == [[1.0, 0.0], [1.0, 0.0]]


def test_wpo_weights_do_not_look_at_masked_tokens():
    labels = torch.tensor([[1, -100], [-100, -100]])
    garbage = torch.tensor([[-1.0, math.nan], [math.inf, -math.inf]])
    assert wpo_weights(garbage, garbage, labels).tolist() == [1.0, 1.0]


def test_sums_of_half_precision_are_fp32():
    logps = torch.full((1, 4096), -1.0, dtype=torch.bfloat16)
    total = sequence_logps(logps, torch.ones(1, 4096, dtype=torch.long))
    assert total.dtype == torch.float32 and total.item() == -4096


def test_wpo_weights_are_mean_token_probabilities_without_gradient():
    logps = torch.tensor([[-1.0, -3.0, -9.0], [-2.0, 0.0, 0.0]], requires_grad=True)
    squares = torch.tensor([[-1.0, -1.0, 0.0], [-3.0, 0.0, 0.0]])
    weights = wpo_weights(logps, squares, torch.tensor([[1, 2, -100], [3, -100, -100]]))
    torch.testing.assert_close(weights, torch.exp(torch.tensor([-1.0, 1.0])))
    assert not weights.requires_grad


# linear_dpo_loss


def two_steps(batch, token_weights, loss_type, ld_alpha=None, use_weighting=False):
    """The loss by hand: weighted sums of policy and reference, then the table."""
    out = reference.linear_logprob(batch.hidden, batch.weight, batch.labels, outputs=("log_sum_sq_probs",))
    ref_logps = reference.linear_logprob(batch.ref_hidden, batch.ref_weight, batch.labels).logps.detach()
    both = [
        sequence_logps(x, batch.labels, token_weights=token_weights, ld_alpha=ld_alpha) for x in (out.logps, ref_logps)
    ]
    ref = both[1].chunk(2) if losses.LOSSES[loss_type[0]].reference else ()
    lengths = (batch.labels != -100).sum(-1).chunk(2)
    nll = -sequence_logps(out.logps, batch.labels).chunk(2)[0]
    wpo = wpo_weights(out.logps, out.log_sum_sq_probs, batch.labels).chunk(2)
    return losses.preference_loss(
        *both[0].chunk(2), *ref, loss_type=loss_type, beta=0.4, chosen_lengths=lengths[0],
        rejected_lengths=lengths[1], chosen_nll=nll, **{"weight": wpo[0] * wpo[1]} if use_weighting else {},
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sigmoid"]},
        {"loss_type": ["ipo"], "ld_alpha": 0.3},
        {"loss_type": ["sigmoid", "sft"]},
        {"loss_type": ["sppo_hard"], "use_weighting": True},
        {"loss_type": ["simpo"]},
    ],
    ids=str,
)
def test_token_weights_are_those_of_both_sums(options):
    """Against the two steps; padded, packed, and from logits, whatever form the reference comes in."""
    batch = Batch(LENGTHS)
    keep = batch.labels != -100
    weights = (batch.hidden[..., 1].abs() + 0.5).masked_fill(~keep, math.nan).requires_grad_()
    leaves = (batch.hidden.requires_grad_(), batch.weight.requires_grad_(), weights)
    expected = two_steps(batch, weights, **options)
    expected_grads = torch.autograd.grad(expected, leaves)
    assert not expected.isclose(two_steps(batch, None, **options), rtol=1e-3)
    options = {**options, "beta": 0.4}
    if losses.LOSSES[options["loss_type"][0]].reference:
        logps = reference.linear_logprob(batch.ref_hidden, batch.ref_weight, batch.labels).logps
        given = batch.reference()
        references = [given, {"ref_logps": logps}]
        packed_reference = {"ref_hidden": batch.ref_hidden[keep], "ref_weight": batch.ref_weight}
        logits_reference = {"ref_logits": batch.ref_hidden @ batch.ref_weight.T}
        sums = sequence_logps(logps, batch.labels, token_weights=weights, ld_alpha=options.get("ld_alpha")).detach()
        out = linear_dpo_loss(
            batch.hidden, batch.weight, batch.labels, ref_logps=sums, token_weights=weights, **options
        )
        torch.testing.assert_close(out.loss, expected)
    else:
        references, packed_reference, logits_reference = [{}], {}, {}
    ends = torch.tensor([0, *keep.sum(-1)]).cumsum(0)
    outs = [
        linear_dpo_loss(batch.hidden, batch.weight, batch.labels, token_weights=weights, **ref, **options)
        for ref in references
    ]
    outs += [
        linear_dpo_loss(
            batch.hidden[keep], batch.weight, batch.labels[keep], cu_seqlens=ends, token_weights=weights[keep],
            **packed_reference, **options,
        ),
        dpo_loss(
            batch.hidden @ batch.weight.T, batch.labels, token_weights=weights, **logits_reference, **options
        ),
    ]  # fmt: skip
    for out in outs:
        assert_same(out, outs[0])
        torch.testing.assert_close(out.loss, expected)
        torch.testing.assert_close(torch.autograd.grad(out.loss, leaves), expected_grads)
    assert not expected_grads[2][~keep].any()


def test_token_weights_of_1_and_of_0_are_the_same_as_none_and_as_a_mask():
    batch = Batch(LENGTHS)
    options = {"ld_alpha": 0.3, "metrics": True}
    assert_same(batch.loss(token_weights=torch.ones(6, T), **options), batch.loss(**options))
    first = torch.zeros(6, T).scatter_(1, (batch.labels != -100).int().argmax(-1, keepdim=True), 1.0)
    labels = batch.labels.masked_fill(first == 0, -100)
    got = batch.loss(token_weights=first)
    batch.labels = labels
    torch.testing.assert_close(got.loss, batch.loss().loss)


@pytest.mark.parametrize("options", PATHS, ids=str)
def test_gradient_of_the_loss(options):
    batch = Batch(LENGTHS)
    options = {key: value for key, value in options.items() if key not in ("metrics", "use_weighting")}

    def function(hidden, weight, bias):
        return linear_dpo_loss(
            hidden, weight, batch.labels, bias=bias, **batch.reference(), **options, backend="torch"
        ).loss

    leaves = (x.requires_grad_() for x in (batch.hidden, batch.weight, batch.bias))
    assert torch.autograd.gradcheck(function, tuple(leaves))


@pytest.mark.parametrize("options", PATHS, ids=str)
def test_logits_padding_and_packing_give_the_same_numbers(options):
    batch, wide = Batch(LENGTHS), Batch(LENGTHS)
    expected = batch.loss(**options)
    logits, ref_logits = batch.hidden @ batch.weight.T, batch.ref_hidden @ batch.ref_weight.T
    assert_same(dpo_loss(logits, batch.labels, ref_logits=ref_logits, **options), expected)
    assert_same(batch.packed(**options), expected)
    for name, value in (("hidden", 9.0), ("ref_hidden", -9.0), ("labels", -100)):
        tensor = getattr(wide, name)
        setattr(wide, name, torch.cat([tensor, torch.full_like(tensor, value)], dim=1))
    assert_same(wide.loss(**options), expected)


@pytest.mark.parametrize("options", PATHS[:4], ids=str)
def test_a_precomputed_reference_gives_the_same_numbers(options):
    batch = Batch(LENGTHS)
    expected = batch.loss(**options)
    per_token = reference.linear_logprob(batch.ref_hidden, batch.ref_weight, batch.labels).logps
    sums = torch.cat([expected.ref_chosen_logps, expected.ref_rejected_logps])
    for ref_logps in (per_token, sums):
        assert_same(
            linear_dpo_loss(batch.hidden, batch.weight, batch.labels, ref_logps=ref_logps, **options),
            expected,
        )


@quick
@given(st.lists(st.integers(0, T - 1), min_size=2, max_size=4), st.integers(0, 1000))
def test_the_loss_of_a_batch_is_the_mean_over_its_pairs(chosen, seed):
    """Scored one by one; the batch is [chosen; rejected], so that pair i has rows i and i + B."""
    pairs = len(chosen)
    batch = Batch([*chosen, *reversed(chosen)], seed)
    whole = batch.loss(loss_type=["sigmoid", "ipo", "sft_norm"], beta=0.4)
    parts = []
    for i in range(pairs):
        part, rows = Batch([0, 0]), [i, i + pairs]
        part.__dict__.update(batch.__dict__)
        for name in ("hidden", "ref_hidden", "labels"):
            setattr(part, name, getattr(batch, name)[rows])
        parts.append(part.loss(loss_type=["sigmoid", "ipo", "sft_norm"], beta=0.4).loss)
    torch.testing.assert_close(whole.loss, torch.stack(parts).mean())


@quick
@given(st.integers(0, 1000))
def test_swapping_chosen_and_rejected_swaps_the_output(seed):
    batch, swap = Batch(LENGTHS, seed), [3, 4, 5, 0, 1, 2]
    one = batch.loss(ld_alpha=0.5)
    batch.hidden, batch.ref_hidden, batch.labels = (x[swap] for x in (batch.hidden, batch.ref_hidden, batch.labels))
    other = batch.loss(ld_alpha=0.5)
    torch.testing.assert_close(one.chosen_logps, other.rejected_logps)
    torch.testing.assert_close(one.chosen_rewards, other.rejected_rewards)
    margins = one.chosen_rewards - one.rejected_rewards
    torch.testing.assert_close(other.loss - one.loss, margins.mean())


def test_policy_equal_to_reference_gives_log_2_exactly():
    batch = Batch(LENGTHS)
    hidden, weight = batch.hidden.float(), batch.weight.float()
    loss = linear_dpo_loss(hidden, weight, batch.labels, ref_hidden=hidden, ref_weight=weight).loss
    assert loss.item() == torch.tensor(math.log(2), dtype=torch.float32).item()


@pytest.mark.parametrize("name", losses.LOSSES)
def test_an_all_masked_batch_has_gradient_exactly_0(name):
    """The loss is its formula at log-ratios of 0; what has no tokens to average is 0."""
    batch = Batch([0, 0, 0, 0])
    batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    options = {"label_smoothing": 0.1} if name == "exo_pair" else {}
    ref = {} if losses.LOSSES[name].reference else {"ref_hidden": None, "ref_weight": None}
    out = batch.loss(loss_type=name, metrics=True, **options, **ref)
    out.loss.backward()
    assert out.loss.isfinite() and not batch.hidden.grad.any() and not batch.weight.grad.any()
    assert all(value.isfinite() for value in out.metrics().values())
    if name.startswith("sft"):
        assert out.loss.item() == 0


@pytest.mark.parametrize("name", losses.LOSSES)
def test_an_empty_batch_is_a_differentiable_zero(name):
    hidden = torch.zeros(0, T, H, requires_grad=True)
    options = {"label_smoothing": 0.1} if name == "exo_pair" else {}
    ref = {"ref_logps": torch.zeros(0)} if losses.LOSSES[name].reference else {}
    labels = torch.zeros(0, T, dtype=torch.long)
    out = linear_dpo_loss(hidden, torch.zeros(V, H), labels, loss_type=name, metrics=True, **options, **ref)
    out.loss.backward()
    assert out.loss.item() == 0 and all(value.item() == 0 for value in out.metrics().values())


def test_the_reference_gets_no_gradient_and_masked_rows_get_exactly_0():
    batch = Batch(LENGTHS)
    for tensor in (batch.hidden, batch.ref_hidden, batch.ref_weight):
        tensor.requires_grad_()
    batch.loss().loss.backward()
    assert batch.ref_hidden.grad is None and batch.ref_weight.grad is None
    assert not batch.hidden.grad[batch.labels == -100].any() and batch.hidden.grad[batch.labels != -100].all()


def test_only_what_is_asked_for_is_computed(monkeypatch):
    """Statistics and the reference cost products and passes; nobody pays who does not ask."""
    calls = []

    score = primitive.HeadCall.score

    def spy(self, names):
        calls.append((names, torch.is_grad_enabled()))
        return score(self, names)

    monkeypatch.setattr(primitive.HeadCall, "score", spy)
    batch = Batch(LENGTHS)
    batch.loss()
    assert calls == [((), False), ((), True)]
    calls.clear()
    batch.loss(use_weighting=True, ref_logps=torch.zeros(6), ref_hidden=None, ref_weight=None)
    assert calls == [(("log_sum_sq_probs",), True)]
    calls.clear()
    batch.loss(metrics=True)
    assert calls[-1] == (("entropy", "mean_logits", "is_top1"), True)


def test_under_autocast_the_operands_of_two_heads_are_cast_one_after_the_other(monkeypatch):
    """Each is a copy of the head in 16 bits, and that of the policy is not wanted before the reference is scored."""
    seen, cast = [], primitive.HeadScorer._cast

    def spy(self):
        seen.append((self.weight.dtype, torch.is_grad_enabled()))
        return cast(self)

    monkeypatch.setattr(primitive.HeadScorer, "_cast", spy)
    score = primitive.HeadCall.score
    monkeypatch.setattr(primitive.HeadCall, "score", lambda *args: (seen.append("score"), score(*args))[1])
    with torch.autocast("cpu", torch.bfloat16):
        Batch(LENGTHS).loss()
    assert seen == [(torch.float64, False), "score", (torch.float64, True), "score"]


def test_metrics_are_token_means_over_the_completions():
    batch = Batch(LENGTHS)
    out = batch.loss(metrics=True, beta=0.3)
    logits, mask = batch.hidden @ batch.weight.T, batch.labels != -100
    half = torch.arange(6)[:, None].expand(6, T) < 3
    chosen = torch.distributions.Categorical(logits=logits[mask]).entropy().mean()
    expected = {
        "entropy": chosen,
        "logits/chosen": logits[mask & half].mean(),
        "logits/rejected": logits[mask & ~half].mean(),
        "mean_token_accuracy": (logits.argmax(-1) == batch.labels)[mask & half].double().mean(),
        "rewards/margins": 0.3 * (out.chosen_logps - out.ref_chosen_logps).mean()
        - 0.3 * (out.rejected_logps - out.ref_rejected_logps).mean(),
    }
    metrics = out.metrics()
    torch.testing.assert_close({name: metrics[name] for name in expected}, expected)
    assert not any(value.requires_grad for value in metrics.values())
    assert set(batch.loss().metrics()) == {
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
    }


@pytest.mark.parametrize("name, tokens", [("cpo", "sums"), ("simpo", "averages"), ("sft", "sums")])
def test_rewards_without_a_reference_are_what_the_loss_compares(name, tokens):
    batch = Batch([3, 2, 4, 5])
    out = linear_dpo_loss(batch.hidden, batch.weight, batch.labels, loss_type=name, beta=0.2)
    expected = 0.2 * out.chosen_logps / (out.chosen_lengths if tokens == "averages" else 1)
    torch.testing.assert_close(out.chosen_rewards, expected)
    assert not out.chosen_rewards.requires_grad and out.ref_chosen_logps is None


def test_dpo_loss_leaves_the_reference_logits_alone_when_gradients_are_written_in_place():
    batch = Batch(LENGTHS)
    logits = (batch.hidden @ batch.weight.T).requires_grad_()
    ref_logits = batch.ref_hidden @ batch.ref_weight.T
    before = ref_logits.clone()
    expected = torch.autograd.grad(dpo_loss(logits, batch.labels, ref_logits=ref_logits).loss, logits)[0]
    out = dpo_loss(logits * 1, batch.labels, ref_logits=ref_logits, inplace_grad=True)
    torch.testing.assert_close(torch.autograd.grad(out.loss, logits)[0], expected)
    assert ref_logits.equal(before)


def test_compiles_without_a_graph_break():
    batch = Batch(LENGTHS)
    options = {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.3, "use_weighting": True, "metrics": True}
    options["token_weights"] = batch.hidden[..., 1]

    def function(logits, ref_logits, labels):
        out = dpo_loss(logits, labels, ref_logits=ref_logits, backend="torch", **options)
        return out.loss, out.metrics()

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    arguments = (batch.hidden @ batch.weight.T, batch.ref_hidden @ batch.ref_weight.T, batch.labels)
    torch.testing.assert_close(compiled(*arguments), function(*arguments))


# What must raise

R = torch.zeros(6)
NONE = {"ref_hidden": None, "ref_weight": None}
BAD = [
    (
        {
            "labels": torch.zeros(5, T, dtype=torch.long),
            "hidden": torch.zeros(5, T, H),
            **NONE,
            "ref_logps": R,
        },
        ValueError,
        "labels: got 5 sequences",
    ),
    ({"labels": torch.zeros(6, T)}, TypeError, "labels: got dtype torch.float32"),
    ({"labels": torch.zeros(6, T + 1, dtype=torch.long)}, ValueError, "hidden without its last dimension"),
    (
        {"hidden": torch.zeros(6, H), "labels": torch.zeros(6, dtype=torch.long), **NONE},
        ValueError,
        "expected .S, T.",
    ),
    ({"ref_hidden": torch.zeros(6, 2, H)}, ValueError, "ref_hidden without its last dimension"),
    ({"ref_logps": R}, ValueError, "given beside a reference"),
    ({"ref_weight": None}, ValueError, "ref_weight: is None"),
    ({"ref_hidden": None}, ValueError, "ref_weight: goes with ref_hidden"),
    ({**NONE, "ref_bias": torch.zeros(V)}, ValueError, "goes with ref_hidden"),
    (NONE, ValueError, "needs a reference model; pass ref_logps, ref_hidden with ref_weight, or ref_logits"),
    ({"loss_type": "simpo"}, ValueError, "uses no reference model"),
    ({**NONE, "ref_logps": torch.zeros(3)}, ValueError, r"ref_logps: got shape \(3,\)"),
    ({**NONE, "ref_logps": torch.zeros(6, dtype=torch.long)}, TypeError, "ref_logps: got dtype torch.int64"),
    ({"beta": 0.0}, ValueError, "beta: got 0.0"),
    ({"beta": torch.ones(6)}, ValueError, r"beta: got shape \(6,\), expected \(3,\)"),
    ({"pair_weight": torch.ones(6)}, ValueError, r"pair_weight: got shape \(6,\)"),
    ({"pair_weight": 2.0}, TypeError, "weight: got float 2.0"),
    (
        {"pair_weight": torch.ones(3), "loss_type": "aot"},
        ValueError,
        "pair_weight: not defined for loss_type='aot'",
    ),
    (
        {"use_weighting": True, "loss_type": "aot"},
        ValueError,
        "use_weighting: not defined for loss_type='aot'",
    ),
    ({"use_weighting": 1}, TypeError, "use_weighting: got int 1"),
    ({"token_weights": 2.0}, TypeError, "token_weights: got float"),
    (
        {"token_weights": torch.ones(6)},
        ValueError,
        r"token_weights: got shape \(6,\), expected \(6, 6\)",
    ),
    ({"token_weights": torch.ones(6, T, dtype=torch.long)}, TypeError, "token_weights: got dtype torch.int64"),
    ({"ld_alpha": 1.5}, ValueError, "ld_alpha: got 1.5"),
    ({"ld_alpha": "1"}, TypeError, "ld_alpha: got str '1'"),
    ({"label_smooth": 0.1}, TypeError, "label_smooth: not an option"),
    ({"reduction": "batchmean"}, ValueError, "reduction: got 'batchmean'"),
    ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, r"expected \[S \+ 1\] with labels \[N\]"),
]


@pytest.mark.parametrize("change, error, message", BAD)
def test_bad_input_raises_before_anything_is_computed(change, error, message, monkeypatch):
    def never(*_, **__):
        raise AssertionError("the policy was scored before the arguments were checked")

    monkeypatch.setattr(primitive.HeadScorer, "ask", never)
    batch = Batch(LENGTHS)
    arguments = {
        "hidden": batch.hidden,
        "weight": batch.weight,
        "labels": batch.labels,
        **batch.reference(),
        **change,
    }
    with pytest.raises(error, match=message):
        linear_dpo_loss(**arguments)


@pytest.mark.parametrize(
    "cu_seqlens", [[0, 2, 1, 6], [1, 3, 6], [0, 3, 5], [0, 3, 7], []], ids=lambda x: "-".join(map(str, x))
)
def test_bad_boundaries_raise(cu_seqlens):
    with pytest.raises(ValueError, match="cu_seqlens"):
        sequence_logps(
            torch.zeros(6),
            torch.zeros(6, dtype=torch.long),
            cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.long),
        )


def test_bad_tokens_raise():
    labels = torch.zeros(3, 2, dtype=torch.long)
    for arguments, error, message in (
        ({"logps": torch.zeros(3, 1)}, ValueError, "logps: got shape"),
        ({"logps": labels}, TypeError, "logps: got dtype"),
        ({"token_weights": torch.zeros(3)}, ValueError, "token_weights: got shape"),
        ({"ld_alpha": 0.5}, ValueError, "the batch has 3 sequences"),
    ):
        with pytest.raises(error, match=message):
            sequence_logps(**{"logps": torch.zeros(3, 2), "labels": labels, **arguments})


def test_linear_dpo_loss_compiles_to_one_graph_forward_and_backward():
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 6, 16, requires_grad=True), torch.randn(100, 16, requires_grad=True)
    labels, ref_logps = torch.randint(100, (4, 6)), torch.randn(4)
    labels[:, :2] = -100

    def loss(hidden, weight):
        return dpofast.linear_dpo_loss(hidden, weight, labels, ref_logps=ref_logps, beta=0.1).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    want, got = loss(hidden, weight), compiled(hidden, weight)
    torch.testing.assert_close(got, want)
    for x, y in zip(torch.autograd.grad(got, (hidden, weight)), torch.autograd.grad(want, (hidden, weight))):
        torch.testing.assert_close(x, y)
