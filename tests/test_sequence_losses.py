"""Losses of lists and of single completions from hidden states: on every backend, weights of tokens, and modules."""

from __future__ import annotations

import copy
import pickle

import numerics
import pytest
import torch

import dpofast
from dpofast import LinearListLoss, LinearUnpairedLoss, RunningMean, reference
from dpofast.data import Answer, Encoded, collate
from dpofast.lists import LIST_LOSSES

S, T, H, V = 7, 6, 8, 40
SIZES = [3, 1, 2, 1]
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class Batch:
    """Seven answers with prompts and padding of several lengths, one of them without a token that counts."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        g = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

        self.hidden, self.ref_hidden = normal(S, T, H), normal(S, T, H)
        self.weight, self.ref_weight, self.bias = normal(V, H), normal(V, H), normal(V)
        self.labels = torch.randint(V, (S, T), generator=g)
        starts, stops = torch.tensor([[1, 0, 2, 0, 3, 1, 0], [5, 6, 3, 0, 6, 2, 4]])[..., None]
        position = torch.arange(T).expand(S, T)
        self.labels[(position < starts) | (position >= stops)] = -100
        self.token_weights = torch.rand(S, T, generator=g, dtype=torch.float64) + 0.5
        self.scores = torch.tensor([2.0, 0.0, 1.0, 1.0, 0.0, 1.0, 3.0])
        self.good = torch.tensor([True, False, False, True, True, False, True])

    def operands(self, dtype: torch.dtype | None = None) -> tuple:
        return tuple(x.detach().to(dtype or x.dtype).requires_grad_() for x in (self.hidden, self.weight))

    def reference(self) -> dict[str, torch.Tensor]:
        return {"ref_hidden": self.ref_hidden, "ref_weight": self.ref_weight}

    def sums(self, hidden, weight, bias=None, token_weights=None) -> torch.Tensor:
        """By plain PyTorch."""
        logps = reference.linear_logprob(hidden, weight, self.labels, bias=bias).logps
        values = logps if token_weights is None else logps * token_weights
        return torch.where(self.labels != -100, values, 0.0).sum(-1)

    def reference_sums(self, token_weights=None) -> torch.Tensor:
        return self.sums(self.ref_hidden.double(), self.ref_weight.double(), token_weights=token_weights).detach()


def spoil(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What no one may look at: NaN where a token does not count."""
    return torch.where(labels != -100, x, torch.nan)


LIST_CASES = [
    {
        "loss_type": "softmax_dpo",
        "margin": torch.tensor([0.1, 0.0, -0.2, 0.3]),
        "list_weight": torch.linspace(0.5, 2.0, 4),
    },
    {"loss_type": "plackett_luce", "beta": torch.tensor([0.1, 0.5, 2.0, 1.0])},
    {"loss_type": "lipo_lambda"},
    {"loss_type": ["listnet", "softmax_dpo"], "loss_weights": [0.5, 1.0], "reduction": "sum"},
]


def of_logps(options: dict) -> dict:
    return {{"list_weight": "weight", "sequence_weight": "weight"}.get(k, k): x for k, x in options.items()}


@pytest.mark.parametrize("weighted", [False, True], ids=["", "token_weights"])
@pytest.mark.parametrize("case", LIST_CASES, ids=lambda case: str(case["loss_type"]))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: numerics.SHORT[dtype])
def test_lists_on_every_backend_equal_plain_pytorch(backend, dtype, case, weighted):
    batch = Batch(dtype)
    scored = case["loss_type"] not in ("softmax_dpo", "plackett_luce")
    data = {"sizes": SIZES, **({"scores": batch.scores} if scored else {})}
    weights = batch.token_weights if weighted else None
    spoiled = spoil(weights, batch.labels) if weighted else None
    leaves, wide = batch.operands(), batch.operands(torch.float64)
    out = dpofast.linear_list_loss(
        *leaves, batch.labels, **batch.reference(), **data, **case, token_weights=spoiled, backend=backend
    )
    want = dpofast.list_preference_loss(
        batch.sums(*wide, token_weights=weights), ref_logps=batch.reference_sums(weights), **data, **of_logps(case)
    )
    compare(out.loss, leaves, want, wide, dtype)


