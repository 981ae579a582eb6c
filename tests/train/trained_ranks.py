"""Run by `test_ranks.py` on two ranks: the same training as on one, which is in the folder named first."""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import launch
from train import tiny_run

from dpofast.train import checkpoint, engine
from dpofast.train.config import from_dict
from dpofast.train.run import train

WAYS = {
    "full": {},
    "lora": {"lora_rank": 2},
    "sharded": {"shard": True},
    "sharded lora": {"shard": True, "lora_rank": 2, "share_prompt": True},
    "kto": {"loss_type": ["kto"], "data": "single", "eval_data": []},
    "bco": {"loss_type": ["bco"], "data": "single", "eval_data": []},
    "lists": {"loss_type": ["lipo_lambda"], "data": "lists", "eval_data": []},
    "sharded last layer": {"shard": True, "last_layers": 1},
    "shared": {"share_prompt": True, "loss_type": ["sigmoid", "apo_zero"]},
}


def run(folder: Path, out: str, **others) -> Path:
    options = tiny_run.options(folder, **others) | {"out": str(folder / out)}
    if isinstance(options["data"], str):
        options["data"] = [str(folder / f"{options['data']}.jsonl")]
    train(from_dict(options, "the test"))
    return folder / out


def signalled(folder: Path, **others) -> None:
    """A signal that comes to one rank stops both after the same step; resumed, the bits are the same."""
    out = f"ranks-signal{len(others)}"
    real, calls = engine.Training.step, []

    def noted(self):
        calls.append(None)
        if len(calls) == 3 and self.ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self)

    engine.Training.step = noted
    run(folder, out, dropout=True, **others)
    engine.Training.step = real
    assert checkpoint.steps(folder / out / "checkpoints")[0] == 3
    run(folder, out, dropout=True, resume=True, **others)
    run(folder, out.replace("signal", "whole"), dropout=True, **others)


def without_room(folder: Path) -> None:
    """A full disk on the first rank is an error on both, and none waits for the other."""
    real = checkpoint.write
    checkpoint.write = full
    try:
        run(folder, "ranks-disk")
    except checkpoint.NoRoom:
        return
    finally:
        checkpoint.write = real
    raise AssertionError("no error")


def full(*_args):
    raise checkpoint.NoRoom("full")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=launch.HANG))
    where = Path(sys.argv[1])
    for name, others in WAYS.items():
        run(where, f"ranks-{name}", **others)
    signalled(where)
    signalled(where, shard=True)
    without_room(where)
    if os.environ["RANK"] == "0":
        print("passed all", flush=True)
    dist.barrier()
    dist.destroy_process_group()
