"""An order of records that a seed and an epoch decide, and that goes on where it stopped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from dpofast.checks import shown, wrong

T = TypeVar("T")


def shuffle(records: Sequence[T], *, seed: int = 0) -> Shuffle[T]:
    """Records in a random order, another one each epoch; where the reading is can be saved.

    Equivalent, for each epoch, to::

        [records[i] for i in numpy.random.default_rng([seed, epoch]).permutation(len(records))]

    Args:
        records: what has ``len`` and can be picked by number, such as `Records` of files or a list.
        seed: an int >= 0.

    Returns:
        `Shuffle`.

    Raises:
        TypeError: records of a stream or of a ``.gz``, which cannot be picked.

    Example:
        >>> order = shuffle("abcdef", seed=1)
        >>> first = next(iter(order))
        >>> state = order.state_dict()
        >>> resumed = shuffle("abcdef", seed=1)
        >>> resumed.load_state_dict(state)
        >>> sorted([first, *resumed])
        ['a', 'b', 'c', 'd', 'e', 'f']
    """
    return Shuffle(records, seed)


class Shuffle(Generic[T]):
    """Records in random order, made by `shuffle`. Each pass gives what is left of an epoch, then the next one begins.

    Attributes:
        epoch: the epoch that the next record is of, from 0.
        at: how many records of it were given.
    """

    def __init__(self, records: Sequence[T], seed: int) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise wrong("seed", shown(seed), "an int >= 0")
        self._records, self._seed, self._size = records, seed, len(records)
        self.epoch = self.at = 0
        self._order: tuple[int, np.ndarray] = -1, np.empty(0)

    def __len__(self) -> int:
        """How many records an epoch has."""
        return self._size

    def __iter__(self) -> Iterator[T]:
        epoch = self.epoch
        while self.epoch == epoch and self._size:
            record = self._records[int(self._permutation()[self.at])]
            self.at += 1
            if self.at == self._size:
                self.epoch, self.at = self.epoch + 1, 0
            yield record

    def _permutation(self) -> np.ndarray:
        if self._order[0] != self.epoch:
            order = np.random.default_rng([self._seed, self.epoch]).permutation(self._size)
            self._order = self.epoch, order
        return self._order[1]

    def state_dict(self) -> dict[str, int]:
        """Where the reading is: whatever was given is not given again."""
        return {"seed": self._seed, "records": self._size, "epoch": self.epoch, "at": self.at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a `state_dict` was made; a ValueError where it is of another seed or of other data."""
        for name, mine in (("seed", self._seed), ("records", self._size)):
            if state[name] != mine:
                raise wrong(
                    "state", f"{name} {state[name]!r}", f"{mine}, as here; begin anew or restore what it was made with"
                )
        self.epoch, self.at = int(state["epoch"]), int(state["at"])
