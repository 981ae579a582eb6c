"""Rows [prefix, rest of chosen, rest of rejected] made of a batch [chosen; rejected]: which pairs, and where tokens go.

Nothing here knows a model. A sequence is what attention_mask shows of a row; its *offset* counts its tokens from 0,
whatever the padding before it. Both sequences of a pair have the same offsets in their prefix, and so one row serves
both, if its two rests begin at the same offset and do not see each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dpofast.checks import wrong


class Refused(ValueError):
    """What has no shared form: a model, or what it is asked for."""


class Sequences(NamedTuple):
    """A batch as its sequences: first attended place and number of tokens of each row, both ``[2B]``."""

    first: Tensor
    length: Tensor


class Rows(NamedTuple):
    """Shared rows ``[R, L]`` of a batch ``[2B, T]``.

    Attributes:
        source: the place in the flat batch that each token comes from; at padding, any.
        offset: of each token in its sequence; 0 at padding.
        part: 0 for what all of the row sees, 1 and 2 for the rests of chosen and rejected, -1 for padding.
        back: ``[2B, T]``, the place in the flat rows of each token of the batch; -1 at padding.
    """

    source: Tensor
    offset: Tensor
    part: Tensor
    back: Tensor


class Part(NamedTuple):
    """Tokens ``start`` to ``stop`` of the sequence in row ``sequence`` of the batch, and what they are in a new row."""

    sequence: int
    start: int
    stop: int
    kind: int


# What is in the batch


def find_sequences(input_ids: Tensor, attention_mask: Tensor | None) -> Sequences:
    """Where each row's tokens are; an error where ``attention_mask`` says anything but padding."""
    rows, width = input_ids.shape
    if attention_mask is None:
        first = torch.zeros(rows, dtype=torch.long, device=input_ids.device)
        return Sequences(first, torch.full_like(first, width))
    padding = f"{[rows, width]} of 1 at tokens and 0 at padding, or None"
    if attention_mask.shape != input_ids.shape:
        raise wrong("attention_mask", f"shape {tuple(attention_mask.shape)}", padding, Refused)
    attended = (attention_mask != 0).long()
    first, length = attended.argmax(-1), attended.sum(-1)
    places = torch.arange(width, device=attended.device)
    together = (places >= first[:, None]) & (places < (first + length)[:, None])
    if not (attention_mask == together).all():
        raise wrong(
            "attention_mask", "values that are not a mask of padding", f"{padding}: one run of 1 in each row; unpack "
            "packed rows, or run them unshared", Refused,
        )  # fmt: skip
    return Sequences(first, length)


def find_positions(position_ids: Tensor, input_ids: Tensor, sequences: Sequences) -> Tensor:
    """``position_ids`` for each token ``[2B, T]``; an error where they do not count through each sequence."""
    rows, width = input_ids.shape
    if position_ids.shape not in ((rows, width), (1, width)):
        expected = f"{[rows, width]}, one for each token, or {[1, width]}"
        raise wrong("position_ids", f"shape {tuple(position_ids.shape)}", expected, Refused)
    positions = position_ids.expand(input_ids.shape)
    aligned = by_offset(positions, sequences)
    counts = aligned == aligned[:, :1] + torch.arange(input_ids.shape[1], device=aligned.device)
    if not (counts | ~_inside(input_ids, sequences)).all():
        raise wrong(
            "position_ids", "positions that restart or jump within a row", "one sequence in each row, counted in steps "
            "of 1; unpack packed rows, or run them unshared", Refused,
        )  # fmt: skip
    return positions


def _inside(batch: Tensor, sequences: Sequences) -> Tensor:
    """Which offsets ``[2B, T]`` a sequence has."""
    return torch.arange(batch.shape[1], device=batch.device) < sequences.length[:, None]


def by_offset(batch: Tensor, sequences: Sequences) -> Tensor:
    """``batch`` ``[2B, T]`` with each sequence moved to the left; what comes behind it is any token."""
    places = sequences.first[:, None] + torch.arange(batch.shape[1], device=batch.device)
    return batch.gather(1, places.clamp(max=batch.shape[1] - 1))


