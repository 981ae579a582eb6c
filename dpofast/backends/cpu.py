"""The compiled CPU kernels: tensors in, addresses down to ``dpofast._C``.

Every function takes packed rows: ``rows`` [N] are the positions of completion tokens among hidden's leading
dimensions (row-major), ``y`` [N] their labels. Results are [N].
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpofast._backend import _C
from dpofast.backends import _pages, tiled
from dpofast.backends._tensors import element_offsets, empty_results, flags, pointer, wide_dtype
from dpofast.backends.torch import Stat
from dpofast.plan import DTYPE_CODES, TRAITS, Choice, _Layout

_SMALL_WORKSPACE = 1 << 16  # bytes; a small head needs no more, and is called once


def cache_tensor(n_bytes: int, _device: torch.device) -> Tensor:
    """What the forward keeps for the backward, in pages that outlive the call."""
    return _pages.empty((n_bytes,), torch.uint8, "cache")


def grad_weight_tensor(weight: Tensor) -> Tensor:
    """Where d weight goes."""
    return _pages.empty(tuple(weight.shape), weight.dtype, "grad_weight")


def _head(hidden, weight, bias, rows, y, transform, block):
    """The arguments that forward and backward share, and the tensors that must outlive the call."""
    offsets = element_offsets(hidden, rows)
    if bias is not None:
        bias = bias.to(wide_dtype(hidden.dtype, weight.dtype)).contiguous()
    temperature, logit_scale, softcap = transform
    args = {
        "n": rows.numel(), "h": hidden.shape[-1], "v": weight.shape[0],
        "hidden": hidden.data_ptr(), "hidden_dtype": DTYPE_CODES[hidden.dtype],
        "row_offsets": offsets.data_ptr(), "hidden_col_stride": hidden.stride(-1),
        "weight": weight.data_ptr(), "weight_dtype": DTYPE_CODES[weight.dtype],
        "weight_row_stride": weight.stride(0), "weight_col_stride": weight.stride(1),
        "bias": pointer(bias), "labels": y.data_ptr(),
        "temperature": temperature, "logit_scale": logit_scale, "softcap": softcap or 0.0,
        "block": block, "threads": torch.get_num_threads(),
    }  # fmt: skip
    return args, (offsets, bias)


def _run(function, isa: str, args: dict) -> None:
    n_bytes, needed = 0, _SMALL_WORKSPACE
    while n_bytes < needed:  # at most twice: with less than it needs, the function only says how much that is
        n_bytes = needed
        workspace = _pages.empty((n_bytes,), torch.uint8, "workspace")
        needed = function(isa, args | {"workspace": workspace.data_ptr(), "workspace_bytes": n_bytes})


def cached_blocks(choice: Choice, isa: str, hidden: Tensor, weight: Tensor, n: int) -> int:
    """How many vocabulary blocks of n tokens the cache holds."""
    if choice.schedule not in ("cached", "mixed"):
        return 0
    (v, h), t = weight.shape, TRAITS[isa, hidden.dtype, weight.dtype]
    layout = _Layout(n, h, v, t, choice.block, threads=0, as_is=False, outputs=0, direct=False)
    return min(layout.blocks, choice.cache_bytes // layout.cache_per_block())


def forward(isa, hidden, weight, bias, rows, y, transform, outputs, choice: Choice, cache: Tensor) -> dict[str, Tensor]:
    """``logps`` and the statistics in ``outputs``, each [N], and ``lse`` [N, 2]; fills ``cache`` for the backward."""
    n = rows.numel()
    out = empty_results(n, outputs, torch.empty(0, dtype=wide_dtype(hidden.dtype, weight.dtype)))
    for part in _chunks(choice, n):
        args, alive = _head(hidden, weight, bias, _of(part, rows), _of(part, y), transform, choice.block)
        args |= {name: _of(part, x).data_ptr() for name, x in out.items()}
        args |= {
            "outputs": flags(outputs),
            "cache": cache.data_ptr(),
            "cached_blocks": cached_blocks(choice, isa, hidden, weight, n),
            "jacobian": cache.data_ptr() if choice.schedule == "jacobian" else None,
        }
        _run(_C.forward, isa, args)
        del alive
    return out


def fold(isa, hidden, weight, bias, rows, y, transform, outputs, choice: Choice) -> Tensor:
    """The running statistics [Stat.COUNT, N] of a vocabulary of which ``weight`` is a slice.

    ``y`` counts from the slice's first row; a label before the slice is negative, one after it at least its size.
    """
    parts = []
    for part in _chunks(choice, rows.numel()):
        args, alive = _head(hidden, weight, bias, rows[part], y[part], transform, choice.block)
        stats = torch.empty(Stat.COUNT, args["n"], dtype=wide_dtype(hidden.dtype, weight.dtype))
        args |= {"outputs": flags(outputs), "stats": stats.data_ptr(), "cached_blocks": 0}
        _run(_C.forward, isa, args)
        parts.append(stats)
        del alive
    return torch.cat(parts, 1)


def _chunks(choice: Choice, n: int) -> list[slice]:
    return tiled.chunks(n, choice.token_chunk)


def _of(part: slice, x: Tensor) -> Tensor:
    """``x[part]``; ``x`` itself, sooner, if that is all of it."""
    return x if part == slice(0, x.shape[0]) else x[part]


def backward(
    isa, hidden, weight, bias, rows, y, transform, choice: Choice, cache: Tensor, saved: dict[str, Tensor],
    grad_logps: Tensor | None, grad_entropy: Tensor | None,
    grad_hidden: Tensor | None, grad_weight: Tensor | None, grad_bias: Tensor | None,
) -> None:  # fmt: skip
    """Fills the gradients that are given: grad_hidden's completion rows (the rest must be 0), all of the others.

    grad_hidden may be wider than hidden. The label of a row may lie outside the vocabulary, which is then a slice of
    one whose ``saved`` results these are.

    ``saved`` is the forward's result. An entropy gradient always recomputes the logits: neither what the cache
    holds nor the jacobian is enough for it.
    """
    from_saved = grad_entropy is None
    if grad_logps is None:
        grad_logps = torch.zeros_like(saved["logps"])
    bias_out = None if grad_bias is None else torch.empty(grad_bias.shape, dtype=wide_dtype(hidden.dtype, weight.dtype))

    def run(part: slice, to_hidden: bool, to_rest: bool) -> None:
        args, alive = _head(hidden, weight, bias, _of(part, rows), _of(part, y), transform, choice.block)
        held = {"logps": saved["logps"], "lse": saved["lse"], "grad_logps": grad_logps, "grad_rows": rows}
        if grad_entropy is not None:
            held |= {"entropy": saved["entropy"], "grad_entropy": grad_entropy}
        args |= {name: _of(part, x).data_ptr() for name, x in held.items()}
        args |= {
            "cache": cache.data_ptr(),
            "cached_blocks": cached_blocks(choice, isa, hidden, weight, rows.numel()) if from_saved else 0,
            "jacobian": cache.data_ptr() if from_saved and choice.schedule == "jacobian" else None,
            "grad_hidden": pointer(grad_hidden) if to_hidden else None,
            "grad_hidden_dtype": DTYPE_CODES[hidden.dtype if grad_hidden is None else grad_hidden.dtype],
            "grad_weight": pointer(grad_weight) if to_rest else None,
            "grad_bias": pointer(bias_out) if to_rest else None,
            "token_chunk": choice.token_chunk if to_rest else 0,
        }
        _run(_C.backward, isa, args)
        del alive

    n = rows.numel()
    everything = slice(0, n)
    wants_rest = grad_weight is not None or grad_bias is not None
    apart = choice.schedule == "recompute-split" or (choice.token_chunk and not wants_rest)
    if not apart:
        run(everything, grad_hidden is not None, wants_rest)
    else:
        if grad_hidden is not None:
            chunk = choice.token_chunk or n
            for start in range(0, n, chunk):
                run(slice(start, start + chunk), True, False)
        if wants_rest:
            run(everything, False, True)
    if grad_bias is not None:
        grad_bias.copy_(bias_out)


def _rows_args(logits, rows, y, transform, threads=None):
    offsets = element_offsets(logits, rows)
    temperature, logit_scale, softcap = transform
    return {
        "n": rows.numel(), "v": logits.shape[-1], "logits": logits.data_ptr(), "dtype": DTYPE_CODES[logits.dtype],
        "row_offsets": offsets.data_ptr(), "labels": y.data_ptr(), "temperature": temperature,
        "logit_scale": logit_scale, "softcap": softcap or 0.0, "threads": torch.get_num_threads(), "outputs": 0,
    }, offsets  # fmt: skip


def rows_forward(isa, logits, rows, y, transform, outputs) -> dict[str, Tensor]:
    """`forward` from logits [*, V] with unit stride along V."""
    out = empty_results(rows.numel(), outputs, torch.empty(0, dtype=wide_dtype(logits.dtype)))
    args, alive = _rows_args(logits, rows, y, transform)
    args |= {name: x.data_ptr() for name, x in out.items()}
    args["outputs"] = flags(outputs)
    _C.rows_forward(isa, args)
    del alive
    return out


def rows_backward(isa, logits, rows, y, transform, saved, grad_logps, grad_entropy, grad_logits) -> None:
    """Fills the completion rows of ``grad_logits``, which may be ``logits`` itself."""
    args, alive = _rows_args(logits, rows, y, transform)
    grad_offsets = element_offsets(grad_logits, rows)
    args |= {
        "logps": saved["logps"].data_ptr(), "lse": saved["lse"].data_ptr(),
        "entropy": pointer(saved.get("entropy")), "grad_logps": pointer(grad_logps),
        "grad_entropy": pointer(grad_entropy), "grad_logits": grad_logits.data_ptr(),
        "grad_offsets": grad_offsets.data_ptr(),
    }  # fmt: skip
    _C.rows_backward(isa, args)
    del alive
