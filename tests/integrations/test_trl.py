"""TRL's own trainers with dpofast and without it: every logged number and every parameter, on a tiny model."""

from __future__ import annotations

import contextlib
import functools
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", minversion="1.16")
pytest.importorskip("peft")

import families
import tiny
import training
import trl
from datasets import Dataset
from families import H, V
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl.trainer import utils

from dpofast import linear_logprob, reference
from dpofast.integrations import models
from dpofast.integrations import trl as integration
from dpofast.integrations.models import sharing

TRL_LOSSES = (
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down "
    "discopop sft sigmoid_norm"
).split()
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tokenizer(padding_side="left")


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, ...]]:
    """The shape of hidden at each call of dpofast's function."""
    seen = []

    def counted(hidden, *args, **kwargs):
        seen.append(tuple(hidden.shape))
        return linear_logprob(hidden, *args, **kwargs)

    linear_logprob = integration.linear_logprob
    monkeypatch.setattr(integration, "linear_logprob", counted)
    yield seen
    integration.unpatch()


def dpo(path, tokenizer, steps: int = 3, trainer=trl.DPOTrainer, policy=None, ref_seed: int | None = 1, **options):
    keywords = {name: options.pop(name) for name in ("peft_config", "eval_dataset") if name in options}
    if "peft_config" not in keywords and ref_seed is not None:
        keywords["ref_model"] = families.build(seed=ref_seed)
    return trainer(
        model=families.build() if policy is None else policy,
        args=trl.DPOConfig(**training.arguments(path, steps, **options)),
        train_dataset=Dataset.from_list(tiny.pairs(16)),
        processing_class=tokenizer,
        **keywords,
    )


def history(trainer) -> list[dict[str, float]]:
    return training.without_timings(trainer.state.log_history)


def assert_same_parameters(found, wanted, start) -> None:
    found, wanted, start = (dict(each.named_parameters()) for each in (found, wanted, start))
    training.assert_same_weights(found, wanted)
    if start.keys() == wanted.keys():
        training.assert_trained(wanted, start, least=1e-3)


def assert_same_training(build, calls, start=None, train=lambda trainer: trainer.train(), **patch) -> tuple:
    """Run without dpofast, then with it; returns the two trainers. ``patch`` are arguments of that."""
    theirs = build()
    train(theirs)
    assert not calls
    with integration.patched(**patch):
        ours = build()
        train(ours)
    assert calls
    training.assert_same_numbers(history(ours), history(theirs))
    assert_same_parameters(ours.model, theirs.model, families.build() if start is None else start)
    return ours, theirs


# DPO


STEEP = {"sppo_hard": 0.0005, "ipo": 0.002, "discopop": 0.002}
"""Learning rates of losses whose steps overshoot at 0.05, where rounding grows with each."""


def loss_cases():
    for name in TRL_LOSSES:
        smoothing = {"label_smoothing": 0.05} if name == "exo_pair" else {}
        steep = {"learning_rate": STEEP[name]} if name in STEEP else {}
        yield {"loss_type": name, **smoothing, **steep}
    yield {"loss_type": "robust", "label_smoothing": 0.2}
    yield {"loss_type": "aot", "label_smoothing": 0.2}
    for divergence, rate in (("forward_kl", 0.002), ("js_divergence", 0.05), ("alpha_divergence", 0.01)):
        yield {"f_divergence_type": divergence, "beta": 0.02, "learning_rate": rate}
    yield {"ld_alpha": 0.3, "beta": 0.5}
    yield {"use_weighting": True, "learning_rate": 0.5}
    yield {"loss_type": "discopop", "discopop_tau": 0.5}
    yield {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "learning_rate": 0.02}


