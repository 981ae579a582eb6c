"""Rows [prefix, rest 1, ..., rest K] made of a batch of K answers to each prompt: which groups, and where tokens go.

Nothing here knows a model. A sequence is what attention_mask shows of a row, or one of those packed in a row; its
*offset* counts its tokens from 0, whatever is before it. Of S = KB sequences, i, i + B, i + 2B, ... are a *group*, a
pair where K is 2. They have the same offsets in their prefix, and so one row serves all, if its rests begin at the same
offset and do not see each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dpofast.checks import wrong


class Refused(ValueError):
    """What has no shared form: a model, or what it is asked for."""


class Sequences(NamedTuple):
    """A batch as its sequences: the place of the first token in the flat batch, and the number of tokens, ``[S]``."""

    first: Tensor
    length: Tensor


class Rows(NamedTuple):
    """Shared rows ``[R, L]`` of a batch ``[N, T]``.

    Attributes:
        source: the place in the flat batch that each token comes from; at padding, any.
        offset: of each token in its sequence; 0 at padding.
        part: 0 for what all of the row sees, 1 to K for the rests, -1 for padding.
        back: ``[N, T]``, the place in the flat rows of each token of the batch; -1 at padding.
    """

    source: Tensor
    offset: Tensor
    part: Tensor
    back: Tensor


class Part(NamedTuple):
    """Tokens ``start`` to ``stop`` of sequence ``sequence`` of the batch, and what they are in a new row."""

    sequence: int
    start: int
    stop: int
    kind: int


# What is in the batch


def find_sequences(input_ids: Tensor, attention_mask: Tensor | None) -> Sequences:
    """Where each row's tokens are; an error where ``attention_mask`` says anything but padding."""
    rows, width = input_ids.shape
    begin = torch.arange(rows, device=input_ids.device) * width
    if attention_mask is None:
        return Sequences(begin, torch.full_like(begin, width))
    padding = f"{[rows, width]} of 1 at tokens and 0 at padding, or None"
    if attention_mask.shape != input_ids.shape:
        raise wrong("attention_mask", f"shape {tuple(attention_mask.shape)}", padding, Refused)
    attended = (attention_mask != 0).long()
    first, length = attended.argmax(-1), attended.sum(-1)
    places = torch.arange(width, device=attended.device)
    together = (places >= first[:, None]) & (places < (first + length)[:, None])
    if not (attention_mask == together).all():
        raise wrong(
            "attention_mask", "values that are not a mask of padding", f"{padding}: one run of 1 in each row; pack "
            "sequences by position_ids and without a mask, or unpack them", Refused,
        )  # fmt: skip
    return Sequences(begin.to(first.device) + first, length)


def find_packed(position_ids: Tensor) -> Sequences:
    """The sequences in rows ``[N, T]``: one begins with a row, and where positions do not go on by 1, as Transformers
    reads them."""
    first = F.pad(position_ids.diff() != 1, (1, 0), value=True).flatten().nonzero()[:, 0]
    return Sequences(first, F.pad(first[1:], (0, 1), value=position_ids.numel()) - first)


def find_positions(position_ids: Tensor, input_ids: Tensor, sequences: Sequences) -> Tensor:
    """``position_ids`` for each token ``[N, T]``; an error where they do not count through each sequence."""
    rows, width = input_ids.shape
    if position_ids.shape not in ((rows, width), (1, width)):
        expected = f"{[rows, width]}, one for each token, or {[1, width]}"
        raise wrong("position_ids", f"shape {tuple(position_ids.shape)}", expected, Refused)
    positions = position_ids.expand(input_ids.shape)
    aligned = by_offset(positions, sequences)
    counts = aligned == aligned[:, :1] + torch.arange(aligned.shape[1], device=aligned.device)
    if not (counts | ~_inside(sequences)).all():
        raise wrong(
            "position_ids", "positions that restart or jump within a row", "one sequence in each row, counted in steps "
            "of 1; pack sequences in rows without attention_mask, or unpack them", Refused,
        )  # fmt: skip
    return positions


def _inside(sequences: Sequences) -> Tensor:
    """Which offsets ``[S, longest]`` a sequence has."""
    return torch.arange(int(sequences.length.max()), device=sequences.length.device) < sequences.length[:, None]