UNPAIRED_CASES = [
    {"loss_type": "kto", "kl": torch.tensor([0.2, 0.6]), "desirable_weight": 1.5},
    {"loss_type": "apo_zero_unpaired", "sequence_weight": torch.linspace(0.5, 2.0, S), "reduction": "sum"},
    {"loss_type": "bco", "reward_shift": 0.3, "beta": torch.linspace(0.1, 1.0, S)},
]


@pytest.mark.parametrize("weighted", [False, True], ids=["", "token_weights"])
@pytest.mark.parametrize("case", UNPAIRED_CASES, ids=lambda case: case["loss_type"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: numerics.SHORT[dtype])
def test_single_completions_on_every_backend_equal_plain_pytorch(backend, dtype, case, weighted):
    batch = Batch(dtype)
    weights = batch.token_weights if weighted else None
    leaves, wide = batch.operands(), batch.operands(torch.float64)
    out = dpofast.linear_unpaired_loss(
        *leaves, batch.labels, is_chosen=batch.good, **batch.reference(), **case, token_weights=weights, backend=backend
    )
    want = dpofast.unpaired_preference_loss(
        batch.sums(*wide, token_weights=weights), batch.reference_sums(weights), batch.good, **of_logps(case)
    )
    compare(out.loss, leaves, want, wide, dtype)
    torch.testing.assert_close(out.rewards.double(), (case.get("beta", 0.1) * (out.logps - out.ref_logps)).double())
    assert out.is_chosen.equal(batch.good) and out.accuracy is None


def compare(loss, leaves, want, wide, dtype):
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 3e-2}[dtype]
    got, expected = (torch.autograd.grad(x, of) for x, of in ((loss, leaves), (want, wide)))
    torch.testing.assert_close(loss.double(), want, rtol=tolerance, atol=tolerance)
    for x, y in zip(got, expected):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance * float(y.abs().max()))


def test_chosen_and_rejected_interleaved_are_the_loss_of_pairs_to_the_bit():
    batch = Batch(torch.float32)
    batch.hidden, batch.labels = batch.hidden[:6], batch.labels[:6]
    results = []
    for loss, how in ((dpofast.linear_dpo_loss, {}), (dpofast.linear_list_loss, {"sizes": 2, "interleaved": True})):
        leaves, weights = batch.operands(), batch.token_weights[:6].clone().requires_grad_()
        margin = torch.tensor([0.1, -0.2, 0.0])
        out = loss(*leaves, batch.labels, ref_logps=torch.zeros(6), margin=margin, token_weights=weights, **how)
        results.append((out.loss, *torch.autograd.grad(out.loss, (*leaves, weights))))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("loss", ["lists", "completions"])
def test_token_weights_have_exact_gradients_of_their_own(loss):
    batch = Batch()
    data = {"sizes": SIZES} if loss == "lists" else {"is_chosen": batch.good, "kl": 0.1}
    function = dpofast.linear_list_loss if loss == "lists" else dpofast.linear_unpaired_loss

    def call(hidden, weight, token_weights):
        return function(
            hidden, weight, batch.labels, **batch.reference(), **data, token_weights=token_weights, backend="torch"
        ).loss

    weights = batch.token_weights.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: call(batch.hidden, batch.weight, x), weights)
    assert torch.autograd.gradcheck(call, (*batch.operands(), weights), fast_mode=True)


def test_packed_answers_equal_padded_ones():
    batch = Batch()
    keep = batch.labels != -100
    ends = torch.nn.functional.pad(keep.sum(-1).cumsum(0), (1, 0))
    more = {"sizes": SIZES, "scores": batch.scores, "loss_type": "lipo_lambda", "metrics": True}
    ref = batch.reference_sums()
    padded = dpofast.linear_list_loss(batch.hidden, batch.weight, batch.labels, ref_logps=ref, **more)
    packed = dpofast.linear_list_loss(
        batch.hidden[keep], batch.weight, batch.labels[keep], ref_logps=ref, cu_seqlens=ends, **more
    )
    torch.testing.assert_close(packed._asdict(), padded._asdict())
    torch.testing.assert_close(packed.metrics(), padded.metrics())


