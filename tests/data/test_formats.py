"""Each format becomes the record that it means, and the rows that the page shows are of the formats that it names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dpofast import data
from dpofast.data.formats import FORMATS

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
ROWS = re.findall(r"^\| `([\w-]+)`(?:, [\w ]+)? \| `(\{.*\})` \|$", PAGE, re.MULTILINE)
ASKED, SYSTEM = {"role": "user", "content": "2 + 2?"}, {"role": "system", "content": "Be short."}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


FOUR, FIVE = said("4"), said("5")


def test_the_page_has_a_row_of_every_format():
    assert {name for name, _ in ROWS} == set(FORMATS)


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_the_rows_on_the_page_are_of_the_format_that_it_says(name, row):
    row = json.loads(row)
    assert data.detect(row) == name
    record = data.normalise(row)
    texts = [answer.strip() if isinstance(answer, str) else answer[-1]["content"] for answer in record.answers]
    assert texts[0] == "4" and "4" not in texts[1:]
    assert "2 + 2" in (record.prompt if isinstance(record.prompt, str) else record.prompt[-1]["content"])
    assert record.label is (True if len(texts) == 1 else None)
    assert record.columns == {}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": [SYSTEM, ASKED], "chosen": [FOUR], "rejected": [FIVE]}, [SYSTEM, ASKED]),
        ({"chosen": [SYSTEM, ASKED, FOUR], "rejected": [SYSTEM, ASKED, FIVE]}, [SYSTEM, ASKED]),
        ({"messages": "2 + 2?", "chosen": "4", "rejected": FIVE}, [ASKED]),
        ({"question": "2 + 2?", "system": "Be short.", "chosen": "4", "rejected": "5"}, [SYSTEM, ASKED]),
        ({"question": "2 + 2?", "system": "", "chosen": "4", "rejected": "5"}, [ASKED]),
        (
            {"prompt": "2 + 2?", "system": "Be short.", "chosen": [ASKED, FOUR], "rejected": [ASKED, FIVE]},
            [SYSTEM, ASKED],
        ),
        (
            {"instruction": "2 + 2?", "input": "", "system": "Be short.", "chosen": "4", "rejected": "5"},
            [SYSTEM, ASKED],
        ),
        (
            {"instruction": "2 + 2?", "history": [["1 + 1?", "2"]], "chosen": "4", "rejected": "5"},
            [{"role": "user", "content": "1 + 1?"}, said("2"), ASKED],
        ),
        (
            {
                "conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "observation", "value": "four"}],
                "system": "Be short.",
                "chosen": {"from": "gpt", "value": "4"},
                "rejected": {"from": "gpt", "value": "5"},
            },
            [SYSTEM, ASKED, {"role": "tool", "content": "four"}],
        ),
        (
            {
                "prompt": [
                    {"role": "user", "content": [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]}
                ],
                "chosen": "4",
                "rejected": "5",
            },
            [ASKED],
        ),
    ],
)
def test_messages_are_what_a_format_means(row, prompt):
    record = data.normalise(row)
    assert list(record.prompt) == prompt
    assert record.answers == ((FOUR,), (FIVE,))


def test_columns_of_the_record_are_kept_and_nulls_are_absent():
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "weight": 2, "margin": -0.5, "source": "x", "label": None}
    record = data.normalise(row, where="file:3")
    assert (record.weight, record.margin, record.where, record.columns) == (2.0, -0.5, "file:3", {"source": "x"})
    scored = data.normalise({"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 4, "score_rejected": 1.5})
    assert scored.scores == (4.0, 1.5)


def test_rejected_answers_come_in_the_order_of_their_numbers_and_none_is_lost():
    row = {"prompt": "p", "chosen": "c", "rejected10": "x", "rejected_2": "b", "rejected": "a", "rejected3": None}
    assert data.normalise(row).answers == ("c", "a", "b", "x")
    assert data.normalise({"prompt": "p", "chosen": "c", "rejected": "a"}, "numbered").answers == ("c", "a")


def test_scored_answers_are_ordered_and_equal_scores_stay_as_they_came():
    record = data.normalise({"prompt": "p", "answers": ["a", "b", "c", "d"], "scores": [1, 3, 1, 2]})
    assert record.answers == ("b", "d", "a", "c") and record.scores == (3, 2, 1, 1)


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [("2 + 2 = 4", "2 + 2 = 5", "2 + 2 ="), ("x: good", "x: great", "x: g"), ("ab", "ac", "a")],
)
def test_an_implicit_prompt_is_trls(chosen, rejected, prompt):
    extract = pytest.importorskip("trl.data_utils").extract_prompt
    theirs = extract({"chosen": chosen, "rejected": rejected})
    record = data.normalise({"chosen": chosen, "rejected": rejected})
    assert (record.prompt, *record.answers) == (theirs["prompt"], theirs["chosen"], theirs["rejected"])
    assert record.prompt == prompt


def test_an_answer_with_calls_of_tools_is_not_empty():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    record = data.normalise(
        {"prompt": [ASKED], "chosen": [call, {"role": "tool", "content": "4"}, FOUR], "rejected": [FIVE]}
    )
    assert record.answers[0][0]["tool_calls"] == call["tool_calls"] and len(record.answers[0]) == 3


def test_openais_tools_reach_the_template():
    row = json.loads(dict(ROWS)["openai"])
    row["input"]["tools"] = [{"name": "add"}]
    assert data.normalise(row).columns == {"tools": [{"name": "add"}]}


def test_a_format_that_is_given_must_be_known():
    with pytest.raises(ValueError, match="format: got 'csv', expected None or one of openai, "):
        data.normalise({}, "csv")
    with pytest.raises(ValueError, match="format: got 'csv'"):
        data.read([], format="csv")


def test_a_call_of_a_function_is_a_turn_of_the_assistant_and_what_is_observed_the_tools():
    said_so = [("human", "2 + 2?"), ("function_call", "add(2, 2)"), ("observation", "4"), ("gpt", "four")]
    turns = [{"from": who, "value": text} for who, text in said_so]
    record = data.normalise({"conversations": turns[:1], "chosen": turns[1:], "rejected": turns[3:]})
    assert [turn["role"] for turn in record.answers[0]] == ["assistant", "tool", "assistant"]
