"""Whole models: log-probabilities equal those of the model's own logits, for what each family does with its head."""

from __future__ import annotations

import copy
import importlib
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytest.importorskip("lightning")

import lightning
import tiny
import training
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from families import FAMILIES, V, build
from peft import IA3Config, LoraConfig, PromptTuningConfig, TrainableTokensConfig, get_peft_model
from transformers import T5Config, T5ForConditionalGeneration, TrainingArguments

from dpofast import functional, lists, losses, primitive, sequences
from dpofast.integrations import models

T = 7
EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.usefixtures("quick")


def batch(rows: int = 4) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Prompts of 3, and padding behind."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, V, (rows, T), generator=generator)
    lengths = torch.tensor([7, 5, 6, 4] * rows)[:rows]
    attended = torch.arange(T) < lengths[:, None]
    labels = tokens.masked_fill(~attended | (torch.arange(T) < 3), -100)
    return {"input_ids": tokens, "attention_mask": attended.long()}, labels


def from_logits(model: torch.nn.Module, inputs, labels) -> torch.Tensor:
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    shifted = labels[:, 1:]
    logps = logits.log_softmax(-1).gather(-1, shifted.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(shifted == -100, 0.0, logps)


@pytest.mark.parametrize("family", FAMILIES)
def test_logps_and_gradients_equal_those_of_the_models_own_logits(family):
    model, (inputs, labels) = build(family), batch()
    wanted = from_logits(model, inputs, labels)
    assert wanted[labels[:, 1:] != -100].std() > 0.1  # else the transform would not matter
    weights = torch.linspace(-1, 1, wanted.numel()).reshape(wanted.shape)
    (wanted * weights).sum().backward()
    wanted_grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = models.model_logprob(model, inputs, labels).logps
    torch.testing.assert_close(found, wanted, rtol=2e-6, atol=5e-6)
    (found * weights).sum().backward()
    found_grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found_grads.keys() == wanted_grads.keys()
    # the bias of the keys has a gradient of 0, up to rounding
    atol = 1e-5 * max(grad.abs().max().item() for grad in wanted_grads.values())
    for name, grad in found_grads.items():
        torch.testing.assert_close(grad, wanted_grads[name], rtol=1e-4, atol=atol, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_transform_is_read_off_the_model(family):
    model, (inputs, _) = build(family), batch()
    head = models.head_inputs(model, **inputs)
    scale, softcap, has_bias, tied = FAMILIES[family][1]
    assert head.logit_scale == pytest.approx(scale, rel=1e-6) and head.softcap == softcap
    assert (head.bias is not None) == has_bias
    assert (head.weight is model.get_input_embeddings().weight) == tied
    assert head.weight is model.get_output_embeddings().weight
    again = model(**inputs, use_cache=False).logits
    assert again.shape == (4, T, V)  # the head is back in its place


def test_a_model_in_bf16_is_read_exactly():
    model, (inputs, labels) = build("granite").to(torch.bfloat16), batch()
    head = models.head_inputs(model, **inputs)
    assert head.logit_scale == 0.125 and head.hidden.dtype == torch.bfloat16
    wanted = from_logits(model, inputs, labels)
    torch.testing.assert_close(models.model_logprob(model, inputs, labels).logps, wanted, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("change", [lambda z: z.roll(1, -1), lambda z: z[..., :-3], lambda z: z + 1.0, torch.square,
                                    lambda z: z.masked_fill(torch.arange(V) == 9, -1e9)])  # fmt: skip
def test_a_model_that_does_something_else_to_its_logits_is_refused(change):
    model, (inputs, labels) = build(), batch()
    forward = model.forward

    def changed(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = change(output.logits)
        return output

    model.forward = changed
    with pytest.raises(ValueError, match="does more to its logits"):
        models.model_logprob(model, inputs, labels)


def test_statistics_and_temperature_go_through():
    model, (inputs, labels) = build("gemma2"), batch()
    out = models.model_logprob(model, inputs, labels, temperature=0.7, outputs=("entropy", "mean_logits"))
    z = model(**inputs, use_cache=False).logits[:, :-1] / 0.7
    wanted = primitive.logprob(z, labels[:, 1:], outputs=("entropy", "mean_logits"))
    for name in ("logps", "entropy", "mean_logits"):
        torch.testing.assert_close(getattr(out, name), getattr(wanted, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"loss_type": "ipo"}, {"ld_alpha": 0.5}, {"temperature": 0.5}])
def test_the_loss_equals_that_of_the_logits(options):
    policy, ref, (inputs, labels) = build("cohere"), build("cohere", seed=1), batch()
    recording = []
    ref.register_forward_pre_hook(lambda *_: recording.append(torch.is_grad_enabled()))
    out = models.model_dpo_loss(policy, inputs, labels, ref_model=ref, metrics=True, **options)
    assert recording == [False]
    wanted = functional.dpo_loss(
        policy(**inputs, use_cache=False).logits[:, :-1], labels[:, 1:],
        ref_logits=ref(**inputs, use_cache=False).logits[:, :-1], metrics=True, **options,
    )  # fmt: skip
    torch.testing.assert_close(out.loss, wanted.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.metrics(), wanted.metrics(), rtol=1e-5, atol=1e-5)
    before = models.model_logprob(ref, inputs, labels, temperature=options.get("temperature", 1.0)).logps
    early = models.model_dpo_loss(policy, inputs, labels, ref_logps=before, **options)
    torch.testing.assert_close(early.loss, out.loss)


def test_margins_betas_and_weights_of_the_pairs_reach_the_loss():
    """Tensors, as the data have them, a number for each pair."""
    policy, (inputs, labels) = build(), batch()
    logps = models.model_logprob(policy, inputs, labels).logps.detach().sum(-1)
    options = {"beta": torch.tensor([0.2, 0.7]), "margin": torch.tensor([0.5, -1.0])}
    weight, ref_logps = torch.tensor([2.0, 0.5]), logps - torch.tensor([0.3, 0.1, 0.0, 0.9])
    out = models.model_dpo_loss(policy, inputs, labels, ref_logps=ref_logps, pair_weight=weight, **options)
    want = losses.preference_loss(*logps.chunk(2), *ref_logps.chunk(2), weight=weight, **options)
    torch.testing.assert_close(out.loss, want)


def test_token_weights_reach_the_loss():
    """One for each log-probability that model_logprob returns; whatever stands at prompt and padding."""
    policy, (inputs, labels) = build(), batch()
    logps = models.model_logprob(policy, inputs, labels).logps.detach()
    weights = logps.abs().masked_fill(labels[:, 1:] == -100, torch.nan)
    ref_logps = logps - 0.3
    out = models.model_dpo_loss(policy, inputs, labels, ref_logps=ref_logps, token_weights=weights)
    sums = [sequences.sequence_logps(x, labels[:, 1:], token_weights=weights).chunk(2) for x in (logps, ref_logps)]
    torch.testing.assert_close(out.loss, losses.preference_loss(*sums[0], *sums[1]))
    assert not out.loss.isclose(models.model_dpo_loss(policy, inputs, labels, ref_logps=ref_logps).loss, rtol=1e-3)


# Lists


def of_lists(sizes: list[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Answers in blocks of first, second, ...; those of a list begin with the same prompt of 3."""
    inputs, labels = batch(sum(sizes))
    record = [b for place in range(max(sizes)) for b, size in enumerate(sizes) if place < size]
    inputs["input_ids"][:, :3] = inputs["input_ids"][record, :3]
    return inputs, labels


LIST_OPTIONS = [
    {"margin": 0.3},
    {"loss_type": "lipo_lambda", "scores": torch.tensor([2.0, 1.0, 1.0, 0.0, 0.0]), "reduction": "none"},
    {"loss_type": "plackett_luce", "temperature": 0.5, "list_weight": torch.tensor([0.5, 2.0])},
    {"token_weights": True, "metrics": True},
]


@pytest.mark.parametrize("options", LIST_OPTIONS, ids=lambda options: ", ".join(options))
def test_the_loss_of_lists_equals_that_of_the_log_probs(options):
    policy, ref, sizes = build("cohere"), build("cohere", seed=1), [3, 2]
    inputs, labels = of_lists(sizes)
    weights = torch.linspace(0.5, 2.0, labels[:, 1:].numel()).view(labels[:, 1:].shape)
    options = options | ({"token_weights": weights} if "token_weights" in options else {})
    out = models.model_list_loss(policy, inputs, labels, sizes=sizes, interleaved=True, ref_model=ref, **options)
    of_head = {name: options.get(name) for name in ("temperature",) if name in options}
    logps, ref_logps = (
        sequences.sequence_logps(
            models.model_logprob(x, inputs, labels, **of_head).logps, labels[:, 1:],
            token_weights=options.get("token_weights"),
        )
        for x in (policy, ref)
    )  # fmt: skip
    names = {"list_weight": "weight"}
    plain = {names.get(n, n): x for n, x in options.items() if n not in ("temperature", "token_weights", "metrics")}
    wanted = lists.list_preference_loss(logps, sizes, ref_logps=ref_logps, interleaved=True, **plain)
    torch.testing.assert_close(out.loss, wanted)
    torch.testing.assert_close(out.ref_logps, ref_logps)
    assert out.is_chosen.tolist() == [True, True, False, False, False]
    assert ("logits/chosen" in out.metrics()) == ("metrics" in options)
    early = models.model_list_loss(
        policy, inputs, labels, sizes=sizes, interleaved=True, ref_logps=ref_logps, **options
    )
    torch.testing.assert_close(early.loss, out.loss)


def test_a_list_of_two_is_its_pair():
    policy, ref, (inputs, labels) = build(), build(seed=1), batch()
    pair = models.model_dpo_loss(policy, inputs, labels, ref_model=ref)
    both = models.model_list_loss(policy, inputs, labels, sizes=2, interleaved=True, ref_model=ref)
    assert both.loss.equal(pair.loss)


def test_lists_with_shared_prompts_have_the_same_loss_and_gradients():
    inputs, labels = of_lists([3, 3])
    found = []
    for shared in (False, True):
        policy = build()
        out = models.model_list_loss(
            policy, inputs, labels, sizes=3, interleaved=True, ref_model=build(seed=1), share_prompt=shared
        )
        out.loss.backward()
        found.append([out.loss, *(x.grad for x in policy.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    one = models.model_list_loss(build(), {n: x[:1] for n, x in inputs.items()}, labels[:1], sizes=[1],
                                 ref_model=build(seed=1), share_prompt=True)  # fmt: skip
    assert one.loss == 0  # a list of one answer has nothing to share and nothing to learn


def test_the_reference_of_an_adapters_lists_is_the_model_without_it():
    (inputs, labels), base = of_lists([3, 2]), build()
    torch.manual_seed(0)
    policy = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    how = {"sizes": [3, 2], "interleaved": True}
    out = models.model_list_loss(policy, inputs, labels, **how)
    torch.testing.assert_close(out.loss, models.model_list_loss(policy, inputs, labels, ref_model=base, **how).loss)
    assert out.rewards.abs().max() > 1e-2


def test_the_routers_loss_is_added_to_that_of_lists():
    policy, (inputs, labels) = mixture(), of_lists([3, 2])
    how = {"sizes": [3, 2], "interleaved": True, "ref_logps": torch.zeros(5)}
    out = models.model_list_loss(policy, inputs, labels, **how)
    bare = models.model_list_loss(policy, inputs, labels, router_aux_loss_coef=0.0, **how)
    torch.testing.assert_close(out.loss, bare.loss + 0.5 * out.aux_loss)
    assert out.aux_loss > 0 and out.metrics()["aux_loss"] == out.aux_loss


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"ref_logps": None}, ValueError, "loss_type: 'softmax_dpo' needs a reference model; pass ref_model"),
        ({"sizes": [3, 3]}, ValueError, "sizes: got 6 in all, expected 5"),
        ({"sizes": [5, 0]}, ValueError, "sizes: got 0 among them, expected integers >= 1"),
        ({"share_prompt": True}, ValueError, "share_prompt: got True for lists of 2 to 3 answers"),
        ({"sizes": 1, "share_prompt": True, "interleaved": False}, ValueError, "share_prompt: got True for lists one"),
        ({"softcap": 1.0}, TypeError, "softcap: the model's own"),
        ({"loss_type": "sigmoid"}, ValueError, "loss_type: got 'sigmoid', expected one of lipo"),
        ({"loss_type": "listnet"}, ValueError, "scores: is None, and loss_type"),
        ({"label_smoothing": 0.1}, ValueError, "label_smoothing: not defined"),
        (
            {"token_weights": torch.ones(5, T)},
            ValueError,
            r"token_weights: got shape \(5, 7\), expected \(5, 6\), one for each log-prob.*pass \[:, 1:\]",
        ),
    ],
)
def test_lists_that_make_no_sense_are_refused(options, kind, message):
    inputs, labels = of_lists([3, 2])
    how = {"sizes": [3, 2], "interleaved": True, "ref_logps": torch.zeros(5)} | options
    with pytest.raises(kind, match=message):
        models.model_list_loss(build(), inputs, labels, **how)


@pytest.mark.parametrize(("shape", "hint"), [((4, T), r"; of weights of the labels' shape pass"), ((4,), "$")])
def test_the_shape_of_token_weights_is_that_of_the_log_probs(shape, hint):
    inputs, labels = batch()
    with pytest.raises(ValueError, match=r"expected \(4, 6\), one for each log-prob that model_logprob returns" + hint):
        models.model_dpo_loss(build(), inputs, labels, ref_logps=torch.zeros(4), token_weights=torch.ones(shape))


# PEFT


def test_the_reference_of_an_adapter_is_the_model_without_it_and_the_head_stays_frozen():
    (inputs, labels), base = batch(), build()
    torch.manual_seed(0)
    policy = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    out = models.model_dpo_loss(policy, inputs, labels)
    wanted = functional.dpo_loss(
        policy(**inputs, use_cache=False).logits[:, :-1], labels[:, 1:],
        ref_logits=base(**inputs, use_cache=False).logits[:, :-1],
    )  # fmt: skip
    torch.testing.assert_close(out.loss, wanted.loss, rtol=1e-5, atol=1e-6)
    assert out.chosen_rewards.abs().max() > 1e-2
    out.loss.backward()
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is not None and parameter.grad.any()) == ("lora_" in name), name


def test_a_head_that_peft_trains_whole_is_the_active_copy():
    (inputs, labels), base = batch(), build()
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["lm_head"])
    policy = get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        policy.get_output_embeddings().modules_to_save["default"].weight.mul_(1.5)
    found = models.model_logprob(policy, inputs, labels).logps
    torch.testing.assert_close(found, from_logits(policy, inputs, labels), rtol=1e-5, atol=1e-5)
    with policy.disable_adapter():
        found = models.model_logprob(policy, inputs, labels).logps
    torch.testing.assert_close(found, from_logits(base, inputs, labels), rtol=1e-5, atol=1e-5)
    models.model_dpo_loss(policy, inputs, labels).loss.backward()
    saved = policy.get_output_embeddings()
    assert saved.modules_to_save["default"].weight.grad.any() and saved.original_module.weight.grad is None


def on_the_head(**options) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False, **options)


def of_rows(indices) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, trainable_token_indices=indices)


ROWS = [3, 9, 40]
HEAD_ADAPTERS = {
    "lora": ("llama", on_the_head()),
    "lora, rank-stabilised, behind a scale": ("granite", on_the_head(use_rslora=True, lora_alpha=3)),
    "lora, a bias": ("phi", on_the_head(lora_bias=True)),
    "lora, a tied head": ("gemma2", on_the_head()),
    "some rows": ("llama", of_rows({"lm_head": ROWS})),
    "some rows of a tied embedding": ("gemma2", of_rows(ROWS)),
    "some rows and nothing else": ("llama", TrainableTokensConfig(target_modules=["lm_head"], token_indices=ROWS)),
}


def with_adapter(case: str, base: torch.nn.Module | None = None) -> torch.nn.Module:
    family, config = HEAD_ADAPTERS[case]
    base = build(family) if base is None else base
    torch.manual_seed(2)
    policy = get_peft_model(base, copy.deepcopy(config))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "trainable_tokens_delta" in name:  # begins as the rows that it replaces
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return policy


def gradients(model: torch.nn.Module, scalar: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    scalar.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", HEAD_ADAPTERS)
def test_an_adapter_on_the_head_is_part_of_it(case):
    (inputs, labels), policy = batch(), with_adapter(case)
    wanted = from_logits(policy, inputs, labels)
    weights = torch.linspace(-1, 1, wanted.numel()).reshape(wanted.shape)
    found = models.model_logprob(policy, inputs, labels).logps
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    mine, theirs = (gradients(policy, (x * weights).sum()) for x in (found, wanted))
    assert mine.keys() == theirs.keys() and any("lm_head" in name or "tokens" in name for name in mine)
    for name, grad in mine.items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    with policy.disable_adapter():
        without = models.model_logprob(policy, inputs, labels).logps
        torch.testing.assert_close(without, from_logits(policy, inputs, labels), rtol=1e-5, atol=1e-5)
        assert models.find_head(policy) is not None
    assert (without - found).abs().max() > 0.01, "the adapter changes nothing, and so the comparison shows nothing"
    out = models.model_dpo_loss(policy, inputs, labels)
    torch.testing.assert_close(out.ref_chosen_logps, without.sum(-1)[:2], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="carries an adapter .*use head_inputs, model_logprob or model_dpo_loss"):
        models.find_head(policy)


@pytest.mark.parametrize("case", ["lora", "some rows"])
def test_an_adapter_that_is_merged_is_in_the_weight_and_one_that_is_disabled_comes_out_of_it(case):
    (inputs, labels), policy = batch(), with_adapter(case)
    before = models.model_logprob(policy, inputs, labels).logps
    base = models.model_logprob(build(), inputs, labels).logps
    policy.merge_adapter()
    torch.testing.assert_close(models.model_logprob(policy, inputs, labels).logps, before, rtol=1e-5, atol=1e-5)
    with policy.disable_adapter():
        torch.testing.assert_close(models.model_logprob(policy, inputs, labels).logps, base, rtol=1e-5, atol=1e-5)


def test_two_adapters_on_the_head_add_up_and_dropout_is_that_of_their_path():
    (inputs, labels), base = batch(), build()
    policy = get_peft_model(base, on_the_head(lora_dropout=0.5))
    policy.add_adapter("second", on_the_head(lora_alpha=5))
    policy.base_model.set_adapter(["default", "second"])
    found = models.model_logprob(policy.eval(), inputs, labels).logps
    torch.testing.assert_close(found, from_logits(policy, inputs, labels), rtol=1e-5, atol=1e-5)
    policy.train()
    outs = []
    for function in (lambda: models.model_logprob(policy, inputs, labels).logps,
                     lambda: from_logits(policy, inputs, labels)):  # fmt: skip
        torch.manual_seed(0)
        outs.append(function())
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)
    assert (outs[0] - found).abs().max() > 0.01


def test_a_small_adapter_is_not_lost_in_the_rounding_of_a_head_in_bf16():
    """As it would be in W + B A: its entries are smaller than half a bit of those of W."""
    (inputs, _), policy = batch(), with_adapter("lora", build().to(torch.bfloat16))
    head = policy.get_output_embeddings()
    with torch.no_grad():
        head.lora_B["default"].weight.mul_(2e-3)
        found = models.head_inputs(policy, **inputs)
        base, delta, hidden = head.base_layer.weight, head.get_delta_weight("default"), found.hidden[..., :16].double()
        wanted, without = hidden @ (base.double() + delta.double()).T, hidden @ base.double().T
        found = found.hidden.double() @ found.weight.double().T
    assert (base + delta.to(base.dtype)).eq(base).float().mean() > 0.5
    assert (found - wanted).abs().max() < 0.05 * (without - wanted).abs().max()


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (on_the_head(use_dora=True), "DoraLinearVariant"),
        (IA3Config(target_modules=["q_proj", "lm_head"], feedforward_modules=[]), r"peft.tuners.ia3.layer.Linear"),
    ],
)
def test_an_adapter_on_the_head_that_is_not_known_is_refused_by_its_name(config, kind):
    policy = get_peft_model(build(), config)
    inputs, labels = batch()
    with pytest.raises(ValueError, match=f"carries an adapter.*{kind}.*target_modules.*modules_to_save"):
        models.model_logprob(policy, inputs, labels)
    with policy.disable_adapter():
        found = models.model_logprob(policy, inputs, labels).logps
    torch.testing.assert_close(found, from_logits(build(), inputs, labels), rtol=1e-5, atol=1e-5)


def test_prompt_learning_is_refused_for_its_positions_are_not_the_labels():
    policy = get_peft_model(build(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    inputs, labels = batch()
    with pytest.raises(ValueError, match=r"labels: got shape \[4, 7\], expected \[4, 9\]"):
        models.model_logprob(policy, inputs, labels)


# What is around the head when the model calls it


def products_of(model: torch.nn.Module, inputs) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes in which the model's own head multiplies, and in which it is to be multiplied here."""
    own, head = [], models.find_head(model)
    hook = head.register_forward_hook(lambda _module, _args, output: own.append(output.dtype))
    model(**inputs, use_cache=False)
    hook.remove()
    found = models.head_inputs(model, **inputs)
    with torch.autocast("cpu", enabled=False):
        product = torch.nn.functional.linear(found.hidden, found.weight)  # which refuses two dtypes
    return own[0], product.dtype


def prepared(precision: str, model: torch.nn.Module | None = None) -> torch.nn.Module:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision=precision, cpu=True).prepare(build() if model is None else model)


def set_up(precision: str) -> torch.nn.Module:
    return lightning.Fabric(accelerator="cpu", devices=1, precision=precision).setup_module(build())


class Inside(type(build())):
    """Autocast in the model's own forward, as some remote code has it."""

    def forward(self, *args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(*args, **kwargs)


def inside() -> torch.nn.Module:
    model = build()
    model.__class__ = Inside
    return model


MIXED = {
    "accelerate": lambda: prepared("bf16"),
    "fabric": lambda: set_up("bf16-mixed"),
    "in forward": inside,
}


@pytest.fixture(autouse=True)
def no_accelerator_is_left():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("how", MIXED)
def test_the_head_is_multiplied_in_the_dtype_of_the_autocast_around_the_models_forward(how):
    inputs, labels = batch()
    model = MIXED[how]()
    assert products_of(model, inputs) == (torch.bfloat16, torch.bfloat16)
    found = models.model_logprob(model, inputs, labels).logps
    exact = from_logits(build(), inputs, labels)
    wanted = from_logits(model, inputs, labels)
    error, own = ((x - exact).abs().max() for x in (found, wanted))
    assert 1e-4 < error < 1.5 * own  # of bf16, and no worse than the model's own
    if how == "fabric":  # whose own backward it wants to be
        return
    grads, own_grads = (gradients(model, x.sum()) for x in (found, wanted))
    for name, grad in grads.items():
        assert grad.dtype == torch.float32  # the parameter's
        scale = own_grads[name].abs().max()
        torch.testing.assert_close(grad, own_grads[name], rtol=0, atol=0.05 * scale.item() + 1e-6, msg=name)


@pytest.mark.parametrize(
    ("wrap", "dtype"),
    [
        (lambda: build(), torch.float32),
        (lambda: prepared("no"), torch.float32),
        (lambda: build().half(), torch.float16),
        (lambda: build().bfloat16(), torch.bfloat16),
        (lambda: build().double(), torch.float64),
    ],
)
def test_without_autocast_the_head_is_multiplied_in_its_own_dtype(wrap, dtype):
    inputs, _ = batch()
    assert products_of(wrap(), inputs) == (dtype, dtype)


def test_autocast_around_the_call_counts_as_it_does_for_the_models_own_head():
    inputs, labels = batch()
    with torch.autocast("cpu", torch.bfloat16):
        assert products_of(build(), inputs) == (torch.bfloat16, torch.bfloat16)
        assert models.head_inputs(build().double(), **inputs).weight.dtype == torch.float64  # which it leaves alone
        found = models.model_logprob(build(), inputs, labels).logps
    torch.testing.assert_close(found, models.model_logprob(prepared("bf16"), inputs, labels).logps)


def test_a_lora_adapter_on_the_head_is_multiplied_in_the_autocast_dtype_too():
    inputs, labels = batch()
    model = prepared("bf16", with_adapter("lora"))
    head = models.head_inputs(model, **inputs)
    assert head.hidden.dtype == head.weight.dtype == torch.bfloat16
    wanted = from_logits(with_adapter("lora"), inputs, labels)
    torch.testing.assert_close(models.model_logprob(model, inputs, labels).logps, wanted, rtol=0.05, atol=0.1)


# Mixtures of experts


def mixture(**options) -> torch.nn.Module:
    return build("mixtral", **{"output_router_logits": True, **options})


def test_the_routers_loss_of_a_mixture_is_added_as_the_model_adds_it_to_its_own():
    model, (inputs, labels) = mixture(), batch()
    own = model(**inputs, labels=labels, use_cache=False)
    nll = -from_logits(model, inputs, labels).sum() / (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(own.loss, nll + 0.5 * own.aux_loss)  # what "as the model adds it" means
    out = models.model_dpo_loss(model, inputs, labels, ref_logps=torch.zeros(4), metrics=True)
    bare = functional.dpo_loss(own.logits[:, :-1], labels[:, 1:], ref_logps=torch.zeros(4))
    torch.testing.assert_close(out.aux_loss, own.aux_loss)
    torch.testing.assert_close(out.loss, bare.loss + 0.5 * own.aux_loss)
    assert out.metrics()["aux_loss"] == out.aux_loss
    found, wanted = (gradients(model, x) for x in (out.loss, bare.loss + 0.5 * own.aux_loss))
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(models.model_logprob(model, inputs, labels).aux_loss, own.aux_loss)
    torch.testing.assert_close(models.head_inputs(model, **inputs).aux_loss, own.aux_loss)


def test_the_coefficient_of_the_routers_loss_can_be_given_and_must_have_something_to_multiply():
    (inputs, labels), options = batch(), {"ref_logps": torch.zeros(4)}
    plain = models.model_dpo_loss(mixture(output_router_logits=False), inputs, labels, **options)
    assert plain.aux_loss is None and "aux_loss" not in plain.metrics()
    for coef in (0.0, 2.0):
        out = models.model_dpo_loss(mixture(), inputs, labels, router_aux_loss_coef=coef, **options)
        torch.testing.assert_close(out.loss, plain.loss + coef * out.aux_loss)
        asked = {**inputs, "output_router_logits": True}
        again = models.model_dpo_loss(
            mixture(output_router_logits=False), asked, labels, router_aux_loss_coef=coef, **options
        )
        torch.testing.assert_close(again.loss, out.loss)
    pairs = models.model_dpo_loss(mixture(), inputs, labels, reduction="none", **options)
    torch.testing.assert_close(pairs.loss.mean(), plain.loss + 0.5 * pairs.aux_loss)
    for model in (build(), mixture(output_router_logits=False)):
        with pytest.raises(ValueError, match="router_aux_loss_coef: got 0.5.*returned no aux_loss; set output_router"):
            models.model_dpo_loss(model, inputs, labels, router_aux_loss_coef=0.5, **options)
        models.model_dpo_loss(model, inputs, labels, router_aux_loss_coef=0.0, **options)
    model = mixture()
    del model.router_aux_loss_coef
    del model.config.router_aux_loss_coef
    with pytest.raises(ValueError, match="MixtralForCausalLM returned an aux_loss and has no coefficient"):
        models.model_dpo_loss(model, inputs, labels, **options)


def test_the_models_output_repeats_the_primitives():
    assert models.ModelLogprobOutput._fields == (*primitive.LogprobOutput._fields, "aux_loss")


# Positions


def padded_left(inputs, labels):
    """The same sequences with their padding before them."""
    shift = [int((row == 0).sum()) for row in inputs["attention_mask"]]
    roll = lambda x: torch.stack([row.roll(n) for row, n in zip(x, shift)])  # noqa: E731
    return {name: roll(x) for name, x in inputs.items()}, roll(labels)


def with_positions(inputs):
    return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


def test_left_padding_without_positions_is_warned_of_where_it_changes_the_numbers():
    model, right = build("gpt2"), batch()
    wanted = models.model_logprob(model, *right).logps.sum(-1)
    inputs, labels = padded_left(*right)
    with pytest.warns(UserWarning, match="padding on the left.*GPT2LMHeadModel counts.*pass position_ids="):
        found = models.model_logprob(model, inputs, labels).logps.sum(-1)
    torch.testing.assert_close(found, from_logits(model, inputs, labels).sum(-1))  # no less wrong than the model's own
    assert (found - wanted).abs().max() > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = models.model_logprob(model, with_positions(inputs), labels).logps.sum(-1)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "mixtral"])
def test_left_padding_where_positions_are_relative_or_read_off_the_mask_is_right_and_no_warning(family):
    model, right = build(family), batch()
    wanted = models.model_logprob(model, *right).logps.sum(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = models.model_logprob(model, *padded_left(*right)).logps.sum(-1)
        models.model_logprob(build("gpt2"), *right)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


# Heads that cannot be used, and calls that cannot be right


class Wrapper(torch.nn.Module):
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_a_wrapper_is_named_with_a_remedy():
    inputs, labels = batch()
    for model in (torch.nn.DataParallel(build()), Wrapper(torch.nn.DataParallel(build()))):
        for function in (models.find_head, lambda m: models.model_logprob(m, inputs, labels),
                         lambda m: models.head_inputs(m, **inputs)):  # fmt: skip
            with pytest.raises(ValueError, match="DataParallel.*torchrun or accelerate launch.*CUDA_VISIBLE_DEVICES=0"):
                function(model)
    with pytest.raises(ValueError, match="Wrapper has a LlamaForCausalLM in it.*pass the LlamaForCausalLM, or give"):
        models.find_head(Wrapper(build()))
    model = Wrapper(build())
    model.get_output_embeddings = model.module.get_output_embeddings
    found = models.model_logprob(model, inputs, labels).logps
    torch.testing.assert_close(found, from_logits(build(), inputs, labels), rtol=1e-5, atol=1e-5)


class Quantised(torch.nn.Linear):
    def forward(self, hidden):
        raise AssertionError("not to be called")


def test_a_quantised_or_absent_head_is_refused_with_a_remedy():
    model = build()
    model.lm_head = Quantised(16, V)
    with pytest.raises(ValueError, match=r"is a Quantised of torch.float32.*llm_int8_skip_modules"):
        models.find_head(model)
    model.lm_head = torch.nn.Linear(16, V, device="meta")
    with pytest.raises(ValueError, match="on the meta device; keep it on one device"):
        models.find_head(model)
    model.lm_head = torch.nn.Linear(16, V)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(V, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="Linear of torch.int8"):
        models.find_head(model)
    model.lm_head = torch.nn.Linear(16, V)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(0))
    with pytest.raises(ValueError, match="sharded away"):
        models.find_head(model)
    with pytest.raises(ValueError, match="LlamaModel has no output embeddings"):
        models.find_head(model.model)
    sizes = dict(vocab_size=V, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(ValueError, match="has an encoder"):
        models.find_head(T5ForConditionalGeneration(T5Config(**sizes)))


def test_a_model_that_goes_round_its_head_is_refused_and_left_as_it_was():
    model, (inputs, labels) = build(), batch()
    forward = model.forward
    model.forward = lambda *args, **kwargs: (torch.zeros(1, 1, V),)
    with pytest.raises(ValueError, match="called its head 0 times"):
        models.model_logprob(model, inputs, labels)
    model.forward = forward
    with pytest.raises(RuntimeError):
        models.model_logprob(model, {"input_ids": inputs["input_ids"].float()[..., None, None]}, labels)
    assert "forward" not in vars(model.lm_head)
    hook = model.lm_head.forward = torch.nn.Linear.forward.__get__(model.lm_head)  # as accelerate's hooks do
    models.model_logprob(model, inputs, labels)
    assert model.lm_head.forward is hook


def test_contradictory_calls_raise():
    model, (inputs, labels) = build(), batch()
    with pytest.raises(ValueError, match="pass them beside the inputs"):
        models.model_logprob(model, {**inputs, "labels": labels}, labels)
    with pytest.raises(TypeError, match="softcap: the model's own"):
        models.model_logprob(model, inputs, labels, softcap=3.0)
    with pytest.raises(ValueError, match="given beside a reference"):
        models.model_dpo_loss(model, inputs, labels, ref_model=model, ref_logps=torch.zeros(4))
    with pytest.raises(ValueError, match="needs a reference model; pass ref_model"):
        models.model_dpo_loss(model, inputs, labels)
    with pytest.raises(ValueError, match="uses no reference model"):
        models.model_dpo_loss(model, inputs, labels, loss_type="simpo", ref_model=model)
    with pytest.raises(ValueError, match=r"labels: got shape \[4, 6\]"):
        models.model_logprob(model, inputs, labels[:, 1:])


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("make", [build, mixture, lambda: with_adapter("lora"), lambda: with_adapter("some rows")])
def test_a_model_in_distributed_data_parallel_gives_the_same_loss_and_gradients(make, one_rank):
    plain, (inputs, labels) = make(), batch()
    wrapped = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
    grads = []
    for model in (plain, wrapped):
        for _ in range(2):
            model.zero_grad()
            out = models.model_dpo_loss(model, inputs, labels, ref_model=build(seed=1))
            out.loss.backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
        assert (out.aux_loss is not None) == (make is mixture)
    torch.testing.assert_close(*grads)
    assert all(grad.any() for grad in grads[0])


def test_autocast_and_left_padding_count_in_distributed_data_parallel_too(one_rank):
    inputs, labels = batch()
    wrapped = torch.nn.parallel.DistributedDataParallel(prepared("bf16"))
    found, wanted = (models.model_logprob(m, inputs, labels).logps for m in (wrapped, prepared("bf16")))
    torch.testing.assert_close(found, wanted)
    wrapped = torch.nn.parallel.DistributedDataParallel(build("gpt2"))
    with pytest.warns(UserWarning, match="padding on the left"):
        models.model_logprob(wrapped, *padded_left(inputs, labels))


# The examples


TESTED_ELSEWHERE = ("tiny", "lightning_loop")


def trained_by_transformers(accumulate: int, path, lr: float, **options) -> torch.nn.Module:
    trainer = importlib.import_module("transformers_trainer").PreferenceTrainer(
        model=tiny.model(),
        ref_model=tiny.model(),
        args=TrainingArguments(
            **training.arguments(
                path,
                steps=3,
                per_device_train_batch_size=8 // accumulate,
                gradient_accumulation_steps=accumulate,
                learning_rate=lr,
                lr_scheduler_type="constant",
                remove_unused_columns=False,
                **options,
            )
        ),
        train_dataset=tiny.pairs(16),
        eval_dataset=tiny.pairs(6),
        data_collator=tiny.collate,
    )
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0] == pytest.approx(0.6931, abs=1e-4) and len(logged) == 3  # log 2, however it was accumulated
    assert trainer.evaluate()["eval_loss"] < 0.8
    return trainer.model


def trained_by_a_loop(name: str, accumulate: int, lr: float, monkeypatch, **options) -> torch.nn.Module:
    """The example as it is, but for its optimizer: Adam's steps are the same for gradients 4 times too large."""
    made, make = [], tiny.model

    def noted():
        made.append(make())
        return made[-1]

    with monkeypatch.context() as context:
        context.setattr(tiny, "model", noted)
        context.setattr(torch.optim, "AdamW", lambda parameters, **_: torch.optim.SGD(parameters, lr=lr))
        losses = importlib.import_module(name).main(steps=3, accumulate=accumulate, **options)
    assert losses[0] == pytest.approx(0.6931, abs=1e-4) and len(losses) == 3
    return made[-1]


@pytest.mark.parametrize("how", ["transformers_trainer", "plain_loop", "accelerate_loop"])
def test_an_example_that_accumulates_gradients_trains_as_with_a_larger_batch(how, monkeypatch, tmp_path):
    lr = 0.5

    def train(accumulate: int) -> torch.nn.Module:
        if how == "transformers_trainer":
            return trained_by_transformers(accumulate, tmp_path, lr)
        AcceleratorState._reset_state(reset_partial_state=True)
        return trained_by_a_loop(how, accumulate, lr, monkeypatch)

    parts, whole, start = train(4), train(1), tiny.model()
    moved = max((p - q).abs().max() for p, q in zip(whole.parameters(), start.parameters()))
    assert moved > 1e-2, "training changed nothing, and so the comparison shows nothing"
    for (name, p), q in zip(parts.named_parameters(), whole.parameters()):
        assert (p - q).abs().max() < 1e-4 * moved, name


@pytest.mark.parametrize("how", ["transformers_trainer", "accelerate_loop"])
def test_an_example_in_mixed_precision_multiplies_both_heads_in_bf16(how, monkeypatch, tmp_path):
    choose, dtypes = primitive.chosen, []

    def noted(*args, **kwargs):
        dtypes.append((args[0].hidden_dtype, args[0].weight_dtype))
        return choose(*args, **kwargs)

    monkeypatch.setattr(primitive, "chosen", noted)
    AcceleratorState._reset_state(reset_partial_state=True)
    if how == "transformers_trainer":
        trained_by_transformers(1, tmp_path, 0.5, bf16=True)
    else:
        trained_by_a_loop(how, 1, 0.5, monkeypatch, mixed_precision="bf16", cpu=True)
    assert len(dtypes) >= 3 * 2 and set(dtypes) == {(torch.bfloat16, torch.bfloat16)}


@pytest.mark.parametrize("name", sorted({path.stem for path in EXAMPLES.glob("*.py")}.difference(TESTED_ELSEWHERE)))
def test_the_example_runs_on_dpofast_and_learns(name, monkeypatch):
    if name == "trl_dpo":
        pytest.importorskip("trl", minversion="1.16")
    choose, plans = primitive.chosen, []
    monkeypatch.setattr(primitive, "chosen", lambda *args, **kwargs: plans.append(args) or choose(*args, **kwargs))
    losses = importlib.import_module(name).main()
    assert len(losses) >= 20 and len(plans) >= len(losses)
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # log 2: the policy is the reference at the start
    assert losses[-1] < losses[0] - 0.05