def test_references_per_token_summed_and_scored_are_the_same():
    batch = Batch()
    logps = reference.linear_logprob(batch.ref_hidden, batch.ref_weight, batch.labels).logps
    weights = batch.token_weights
    for function, data in (
        (dpofast.linear_list_loss, {"sizes": SIZES}),
        (dpofast.linear_unpaired_loss, {"is_chosen": batch.good, "loss_type": "apo_zero_unpaired"}),
    ):
        found = [
            function(batch.hidden, batch.weight, batch.labels, **ref, **data, token_weights=weights).loss
            for ref in (batch.reference(), {"ref_logps": logps}, {"ref_logps": batch.reference_sums(weights)})
        ]
        torch.testing.assert_close(found[0], found[1])
        torch.testing.assert_close(found[0], found[2])


def test_metrics_are_those_of_the_best_answers_and_of_the_others():
    batch = Batch()
    out = dpofast.linear_list_loss(
        batch.hidden, batch.weight, batch.labels, sizes=SIZES, scores=batch.scores, loss_type="lipo_lambda",
        metrics=True, **batch.reference(),
    )  # fmt: skip
    best = torch.tensor([True, False, False, True, False, True, True])
    rewards = 0.1 * (batch.sums(batch.hidden, batch.weight) - batch.reference_sums())
    assert out.is_chosen.equal(best) and out.lengths.tolist() == [4, 6, 1, 0, 3, 1, 4]
    torch.testing.assert_close(out.rewards, rewards)
    metrics = out.metrics()
    torch.testing.assert_close(metrics["rewards/margins"], rewards[best].mean() - rewards[~best].mean())
    right = int(rewards[0] > rewards[1:3].max()) + int(rewards[5] > rewards[4])
    assert metrics["rewards/accuracies"].item() == right / 2
    assert not any(x.requires_grad for x in metrics.values())
    scored = reference.linear_logprob(batch.hidden, batch.weight, batch.labels, outputs=("entropy", "is_top1"))
    counts = batch.labels != -100
    torch.testing.assert_close(metrics["entropy"], scored.entropy[counts].mean())
    torch.testing.assert_close(
        metrics["mean_token_accuracy"], scored.is_top1[counts & best[:, None]].double().mean()
    )  # fmt: skip


@pytest.mark.parametrize("name", LIST_LOSSES)
def test_an_empty_batch_is_a_differentiable_zero(name):
    hidden, weight = torch.zeros(0, T, H, requires_grad=True), torch.randn(V, H)
    more = {} if name == "softmax_dpo" else {"scores": torch.zeros(0)}
    labels = torch.zeros(0, T, dtype=torch.long)
    out = dpofast.linear_list_loss(
        hidden, weight, labels, sizes=[], ref_logps=torch.zeros(0), loss_type=name, metrics=True, **more
    )
    assert out.loss.item() == 0 and out.loss.requires_grad
    assert all(x.isfinite() for x in out.metrics().values())
    out.loss.backward()


def test_batches_of_dpofast_data_go_in_as_they_are():
    """Ragged lists with scores and weights, in blocks of answers; against one list at a time."""
    g = torch.Generator().manual_seed(0)
    words, head = (torch.randn(V, H, generator=g, dtype=torch.float64) for _ in range(2))
    records = []
    for scores, weight in (((2.0, 1.0, 0.0), 0.5), ((1.0,), None), ((3.0, 0.0), 2.0), ((3.0, 1.0, 1.0, 0.0), 1.5)):
        tokens = torch.randint(V, (len(scores), 3), generator=g).tolist()
        answers = tuple(Answer(tuple(ids), (True,) * 3) for ids in tokens)
        records.append(Encoded((5, 6), answers, scores=scores, weight=weight))
    batch = collate(records, pad_token_id=0)
    hidden = words[batch.input_ids]
    out = dpofast.linear_list_loss(
        hidden[:, :-1], head, batch.targets[:, 1:], sizes=batch.sizes, interleaved=True, scores=batch.scores,
        list_weight=batch.weights, ref_logps=torch.zeros(10), loss_type="lipo_lambda", reduction="none",
    )  # fmt: skip
    for record, loss in zip(records, out.loss):
        tokens = torch.tensor([record.prompt + answer.ids for answer in record.answers])
        z = words[tokens][:, :-1] @ head.T
        logps = z.log_softmax(-1).gather(-1, tokens[:, 1:, None])[:, 1:].sum((1, 2))
        alone = dpofast.list_score_loss(
            logps, len(logps), scores=torch.tensor(record.scores), loss_type="lipo_lambda", beta=0.1
        )
        torch.testing.assert_close(loss, alone * (1.0 if record.weight is None else record.weight))
    assert out.is_chosen.equal(torch.arange(10) < 4)


