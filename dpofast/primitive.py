"""The one primitive: per-token log-probabilities of labels under a language-model head.

Arguments are checked here, all of them, before anything is computed; `dpofast._ops` assumes them right.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dpofast import _ops, distributed
from dpofast.backends import registry
from dpofast.backends._tensors import wide_dtype
from dpofast.contract import DTYPE_CODES, flags
from dpofast.plan import Request, can_fuse, chosen, cost, parse_bytes, traced
from dpofast.reference import OUTPUTS, LogprobOutput

__all__ = ["LogprobOutput", "linear_logprob", "logprob"]


def _check_tensor(name: str, x: Tensor, ndim: int | None = None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected a torch.Tensor")
    _check_dense(name, x)
    if distributed.is_dtensor(x):
        raise TypeError(
            f"{name}: got a DTensor, which is understood beside a weight that is one; pass {name}.to_local() or "
            f"{name}.full_tensor()"
        )
    if x.is_meta:
        raise ValueError(f"{name}: got a tensor on the meta device, expected one with data")
    packed = getattr(x, "quant_state", None) is not None  # bitsandbytes stores four bits in any dtype
    if x.dtype not in DTYPE_CODES or packed:
        what = f"{x.dtype} (quantised)" if packed else str(x.dtype)
        hint = "" if x.is_complex() else "; dequantise it first"
        raise TypeError(f"{name}: got dtype {what}, expected float32, float64, bfloat16 or float16{hint}")
    if ndim is not None and x.ndim != ndim:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {ndim} dimensions")
    # the ops have no rule for tangents, and PyTorch would drop them, which makes derivatives of 0
    if forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError(
            f"{name}: forward-mode differentiation (torch.func.jvp, jacfwd, forward_ad) is not implemented; use "
            "reverse mode, or dpofast.reference for a problem small enough"
        )


def _check_dense(name: str, x: Tensor) -> None:
    if x.is_nested or x.layout is not torch.strided:
        what = "nested" if x.is_nested else f"{x.layout}".removeprefix("torch.")
        how = "packed rows (values())" if x.is_nested else "to_dense()"
        raise TypeError(f"{name}: got a {what} tensor, expected a dense one; pass {how}")


def _check_labels(labels: Tensor, lead: torch.Size, device: torch.device, of: str) -> Tensor:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: got {type(labels).__name__}, expected a torch.Tensor of integers")
    _check_dense("labels", labels)
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise TypeError(f"labels: got dtype {labels.dtype}, expected int64 (or int32)")
    if labels.shape != lead:
        raise ValueError(
            f"labels: got shape {tuple(labels.shape)}, expected {tuple(lead)}, {of} without its last dimension"
        )
    if labels.device != device:
        raise ValueError(f"labels: on device {labels.device}, expected {device}, where {of} is")
    return labels.long()  # compared in eight bits, a label of 156 would be an ignore_index of -100


def _check_transform(temperature: float, logit_scale: float, softcap: float | None) -> list[float]:
    for name, value in (("temperature", temperature), ("logit_scale", logit_scale), ("softcap", softcap)):
        if value is None and name == "softcap":
            continue
        if isinstance(value, (bool, Tensor)) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
        if not -math.inf < value < math.inf:  # math.isfinite does not trace under torch.compile(dynamic=True)
            raise ValueError(f"{name}: got {value}, expected a finite number")
        if name != "logit_scale" and value <= 0:
            raise ValueError(f"{name}: got {value}, expected a number > 0")
    return [float(temperature), float(logit_scale), float(softcap or 0.0)]


def _check_outputs(outputs) -> tuple[str, ...]:
    if isinstance(outputs, str):
        raise TypeError(f"outputs: got the string {outputs!r}, expected a tuple of names, such as ({outputs!r},)")
    if not isinstance(outputs, (tuple, list, set, frozenset)):
        raise TypeError(f"outputs: got {type(outputs).__name__}, expected a tuple of names")
    unknown = [name for name in outputs if name not in OUTPUTS]
    if unknown:
        raise ValueError(f"outputs: got {unknown[0]!r}, expected names among {', '.join(OUTPUTS)}")
    return tuple(outputs)


def _check_exact(grad_filter) -> None:
    if grad_filter is not None:
        raise ValueError(f"grad_filter: got {grad_filter!r}, but only None (exact gradients) is available")


def _check_ignore_index(ignore_index) -> None:
    if isinstance(ignore_index, bool) or not (ignore_index is None or isinstance(ignore_index, int)):
        raise TypeError(f"ignore_index: got {type(ignore_index).__name__}, expected an int or None")
    if ignore_index is not None and not -(1 << 63) <= ignore_index < 1 << 63:
        raise ValueError(f"ignore_index: got {ignore_index}, expected a 64-bit integer")


def _count(labels: Tensor, ignore_index: int | None) -> tuple[int, Tensor | None]:
    """How many labels count, the one thing that is waited for, and where they are, if that came with it.

    -1 where a compiled graph cannot depend on it.
    """
    if ignore_index is None:
        return labels.numel(), None
    if torch.compiler.is_compiling():
        return -1, None
    positions = torch.nonzero(labels.reshape(-1) != ignore_index).view(-1)
    return positions.numel(), positions


def _output(results, names: tuple[str, ...]) -> LogprobOutput:
    logps, _, entropy, log_sum_sq_probs, mean_logits, is_top1 = results
    return LogprobOutput(
        logps,
        entropy if "entropy" in names else None,
        log_sum_sq_probs.detach() if "log_sum_sq_probs" in names else None,
        mean_logits.detach() if "mean_logits" in names else None,
        is_top1 if "is_top1" in names else None,
        torch.zeros_like(logps) if "dropped_mass" in names else None,  # every schedule here is exact
    )


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int | None = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    outputs: tuple[str, ...] = (),
    grad_filter: None = None,
    memory_budget: int | str | None = None,
    backend: str = "auto",
    group: Any = None,
) -> LogprobOutput:
    """Log-probabilities of ``labels`` under a language-model head, without the ``[*, V]`` logits.

    Equivalent PyTorch, for one token::

        z = hidden @ weight.T + bias
        z = softcap * tanh(logit_scale * z / softcap) / temperature
        logps = z.log_softmax(-1)[label]

    Rows whose label is ``ignore_index`` cost nothing, give 0 and receive a gradient of exactly 0. Products of
    16-bit inputs are accumulated and kept in fp32. Inputs of different dtypes are promoted as by
    ``torch.promote_types``; under ``torch.autocast`` hidden, weight and bias are cast to the autocast dtype first, as
    ``torch.nn.functional.linear`` does. On a CPU (compiled backend, without ``group``) the log-probs and statistics of
    a row have the same bits whatever else is in the batch, whichever gradients and budget, for any number of threads.

    Args:
        hidden: ``[*, H]``, float32, float64, bfloat16 or float16; any strides.
        weight: ``[V, H]``, the head.
        labels: ``[*]``, integers in ``[0, V)`` or ``ignore_index``; aligned with ``hidden``, nothing is shifted.
        bias: ``[V]`` or None.
        ignore_index: the label of positions that do not count; None: all count, as in packed rows, and then nothing
            waits for a GPU, so that the call can be captured in a CUDA graph.
        temperature, logit_scale, softcap: the transform above; temperature > 0, softcap > 0 or None.
        outputs: optional statistics, among "entropy" (of the softmax, nats, differentiable), "log_sum_sq_probs"
            (``log sum_v p_v^2``), "mean_logits" (of z over V), "is_top1" (the label is the first maximum) and
            "dropped_mass" (0: gradients are exact).
        grad_filter: None; gradients are exact.
        memory_budget: workspace beyond inputs, outputs and gradients: bytes or "512MiB"; default 1 GiB, on a GPU a
            sixteenth of its memory if that is more. What fits decides the schedule, see `dpofast.plan`.
        backend: "auto", "cpu", "cpu:<instruction set>", "cuda" or "torch"; environment: ``DPOFAST_BACKEND``.
        group: a `torch.distributed.ProcessGroup` or one-dimensional `DeviceMesh` whose ranks hold the head together,
            each some rows of it (``weight``, and ``bias``), in the order of ranks: vocabulary- (tensor-) parallel. All
            have the same hidden and the same labels, which count in the whole vocabulary. The slices' sizes may
            differ. A weight that is a DTensor with `Shard(0)` brings its group along. Logits are made again in the
            backward, so this takes four products where one process may need three. Before it starts, the ranks
            exchange eight integers, for which a GPU is waited for.

    Returns:
        `LogprobOutput` of tensors of labels' shape, fp32 (fp64 if hidden or weight is). With ``group``, the same on
        every rank; the backward then gives each rank the whole gradient of hidden, and that of its slice of the head.

    Raises:
        TypeError, ValueError: naming the argument, before anything is computed. A label out of range is among them on
            the CPU; on a GPU, which is not asked, it makes its row NaN, unless ``DPOFAST_CHECK_LABELS=1`` is set.
            With ``group``, on every rank of it.

    Example:
        >>> import torch, dpofast
        >>> hidden, weight = torch.randn(2, 3, 8), torch.randn(50, 8)
        >>> labels = torch.tensor([[-100, 4, 9], [-100, -100, 49]])
        >>> dpofast.linear_logprob(hidden, weight, labels).logps.shape
        torch.Size([2, 3])
    """
    if distributed.is_dtensor(weight):
        hidden, weight, labels, bias, group = distributed.local_head(hidden, weight, labels, bias, group)
    name = None if group is None else distributed.group_name(group)
    with nullcontext() if name is None else distributed.refusing_together(name):
        labels = check_inputs(hidden, weight, labels, bias, sharded=name is not None)
        transform = _check_transform(temperature, logit_scale, softcap)
        names = _check_outputs(outputs)
        _check_ignore_index(ignore_index)
        _check_exact(grad_filter)
        budget = parse_bytes(memory_budget, default=cost.default_budget(hidden.device))
        device_type = hidden.device.type
        exact_backend = registry.resolve(backend, device_type)
        if torch.is_autocast_enabled(device_type) and torch.float64 not in (hidden.dtype, weight.dtype):
            dtype = torch.get_autocast_dtype(device_type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)

        grad = torch.is_grad_enabled()
        to_hidden = grad and hidden.requires_grad
        to_weight = grad and (weight.requires_grad or (bias is not None and bias.requires_grad))
        n_tokens, positions = _count(labels, ignore_index)
        n = labels.numel() if n_tokens < 0 else max(1, n_tokens)
        if name is not None:  # packed rows of hidden, and the sums of its gradient
            budget -= n * weight.shape[1] * (hidden.dtype.itemsize + wide_dtype(hidden.dtype, weight.dtype).itemsize)
        sheet = cost.device_of(hidden.device)
        aligned = weight.stride(1) == 1 and weight.stride(0) % 8 == 0
        plain = bias is None and not transform[2] and name is None and aligned
        request = Request(
            n, weight.shape[1], max(1, weight.shape[0]), hidden.dtype, weight.dtype, budget, to_hidden, to_weight,
            outputs=len(names) + ("is_top1" in names),  # it has two running numbers
            entropy="entropy" in names, as_is=weight.stride(1) == 1, keeps=name is None,
            fuses=plain and can_fuse(sheet, exact_backend, hidden.dtype, weight.dtype, weight.shape[1]),
        )  # fmt: skip
        # a compiled graph cannot look into the memory of `chosen`
        ask = traced if torch.compiler.is_compiling() else chosen
        schedule = ask(request, exact_backend, device=sheet)
    sharded = None, ""
    if name is not None:
        same = ignore_index, *transform, names, hidden.dtype, weight.dtype, bias is None, to_hidden
        sharded = distributed.vocabulary_bounds(labels, weight, str(same), name), name
    how = transform, flags(names), exact_backend, schedule.name, schedule.sizes, sharded[1]
    operands = hidden, weight, bias, labels, sharded[0]
    return _output(_ops.call_linear_logprob(positions, *operands, ignore_index, n_tokens, *how), names)


def check_inputs(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, sharded: bool = False, prefix: str = ""
) -> Tensor:
    """Labels in 64 bits, if all is well. ``prefix`` goes before the names in errors, as in ref_hidden."""
    _check_tensor(f"{prefix}hidden", hidden)
    _check_tensor(f"{prefix}weight", weight, 2)
    if hidden.ndim < 1:
        raise ValueError(f"{prefix}hidden: got a scalar, expected shape [*, H]")
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{prefix}weight: got shape {tuple(weight.shape)}, expected [V, {hidden.shape[-1]}] to go with "
            f"{prefix}hidden {tuple(hidden.shape)}"
        )
    if (weight.shape[0] < 1 and not sharded) or weight.shape[1] < 1:
        raise ValueError(f"{prefix}weight: got shape {tuple(weight.shape)}, expected at least one row and one column")
    if weight.device != hidden.device:
        raise ValueError(
            f"{prefix}weight: on device {weight.device}, expected {hidden.device}, where {prefix}hidden is"
        )
    if bias is not None:
        _check_tensor(f"{prefix}bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{prefix}bias: got shape {tuple(bias.shape)}, expected ({weight.shape[0]},), the rows of "
                f"{prefix}weight"
            )
        if bias.device != hidden.device:
            raise ValueError(
                f"{prefix}bias: on device {bias.device}, expected {hidden.device}, where {prefix}hidden is"
            )
    return _check_labels(labels, hidden.shape[:-1], hidden.device, f"{prefix}hidden")


def check_logits(logits: Tensor, labels: Tensor, name: str = "logits") -> Tensor:
    """Labels in 64 bits, if all is well."""
    _check_tensor(name, logits)
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"{name}: got shape {tuple(logits.shape)}, expected [*, V] with V >= 1")
    return _check_labels(labels, logits.shape[:-1], logits.device, name)


def logprob(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int | None = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    outputs: tuple[str, ...] = (),
    grad_filter: None = None,
    backend: str = "auto",
    inplace_grad: bool = False,
) -> LogprobOutput:
    """`linear_logprob` from logits that exist already: one read of them forward, one read and one write backward.

    Equivalent PyTorch::

        z = softcap * tanh(logit_scale * logits / softcap) / temperature
        logps = z.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    Args:
        logits: ``[*, V]``, float32, float64, bfloat16 or float16, arithmetic in fp32 (fp64 for fp64).
        labels: ``[*]``, integers in ``[0, V)`` or ``ignore_index``.
        inplace_grad: the backward writes the gradient over the logits, which must not be used afterwards. Not under
            ``torch.compile``.
        others: as for `linear_logprob`.

    Returns:
        `LogprobOutput` of tensors of labels' shape, fp32 (fp64 for fp64 logits).

    Raises:
        TypeError, ValueError: naming the argument, before anything is computed.

    Example:
        >>> import torch, dpofast
        >>> dpofast.logprob(torch.zeros(3, 4), torch.tensor([0, 3, -100])).logps
        tensor([-1.3863, -1.3863,  0.0000])
    """
    labels = check_logits(logits, labels)
    transform = _check_transform(temperature, logit_scale, softcap)
    names = _check_outputs(outputs)
    _check_ignore_index(ignore_index)
    _check_exact(grad_filter)
    if inplace_grad and torch.compiler.is_compiling():
        raise ValueError("inplace_grad: True is not possible under torch.compile; pass inplace_grad=False")
    exact_backend = registry.resolve(backend, logits.device.type)
    shares_rows = inplace_grad and 0 in logits.stride()  # expanded: one memory cannot hold every row's gradient
    if logits.stride(-1) != 1 or shares_rows:
        logits = logits.contiguous()
    n_tokens, positions = _count(labels, ignore_index)
    how = ignore_index, n_tokens, transform, flags(names), exact_backend
    return _output(_ops.call_logprob(positions, inplace_grad, logits, labels, *how), names)