@pytest.mark.parametrize("options", list(loss_cases()), ids=lambda o: "-".join(f"{v}" for v in o.values()))
def test_dpo_trainer_logs_and_learns_the_same(options, tokenizer, calls, tmp_path):
    ours, _ = assert_same_training(lambda: dpo(tmp_path, tokenizer, steps=20, **options), calls)
    assert len(calls) == 20 * 2 and ours.state.global_step == 20  # policy and reference at every step


def test_prompt_and_padding_are_dropped_on_the_cpu(tokenizer, calls, tmp_path):
    with integration.patched():
        trainer = dpo(tmp_path, tokenizer, steps=1)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.compute_loss(trainer.model, batch)
    wanted = int(batch["completion_mask"][:, 1:].sum())
    assert wanted < batch["input_ids"][:, 1:].numel()
    assert calls == [(wanted, H)] * 2


def variants():
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": Dataset.from_list(tiny.pairs(6))}
    yield "precomputed reference", {"precompute_ref_log_probs": True}, 3 + 4
    yield "precomputed reference, the policy's own", {"precompute_ref_log_probs": True, "ref_seed": None}, 3 + 4
    yield "lora", {"peft_config": lora}, 3 * 2
    yield "lora, precomputed", {"peft_config": lora, "precompute_ref_log_probs": True}, 3 + 4
    yield "gradient accumulation", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, 3 * 2 * 2
    yield "gradient checkpointing", {"gradient_checkpointing": True}, 3 * 2
    yield "lora, gradient checkpointing", {"peft_config": lora, "gradient_checkpointing": True}, 3 * 2
    yield "evaluation", {**evaluation, "per_device_eval_batch_size": 3}, 3 * 2 + 2 * 2 * 2  # at step 2 and at the end


@pytest.mark.parametrize(("options", "count"), [pytest.param(o, n, id=name) for name, o, n in variants()])
def test_dpo_trainer_logs_and_learns_the_same_with(options, count, tokenizer, calls, tmp_path):
    def build():
        torch.manual_seed(0)  # LoRA's own
        return dpo(tmp_path, tokenizer, **options)

    ours, _ = assert_same_training(build, calls)
    assert len(calls) == count
    assert not options.get("eval_strategy") or any("eval_rewards/margins" in entry for entry in history(ours))


ACCUMULATED = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}
AT_ONCE = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 8}


