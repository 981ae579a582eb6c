"""The formats that people keep preferences in: which one a row has, and the one record that each becomes.

A format is known by its columns; a column that is None counts as absent, as `datasets` and Parquet fill them up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from dpofast.checks import is_number, shown, wrong
from dpofast.data.records import BadRow, Messages, Record

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "observation": "tool", "tool": "tool", "function_call": "assistant",
}  # fmt: skip
"""What ShareGPT's ``from`` says, in the words of chat templates."""
NUMBERED = re.compile(r"rejected_?(\d+)")
OWN = ("weight", "margin")  # columns of every format


class Bad(ValueError):
    """The reason why a row is no record, before anybody knows its file and line."""


class Parts(NamedTuple):
    """What a format finds in its columns, not yet checked."""

    prompt: Any
    answers: Sequence[Any]
    label: Any = None
    scores: Any = None
    extra: Mapping[str, Any] = {}


class Format(NamedTuple):
    """``has`` says whether a row's columns are of this format, ``parts`` takes them apart; ``columns`` are consumed."""

    columns: tuple[str, ...]
    what: str
    has: Callable[[Mapping[str, Any]], bool]
    parts: Callable[[Mapping[str, Any]], Parts]


# Doors


def detect(row: Mapping[str, Any]) -> str:
    """The name of the format that a row has.

    Args:
        row: columns by name.

    Returns:
        A key of `FORMATS`.

    Raises:
        ValueError: no format has these columns.

    Example:
        >>> detect({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"})
        'trl'
    """
    row = _present(row)
    for name, form in FORMATS.items():
        if form.has(row):
            return name
    known = "; ".join(f"{form.what} ({name})" for name, form in FORMATS.items())
    raise Bad(f"row: got {', '.join(row) or 'no columns'}, expected the columns of one format: {known}")


def normalise(row: Mapping[str, Any], format: str | None = None, where: str = "row") -> Record:
    """The record that a row is.

    Args:
        row: columns by name.
        format: a key of `FORMATS`; None: `detect` it.
        where: ``"file:line"``, for the record and for errors.

    Returns:
        `Record`.

    Raises:
        BadRow: the row is no record of this format; a ValueError.
        ValueError: ``format`` is unknown.

    Example:
        >>> normalise({"prompt": "2 + 2 =", "answers": [" 5", " 4"], "scores": [0, 1]}).answers
        (' 4', ' 5')
    """
    if format is not None and format not in FORMATS:
        raise wrong("format", f"{format!r}", f"None or one of {', '.join(FORMATS)}")
    try:
        if not isinstance(row, Mapping):
            raise Bad(f"row: got {shown(row)[:80]}, expected columns by name")
        row = _present(row)
        form = FORMATS[detect(row) if format is None else format]
        return _record(row, form, where)
    except Bad as error:
        raise BadRow(where, str(error)) from None


def _present(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None}


def _record(row: Mapping[str, Any], form: Format, where: str) -> Record:
    try:
        parts = form.parts(row)
    except KeyError as error:
        raise Bad(f"{error.args[0]}: the column is missing; the row has {', '.join(row)}") from None
    prompt, answers = _as_one_kind(parts.prompt, parts.answers)
    if parts.label is not None and not isinstance(parts.label, bool):
        raise Bad(f"label: got {shown(parts.label)[:80]}, expected true or false")
    scores = _scores(row, parts, len(answers))
    if scores is not None:
        order = sorted(range(len(answers)), key=scores.__getitem__, reverse=True)  # stable
        answers, scores = tuple(answers[i] for i in order), tuple(scores[i] for i in order)
    used = {name for name in row if name in (*form.columns, *OWN, "score_chosen", "score_rejected")}
    used |= {name for name in row if form.parts is _numbered and NUMBERED.fullmatch(name)}
    columns = {name: value for name, value in row.items() if name not in used} | dict(parts.extra)
    weight, margin = (None if row.get(name) is None else _number(name, row[name]) for name in OWN)
    if weight is not None and weight < 0:
        raise Bad(f"weight: got {weight}, expected a number >= 0")
    return Record(prompt, answers, scores, parts.label, weight, margin, where, columns)


