"""Token ids of records: TRL's own, the seam, the turns that count, and what truncation takes and says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dpofast import data

TEMPLATE = (
    "{% if tools %}[tools {{ tools | length }}]{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}[{{ call.function.name }}]{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<eos>", "<bos>", "<|im_start|>", "<|im_end|>"]
PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
REASONS = dict(
    re.findall(r"^\| ([^|`]+) \| `(.+)` \|$", PAGE.partition("| record, met by its token ids |")[2], re.MULTILINE)
)
MERGES = [("Ġ", "a"), ("b", "c"), (".", "Ċ"), ("o", "u"), ("ou", "t")]


def bytes_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges, one of which joins "b" to "c"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*SPECIAL, *alphabet, *("".join(pair) for pair in MERGES)]
    bpe = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, MERGES))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    if bos:
        bpe.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        additional_special_tokens=SPECIAL[3:],
    )
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return bytes_tokenizer()


def text(tokenizer, ids) -> str:
    return tokenizer.decode(list(ids))


def counted(tokenizer, answer: data.Answer) -> str:
    return text(tokenizer, [i for i, yes in zip(*answer) if yes])


def turn(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


def talk(*turns: tuple[str, str]) -> list[dict]:
    return [turn(*each) for each in turns]


ASKED = talk(("system", "short"), ("user", "2 + 2?"))
TEXTS = [
    {"prompt": "ab", "chosen": "cd", "rejected": "xd"},  # b and c are one token
    {"prompt": "ab", "chosen": "xd", "rejected": "cd"},
    {"prompt": "The sum is.", "chosen": "\nfour", "rejected": " a lot"},
    {"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5<eos>"},
    {"chosen": "2 + 2 is bc", "rejected": "2 + 2 is bd"},
    {"prompt": "é", "chosen": "ü \U0001f600", "rejected": "ö"},
]
TALKS = [
    {"prompt": ASKED, "chosen": talk(("assistant", "four")), "rejected": talk(("assistant", "five"))},
    {"prompt": ASKED, "chosen": talk(("assistant", "out")), "rejected": talk(("assistant", "ou"))},
    {"chosen": [*ASKED, turn("assistant", "4")], "rejected": [*ASKED, turn("assistant", "5")]},
    {
        "prompt": [*ASKED, turn("assistant", "4"), turn("user", "sure?")],
        "chosen": talk(("assistant", "yes")),
        "rejected": talk(("assistant", "no")),
    },
]


def of_trl(tokenizer, rows, max_length=None, tmp_path="."):
    trl = pytest.importorskip("trl", minversion="1.16")
    import training
    from datasets import Dataset

    arguments = training.arguments(tmp_path, 1, max_length=max_length)
    trainer = trl.DPOTrainer(
        model=tiny.model(), ref_model=tiny.model(), args=trl.DPOConfig(**arguments), processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
    )  # fmt: skip
    dataset = trainer.train_dataset
    return trainer, [{name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in dataset]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("rows", [[*TEXTS[:4], TEXTS[5]], [TEXTS[4]], [*TALKS[:2], TALKS[3]], [TALKS[2]]])
@pytest.mark.usefixtures("quick")
def test_ids_are_those_of_trls_dpo_trainer(rows, bos, tmp_path):
    tokenizer = bytes_tokenizer(bos)
    _, theirs = of_trl(tokenizer, rows, tmp_path=tmp_path)
    encode = data.Encoder(tokenizer)
    assert len(theirs) == len(rows)
    for record, wanted in zip(data.read(rows), theirs):
        found = encode(record)
        assert list(found.prompt) == wanted["prompt_ids"], record
        assert [list(answer.ids) for answer in found.answers] == [wanted["chosen_ids"], wanted["rejected_ids"]], record
        assert all(all(answer.counted) for answer in found.answers)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("max_length", [None, 9])
def test_batches_are_those_of_trls_collator(max_length, tokenizer, tmp_path):
    rows = [*TEXTS[:2], TEXTS[3]]
    trainer, theirs = of_trl(tokenizer, rows, max_length, tmp_path)
    wanted = trainer.data_collator(theirs)
    encode = data.Encoder(tokenizer, max_length=max_length)
    batch = data.collate(map(encode, data.read(rows)), pad_token_id=0)
    assert batch.input_ids.equal(wanted["input_ids"])
    assert batch.attention_mask.equal(wanted["attention_mask"])
    assert (batch.targets != -100).equal(wanted["completion_mask"].bool())


def of_trls_collator(rows: list[data.Encoded], mode: str, max_length: int) -> list[list[int]]:
    """What TRL's collator makes of records that nothing cut: the chosen ones, then the rejected ones."""
    collators = pytest.importorskip("trl.trainer.dpo_trainer")
    collate = collators.DataCollatorForPreference(pad_token_id=0, max_length=max_length, truncation_mode=mode)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    parts = [(row.prompt, *(answer.ids for answer in row.answers)) for row in rows]
    batch = collate([dict(zip(names, map(list, part))) for part in parts])
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]