def assert_accumulating_is_a_larger_batch(build, calls) -> None:
    """With dpofast inside: four batches of two are one of eight."""
    with integration.patched():
        parts, whole = build(ACCUMULATED), build(AT_ONCE)
        for trainer in (parts, whole):
            trainer.train()
    assert len(calls) >= 3 * (4 + 1)
    steps = [[entry for entry in history(trainer) if "loss" in entry] for trainer in (parts, whole)]
    assert len(steps[0]) == 3
    for mine, theirs in zip(*steps, strict=True):
        for name in ("loss", "grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name
    assert_same_parameters(parts.model, whole.model, families.build())


@pytest.mark.parametrize("trainer", [trl.DPOTrainer, integration.DPOTrainer])
def test_dpo_accumulating_gradients_is_a_larger_batch(trainer, tokenizer, calls, tmp_path):
    assert_accumulating_is_a_larger_batch(lambda o: dpo(tmp_path, tokenizer, trainer=trainer, **o), calls)


def test_dpo_trainer_learns_the_same_from_an_adapter_that_exists(tokenizer, calls, tmp_path):
    def build():
        torch.manual_seed(0)
        lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        return dpo(tmp_path, tokenizer, policy=get_peft_model(families.build(), lora), ref_seed=None)

    ours, _ = assert_same_training(build, calls)
    assert "ref" in ours.model.peft_config and len(calls) == 3 * 2


def test_dpo_trainer_learns_the_same_with_a_tied_and_softcapped_head(tokenizer, calls, tmp_path):
    assert_same_training(
        lambda: dpo(tmp_path, tokenizer, policy=families.build("gemma2")), calls, families.build("gemma2")
    )


def test_dpo_trainer_learns_the_same_with_the_loss_of_a_mixtures_routers(tokenizer, calls, tmp_path):
    def build():
        return dpo(tmp_path, tokenizer, policy=families.build("mixtral"))

    ours, _ = assert_same_training(build, calls, families.build("mixtral"))
    assert ours.aux_loss_enabled and all(entry["aux_loss"] > 1 for entry in history(ours) if "loss" in entry)


def test_training_resumes_from_a_checkpoint_onto_the_same_path(tokenizer, calls, tmp_path):
    options = {"steps": 4, "save_strategy": "steps", "save_steps": 2, "save_only_model": False}
    whole = dpo(tmp_path, tokenizer, **options)
    whole.train()
    with integration.patched():
        resumed = dpo(tmp_path / "resumed", tokenizer, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(calls) == 2 * 2
    found, wanted = history(resumed)[:-1], history(whole)[:-1]  # the last entry sums up the run
    for entry in (*found, *wanted):
        entry.pop("num_tokens")  # TRL counts from zero again
    training.assert_same_numbers(found, wanted)
    assert_same_parameters(resumed.model, whole.model, families.build())


def assert_the_subclass_is_like_trls(ours, seen: list, tokenizer, tmp_path):
    """With references scored before, an evaluation, and TRL's own trainer in the same process; returns the subclass's.

    ``seen`` lists what only the subclass does.
    """
    trainers = []
    for trainer in (trl.DPOTrainer, ours):
        assert not seen
        trained = dpo(tmp_path, tokenizer, trainer=trainer, precompute_ref_log_probs=True)
        trained.train()
        trained.evaluate(Dataset.from_list(tiny.pairs(6)))
        trainers.append(trained)
    assert len(seen) == 4 + 3 + 1 + 1  # references, three steps, references of other data, their evaluation
    training.assert_same_numbers(*map(history, trainers[::-1]))
    assert_same_parameters(trainers[1].model, trainers[0].model, families.build())
    return trainers[1]


def test_the_trainer_subclass_computes_with_dpofast_and_leaves_trl_as_it_is(tokenizer, calls, tmp_path):
    assert_the_subclass_is_like_trls(integration.DPOTrainer, calls, tokenizer, tmp_path)
    assert utils._ChunkedLogProbFunction is not integration._LogprobFunction


# DPO with the prompt of a pair run once


@pytest.fixture
def shared_rows(monkeypatch) -> list[tuple[int, int]]:
    """Rows of each shared forward, and of the batch that it stands for; shared wherever a row is saved."""
    seen = []

    def counted(*args):
        found = plan(*args)
        seen.append((0 if found is None else len(found[0].source), len(args[1]["input_ids"])))
        return found

    plan = sharing._plan
    monkeypatch.setattr(sharing, "_plan", counted)
    monkeypatch.setattr(sharing, "_cost", lambda hidden_size, rows, width, causal=False: rows)
    return seen


@pytest.mark.parametrize("options", list(loss_cases()), ids=lambda o: "-".join(f"{v}" for v in o.values()))
def test_dpo_trainer_that_shares_prompts_logs_and_learns_the_same(options, tokenizer, calls, shared_rows, tmp_path):
    assert_same_training(lambda: dpo(tmp_path, tokenizer, steps=20, **options), calls, share_prompt=True)
    assert shared_rows == [(4, 8)] * 20 * 2 and len(calls) == 20 * 2


@pytest.mark.parametrize(("options", "count"), [pytest.param(o, n, id=name) for name, o, n in variants()])
def test_dpo_trainer_that_shares_prompts_logs_and_learns_the_same_with(
    options, count, tokenizer, calls, shared_rows, tmp_path
):
    def build():
        torch.manual_seed(0)  # LoRA's own
        return dpo(tmp_path, tokenizer, **options)

    assert_same_training(build, calls, share_prompt=True)
    assert len(shared_rows) == len(calls) == count and all(rows == batch // 2 for rows, batch in shared_rows)


def test_the_trainer_subclass_that_shares_prompts_is_the_only_one_that_does(tokenizer, calls, shared_rows, tmp_path):
    sharer = functools.partial(integration.DPOTrainer, share_prompt=True)
    ours = assert_the_subclass_is_like_trls(sharer, shared_rows, tokenizer, tmp_path)
    assert not any("forward" in vars(module) for module in ours.model.get_decoder().modules())


def test_a_mixtures_policy_is_refused_or_run_unshared_beside_its_shared_reference(
    tokenizer, calls, shared_rows, tmp_path
):
    def build():
        return dpo(tmp_path, tokenizer, policy=families.build("mixtral"))

    with integration.patched(share_prompt=True), pytest.raises(ValueError, match="output_router_logits: got True"):
        build().train()
    calls.clear()
    with pytest.warns(UserWarning, match="output_router_logits: got True"):
        assert_same_training(build, calls, families.build("mixtral"), share_prompt=True, refuse="warn")
    assert shared_rows == [(4, 8)] * 3  # the reference's; the policy gets no plan


def test_sharing_is_added_to_a_patch_and_taken_off_with_it(calls):
    before = state(), trl.DPOTrainer.compute_loss
    integration.patch()
    integration.patch(share_prompt=True)
    changed = trl.DPOTrainer.compute_loss
    integration.patch(share_prompt=True)
    assert trl.DPOTrainer.compute_loss is changed is not before[1]
    integration.unpatch()
    assert (state(), trl.DPOTrainer.compute_loss) == before
    with pytest.raises(TypeError, match="share_prompt: got str 'no', expected True or False"):
        integration.patch(share_prompt="no")
    with pytest.raises(ValueError, match="refuse: got str 'never', expected 'error' or 'warn'"):
        integration.patch(share_prompt=True, refuse="never")
    assert (state(), trl.DPOTrainer.compute_loss) == before


# DPO with filtered gradients


def peaked() -> LlamaForCausalLM:
    """Most of its mass is on few words, as a trained model's."""
    model = families.build()
    model.lm_head.weight.data.mul_(2)
    return model


@pytest.mark.parametrize("subclass", [False, True])
def test_a_filter_makes_the_gradients_and_leaves_loss_and_metrics(subclass, tokenizer, tmp_path):
    """Those of `model_dpo_loss` with the same cut, on TRL's own batch."""
    theirs = dpo(tmp_path, tokenizer, policy=peaked())
    trainer = functools.partial(integration.DPOTrainer, grad_filter=0.02) if subclass else trl.DPOTrainer
    ours = dpo(tmp_path, tokenizer, trainer=trainer, policy=peaked())
    batch = next(iter(theirs.get_train_dataloader()))
    wanted = theirs.compute_loss(theirs.model, batch)
    with contextlib.nullcontext() if subclass else integration.patched(grad_filter=0.02):
        loss = ours.compute_loss(ours.model, batch)
    loss.backward()
    assert integration._LogprobFunction.grad_filter is None
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    found, metrics = (trainer._metrics["eval"] for trainer in (ours, theirs))
    assert found.keys() == metrics.keys() and "rewards/margins" in found
    assert all(found[name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-6) for name in found)

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    for cut, same in ((0.02, True), (None, False)):
        model = peaked()
        out = models.model_dpo_loss(model, inputs, labels, ref_model=families.build(seed=1), grad_filter=cut)
        out.loss.backward()
        pairs = [(mine.grad, p.grad) for mine, p in zip(ours.model.parameters(), model.parameters(), strict=True)]
        error = max(((mine - grad).abs().max() / grad.abs().max()).item() for mine, grad in pairs)
        assert error < 1e-4 if same else error > 1e-2, error


def test_a_filter_is_added_to_a_patch_and_taken_off_with_it(calls, tokenizer, tmp_path):
    (hidden, weight, _), targets = function_inputs(torch.bfloat16)

    def grads(function) -> list[torch.Tensor]:
        return torch.autograd.grad(function(8 * hidden, weight, targets).sum(), [hidden, weight])

    def fused(*inputs) -> torch.Tensor:
        head, rows, wanted = inputs
        return utils._ChunkedLogProbFunction.apply(head, rows, None, wanted, 1.0, 16)[0]

    integration.patch()
    exact, filtered = (
        grads(lambda *x, cut=cut: linear_logprob(*x, ignore_index=None, grad_filter=cut).logps)
        for cut in (None, "auto")
    )
    assert not any(map(torch.equal, exact, filtered))
    assert all(map(torch.equal, grads(fused), exact))
    integration.patch(grad_filter="auto")
    integration.patch(share_prompt=True)
    assert all(map(torch.equal, grads(fused), filtered))
    integration.patch(grad_filter=0.5)
    assert not all(map(torch.equal, grads(fused), filtered))
    integration.unpatch()
    integration.patch()
    assert all(map(torch.equal, grads(fused), exact))
    for wrong, kind in ((2.0, ValueError), ("some", ValueError), (True, TypeError)):
        with pytest.raises(kind, match="grad_filter: got"):
            integration.patch(grad_filter=wrong)
        with pytest.raises(kind, match="grad_filter: got"):
            dpo(tmp_path, tokenizer, trainer=functools.partial(integration.DPOTrainer, grad_filter=wrong))


def test_a_filter_is_refused_where_trl_has_no_fused_head(monkeypatch):
    monkeypatch.delattr(utils, "add_fused_lm_head")
    with pytest.raises(ImportError, match=r"has no fused head .*which grad_filter is an option of"):
        integration.patch(grad_filter="auto")
    assert integration._LogprobFunction.grad_filter is None


# The other trainers


def kto_rows() -> list[dict]:
    return [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 3 > 0}
        for i, row in enumerate(tiny.pairs(16))
    ]


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_trainer_logs_and_learns_the_same(loss_type, tokenizer, calls, tmp_path):
    def build():
        return trl.KTOTrainer(
            model=families.build(),
            ref_model=families.build(seed=1),
            args=trl.KTOConfig(**training.arguments(tmp_path, 3, loss_type=loss_type)),
            train_dataset=Dataset.from_list(kto_rows()),
            processing_class=tokenizer,
        )

    assert_same_training(build, calls)


def test_kto_and_sft_accumulating_gradients_are_a_larger_batch(tokenizer, calls, tmp_path):
    """SFT's loss is a mean over tokens of all accumulated batches, which Transformers counts."""
    data = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in tiny.pairs(16)]

    def sft(options):
        args = trl.SFTConfig(**training.arguments(tmp_path, 3, **options))
        data_set = Dataset.from_list(data)
        return trl.SFTTrainer(model=families.build(), args=args, train_dataset=data_set, processing_class=tokenizer)

    def kto(options):  # apo_zero_unpaired has no KL, which is an estimate of each batch
        args = trl.KTOConfig(**training.arguments(tmp_path, 3, loss_type="apo_zero_unpaired", **options))
        data_set = Dataset.from_list(kto_rows())
        return trl.KTOTrainer(
            model=families.build(),
            ref_model=families.build(seed=1),
            args=args,
            train_dataset=data_set,
            processing_class=tokenizer,
        )  # fmt: skip

    assert_accumulating_is_a_larger_batch(sft, calls)
    calls.clear()
    assert_accumulating_is_a_larger_batch(kto, calls)


@pytest.mark.parametrize("packed", [False, True])
def test_sft_trainer_logs_and_learns_the_same(packed, tokenizer, calls, tmp_path):
    data = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in tiny.pairs(16)]

    def build():
        options = {"packing": True, "max_length": 16, "padding_free": True} if packed else {}
        return trl.SFTTrainer(
            model=families.build(),
            args=trl.SFTConfig(**training.arguments(tmp_path, 3, per_device_train_batch_size=2, **options)),
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
        )

    assert_same_training(build, calls)
    assert len(calls) == 3


