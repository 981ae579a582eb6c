"""The table against TRL's own trainers: `_compute_loss` of the installed package, run on a stand-in model."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from dpofast import functional, losses, reference, sequences

pytest.importorskip("trl", minversion="1.16")

V, H, B, T = 11, 6, 4, 9


class Head(torch.nn.Module):
    """What a trainer calls as a model: hidden states of its own, and what a fused head returns."""

    is_gradient_checkpointing = False

    def __init__(self, distance: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        hidden, weight, change = (torch.randn(*n, generator=generator) for n in ((2 * B, T, H), (V, H), (V, H)))
        self.hidden = torch.nn.Parameter(hidden)
        self.weight = torch.nn.Parameter(weight + distance * change)

    def forward(self, labels, **_):
        out = reference.linear_logprob(
            self.hidden[:, :-1],
            self.weight,
            labels[:, 1:],
            outputs=("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
        )
        return SimpleNamespace(log_probs=out.logps, **{name: getattr(out, name) for name in reference.OUTPUTS})


def batch() -> dict[str, torch.Tensor]:
    """Prompts of 2, completions of unequal length, one of them empty."""
    generator = torch.Generator().manual_seed(7)
    lengths = torch.tensor([7, 3, 5, 1, 2, 6, 5, 0])
    position = torch.arange(T).expand(2 * B, T)
    mask = ((position >= 2) & (position < 2 + lengths[:, None])).long()
    return {
        "input_ids": torch.randint(V, (2 * B, T), generator=generator),
        "attention_mask": torch.ones(2 * B, T, dtype=torch.long),
        "completion_mask": mask,
    }


ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)


def trl_dpo(policy: Head, ref: Head, inputs: dict, **options):
    """Loss and metrics of TRL's DPOTrainer."""
    from trl import DPOTrainer

    loss_type = options.get("loss_type", "sigmoid")
    loss_types = [loss_type] if isinstance(loss_type, str) else loss_type
    trainer = SimpleNamespace(
        model=policy,
        ref_model=ref,
        accelerator=ACCELERATOR,
        args=SimpleNamespace(discopop_tau=options.get("discopop_tau", 0.05), gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        loss_types=loss_types,
        loss_weights=options.get("loss_weights") or [1.0] * len(loss_types),
        beta=options.get("beta", 0.1),
        ld_alpha=options.get("ld_alpha"),
        f_divergence_type=options.get("f_divergence_type", "reverse_kl"),
        f_alpha_divergence_coef=options.get("f_alpha_divergence_coef", 0.5),
        label_smoothing=options.get("label_smoothing", 0.0),
        use_weighting=options.get("use_weighting", False),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    loss = DPOTrainer._compute_loss(trainer, policy, inputs, return_outputs=False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def ours(policy: Head, ref: Head, inputs: dict, **options) -> functional.DPOLossOutput:
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)[:, 1:]
    return functional.linear_dpo_loss(
        policy.hidden[:, :-1],
        policy.weight,
        labels,
        ref_hidden=ref.hidden[:, :-1],
        ref_weight=ref.weight,
        metrics=True,
        **options,
    )


TRL_LOSSES = (
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down "
    "discopop sft sigmoid_norm"
).split()
SORTING = ("aot", "aot_unpaired")
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")  # in TRL, that is
F_DIVERGENT = "sigmoid sigmoid_norm hinge ipo exo_pair robust discopop".split()


def cases():
    for name in TRL_LOSSES:
        required = {"label_smoothing": 0.05} if name == "exo_pair" else {}
        for extra in ({}, {"beta": 0.37}, {"ld_alpha": 0.3}):
            yield {"loss_type": name, **required, **extra}
        if name in SMOOTHED:
            yield {"loss_type": name, "label_smoothing": 0.2}
        # TRL multiplies by the weights in place: torch refuses that for the expanded sft and relu's gradient
        if name not in (*SORTING, "sft", "hinge"):
            yield {"loss_type": name, **required, "use_weighting": True}
        if name in F_DIVERGENT:
            for divergence in ("forward_kl", "js_divergence", "alpha_divergence"):
                yield {"loss_type": name, **required, "f_divergence_type": divergence}
            for alpha in (-1.0, 1.0, 1.7):
                yield {
                    "loss_type": name,
                    **required,
                    "f_divergence_type": "alpha_divergence",
                    "f_alpha_divergence_coef": alpha,
                }
    yield {"loss_type": "discopop", "discopop_tau": 0.5}
    mpo = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    yield mpo
    yield {**mpo, "ld_alpha": 0.0, "beta": 0.5}
    yield {"loss_type": ["robust", "exo_pair"], "label_smoothing": 0.1, "loss_weights": [0.5, 2.0]}
    yield {"loss_type": ["ipo", "sigmoid_norm"], "use_weighting": True, "ld_alpha": 0.5}
    yield {"loss_type": ["sigmoid", "sft"], "f_divergence_type": "js_divergence"}


@pytest.mark.parametrize("options", list(cases()), ids=lambda o: "-".join(f"{v}" for v in o.values()))
def test_loss_gradient_and_metrics_equal_those_of_the_dpo_trainer(options):
    policy, ref, inputs = Head(0.0), Head(0.3), batch()
    expected, expected_metrics = trl_dpo(policy, ref, inputs, **options)
    expected_grads = torch.autograd.grad(expected, (policy.hidden, policy.weight))
    out = ours(policy, ref, inputs, **options)
    torch.testing.assert_close(out.loss, expected, rtol=2e-5, atol=1e-6)
    grads = torch.autograd.grad(out.loss, (policy.hidden, policy.weight))
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
    metrics = out.metrics()
    assert set(metrics) == set(expected_metrics) - {"num_tokens"}
    for name, value in metrics.items():
        torch.testing.assert_close(value.item(), expected_metrics[name], rtol=2e-5, atol=1e-6, msg=name)


def test_every_loss_type_and_option_of_trl_is_in_the_table():
    from trl import DPOConfig

    text = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert set(TRL_LOSSES) == {name for name in TRL_LOSSES if f"'{name}'" in text} <= set(losses.LOSSES)
    for name in F_DIVERGENT:
        assert "f_divergence_type" in losses.LOSSES[name].options
    undivergent = set(TRL_LOSSES) - set(F_DIVERGENT)
    assert not any("f_divergence_type" in losses.LOSSES[name].options for name in undivergent)
    for name in SMOOTHED:
        assert "label_smoothing" in losses.LOSSES[name].options
    for name in TRL_LOSSES:
        assert ("weight" in losses.LOSSES[name].options) == (name not in SORTING)


def test_wpo_weighted_hinge_equals_trl_where_trl_can_run_it():
    policy, ref, inputs = Head(0.0), Head(0.3), batch()
    options = {"loss_type": "hinge", "use_weighting": True}
    expected, _ = trl_dpo(policy, ref, inputs, **options)
    torch.testing.assert_close(ours(policy, ref, inputs, **options).loss, expected)
    with pytest.raises(RuntimeError, match="inplace operation"):
        expected.backward()


def test_discopop_is_finite_where_trl_is_nan():
    policy, ref, inputs = Head(0.0), Head(2.0), batch()
    options = {"loss_type": "discopop", "beta": 4.0}
    assert trl_dpo(policy, ref, inputs, **options)[0].isnan()
    loss = ours(policy, ref, inputs, **options).loss
    assert loss.isfinite() and torch.autograd.grad(loss, policy.hidden)[0].isfinite().all()


def test_wpo_weighted_sft_equals_trl_where_trl_can_run_it():
    """With one pair the expanded tensor has one element, and TRL's in-place product goes through."""
    policy, ref, inputs = Head(0.0), Head(0.3), batch()
    with pytest.raises(RuntimeError, match="single memory location"):
        trl_dpo(policy, ref, inputs, loss_type="sft", use_weighting=True)
    rows = torch.tensor([0, B])
    one = {name: value[rows] for name, value in inputs.items()}
    for head in (policy, ref):
        head.hidden = torch.nn.Parameter(head.hidden[rows].detach())
    expected, _ = trl_dpo(policy, ref, one, loss_type="sft", use_weighting=True)
    torch.testing.assert_close(ours(policy, ref, one, loss_type="sft", use_weighting=True).loss, expected)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("kl", [0.8, -0.5])
@pytest.mark.parametrize("labels", [[1, 0, 1, 1, 0, 0, 1, 0], [1] * 8])
def test_unpaired_losses_equal_those_of_the_kto_trainer(loss_type, kl, labels):
    from trl import KTOTrainer

    policy, ref, inputs = Head(0.0), Head(0.3), batch()
    label = torch.tensor(labels, dtype=torch.bool)
    # the KL estimate is a forward of its own in TRL; here its log-ratios are given
    kl_logps = {policy: kl + torch.arange(8.0) - 3.5, ref: torch.zeros(8)}
    trainer = SimpleNamespace(
        model=policy,
        ref_model=ref,
        accelerator=ACCELERATOR,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        calculate_KL=loss_type == "kto",
        loss_type=loss_type,
        beta=0.3,
        desirable_weight=1.3,
        undesirable_weight=0.7,
        _compute_kl_logps=lambda model, _: kl_logps[model],
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    expected = KTOTrainer._compute_loss(trainer, policy, {**inputs, "label": label}, return_outputs=False)

    completion_labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    logps, ref_logps = (
        sequences.sequence_logps(head(completion_labels).log_probs, completion_labels[:, 1:]) for head in (policy, ref)
    )
    loss = losses.unpaired_preference_loss(
        logps,
        ref_logps.detach(),
        label,
        loss_type=loss_type,
        beta=0.3,
        desirable_weight=1.3,
        undesirable_weight=0.7,
        kl=kl_logps[policy] - kl_logps[ref] if loss_type == "kto" else None,
    )
    torch.testing.assert_close(loss, expected)
    grad, wanted = (torch.autograd.grad(x, policy.hidden, retain_graph=True)[0] for x in (loss, expected))
    torch.testing.assert_close(grad, wanted)


LOGPS = -torch.tensor([4.1, 2.2, 9.7, 0.4]), -torch.tensor([3.3, 5.2, 4.4, 1.9])
LENGTHS = torch.tensor([5, 3, 8, 1]), torch.tensor([4, 4, 2, 2])


def trl_cpo(loss_type: str, chosen, rejected, **options):
    cpo = pytest.importorskip("trl.experimental.cpo")
    defaults = {"alpha": 0.0, "label_smoothing": 0.0, "simpo_gamma": 0.5, "beta": 0.1}
    trainer = SimpleNamespace(accelerator=ACCELERATOR, loss_type=loss_type, **{**defaults, **options})
    return cpo.CPOTrainer.cpo_loss(trainer, chosen, rejected)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.15])
@pytest.mark.parametrize("alpha", [0.0, 0.25, -0.5])
def test_simpo_and_alphapo_equal_those_of_the_cpo_trainer(label_smoothing, alpha):
    averages = [logps / lengths for logps, lengths in zip(LOGPS, LENGTHS, strict=True)]
    shared = {"beta": 2.0, "simpo_gamma": 0.9, "label_smoothing": label_smoothing}
    expected, *rewards = trl_cpo("simpo", *averages, alpha=alpha, **shared)
    given = dict(chosen_lengths=LENGTHS[0], rejected_lengths=LENGTHS[1])
    options = {**shared, "loss_type": "alphapo", "alphapo_alpha": alpha} if alpha else {**shared, "loss_type": "simpo"}
    loss = losses.preference_loss(*LOGPS, **given, **options, reduction="none")
    torch.testing.assert_close(loss, expected)
    terms = losses.resolve(**options)
    tensors = {"chosen_logps": LOGPS[0], "rejected_logps": LOGPS[1], **given}
    for reward, wanted in zip(losses.implicit_rewards(terms, tensors), rewards, strict=True):
        torch.testing.assert_close(reward, wanted)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.15])
