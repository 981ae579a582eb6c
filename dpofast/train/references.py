"""The reference's log-probs on disk: computed once, kept beside what they are of, and never used for anything else.

A record is of one sequence: a hash of its tokens, and the sum of its answer's log-probs. The identity is that of
model, data and encoding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpofast.checks import wrong
from dpofast.train.checkpoint import sha256
from dpofast.train.ledger import Ledger

_RECORD = np.dtype([("key", "V16"), ("logp", "<f4")])


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
        self.path = path
        self._file = Ledger("references", path, identity, _RECORD, writes)
        self._logps: dict[bytes, float] = {}
        for key, logp in self._file.found:
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
        self._file.append([(np.void(key), logp) for key, logp in new.items()])

    def sync(self) -> None:
        """Have all that was added on the disk."""
        self._file.sync()

    def of(self, keys: Sequence[bytes], device: torch.device | str = "cpu") -> Tensor:
        """The log-probs ``[N]`` of these sequences."""
        if not self.has(keys):
            raise ValueError(
                f"references: {self.path} does not have every sequence of the batch; remove it to begin again"
            )
        return torch.tensor([self._logps[key] for key in keys], dtype=torch.float32, device=device)
