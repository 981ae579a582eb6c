"""The prompt once per pair: hidden states, log-probabilities and gradients are those of the model run as it is."""

from __future__ import annotations

import copy
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from families import SIZES, V, build
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from ranks import launch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from dpofast.integrations import models
from dpofast.integrations.models import share_support, shared_rows, sharing

pytestmark = pytest.mark.usefixtures("quick")

WINDOW = 4  # shorter than any row
MODELS = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": dict(sliding_window=WINDOW),
    "gemma3_text": dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]),
    "mistral": dict(sliding_window=WINDOW),
    "phi3": {},
    "gpt2": {},
    "mixtral": {},
    "olmo2": {},
}
EAGER_ONLY = ("gemma2",)
CASES = [(f, impl) for f in MODELS for impl in ("eager", "sdpa") if impl == "eager" or f not in EAGER_ONLY]
# tokens of prompt and answers
PAIRS = [(9, 4, 5), (0, 3, 4), (1, 5, 2), (7, 0, 3), (6, 1, 1), (8, 3, 0), (2, 1, 4), (5, 3, 3)]


# the same with three and with four answers
TRIPLES = [
    (9, 4, 5, 2),
    (0, 3, 4, 2),
    (1, 5, 2, 3),
    (7, 0, 3, 2),
    (6, 4, 4, 4),
    (6, 4, 4, 3),
    (8, 3, 1, 0),
    (2, 1, 4, 1),
]
FOURS = [(9, 4, 5, 2, 4), (0, 3, 4, 2, 1), (7, 2, 0, 3, 1), (6, 4, 4, 4, 4), (5, 0, 0, 0, 0)]


