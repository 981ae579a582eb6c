"""The one primitive: per-token log-probabilities of labels under a language-model head.

A scorer is made of arguments, which are checked then, and asked for statistics; `dpofast._ops` assumes all of it right.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpofast import _ops, checks, distributed
from dpofast import grad_filter as filters
from dpofast.backends import registry
from dpofast.backends._tensors import wide_dtype
from dpofast.contract import STATISTICS, flags
from dpofast.plan import Request, Schedule, can_fuse, chosen, cost, parse_bytes, traced
from dpofast.reference import LogprobOutput

__all__ = ["LogprobOutput", "linear_logprob", "logprob"]


class ScoreOptions(NamedTuple):
    """What `linear_logprob` and `logprob` are told beside tensors, checked as far as it can be without them."""

    transform: list[float]
    ignore_index: int | None
    backend: str
    memory_budget: int | str | None  # of `linear_logprob`
    inplace_grad: bool  # of `logprob`
    grad_filter: float | str | None  # of `linear_logprob`


def score_options(
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    grad_filter: float | str | None = None,
    ignore_index: int | None = -100,
    backend: str = "auto",
    memory_budget: int | str | None = None,
    inplace_grad: bool = False,
) -> ScoreOptions:
    """Checks options; which backend a name is, and how much a budget is by default, only tensors can decide."""
    checks.grad_filter(grad_filter)
    checks.ignored(ignore_index, optional=True)
    parse_bytes(memory_budget)
    checks.flag("inplace_grad", inplace_grad)
    if inplace_grad and torch.compiler.is_compiling():
        raise ValueError("inplace_grad: True is not possible under torch.compile; pass inplace_grad=False")
    transform = checks.transform(temperature, logit_scale, softcap)
    return ScoreOptions(transform, ignore_index, backend, memory_budget, inplace_grad, grad_filter)


def check_options(*, outputs: tuple[str, ...] = (), group: Any = None, **options: Any) -> None:
    """What the module of `linear_logprob` checks before it has tensors; a group is judged when it is used."""
    known = set(inspect.signature(linear_logprob).parameters) - {"hidden", "weight", "labels", "bias"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise TypeError(f"{unknown[0]}: not an option of linear_logprob")
    checks.output_names(outputs)
    score_options(**options)


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


_DIFFERENTIABLE = ("entropy",)
"""Statistics that have a gradient."""


def _output(results: Sequence[Any], names: tuple[str, ...]) -> LogprobOutput:
    logps, _, *statistics = results[: 2 + len(STATISTICS)]
    values = {name: x for name, x in zip(STATISTICS, statistics, strict=True) if name in names}
    values = {name: x if name in _DIFFERENTIABLE else x.detach() for name, x in values.items()}
    if "dropped_mass" in names:
        filtered = len(results) > 2 + len(STATISTICS) and results[-1].numel() > 0
        values["dropped_mass"] = results[-1] if filtered else torch.zeros_like(logps)
    return LogprobOutput(logps, **values)


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
    grad_filter: float | str | None = None,
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
        outputs: names of optional statistics, fields of `LogprobOutput`: "entropy" (differentiable),
            "log_sum_sq_probs", "mean_logits", "is_top1", "dropped_mass".
        grad_filter: None: gradients are exact. A cut in (0, 1): they are made from those entries of a token's softmax
            that are more than ``cut * (1 - p[label])``, and the label's; the sum of the others is given back to all
            in shares that the batch decides (nothing is, under a softcap). Tokens where more than an eighth of
            ``1 - p[label]`` would be left out keep everything. "auto": a cut for the dtypes, 2^-14 in bfloat16 and
            2^-18 in float16 (a quarter of it under a softcap), none in fp32; see docs/filter.md. On a CPU log-probs are
            the same bits. On a GPU of compute capability 9, in bfloat16 without a bias or softcap, whole tiles are left
            out within the same bound, and their mass is given back in equal parts. Elsewhere, where the budget has no
            room for what is kept, where nothing is gained, and with a gradient of the entropy, gradients are exact. Not
            with ``group``.
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
    hidden, weight, labels, bias, name = distributed.plain_head(hidden, weight, labels, bias, group)
    with distributed.refusing_together(name):
        options = score_options(
            temperature=temperature, logit_scale=logit_scale, softcap=softcap, grad_filter=grad_filter,
            ignore_index=ignore_index, memory_budget=memory_budget, backend=backend,
        )  # fmt: skip
        names = checks.output_names(outputs)
        scorer = HeadScorer(hidden, weight, bias, checks.integers(labels), name, options)
    return scorer.score(names)


class HeadCall(NamedTuple):
    """One call, with operands as autocast has them, and how it runs."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    positions: Tensor | None  # of the labels that count; None: nobody looked
    n_tokens: int  # how many they are; -1: unknown
    request: Request
    schedule: Schedule
    exact_backend: str
    options: ScoreOptions
    group: str | None
    grad_filter: float  # the cut; 0: gradients are exact

    def score(self, names: tuple[str, ...]) -> LogprobOutput:
        """`linear_logprob`, with the statistics ``names``, which it was asked for."""
        ignore_index, transform, bounds = self.options.ignore_index, self.options.transform, None
        hidden, weight, bias = self.hidden, self.weight, self.bias  # a slice is too much for torch.compile of 2.8
        if self.group is not None:
            same = ignore_index, *transform, names, hidden.dtype, weight.dtype, bias is None, self.request.to_hidden
            bounds = distributed.vocabulary_bounds(self.labels, weight, str(same), self.group)
        where = self.exact_backend, self.schedule.name, self.schedule.sizes, self.group or ""
        how = [*transform, self.grad_filter], flags(names), *where
        operands = hidden, weight, bias, self.labels, bounds
        results = _ops.call_linear_logprob(self.positions, *operands, ignore_index, self.n_tokens, *how)
        return _output(results, names)


