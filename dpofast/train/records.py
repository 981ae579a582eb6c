"""Preferences in files of JSON lines: a prompt and its answers, in token ids."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dpofast.checks import is_number

FORMS = "prompt with chosen and rejected (a text, or a list of texts), with answers (best first), or with completion"


class Record(NamedTuple):
    """A prompt and its answers, the best first, in token ids; and what the data says of them."""

    where: str  # file and line
    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    label: bool | None = None  # of a single answer: whether it is good
    margin: float | None = None
    weight: float | None = None


def read(paths: Iterable[str], tokenizer: Any, max_length: int) -> Iterator[Record]:
    """The records of some files, in their order; a ValueError names file and line of one that is none."""
    for path in paths:
        try:
            with Path(path).open(encoding="utf-8-sig") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _encoded(f"{path}:{number}", line, tokenizer, max_length)
        except OSError as error:
            raise ValueError(f"data: cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"data: {path} is not UTF-8: {error}") from error


def _encoded(where: str, line: str, tokenizer: Any, max_length: int) -> Record:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"data: {where} is no JSON: {error}") from error
    prompt_text, texts = _texts(where, row)

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    prompt, end = ids(prompt_text), (tokenizer.eos_token_id,)
    answers = tuple((prompt + ids(text) + end)[:max_length][len(prompt) :] for text in texts)
    if not prompt:
        raise ValueError(f"data: {where} has a prompt without a token; expected at least one, such as a BOS token")
    if not all(answers):
        raise ValueError(
            f"data: {where} has a prompt of {len(prompt)} tokens, and max_length={max_length} leaves no answer"
        )
    label = row.get("label")
    if not isinstance(label, bool | None):
        raise ValueError(f"data: {where} has label {label!r}, expected true or false")
    return Record(where, prompt, answers, label, *(_number(where, row, name) for name in ("margin", "weight")))


def _texts(where: str, row: Any) -> tuple[str, list[str]]:
    """The prompt and the answers of a line."""
    row = row if isinstance(row, Mapping) else {}
    if "chosen" in row and "rejected" in row:
        rejected = row["rejected"]
        answers = [row["chosen"], *(rejected if isinstance(rejected, list) else [rejected])]
    else:
        answers = row.get("answers", [row.get("completion")])
    texts = [row.get("prompt"), *answers] if isinstance(answers, list) and answers else [None]
    if not all(isinstance(text, str) for text in texts):
        keys = ", ".join(row) or "no keys"
        raise ValueError(f"data: {where} has {keys}; expected texts: {FORMS}")
    return texts[0], texts[1:]


def _number(where: str, row: Mapping[str, Any], name: str) -> float | None:
    value = row.get(name)
    if value is not None and not (is_number(value) and math.isfinite(value)):
        raise ValueError(f"data: {where} has {name} {value!r}, expected a finite number")
    return value
