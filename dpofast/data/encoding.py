"""Records in token ids, by the user's tokenizer and chat template: where the answers begin, what of them counts, what a
length cuts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from dpofast.checks import shown, wrong
from dpofast.data.records import BadRow, Record
from dpofast.data.sources import decode

TRUNCATIONS = ("end", "prompt")


class Answer(NamedTuple):
    """Token ids of an answer, and whether each counts in the loss."""

    ids: tuple[int, ...]
    counted: tuple[bool, ...]


class Cut(NamedTuple):
    """Tokens that truncation took: from the beginning of the prompt, and from the end of each answer."""

    prompt: int
    answers: tuple[int, ...]


class Encoded(NamedTuple):
    """A record in token ids.

    Attributes:
        prompt: the ids that all answers follow, at least one.
        answers: the best first.
        cut: what truncation took, or None.
        seam: tokens of the prompt alone that its answers change, and that are therefore in the answers.
        scores, label, weight, margin, where: as in `Record`.
    """

    prompt: tuple[int, ...]
    answers: tuple[Answer, ...]
    cut: Cut | None = None
    seam: int = 0
    scores: tuple[float, ...] | None = None
    label: bool | None = None
    weight: float | None = None
    margin: float | None = None
    where: str = ""


class Encoder:
    """Turns records into token ids.

    Equivalent, for a text, to::

        prompt = tokenizer(record.prompt)["input_ids"]
        whole = [tokenizer(record.prompt + answer)["input_ids"] + [tokenizer.eos_token_id] for answer in record.answers]
        prompt = os.path.commonprefix([prompt, *whole])
        answers = [ids[len(prompt) :] for ids in whole]

    The boundary is one of token ids: an answer begins where its tokens and the prompt's differ, for the earliest of
    the answers. So a token that joins the end of the prompt to an answer belongs to the answer, and a model meets the
    ids that its tokenizer makes of the whole. For messages, ``tokenizer.apply_chat_template`` takes the tokenizer's
    place, of the prompt with ``add_generation_prompt=True``, and adds no EOS but the template's. The columns ``tools``
    and ``chat_template_kwargs`` go to the template. Of an answer in several turns only the assistant's count; what
    tools and users say is context.

    Args:
        tokenizer: a Transformers tokenizer.
        max_length: of prompt and answer together, in tokens; None: no limit.
        truncation: "end" cuts the ends of answers; "prompt" the beginning of the prompt, for all answers alike, as long
            as a token of it is left, and then the ends of answers.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"2": 0, "+": 1, "=": 2, "4": 3, "5": 4, "<eos>": 5}))
        >>> words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> encode = Encoder(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>"))
        >>> encoded = encode(Record("2 + 2 =", (" 4", " 5")))
        >>> encoded.prompt, [answer.ids for answer in encoded.answers]
        ((0, 1, 0, 2), [(3, 5), (4, 5)])
    """

    def __init__(self, tokenizer: Any, *, max_length: int | None = None, truncation: str = "end") -> None:
        if not callable(tokenizer):
            raise wrong("tokenizer", shown(tokenizer)[:80], "a Transformers tokenizer", TypeError)
        if max_length is not None and (not isinstance(max_length, int) or max_length < 2):
            raise wrong("max_length", f"{max_length!r}", "None or an int >= 2")
        if truncation not in TRUNCATIONS:
            raise wrong("truncation", f"{truncation!r}", f"one of {', '.join(TRUNCATIONS)}")
        self.tokenizer, self.max_length, self.truncation = tokenizer, max_length, truncation

    def __call__(self, record: Record) -> Encoded:
        """A record in token ids.

        Returns:
            `Encoded`.

        Raises:
            BadRow: a prompt without a token; an answer of which truncation leaves nothing that counts; answers that
                truncation makes the same; messages that the chat template refuses.
            ValueError: messages without a chat template, or text without an EOS token.
        """
        encode = self._text if isinstance(record.prompt, str) else self._conversation
        alone, whole, counted = encode(record)
        size = min(_common(alone, ids) for ids in whole)
        if not size:
            joined = f"{len(alone)} tokens, all joined to the answers, expected one before them"
            found = joined if alone else "no token, expected at least one"
            raise BadRow(record.where, f"prompt: got {found}; begin it with a BOS token")
        answers = [Answer(tuple(ids[size:]), tuple(mask[size:])) for ids, mask in zip(whole, counted)]
        prompt, answers, cut = self._truncated(tuple(alone[:size]), answers, record.where)
        return Encoded(
            prompt, tuple(answers), cut, len(alone) - size, record.scores, record.label, record.weight, record.margin,
            record.where,
        )  # fmt: skip

    def _text(self, record: Record) -> tuple[list[int], list[list[int]], list[list[bool]]]:
        end = self.tokenizer.eos_token_id
        if end is None:
            raise ValueError("tokenizer: has no EOS token, expected one to end the answers; set tokenizer.eos_token")
        alone = list(self.tokenizer(record.prompt)["input_ids"])
        prompt: Any = record.prompt
        whole = [list(self.tokenizer(prompt + answer)["input_ids"]) for answer in record.answers]
        whole = [ids if ids[-1:] == [end] else [*ids, end] for ids in whole]
        return alone, whole, [[True] * len(ids) for ids in whole]

    def _conversation(self, record: Record) -> tuple[list[int], list[list[int]], list[list[bool]]]:
        prompt = list(record.prompt)
        alone = self._template(record, prompt, True)
        whole, counted = [], []
        for answer in record.answers:
            ids = self._template(record, [*prompt, *answer], False)
            whole.append(ids)
            counted.append(self._assistants(record, answer, ids))
        return alone, whole, counted

    def _assistants(self, record: Record, answer: Any, ids: list[int]) -> list[bool]:
        """Which of ``ids`` the assistant says: from where a turn's generation prompt ends to where the turn does.

        A first turn of the assistant is counted from the beginning, for where the prompt ends is known for all answers.
        """
        counted, prompt, last = [False] * len(ids), list(record.prompt), len(answer) - 1
        for i, message in enumerate(answer):
            if message["role"] != "assistant":
                continue
            before, after = [*prompt, *answer[:i]], [*prompt, *answer[: i + 1]]
            start = 0 if i == 0 else _common(self._template(record, before, True), ids)
            stop = len(ids) if i == last else _common(self._template(record, after, False), ids)
            counted[start:stop] = [True] * (stop - start)
        return counted

    def _template(self, record: Record, messages: list[Any], generation: bool) -> list[int]:
        from jinja2 import TemplateError  # Transformers needs it for templates

        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError("tokenizer: has no chat template, expected one for messages; set tokenizer.chat_template")
        options = record.columns.get("chat_template_kwargs") or {}
        try:
            return list(
                self.tokenizer.apply_chat_template(
                    messages, tools=_tools(record), add_generation_prompt=generation, tokenize=True, return_dict=True,
                    **options,
                )["input_ids"]
            )  # fmt: skip
        except TemplateError as error:
            raise BadRow(record.where, f"messages: the chat template refuses them: {error}") from error

    def _truncated(
        self, prompt: tuple[int, ...], answers: list[Answer], where: str
    ) -> tuple[tuple[int, ...], list[Answer], Cut | None]:
        limit = self.max_length
        longest = max(len(answer.ids) for answer in answers)
        if limit is None or len(prompt) + longest <= limit:
            kept, cut = answers, None
        else:
            dropped = min(len(prompt) + longest - limit, len(prompt) - 1) if self.truncation == "prompt" else 0
            prompt, room = prompt[dropped:], max(0, limit - len(prompt) + dropped)
            kept = [Answer(answer.ids[:room], answer.counted[:room]) for answer in answers]
            cut = Cut(dropped, tuple(len(a.ids) - len(b.ids) for a, b in zip(answers, kept)))
        for i, answer in enumerate(kept):
            if not any(answer.counted):
                why = "" if cut is None else f" with max_length={limit}, after a prompt of {len(prompt)} tokens"
                raise BadRow(where, f"answers[{i}]: got no token that counts{why}, expected at least one")
        if cut is not None and len({answer.ids for answer in kept}) < len(kept):
            raise BadRow(where, f"answers: got two that are the same with max_length={limit}, expected them to differ")
        return prompt, kept, cut


def _tools(record: Record) -> Any:
    """The column ``tools``, which may be JSON in a text."""
    tools = record.columns.get("tools")
    return decode(tools, record.where) if isinstance(tools, str) and tools else tools or None


def _common(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    differ = (i for i, (a, b) in enumerate(zip(ids, others)) if a != b)
    return next(differ, min(len(ids), len(others)))