class HeadScorer:
    """Hidden states, a head and labels, checked: what `linear_logprob` runs on, and a loss its policy and reference.

    Args:
        labels: in 64 bits; they alone were checked before.
        group: the name of the ranks that hold the head together; the caller refuses together with them.
        prefix: goes before the names in errors, as in ref_hidden.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        group: str | None,
        options: ScoreOptions,
        prefix: str = "",
    ) -> None:
        checks.head(hidden, weight, bias, labels, sharded=group is not None, prefix=prefix)
        self.exact_backend = registry.resolve(options.backend, hidden.device.type)
        self.hidden, self.weight, self.bias, self.labels = hidden, weight, bias, labels
        self.group, self.options = group, options

    def score(self, names: tuple[str, ...]) -> LogprobOutput:
        """`linear_logprob`, with the statistics ``names``."""
        return self.ask(names).score(names)

    def ask(self, names: tuple[str, ...]) -> HeadCall:
        """The call that `score` makes: the one wait for a device is here."""
        with distributed.refusing_together(self.group):
            hidden, weight, bias = self._cast()
            n_tokens, positions = _count(self.labels, self.options.ignore_index)
            cut = self._cut(hidden, weight)
            request = self._request(hidden, weight, bias, n_tokens, names, filters=cut > 0)
            # a compiled graph cannot look into the memory of `chosen`
            plan = traced if torch.compiler.is_compiling() else chosen
            schedule = plan(request, self.exact_backend, device=cost.device_of(hidden.device))
        return HeadCall(
            hidden, weight, bias, self.labels, positions, n_tokens, request, schedule, self.exact_backend, self.options,
            self.group, cut if schedule.filters else 0.0,
        )  # fmt: skip

    def _cut(self, hidden: Tensor, weight: Tensor) -> float:
        """That of the filter of gradients, 0 if there is none or nobody wants any."""
        wanted, transform = self.options.grad_filter, self.options.transform
        if wanted is None:
            return 0.0
        filters.check_group(self.group is not None)
        has_grad = any(x is not None and x.requires_grad for x in (hidden, weight, self.bias))
        needed = torch.is_grad_enabled() and has_grad
        return filters.cut_of(wanted, hidden.dtype, weight.dtype, transform[2]) if needed else 0.0

    def _cast(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The operands as autocast has them: made when they are used, so that those of two heads need not coexist."""
        hidden, weight, bias, device_type = self.hidden, self.weight, self.bias, self.hidden.device.type
        if not torch.is_autocast_enabled(device_type) or torch.float64 in (hidden.dtype, weight.dtype):
            return hidden, weight, bias
        dtype = torch.get_autocast_dtype(device_type)
        return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)

    def _request(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        n_tokens: int,
        names: tuple[str, ...],
        filters: bool,
    ) -> Request:
        grad = torch.is_grad_enabled()
        n = self.labels.numel() if n_tokens < 0 else max(1, n_tokens)
        budget = parse_bytes(self.options.memory_budget, default=cost.default_budget(hidden.device))
        whole = self.group is None
        if not whole:  # packed rows of hidden, and the sums of its gradient
            budget -= n * weight.shape[1] * (hidden.dtype.itemsize + wide_dtype(hidden.dtype, weight.dtype).itemsize)
        aligned = weight.stride(1) == 1 and weight.stride(0) % 8 == 0
        plain = bias is None and not self.options.transform[2] and whole and aligned
        sheet = cost.device_of(hidden.device)
        return Request(
            n, weight.shape[1], max(1, weight.shape[0]), hidden.dtype, weight.dtype, budget,
            to_hidden=grad and hidden.requires_grad,
            to_weight=grad and (weight.requires_grad or (bias is not None and bias.requires_grad)),
            outputs=len(set(names) - {"dropped_mass"}) + ("is_top1" in names),  # it has two running numbers
            entropy="entropy" in names, as_is=weight.stride(1) == 1, keeps=whole,
            fuses=plain and can_fuse(sheet, self.exact_backend, hidden.dtype, weight.dtype, weight.shape[1]),
            filters=filters,
        )  # fmt: skip


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
    options = score_options(
        temperature=temperature, logit_scale=logit_scale, softcap=softcap, grad_filter=grad_filter,
        ignore_index=ignore_index, backend=backend, inplace_grad=inplace_grad,
    )  # fmt: skip
    return LogitsScorer(logits, checks.integers(labels), options).score(checks.output_names(outputs))