# Checks


def _number(name: str, value: Any) -> float:
    if not (is_number(value) and math.isfinite(value)):
        raise Bad(f"{name}: got {shown(value)[:80]}, expected a finite number")
    return float(value)


def _scores(row: Mapping[str, Any], parts: Parts, answers: int) -> tuple[float, ...] | None:
    given = parts.scores
    if given is None and answers == 2 and "score_chosen" in row and "score_rejected" in row:
        given = [row["score_chosen"], row["score_rejected"]]
        if not _number("score_chosen", given[0]) >= _number("score_rejected", given[1]):
            raise Bad(f"score_chosen: got {given[0]}, expected at least score_rejected, {given[1]}")
    if given is None:
        return None
    if not _is_list(given) or len(given) != answers:
        found = f"{len(given)} of them" if _is_list(given) else shown(given)[:80]
        raise Bad(f"scores: got {found}, expected a list of {answers} numbers, one of each answer")
    return tuple(_number("scores", score) for score in given)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise Bad(f"{name}: got {shown(value)[:80]}, expected a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Bad(f"{name}: half of a surrogate pair at character {error.start}, which is no text") from None
    return value


def _message(name: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise Bad(f"{name}: got {shown(message)[:80]}, expected a message, {{role, content}}")
    if "from" in message and "role" not in message:
        if message["from"] not in ROLES:
            raise Bad(f"{name}: got from {message['from']!r}, expected one of {', '.join(ROLES)}")
        rest = {key: value for key, value in message.items() if key not in ("from", "value")}
        message = {"role": ROLES[message["from"]], "content": message.get("value"), **rest}
    message = _present(message)
    _text(f"{name}.role", message.get("role"))
    content = message.get("content")
    if content is None and "tool_calls" in message:
        message["content"] = ""  # templates add it to text
    elif _is_list(content):
        message["content"] = "".join(_part(name, part) for part in content)
    else:
        _text(f"{name}.content", content)
    return message


def _part(name: str, part: Any) -> str:
    """One part of a message's content, which is text."""
    if not isinstance(part, Mapping) or part.get("type") != "text":
        found = part.get("type") if isinstance(part, Mapping) else shown(part)[:80]
        raise Bad(f"{name}.content: got a part of type {found!r}, expected text; images and sound are not read")
    return _text(f"{name}.content", part.get("text"))


def _messages(name: str, value: Any) -> Messages:
    if isinstance(value, Mapping):
        value = [value]
    if not _is_list(value):
        raise Bad(f"{name}: got {shown(value)[:80]}, expected messages, [{{role, content}}, ...]")
    return tuple(_message(name, message) for message in value)


def _as_one_kind(prompt: Any, answers: Sequence[Any]) -> tuple[str | Messages, tuple[str | Messages, ...]]:
    """Prompt and answers, all as text or all as messages: an answer that is a text is then a turn of the assistant."""
    if not answers:
        raise Bad("answers: got none, expected at least one")
    if isinstance(prompt, str):
        prompt, given = _text("prompt", prompt), answers
        if not all(isinstance(answer, str) for answer in given):
            wrong_one = next(answer for answer in given if not isinstance(answer, str))
            raise Bad(f"answers: got {shown(wrong_one)[:80]}, expected a text, which the prompt is")
        checked: tuple[Any, ...] = tuple(_text(_name(i), answer) for i, answer in enumerate(given))
    else:
        prompt = _messages("prompt", prompt)
        if not prompt:
            raise Bad("prompt: got no messages, expected at least one")
        turns = [
            [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer for answer in answers
        ]
        checked = tuple(_messages(_name(i), answer) for i, answer in enumerate(turns))
    for i, answer in enumerate(checked):
        _refuse_empty(_name(i), answer)
    for i, j in combinations(range(len(checked)), 2):
        if checked[i] == checked[j]:
            raise Bad(f"{_name(j)}: the same as {_name(i)}, expected answers that differ")
    return prompt, checked


def _name(i: int) -> str:
    return f"answers[{i}]"


def _refuse_empty(name: str, answer: Any) -> None:
    if isinstance(answer, str):
        if not answer.strip():
            raise Bad(f"{name}: got an empty text, expected an answer")
        return
    turns = [turn for turn in answer if turn["role"] == "assistant"]
    if not turns:
        raise Bad(f"{name}: got no turn of the assistant, expected at least one")
    if not any(turn["content"].strip() or turn.get("tool_calls") for turn in turns):
        raise Bad(f"{name}: got an empty text, expected an answer")


# What each format has where


def _rejected(row: Mapping[str, Any]) -> list[Any]:
    """One rejected answer or several: a list of messages is one, a list of texts or of lists is several."""
    value = row["rejected"]
    if _is_list(value) and not (value and isinstance(value[0], Mapping)):
        return list(value)
    return [value]


def _trl(row: Mapping[str, Any]) -> Parts:
    return Parts(row["prompt"], [row["chosen"], *_rejected(row)])


def _numbered(row: Mapping[str, Any]) -> Parts:
    names = sorted((int(found[1]), name) for name in row if (found := NUMBERED.fullmatch(name)))
    if not names and "rejected" not in row:
        raise Bad(f"rejected1: the column is missing; the row has {', '.join(row)}")
    first = _rejected(row) if "rejected" in row else []
    return Parts(row["prompt"], [row["chosen"], *first, *(row[name] for _, name in names)])


def _common(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """How much of two answers is the same from the beginning."""
    differ = (i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b)
    return next(differ, min(len(chosen), len(rejected)))


def _implicit(row: Mapping[str, Any]) -> Parts:
    """As TRL's ``extract_prompt`` has it: what both begin with, less a space at its end."""
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise Bad(f"rejected: got {shown(rejected)[:80]}, expected a text or messages, as chosen is")
    if not isinstance(chosen, str):
        chosen, rejected = _messages("chosen", chosen), _messages("rejected", rejected)
    if chosen == rejected:
        raise Bad(f"{_name(1)}: the same as {_name(0)}, expected answers that differ")
    size = _common(chosen, rejected)
    if isinstance(chosen, str) and size and chosen[size - 1] == " ":
        size -= 1
    if not size:
        raise Bad("prompt: chosen and rejected begin with nothing in common, expected the prompt; or give a prompt")
    return Parts(chosen[:size], [chosen[size:], rejected[size:]])


def _unpaired(row: Mapping[str, Any]) -> Parts:
    return Parts(row["prompt"], [row["completion"]], label=row["label"])


def _list(row: Mapping[str, Any]) -> Parts:
    answers: Any = row["answers"]
    scores = row.get("scores")
    if not _is_list(answers):
        raise Bad(f"answers: got {shown(answers)[:80]}, expected a list of answers")
    return Parts(row["prompt"], answers, row.get("label") if len(answers) == 1 else None, scores)


def _openai(row: Mapping[str, Any]) -> Parts:
    given = row["input"]
    if not isinstance(given, Mapping) or "messages" not in given:
        raise Bad(f"input: got {shown(given)[:80]}, expected an object with messages")
    tools = {"tools": given["tools"]} if given.get("tools") else {}
    return Parts(given["messages"], [row["preferred_output"], row["non_preferred_output"]], extra=tools)


def _with_system(row: Mapping[str, Any], messages: Sequence[Any]) -> list[Any]:
    return [{"role": "system", "content": row["system"]}, *messages] if row.get("system") else list(messages)


def _sharegpt(row: Mapping[str, Any]) -> Parts:
    prompt = _with_system(row, _messages("conversations", row["conversations"]))
    return Parts(prompt, [row["chosen"], row["rejected"]])


def _sharegpt_unpaired(row: Mapping[str, Any]) -> Parts:
    turns = _messages("conversations", row["conversations"])
    if not turns or turns[-1]["role"] != "assistant":
        raise Bad("conversations: got no turn of the assistant at the end, expected the answer that kto_tag is of")
    return Parts(_with_system(row, turns[:-1]), [turns[-1:]], label=row["kto_tag"])


def _alpaca_prompt(row: Mapping[str, Any]) -> list[Any]:
    turns: list[Any] = []
    history = row.get("history", [])
    if not _is_list(history) or not all(_is_list(turn) and len(turn) == 2 for turn in history):
        raise Bad(f"history: got {shown(history)[:80]}, expected pairs of texts")
    for asked, answered in history:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    texts = [_text(name, row[name]) for name in ("instruction", "input") if row.get(name)]
    return _with_system(row, [*turns, {"role": "user", "content": "\n".join(texts)}])


def _alpaca(row: Mapping[str, Any]) -> Parts:
    return Parts(_alpaca_prompt(row), [row["chosen"], row["rejected"]])


def _alpaca_unpaired(row: Mapping[str, Any]) -> Parts:
    return Parts(_alpaca_prompt(row), [row["output"]], label=row["kto_tag"])


def _axolotl(row: Mapping[str, Any]) -> Parts:
    given = row["messages"]
    prompt = [{"role": "user", "content": given}] if isinstance(given, str) else given
    return Parts(prompt, [row["chosen"], *_rejected(row)])


def _intel(row: Mapping[str, Any]) -> Parts:
    prompt = _with_system(row, [{"role": "user", "content": row["question"]}])
    return Parts(prompt, [row["chosen"], *_rejected(row)])


def _ultra(row: Mapping[str, Any]) -> Parts:
    """The prompt is a text, and stands at the head of both conversations too."""
    parts = _implicit(row)
    if parts.prompt[-1]["content"] != row["prompt"]:
        raise Bad("prompt: differs from the turn before the answers, expected the text of that turn")
    return parts._replace(prompt=_with_system(row, parts.prompt))


def _columns(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda row: all(name in row for name in names)


def _conversation_after_a_text(row: Mapping[str, Any]) -> bool:
    chosen: Any = row.get("chosen")
    return isinstance(row.get("prompt"), str) and _is_list(chosen) and len(chosen) > 1 and "rejected" in row


_PAIR = ("chosen", "rejected")
FORMATS = {
    name: Format(columns, what, has or _columns(*columns), parts)
    for name, columns, what, has, parts in (
        ("openai", ("input", "preferred_output", "non_preferred_output"),
         "input.messages, preferred_output, non_preferred_output", None, _openai),
        ("sharegpt", ("conversations", *_PAIR, "system"), "conversations, chosen, rejected",
         _columns("conversations", *_PAIR), _sharegpt),
        ("sharegpt-unpaired", ("conversations", "kto_tag", "system"), "conversations, kto_tag",
         _columns("conversations", "kto_tag"), _sharegpt_unpaired),
        ("alpaca", ("instruction", "input", *_PAIR, "system", "history"), "instruction, input, chosen, rejected",
         _columns("instruction", *_PAIR), _alpaca),
        ("alpaca-unpaired", ("instruction", "input", "output", "kto_tag", "system", "history"),
         "instruction, input, output, kto_tag", _columns("instruction", "output", "kto_tag"), _alpaca_unpaired),
        ("axolotl", ("messages", *_PAIR), "messages, chosen, rejected", None, _axolotl),
        ("axolotl-intel", ("question", *_PAIR, "system"), "question, chosen, rejected",
         _columns("question", *_PAIR), _intel),
        ("axolotl-ultra", ("prompt", *_PAIR, "system"), "prompt as text, chosen and rejected as conversations",
         _conversation_after_a_text, _ultra),
        ("numbered", ("prompt", *_PAIR), "prompt, chosen, rejected1, rejected2, ...",
         lambda row: "prompt" in row and "chosen" in row and any(map(NUMBERED.fullmatch, row)), _numbered),
        ("trl", ("prompt", *_PAIR), "prompt, chosen, rejected (one or a list)", None, _trl),
        ("unpaired", ("prompt", "completion", "label"), "prompt, completion, label", None, _unpaired),
        ("scored", ("prompt", "answers", "scores"), "prompt, answers, scores", None, _list),
        ("ranked", ("prompt", "answers", "label"), "prompt, answers (best first)",
         _columns("prompt", "answers"), _list),
        ("trl-implicit", _PAIR, "chosen, rejected (which begin with the prompt)",
         lambda row: _columns(*_PAIR)(row) and "prompt" not in row, _implicit),
    )
}  # fmt: skip
"""The formats by name. One with more columns comes before one with fewer."""
