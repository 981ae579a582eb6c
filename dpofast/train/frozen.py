"""What frozen layers make of a sequence of tokens, on disk: computed once, however often the sequence comes again.

Nothing changes below the lowest trained layer, so the hidden states that enter it are the same in every epoch, in every
evaluation, and for the reference. With ``cache_frozen`` the layers below run for batches with a sequence that is new.
All others pass them by, and the states that were kept go on in their place. A row that runs a prompt once counts as the
sequences that it is made of: whether another batch shares the prompt does not matter.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dpofast.checks import wrong
from dpofast.train.freezing import last_layers, layers_of
from dpofast.train.ledger import Ledger, append

_RECORD = np.dtype([("key", "V16"), ("first", "<i8"), ("size", "<i8")])


class Store(Protocol):
    """Bytes, by a key."""

    def __contains__(self, key: bytes) -> bool: ...

    def __getitem__(self, key: bytes) -> bytes: ...

    def __setitem__(self, key: bytes, content: bytes) -> None: ...


class FileStore:
    """A `Store` on disk: a file of contents, and a `Ledger` of where each begins."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self._ledger = Ledger("cache_frozen", path.with_suffix(".index"), identity, _RECORD)
        path.touch()
        self._end = path.stat().st_size
        found = self._ledger.found
        there = int((found["first"] + found["size"] <= self._end).sum())
        self._ledger.cut(there)  # of content that was lost: what comes next will be in its place
        self._places = {key.tobytes(): (int(first), int(size)) for key, first, size in found[:there]}

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __getitem__(self, key: bytes) -> bytes:
        first, size = self._places[key]
        with self.path.open("rb") as file:
            file.seek(first)
            return file.read(size)

    def __setitem__(self, key: bytes, content: bytes) -> None:
        append(self.path, content)
        self._ledger.append([(np.void(key), self._end, len(content))])  # behind its content, which is whole then
        self._places[key] = self._end, len(content)
        self._end += len(content)


class _Path(NamedTuple):
    """A sequence in row ``row`` of a call: the key of its tokens, and their places ``[n]`` in the row."""

    key: bytes
    row: int
    places: Tensor


class _Call(NamedTuple):
    paths: list[_Path]
    skips: bool