def common_prefix(sequences: Sequences, *batches: Tensor) -> Tensor:
    """How many tokens ``[B]`` the sequences of a pair begin with alike: equal in each of ``batches`` ``[2B, T]``."""
    same = _inside(batches[0], sequences)
    same = same[: len(same) // 2] & same[len(same) // 2 :]
    for batch in batches:
        chosen, rejected = by_offset(batch, sequences).chunk(2)
        same = same & (chosen == rejected)
    return same.long().cumprod(-1).sum(-1)


# Which pairs


def choose(lengths: Sequence[int], common: Sequence[int], cost: Callable[[int, int], float]) -> list[list[Part]]:
    """The rows that cost least, each as its parts; pairs that are not worth a row of their own stay two rows.

    All rows have the width of the longest. So for each width the pairs that fit are shared, which saves a row each, and
    the best width is taken; ``cost`` is of a number of rows and a width.
    """
    pairs = len(common)
    widths = [lengths[i] + lengths[i + pairs] - common[i] for i in range(pairs)]

    def alone(limit: int) -> list[int]:
        return [row for row in range(2 * pairs) if not _fits(widths[row % pairs], common[row % pairs], limit)]

    def cost_of(limit: int) -> float:
        left = alone(limit)
        shared = [i for i in range(pairs) if i not in left]
        return cost(len(shared) + len(left), max([widths[i] for i in shared] + [lengths[i] for i in left], default=0))

    limit = min([-1, *sorted(set(widths))], key=cost_of)
    left = set(alone(limit))
    rows = []
    for i in range(pairs):
        chosen, rejected, shared = lengths[i], lengths[i + pairs], common[i]
        if i in left:
            rows += [[Part(i, 0, chosen, 0)], [Part(i + pairs, 0, rejected, 0)]]
        else:
            rows.append([Part(i, 0, shared, 0), Part(i, shared, chosen, 1), Part(i + pairs, shared, rejected, 2)])
    return rows


def _fits(width: int, common: int, limit: int) -> bool:
    return common > 0 and width <= limit


# The rows


def build(chosen: Sequence[Sequence[Part]], sequences: Sequences, width: int) -> Rows:
    """Tensors of the rows that `choose` has found, for a batch of rows of ``width``."""
    first, pairs = sequences.first.tolist(), len(sequences.first) // 2
    rows = [[part for part in row if part.stop > part.start] for row in chosen]
    length = max(sum(part.stop - part.start for part in row) for row in rows)
    source = torch.zeros(len(rows), length, dtype=torch.long)
    offset, kind = torch.zeros_like(source), torch.full_like(source, -1)
    back = torch.full((2 * pairs, width), -1)
    for r, row in enumerate(rows):
        end = 0
        for part in row:
            here = slice(end, end := end + part.stop - part.start)
            offset[r, here] = torch.arange(part.start, part.stop)
            source[r, here] = offset[r, here] + first[part.sequence] + part.sequence * width
            kind[r, here] = part.kind
            back.view(-1)[source[r, here]] = torch.arange(here.start, here.stop) + r * length
    for row in chosen:
        if len(row) > 1:  # its prefix is that of the other sequence, too
            there, other, stop = row[0].sequence, row[2].sequence, row[0].stop
            prefix = back[there, first[there] : first[there] + stop]
            back[other, first[other] : first[other] + stop] = prefix
    device = sequences.first.device
    return Rows(*(x.to(device, non_blocking=True) for x in (source, offset, kind, back)))


def unshare(hidden: Tensor, rows: Rows) -> Tensor:
    """Hidden states ``[R, L, H]`` in the layout of the batch, ``[2B, T, H]``, 0 at padding.

    A shared token goes to two places, and autograd adds up their gradients.
    """
    back = rows.back.to(hidden.device)
    picked = hidden.flatten(0, 1).index_select(0, back.clamp(min=0).flatten()).unflatten(0, back.shape)
    return picked.masked_fill((back < 0).unsqueeze(-1), 0.0)


def see_the_prefix_and_themselves(rows: Rows, inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A mask function for shared rows, of ``inner`` for plain ones; both in the form that Transformers gives them.

    ``inner`` is asked by offset, so that a window, or a chunk, counts the tokens of a sequence and not the places of a
    row that has two of them.
    """

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = inner(batch, head, rows.offset[batch, query], rows.offset[batch, key])
        part = rows.part[batch, key]
        return seen & ((part == 0) | (part == rows.part[batch, query]))

    return visible
