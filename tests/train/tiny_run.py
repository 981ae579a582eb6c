"""A tiny model and tiny pairs in a folder, as a user has them: what the tests of the trainer train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny


def write_model(folder: Path) -> str:
    """The model of examples/tiny.py with its tokenizer, as `save_pretrained` leaves them."""
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def write_pairs(path: Path, count: int, skip: int = 0) -> str:
    """``count`` pairs as lines of JSON, other ones for another ``skip``."""
    rows = tiny.pairs(skip + count)[skip:]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def options(folder: Path, **others: Any) -> dict[str, Any]:
    """Options of a run of 8 steps on 20 pairs, written into ``folder`` where they are not there yet."""
    model, data = folder / "model", folder / "train.jsonl"
    if not model.exists():
        write_model(model)
        write_pairs(data, 20)
        write_pairs(folder / "held_out.jsonl", 9, skip=20)
    return {
        "model": str(model), "data": [str(data)], "eval_data": [str(folder / "held_out.jsonl")],
        "out": str(folder / "run"), "batch_size": 4, "micro_batch": 2, "steps": 8, "learning_rate": 1e-2,
        "evaluate_every": 4, "save_every": 2, "tensorboard": False, "picture": False, **others,
    }  # fmt: skip
