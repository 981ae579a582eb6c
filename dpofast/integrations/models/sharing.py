"""`share_prompt`: a model that is called with [chosen; rejected], or K answers, runs each prompt once.

The model's own code runs, and nothing of it is replaced but what it is asked: the forward of its body, which makes
hidden states of tokens, is called with rows [prefix, rest 1, ..., rest K], and its hidden states are handed on in the
layout of the batch, so that head and loss see what they would have seen.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dpofast.checks import shown, wrong
from dpofast.integrations.models.share_support import Proof, body_of, expect_implementation, prove, run_shared
from dpofast.integrations.models.shared_rows import (
    Refused,
    Rows,
    Sequences,
    build,
    choose,
    common_prefix,
    find_packed,
    find_positions,
    find_sequences,
)

_proofs: WeakKeyDictionary[nn.Module, dict[Any, Proof]] = WeakKeyDictionary()
_warned: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
_DROPOUT = (
    "model: has dropout in training, whose zeros in a shared prompt are the same for all of its answers; see "
    "docs/shared_prompt.md"
)
_NEFTUNE = (
    "model: has NEFTune's noise in training, which falls on a shared prompt once and is scaled by the length of shared "
    "rows; see docs/shared_prompt.md"
)
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k")
_PACKED = (*_BOUNDARIES, "max_length_q", "max_length_k")
"""What FlashAttention is told of packed rows; other attention has it from position_ids alone."""
_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")


@contextmanager
def share_prompt(model: nn.Module, *, answers: int = 2, refuse: str = "error") -> Iterator[None]:
    """Let ``model``, called with ``[chosen; rejected]``, run what the two sequences of a pair begin with once.

    Equivalent to doing nothing: ``model(**inputs)`` has the same logits, and the same gradients, up to rounding::

        with share_prompt(model):
            logits = model(input_ids=input_ids, attention_mask=attention_mask).logits  # [2B, T, V]

    With ``answers=K`` rows are ``[answers 1; ...; answers K]`` to the same B prompts. The prefix of rows i, i + B,
    i + 2B, ... is found by token. A batch in which sharing does not pay, by its count of tokens and of attention, runs
    as it is, and so does a call with a cache. At padding, hidden states are 0. See docs/shared_prompt.md for which
    models have a shared form and what is not exact.

    Args:
        model: a decoder of Transformers, with its head or without, also in PEFT, DistributedDataParallel, FSDP2 or
            DeepSpeed. It is called with ``input_ids`` ``[KB, T]``, ``attention_mask`` ``[KB, T]`` of 0 and 1 or None,
            padded left or right, ``position_ids`` ``[KB, T]``, ``[1, T]`` or None, and nothing else that has a token
            dimension. Or packed: ``input_ids`` ``[N, T]`` of KB sequences, counted row by row, without a mask, with
            ``position_ids`` ``[N, T]`` that start again in each, and ``cu_seq_lens_q`` and ``cu_seq_lens_k`` that say
            the same.
        answers: K, how many sequences follow each prompt.
        refuse: what happens where there is no shared form: "error" raises; "warn" warns once and runs unshared.

    Raises:
        ValueError: a model or a call without a shared form, and nothing is patched; a ``refuse`` of another name;
            answers below 2, or others than those of a patch around this one.
    """
    patched = patch_share_prompt(model, answers=answers, refuse=refuse)
    try:
        yield
    finally:
        if patched:
            unpatch_share_prompt(model)


def patch_share_prompt(model: nn.Module, *, answers: int = 2, refuse: str = "error") -> bool:
    """`share_prompt` until `unpatch_share_prompt`; True if the model was patched here and now.

    Of a model that is patched already, for as many answers, nothing changes. Raises as `share_prompt`.
    """
    check_refuse(refuse)
    _check_answers(answers)
    try:
        body = body_of(model)
        expect_implementation(body)
    except Refused as refusal:
        if refuse == "error":
            raise
        _warn_once(model, str(refusal))
        return False
    patched = vars(body).get("forward")
    if isinstance(patched, _SharedForward):
        if patched.answers != answers:
            raise wrong("answers", f"{answers}", f"{patched.answers}, for which the model is patched; unpatch it first")
        return False
    body.forward = _SharedForward(body, answers, refuse)
    return True


def unpatch_share_prompt(model: nn.Module) -> None:
    """Put back what `patch_share_prompt` replaced; nothing where it replaced nothing."""
    for module in model.modules():
        shared = vars(module).get("forward")
        if isinstance(shared, _SharedForward):
            if shared.was_set:
                module.forward = shared.forward
            else:
                del module.forward


def check_refuse(refuse: str) -> None:
    if refuse not in ("error", "warn"):
        raise wrong("refuse", shown(refuse), "'error' or 'warn'")


def _check_answers(answers: int) -> None:
    if isinstance(answers, bool) or not isinstance(answers, int):
        raise wrong("answers", shown(answers), "an int of 2 or more", TypeError)
    if answers < 2:
        raise wrong("answers", f"{answers}", "2 or more, which follow the same prompt")


class _SharedForward:
    """Stands where a body's forward stands. Copied with its body (copy.deepcopy), it serves the copy."""

    def __init__(self, body: nn.Module, answers: int, refuse: str) -> None:
        self.body, self.answers, self.refuse = body, answers, refuse
        self.was_set = "forward" in vars(body)
        self.forward: Callable[..., Any] = body.forward
        functools.update_wrapper(self, body.forward, updated=())

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self._by_name(args, kwargs)
        if inputs.get("use_cache") is True or "cache" in inputs or "past_key_values" in inputs:
            return self.forward(*args, **kwargs)  # generation, which has no pairs
        try:
            _expect_tokens_alone(self.body, inputs)
            found = _plan(self.body, inputs, self._proof().shiftable, self.answers)
        except Refused as refusal:
            if self.refuse == "error":
                raise
            _warn_once(self.body, f"{refusal} (run unshared)")
            found = None
        if found is None:
            return self.forward(*args, **kwargs)
        if _has_dropout(self.body):
            _warn_once(self.body, _DROPOUT)
        if any(module.training and hasattr(module, "neftune_noise_alpha") for module in self.body.modules()):
            _warn_once(self.body, _NEFTUNE)
        told = {name: value for name, value in inputs.items() if name not in _PACKED}
        return run_shared(self.body, self.forward, told, *found)

    def _by_name(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that are given, by name."""
        signature = inspect.signature(self.forward)
        inputs = dict(signature.bind(*args, **kwargs).arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                inputs |= inputs.pop(name, {})
        return {name: value for name, value in inputs.items() if value is not None}

    def _proof(self) -> Proof:
        """Made at the first call of every rank, whatever is in its batch: a sharded model runs on all or on none."""
        expect_implementation(self.body)
        proofs = _proofs.setdefault(self.body, {})
        key = self.body.config._attn_implementation
        if key not in proofs:
            proofs[key] = prove(self.body, self.forward)
        if proofs[key].refusal:
            raise Refused(proofs[key].refusal)
        return proofs[key]


def _expect_tokens_alone(body: nn.Module, inputs: Mapping[str, Any]) -> None:
    """An error for a call whose result is not made of the rows' tokens alone."""
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is None or "inputs_embeds" in inputs:
        expected = (
            "input_ids, by which the prefix of a pair is found; pass these, or run it unshared (refuse='warn') if it "
            "is a vision-language model, whose images are vectors"
        )
        raise wrong("inputs_embeds", "vectors", expected, Refused)
    if ids.dim() != 2:
        raise wrong("input_ids", f"shape {tuple(ids.shape)}", "[rows, T]", Refused)
    for name in _OUTPUTS:
        if inputs.get(name) or (name not in inputs and getattr(body.config, name, False)):
            expected = "False: they would be those of shared rows; ask for them outside share_prompt"
            raise wrong(name, f"{inputs.get(name, True)}", expected, Refused)
    for name, value in inputs.items():
        if name not in ("input_ids", "attention_mask", "position_ids", *_PACKED) and isinstance(value, Tensor):
            expected = "none beside input_ids, attention_mask and position_ids; call the model outside share_prompt"
            raise wrong(name, "a tensor", expected, Refused)
    if mask is not None and not isinstance(mask, Tensor):
        raise wrong("attention_mask", type(mask).__name__, f"a tensor {list(ids.shape)} or None", Refused)


def _find_sequences(inputs: Mapping[str, Any], answers: int) -> Sequences:
    """The sequences of a batch, packed or not; an error where they are not of groups."""
    ids, mask, positions = (inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    packed = mask is None and positions is not None and positions.shape == ids.shape
    sequences = find_packed(positions) if packed else find_sequences(ids, mask)
    for name in _BOUNDARIES:
        ends = (sequences.first + sequences.length).tolist()
        if name in inputs and torch.as_tensor(inputs[name]).tolist() != [0, *ends]:
            raise wrong(
                name, "boundaries which position_ids do not have", "those at which position_ids start again, without "
                "attention_mask; pass such position_ids, by which attention other than Flash goes", Refused,
            )  # fmt: skip
    count = len(sequences.first)
    if count % answers:
        blocks = "[chosen; rejected]" if answers == 2 else f"[answers 1; ...; answers {answers}]"
        raise wrong(
            "input_ids", f"shape {tuple(ids.shape)}" + f" of {count} packed sequences" * (count != len(ids)),
            f"[{answers}B, T], rows {blocks}, or so many sequences packed in rows without attention_mask; drop the "
            "last ones, or call the model outside share_prompt", Refused,
        )  # fmt: skip
    return sequences


@torch.compiler.disable
def _plan(body: nn.Module, inputs: Mapping[str, Any], shiftable: bool, answers: int) -> tuple[Rows, Tensor] | None:
    """The rows of a batch and the positions of their tokens; None where the batch costs less as it is."""
    ids, given = inputs["input_ids"], inputs.get("position_ids")
    if ids.numel() == 0:
        return None
    sequences = _find_sequences(inputs, answers)
    if given is not None:
        positions = find_positions(given, ids, sequences)
    else:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    counted_from_padding = given is None and shiftable
    common = common_prefix(sequences, answers, *((ids,) if counted_from_padding else (ids, positions)))
    lengths, common = sequences.length.tolist(), common.tolist()
    cost = functools.partial(_cost, body.config.hidden_size)
    parts = choose(lengths, common, cost)
    rows, width = len(parts), max(sum(part.stop - part.start for part in row) for row in parts)
    causal = body.config._attn_implementation == "sdpa" and min(lengths) == ids.shape[1]
    nothing = width == 0 or rows == len(lengths)
    if nothing or cost(rows, width) >= cost(len(ids), ids.shape[1], causal):
        return None
    built = build(parts, sequences, tuple(ids.shape))
    return built, (built.offset if counted_from_padding else positions.flatten()[built.source])


def _cost(hidden_size: int, rows: int, width: int, causal: bool = False) -> float:
    """Multiply-adds of a layer, in units of 2 ``hidden_size``: 12 H^2 of weights a token, and 2 H for each it sees.

    A mask hides numbers that are computed all the same; half of them are not where a kernel knows that it is causal.
    """
    return rows * width * (6 * hidden_size + width * (0.5 if causal else 1.0))


def _has_dropout(body: nn.Module) -> bool:
    def dropped(module: nn.Module) -> float:
        if isinstance(module, nn.Dropout):
            return module.p
        return next((p for p in map(vars(module).get, ("attention_dropout", "dropout")) if isinstance(p, float)), 0.0)

    return any(module.training and dropped(module) > 0 for module in body.modules())


def _warn_once(module: nn.Module, message: str) -> None:
    if message not in _warned.setdefault(module, set()):
        _warned[module].add(message)
        warnings.warn(message, stacklevel=3)