def reward(completions, **_) -> list[float]:
    return [float(len(set(text.split()))) + 0.1 * len(text) for text in completions]


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_online_trainers_log_and_learn_the_same(name, tokenizer, calls, tmp_path):
    extra = {"top_entropy_quantile": 0.5, "beta": 0.1} if name == "GRPO" else {"beta": 0.1}

    def build():
        config = getattr(trl, f"{name}Config")
        options = dict(num_generations=2, max_completion_length=6, temperature=0.9, num_iterations=2, **extra)
        start = families.build()
        start.save_pretrained(tmp_path / "start")  # the reference is loaded from the model's path
        policy = LlamaForCausalLM.from_pretrained(tmp_path / "start")
        return getattr(trl, f"{name}Trainer")(
            model=policy,
            args=config(**training.arguments(tmp_path, 4, **options)),
            reward_funcs=reward,
            train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in tiny.pairs(16)]),
            processing_class=tokenizer,
        )

    assert_same_training(build, calls)


# The function itself


def function_inputs(dtype=torch.float32, n: int = 9):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((n, H), (V, H), (V,)))
    targets = torch.randint(V, (n,), generator=generator)
    return [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)], targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("outputs", [(), ("log_probs",), ("entropy",), ("log_probs", *integration._STATISTICS)])
