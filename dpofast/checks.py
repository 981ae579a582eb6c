"""Every check of a tensor or of an option of the head, made once, at the public doors; below them nothing looks again.

An error names the argument first and then says what was given and what is wanted: ``hidden: got shape (3, 4), expected
...``. Options of losses are checked by their table (`dpofast.losses`), in the same words.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dpofast import distributed
from dpofast.contract import DTYPE_CODES
from dpofast.reference import OUTPUTS


def wrong(name: str, got: str, expected: str, kind: type[Exception] = ValueError) -> Exception:
    """The error of an argument that is not what it should be, to be raised."""
    return kind(f"{name}: got {got}, expected {expected}")


def shown(value: Any) -> str:
    """A value of the wrong type, as an error shows it."""
    return type(value).__name__ if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise wrong(name, shown(value), "True or False", TypeError)


# Tensors


def dense(name: str, x: Any, **beside: Tensor) -> None:
    """A tensor with all its elements in memory, on the device of those that it is used with, ``beside``."""
    if not isinstance(x, Tensor):
        raise wrong(name, type(x).__name__, "a torch.Tensor", TypeError)
    if x.is_nested or x.layout is not torch.strided:
        what = "nested" if x.is_nested else f"{x.layout}".removeprefix("torch.")
        how = "packed rows (values())" if x.is_nested else "to_dense()"
        raise TypeError(f"{name}: got a {what} tensor, expected a dense one; pass {how}")
    if x.is_floating_point() and x.dtype.itemsize < 2:
        raise wrong(name, f"dtype {x.dtype}", "at least 16 bits", TypeError)
    for other, tensor in beside.items():
        if x.device != tensor.device:
            raise wrong(name, f"device {x.device}", f"{tensor.device}, where {other} is")


def floating(name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise wrong(name, f"dtype {x.dtype}", "floating point", TypeError)


def shape(name: str, x: Tensor, *allowed: tuple[int, ...], what: str) -> None:
    """One of the shapes ``allowed``, which ``what`` describes."""
    if not any([x.shape == one for one in allowed]):  # torch.compile compares symbols so, and not by `in`
        raise wrong(name, f"shape {tuple(x.shape)}", what)


def operand(name: str, x: Any, ndim: int | None = None) -> None:
    """A tensor that the ops take: hidden, weight, bias or logits."""
    dense(name, x)
    if distributed.is_dtensor(x):
        raise TypeError(
            f"{name}: got a DTensor, which is understood beside a weight that is one; pass {name}.to_local() or "
            f"{name}.full_tensor()"
        )
    if x.is_meta:
        raise wrong(name, "a tensor on the meta device", "one with data")
    packed = getattr(x, "quant_state", None) is not None  # bitsandbytes stores four bits in any dtype
    if x.dtype not in DTYPE_CODES or packed:
        what = f"{x.dtype} (quantised)" if packed else str(x.dtype)
        hint = "" if x.is_complex() else "; dequantise it first"
        raise wrong(name, f"dtype {what}", f"float32, float64, bfloat16 or float16{hint}", TypeError)
    if ndim is not None and x.ndim != ndim:
        raise wrong(name, f"shape {tuple(x.shape)}", f"{ndim} dimensions")
    # the ops have no rule for tangents, and PyTorch would drop them, which makes derivatives of 0
    if forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError(
            f"{name}: forward-mode differentiation (torch.func.jvp, jacfwd, forward_ad) is not implemented; use "
            "reverse mode, or dpofast.reference for a problem small enough"
        )


def integers(labels: Any) -> Tensor:
    """Labels in 64 bits: compared in eight, one of 156 would be an ignore_index of -100."""
    dense("labels", labels)
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise wrong("labels", f"dtype {labels.dtype}", "int64 (or int32)", TypeError)
    return labels.long()


def like_labels(name: str, x: Tensor, labels: Tensor) -> None:
    """A floating number for each token."""
    dense(name, x, labels=labels)
    floating(name, x)
    shape(name, x, tuple(labels.shape), what=f"{tuple(labels.shape)}, that of labels")


def rows(name: str, x: Any, labels: Tensor) -> None:
    """An operand that has a vector for each of the labels."""
    operand(name, x)
    if x.ndim < 1 or x.shape[-1] < 1:
        raise wrong(name, f"shape {tuple(x.shape)}", "[*, n] with n >= 1")
    if x.shape[:-1] != labels.shape:
        raise wrong(
            "labels", f"shape {tuple(labels.shape)}", f"{tuple(x.shape[:-1])}, {name} without its last dimension"
        )
    if labels.device != x.device:
        raise wrong("labels", f"device {labels.device}", f"{x.device}, where {name} is")


def head(hidden: Any, weight: Any, bias: Any, labels: Tensor, *, sharded: bool = False, prefix: str = "") -> None:
    """The operands of a head. ``prefix`` goes before the names in errors, as in ref_hidden."""
    h, w, b = f"{prefix}hidden", f"{prefix}weight", f"{prefix}bias"
    operand(w, weight, 2)
    rows(h, hidden, labels)
    if hidden.shape[-1] != weight.shape[1]:
        fits = f"[V, {hidden.shape[-1]}] to go with {h} {tuple(hidden.shape)}"
        raise wrong(w, f"shape {tuple(weight.shape)}", fits)
    if weight.shape[0] < 1 and not sharded:
        raise wrong(w, f"shape {tuple(weight.shape)}", "at least one row")
    if weight.device != hidden.device:
        raise wrong(w, f"device {weight.device}", f"{hidden.device}, where {h} is")
    if bias is not None:
        operand(b, bias)
        shape(b, bias, (weight.shape[0],), what=f"({weight.shape[0]},), the rows of {w}")
        if bias.device != hidden.device:
            raise wrong(b, f"device {bias.device}", f"{hidden.device}, where {h} is")


def boundaries(cu_seqlens: Any, labels: Tensor) -> None:
    """Boundaries ``[S + 1]`` of sequences packed in ``labels`` ``[N]``."""
    dense("cu_seqlens", cu_seqlens, labels=labels)
    if cu_seqlens.dtype not in (torch.int64, torch.int32, torch.int16):  # bool and uint8 index as masks
        raise wrong("cu_seqlens", f"dtype {cu_seqlens.dtype}", "int64, int32 or int16", TypeError)
    if labels.dim() != 1 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        found = f"shape {tuple(cu_seqlens.shape)} with labels {tuple(labels.shape)}"
        raise wrong("cu_seqlens", found, "[S + 1] with labels [N]")
    # on a GPU the values can't be looked at without waiting for it
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != labels.shape[0] or ends != sorted(ends):
            raise wrong("cu_seqlens", f"{ends}", f"boundaries from 0 to N = {labels.shape[0]}, not decreasing")


def sizes(sizes: Any, total: int, of: str) -> tuple[int, ...]:
    """How many there are in each list, ``total`` in all, as ``of`` has them: on the host, as shapes depend on it."""
    if isinstance(sizes, int) and not isinstance(sizes, bool):
        if sizes < 1 or total % sizes:
            raise wrong("sizes", f"{sizes}", f"a number >= 1 that divides the {total} in {of}")
        return (sizes,) * (total // sizes)
    if isinstance(sizes, Tensor):
        dense("sizes", sizes)
        if sizes.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8) or sizes.dim() != 1:
            raise wrong("sizes", f"shape {tuple(sizes.shape)} of {sizes.dtype}", "integers [L]", TypeError)
        sizes = sizes.tolist()
    if not isinstance(sizes, (list, tuple)) or any(isinstance(n, bool) or not isinstance(n, int) for n in sizes):
        raise wrong("sizes", shown(sizes), "an int, or a list of them, one for each list", TypeError)
    if min(sizes, default=1) < 1:
        raise wrong("sizes", f"{min(sizes)} among them", "integers >= 1; a list without an answer is left out")
    if sum(sizes) != total:
        raise wrong("sizes", f"{sum(sizes)} in all", f"{total}, as many as there are in {of}")
    return tuple(sizes)


# Options


def transform(temperature: Any, logit_scale: Any, softcap: Any) -> list[float]:
    """The three numbers that the ops take, softcap 0 for none."""
    for name, value in (("temperature", temperature), ("logit_scale", logit_scale), ("softcap", softcap)):
        if value is None and name == "softcap":
            continue
        if not is_number(value):
            raise wrong(name, shown(value), "a number", TypeError)
        if not -math.inf < value < math.inf:  # math.isfinite does not trace under torch.compile(dynamic=True)
            raise wrong(name, f"{value}", "a finite number")
        if name != "logit_scale" and value <= 0:
            raise wrong(name, f"{value}", "a number > 0")
    return [float(temperature), float(logit_scale), float(softcap or 0.0)]


def output_names(outputs: Any) -> tuple[str, ...]:
    if isinstance(outputs, str):
        raise wrong("outputs", f"the string {outputs!r}", f"a tuple of names, such as ({outputs!r},)", TypeError)
    if not isinstance(outputs, (tuple, list, set, frozenset)):
        raise wrong("outputs", shown(outputs), "a tuple of names", TypeError)
    unknown = [name for name in outputs if name not in OUTPUTS]
    if unknown:
        raise wrong("outputs", f"{unknown[0]!r}", f"names among {', '.join(OUTPUTS)}")
    return tuple(outputs)


def grad_filter(value: Any) -> None:
    expected = 'None (exact gradients), "auto" or a cut in (0, 1)'
    if value is None or value == "auto":
        return
    if not is_number(value) and not isinstance(value, str):
        raise wrong("grad_filter", shown(value), expected, TypeError)
    if isinstance(value, str) or not 0 < value < 1:
        raise wrong("grad_filter", f"{value!r}", expected)


def ignored(ignore_index: Any, optional: bool) -> None:
    """A label that does not count; None, where that is ``optional``, says that all count."""
    if ignore_index is None and optional:
        return
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise wrong("ignore_index", shown(ignore_index), "an int or None" if optional else "an int", TypeError)
    if not -(1 << 63) <= ignore_index < 1 << 63:
        raise wrong("ignore_index", f"{ignore_index}", "a 64-bit integer")


def ld_alpha(value: Any) -> None:
    if value is None:
        return
    if not is_number(value):
        raise wrong("ld_alpha", shown(value), "a number in [0, 1]", TypeError)
    if not 0 <= value <= 1:
        raise wrong("ld_alpha", f"{value}", "a number in [0, 1]")