def test_cpo_equals_that_of_the_cpo_trainer(label_smoothing):
    expected, *_ = trl_cpo("sigmoid", *LOGPS, beta=0.2, label_smoothing=label_smoothing)
    nll = -LOGPS[0].sum() / LENGTHS[0].sum()  # CrossEntropyLoss over the chosen completions
    loss = losses.preference_loss(
        *LOGPS,
        loss_type="cpo",
        beta=0.2,
        cpo_alpha=0.6,
        label_smoothing=label_smoothing,
        chosen_nll=-LOGPS[0],
        chosen_lengths=LENGTHS[0],
    )
    torch.testing.assert_close(loss, expected.mean() + 0.6 * nll)


def test_orpo_equals_that_of_the_orpo_trainer():
    orpo = pytest.importorskip("trl.experimental.orpo")
    averages = [logps / lengths for logps, lengths in zip(LOGPS, LENGTHS, strict=True)]
    trainer = SimpleNamespace(accelerator=ACCELERATOR, beta=0.3)
    expected, *_ = orpo.ORPOTrainer.odds_ratio_loss(trainer, *averages)
    nll = -LOGPS[0].sum() / LENGTHS[0].sum()
    loss = losses.preference_loss(
        *LOGPS,
        loss_type="orpo",
        beta=0.3,
        chosen_nll=-LOGPS[0],
        chosen_lengths=LENGTHS[0],
        rejected_lengths=LENGTHS[1],
    )
    torch.testing.assert_close(loss, nll - expected.mean())


def test_step_zero_of_dpo_is_log_2():
    policy = Head(0.0)
    assert ours(policy, policy, batch()).loss.item() == torch.tensor(math.log(2)).item()
