"""Whole models: log-probabilities equal those of the model's own logits, for what each family does with its head."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from dpofast import functional, losses, primitive
from dpofast.integrations import models

V, T = 64, 7
EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.usefixtures("quick")


COMMON = dict(
    vocab_size=V,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    initializer_range=0.4,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=1,
)
GPT2 = dict(n_embd=16, n_layer=2, n_head=2, n_positions=64)
MAMBA = dict(mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1)
# family: its configuration, and what its head must turn out to be: (scale, softcap, has a bias, is tied)
FAMILIES = {
    "llama": ({}, (1.0, None, False, False)),
    "gemma2": (dict(final_logit_softcapping=3.0), (1.0, 3.0, False, True)),
    "gemma3_text": (dict(final_logit_softcapping=7.0), (1.0, 7.0, False, True)),
    "cohere": (dict(logit_scale=0.25), (0.25, None, False, True)),
    "cohere2": (dict(logit_scale=0.0625), (0.0625, None, False, True)),
    "granite": (dict(logits_scaling=8.0), (0.125, None, False, False)),  # divides
    "hyperclovax": (dict(logits_scaling=0.5), (0.5, None, False, False)),  # multiplies
    "gpt2": (GPT2, (1.0, None, False, True)),
    "phi": ({}, (1.0, None, True, False)),
    "falcon_h1": (dict(lm_head_multiplier=0.3, **MAMBA), (0.3, None, False, False)),
    "opt": (dict(word_embed_proj_dim=8, ffn_dim=24, max_position_embeddings=64), (1.0, None, False, True)),
    "nanochat": ({}, (1.0, 15.0, False, False)),  # a softcap that is in no field of this name
    "mixtral": (dict(num_local_experts=2), (1.0, None, False, False)),
}


def build(family: str = "llama", seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family][0]})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    return model


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
    wanted = functional.logprob(z, labels[:, 1:], outputs=("entropy", "mean_logits"))
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


def test_token_weights_reach_the_loss():
    """One for each log-probability that model_logprob returns; whatever stands at prompt and padding."""
    policy, (inputs, labels) = build(), batch()
    logps = models.model_logprob(policy, inputs, labels).logps.detach()
    weights = logps.abs().masked_fill(labels[:, 1:] == -100, torch.nan)
    ref_logps = logps - 0.3
    out = models.model_dpo_loss(policy, inputs, labels, ref_logps=ref_logps, token_weights=weights)
    sums = [functional.sequence_logps(x, labels[:, 1:], token_weights=weights).chunk(2) for x in (logps, ref_logps)]
    torch.testing.assert_close(out.loss, losses.preference_loss(*sums[0], *sums[1]))
    assert not out.loss.isclose(models.model_dpo_loss(policy, inputs, labels, ref_logps=ref_logps).loss, rtol=1e-3)


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


def test_an_adapter_on_the_head_is_refused():
    policy = get_peft_model(build(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    inputs, labels = batch()
    with pytest.raises(ValueError, match="carries an adapter.*target_modules.*modules_to_save"):
        models.model_logprob(policy, inputs, labels)


def test_prompt_learning_is_refused_for_its_positions_are_not_the_labels():
    policy = get_peft_model(build(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    inputs, labels = batch()
    with pytest.raises(ValueError, match=r"labels: got shape \[4, 7\], expected \[4, 9\]"):
        models.model_logprob(policy, inputs, labels)


# Heads that cannot be used, and calls that cannot be right


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
    with pytest.raises(TypeError, match="softcap=3.0 is the model's own"):
        models.model_logprob(model, inputs, labels, softcap=3.0)
    with pytest.raises(ValueError, match="both given"):
        models.model_dpo_loss(model, inputs, labels, ref_model=model, ref_logps=torch.zeros(4))
    with pytest.raises(ValueError, match="needs a reference model; pass ref_model"):
        models.model_dpo_loss(model, inputs, labels)
    with pytest.raises(ValueError, match="uses no reference model"):
        models.model_dpo_loss(model, inputs, labels, loss_type="simpo", ref_model=model)
    with pytest.raises(ValueError, match=r"labels: got shape \[4, 6\]"):
        models.model_logprob(model, inputs, labels[:, 1:])


def test_a_model_in_distributed_data_parallel_gives_the_same_loss_and_gradients(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain, (inputs, labels) = build(), batch()
        wrapped = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
        grads = []
        for model in (plain, wrapped):
            for _ in range(2):
                model.zero_grad()
                models.model_dpo_loss(model, inputs, labels, ref_model=build(seed=1)).loss.backward()
            grads.append([parameter.grad for parameter in model.parameters()])
        torch.testing.assert_close(*grads)
        assert all(grad.any() for grad in grads[0])
    finally:
        torch.distributed.destroy_process_group()


# The examples


TESTED_ELSEWHERE = ("tiny", "lightning_loop")


@pytest.mark.parametrize("name", sorted({path.stem for path in EXAMPLES.glob("*.py")}.difference(TESTED_ELSEWHERE)))
def test_the_example_runs_on_dpofast_and_learns(name, monkeypatch):
    if name == "trl_dpo":
        pytest.importorskip("trl", minversion="1.16")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    choose, plans = primitive.chosen, []
    monkeypatch.setattr(primitive, "choose", lambda *args, **kwargs: plans.append(args) or choose(*args, **kwargs))
    try:
        losses = importlib.import_module(name).main()
    finally:
        for module in (name, "tiny"):  # names that are nobody else's business
            sys.modules.pop(module, None)
    assert len(losses) >= 20 and len(plans) >= len(losses)
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # log 2: the policy is the reference at the start
    assert losses[-1] < losses[0] - 0.05