def test_both_compile_without_a_graph_break():
    batch = Batch(torch.float32)
    ref = batch.reference_sums().float()

    def step(hidden, weight):
        listed = dpofast.linear_list_loss(
            hidden, weight, batch.labels, sizes=SIZES, scores=batch.scores, ref_logps=ref, loss_type="lipo_lambda",
            metrics=True,
        )  # fmt: skip
        single = dpofast.linear_unpaired_loss(
            hidden, weight, batch.labels, is_chosen=batch.good, ref_logps=ref, kl=0.1, token_weights=batch.token_weights
        )
        return listed.loss + single.loss

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = batch.operands()
        loss = function(*leaves)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for plain, compiled in zip(*results):
        torch.testing.assert_close(compiled, plain)


# Modules


def copies(module):
    return module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))


def test_modules_equal_the_functions():
    batch = Batch()
    operands = batch.hidden, batch.weight, batch.labels
    tensors = {**batch.reference(), "bias": batch.bias, "ref_bias": batch.bias, "token_weights": batch.token_weights}
    listed = {"loss_type": "plackett_luce", "beta": 0.3, "softcap": 5.0, "metrics": True}
    data = {"sizes": SIZES, "scores": batch.scores, "list_weight": torch.linspace(0.5, 2.0, 4)}
    want = dpofast.linear_list_loss(*operands, **tensors, **data, **listed)
    for module in copies(LinearListLoss(**listed)):
        torch.testing.assert_close(module(*operands, **tensors, **data)._asdict(), want._asdict(), rtol=0, atol=0)
    single = {"beta": 0.3, "undesirable_weight": 0.5}
    data = {"is_chosen": batch.good, "kl": torch.tensor([0.5])}
    want = dpofast.linear_unpaired_loss(*operands, **tensors, **data, **single)
    for module in copies(LinearUnpairedLoss(**single)):
        torch.testing.assert_close(module(*operands, **tensors, **data).loss, want.loss, rtol=0, atol=0)


def test_bcos_module_keeps_the_mean_of_rewards():
    batch = Batch()
    operands = batch.hidden, batch.weight, batch.labels
    data = {"is_chosen": batch.good, **batch.reference()}
    module, running = LinearUnpairedLoss(loss_type="bco"), RunningMean()
    for _ in range(2):
        want = dpofast.linear_unpaired_loss(*operands, **data, loss_type="bco", reward_shift=running)
        torch.testing.assert_close(module(*operands, **data).loss, want.loss, rtol=0, atol=0)
    assert module.state_dict()["reward_mean.count"] == 2 * S
    fixed = module(*operands, **data, reward_shift=0.0)
    assert fixed.loss != want.loss and module.state_dict()["reward_mean.count"] == 2 * S


# What must raise, and what it must say


def never(*_, **__):
    raise AssertionError("scored before the arguments were checked")


