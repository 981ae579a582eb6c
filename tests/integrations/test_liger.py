"""The Liger look-alikes against the installed liger-kernel: loss, every metric, every gradient."""

from __future__ import annotations

import inspect

import pytest
import torch

from dpofast import functional, linear_logprob, losses
from dpofast.integrations import liger

chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")

V, H, B, T = 13, 8, 4, 7
NAMES = liger.__all__


def batch(with_bias: bool = True) -> dict[str, torch.Tensor]:
    """Prompts of 2, completions of unequal length."""
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    lengths = torch.tensor([5, 3, 4, 1, 2, 5, 1, 4])
    position = torch.arange(T).expand(2 * B, T)
    target = torch.randint(V, (2 * B, T), generator=generator)
    return {
        "lin_weight": randn(V, H),
        "_input": randn(2 * B, T, H),
        "target": target.masked_fill((position < 2) | (position >= 2 + lengths[:, None]), -100),
        "bias": randn(V) if with_bias else None,
        "ref_input": randn(2 * B, T, H),
        "ref_weight": randn(V, H),
        "ref_bias": randn(V) if with_bias else None,
    }


def run(module: torch.nn.Module, tensors: dict[str, torch.Tensor], **more) -> tuple:
    loss, metrics = module(**tensors, **more)
    policy = [x for name in ("lin_weight", "_input", "bias") if (x := tensors.get(name)) is not None]
    return loss.detach(), metrics, torch.autograd.grad(3 * loss, policy)  # an incoming gradient that is not 1