@pytest.mark.parametrize("transform", [(1.0, None, 1.0), (0.7, 4.0, 0.5)])
def test_the_function_returns_what_trls_returns(dtype, outputs, transform):
    temperature, softcap, scale = transform
    (hidden, weight, bias), targets = function_inputs(dtype)
    theirs, ours = (
        function.apply(hidden, weight, bias, targets, temperature, 16, softcap, scale, outputs)
        for function in (utils._ChunkedLogProbFunction, integration._LogprobFunction)
    )
    assert len(ours) == len(theirs) == 5
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype != torch.bfloat16 else {"rtol": 0.02, "atol": 0.05}
    for name, mine, wanted in zip(("logps", *integration._STATISTICS), ours, theirs):
        assert (mine is None) == (wanted is None), name
        if mine is not None:
            assert mine.requires_grad == wanted.requires_grad, name
            if name != "is_top1" or dtype != torch.bfloat16:  # rounded logits have ties
                torch.testing.assert_close(mine, wanted, **tolerance)  # shapes and dtypes too
    if dtype == torch.float32:
        incoming = [(1 + i) * torch.linspace(-1, 1, len(targets)) for i in range(2)]
        for mine, wanted in zip(
            *(
                torch.autograd.grad(
                    sum((c * x).sum() for c, x in zip(incoming, out) if x is not None), [hidden, weight, bias]
                )
                for out in (ours, theirs)
            )
        ):
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("outer", ["autocast", "cast_lm_head_to_fp32"])
def test_mixed_precision_gives_the_dtypes_of_trl_and_less_error(outer):
    truth, targets = function_inputs(torch.float64)
    exact = reference.linear_logprob(truth[0], truth[1], targets, bias=truth[2]).logps
    wanted = torch.autograd.grad(exact.sum(), truth)
    dtypes = [torch.float32] * 3 if outer == "autocast" else [torch.float32, torch.bfloat16, torch.bfloat16]
    inputs = [x.detach().to(dtype).requires_grad_() for x, dtype in zip(truth, dtypes)]
    errors = []
    for function in (integration._LogprobFunction, utils._ChunkedLogProbFunction):
        with torch.autocast("cpu", torch.bfloat16, enabled=outer == "autocast"):
            logps, *_ = function.apply(*inputs, targets, 1.0, 16)
        grads = torch.autograd.grad(logps.sum(), inputs)
        assert logps.dtype == torch.float32 and [grad.dtype for grad in grads] == dtypes
        errors.append((logps - exact).abs().max().item())
        for grad, expected in zip(grads, wanted):
            torch.testing.assert_close(grad.double(), expected, rtol=0.05, atol=0.1)
    assert errors[0] < 1.01 * errors[1]


