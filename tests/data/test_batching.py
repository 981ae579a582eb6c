"""Batches: one order whatever the layout and the format, and the loss of a model that both layouts give."""

from __future__ import annotations

import itertools

import families
import pytest
import tiny
import torch

from dpofast import data
from dpofast.integrations.models import model_dpo_loss

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    made = tiny.tokenizer()
    made.chat_template = TEMPLATE
    return made


def encoded(tokenizer, rows) -> list[data.Encoded]:
    return [data.Encoder(tokenizer)(record) for record in data.read(rows)]


def same(a: data.Batch, b: data.Batch) -> bool:
    def equal(x, y):
        return x.equal(y) if isinstance(x, torch.Tensor) else x == y

    return all(equal(x, vars(b)[name]) for name, x in vars(a).items() if name != "where")


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


IN_FORMATS = {
    "trl": lambda p, c, r: {"prompt": [user(p)], "chosen": [said(c)], "rejected": [said(r)]},
    "trl-implicit": lambda p, c, r: {"chosen": [user(p), said(c)], "rejected": [user(p), said(r)]},
    "numbered": lambda p, c, r: {"prompt": [user(p)], "chosen": [said(c)], "rejected1": [said(r)]},
    "ranked": lambda p, c, r: {"prompt": [user(p)], "answers": [c, r]},
    "openai": lambda p, c, r: {
        "input": {"messages": [user(p)]}, "preferred_output": [said(c)], "non_preferred_output": [said(r)]
    },
    "sharegpt": lambda p, c, r: {
        "conversations": [{"from": "human", "value": p}],
        "chosen": {"from": "gpt", "value": c},
        "rejected": {"from": "gpt", "value": r},
    },
    "alpaca": lambda p, c, r: {"instruction": p, "input": "", "chosen": c, "rejected": r},
    "axolotl": lambda p, c, r: {"messages": [user(p)], "chosen": said(c), "rejected": said(r)},
    "axolotl-intel": lambda p, c, r: {"system": "", "question": p, "chosen": c, "rejected": r},
    "axolotl-ultra": lambda p, c, r: {"prompt": p, "chosen": [user(p), said(c)], "rejected": [user(p), said(r)]},
}  # fmt: skip


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_the_same_data_in_ten_formats_gives_the_same_batches(tokenizer, layout):
    batches = {}
    for name, row in IN_FORMATS.items():
        rows = [row(pair["prompt"].strip(), pair["chosen"], pair["rejected"]) for pair in tiny.pairs(5)]
        assert data.read(rows).format == name
        batches[name] = data.collate(encoded(tokenizer, rows), pad_token_id=0, layout=layout)
    assert batches["trl"].input_ids.numel() > 60
    assert [name for name, batch in batches.items() if not same(batch, batches["trl"])] == []


def test_text_in_three_formats_gives_the_same_batches(tokenizer):
    rows = [
        {"prompt": pair["prompt"].strip(), **{side: " " + pair[side] for side in ("chosen", "rejected")}}
        for pair in tiny.pairs(5)
    ]
    implicit = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]
    ranked = [{"prompt": row["prompt"], "answers": [row["chosen"], row["rejected"]]} for row in rows]
    wanted, *others = (data.collate(encoded(tokenizer, each), pad_token_id=0) for each in (rows, implicit, ranked))
    assert all(same(other, wanted) for other in others)


def test_batches_are_those_of_the_examples(tokenizer):
    rows = tiny.pairs(6)
    batch, wanted = data.collate(encoded(tokenizer, rows), pad_token_id=0), tiny.collate(rows)
    assert batch.input_ids.equal(wanted["input_ids"]) and batch.targets.equal(wanted["labels"])
    assert batch.attention_mask.equal(wanted["attention_mask"])


def test_packed_sequences_are_the_padded_ones(tokenizer):
    each = encoded(tokenizer, tiny.pairs(4))
    padded, packed = (data.collate(each, pad_token_id=0, layout=layout) for layout in ("padded", "packed"))
    bounds = packed.cu_seqlens.tolist()
    assert packed.cu_seqlens.dtype == torch.int32 and len(bounds) == 9
    for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
        row = padded.attention_mask[i].bool()
        assert packed.input_ids[0, begin:end].equal(padded.input_ids[i][row])
        assert packed.targets[0, begin:end].equal(padded.targets[i][row])
        assert packed.position_ids[0, begin:end].tolist() == list(range(end - begin))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("share_prompt", [False, True])