class FrozenLayers:
    """The frozen layers of a model, which run for sequences that ``store`` does not have.

    Args:
        model: a model of Transformers, of which ``count`` last layers are trained, in eval mode or without dropout.
        count: the number of trained layers.
        precision: of the frozen ones: "fp32", or "bf16" under autocast.
        store: where states are looked up, and kept.

    Raises:
        ValueError: frozen layers hand more to the trained ones than hidden states, as those do that share keys.
    """

    def __init__(self, model: nn.Module, count: int, precision: str, store: Store) -> None:
        self.store, self.precision = store, precision
        self._call: _Call | None = None
        self._returns_tuple, self._dtype = False, torch.float32
        self._device = next(model.parameters()).device.type
        layers = layers_of(model)
        trained = last_layers(model, count)
        frozen = [layer for name, layer in layers.items() if name not in trained]
        if not frozen:
            return
        body = model.get_submodule(".".join(next(iter(layers)).split(".")[:-2]))
        forward = body.forward
        signature = inspect.signature(forward)

        @functools.wraps(forward)
        def called(*args: Any, **kwargs: Any) -> Any:
            self._call = self._of(signature.bind(*args, **kwargs).arguments)
            try:
                return forward(*args, **kwargs)
            finally:
                self._call = None

        body.forward = called
        for i, layer in enumerate(frozen):
            layer.forward = self._passed(layer.forward, last=i == len(frozen) - 1)
        self._prove(body)

    def _of(self, arguments: Mapping[str, Any]) -> _Call | None:
        """What a call is of; None where its tokens are not known."""
        inputs = {**arguments, **arguments.get("kwargs", {})}
        ids, mask, positions = (inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        if ids is None or inputs.get("past_key_values") is not None or (mask is not None and mask.dim() != 2):
            return None
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
        positions = positions.expand_as(ids)
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        paths = [
            _Path(_key(ids[i, places], positions[i, places]), i, places)
            for i, row in enumerate(positions)
            for places in _paths(row, real[i].nonzero()[:, 0])
            if len(places)
        ]
        return _Call(paths, all(path.key in self.store for path in paths))

    def _passed(self, forward: Callable[..., Any], last: bool) -> Callable[..., Any]:
        """The forward of a frozen layer, which a call passes by whose rows are all known."""

        @functools.wraps(forward)
        def passed(*args: Any, **kwargs: Any) -> Any:
            call = self._call
            if call is not None and call.skips:
                output = self._as_output(args[0] if args else kwargs["hidden_states"])
            else:
                with torch.autocast(self._device, torch.bfloat16, enabled=self.precision == "bf16"):
                    output = forward(*args, **kwargs)
                self._returns_tuple = isinstance(output, tuple)
            if call is None or not last:
                return output
            hidden = output[0] if self._returns_tuple else output
            return self._as_output(self._exchanged(hidden, call), output)

        return passed

    def _as_output(self, hidden: Tensor, output: Any = ()) -> Any:
        """``hidden`` as a layer returns it, with what else is in ``output``."""
        return (hidden, *output[1:]) if self._returns_tuple else hidden

    def _exchanged(self, hidden: Tensor, call: _Call) -> Tensor:
        """The states of the sequences as they are kept, 0 at padding; those that are new are kept first.

        What is new in a batch goes on as it is kept, as it will when it comes again, so that bits are the same for a
        training that is resumed.
        """
        if not call.skips:
            self._dtype = hidden.dtype
        states = hidden.new_zeros(hidden.shape, dtype=self._dtype)
        for key, row, places in reversed(call.paths):  # what several begin with is that of the first
            if key not in self.store:
                new = hidden[row, places].detach().cpu().contiguous()
                self.store[key] = new.view(torch.uint8).numpy().tobytes()
            kept = torch.frombuffer(bytearray(self.store[key]), dtype=self._dtype)
            states[row, places] = kept.view(-1, hidden.shape[-1]).to(hidden.device)
        return states

    @torch.no_grad()
    def _prove(self, body: nn.Module) -> None:
        """Run two rows of a few tokens, and again with what is kept of them."""
        kept, self.store = self.store, {}
        device = next(body.parameters()).device
        ids = torch.arange(2, 16, device=device).view(2, 7) % body.config.vocab_size
        try:
            one, two = (body(input_ids=ids, use_cache=False)[0] for _ in range(2))
        finally:
            self.store = kept
        error = (one - two).abs().max().item()
        if not error <= 1e-5 * one.abs().max().item():
            what = f"frozen layers of {type(body).__name__} hand more than hidden states to those that are trained"
            raise wrong("cache_frozen", repr(self.precision), f"nothing: {what}")


def _paths(positions: Tensor, real: Tensor) -> Iterator[Tensor]:
    """The sequences of a row, as the places of their tokens: all that has a token is in ``real``.

    A row that runs a prompt once is [prefix, rest 1, ..., rest K], and every rest begins at the same position, the one
    behind the prefix: a sequence is the prefix and a rest. Any other row counts as one sequence.
    """
    found = positions[real]
    begins = (found.diff() != 1).nonzero()[:, 0] + 1
    lengths = (found[begins] - found[0]).unique().tolist() if len(begins) else [0]
    prefix = lengths[0]
    if len(lengths) > 1 or not 0 <= prefix <= min(begins.tolist(), default=0):
        yield real
        return
    rests = torch.tensor_split(real[prefix:], (begins - prefix).cpu())
    for rest in rests:
        yield torch.cat((real[:prefix], rest))


def _key(ids: Tensor, positions: Tensor) -> bytes:
    """A hash of a sequence's tokens, and of where they are."""
    content = torch.stack((ids, positions)).cpu().numpy().astype("<i8").tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()
