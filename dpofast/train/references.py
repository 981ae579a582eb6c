"""The reference's log-probs on disk: computed once, kept beside what they are of, and never used for anything else.

The file is a line of JSON, the identity of model, data and encoding, and then one record for each sequence: a hash of
its tokens, and the sum of its answer's log-probs. It only ever grows at its end, so a process that ends while it
writes leaves at most a part of a record, which the next one cuts off.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpofast.checks import wrong
from dpofast.train.checkpoint import sha256

_RECORD = np.dtype([("key", "V16"), ("logp", "<f4")])
_FORMAT = 1


def model_identity(folder: str) -> str:
    """A hash of a model's files: weights, configuration, tokenizer and chat template."""
    root = Path(folder)
    suffixes = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".gguf")
    files = sorted(path for path in root.iterdir() if path.suffix in suffixes) if root.is_dir() else []
    if not files:
        raise wrong("model", repr(folder), "a folder with a model that Transformers reads")
    return combined((path.name, sha256(path)) for path in files)


def combined(parts: Any) -> str:
    """One hash of several strings, or tuples of them."""
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()


def keys_of(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> list[bytes]:
    """A hash of each sequence ``[N, T]``: its tokens and which of them count, wherever the padding is."""
    rows = zip(input_ids.cpu().numpy(), attention_mask.cpu().numpy().astype(bool), labels.cpu().numpy() != -100)
    return [
        hashlib.blake2b(ids[real].astype("<i8").tobytes() + counts[real].tobytes(), digest_size=16).digest()
        for ids, real, counts in rows
    ]


class References:
    """The log-probs of a file, by sequence. ``writes`` is True on the one rank that adds to it."""

    def __init__(self, path: Path, identity: Mapping[str, Any], writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self._logps: dict[bytes, float] = {}
        header = json.dumps({"format": _FORMAT, **identity}, sort_keys=True).encode() + b"\n"
        if not path.exists():
            if writes:
                self._begin(header)
            return
        content = path.read_bytes()
        found, newline, records = content.partition(b"\n")
        self._expect_identity(found + newline, header)
        whole = len(records) // _RECORD.itemsize * _RECORD.itemsize
        if writes and whole < len(records):
            os.truncate(path, len(header) + whole)
        for key, logp in np.frombuffer(records[:whole], _RECORD):
            self._logps.setdefault(key.tobytes(), float(logp))

    def __len__(self) -> int:
        return len(self._logps)

    def has(self, keys: Sequence[bytes]) -> bool:
        """Whether all of these sequences are known."""
        return all(key in self._logps for key in keys)

    def add(self, keys: Sequence[bytes], logps: Sequence[float]) -> None:
        """Keep the log-probs of some sequences. Of one that is known already the first stay."""
        new = {key: logp for key, logp in zip(keys, logps, strict=True) if key not in self._logps}
        self._logps |= new
        if self.writes and new:
            with self.path.open("ab") as file:
                file.write(np.array([(np.void(key), logp) for key, logp in new.items()], _RECORD).tobytes())

    def sync(self) -> None:
        """Have all that was added on the disk."""
        if self.writes:
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def of(self, keys: Sequence[bytes], device: torch.device | str = "cpu") -> Tensor:
        """The log-probs ``[N]`` of these sequences."""
        if not self.has(keys):
            raise ValueError(
                f"references: {self.path} does not have every sequence of the batch; remove it to begin again"
            )
        return torch.tensor([self._logps[key] for key in keys], dtype=torch.float32, device=device)

    def _begin(self, header: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(self.path.name + ".unfinished")
        with draft.open("wb") as file:
            file.write(header)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.path)

    def _expect_identity(self, found: bytes, header: bytes) -> None:
        remedy = "remove that file, or name another with references"
        try:
            before = json.loads(found)
        except ValueError as error:
            raise ValueError(f"references: {self.path} is not a file of log-probs ({error}); {remedy}") from error
        now = json.loads(header)
        other = [name for name in now if before.get(name) != now[name]] if isinstance(before, dict) else ["format"]
        if other:
            raise ValueError(
                f"references: {self.path} was made with another {', '.join(other)}; its log-probs would be wrong "
                f"here: {remedy}"
            )