def assert_same(name: str, options: dict, tensors: dict[str, torch.Tensor], **more) -> None:
    theirs = run(getattr(chunked_loss, name)(compiled=False, **options), tensors, **more)
    ours = run(getattr(liger, name)(compiled=False, **options), tensors, **more)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    assert isinstance(ours[1], tuple) and len(ours[1]) == len(theirs[1])
    for mine, wanted in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=2e-6)
        assert not mine.requires_grad
    for mine, wanted in zip(ours[2], theirs[2], strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def without_reference(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensors.items() if not name.startswith("ref_")}


def dpo_cases():
    for loss_type in sorted(chunked_loss.LigerFusedLinearDPOLoss._SUPPORTED_LOSS_TYPES):
        smooth = {"label_smoothing": 0.1} if loss_type in ("exo_pair", "robust") else {}
        yield {"loss_type": loss_type, **smooth}
        yield {"loss_type": loss_type, **smooth, "beta": 0.4, "average_log_prob": True}
        yield {"loss_type": loss_type, **smooth, "compute_nll_loss": True, "alpha": 0.3, "chunk_size": B}
        yield {"loss_type": loss_type, **smooth, "use_ref_model": False}
    yield {"loss_type": "robust"}
    yield {"loss_type": "discopop", "discopop_tau": 0.7}


@pytest.mark.parametrize("options", list(dpo_cases()), ids=lambda o: "-".join(map(str, o.values())))
def test_dpo_equals_liger(options):
    tensors = batch(with_bias=options.get("beta") is not None)
    if not options.get("use_ref_model", True):
        tensors = without_reference(tensors)
    assert_same("LigerFusedLinearDPOLoss", options, tensors)


@pytest.mark.parametrize("nll", [{}, {"compute_nll_loss": False}, {"alpha": 0.3}])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("average", [False, True])
def test_cpo_equals_liger(nll, label_smoothing, average):
    options = {**nll, "label_smoothing": label_smoothing, "average_log_prob": average, "beta": 0.3}
    assert_same("LigerFusedLinearCPOLoss", options, without_reference(batch()))


@pytest.mark.parametrize("nll", [{}, {"compute_nll_loss": False}, {"alpha": 0.3}])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_simpo_equals_liger(nll, label_smoothing):
    options = {**nll, "label_smoothing": label_smoothing, "beta": 2.0, "gamma": 0.9}
    assert_same("LigerFusedLinearSimPOLoss", options, without_reference(batch()))


@pytest.mark.parametrize("compute_nll_loss", [True, False])
@pytest.mark.parametrize("other_labels", [True, False])
def test_orpo_equals_liger(compute_nll_loss, other_labels):
    tensors = without_reference(batch())
    more = {}
    if other_labels:
        more["nll_target"] = torch.randint(V, (2 * B, T), generator=torch.Generator().manual_seed(5))
        more["nll_target"][:, 5:] = -100
    assert_same("LigerFusedLinearORPOLoss", {"compute_nll_loss": compute_nll_loss, "beta": 0.3}, tensors, **more)


@pytest.mark.parametrize("kl", [None, torch.tensor(0.4), torch.tensor([-0.4])])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("reference", [False, True])
def test_kto_equals_liger(kl, average, reference):
    tensors = batch() if reference else without_reference(batch())
    options = {"average_log_prob": average, "use_ref_model": reference, "beta": 0.3}
    labels = torch.tensor([True, False, False, True, True, False, True, False])
    assert_same("LigerFusedLinearKTOLoss", options, tensors, preference_labels=labels, kl=kl)


def test_kto_takes_a_kl_per_completion_where_liger_does_so_only_in_one_chunk():
    tensors = without_reference(batch())
    more = {"preference_labels": torch.arange(2 * B) % 2 == 0, "kl": torch.linspace(-2, 2, 2 * B)}
    assert_same("LigerFusedLinearKTOLoss", {"chunk_size": 2 * B}, tensors, **more)
    theirs = chunked_loss.LigerFusedLinearKTOLoss(compiled=False)(**tensors, **more)[0]  # chunks of one
    ours = liger.LigerFusedLinearKTOLoss()(**tensors, **more)[0]
    assert theirs > 1 > ours  # a mean of sigmoids


@pytest.mark.parametrize("name", NAMES)
def test_constructor_and_call_take_what_ligers_take_in_the_same_order(name):
    theirs, ours = getattr(chunked_loss, name), getattr(liger, name)
    for method in ("__init__", "forward"):
        wanted = inspect.signature(getattr(theirs, method)).parameters
        found = [
            parameter
            for parameter in inspect.signature(getattr(ours, method)).parameters.values()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        assert [(p.name, p.default) for p in found] == [(p.name, p.default) for p in wanted.values()]
    attributes = set(inspect.signature(theirs.__init__).parameters) - {"self"}
    assert all(getattr(ours(), attribute) == getattr(theirs(), attribute) for attribute in attributes)


def test_labels_smooth_the_sigmoid_loss_which_ligers_code_leaves_out():
    tensors = batch()
    smoothed = run(liger.LigerFusedLinearDPOLoss(label_smoothing=0.2), tensors)
    plain = run(liger.LigerFusedLinearDPOLoss(), tensors)
    theirs = run(chunked_loss.LigerFusedLinearDPOLoss(label_smoothing=0.2, compiled=False), tensors)
    torch.testing.assert_close(theirs[0], plain[0])
    wanted = functional.linear_dpo_loss(
        tensors["_input"], tensors["lin_weight"], tensors["target"], bias=tensors["bias"], label_smoothing=0.2,
        ref_hidden=tensors["ref_input"], ref_weight=tensors["ref_weight"], ref_bias=tensors["ref_bias"],
    )  # fmt: skip
    torch.testing.assert_close(smoothed[0], wanted.loss.detach())
    assert abs(smoothed[0] - plain[0]) > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "ipo"},
        {"loss_type": "sigmoid_norm"},
        {"loss_type": "aot"},
        {"loss_type": "hinge", "f_divergence_type": "js_divergence"},
        {"loss_type": "sigmoid", "ld_alpha": 0.5},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    ],
    ids=lambda options: str(options["loss_type"]),
)
def test_dpo_takes_what_liger_rejects_and_equals_linear_dpo_loss(options):
    tensors = batch()
    loss, metrics, grads = run(liger.LigerFusedLinearDPOLoss(**options), tensors)
    wanted = functional.linear_dpo_loss(
        tensors["_input"], tensors["lin_weight"], tensors["target"], bias=tensors["bias"],
        ref_hidden=tensors["ref_input"], ref_weight=tensors["ref_weight"], ref_bias=tensors["ref_bias"], **options,
    )  # fmt: skip
    torch.testing.assert_close(loss, wanted.loss.detach())
    torch.testing.assert_close(metrics[0], wanted.chosen_logps.detach())
    torch.testing.assert_close(metrics[6], wanted.rejected_rewards.detach())
    wanted_grads = torch.autograd.grad(3 * wanted.loss, [tensors[name] for name in ("lin_weight", "_input", "bias")])
    torch.testing.assert_close(grads, wanted_grads)
    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        run(chunked_loss.LigerFusedLinearDPOLoss(compiled=False, **options), tensors)