def test_cutting_the_prompt_is_trls_keep_end_for_answers_of_one_length_that_leave_it_a_token(tokenizer):
    rows = list(data.read([{"prompt": "12345", "chosen": "678", "rejected": "876"}, TEXTS[1]]))
    wanted = of_trls_collator([*map(data.Encoder(tokenizer), rows)], "keep_end", 6)
    batch = data.collate(map(data.Encoder(tokenizer, max_length=6, truncation="prompt"), rows), pad_token_id=0)
    assert [ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask)] == wanted
    assert len(wanted[0]) == 6 < 5 + 4  # something was cut


def test_trls_keep_end_cuts_the_prompt_of_each_answer_and_the_beginning_of_a_long_one(tokenizer):
    record = data.normalise({"prompt": "12345", "chosen": "678", "rejected": "9"})
    (chosen, rejected), few = (
        of_trls_collator([data.Encoder(tokenizer)(record)], "keep_end", 7),
        data.Encoder(tokenizer, max_length=7, truncation="prompt")(record),
    )
    assert [text(tokenizer, ids) for ids in (chosen, rejected)] == ["345678<eos>", "123459<eos>"]
    assert [text(tokenizer, few.prompt + answer.ids) for answer in few.answers] == ["345678<eos>", "3459<eos>"]
    (chosen, _), least = (
        of_trls_collator([data.Encoder(tokenizer)(record)], "keep_end", 3),
        data.Encoder(tokenizer, max_length=3, truncation="prompt")(record),
    )
    assert text(tokenizer, chosen) == "78<eos>"
    assert text(tokenizer, least.prompt + least.answers[0].ids) == "567"


def test_a_token_across_the_seam_is_the_answers_and_the_whole_is_what_the_tokenizer_makes(tokenizer):
    record = data.normalise(TEXTS[0])
    assert len(tokenizer("bc")["input_ids"]) == 1  # there is something to see
    found = data.Encoder(tokenizer)(record)
    assert text(tokenizer, found.prompt) == "a" and found.seam == 1
    assert [text(tokenizer, answer.ids) for answer in found.answers] == ["bcd<eos>", "bxd<eos>"]
    for answer, given in zip(found.answers, record.answers):
        assert list(found.prompt + answer.ids) == [*tokenizer(record.prompt + given)["input_ids"], 1]
        assert all(answer.counted)
    assert data.Encoder(tokenizer)(data.normalise(TEXTS[3])).seam == 0


def test_the_earliest_answer_decides_the_seam_of_a_list(tokenizer):
    found = data.Encoder(tokenizer)(data.normalise({"prompt": "ab", "answers": ["x", "y", "c"]}))
    assert [text(tokenizer, answer.ids) for answer in found.answers] == ["bx<eos>", "by<eos>", "bc<eos>"]


def test_a_token_that_one_answer_joins_counts_in_all_of_them():
    seamed = bytes_tokenizer()
    seamed.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}b{% endif %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}b{% endif %}"
    )
    found = data.Encoder(seamed)(data.normalise({"prompt": talk(("user", "a")), "chosen": "x", "rejected": "c"}))
    assert text(seamed, found.prompt) == "a" and found.seam == 1
    assert [counted(seamed, answer) for answer in found.answers] == ["bx", "bc"]


def test_only_the_assistants_turns_count(tokenizer):
    call = turn("assistant", "look", tool_calls=[{"type": "function", "function": {"name": "add", "arguments": {}}}])
    chosen = [
        call,
        turn("tool", "result 4"),
        turn("assistant", "it is 4"),
        turn("user", "ok?"),
        turn("assistant", "yes"),
    ]
    found = data.Encoder(tokenizer)(data.normalise({"prompt": ASKED, "chosen": chosen, "rejected": "five"}))
    assert text(tokenizer, found.answers[0].ids).count("result 4") == 1
    assert counted(tokenizer, found.answers[0]) == "look[add]<|im_end|>\nit is 4<|im_end|>\nyes<|im_end|>\n"
    assert counted(tokenizer, found.answers[1]) == "five<|im_end|>\n"


def test_an_answer_that_begins_with_a_tool_does_not_count_it(tokenizer):
    chosen = [turn("tool", "result"), turn("assistant", "done")]
    found = data.Encoder(tokenizer)(data.normalise({"prompt": ASKED, "chosen": chosen, "rejected": "five"}))
    assert counted(tokenizer, found.answers[0]) == "done<|im_end|>\n"


