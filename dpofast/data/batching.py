"""Batches of encoded records: padded rows, or all sequences packed in one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dpofast.checks import shown, wrong
from dpofast.data.encoding import Encoded

IGNORE = -100
LAYOUTS = ("padded", "packed")


@dataclass(frozen=True)
class Batch:
    """S sequences of B records, in blocks: the first answers of all, then the second ones, and so on.

    Of records with two answers that is ``[chosen; rejected]``. A record with fewer answers than others is not in
    the last blocks.

    Attributes:
        input_ids: ``[S, T]``, padded right; or packed ``[1, N]``.
        targets: the input ids where a token counts, elsewhere -100; shaped as input_ids.
        attention_mask: ``[S, T]``; None where packed.
        position_ids: ``[1, N]``, from 0 in each sequence; None where padded.
        cu_seqlens: ``[S + 1]``, int32, where packed sequences begin; None where padded.
        sizes: ``[B]``, how many answers each record has; on the CPU.
        record: ``[S]``, the record that each sequence is of.
        scores: ``[S]``, of each answer; None where a record has none.
        labels: ``[B]``, bool, whether a single answer is good; None where no record has one.
        weights: ``[B]``, 1 where a record has none; None where none has one.
        margins: ``[B]``, 0 where a record has none; None where none has one.
        where: file and line of each record.
    """

    input_ids: Tensor
    targets: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    cu_seqlens: Tensor | None
    sizes: Tensor
    record: Tensor
    scores: Tensor | None
    labels: Tensor | None
    weights: Tensor | None
    margins: Tensor | None
    where: tuple[str, ...]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a model of Transformers is called with."""
        if self.position_ids is not None:
            return {"input_ids": self.input_ids, "position_ids": self.position_ids}
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on a device, but for sizes, which decide on shapes."""
        moved = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor) and name != "sizes"}
        return replace(self, **moved)


def collate(encoded: Iterable[Encoded], *, pad_token_id: int, layout: str = "padded") -> Batch:
    """Encoded records as a batch for `dpofast.integrations.models.model_dpo_loss`.

    Equivalent to `torch.nn.utils.rnn.pad_sequence` of ``[prompt + chosen, ...]`` and then ``[prompt + rejected, ...]``,
    or to `torch.cat` of them.

    Args:
        encoded: what `Encoder` returns, at least one.
        pad_token_id: fills rows up; it does not count and is not attended to, so that any id will do.
        layout: "padded", or "packed" for models whose attention keeps packed sequences apart.

    Returns:
        `Batch`.

    Raises:
        ValueError: no record, an unknown layout, or a pad_token_id that is None or negative.

    Example:
        >>> from dpofast.data import Answer, Encoded
        >>> one = Encoded((7,), (Answer((1, 2), (True, True)), Answer((3,), (True,))))
        >>> batch = collate([one], pad_token_id=0)
        >>> batch.input_ids.tolist(), batch.targets.tolist()
        ([[7, 1, 2], [7, 3, 0]], [[-100, 1, 2], [-100, 3, -100]])
    """
    records = list(encoded)
    if not records:
        raise wrong("encoded", "no record", "at least one")
    if layout not in LAYOUTS:
        raise wrong("layout", f"{layout!r}", f"one of {', '.join(LAYOUTS)}")
    if isinstance(pad_token_id, bool) or not isinstance(pad_token_id, int) or pad_token_id < 0:
        raise wrong("pad_token_id", shown(pad_token_id), "a token id; the EOS token's will do")
    sizes = [len(record.answers) for record in records]
    places = [(i, b) for i in range(max(sizes)) for b in range(len(records)) if i < sizes[b]]
    pairs = [(records[b].prompt, records[b].answers[i]) for i, b in places]
    ids = [torch.tensor((*prompt, *answer.ids)) for prompt, answer in pairs]
    counted = [torch.tensor((False,) * len(prompt) + answer.counted) for prompt, answer in pairs]
    targets = [row.masked_fill(~mask, IGNORE) for row, mask in zip(ids, counted)]
    rows = _packed(ids, targets) if layout == "packed" else _padded(ids, targets, pad_token_id)
    scored = all(record.scores is not None for record in records)
    return Batch(
        **rows,
        sizes=torch.tensor(sizes),
        record=torch.tensor([b for _, b in places]),
        scores=torch.tensor([records[b].scores[i] for i, b in places]) if scored else None,  # type: ignore[index]
        labels=_labels(records),
        weights=_column([record.weight for record in records], 1.0),
        margins=_column([record.margin for record in records], 0.0),
        where=tuple(record.where for record in records),
    )


def _padded(ids: list[Tensor], targets: list[Tensor], pad: int) -> dict[str, Any]:
    def padded(rows: list[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    return {
        "input_ids": padded(ids, pad), "targets": padded(targets, IGNORE),
        "attention_mask": padded([torch.ones_like(row) for row in ids], 0), "position_ids": None, "cu_seqlens": None,
    }  # fmt: skip


def _packed(ids: list[Tensor], targets: list[Tensor]) -> dict[str, Any]:
    lengths = torch.tensor([0, *map(len, ids)])
    return {
        "input_ids": torch.cat(ids)[None], "targets": torch.cat(targets)[None], "attention_mask": None,
        "position_ids": torch.cat([torch.arange(len(row)) for row in ids])[None],
        "cu_seqlens": lengths.cumsum(0, dtype=torch.int32),
    }  # fmt: skip


def _labels(records: Sequence[Encoded]) -> Tensor | None:
    labels = [record.label for record in records]
    if all(label is None for label in labels):
        return None
    if any(label is None for label in labels):
        where = next(record.where for record in records if record.label is None)
        raise ValueError(f"encoded: got {where} without a label beside records with one, expected one of each record")
    return torch.tensor(labels)


def _column(values: Sequence[float | None], default: float) -> Tensor | None:
    """A number of each record; None where none has one."""
    if all(value is None for value in values):
        return None
    return torch.tensor([default if value is None else value for value in values])