@pytest.mark.parametrize("per_token", [True, False])
def test_a_reference_scored_before_gives_the_loss_of_one_scored_now(per_token):
    tensors = batch()
    module = liger.LigerFusedLinearDPOLoss(loss_type="ipo")
    loss, metrics, _ = run(module, tensors)
    ref = linear_logprob(tensors["ref_input"], tensors["ref_weight"], tensors["target"], bias=tensors["ref_bias"]).logps
    ref = ref if per_token else ref.sum(-1)
    early, early_metrics, _ = run(module, without_reference(tensors), ref_logps=ref)
    torch.testing.assert_close(early, loss)
    torch.testing.assert_close(early_metrics, metrics)


def test_a_completion_without_tokens_is_finite_where_liger_is_nan():
    tensors = without_reference(batch())
    tensors["target"][0] = -100
    options = {"alpha": 0.5, "compute_nll_loss": True}
    assert chunked_loss.LigerFusedLinearSimPOLoss(compiled=False, **options)(**tensors)[0].isnan()
    loss, metrics, grads = run(liger.LigerFusedLinearSimPOLoss(**options), tensors)
    assert loss.isfinite() and all(x.isfinite().all() for x in (*metrics, *grads))


CERTAIN = {"one chosen": [0], "one rejected": [5], "both of a pair": [2, 6], "all": range(2 * B)}