def by_offset(batch: Tensor, sequences: Sequences) -> Tensor:
    """``batch`` ``[N, T]`` as its sequences ``[S, longest]``; what comes behind one is any token."""
    offsets = torch.arange(int(sequences.length.max()), device=batch.device)
    return batch.flatten()[(sequences.first[:, None] + offsets).clamp(max=batch.numel() - 1)]


def common_prefix(sequences: Sequences, answers: int, *batches: Tensor) -> Tensor:
    """How many tokens ``[B]`` the sequences of a group begin with alike: equal in each of ``batches`` ``[N, T]``."""
    same = _inside(sequences).unflatten(0, (answers, -1)).all(0)
    for batch in batches:
        group = by_offset(batch, sequences).unflatten(0, (answers, -1))
        same = same & (group == group[0]).all(0)
    return same.long().cumprod(-1).sum(-1)


# Which groups


def choose(lengths: Sequence[int], common: Sequence[int], cost: Callable[[int, int], float]) -> list[list[Part]]:
    """The rows that cost least, each as its parts; groups that are not worth a row of their own stay as they are.

    All rows have the width of the longest. So for each width the groups that fit are shared, which saves all of their
    rows but one, and the best width is taken; ``cost`` is of a number of rows and a width.
    """
    groups = len(common)
    members = [range(i, len(lengths), groups) for i in range(groups)]
    widths = [sum(lengths[s] - common[i] for s in members[i]) + common[i] for i in range(groups)]

    def shared_in(limit: int) -> list[bool]:
        return [common[i] > 0 and widths[i] <= limit for i in range(groups)]

    def cost_of(limit: int) -> float:
        shared = shared_in(limit)
        found = [widths[i] for i in range(groups) if shared[i]]
        found += [length for s, length in enumerate(lengths) if not shared[s % groups]]
        return cost(len(found), max(found))

    rows = []
    for i, shared in enumerate(shared_in(min([-1, *sorted(set(widths))], key=cost_of))):
        if shared:
            rests = [Part(s, common[i], lengths[s], kind) for kind, s in enumerate(members[i], 1)]
            rows.append([Part(i, 0, common[i], 0), *rests])
        else:
            rows += [[Part(s, 0, lengths[s], 0)] for s in members[i]]
    return rows


# The rows


def build(chosen: Sequence[Sequence[Part]], sequences: Sequences, shape: tuple[int, ...]) -> Rows:
    """Tensors of the rows that `choose` has found, for a batch of ``shape``."""
    first = sequences.first.tolist()
    rows = [[part for part in row if part.stop > part.start] for row in chosen]
    length = max(sum(part.stop - part.start for part in row) for row in rows)
    source = torch.zeros(len(rows), length, dtype=torch.long)
    offset, kind = torch.zeros_like(source), torch.full_like(source, -1)
    back = torch.full(shape, -1)
    places = back.view(-1)
    for r, row in enumerate(rows):
        end = 0
        for part in row:
            here = slice(end, end := end + part.stop - part.start)
            offset[r, here] = torch.arange(part.start, part.stop)
            source[r, here] = offset[r, here] + first[part.sequence]
            kind[r, here] = part.kind
            places[source[r, here]] = torch.arange(here.start, here.stop) + r * length
    for row in chosen:
        begin, size = first[row[0].sequence], row[0].stop
        for part in row[2:]:  # the prefix is that of the other sequences, too
            other = first[part.sequence]
            places[other : other + size] = places[begin : begin + size]
    device = sequences.first.device
    return Rows(*(x.to(device, non_blocking=True) for x in (source, offset, kind, back)))


def unshare(hidden: Tensor, rows: Rows) -> Tensor:
    """Hidden states ``[R, L, H]`` in the layout of the batch, ``[N, T, H]``, 0 at padding.

    A shared token goes to several places, and autograd adds up their gradients.
    """
    back = rows.back.to(hidden.device)
    picked = hidden.flatten(0, 1).index_select(0, back.clamp(min=0).flatten()).unflatten(0, back.shape)
    return picked.masked_fill((back < 0).unsqueeze(-1), 0.0)


def see_the_prefix_and_themselves(rows: Rows, inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A mask function for shared rows, of ``inner`` for plain ones; both in the form that Transformers gives them.

    ``inner`` is asked by offset, so that a window, or a chunk, counts the tokens of a sequence and not the places of a
    row that has several of them.
    """

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = inner(batch, head, rows.offset[batch, query], rows.offset[batch, key])
        part = rows.part[batch, key]
        return seen & ((part == 0) | (part == rows.part[batch, query]))

    return visible
