"""``kill -9`` at random moments of a run: what is resumed ends as a run that was left alone, to the bit.

    python tests/train/killed.py 100        in a checkout, for 100 kills; the tests take a handful

A run is started again and again, and killed after a random time, until it ends. Its parameters, its optimizer and its
log are then those of a run that nobody killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TIMINGS = ("seconds", "eval/seconds", "tokens/s")


def config(folder: Path, out: str, **others: Any) -> Any:
    """A run in ``folder``, to be resumed."""
    from train import tiny_run

    from dpofast.train.config import from_dict

    return from_dict(tiny_run.options(folder, **others) | {"out": str(folder / out), "resume": True}, "the test")


def started(run: Any) -> int:
    """A process of its own that runs this, forked from here, where everything is imported: its number."""
    import peft  # noqa: F401  (before the fork: each process would import it, and bitsandbytes behind it)
    from transformers import LlamaForCausalLM  # noqa: F401

    from dpofast.train.run import train

    child = os.fork()
    if child:
        return child
    try:
        with open(os.devnull, "w") as silence:
            os.dup2(silence.fileno(), 1)
            train(run)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def ended(child: int) -> None:
    """Wait for the end of a process, which must be a good one."""
    _, status = os.waitpid(child, 0)
    assert status == 0, f"a run ended with status {status}"


def killed(run: Any, seconds: float) -> bool:
    """Start the run and kill it after so long; False if it had ended by then."""
    child = started(run)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert status == 0, f"after a kill a run ended with status {status}"
    return False


def result(out: Path) -> dict[str, Any]:
    """What a run leaves: the bytes of the model, the state of the trainer, and the log without its timings."""
    import torch

    folder = (out / "last").resolve()
    state = torch.load(folder / "trainer.pt", weights_only=True)
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    weights = next(folder.glob("*.safetensors"))
    return {
        "weights": weights.read_bytes(),
        "optimizer": state["optimizer"]["state"],
        "random": state["random"],
        "log": [{name: x for name, x in entry.items() if name not in TIMINGS} for entry in entries],
    }


def same(a: Any, b: Any) -> bool:
    """Equality to the bit, of tensors in dicts and lists."""
    import torch

    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def expect_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in wanted:
        assert same(found[name], wanted[name]), f"{name} differs from that of the run that nobody killed"


def kill_often(folder: Path, kills: int, seed: int = 0, **others: Any) -> int:
    """Kill runs at ``kills`` random moments and compare each run's end; returns how many runs that were."""
    choice, done, runs = random.Random(seed), 0, 0
    ended(started(config(folder, "whole", **others)))
    start, wanted = time.monotonic(), result(folder / "whole")
    ended(started(config(folder, "again", **others)))  # the first also loads what a process loads once
    seconds = time.monotonic() - start
    while done < kills:
        run = config(folder, f"killed{runs}", **others)
        for _ in range(min(5, kills - done)):
            done += killed(run, choice.uniform(0.0, seconds))
        ended(started(run))
        expect_same(result(folder / f"killed{runs}"), wanted)
        runs += 1
    return runs


def main(kills: int) -> None:
    import torch

    sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "examples")]
    torch.set_num_threads(1)
    ways = ({}, {"lora_rank": 2, "lora_dropout": 0.2}, {"share_prompt": True, "dropout": True})
    for i, others in enumerate(ways):
        part = kills // len(ways) + (i < kills % len(ways))
        with tempfile.TemporaryDirectory() as name:
            runs = kill_often(Path(name), part, i, **others)
        print(f"{others}: {part} kills in {runs} runs, each with the bits of a run that nobody killed", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
