"""`last_layers`: what is trained and what is not, that frozen layers cost no backward, and that bits stay the same."""

from __future__ import annotations

import pytest
import tiny
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("rich")

from families import FAMILIES, build
from peft import PeftModel
from safetensors.torch import load_file
from train import killed, tiny_run
from transformers import AutoModelForCausalLM

from dpofast.train import freezing, log, model
from dpofast.train.config import from_dict
from dpofast.train.run import train

pytestmark = pytest.mark.usefixtures("quick")


def config(folder, out="run", **others):
    return from_dict(tiny_run.options(folder, **{"last_layers": 1, **others}) | {"out": str(folder / out)}, "the test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ended runs of the last of two layers: of its weights, of a LoRA, and of its weights in bf16."""
    folder = tmp_path_factory.mktemp("last")
    for out, others in {"full": {}, "lora": {"lora_rank": 2}, "bf16": {"precision": "bf16"}}.items():
        train(config(folder, out, **others))
    return folder


def entering(policy, layer):
    """The states that a layer is given."""
    seen = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    policy(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_last_layer_is_made_of_is_frozen_and_nothing_else(family):
    policy = build(family)
    before, last = list(freezing.layers_of(policy).items())[-2:]
    freezing.freeze_below(policy, 1)
    assert not entering(policy, last[1]).requires_grad
    start = entering(policy, last[1])
    for name, x in policy.named_parameters():
        if name.startswith((before[0], last[0])):  # a mixture's experts too, whoever was asked
            assert x.requires_grad == name.startswith(last[0]), name
            continue
        kept = x.detach().clone()
        with torch.no_grad():
            x.add_(torch.randn_like(x))
            assert x.requires_grad == torch.equal(entering(policy, last[1]), start), name
            x.copy_(kept)
    policy(input_ids=torch.tensor([[3, 4, 5]])).logits.logsumexp(-1).sum().backward()
    assert not any(x.grad is not None for x in policy.parameters() if not x.requires_grad)


@pytest.mark.parametrize("count", (1, 2, 3))
def test_the_graph_begins_at_the_lowest_trained_layer(count):
    policy = build(num_hidden_layers=3)
    freezing.freeze_below(policy, count)
    needed = [entering(policy, layer).requires_grad for layer in policy.model.layers]
    assert needed == [i > 3 - count for i in range(3)]  # not where a frozen layer begins, nor the lowest trained one


@pytest.mark.parametrize("count", (4, 7))
def test_more_layers_than_there_are_is_refused(count):
    with pytest.raises(ValueError, match=rf"last_layers: got {count}, expected 1 to 3"):
        freezing.freeze_below(build(num_hidden_layers=3), count)


def test_a_run_leaves_what_is_below_as_it_was(folder):
    start = load_file(folder / "model" / "model.safetensors")
    end = load_file(folder / "full" / "last" / "model.safetensors")
    for name, weight in start.items():
        moved = not torch.equal(weight, end[name])
        assert moved == name.startswith(("model.layers.1.", "model.norm.", "lm_head.")), name


def test_adapters_sit_in_the_last_layers_alone(folder):
    found = load_file(folder / "lora" / "last" / "adapter_model.safetensors")
    assert found and all(".layers.1." in name for name in found)
    assert {name.split(".")[-3] for name in found} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    again = PeftModel.from_pretrained(base, folder / "lora" / "last")
    assert sum("lora_A" in name for name, _ in again.named_parameters()) == 7


@pytest.mark.parametrize("others", [{}, {"lora_rank": 2}], ids=["full", "lora"])
def test_computing_activations_twice_changes_no_bit(folder, others):
    out = f"twice{len(others)}"
    train(config(folder, out, gradient_checkpointing=True, **others))
    assert losses(folder / out) == losses(folder / ("lora" if others else "full"))


def losses(run):
    return [entry["loss"] for entry in log.read(run / "log.jsonl") if "loss" in entry]


def test_frozen_layers_in_bf16_have_the_bits_of_autocast(folder, monkeypatch):
    policy = model.trained(config(folder, precision="bf16"), None)
    dtypes = {name: x.dtype for name, x in policy.named_parameters()}
    halved = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert halved == {name for name in dtypes if ".layers.0." in name and "_proj" in name}
    monkeypatch.setattr(model, "halve_frozen_products", lambda _: None)
    train(config(folder, "autocast", precision="bf16"))
    assert losses(folder / "autocast") == losses(folder / "bf16")
    one, two = (load_file(folder / run / "last" / "model.safetensors") for run in ("bf16", "autocast"))
    assert all(torch.equal(one[name], two[name]) for name in one if name not in halved)


@pytest.mark.parametrize("others", [{}, {"precision": "bf16"}, {"lora_rank": 2, "lora_dropout": 0.3}], ids=str)
def test_a_run_that_is_resumed_has_the_same_bits(folder, others):
    whole, parts = f"whole{len(others)}", f"parts{len(others)}"
    train(config(folder, whole, **others))
    killed.killed(config(folder, parts, resume=True, **others), 0.4)
    train(config(folder, parts, resume=True, **others))
    killed.expect_same(killed.result(folder / parts), killed.result(folder / whole))


def test_the_number_of_layers_of_a_run_does_not_change(folder):
    with pytest.raises(ValueError, match="resume: .*last_layers: was 1, is 2"):
        train(config(folder, "full", last_layers=2, resume=True))


def test_all_layers_above_the_embeddings_is_less_than_all(folder):
    policy = model.trained(config(folder, last_layers=2), None)
    assert [name for name, x in policy.named_parameters() if not x.requires_grad] == ["model.embed_tokens.weight"]
    assert tiny.model().config.num_hidden_layers == 2