class LogitsScorer:
    """Logits and labels, checked: as `HeadScorer`, for `logprob`; ``name`` is that of the logits in errors."""

    def __init__(self, logits: Tensor, labels: Tensor, options: ScoreOptions, name: str = "logits") -> None:
        checks.rows(name, logits, labels)
        if options.grad_filter is not None:
            raise ValueError(
                f"grad_filter: got {options.grad_filter!r}, expected None: the gradient of logits that exist is exact; "
                "linear_logprob and linear_dpo_loss have a filter"
            )
        self.exact_backend = registry.resolve(options.backend, logits.device.type)
        self.logits, self.labels, self.options = logits, labels, options

    def score(self, names: tuple[str, ...]) -> LogprobOutput:
        """`logprob`, with the statistics ``names``."""
        logits, inplace, ignore_index = self.logits, self.options.inplace_grad, self.options.ignore_index
        shares_rows = inplace and 0 in logits.stride()  # expanded: one memory cannot hold every row's gradient
        if logits.stride(-1) != 1 or shares_rows:
            logits = logits.contiguous()
        n_tokens, positions = _count(self.labels, ignore_index)
        how = ignore_index, n_tokens, self.options.transform, flags(names), self.exact_backend
        return _output(_ops.call_logprob(positions, inplace, logits, self.labels, *how), names)
