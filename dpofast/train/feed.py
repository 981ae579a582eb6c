"""The data of a training: pairs read from files, encoded, and handed out in the order that the seed decides."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpofast.train import model
from dpofast.train.config import Config
from dpofast.train.ranks import Ranks
from dpofast.train.references import keys_of

IGNORE = -100
SIDES = ("chosen", "rejected")


class Pair(NamedTuple):
    """A prompt and two answers in token ids, and what the data says of them."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    margin: float | None = None
    weight: float | None = None


@dataclass(frozen=True)
class Batch:
    """``records`` pairs as ``[chosen; rejected]``, padded on the right; ``keys`` are hashes of the sequences."""

    inputs: dict[str, Tensor]
    labels: Tensor
    records: int
    margin: Tensor | None = None
    weight: Tensor | None = None
    keys: list[bytes] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return int(self.inputs["attention_mask"].sum())

    def to(self, device: torch.device) -> Batch:
        def moved(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        inputs = {name: x.to(device) for name, x in self.inputs.items()}
        return replace(
            self, inputs=inputs, labels=self.labels.to(device), margin=moved(self.margin), weight=moved(self.weight)
        )


def collate(pairs: Sequence[Pair], pad: int) -> Batch:
    """Some pairs as a batch."""
    ids, labels = [], []
    for side in SIDES:
        for pair in pairs:
            answer = getattr(pair, side)
            ids.append(torch.tensor(pair.prompt + answer))
            labels.append(torch.tensor((IGNORE,) * len(pair.prompt) + answer))
    padded = torch.nn.utils.rnn.pad_sequence
    input_ids = padded(ids, batch_first=True, padding_value=pad)
    mask = padded([torch.ones_like(row) for row in ids], batch_first=True)
    targets = padded(labels, batch_first=True, padding_value=IGNORE)
    return Batch(
        {"input_ids": input_ids, "attention_mask": mask}, targets, len(pairs),
        _column([pair.margin for pair in pairs], 0.0), _column([pair.weight for pair in pairs], 1.0),
        keys_of(input_ids, mask, targets),
    )  # fmt: skip


def _column(values: Sequence[float | None], default: float) -> Tensor | None:
    """A number of each pair; None where no pair has one."""
    if all(value is None for value in values):
        return None
    return torch.tensor([default if value is None else value for value in values])


class Feed:
    """The micro-batches of this rank, step by step without end, and those of the held-out data."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.tokenizer = model.load_tokenizer(config.model)
        self.pairs, self._held_out = (list(self._read(paths)) for paths in (config.data, config.eval_data))
        self.records, self.epoch, self.at = len(self.pairs), 0, 0
        if config.batch_size % (config.micro_batch * ranks.world):
            raise ValueError(
                f"batch_size: got {config.batch_size}, expected a multiple of micro_batch times the ranks, "
                f"{config.micro_batch} x {ranks.world}"
            )
        if not self.pairs:
            raise ValueError(f"data: got no record in {', '.join(config.data)}, expected at least one")

    def step(self) -> list[Batch]:
        """This rank's share of the next step; a step may reach into the next epoch."""
        pairs: list[Pair] = []
        while len(pairs) < self.config.batch_size:
            order = random.Random(f"{self.config.seed} {self.epoch}").sample(range(self.records), self.records)
            taken = order[self.at : self.at + self.config.batch_size - len(pairs)]
            pairs += [self.pairs[i] for i in taken]
            self.at += len(taken)
            if self.at == self.records:
                self.epoch, self.at = self.epoch + 1, 0
        return list(self._batches(pairs))[self.ranks.rank :: self.ranks.world]

    def held_out(self) -> Iterator[Batch]:
        """The held-out data in its order, on all ranks."""
        return self._batches(self._held_out)

    def everything(self) -> Iterator[Batch]:
        """All data in its order, on all ranks."""
        yield from self._batches(self.pairs)
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

    def _batches(self, pairs: Sequence[Pair]) -> Iterator[Batch]:
        size = self.config.micro_batch
        pad = self.tokenizer.pad_token_id
        for i in range(0, len(pairs), size):
            yield collate(pairs[i : i + size], self.tokenizer.eos_token_id if pad is None else pad)

    def _read(self, paths: Iterable[str]) -> Iterator[Pair]:
        for path in paths:
            with Path(path).open(encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    try:
                        yield self._encode(json.loads(line))
                    except (KeyError, TypeError, ValueError) as error:
                        raise ValueError(
                            f"data: {path}:{number}: {error!r}; expected prompt, chosen, rejected"
                        ) from error

    def _encode(self, row: Mapping[str, Any]) -> Pair:
        def ids(text: str) -> tuple[int, ...]:
            return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

        prompt, room = ids(row["prompt"]), self.config.max_length
        answers = [(prompt + ids(row[side]) + (self.tokenizer.eos_token_id,))[:room][len(prompt) :] for side in SIDES]
        if not prompt or not all(answers):
            raise ValueError(f"no prompt, or no answer within max_length={room} tokens")
        return Pair(prompt, *answers, row.get("margin"), row.get("weight"))
