"""The prompt once per pair: hidden states, log-probabilities and gradients are those of the model run as it is."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from families import V, build
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import T5Config, T5ForConditionalGeneration

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
# tokens of prompt, chosen and rejected
PAIRS = [(9, 4, 5), (0, 3, 4), (1, 5, 2), (7, 0, 3), (6, 1, 1), (8, 3, 0), (2, 1, 4)]


def batch(
    pairs: list[tuple[int, int, int]] = PAIRS, left: bool = False, positions: bool = False
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs and labels; answers of the same length but one are the same."""
    generator = torch.Generator().manual_seed(1)
    chosen, rejected = [], []
    for prompt, c, r in pairs:
        tokens = torch.randint(3, V, (prompt + max(c, r),), generator=generator)
        chosen.append(tokens[: prompt + c])
        rejected.append(tokens[: prompt + r].clone())
        if c != r or c == 1:
            rejected[-1][prompt : prompt + 1] = tokens[prompt : prompt + 1] % (V - 4) + 3  # another one
    rows, width = [*chosen, *rejected], max(map(len, [*chosen, *rejected])) + 2
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        here = slice(width - len(row), width) if left else slice(0, len(row))
        prompt = here.start + max(1, pairs[i % len(pairs)][0])  # nothing predicts a first token, but padding
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
    layers[-1].register_forward_hook(lambda _m, _a, out: shapes.append(tuple((out if torch.is_tensor(out) else out[0]).shape)))
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
    return hidden[-1][inputs["attention_mask"].bool()], logps.detach(), gradients(model)


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


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["gpt2", "phi", "gpt_neox"])  # whose own code has no fp32 in it, but for angles
def test_in_fp64_they_are_the_same_to_ten_digits(family, implementation, always):
    model = build(family, attn_implementation=implementation).double()
    inputs, labels = batch()
    wanted = run(model, inputs, labels)
    with models.share_prompt(model):
        assert_same(run(model, inputs, labels), wanted, 1e-10)