def test_a_batch_is_what_a_models_loss_takes(tokenizer, share_prompt):
    model, reference = families.build(), families.build(seed=1)
    rows = tiny.pairs(4)
    batch = data.collate(encoded(tokenizer, rows), pad_token_id=0)
    other = tiny.collate(rows)
    labels = other.pop("labels")
    found = model_dpo_loss(model, batch.inputs, batch.targets, ref_model=reference, share_prompt=share_prompt)
    wanted = model_dpo_loss(model, other, labels, ref_model=reference)
    torch.testing.assert_close(found.loss, wanted.loss)
    assert found.loss != 0


def test_ragged_lists_come_in_blocks_and_say_whose_they_are(tokenizer):
    rows = [
        {"prompt": "w1 ", "answers": ["w2", "w3"], "scores": [0.5, 2]},
        {"prompt": "w4 ", "answers": ["w5", "w6", "w7"], "scores": [3, 1, 2]},
    ]
    batch = data.collate(encoded(tokenizer, rows), pad_token_id=0)
    words = [tiny.WORDS[ids[1]] for ids in batch.input_ids.tolist()]
    assert words == ["w3", "w5", "w2", "w7", "w6"]
    assert batch.record.tolist() == [0, 1, 0, 1, 1] and batch.sizes.tolist() == [2, 3]
    assert batch.scores.tolist() == [2, 3, 0.5, 2, 1]


def test_numbers_of_records_come_along(tokenizer):
    rows = [
        {"prompt": "w1 ", "completion": "w2", "label": True, "weight": 2.0, "margin": None},
        {"prompt": "w1 ", "completion": "w3", "label": False, "weight": None, "margin": 0.5},
    ]
    batch = data.collate(encoded(tokenizer, rows), pad_token_id=0).to("cpu")
    assert batch.labels.tolist() == [True, False]
    assert batch.weights.tolist() == [2, 1] and batch.margins.tolist() == [0, 0.5]
    assert batch.scores is None and batch.where == ("rows:1", "rows:2")
    plain = data.collate(encoded(tokenizer, tiny.pairs(2)), pad_token_id=0)
    assert plain.labels is plain.weights is plain.margins is None


def test_sizes_stay_on_the_cpu_and_all_else_moves(tokenizer):
    batch = data.collate(encoded(tokenizer, tiny.pairs(2)), pad_token_id=0).to("meta")
    tensors = {name: x.device.type for name, x in vars(batch).items() if isinstance(x, torch.Tensor)}
    assert tensors.pop("sizes") == "cpu" and set(tensors.values()) == {"meta"}


def test_scores_are_those_of_all_records_or_none(tokenizer):
    scored = {"prompt": "w1 ", "answers": ["w2", "w3"], "scores": [2, 1]}
    each = [*encoded(tokenizer, [scored]), *encoded(tokenizer, tiny.pairs(1))]
    assert data.collate(each, pad_token_id=0).scores is None
    assert data.collate(each[:1], pad_token_id=0).scores.tolist() == [2, 1]


def test_tokens_that_do_not_count_have_no_target():
    one = data.Encoded((7, 8), (data.Answer((1, 2, 3), (True, False, True)),))
    assert data.collate([one], pad_token_id=0).targets.tolist() == [[-100, -100, 1, -100, 3]]


def test_wrong_arguments_are_named(tokenizer):
    each = encoded(tokenizer, tiny.pairs(1))
    with pytest.raises(ValueError, match="encoded: got no record"):
        data.collate([], pad_token_id=0)
    with pytest.raises(ValueError, match="layout: got 'flat'"):
        data.collate(each, pad_token_id=0, layout="flat")
    with pytest.raises(ValueError, match="pad_token_id: got NoneType None, expected a token id"):
        data.collate(each, pad_token_id=None)
    labelled = encoded(tokenizer, [{"prompt": "w1 ", "completion": "w2", "label": True}])
    with pytest.raises(ValueError, match="encoded: got rows:1 without a label"):
        data.collate([*labelled, *each], pad_token_id=0)
