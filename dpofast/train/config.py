"""Every option of a training, once: its name in the TOML file and on the command line, its default and its help."""

# ruff: noqa: RUF009  (_option is dataclasses.field)

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpofast.checks import is_number, wrong

Check = tuple[str, Callable[[Any], bool]]
POSITIVE: Check = ("more than 0", lambda x: 0 < x < math.inf)
NOT_NEGATIVE: Check = ("0 or more", lambda x: 0 <= x < math.inf)
AT_LEAST_1: Check = ("1 or more", lambda x: x >= 1)
SHARE: Check = ("a number in [0, 1)", lambda x: 0 <= x < 1)
FREE_TO_CHANGE = ("out", "save_every", "keep", "tensorboard", "picture", "resume")
PATHS = ("model", "data", "eval_data", "reference", "references")
"""Options that a resumed run may have otherwise. What a path leads to may not have changed: its content is hashed."""


def _is_filter(text: str) -> bool:
    return text in ("", "auto") or re.fullmatch(r"(\d+\.?\d*|\.\d+)(e-?\d+)?", text) is not None


FILTER: Check = ("auto or a number", _is_filter)


def _of(*names: str) -> Check:
    return f"one of {', '.join(names)}", names.__contains__


def _option(default: Any, help: str, check: Check | None = None) -> Any:
    metadata = {"help": help, "check": check}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """A training. Every field has a default but ``model`` and ``data``; `check` raises for values out of range."""

    model: str = _option("", "the model to train: a folder that Transformers reads")
    data: list[str] = _option([], "files of preferences to train on")
    out: str = _option("run", "the folder of checkpoints, logs, picture and summary")

    eval_data: list[str] = _option([], "files of preferences held out: evaluated, never trained on")
    max_length: int = _option(1024, "tokens of prompt and answer together; what is longer is cut", AT_LEAST_1)
    truncation: str = _option("end", "what is cut: the end of answers, or first the prompt", _of("end", "prompt"))
    on_error: str = _option("raise", "a bad record: raise stops, skip counts and lists it", _of("raise", "skip"))

    loss_type: list[str] = _option(["sigmoid"], "the loss, or several that are added up")
    loss_weights: list[float] = _option([], "their weights; default 1 each")
    beta: float = _option(0.1, "the loss's beta", POSITIVE)
    label_smoothing: float = _option(0.0, "probability that a pair is labelled the wrong way round")
    loss_options: dict[str, Any] = _option({}, "other options of the loss: name=value")
    reference: str = _option("", "the reference model: a folder; default the model before training")
    references: str = _option("", "the file that keeps its log-probs; default references.bin in out")

    lora_rank: int = _option(0, "rank of a LoRA adapter; 0 trains all parameters", NOT_NEGATIVE)
    lora_alpha: float = _option(0.0, "LoRA's alpha; default twice the rank", NOT_NEGATIVE)
    lora_dropout: float = _option(0.0, "dropout of the adapter's inputs", SHARE)
    lora_targets: list[str] = _option(["all-linear"], "modules that get an adapter")

    last_layers: int = _option(
        0, "train the last layers alone, with a LoRA its adapters in them; 0 trains all", NOT_NEGATIVE
    )
    cache_frozen: str = _option(
        "", "with last_layers: run frozen layers once a row, in fp32 or bf16, and keep states in out",
        _of("", "fp32", "bf16"),
    )  # fmt: skip
    precision: str = _option("fp32", "fp32, or bf16: autocast, and frozen weights of layers", _of("fp32", "bf16"))
    dropout: bool = _option(False, "keep the model's own dropout while training")
    share_prompt: bool = _option(False, "run the prompt of a pair, or of a list, once (docs/shared_prompt.md)")
    grad_filter: str = _option("", "auto or a number: gradients of the entries that matter (docs/filter.md)", FILTER)
    memory_budget: str = _option("", "workspace of the head, such as 256MiB")
    gradient_checkpointing: bool = _option(False, "compute activations twice instead of keeping them")
    shard: bool = _option(False, "on several ranks: FSDP2, each with a part of the weights, in place of whole copies")
    device: str = _option("", "cpu or cuda; default cuda where there is one", _of("", "cpu", "cuda"))

    batch_size: int = _option(16, "records of a step, on all ranks together", AT_LEAST_1)
    micro_batch: int = _option(4, "records of a forward and backward on one rank", AT_LEAST_1)
    epochs: float = _option(1.0, "how often the data is gone through", POSITIVE)
    steps: int = _option(0, "steps to take; default what the epochs make", NOT_NEGATIVE)
    learning_rate: float = _option(5e-6, "AdamW's; a LoRA usually wants ten times as much or more", NOT_NEGATIVE)
    schedule: str = _option("linear", "of the learning rate: a name of Transformers' get_scheduler")
    warmup: float = _option(0.1, "share of the steps in which the learning rate rises", SHARE)
    weight_decay: float = _option(0.0, "AdamW's", NOT_NEGATIVE)
    adam_betas: list[float] = _option([0.9, 0.999], "AdamW's")
    clip: float = _option(1.0, "largest norm of the gradient; 0 does not clip", NOT_NEGATIVE)
    seed: int = _option(0, "decides the order of the data, a LoRA's start and dropout", NOT_NEGATIVE)

    evaluate_every: int = _option(
        0, "steps between evaluations; default before the first and after the last only", NOT_NEGATIVE
    )
    best_by: str = _option("loss", "what makes an evaluation the best", _of("loss", "accuracy"))
    patience: int = _option(0, "evaluations without a better one until the run ends; 0 goes on", NOT_NEGATIVE)
    save_every: int = _option(0, "steps between checkpoints; default after the last step only", NOT_NEGATIVE)
    keep: int = _option(1, "checkpoints to keep, beside the best", AT_LEAST_1)
    tensorboard: bool = _option(True, "write TensorBoard's events, if it is installed")
    picture: bool = _option(True, "draw the curves, if matplotlib is installed")
    resume: bool = _option(False, "go on from the last checkpoint in out, or begin where there is none")

    def check(self) -> Config:
        """This, or a ValueError or TypeError that names an option that is not what it should be."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _check_type(field.name, value, _hint(field))
            check = field.metadata["check"]
            if check is not None and not check[1](value):
                raise wrong(field.name, repr(value), check[0])
        if not self.model:
            raise wrong("model", "nothing", "a folder that Transformers reads")
        if not self.data:
            raise wrong("data", "nothing", "at least one file of preferences")
        if len(self.adam_betas) != 2:
            raise wrong("adam_betas", repr(self.adam_betas), "two numbers")
        if self.cache_frozen and (self.last_layers == 0 or self.dropout or self.shard):
            expected = "last_layers beside it, and neither dropout nor shard; or nothing"
            raise wrong("cache_frozen", repr(self.cache_frozen), expected)
        if self.patience and not (self.eval_data and self.evaluate_every):
            raise wrong("patience", f"{self.patience}", "eval_data and evaluate_every beside it, or 0")
        return self

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def filter(self) -> float | str | None:
        """``grad_filter`` as the losses take it."""
        return (self.grad_filter or None) if self.grad_filter in ("", "auto") else float(self.grad_filter)

    def differences(self, before: Mapping[str, Any]) -> list[str]:
        """What a run that is resumed would do otherwise, each as ``name: was X, is Y``."""
        was, now = {**Config().as_dict(), **before}, self.as_dict()
        names = [name for name in now if name not in FREE_TO_CHANGE + PATHS]
        return [f"{n}: was {was[n]!r}, is {now[n]!r}" for n in names if was[n] != now[n]]


FIELDS = {field.name: field for field in dataclasses.fields(Config)}


def from_dict(values: Mapping[str, Any], where: str) -> Config:
    """The `Config` of these options, checked; a ValueError for a name that is none, with the nearest that is."""
    for name in values:
        if name not in FIELDS:
            near = difflib.get_close_matches(name.replace("-", "_"), FIELDS, 1, 0.5)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(FIELDS)}"
            raise ValueError(f"{name}: {where} has this, which is no option{hint}")
    return Config(**{name: _widened(value, _hint(FIELDS[name])) for name, value in values.items()}).check()


def read_toml(path: Path) -> dict[str, Any]:
    """The options in a file."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"config: cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError are such
        raise ValueError(f"config: {path} is no TOML: {error}") from error


