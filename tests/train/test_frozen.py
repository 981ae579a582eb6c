"""`cache_frozen`: frozen layers run once for each row, and a training is the same with what is kept of them."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import tiny
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("rich")

from families import FAMILIES, build
from train import killed, tiny_run
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from dpofast.integrations.models import share_prompt
from dpofast.train import log
from dpofast.train.config import from_dict
from dpofast.train.dry_run import dry_run
from dpofast.train.frozen import FileStore, FrozenLayers, _paths
from dpofast.train.run import train

pytestmark = pytest.mark.usefixtures("quick")
WHAT = {"model": "m", "layers": 1}


def config(folder, out="run", **others):
    options = {"last_layers": 1, "cache_frozen": "fp32", **others}
    return from_dict(tiny_run.options(folder, **options) | {"out": str(folder / out)}, "the test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("frozen")


def ids_and_mask(rows, width, seed=0):
    """Rows of several lengths, padded right."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(width) < torch.arange(width, width - rows, -1)[:, None]).long()
    return torch.randint(2, len(tiny.WORDS), (rows, width), generator=generator), mask


def hidden_of(model, ids, mask):
    """The body's hidden states where there are tokens."""
    return model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)[0][mask.bool()]


def runs_of(monkeypatch):
    """How many rows a frozen layer, the first, has run for."""
    counted, forward = [], LlamaDecoderLayer.forward

    def counting(self, hidden_states, *args, **kwargs):
        if self.self_attn.layer_idx == 0:
            counted.append(len(hidden_states))
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counting)
    return counted