def test_a_batch_in_which_nothing_counts_gives_a_differentiable_zero(calls):
    policy = families.build()
    utils.add_fused_lm_head(policy)
    tokens = torch.randint(3, V, (2, 5))
    with integration.patched():
        out = policy(input_ids=tokens, labels=torch.full_like(tokens, -100), fused_lm_head=True)
    out.loss.backward()
    assert out.loss == 0 and not policy.lm_head.weight.grad.any() and calls == [(0, H)]


def test_a_head_that_is_gone_in_the_backward_is_refused():
    """As ZeRO-3 does with a parameter that it gathered: its data goes when the forward ends."""
    (hidden, weight, bias), targets = function_inputs()
    weight.ds_id = 0
    logps, *_ = integration._LogprobFunction.apply(hidden, weight, bias, targets, 1.0, 16)
    weight.data = torch.empty(0)
    with pytest.raises(RuntimeError, match="has not gathered the head"):
        logps.sum().backward()


# Patching


def state() -> tuple:
    return utils._ChunkedLogProbFunction, utils._use_triton


def test_importing_patches_nothing_and_unpatch_puts_everything_back():
    before = state()
    assert before[0].__module__ == "trl.kernels.chunked_logprob"
    integration.patch()
    integration.patch()
    assert all(now is not was for now, was in zip(state(), before))
    with integration.patched():
        pass
    assert state()[0] is integration._LogprobFunction  # an inner patched() leaves an outer patch alone
    integration.unpatch()
    assert state() == before
    integration.unpatch()
    assert state() == before
    with pytest.raises(KeyError), integration.patched():
        raise KeyError
    assert state() == before