def batch(
    groups: list[tuple[int, ...]] = PAIRS, left: bool = False, positions: bool = False
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs and labels; an answer of the same length as the first is the same, if it is not 1."""
    generator = torch.Generator().manual_seed(1)
    blocks: list[list[torch.Tensor]] = [[] for _ in groups[0][1:]]
    for prompt, *sizes in groups:
        start, *answers = (torch.randint(3, V, (n,), generator=generator) for n in (prompt, *sizes))
        for k, answer in enumerate(answers):
            if k and sizes[k] == sizes[0] > 1:
                answers[k] = answers[0]
            elif k and sizes[k] and sizes[0]:
                answer[0] = (answers[0][0] - 3 + k) % (V - 3) + 3  # another one
            blocks[k].append(torch.cat([start, answers[k]]))
    rows = [row for block in blocks for row in block]
    width = max(map(len, rows)) + 2
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        here = slice(width - len(row), width) if left else slice(0, len(row))
        prompt = here.start + max(1, groups[i % len(groups)][0])  # nothing predicts a first token, but padding
        ids[i, here], mask[i, here] = row, 1
        labels[i, prompt : here.stop] = ids[i, prompt : here.stop]
    inputs = {"input_ids": ids, "attention_mask": mask}
    if positions:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return inputs, labels


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Share wherever a row is saved, whatever it costs."""
    monkeypatch.setattr(sharing, "_cost", lambda hidden_size, rows, width, causal=False: rows)


def rows_of(model: torch.nn.Module) -> list[tuple[int, ...]]:
    """Shapes of what the last layer returns, from now on."""
    shapes: list[tuple[int, ...]] = []
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    layers[-1].register_forward_hook(
        lambda _m, _a, out: shapes.append(tuple((out if torch.is_tensor(out) else out[0]).shape))
    )
    return shapes


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def from_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    shifted = labels[:, 1:]
    logps = logits[:, :-1].log_softmax(-1).gather(-1, shifted.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(shifted == -100, 0.0, logps)


def run(model, inputs, labels):
    """Hidden states, log-probabilities by the model's own logits, and the gradients of a sum of these."""
    hidden = []
    body = model.get_decoder()
    hook = body.register_forward_hook(lambda _m, _a, out: hidden.append(out.last_hidden_state.detach()))
    logps = from_logits(model(**inputs, use_cache=False).logits, labels)
    hook.remove()
    (logps * torch.linspace(-1, 1, logps.numel()).reshape(logps.shape)).sum().backward()
    there = inputs.get("attention_mask", torch.ones_like(labels)).bool()
    return hidden[-1][there], logps.detach(), gradients(model)


def assert_close(found: torch.Tensor, wanted: torch.Tensor, limit: float, scale: torch.Tensor, what: str) -> None:
    error = ((found - wanted).abs().max() / scale.abs().max()).item() if wanted.numel() else 0.0
    assert error <= limit, f"{what}: {error}"


def assert_same(found, wanted, limit: float) -> None:
    assert_close(found[0], wanted[0], limit, wanted[0], "hidden states")
    assert_close(found[1], wanted[1], limit, wanted[1], "log-probs")
    assert found[2].keys() == wanted[2].keys()
    largest = max(grad.abs().max() for grad in wanted[2].values())
    for name, grad in found[2].items():
        # the bias of the keys has a gradient of 0, up to the rounding of others
        assert_close(grad, wanted[2][name], limit, torch.maximum(wanted[2][name].abs().max(), 0.1 * largest), name)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_hidden_states_logps_and_gradients_are_those_of_the_unshared_model(family, implementation, left, always):
    model = build(family, attn_implementation=implementation, **MODELS[family])
    # an embedding of positions needs them where padding is on the left, shared or not
    inputs, labels = batch(left=left, positions=left and family == "gpt2")
    wanted = run(model, inputs, labels)
    with models.share_prompt(model):
        shapes = rows_of(model)
        assert_same(run(model, inputs, labels), wanted, 1e-5)
    pairs = len(PAIRS)
    assert shapes[-1][0] == pairs + 1 and len(wanted[0]) > (shapes[-1][1] * shapes[-1][0]) / 2  # one has no prompt
    out = models.model_logprob(model, inputs, labels, share_prompt=True)
    assert shapes[-1][0] == pairs + 1
    (out.logps * torch.linspace(-1, 1, out.logps.numel()).reshape(out.logps.shape)).sum().backward()
    assert_same((wanted[0], out.logps.detach(), gradients(model)), wanted, 1e-5)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("groups", [TRIPLES, FOURS], ids=["3", "4"])
@pytest.mark.parametrize(("family", "implementation"), [("llama", "eager"), ("llama", "sdpa"), ("gemma3_text", "sdpa")])
def test_any_number_of_answers_shares_a_prompt(family, implementation, groups, left, always):
    model = build(family, attn_implementation=implementation, **MODELS[family])
    (inputs, labels), answers = batch(groups, left=left), len(groups[0]) - 1
    wanted = run(model, inputs, labels)
    with models.share_prompt(model, answers=answers):
        shapes = rows_of(model)
        assert_same(run(model, inputs, labels), wanted, 1e-5)
    assert shapes[-1][0] == len(groups) - 1 + answers  # one has no prompt
    out = models.model_logprob(model, inputs, labels, share_prompt=True, answers=answers)
    assert shapes[-1][0] == len(groups) - 1 + answers
    (out.logps * torch.linspace(-1, 1, out.logps.numel()).reshape(out.logps.shape)).sum().backward()
    assert_same((wanted[0], out.logps.detach(), gradients(model)), wanted, 1e-5)


# whose own code has no fp32 in it, but for the angles of positions
@pytest.mark.parametrize(
    ("family", "implementation"),
    [("gpt2", "eager"), ("gpt2", "sdpa"), ("phi", "sdpa"), ("gpt_neox", "sdpa"), ("stablelm", "sdpa")],
)
def test_in_fp64_they_are_the_same_to_ten_digits(family, implementation, always):
    model = build(family, attn_implementation=implementation).double()
    for groups in (PAIRS, TRIPLES, FOURS):
        inputs, labels = batch(groups)
        wanted = run(model, inputs, labels)
        with models.share_prompt(model, answers=len(groups[0]) - 1):
            assert_same(run(model, inputs, labels), wanted, 1e-10)


def packed(
    groups: list[tuple[int, ...]], boundaries: bool = True, rows: int = 1
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The sequences of `batch` in so many rows, of the same number of tokens."""
    inputs, labels = batch(groups, positions=True)
    there = inputs.pop("attention_mask").bool()
    inputs = {name: x[there].reshape(rows, -1) for name, x in inputs.items()}
    if boundaries:
        ends = torch.nn.functional.pad(there.sum(1).cumsum(0), (1, 0)).int()
        longest = int(there.sum(1).max())
        inputs |= dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=longest, max_length_k=longest)
    return inputs, labels[there].reshape(rows, -1)


@pytest.mark.parametrize(
    "groups",
    [[(20, 4, 5), (18, 5, 2), (17, 0, 3)], [(20, 4, 5, 2, 4), (18, 2, 0, 3, 1), (17, 4, 4, 4, 4)]],
    ids=["2", "4"],
)
@pytest.mark.parametrize(
    ("family", "implementation"), [("llama", "eager"), ("llama", "sdpa"), ("gemma3_text", "sdpa"), ("gpt2", "sdpa")]
)
def test_sequences_that_are_packed_in_a_row_share_too(family, implementation, groups):
    model = build(family, attn_implementation=implementation, **MODELS[family])
    for boundaries in (False, True):
        inputs, labels = packed(groups, boundaries)
        wanted = run(model, inputs, labels)
        with models.share_prompt(model, answers=len(groups[0]) - 1):
            shapes = rows_of(model)
            assert_same(run(model, inputs, labels), wanted, 1e-5)
        assert shapes[-1][:2] == (3, sum(groups[0]))
        found = models.model_logprob(model, inputs, labels, share_prompt=True, answers=len(groups[0]) - 1).logps
        assert shapes[-1][0] == 3
        assert_close(found, wanted[1], 1e-5, wanted[1], "log-probs")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_sequences_that_are_packed_in_several_rows_share_too(implementation):
    """Three rows of two: the chosen answers are in one and a half of them."""
    model = build(attn_implementation=implementation)
    groups = [(20, 4, 4), (20, 4, 5), (19, 5, 4)]
    for boundaries in (False, True):
        inputs, labels = packed(groups, boundaries, rows=3)
        assert inputs["position_ids"].shape == (3, 48)
        wanted = run(model, inputs, labels)
        with models.share_prompt(model):
            shapes = rows_of(model)
            assert_same(run(model, inputs, labels), wanted, 1e-5)
        assert shapes[-1][:2] == (3, 29)


def test_a_packed_sequence_begins_with_its_row_and_where_positions_do_not_go_on():
    found = shared_rows.find_packed(torch.tensor([[0, 1, 0, 1], [2, 3, 7, 8]]))
    assert found.first.tolist() == [0, 2, 4, 6] and found.length.tolist() == [2, 2, 2, 2]
    assert shared_rows.find_packed(torch.arange(3)[None]).length.tolist() == [3]


def test_packed_sequences_that_are_not_told_or_not_of_groups_are_refused():
    model, (inputs, _) = build(), packed([(20, 4, 5), (18, 5, 2)])
    cases = [
        ({**inputs, "position_ids": None}, "cu_seq_lens_q: got boundaries which position_ids do not have"),
        ({**inputs, "cu_seq_lens_k": inputs["cu_seq_lens_q"][1:]}, "cu_seq_lens_k: got boundaries which position_ids"),
        (
            {"input_ids": inputs["input_ids"][:, :60], "position_ids": inputs["position_ids"][:, :60]},
            r"input_ids: got shape \(1, 60\) of 3 packed sequences, expected \[2B, T\]",
        ),
        (
            {**{name: inputs[name] for name in ("input_ids", "position_ids")}, "attention_mask": torch.ones(1, 92)},
            r"input_ids: got shape \(1, 92\), expected \[2B, T\], rows \[chosen; rejected\], or so many sequences",
        ),
    ]
    with models.share_prompt(model):
        for given, message in cases:
            with pytest.raises(ValueError, match=message):
                model(**given)


def test_flex_attention_takes_the_mask_as_blocks(monkeypatch, always):
    """Forward only: on a CPU it has no backward. Not compiled, and so nothing of its kernels is shown."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from transformers import masking_utils
    from transformers.integrations import flex_attention as integration

    def interpreted(q, k, v, training, **options):
        return flex_attention(q, k, v, **options)

    monkeypatch.setattr(
        masking_utils, "create_block_mask", lambda **options: create_block_mask(**options | {"_compile": False})
    )
    monkeypatch.setattr(integration, "compile_friendly_flex_attention", interpreted)
    options = MODELS["gemma3_text"]  # two kinds of layers
    model = build("gemma3_text", attn_implementation="flex_attention", **options).requires_grad_(False)
    inputs, _ = batch([(20, 7, 9), (18, 2, 5)])
    wanted = build("gemma3_text", **options)(**inputs, use_cache=False).logits
    shapes = rows_of(model)
    with models.share_prompt(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow
        found = model(**inputs, use_cache=False).logits
    assert shapes[-1][:2] == (2, 20 + 7 + 9)
    there = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[there], wanted[there], rtol=1e-5, atol=1e-5)


# What is chosen


def test_a_pair_is_shared_where_it_saves_tokens_and_the_rows_stay_narrow():
    def shared(lengths, common, cost=lambda rows, width: rows * width):
        return [len(row) > 1 for row in shared_rows.choose(lengths, common, cost)]

    assert shared([10, 10], [8]) == [True]
    assert shared([10, 10], [0]) == [False, False]
    assert shared([10, 10], [3]) == [True]  # 17 for 20
    assert shared([10, 10, 10, 10], [8, 1]) == [True, False, False]  # rows of 12, not of 19
    assert shared([10, 10, 10, 10], [8, 1], lambda rows, width: rows) == [True, True]
    assert shared([10, 10], [3], lambda rows, width: rows * width**2) == [False, False]  # attention counts
    assert shared([5, 5], [5]) == [True]
    assert shared([0, 0], [0]) == [False, False]


def test_of_many_answers_the_more_the_shorter_a_prefix_pays():
    """K answers to a prompt: a row of P + K A for K of P + A, and attention over it all."""

    def cost(rows, width):
        return rows * width * (6 * 4 + width)

    def shared(answers, prompt, length):
        return len(shared_rows.choose([prompt + length] * answers, [prompt], cost)) == 1

    assert shared(2, 20, 4) and shared(4, 20, 4) and shared(8, 20, 4)
    assert shared(2, 4, 2) and shared(4, 4, 2)
    assert not shared(2, 8, 20) and not shared(4, 8, 20)
    assert shared(2, 24, 12) and not shared(8, 24, 12)  # 8 answers see each other's places
    rows = shared_rows.choose([9, 4, 8, 3, 7, 2], [6, 1], lambda rows, width: rows)  # of 2 prompts, 3 answers
    assert rows[0] == [(0, 0, 6, 0), (0, 6, 9, 1), (2, 6, 8, 2), (4, 6, 7, 3)]
    assert rows[1] == [(1, 0, 1, 0), (1, 1, 4, 1), (3, 1, 3, 2), (5, 1, 2, 3)]


def test_a_prefix_ends_at_the_first_difference_wherever_padding_is():
    ids = torch.tensor([[0, 5, 6, 7, 8, 9], [5, 6, 0, 0, 0, 0], [5, 6, 4, 8, 9, 0], [5, 6, 0, 0, 0, 0]])
    mask = (ids != 0).long()
    sequences = shared_rows.find_sequences(ids, mask)
    assert sequences.first.tolist() == [1, 6, 12, 18] and sequences.length.tolist() == [5, 2, 5, 2]
    assert shared_rows.common_prefix(sequences, 2, ids).tolist() == [2, 2]
    positions = torch.stack([torch.arange(6) - 1, torch.arange(6), torch.arange(6), torch.arange(6) + 1])
    assert shared_rows.common_prefix(sequences, 2, ids, positions).tolist() == [2, 0]


@pytest.mark.parametrize(("prompt", "answer", "rows"), [(40, 4, 1), (30, 10, 1), (2, 20, 2), (0, 20, 2)])
def test_a_batch_that_does_not_pay_goes_as_it_is(prompt, answer, rows):
    model, (inputs, _) = build(), batch([(prompt, answer, answer - 1)])
    with models.share_prompt(model):
        shapes = rows_of(model)
        calls = []
        model.model.rotary_emb.register_forward_hook(lambda _m, args, _o: calls.append(args[0]))
        model(**inputs, use_cache=False)
    assert shapes[-1][0] == rows
    assert rows == 1 or shapes[-1][1] == inputs["input_ids"].shape[1]  # not rebuilt, either


def test_a_causal_kernel_that_needs_no_mask_is_half_the_attention():
    """30 tokens of 10 + 20: in units of `sharing._cost`, shared 7300, unshared 7560 and as a causal kernel 6660."""
    inputs, _ = batch([(10, 20, 20)])
    inputs = {name: x[:, :30] for name, x in inputs.items()}
    inputs["input_ids"][1, 10:] = inputs["input_ids"][0, 10:].flip(0)
    padded = {name: torch.nn.functional.pad(x, (0, 1)) for name, x in inputs.items()}
    for implementation, given, rows in (("eager", inputs, 1), ("sdpa", inputs, 2), ("sdpa", padded, 1)):
        model = build(attn_implementation=implementation)
        shapes = rows_of(model)
        with models.share_prompt(model):
            model(**given, use_cache=False)
        assert shapes[-1][0] == rows, (implementation, shapes[-1])


def test_a_prefix_goes_on_into_the_answers_and_ends_where_positions_differ():
    model, (inputs, _) = build(), batch([(20, 6, 4)])
    inputs["input_ids"][1, 20:22] = inputs["input_ids"][0, 20:22]
    shapes = rows_of(model)
    with models.share_prompt(model):
        model(**inputs, use_cache=False)
        assert shapes[-1][:2] == (1, 26 + 24 - 22)
        positions = torch.stack([torch.arange(28), torch.arange(28) + 3])
        model(**inputs, position_ids=positions, use_cache=False)
        assert shapes[-1][:2] == (2, 28)


def test_padding_before_a_sequence_is_left_out_of_positions_only_where_they_are_relative(always):
    """Padded on the left, a pair has other positions by place: GPT-2 sees them, and is left alone."""
    inputs, _ = batch([(9, 4, 6), (8, 5, 5)], left=True)
    for family, scale, rows in (("llama", 1, 2), ("gpt2", 1, 3), ("gpt2", 1e-5, 3)):
        model = build(family)
        if family == "gpt2":
            model.transformer.wpe.weight.data.mul_(scale)
        with models.share_prompt(model):
            shapes = rows_of(model)
            found = model(**inputs, use_cache=False).logits
        assert shapes[-1][0] == rows
        there = inputs["attention_mask"].bool()
        torch.testing.assert_close(found[there], model(**inputs, use_cache=False).logits[there], rtol=1e-5, atol=1e-5)


def test_a_sequence_without_tokens_does_no_harm(always):
    model, (inputs, labels) = build(attn_implementation="sdpa"), batch([(0, 3, 0), (5, 2, 1), (0, 0, 0)])
    found = models.model_logprob(model, inputs, labels, share_prompt=True).logps
    found.sum().backward()
    assert found.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(found, models.model_logprob(model, inputs, labels).logps, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_a_batch_without_tokens_goes_as_it_is(shape):
    """And meets what the model says to it: not every one takes it."""
    assert sharing._plan(build().model, {"input_ids": torch.zeros(shape, dtype=torch.long)}, True, 2) is None


# Losses and trainers


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_of_an_adapter_and_its_reference_are_the_same(checkpointing):
    torch.manual_seed(0)
    policy = get_peft_model(build(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    if checkpointing:
        policy.train()
        policy.gradient_checkpointing_enable()
        policy.enable_input_require_grads()
    inputs, labels = batch([(20, 4, 5), (18, 3, 6), (20, 5, 5)])
    wanted = models.model_dpo_loss(policy, inputs, labels)
    wanted.loss.backward()
    grads = gradients(policy)
    shapes = rows_of(policy)
    found = models.model_dpo_loss(policy, inputs, labels, share_prompt=True)
    found.loss.backward()
    assert [shape[0] for shape in shapes[-2:]] == [3, 3]  # the reference's, or a checkpoint's again
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-5, atol=0)
    found_grads = gradients(policy)
    assert found_grads.keys() == grads.keys() and len(grads) > 4
    largest = max(grad.abs().max() for grad in grads.values())
    for name, grad in found_grads.items():
        assert_close(grad, grads[name], 1e-5, largest, name)


def test_precomputed_references_are_those_of_the_shared_model():
    ref, (inputs, labels) = build(seed=1), batch([(20, 4, 5), (18, 3, 6)])
    wanted = models.model_logprob(ref, inputs, labels).logps
    with torch.no_grad():
        found = models.model_logprob(ref, inputs, labels, share_prompt=True)
    torch.testing.assert_close(found.logps, wanted, rtol=1e-5, atol=1e-5)
    policy = build()
    out = models.model_dpo_loss(policy, inputs, labels, ref_logps=found.logps, share_prompt=True)
    again = models.model_dpo_loss(policy, inputs, labels, ref_model=ref)
    torch.testing.assert_close(out.loss, again.loss, rtol=1e-5, atol=0)


def test_wrapped_models_on_two_ranks(tmp_path):
    cases = {"data_parallel", "fsdp2", "one_rank_has_nothing_to_share", "trl_in_data_parallel"}
    script = Path(__file__).with_name("share_prompt_ranks.py")
    assert launch.torchrun(script, 2, tmp_path, *sorted(cases)) == cases


def test_zero3_on_two_ranks(tmp_path):
    pytest.importorskip("deepspeed")
    assert launch.torchrun(Path(__file__).with_name("share_prompt_ranks.py"), 2, tmp_path, "zero3") == {"zero3"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_difference_is_of_rounding(dtype):
    model, (inputs, labels) = build(), batch([(20, 4, 5), (18, 3, 6)])
    wanted = models.model_logprob(model, inputs, labels).logps
    with torch.autocast("cpu", dtype):
        plain = models.model_logprob(model, inputs, labels).logps
        found = models.model_logprob(model, inputs, labels, share_prompt=True).logps
    assert (found - wanted).abs().max() <= 2 * (plain - wanted).abs().max()
    low = model.to(dtype)
    plain = models.model_logprob(low, inputs, labels).logps
    found = models.model_logprob(low, inputs, labels, share_prompt=True).logps
    assert (found - wanted).abs().max() <= 2 * (plain - wanted).abs().max()


def test_the_proof_allows_for_the_rounding_of_autocast_around_a_model_in_fp32(monkeypatch):
    """Its last norm gives fp32 back, and thirty layers of 16 bits before it differ by more than fp32 would."""
    errors, distance = [], share_support._distance
    monkeypatch.setattr(share_support, "_distance", lambda *pair: errors.append(distance(*pair)) or errors[-1])
    model, (inputs, labels) = build(num_hidden_layers=30), batch([(20, 4, 5)])
    rows = rows_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        models.model_logprob(model, inputs, labels, share_prompt=True)
    assert errors[0] > 1e-3
    assert rows[-1][0] == 1


# The patch


def test_a_patch_is_taken_off_whole():
    model, (inputs, _) = build(), batch([(20, 4, 5)])
    shapes = rows_of(model)
    assert models.patch_share_prompt(model) and not models.patch_share_prompt(model)
    with models.share_prompt(model):  # inside another patch it changes nothing
        model(**inputs)
    model(**inputs)
    assert shapes[-1][0] == 1
    models.unpatch_share_prompt(model)
    models.unpatch_share_prompt(model)
    model(**inputs)
    assert shapes[-1][0] == 2 and "forward" not in vars(model.model)

    own = model.model.forward
    model.model.forward = own  # as a hook of accelerate's would
    with pytest.raises(RuntimeError, match="stop"), models.share_prompt(model):
        raise RuntimeError("stop")
    assert vars(model.model)["forward"] is own


def test_a_thread_that_shares_does_not_change_what_another_runs():
    """One stops in the middle of its forward, when Transformers' table of masks is changed."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as functions

    (inputs, _), (others, _) = batch([(20, 4, 5)]), batch([(22, 2, 3)])
    sharing_one, other, plain = build(), build(seed=1), build(seed=2)
    there = [x["attention_mask"].bool() for x in (inputs, others, others)]
    wanted = [model(**x).logits for model, x in ((sharing_one, inputs), (other, others), (plain, others))]
    before, inside, go_on = dict(functions._local_mapping), threading.Event(), threading.Event()

    def stop(*_args):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert go_on.wait(60)

    with models.share_prompt(sharing_one), models.share_prompt(other), ThreadPoolExecutor(1) as pool:
        sharing_one(**inputs)  # the proof
        sharing_one.model.embed_tokens.register_forward_hook(stop)  # masks are made after it
        first = pool.submit(lambda: sharing_one(**inputs, use_cache=False).logits)
        assert inside.wait(60)
        found = [other(**others, use_cache=False).logits, plain(**others, use_cache=False).logits]
        go_on.set()
        found = [first.result(), *found]
    for mine, theirs, rows in zip(found, wanted, there, strict=True):
        torch.testing.assert_close(mine[rows], theirs[rows], rtol=1e-5, atol=1e-5)
    assert dict(functions._local_mapping) == before


def test_a_copy_of_a_patched_model_shares_by_itself():
    model, (inputs, _) = build(), batch([(20, 4, 5)])
    models.patch_share_prompt(model)
    twin = copy.deepcopy(model)
    models.unpatch_share_prompt(model)
    torch.nn.init.zeros_(model.model.embed_tokens.weight)
    shapes = rows_of(twin)
    found = twin(**inputs, use_cache=False).logits
    assert shapes[-1][0] == 1 and found.std() > 0.1
    models.unpatch_share_prompt(twin)
    there = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[there], twin(**inputs, use_cache=False).logits[there], rtol=1e-5, atol=1e-5)


def test_a_model_without_its_head_and_another_output_form_are_served():
    body, (inputs, _) = build().model, batch([(20, 4, 5)])
    there = inputs["attention_mask"].bool()
    wanted = body(**inputs).last_hidden_state[there]
    with models.share_prompt(body):
        shapes = rows_of(body)
        for form in (True, False):
            found = body(**inputs, use_cache=False, return_dict=form)[0]
            torch.testing.assert_close(found[there], wanted, rtol=1e-5, atol=1e-5)
            assert shapes[-1][0] == 1 and not found[~there].any()


def test_generation_keeps_its_cache():
    model, (inputs, _) = build(), batch([(20, 4, 4), (20, 4, 4)])
    rows = {name: x[:3, :24] for name, x in inputs.items()}  # an odd number of rows, too
    wanted = model.generate(**rows, max_new_tokens=3, do_sample=False, min_new_tokens=3)
    with models.share_prompt(model):
        found = model.generate(**rows, max_new_tokens=3, do_sample=False, min_new_tokens=3)
    assert torch.equal(found, wanted)


def test_a_call_that_asks_for_a_cache_runs_as_it_is():
    model, (inputs, _) = build(), batch([(20, 4, 5)])
    shapes = rows_of(model)
    with models.share_prompt(model):
        out = model(**inputs, use_cache=True)
        assert shapes[-1][0] == 2 and out.past_key_values.get_seq_length() == inputs["input_ids"].shape[1]
        assert model(**inputs).past_key_values is None and shapes[-1][0] == 1


def test_each_implementation_of_attention_is_proven_by_itself(monkeypatch):
    model, (inputs, _) = build(attn_implementation="eager"), batch([(20, 4, 5)])
    proven, prove = [], sharing.prove
    monkeypatch.setattr(
        sharing, "prove", lambda body, run: proven.append(body.config._attn_implementation) or prove(body, run)
    )
    with models.share_prompt(model):
        for implementation in ("eager", "sdpa", "eager"):
            model.set_attn_implementation(implementation)
            model(**inputs)
    assert proven == ["eager", "sdpa"]


def test_a_mask_function_that_somebody_has_set_stays_set(monkeypatch):
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as functions

    made, make = [], functions["sdpa"]

    def own(*args, **kwargs):
        made.append(1)
        return make(*args, **kwargs)

    monkeypatch.setitem(functions._local_mapping, "sdpa", own)
    model, (inputs, _) = build(attn_implementation="sdpa"), batch([(20, 4, 5)])
    shapes = rows_of(model)
    with models.share_prompt(model):
        model(**inputs)
    assert shapes[-1][0] == 1 and functions["sdpa"] is own and made


def test_dropout_is_warned_of_once():
    model, (inputs, _) = build("gpt2", attn_pdrop=0.5).train(), batch([(20, 4, 5)])
    with models.share_prompt(model):
        with pytest.warns(UserWarning, match="model: has dropout in training"):
            model(**inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**inputs)
            model.eval()(**inputs)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("options", [{"attention_dropout": 0.5}, {"attention_dropout": 0.0}], ids=str)
def test_dropout_that_is_a_number_of_the_attention_is_warned_of_too(options):
    model, (inputs, _) = build(**options).train(), batch([(20, 4, 5)])
    warned = options["attention_dropout"] > 0
    with models.share_prompt(model), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model(**inputs)
    assert any("model: has dropout in training" in str(w.message) for w in seen) == warned


def test_with_dropout_answers_share_its_zeros_and_each_sequence_is_trained_as_before():
    """Log-probabilities in the mean over draws, within four standard errors; one draw, or none, is further off."""
    model, (inputs, labels) = (
        build("gpt2", resid_pdrop=0.2, attn_pdrop=0.2, embd_pdrop=0.2).train(),
        batch([(20, 4, 5)]),
    )
    with torch.no_grad():
        quiet = models.model_logprob(model.eval(), inputs, labels).logps.sum(-1)
        model.train()
        torch.manual_seed(0)
        plain = torch.stack([models.model_logprob(model, inputs, labels).logps.sum(-1) for _ in range(400)])
        with pytest.warns(UserWarning, match="model: has dropout"), models.share_prompt(model):
            shared = torch.stack([models.model_logprob(model, inputs, labels).logps.sum(-1) for _ in range(400)])
            hidden = model.transformer(**inputs).last_hidden_state
    error = ((plain.var(0) + shared.var(0)) / 400).sqrt()
    assert ((plain.mean(0) - shared.mean(0)).abs() < 4 * error).all()
    assert ((quiet - shared.mean(0)).abs() > 8 * error).any()
    torch.testing.assert_close(plain.std(0), shared.std(0), rtol=0.2, atol=0)
    assert torch.equal(hidden[0, :20], hidden[1, :20])
    unshared = model.transformer(**inputs).last_hidden_state
    assert not torch.isclose(unshared[0, :20], unshared[1, :20]).any(-1).all()


def test_noise_on_embeddings_is_warned_of():
    model, (inputs, _) = build().train(), batch([(20, 4, 5)])
    model.model.embed_tokens.neftune_noise_alpha = 5.0  # as Transformers' trainers set it
    with models.share_prompt(model):
        model.eval()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**inputs)
        model.train()
        with pytest.warns(UserWarning, match="model: has NEFTune's noise in training"):
            model(**inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**inputs)


def test_the_proof_leaves_modules_and_random_numbers_as_they_are():
    model, (inputs, _) = build("gpt2").train(), batch([(2, 20, 19)])
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    torch.manual_seed(3)
    wanted = model(**inputs).logits
    torch.manual_seed(3)
    with models.share_prompt(model):
        assert torch.equal(model(**inputs).logits, wanted)
    assert [module.training for module in model.modules()] == before


def test_layers_and_models_that_are_compiled_share_too():
    """Traced, not compiled: the sharing is outside of the graphs."""
    model, (inputs, _) = build(), batch([(20, 4, 5)])
    there = inputs["attention_mask"].bool()
    wanted = model(**inputs, use_cache=False).logits[there]
    shapes = rows_of(model)
    with models.share_prompt(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = torch.compile(model, backend="eager")(**inputs, use_cache=False).logits[there]
        assert shapes[-1][0] == 1
        torch._dynamo.reset()
        model.model.layers[0].compile(backend="eager")
        layer = model(**inputs, use_cache=False).logits[there]
        assert shapes[-1][0] == 1
    torch._dynamo.reset()
    torch.testing.assert_close(whole, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer, wanted, rtol=1e-5, atol=1e-5)


# Refusals


def refused(family: str, **options):
    return lambda: build(family, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=V, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
            ),
            "model: T5ForConditionalGeneration has an encoder",
        ),
        (
            lambda: get_peft_model(build(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
            "model: PeftModelForCausalLM has prompt learning",
        ),
        (refused("falcon_h1"), "model: FalconH1ForCausalLM has recurrent layers hybrid"),
        (refused("mamba", state_size=4), "model: MambaForCausalLM has recurrent layers"),
        (
            refused("gpt_neo", num_layers=2, attention_types=[[["global", "local"], 1]]),
            r"model: GPTNeoForCausalLM keeps a mask of its own \(h.1.attn.attention.bias\)",
        ),
        (
            lambda: FalconForCausalLM(
                FalconConfig(alibi=True, hidden_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=V)
            ),
            r"model: FalconForCausalLM biases attention by the distance in a row \(alibi\)",
        ),
        (refused("bloom"), "model: BloomForCausalLM takes no position_ids in BloomModel"),
        (lambda: torch.nn.Linear(2, 2), "model: Linear has no get_decoder"),
    ],
)
def test_a_model_that_has_no_shared_form_is_refused_and_left_alone(make, message):
    model = make()
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(ValueError, match=message), models.share_prompt(model):
        pass
    with pytest.warns(UserWarning, match=message):
        assert not models.patch_share_prompt(model, refuse="warn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not models.patch_share_prompt(model, refuse="warn")
    assert all(now.keys() == then.keys() for now, then in zip(map(vars, model.modules()), before))


def recurrent() -> torch.nn.Module:
    """A layer that passes something on from token to token, of which nothing tells."""
    model = build()
    model.model.layers[0].mlp.register_forward_hook(lambda _m, _a, out: out + 0.02 * out.cumsum(1))
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (recurrent, "model: LlamaModel gives other hidden states in shared rows"),
        (refused("openai-gpt"), "model: OpenAIGPTModel makes its masks elsewhere"),
    ],
)
def test_a_model_that_looks_at_rows_in_a_way_of_its_own_is_found_out_by_running_it(make, message):
    model, (inputs, _) = make().eval(), batch([(20, 4, 5)])
    wanted = model(**inputs)[0]
    with models.share_prompt(model), pytest.raises(ValueError, match=message):
        model(**inputs)
    with models.share_prompt(model, refuse="warn"):
        with pytest.warns(UserWarning, match=message):
            assert torch.equal(model(**inputs)[0], wanted)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**inputs)


def test_a_vision_language_model_is_refused_for_its_embeddings_come_from_outside_of_the_body():
    positions = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    sizes = {name: value for name, value in SIZES.items() if name != "initializer_range"}
    text = dict(rope_parameters=positions, **sizes)
    vision = dict(depth=1, embed_dim=16, num_heads=2, hidden_size=16, mlp_ratio=1)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision)).eval()
    inputs, _ = batch([(20, 4, 5)])
    message = r"inputs_embeds: got vectors, expected input_ids.*run it unshared \(refuse='warn'\) if it is a vision"
    with models.share_prompt(model), pytest.raises(ValueError, match=message):
        model(**inputs)
    assert all("forward" not in vars(module) for module in model.modules())
    wanted = model(**inputs).logits
    with models.share_prompt(model, refuse="warn"), pytest.warns(UserWarning, match="inputs_embeds: got vectors"):
        assert torch.equal(model(**inputs).logits, wanted)


def test_attention_that_takes_no_mask_is_refused_also_when_it_comes_later():
    model, (inputs, _) = build(), batch([(20, 4, 5)])
    message = "model: got attn_implementation 'flash_attention_2', expected one that takes any mask"
    with models.share_prompt(model):
        model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match=message):
            model(**inputs)
    with pytest.raises(ValueError, match=message):
        models.patch_share_prompt(model)
    assert "forward" not in vars(model.model)


def shaped(**changes):
    """A change to inputs [4, T]."""
    return lambda inputs: {**inputs, **{name: change(inputs) for name, change in changes.items()}}


def holed(inputs):
    return inputs["attention_mask"].index_fill(1, torch.tensor([2]), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: {name: value[:3] for name, value in x.items()},
            r"input_ids: got shape \(3, 27\), expected \[2B, T\]",
        ),
        (shaped(attention_mask=holed), "attention_mask: got values that are not a mask of padding"),
        (
            shaped(attention_mask=lambda x: x["attention_mask"] * 2),
            "attention_mask: got values that are not a mask of p",
        ),
        (
            shaped(attention_mask=lambda x: torch.ones(4, 1, 27, 27)),
            r"attention_mask: got shape \(4, 1, 27, 27\), expected \[4, 27\]",
        ),
        (
            shaped(position_ids=lambda x: torch.arange(27).remainder(9).expand(4, -1)),
            "position_ids: got positions that restart or jump within a row, expected .*pack sequences in rows without",
        ),
        (
            shaped(input_ids=lambda x: None, inputs_embeds=lambda x: torch.zeros(4, 27, 16)),
            "inputs_embeds: got vectors, expected input_ids",
        ),
        (
            shaped(cu_seq_lens_q=lambda x: torch.tensor([0, 27])),
            "cu_seq_lens_q: got boundaries which position_ids do not have",
        ),
        (shaped(output_hidden_states=lambda x: True), "output_hidden_states: got True, expected False"),
    ],
)
def test_inputs_that_have_no_shared_form(change, message):
    model, (inputs, _) = build(), batch([(20, 4, 5), (18, 3, 2)])
    changed = change(inputs)
    with models.share_prompt(model), pytest.raises(ValueError, match=message):
        model(**changed)
    assert "forward" not in vars(model.model)
    wanted = model(**changed)
    with models.share_prompt(model, refuse="warn"), pytest.warns(UserWarning, match=message):
        found = model(**changed)
    assert torch.equal(found.logits, wanted.logits) and found.keys() == wanted.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shaped(attention_mask=lambda x: {"full_attention": None}), "attention_mask: got dict, expected a tensor"),
        (
            shaped(position_ids=lambda x: torch.zeros(3, 4, 27).long()),
            r"position_ids: got shape \(3, 4, 27\), expected \[4, 27\], one for each token, or \[1, 27\]",
        ),
    ],
)
def test_inputs_of_another_form_than_this_model_takes(change, message):
    model, (inputs, _) = build(), batch([(20, 4, 5), (18, 3, 2)])
    with models.share_prompt(model), pytest.raises(ValueError, match=message):
        model(**change(inputs))


def test_router_statistics_would_count_a_shared_token_once_and_are_refused():
    model, (inputs, labels) = build("mixtral", output_router_logits=True), batch([(20, 4, 5)])
    with pytest.raises(ValueError, match="output_router_logits: got True, expected False"):
        models.model_logprob(model, inputs, labels, share_prompt=True)
    assert "forward" not in vars(model.model)
    inputs["output_router_logits"] = False
    models.model_logprob(model, inputs, labels, share_prompt=True)


def test_answers_are_a_number_of_blocks():
    model, (inputs, labels) = build(), batch([(20, 4, 5), (18, 3, 2)])
    for answers, kind, message in (
        (1, ValueError, "answers: got 1, expected 2 or more"),
        (True, TypeError, "answers: got bool True, expected an int"),
        (2.0, TypeError, "answers: got float 2.0, expected an int"),
    ):
        with pytest.raises(kind, match=message):
            models.patch_share_prompt(model, answers=answers)
    with pytest.raises(ValueError, match="answers: got 4 without share_prompt"):
        models.model_logprob(model, inputs, labels, answers=4)
    assert "forward" not in vars(model.model)
    message = r"input_ids: got shape \(4, 27\), expected \[3B, T\], rows \[answers 1; ...; answers 3\]"
    with pytest.raises(ValueError, match=message):
        models.model_logprob(model, inputs, labels, share_prompt=True, answers=3)
    with models.share_prompt(model, answers=4):
        with pytest.raises(ValueError, match="answers: got 2, expected 4, for which the model is patched"):
            models.model_logprob(model, inputs, labels, share_prompt=True)
        models.model_logprob(model, inputs, labels)


def test_options_have_two_values():
    model, (inputs, labels) = build(), batch([(20, 4, 5)])
    with pytest.raises(ValueError, match="refuse: got str 'never', expected 'error' or 'warn'"):
        models.patch_share_prompt(model, refuse="never")
    with pytest.raises(TypeError, match="share_prompt: got str 'yes', expected True or False"):
        models.model_logprob(model, inputs, labels, share_prompt="yes")
    assert share_support.IMPLEMENTATIONS == ("eager", "sdpa", "flex_attention")