@pytest.mark.parametrize("rows", CERTAIN.values(), ids=CERTAIN)
@pytest.mark.parametrize("empty", [True, False], ids=["without tokens", "of probability 1"])
@pytest.mark.parametrize("name", NAMES)
def test_completions_that_are_certain_leave_loss_metrics_and_gradients_finite(name, empty, rows):
    """Those without tokens, and those whose every token has a probability that rounds to 1."""
    tensors = batch()
    with torch.no_grad():
        tensors["bias"][3] = 200.0
    for row in rows:
        if empty:
            tensors["target"][row] = -100
        else:
            tensors["target"][row].masked_fill_(tensors["target"][row] != -100, 3)
    if "KTO" in name:
        tensors["preference_labels"] = torch.arange(2 * B) < B
    if name != "LigerFusedLinearDPOLoss":
        tensors = without_reference(tensors)
    loss, metrics, grads = run(getattr(liger, name)(), tensors)
    assert loss.isfinite() and all(x.isfinite().all() for x in (*metrics, *grads))
    if name == "LigerFusedLinearORPOLoss":  # the two metrics of its own tell of the same odds
        single = [x.double() for x in metrics[:2]]
        odds = [x.clamp(max=-torch.finfo(torch.float32).eps) for x in single]
        ratios = odds[0] - torch.log(-torch.expm1(odds[0])) - odds[1] + torch.log(-torch.expm1(odds[1]))
        torch.testing.assert_close(metrics[8].double(), ratios.mean(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            metrics[7].double(), torch.nn.functional.logsigmoid(ratios).mean(), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "nope"}, "nope"),
        ({"loss_type": "exo_pair"}, "label_smoothing: must be given"),
        ({"loss_type": "robust", "label_smoothing": 0.6}, "label_smoothing: got 0.6"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "not defined for loss_type='hinge'"),
        ({"discopop_tau": 0.7}, "not defined for loss_type='sigmoid'"),
        ({"loss_type": "ipo", "average_log_prob": True}, "average_log_prob: True has no meaning"),
        ({"ld_alpha": 0.5, "average_log_prob": True}, "no meaning with ld_alpha=0.5"),
        ({"use_weighting": True}, "an option of linear_dpo_loss"),
        ({"token_weights": torch.ones(2 * B, T)}, "an option of linear_dpo_loss"),
        ({"beta": -1.0}, "beta: got -1.0"),
        ({"simpo_gama": 1.0}, "simpo_gama"),
    ],
)
def test_what_a_loss_does_not_define_raises_at_construction(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        liger.LigerFusedLinearDPOLoss(**options)


def test_a_reference_is_neither_ignored_nor_made_up():
    tensors = batch()
    with pytest.raises(ValueError, match="use_ref_model: got False, with which is expected neither"):
        liger.LigerFusedLinearDPOLoss(use_ref_model=False)(**tensors)
    with pytest.raises(ValueError, match="use_ref_model: got True, with which is expected one of"):
        liger.LigerFusedLinearDPOLoss()(**without_reference(tensors))
    with pytest.raises(ValueError, match="uses no reference model"):
        liger.LigerFusedLinearDPOLoss(loss_type="simpo")(**tensors)
    with pytest.raises(ValueError, match="use_ref_model: got False, with which is expected no ref_input"):
        liger.LigerFusedLinearKTOLoss()(**tensors, preference_labels=torch.ones(2 * B, dtype=torch.bool))
    with pytest.raises(TypeError, match="preference_labels: got None"):
        liger.LigerFusedLinearKTOLoss()(**without_reference(tensors))


def test_shapes_that_do_not_match_raise_and_name_what_was_expected():
    tensors = batch()
    good = without_reference(tensors)
    odd = {**good, "target": good["target"][:-1], "_input": good["_input"][:-1]}
    for name in ("LigerFusedLinearCPOLoss", "LigerFusedLinearSimPOLoss", "LigerFusedLinearORPOLoss"):
        with pytest.raises(ValueError, match=r"expected \[2B, T, H\] with \[2B, T\]"):
            getattr(liger, name)()(**odd)
    with pytest.raises(ValueError, match=r"ref_logps: got shape \(3,\), expected \(8, 7\) or \(8,\)"):
        liger.LigerFusedLinearDPOLoss()(**good, ref_logps=torch.zeros(3))
    with pytest.raises(ValueError, match="pass the reference's head"):
        liger.LigerFusedLinearDPOLoss()(**good, ref_input=tensors["ref_input"])
    with pytest.raises(ValueError, match=r"nll_target: got shape \(8,\)"):
        liger.LigerFusedLinearORPOLoss()(**good, nll_target=torch.zeros(2 * B, dtype=torch.long))
    labels = torch.ones(2 * B, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"kl: got shape \(3,\)"):
        liger.LigerFusedLinearKTOLoss()(**good, preference_labels=labels, kl=torch.zeros(3))
    with pytest.raises(ValueError, match=r"preference_labels \(3,\)"):
        liger.LigerFusedLinearKTOLoss()(**good, preference_labels=labels[:3])


def test_every_loss_of_the_table_runs_in_the_dpo_class():
    tensors = batch()
    for name, loss in losses.LOSSES.items():
        given = tensors if loss.reference or not loss.compares else without_reference(tensors)
        smoothing = {"label_smoothing": 0.1} if name == "exo_pair" else {}
        module = liger.LigerFusedLinearDPOLoss(loss_type=name, use_ref_model="ref_input" in given, **smoothing)
        assert run(module, given)[0].isfinite()