def add_options(parser: argparse.ArgumentParser) -> None:
    """An option of the command line for each field; one that is not given is not in the namespace."""
    for name, field in FIELDS.items():
        flags = [f"--{name.replace('_', '-')}"]
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        shown = default if default not in ("", [], {}, False) else None
        text = field.metadata["help"].replace("%", "%%") + ("" if shown is None else f" (default {_plain(shown)})")
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text}
        hint = _hint(field)
        if hint is bool:
            parser.add_argument(*flags, action=argparse.BooleanOptionalAction, **options)
        elif typing.get_origin(hint) is list:
            parser.add_argument(*flags, nargs="+", type=typing.get_args(hint)[0], **options)
        elif typing.get_origin(hint) is dict:
            parser.add_argument(*flags, nargs="+", action=_Assignments, **options)
        else:
            parser.add_argument(*flags, type=hint, **options)


class _Assignments(argparse.Action):
    """``name=value ...`` as a dict; a value is JSON where it reads as such, else text."""

    def __call__(self, parser, namespace, values: Sequence[str], option_string=None) -> None:
        found = {}
        for text in values:
            name, equals, value = text.partition("=")
            if not equals:
                parser.error(f"{option_string}: got {text!r}, expected name=value")
            try:
                found[name] = json.loads(value)
            except ValueError:
                found[name] = value
        setattr(namespace, self.dest, found)


def _hint(field: dataclasses.Field) -> Any:
    return typing.get_type_hints(Config)[field.name]


def _widened(value: Any, hint: Any) -> Any:
    """What people write for a value: an int for a float, one item for a list."""
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        return [_widened(x, item) for x in (value if isinstance(value, list) else [value])]
    if hint is str and is_number(value):
        return str(value)
    return value


def _check_type(name: str, value: Any, hint: Any) -> None:
    kind = typing.get_origin(hint) or hint
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if fits and kind is list:
        fits = all(isinstance(x, typing.get_args(hint)[0]) for x in value)
    if not fits:
        shown = hint.__name__ if not isinstance(hint, types.GenericAlias) else str(hint)
        raise wrong(name, f"{type(value).__name__} {value!r}", shown, TypeError)


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
