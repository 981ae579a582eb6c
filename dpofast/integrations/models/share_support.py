"""Whether a model's own code can run shared rows: what is known from its parts, and the proof, by running it."""

from __future__ import annotations

import inspect
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpofast.integrations.models.kinds import has, loaded, unwrapped
from dpofast.integrations.models.shared_rows import (
    Part,
    Refused,
    Rows,
    build,
    find_sequences,
    see_the_prefix_and_themselves,
    unshare,
)

IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")
"""Attention that takes any mask."""
_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "attention")
_TOKENS = ("input_ids", "attention_mask", "position_ids")
_REMEDY = "; run it unshared (refuse='warn')"


# The body: what makes hidden states of tokens


def body_of(model: nn.Module) -> nn.Module:
    """The module that takes tokens and returns hidden states; an error for a model that has no shared form."""
    bare = unwrapped(model)
    name = type(bare).__name__
    if getattr(getattr(bare, "config", None), "is_encoder_decoder", False):
        raise _refusal(name, "has an encoder", "a decoder that reads the prompt itself")
    if any(config.is_prompt_learning for config in _active_configs(bare)):
        raise _refusal(name, "has prompt learning, which puts its own vectors before each row", "LoRA, or no adapter")
    owner = next((m for m in bare.modules() if hasattr(m, "get_decoder")), None)
    if owner is None or "transformers.masking_utils" not in sys.modules:
        raise _refusal(name, "has no get_decoder", "a model of transformers (>= 5.6)")
    body = owner.get_decoder()
    if hasattr(body, "get_output_embeddings") and body.get_output_embeddings() is not None:
        body = getattr(body, "model", body)  # get_decoder does not know every family
    _expect_attention_alone(body, name)
    missing = [token for token in _TOKENS if token not in inspect.signature(body.forward).parameters]
    if missing:
        raise _refusal(name, f"takes no {missing[0]} in {type(body).__name__}", "one that is told where its tokens are")
    return body


def _active_configs(bare: nn.Module) -> Iterator[Any]:
    for module in bare.modules():
        if isinstance(module, loaded("peft", "PeftModel")):
            yield module.active_peft_config


def _expect_attention_alone(body: nn.Module, name: str) -> None:
    """An error for layers that go through a row from left to right, or that keep a mask for it."""
    types = set(getattr(body.config, "layer_types", None) or ()) - set(_LAYER_TYPES)
    if getattr(body, "_is_stateful", False) or types or has(body, nn.RNNBase):
        raise _refusal(
            name, " ".join(["has recurrent layers", *sorted(types)]), "layers of attention alone, which take a mask"
        )
    if has(body, nn.Conv1d):
        raise _refusal(name, "has convolutions", "layers of attention alone, which take a mask")
    if getattr(body.config, "alibi", False):
        raise _refusal(name, "biases attention by the distance in a row (alibi)", "positions by position_ids")
    for key, buffer in body.named_buffers():
        if buffer.dtype in (torch.bool, torch.uint8) and buffer.dim() >= 2 and not _is_causal(buffer):
            raise _refusal(name, f"keeps a mask of its own ({key})", "masks made by transformers.masking_utils")


def _is_causal(mask: Tensor) -> bool:
    """Whether it hides what comes later and no more, which is true of shared rows, too."""
    return bool((mask.bool() == torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()).all())


def expect_implementation(body: nn.Module) -> None:
    """An error for attention that takes no mask of any shape, which may be set after the model is patched."""
    found = getattr(body.config, "_attn_implementation", None)
    if found not in IMPLEMENTATIONS:
        raise Refused(
            f"model: got attn_implementation {found!r}, expected one that takes any mask "
            f"({', '.join(IMPLEMENTATIONS)}); model.set_attn_implementation('sdpa') changes it"
        )


def _refusal(name: str, what: str, expected: str) -> Refused:
    return Refused(f"model: {name} {what}, expected {expected}{_REMEDY}")


# A run


class _Masked(NamedTuple):
    """The shared rows that a thread runs, and a note for each mask made for them."""

    rows: Rows
    made: list[int]


_running: ContextVar[_Masked | None] = ContextVar("_running", default=None)
_lock = threading.Lock()
_users: Counter[str] = Counter()
"""How many threads run shared rows with an implementation of attention."""


@contextmanager
def _masks_for(body: nn.Module, rows: Rows) -> Iterator[list[int]]:
    """Let transformers make its masks for ``rows``: each kind of layer asks for its own, by its own function.

    Transformers has one table of these functions for all models. While some thread runs shared rows, an entry stands
    there that knows which: it makes what any other thread asks for as ever.
    """
    interface = sys.modules["transformers.masking_utils"].ALL_MASK_ATTENTION_FUNCTIONS
    name = body.config._attn_implementation
    running = _Masked(rows, [])
    with _lock:
        if not _users[name]:
            interface[name] = _MaskFunction(interface[name], interface._local_mapping.get(name))
        _users[name] += 1
    token = _running.set(running)
    try:
        yield running.made
    finally:
        _running.reset(token)
        with _lock:
            _users[name] -= 1
            if not _users[name]:
                replaced = interface[name].replaced
                del interface[name]
                if replaced is not None:
                    interface[name] = replaced