@pytest.mark.parametrize("family", FAMILIES)
def test_the_states_of_a_row_are_the_models_when_it_is_new_and_when_it_comes_again(family):
    model = build(family, num_hidden_layers=3, **({"n_layer": 3} if family == "gpt2" else {}))
    ids, mask = ids_and_mask(3, 9)
    longer, more = ids_and_mask(3, 12)
    longer[1, :8], more[1] = ids[1, :8], mask[1].new_tensor([1] * 8 + [0] * 4)  # a known row, padded otherwise
    with torch.no_grad():
        want, want_longer = hidden_of(model, ids, mask), hidden_of(model, longer, more)
        FrozenLayers(model, 1, "fp32", {})
        for _ in range(2):
            torch.testing.assert_close(hidden_of(model, ids, mask), want, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(hidden_of(model, longer, more), want_longer, rtol=1e-5, atol=1e-6)


def test_frozen_layers_run_for_batches_with_a_new_row_only(monkeypatch):
    counted = runs_of(monkeypatch)
    model = build(num_hidden_layers=3)
    FrozenLayers(model, 2, "fp32", {})
    counted.clear()
    ids, mask = ids_and_mask(3, 9)
    for part in (slice(0, 2), slice(0, 2), slice(1, 3), slice(0, 3), slice(2, 3)):
        hidden_of(model, ids[part], mask[part])
    assert counted == [2, 2]
    hidden_of(model, ids, torch.ones_like(mask))  # the same tokens and more
    hidden_of(model, ids.flip(0), mask.flip(0))  # in another order
    assert counted == [2, 2, 3]


def test_the_same_tokens_in_other_places_are_another_row(monkeypatch):
    counted = runs_of(monkeypatch)
    model = build()
    FrozenLayers(model, 1, "fp32", {})
    counted.clear()
    ids = torch.tensor([[3, 4, 5]])
    for places in ([0, 1, 2], [0, 1, 3], [0, 1, 2]):
        model(input_ids=ids, position_ids=torch.tensor([places]), use_cache=False)
    assert counted == [1, 1]


@pytest.mark.parametrize("answers", (2, 3))
def test_a_row_with_the_prompt_once_is_known_by_its_sequences(monkeypatch, answers):
    """Whatever runs first, shared rows or the sequences one by one, the other finds all that it needs."""
    counted = runs_of(monkeypatch)
    ids = torch.randint(2, len(tiny.WORDS), (2 * answers, 12))
    ids[2:, :8] = ids[:2, :8].repeat(answers - 1, 1)
    want = build()(input_ids=ids).logits
    for first in ("shared", "alone"):
        model = build()
        with share_prompt(model, answers=answers):
            model(input_ids=ids)  # its proof
        FrozenLayers(model, 1, "fp32", {})
        counted.clear()
        for way in (first, "shared", "alone"):
            with share_prompt(model, answers=answers) if way == "shared" else nullcontext():
                torch.testing.assert_close(model(input_ids=ids).logits, want, rtol=1e-4, atol=1e-5)
        assert counted == [2 if first == "shared" else 2 * answers]


def test_a_row_of_padding_alone_is_no_sequence():
    model = build()
    FrozenLayers(model, 1, "fp32", {})
    ids, mask = ids_and_mask(2, 5)
    mask[1] = 0
    assert hidden_of(model, ids, mask).isfinite().all()


@pytest.mark.parametrize(
    ("positions", "sequences"),
    [
        ([], [[]]),
        ([0, 1, 2], [[0, 1, 2]]),
        ([4, 5, 6], [[0, 1, 2]]),
        ([0, 1, 2, 3, 2, 3, 4], [[0, 1, 2, 3], [0, 1, 4, 5, 6]]),
        ([5, 6, 7, 6, 6], [[0, 1, 2], [0, 3], [0, 4]]),
        ([0, 1, 0, 1, 2], [[0, 1], [2, 3, 4]]),  # packed
        ([0, 1, 0, 1, 1, 2], [[0, 1, 2, 3, 4, 5]]),  # no form that is known
        ([0, 1, 3], [[0, 1, 2]]),
    ],
)
def test_sequences_of_a_row_are_found_by_positions(positions, sequences):
    real = torch.arange(len(positions)) + 2  # after padding
    padded = torch.tensor([0, 0, *positions])
    assert [(places - 2).tolist() for places in _paths(padded, real)] == sequences


def test_frozen_layers_run_in_the_precision_that_was_asked_for():
    ids = torch.tensor([[3, 4, 5]])
    exact, short, under = build(), build(), build()
    for model, precision in ((exact, "fp32"), (short, "bf16"), (under, "fp32")):
        FrozenLayers(model, 1, precision, {})
    with torch.no_grad():
        want, found = (model.base_model(input_ids=ids)[0] for model in (exact, short))
        with torch.autocast("cpu", torch.bfloat16):
            states = []
            under.model.layers[1].register_forward_pre_hook(lambda _, args: states.append(args[0]))
            exact.model.layers[1].register_forward_pre_hook(lambda _, args: states.append(args[0]))
            under.base_model(input_ids=ids)
        exact.base_model(input_ids=ids)
    assert torch.equal(*states)
    assert 1e-5 < (found - want).abs().max() < 0.1


def test_generation_and_embeddings_go_the_whole_way(monkeypatch):
    model, ids = build(), torch.tensor([[3, 4, 5]])
    wanted = model.generate(ids, max_new_tokens=5, do_sample=False)
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    FrozenLayers(model, 1, "fp32", {})
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), wanted)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, embedded)


def test_layers_that_hand_on_more_than_states_are_refused():
    model = build()
    first, last = model.model.layers
    first.register_forward_pre_hook(lambda module, args: setattr(last, "seen", args[0]))  # as of keys that are shared
    first.self_attn.register_forward_hook(lambda module, args, output: setattr(last, "seen", output[0]))
    last.register_forward_pre_hook(lambda module, args: (args[0] + last.seen, *args[1:]))
    with pytest.raises(ValueError, match="cache_frozen: got 'fp32', .* layers of LlamaModel hand more"):
        FrozenLayers(model, 1, "fp32", {})


# Trainings