REFS = {"ref_hidden": torch.zeros(S, T, H), "ref_weight": torch.zeros(V, H)}
BAD_LISTS = [
    ({"sizes": [3, 3]}, ValueError, "sizes: got 6 in all, expected 7, as many as there are in labels"),
    ({"sizes": 2}, ValueError, "sizes: got 2, expected a number >= 1 that divides the 7"),
    ({"interleaved": 0}, TypeError, "interleaved: got int 0"),
    ({"ref_logps": None}, ValueError, "ref_logps: is None, and a reference is needed"),
    (REFS, ValueError, "ref_logps: given beside a reference to score"),
    ({"ref_logps": None, "ref_hidden": REFS["ref_hidden"]}, ValueError, "ref_weight: is None"),
    ({"ref_weight": REFS["ref_weight"]}, ValueError, "ref_weight: goes with ref_hidden"),
    ({"ref_logps": torch.zeros(S, 1)}, ValueError, r"ref_logps: got shape \(7, 1\)"),
    ({"list_weight": torch.ones(S)}, ValueError, r"list_weight: got shape \(7,\), expected \(4,\)"),
    ({"list_weight": 2.0}, TypeError, "list_weight: got float"),
    ({"beta": torch.ones(S)}, ValueError, r"beta: got shape \(7,\)"),
    ({"token_weights": torch.ones(S)}, ValueError, r"token_weights: got shape \(7,\)"),
    ({"token_weights": 1.0}, TypeError, "token_weights: got float"),
    ({"scores": torch.zeros(S)}, ValueError, "scores: loss_type=.*does not look at them"),
    ({"loss_type": "lipo_lambda"}, ValueError, "scores: is None"),
    ({"loss_type": "kto"}, ValueError, "loss_type: got 'kto'"),
    ({"pair_weight": torch.ones(4)}, TypeError, "pair_weight: not an option"),
    ({"temperature": 0.0}, ValueError, "temperature: got 0.0"),
    ({"metrics": 1}, TypeError, "metrics: got int 1"),
    ({"reduction": "all"}, ValueError, "reduction: got 'all'"),
]
BAD_COMPLETIONS = [
    ({"is_chosen": torch.ones(S)}, TypeError, "is_chosen: got dtype torch.float32"),
    ({"is_chosen": torch.ones(4) > 0}, ValueError, r"is_chosen: got shape \(4,\), expected \(7,\)"),
    ({"is_chosen": [True] * S}, TypeError, "is_chosen: got list"),
    ({"kl": None}, ValueError, "kl: loss_type='kto' needs it"),
    ({"reward_shift": 0.1}, ValueError, "reward_shift: loss_type='kto' does not take it"),
    ({"kl": None, "loss_type": "bco", "reward_shift": torch.zeros(2)}, ValueError, r"reward_shift: got shape \(2,\)"),
    ({"loss_type": ["kto"]}, TypeError, "loss_type: got list"),
    ({"ref_logps": None}, ValueError, "ref_logps: is None, and a reference is needed"),
    ({"sequence_weight": torch.ones(4)}, ValueError, r"sequence_weight: got shape \(4,\), expected \(7,\)"),
    ({"token_weights": torch.ones(S, T, 1)}, ValueError, "token_weights: got shape"),
    ({"margin": 0.1}, ValueError, "margin: not defined for loss_type='kto', nor for another of its kind"),
]


@pytest.mark.parametrize(
    "function, common, change, error, message",
    [(dpofast.linear_list_loss, {"sizes": SIZES}, *bad) for bad in BAD_LISTS]
    + [(dpofast.linear_unpaired_loss, {"is_chosen": Batch().good, "kl": 0.0}, *bad) for bad in BAD_COMPLETIONS],
)
def test_what_cannot_be_raises_before_anything_is_scored(monkeypatch, function, common, change, error, message):
    monkeypatch.setattr("dpofast._ops.call_linear_logprob", never)
    batch = Batch(torch.float32)
    with pytest.raises(error, match=f"^{message}"):
        function(batch.hidden, batch.weight, batch.labels, **{"ref_logps": torch.zeros(S), **common, **change})


@pytest.mark.parametrize(
    "make, options, error, message",
    [
        (LinearListLoss, {"loss_type": "sigmoid"}, ValueError, "loss_type: got 'sigmoid'"),
        (LinearListLoss, {"beta": -1.0}, ValueError, "beta: got -1.0"),
        (LinearListLoss, {"list_weight": torch.ones(2)}, TypeError, "list_weight: got a tensor.*to forward"),
        (LinearListLoss, {"weight": 1.0}, TypeError, "weight: the head's own name; the weight of each is list_weight"),
        (LinearListLoss, {"memory_budget": "lots"}, ValueError, "memory_budget"),
        (LinearUnpairedLoss, {"loss_type": "softmax_dpo"}, ValueError, "loss_type: got 'softmax_dpo'"),
        (LinearUnpairedLoss, {"desirable_weight": -1.0}, ValueError, "desirable_weight: got -1.0"),
        (LinearUnpairedLoss, {"softcap": 0.0}, ValueError, "softcap: got 0.0"),
    ],
)
def test_options_are_checked_at_construction(make, options, error, message):
    with pytest.raises(error, match=message):
        make(**options)
