"""Where a training is, and how that is kept: all that is not the model, in one file of a checkpoint."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpofast.train import checkpoint


@dataclass
class Position:
    """How far a training is, and what it has found on the way."""

    step: int = 0
    evaluated: int = -1  # the last step after which the held-out data was evaluated
    best: float | None = None  # the best evaluation's value, of which less is better
    best_step: int | None = None
    worse: int = 0  # evaluations since the best
    tokens: int = 0
    seconds: float = 0.0  # of training, without what comes before the first step
    log_bytes: int = 0

    def judge(self, value: float) -> bool:
        """Note an evaluation after this step; returns whether it is the best so far."""
        better = self.best is None or value < self.best
        if better:
            self.best, self.best_step, self.worse = value, self.step, 0
        else:
            self.worse += 1
        self.evaluated = self.step
        return better


def random_numbers() -> dict[str, Any]:
    """The state of every generator that this process may draw from."""
    _, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": [keys.tolist(), *rest]}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_numbers(state: Mapping[str, Any]) -> None:
    """Go on from `random_numbers`."""
    version, words, gauss = state["python"]
    torch.set_rng_state(state["torch"])
    random.setstate((version, tuple(words), gauss))
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, np.uint32), *rest))
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that can be read, or None, and what could not be read, each in a sentence.

    Newer ones that cannot be read are set aside.

    Raises:
        checkpoint.Unreadable: there are checkpoints, and none can be read.
    """
    notes = [f"{path}: was not written to its end, and is left out" for path in checkpoint.clear(root)]
    broken: dict[Path, str] = {}
    for step in checkpoint.steps(root):
        folder = checkpoint.folder_of(root, step)
        try:
            checkpoint.check(folder)
        except checkpoint.Unreadable as error:
            broken[folder] = str(error)
            continue
        for other, why in broken.items():
            notes.append(f"{why}; set aside as {checkpoint.set_aside(other).name}")
        return folder, notes
    if broken:
        raise checkpoint.Unreadable(f"{'; '.join(broken.values())}. None is left; remove {root} to begin again")
    return None, notes


def save(kept: Mapping[str, Any], folder: Path) -> None:
    """Keep this beside the model."""
    try:
        torch.save(kept, folder / checkpoint.STATE)
    except RuntimeError as error:  # torch's word for a write that fails
        raise OSError(f"{checkpoint.STATE}: {error}") from error


def load(folder: Path) -> dict[str, Any]:
    """What `dpofast.train` kept beside the model; tensors, numbers and text, never code."""
    return torch.load(folder / checkpoint.STATE, weights_only=True, map_location="cpu")


def position_of(kept: Mapping[str, Any]) -> Position:
    return Position(**kept["position"])


def as_dict(position: Position) -> dict[str, Any]:
    return dataclasses.asdict(position)


def point(link: Path, target: Path) -> None:
    """Let ``link`` lead to ``target``, from one moment to the next."""
    draft = link.with_name(link.name + ".new")
    draft.unlink(missing_ok=True)
    draft.symlink_to(os.path.relpath(target, link.parent))
    draft.replace(link)