class _MaskFunction:
    """Stands where ``make``, a function of transformers', stands in its table; ``replaced`` if that was set there."""

    def __init__(self, make: Callable[..., Any], replaced: Callable[..., Any] | None) -> None:
        self.make, self.replaced = make, replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        running = _running.get()
        if running is None:
            return self.make(*args, **kwargs)
        running.made.append(1)
        here = Rows(*(x.to(kwargs.get("device", x.device)) for x in running.rows))
        kwargs["mask_function"] = see_the_prefix_and_themselves(here, kwargs["mask_function"])
        kwargs["attention_mask"] = None  # rows.part knows the padding
        kwargs["allow_is_causal_skip"] = False  # a kernel's own causal mask is another one
        return self.make(*args, **kwargs)


def run_shared(
    body: nn.Module, forward: Callable[..., Any], inputs: Mapping[str, Any], rows: Rows, positions: Tensor
) -> Any:
    """What ``forward``, that of ``body``, returns of ``inputs``, computed by ``rows``.

    ``positions`` are those ``[R, L]`` of the tokens. ``inputs`` have input_ids of the batch and may have more.
    """
    shared = {
        **inputs,
        "input_ids": inputs["input_ids"].flatten()[rows.source],
        "attention_mask": (rows.part >= 0).long(),  # not None: positions that restart would then mean packed rows
        "position_ids": positions,
        "use_cache": False,
    }
    with _masks_for(body, rows) as made:
        output = forward(**shared)
    if not made:
        raise _refusal(
            type(body).__name__, "makes its masks elsewhere than in transformers.masking_utils", "masks made there"
        )
    if isinstance(output, tuple):
        return (unshare(output[0], rows), *output[1:])
    output["last_hidden_state"] = unshare(output["last_hidden_state"], rows)
    return output


# The proof


class Proof(NamedTuple):
    """What running a model has shown.

    Attributes:
        refusal: why its hidden states are not those of the unshared rows; None where they are.
        shiftable: whether only differences of positions count, as with rotary embeddings, so that padding before a
            sequence may be left out of them.
    """

    refusal: str | None
    shiftable: bool


_CHOSEN, _REJECTED, _PREFIX = (46, 31), (9, 44), (6, 8)
"""Tokens of two pairs, and how many each pair shares. Rests are long, so that a distance by places shows; all fit in an
embedding of 64 positions."""


@torch.compiler.disable
@torch.no_grad()
def prove(body: nn.Module, forward: Callable[..., Any]) -> Proof:
    """Run two pairs of a few tokens as they are and shared, without dropout, and compare.

    This is what finds biases by distance in the row, state that passes from token to token, and whatever else looks at
    a row in a way of its own.
    """
    ids, mask = _pairs(body)
    sequences = find_sequences(ids, mask)
    chosen = [
        [Part(i, 0, _PREFIX[i], 0), Part(i, _PREFIX[i], _CHOSEN[i], 1), Part(i + 2, _PREFIX[i], _REJECTED[i], 2)]
        for i in range(2)
    ]
    rows = build(chosen, sequences, tuple(ids.shape))
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    with _evaluating(body):
        plain = forward(**inputs, position_ids=places)[0]
        try:
            shared = run_shared(body, forward, inputs, rows, rows.offset)[0]
        except Refused as refusal:
            return Proof(str(refusal), False)
        moved = forward(**inputs, position_ids=places + 9)[0]
    there = mask.bool().to(plain.device)
    error, shift = (_distance(x[there], plain[there]) for x in (shared, moved))
    # Autocast multiplies in 16 bits, whatever the last norm gives back.
    short = plain.dtype.itemsize < 4 or torch.is_autocast_enabled(plain.device.type)
    limit = 0.05 if short else 1e-3  # rounding to 8 bits in many layers; TF32
    refusal = _refusal(
        type(body).__name__, f"gives other hidden states in shared rows (by {error:.1e} of their size)",
        "attention by masks and position_ids alone",
    )  # fmt: skip
    return Proof(None if error <= limit else str(refusal), shift <= limit and not _embeds_more_than_tokens(body))


def _embeds_more_than_tokens(body: nn.Module) -> bool:
    """Whether there may be an embedding of positions, whose differences in 16 bits could pass for rounding."""
    tokens = set(body.get_input_embeddings().modules())
    return any(isinstance(module, nn.Embedding) and module not in tokens for module in body.modules())


def _pairs(body: nn.Module) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask of two pairs."""
    table = body.get_input_embeddings()
    lengths = torch.tensor([*_CHOSEN, *_REJECTED])
    ids = torch.randint(table.num_embeddings, (4, max(lengths)), generator=torch.Generator().manual_seed(0))
    for i, prefix in enumerate(_PREFIX):
        ids[i + 2, :prefix] = ids[i, :prefix]
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return ids.to(table.weight.device), mask.to(table.weight.device)


def _distance(found: Tensor, wanted: Tensor) -> float:
    """The mean over tokens of the error of a token's vector, relative to it."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-30)).mean().item()


@contextmanager
def _evaluating(body: nn.Module) -> Iterator[None]:
    """The modules that train, for a while in eval mode, each by itself."""
    training = [module for module in body.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