def test_an_unknown_signature_is_refused_and_nothing_is_patched(monkeypatch):
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, targets):
            pass

    with monkeypatch.context() as context:
        context.setattr(utils, "_use_triton", lambda: False)
        with pytest.raises(ImportError, match="expected _use_triton to take device"):
            integration.patch()
        assert utils._ChunkedLogProbFunction is not integration._LogprobFunction
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Function)
    before = state()
    with pytest.raises(
        ImportError,
        match=r"expected .*ctx, hidden, weight, bias.*found ctx, hidden, weight, targets\. .*tested with trl 1\.16 ",
    ) as refusal:
        integration.patch()
    assert "install" not in str(refusal.value)  # neither an older trl nor any other
    assert state() == before
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", None)
    with pytest.raises(ImportError, match="expected add_fused_lm_head to call"):
        integration.patch()


@pytest.mark.parametrize("version", ["1.17.0", "2.0.0.dev0"])
def test_a_version_nobody_has_tried_is_patched_where_its_signature_is_known(version, monkeypatch, calls):
    monkeypatch.setattr(trl, "__version__", version)
    with integration.patched():
        assert utils._ChunkedLogProbFunction is integration._LogprobFunction


def test_a_head_that_calls_something_else_is_refused(monkeypatch):
    monkeypatch.setattr(utils, "add_fused_lm_head", lambda model: None)
    with pytest.raises(ImportError, match="found that it does not"):
        integration.patch()


# TRL 1.8 to 1.10: the contract of its trainers with a Liger loss, as read from their sources and seen in a run of 1.9


