"""The data of a training: records read from files, encoded, and handed out in the order that the seed decides."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from dpofast import data
from dpofast.data import Encoded, Encoder, Record, Records
from dpofast.train import model
from dpofast.train.config import Config
from dpofast.train.ranks import Ranks
from dpofast.train.references import keys_of


@dataclass(frozen=True)
class Batch:
    """``records`` records as ``[chosen; rejected]``, or the blocks of all first, second, ... answers, padded right.

    Attributes:
        inputs, labels: ``[N, T]``, for `dpofast.integrations.models.model_logprob`.
        sizes: answers of each record, ``records`` of them.
        scores: ``[N]``, of each answer, nan in records without; or None where no record has any.
        margin, weight, good: ``[records]``, or None where no record has one; good is bool.
        keys: a hash of each sequence.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    sizes: tuple[int, ...]
    scores: Tensor | None = None
    margin: Tensor | None = None
    weight: Tensor | None = None
    good: Tensor | None = None
    keys: list[bytes] = field(default_factory=list)

    @property
    def records(self) -> int:
        return len(self.sizes)

    @property
    def tokens(self) -> int:
        return int(self.inputs["attention_mask"].sum())

    def to(self, device: torch.device) -> Batch:
        def moved(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        inputs = {name: x.to(device) for name, x in self.inputs.items()}
        columns = {name: moved(getattr(self, name)) for name in ("scores", "margin", "weight", "good")}
        return replace(self, inputs=inputs, labels=self.labels.to(device), **columns)


def collate(records: Sequence[Encoded], pad: int) -> Batch:
    """Some records as a batch."""
    if any(record.scores is not None for record in records):
        records = [x if x.scores is not None else x._replace(scores=(math.nan,) * len(x.answers)) for x in records]
    batch = data.collate(records, pad_token_id=pad)
    keys = keys_of(batch.input_ids, batch.attention_mask, batch.targets)
    columns = batch.scores, batch.margins, batch.weights, batch.labels
    return Batch(batch.inputs, batch.targets, tuple(batch.sizes.tolist()), *columns, keys)


class Needs(Protocol):
    """What a loss asks of the data. ``mismatches``: a second answer to each prompt, that of another record."""

    mismatches: bool

    def expect(self, record: Record) -> None:
        """Raise for a record that it cannot learn from."""


class Feed:
    """The micro-batches of this rank, step by step without end, and those of the held-out data.

    Files are read again in each epoch, by line, and only what is at work is in memory.
    """

    def __init__(self, config: Config, ranks: Ranks, needs: Needs) -> None:
        self.config, self.ranks, self.needs = config, ranks, needs
        self.tokenizer = model.load_tokenizer(config.model)
        self._encode = Encoder(self.tokenizer, max_length=config.max_length, truncation=config.truncation)
        check = self._encode if config.on_error == "skip" else None  # what it refuses has no place in the order
        found = [
            data.read(paths, on_error=config.on_error, check=check) if paths else ()
            for paths in (config.data, config.eval_data)
        ]
        self._train, self._held_out = (Mismatched(each) if needs.mismatches and each else each for each in found)
        self.records = len(found[0])
        self.skipped = [bad for each in found if each for bad in each.skipped]
        if config.batch_size % (config.micro_batch * ranks.world):
            raise ValueError(
                f"batch_size: got {config.batch_size}, expected a multiple of micro_batch times the ranks, "
                f"{config.micro_batch} x {ranks.world}"
            )
        if not self.records:
            raise ValueError(f"data: got no record in {', '.join(config.data)}, expected at least one")
        self._order = data.shuffle(self._train, seed=config.seed)

    def step(self) -> list[Batch]:
        """This rank's share of the next step; a step may reach into the next epoch."""
        epochs = itertools.chain.from_iterable(itertools.repeat(self._order))
        records = list(itertools.islice(epochs, self.config.batch_size))
        size = self.config.micro_batch
        parts = [records[i : i + size] for i in range(0, len(records), size)]
        return [self._batch(part) for part in parts[self.ranks.rank :: self.ranks.world]]

    def first(self, count: int) -> Batch:
        """The first records of the data as a batch."""
        return self._batch(list(itertools.islice(self._train, count)))

    def held_out(self) -> Iterator[Batch]:
        """The held-out data in its order, on all ranks."""
        return self._batches(self._held_out)

    def everything(self) -> Iterator[Batch]:
        """All data in its order, on all ranks."""
        yield from self._batches(self._train)
        yield from self._batches(self._held_out)

    @property
    def held_out_batches(self) -> int:
        return -(-len(self._held_out) // self.config.micro_batch)

    @property
    def all_batches(self) -> int:
        return -(-self.records // self.config.micro_batch) + self.held_out_batches

    def state_dict(self) -> dict[str, int]:
        """Where in which epoch the next step begins."""
        return self._order.state_dict()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._order.load_state_dict(state)

    def _batches(self, records: Iterable[Record]) -> Iterator[Batch]:
        records = iter(records)
        while part := list(itertools.islice(records, self.config.micro_batch)):
            yield self._batch(part)

    def _batch(self, records: Sequence[Record]) -> Batch:
        for record in records:
            self.needs.expect(record)
        return collate([self._encode(record) for record in records], padding_of(self.tokenizer))


class Mismatched:
    """Single answers, each with the next one's answer as a second one to its prompt: what `kto` measures its KL on."""

    def __init__(self, records: Records) -> None:
        self._records = records
        if len(records) == 1:
            raise ValueError(f"data: {records[0].where} is the only record, and the KL needs another one's answer")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> Record:
        if not 0 <= i < len(self):
            raise IndexError(i)
        record, other = self._records[i], self._records[(i + 1) % len(self)]
        return replace(record, answers=(record.answers[0], other.answers[0]), scores=None)


def padding_of(tokenizer: Any) -> int:
    """The token that fills rows up."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