def numbers(folder):
    entries = log.read(folder / "log.jsonl")
    return [{name: x for name, x in entry.items() if name not in killed.TIMINGS} for entry in entries]


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"share_prompt": True},
        {"lora_rank": 2, "gradient_checkpointing": True},
        {"precision": "bf16", "cache_frozen": "bf16"},
        {"loss_type": ["ipo", "sft"], "micro_batch": 1},
        {"loss_type": ["orpo"], "learning_rate": 1e-3},
    ],
    ids=str,
)
def test_a_training_is_the_same_and_runs_frozen_layers_for_each_row_once(folder, monkeypatch, others):
    counted = runs_of(monkeypatch)
    out = f"plain{abs(hash(str(others)))}"
    train(config(folder, out, **others | {"cache_frozen": ""}))
    plain = sum(counted)
    counted.clear()
    train(config(folder, out + "cached", **others))
    near = 3e-2 if "precision" in others else 1e-4  # rows meet others in a batch, and round otherwise in bf16
    for found, wanted in zip(numbers(folder / (out + "cached")), numbers(folder / out), strict=True):
        assert found == pytest.approx(wanted, rel=near, abs=near)
    rows = 29 if "share_prompt" in others else 58
    more = 16 if "share_prompt" in others else 5  # what is run to learn of a model; pairs that are not shared
    assert rows < sum(counted) <= rows + more < plain


def test_a_run_that_is_killed_and_resumed_has_the_same_bits(folder):
    train(config(folder, "whole"))
    for seconds in (0.2, 0.4):
        killed.killed(config(folder, "parts", resume=True), seconds)
    train(config(folder, "parts", resume=True))
    killed.expect_same(killed.result(folder / "parts"), killed.result(folder / "whole"))


@pytest.mark.parametrize("others", [{"last_layers": 0}, {"dropout": True}, {"shard": True}], ids=str)
def test_what_would_change_frozen_states_is_refused(folder, others):
    with pytest.raises(
        ValueError, match="cache_frozen: got 'fp32', expected last_layers beside it, and neither dropout"
    ):
        config(folder, **others)


def test_states_of_another_model_are_refused(folder, tmp_path):
    train(config(folder, "kept"))
    index = folder / "kept" / "frozen-0.index"
    first, _, rest = index.read_bytes().partition(b"\n")
    index.write_bytes(json.dumps(json.loads(first) | {"model": "other"}).encode() + b"\n" + rest)
    with pytest.raises(ValueError, match="cache_frozen: .*frozen-0.index was made with another model"):
        train(config(folder, "kept", resume=True))


def test_a_dry_run_knows_that_training_skips_frozen_layers(folder, tmp_path, monkeypatch):
    counted = runs_of(monkeypatch)
    text = dry_run(config(folder, "dry"))
    assert "training     about" in text and not (folder / "dry").exists()
    assert sum(counted) < 30


# The file


def test_what_was_kept_is_there_when_the_file_is_opened_again(tmp_path):
    store = FileStore(tmp_path / "f.states", WHAT)
    store[b"a" * 16], store[b"b" * 16] = b"123", b"4567"
    again = FileStore(tmp_path / "f.states", WHAT)
    again[b"c" * 16] = b"89"
    assert [again[key * 16] for key in (b"c", b"b", b"a")] == [b"89", b"4567", b"123"]
    assert b"a" * 16 in again and b"d" * 16 not in again


@pytest.mark.parametrize("cut", [1, 4, 5])
def test_content_that_is_lost_is_not_known(tmp_path, cut):
    path = tmp_path / "f.states"
    store = FileStore(path, WHAT)
    store[b"a" * 16], store[b"b" * 16] = b"123", b"4567"
    path.write_bytes(path.read_bytes()[:-cut])
    again = FileStore(path, WHAT)
    assert (b"a" * 16 in again, b"b" * 16 in again) == (cut <= 4, False)
    again[b"c" * 16] = b"89012345"  # where b was
    again = FileStore(path, WHAT)
    assert (b"a" * 16 in again, b"b" * 16 in again) == (cut <= 4, False) and again[b"c" * 16] == b"89012345"


def test_content_that_the_index_does_not_know_is_passed_over(tmp_path):
    path = tmp_path / "f.states"
    FileStore(path, WHAT)[b"a" * 16] = b"123"
    path.write_bytes(path.read_bytes() + b"lost")
    FileStore(path, WHAT)[b"b" * 16] = b"4567"
    again = FileStore(path, WHAT)
    assert (again[b"a" * 16], again[b"b" * 16]) == (b"123", b"4567")