@pytest.fixture
def old_trl(monkeypatch):
    """The module attributes of those versions that matter: the two classes, by name, in the trainers' modules."""
    from trl.trainer import dpo_trainer, kto_trainer

    monkeypatch.delattr(utils, "add_fused_lm_head")
    modules = SimpleNamespace(dpo=dpo_trainer, kto=kto_trainer)
    monkeypatch.setattr(modules.dpo, "LigerFusedLinearDPOLoss", "theirs", raising=False)
    monkeypatch.setattr(modules.kto, "LigerFusedLinearKTOLoss", "theirs", raising=False)
    yield modules
    integration.unpatch()


def old_batch() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden, ref_hidden, weight, ref_weight = (
        torch.randn(*shape, generator=generator, requires_grad=True) for shape in ((4, 5, H), (4, 5, H), (V, H), (V, H))
    )
    labels = torch.randint(V, (4, 5), generator=generator).masked_fill(torch.arange(5) < 2, -100)
    return hidden, ref_hidden, weight, ref_weight, labels


def test_the_liger_dpo_loss_of_old_trl_is_replaced_and_serves_its_call(old_trl):
    hidden, ref_hidden, weight, ref_weight, labels = old_batch()
    with integration.patched():
        liger_loss = old_trl.dpo.LigerFusedLinearDPOLoss(beta=0.3, loss_type="ipo")
        loss, metrics = liger_loss(weight, hidden, labels, None, ref_hidden, ref_weight, None)
    chosen_logps, rejected_logps, chosen_logits, rejected_logits, nll, chosen_rewards, _ = metrics
    logps, ref_logps = (
        reference.linear_logprob(*pair, labels).logps.sum(-1) for pair in ((hidden, weight), (ref_hidden, ref_weight))
    )
    torch.testing.assert_close(torch.cat([chosen_logps, rejected_logps]), logps.detach())
    torch.testing.assert_close(chosen_rewards, (0.3 * (logps - ref_logps)[:2]).detach())
    chosen, rejected = ((logps - ref_logps) / 3).chunk(2)  # three tokens each
    torch.testing.assert_close(loss, ((chosen - rejected - 1 / 0.6) ** 2).mean())
    means = [(half @ weight.T).mean().detach() for half in hidden.chunk(2)]
    torch.testing.assert_close(torch.stack([chosen_logits, rejected_logits]), torch.stack(means), rtol=1e-4, atol=1e-6)
    assert nll == 0 and old_trl.dpo.LigerFusedLinearDPOLoss == "theirs"


def test_the_liger_kto_loss_of_old_trl_uses_the_reference_that_it_passes_under_peft(old_trl):
    hidden, ref_hidden, weight, ref_weight, labels = old_batch()
    good = torch.tensor([True, False, False, True])
    with integration.patched():
        liger_loss = old_trl.kto.LigerFusedLinearKTOLoss(beta=0.3, use_ref_model=False)
        loss, metrics = liger_loss(
            _input=hidden, lin_weight=weight, target=labels, bias=None, preference_labels=good,
            ref_input=ref_hidden, ref_weight=ref_weight, ref_bias=None, kl=torch.tensor(0.2),
        )  # fmt: skip
    logps, ref_logps = (
        reference.linear_logprob(*pair, labels).logps.sum(-1) for pair in ((hidden, weight), (ref_hidden, ref_weight))
    )
    sign = torch.where(good, 1, -1)
    torch.testing.assert_close(loss, torch.sigmoid(-sign * 0.3 * (logps - ref_logps - 0.2)).mean())
    torch.testing.assert_close(metrics[0], logps[good].sum().detach())
    torch.testing.assert_close(metrics[5], (0.3 * (logps - ref_logps))[~good].sum().detach())
    assert len(metrics) == 6


def test_a_trl_with_neither_hook_is_refused(old_trl, monkeypatch):
    monkeypatch.delattr(old_trl.dpo, "LigerFusedLinearDPOLoss")  # as in 1.14, or where liger-kernel is not installed
    with pytest.raises(ImportError, match="has neither a fused head .* nor.*a Liger loss.*tested with trl"):
        integration.patch()
