"""The data of a training: records read from files, encoded, and handed out in the order that the seed decides."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dpofast.train import model
from dpofast.train.config import Config
from dpofast.train.ranks import Ranks
from dpofast.train.records import Record, read
from dpofast.train.references import keys_of

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """``records`` records as ``[chosen; rejected]``, or the blocks of all first, second, ... answers, padded right.

    Attributes:
        inputs, labels: ``[N, T]``, for `dpofast.integrations.models.model_logprob`.
        margin, weight, good: ``[records]``, or None where no record has one; good is bool.
        keys: a hash of each sequence.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    records: int
    margin: Tensor | None = None
    weight: Tensor | None = None
    good: Tensor | None = None
    keys: list[bytes] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return int(self.inputs["attention_mask"].sum())

    def to(self, device: torch.device) -> Batch:
        def moved(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        inputs = {name: x.to(device) for name, x in self.inputs.items()}
        columns = {name: moved(getattr(self, name)) for name in ("margin", "weight", "good")}
        return replace(self, inputs=inputs, labels=self.labels.to(device), **columns)


def collate(records: Sequence[Record], pad: int) -> Batch:
    """Some records of as many answers each as a batch."""
    ids, labels = [], []
    for i in range(len(records[0].answers)):
        for record in records:
            answer = record.answers[i]
            ids.append(torch.tensor(record.prompt + answer))
            labels.append(torch.tensor((IGNORE,) * len(record.prompt) + answer))
    padded = torch.nn.utils.rnn.pad_sequence
    input_ids = padded(ids, batch_first=True, padding_value=pad)
    mask = padded([torch.ones_like(row) for row in ids], batch_first=True)
    targets = padded(labels, batch_first=True, padding_value=IGNORE)
    return Batch(
        {"input_ids": input_ids, "attention_mask": mask}, targets, len(records),
        _column([record.margin for record in records], 0.0), _column([record.weight for record in records], 1.0),
        _column([record.label for record in records], False),
        keys_of(input_ids, mask, targets),
    )  # fmt: skip


def _column(values: Sequence[float | bool | None], default: float | bool) -> Tensor | None:
    """A number of each pair; None where no pair has one."""
    if all(value is None for value in values):
        return None
    return torch.tensor([default if value is None else value for value in values])


class Feed:
    """The micro-batches of this rank, step by step without end, and those of the held-out data."""

    def __init__(self, config: Config, ranks: Ranks, answers: int = 2, mismatches: bool = False) -> None:
        self.config, self.ranks, self.answers, self.mismatches = config, ranks, answers, mismatches
        self.tokenizer = model.load_tokenizer(config.model)
        self._train, self._held_out = (self._read(paths) for paths in (config.data, config.eval_data))
        self.records, self.epoch, self.at = len(self._train), 0, 0
        self._shuffled: tuple[int, list[int]] = -1, []
        if config.batch_size % (config.micro_batch * ranks.world):
            raise ValueError(
                f"batch_size: got {config.batch_size}, expected a multiple of micro_batch times the ranks, "
                f"{config.micro_batch} x {ranks.world}"
            )
        if not self._train:
            raise ValueError(f"data: got no record in {', '.join(config.data)}, expected at least one")

    def step(self) -> list[Batch]:
        """This rank's share of the next step; a step may reach into the next epoch."""
        records: list[Record] = []
        while len(records) < self.config.batch_size:
            taken = self._order(self.epoch)[self.at : self.at + self.config.batch_size - len(records)]
            records += [self._train[i] for i in taken]
            self.at += len(taken)
            if self.at == self.records:
                self.epoch, self.at = self.epoch + 1, 0
        return list(self._batches(records))[self.ranks.rank :: self.ranks.world]

    def _order(self, epoch: int) -> list[int]:
        """The order of an epoch's records, which the seed and the epoch decide alone."""
        if self._shuffled[0] != epoch:
            rng = random.Random(f"{self.config.seed} {epoch}")
            self._shuffled = epoch, rng.sample(range(self.records), self.records)
        return self._shuffled[1]

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
        return {"epoch": self.epoch, "at": self.at}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.epoch, self.at = state["epoch"], state["at"]

    def _batches(self, records: Sequence[Record]) -> Iterator[Batch]:
        size = self.config.micro_batch
        for i in range(0, len(records), size):
            yield collate(records[i : i + size], padding_of(self.tokenizer))

    def _read(self, paths: Iterable[str]) -> list[Record]:
        """The records of some files, which must have as many answers as the loss compares."""
        records = list(read(paths, self.tokenizer, self.config.max_length))
        for record in records:
            if len(record.answers) != self.answers:
                expected = "chosen and rejected" if self.answers == 2 else "a completion with a label"
                raise ValueError(f"data: {record.where} has {len(record.answers)} answers; the loss needs {expected}")
            if self.answers == 1 and record.label is None:
                raise ValueError(f"data: {record.where} has no label, expected true or false")
        return with_mismatches(records, self.config.max_length) if self.mismatches else records


def with_mismatches(records: Sequence[Record], max_length: int) -> list[Record]:
    """Each record with the next one's answer as a second answer to its prompt: what `kto` measures its KL on."""
    if len(records) == 1:
        raise ValueError(f"data: {records[0].where} is the only record, and the KL needs another one's answer")
    others = [record.answers[0] for record in (*records[1:], *records[:1])]
    return [
        record._replace(answers=(record.answers[0], other[: max(1, max_length - len(record.prompt))]))
        for record, other in zip(records, others)
    ]


def padding_of(tokenizer: Any) -> int:
    """The token that fills rows up."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