@pytest.mark.parametrize("tools", [[{"name": "add"}, {"name": "sub"}], '[{"name": "add"}, {"name": "sub"}]'])
def test_tools_reach_the_template(tokenizer, tools):
    found = data.Encoder(tokenizer)(data.normalise({**TALKS[0], "tools": tools}))
    assert text(tokenizer, found.prompt).startswith("[tools 2]<|im_start|>system\nshort")


def test_truncation_takes_the_end_of_answers_and_says_how_much(tokenizer):
    record = data.normalise({"prompt": "12345", "chosen": "678", "rejected": "9"})
    found = data.Encoder(tokenizer, max_length=7)(record)
    assert [text(tokenizer, answer.ids) for answer in found.answers] == ["67", "9<eos>"]
    assert found.cut == data.Cut(0, (2, 0)) and len(found.prompt) == 5
    assert data.Encoder(tokenizer, max_length=9)(record).cut is None


def test_truncation_of_the_prompt_takes_its_beginning_first(tokenizer):
    record = data.normalise({"prompt": "12345", "chosen": "678", "rejected": "9"})
    found = data.Encoder(tokenizer, max_length=7, truncation="prompt")(record)
    assert text(tokenizer, found.prompt) == "345" and found.cut == data.Cut(2, (0, 0))
    assert [text(tokenizer, answer.ids) for answer in found.answers] == ["678<eos>", "9<eos>"]
    least = data.Encoder(tokenizer, max_length=3, truncation="prompt")(record)
    assert text(tokenizer, least.prompt) == "5" and least.cut == data.Cut(4, (2, 0))


REFUSED = {
    "truncated to nothing": ({"prompt": "12345", "chosen": "6", "rejected": "7"}, 5),
    "truncated to the same": ({"prompt": "1", "chosen": "666", "rejected": "667"}, 3),
    "a prompt without a token": ({"prompt": "", "chosen": "6", "rejected": "7"}, None),
    "a prompt that a tokenizer joins to its answers": ({"prompt": "b", "chosen": "c", "rejected": "7"}, None),
    "messages that a template refuses": (TALKS[0], None),
}


def test_every_refused_record_on_the_page_is_tried():
    assert set(REASONS) == set(REFUSED)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refused_record_is_an_error_with_the_reason_on_the_page(kind):
    row, length = REFUSED[kind]
    strict = bytes_tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(data.BadRow) as caught:
        data.Encoder(strict, max_length=length)(data.normalise(row, where="f:9"))
    assert str(caught.value) == f"data: f:9: {REASONS[kind]}"


def test_what_an_encoder_refuses_is_skipped_counted_and_listed(tokenizer, tmp_path):
    path = tmp_path / "x.jsonl"
    rows = [{"prompt": "1" * n, "chosen": "6", "rejected": "7"} for n in (4, 5, 2, 9, 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [rows[0], "no row", *rows[1:]]))
    encode = data.Encoder(tokenizer, max_length=5)
    records = data.read(path, on_error="skip", check=encode)
    assert [len(record.prompt) for record in records] == [4, 2, 1] == [len(records[i].prompt) for i in range(3)]
    assert [(line, reason.partition(":")[0]) for _, line, reason in records.skipped] == [
        (2, "row"), (3, "answers[0]"), (5, "answers[0]")
    ]  # fmt: skip
    assert len(records) == 3 and len(list(data.shuffle(records))) == 3
    with pytest.raises(data.BadRow, match="rows:2: answers.0.: got no token that counts with max_length=5"):
        list(data.read(rows, check=encode))
    with pytest.raises(TypeError, match="check: got int 5, expected None or a function of a record"):
        data.read(path, check=5)


def test_what_a_tokenizer_lacks_is_named(tokenizer):
    bare = bytes_tokenizer()
    bare.chat_template = None
    with pytest.raises(ValueError, match="tokenizer: has no chat template"):
        data.Encoder(bare)(data.normalise(TALKS[0]))
    bare.eos_token = None
    with pytest.raises(ValueError, match="tokenizer: has no EOS token"):
        data.Encoder(bare)(data.normalise(TEXTS[0]))
    with pytest.raises(ValueError, match="max_length: got 1, expected None or an int >= 2"):
        data.Encoder(tokenizer, max_length=1)
    with pytest.raises(ValueError, match="truncation: got 'middle'"):
        data.Encoder(tokenizer, truncation="middle")
    with pytest.raises(TypeError, match="tokenizer: got str 'gpt2'"):
        data.Encoder("gpt2")
