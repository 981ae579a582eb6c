"""What a backend is, and what travels between an op and it.

An op picks the completion tokens out, chooses a `Schedule` and hands both to a `Backend`, whose tensors are packed:
N positions count, and results are [N].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from dpofast.backends._tensors import wide_dtype
from dpofast.plan import Schedule


class Transform(NamedTuple):
    """What is done to a logit x: ``z = softcap * tanh(logit_scale * x / softcap) / temperature``."""

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float = 0.0  # 0: none


def chunk(x: Tensor | None, part: slice) -> Tensor | None:
    """``x[part]`` of None or a tensor; ``x`` itself, which is sooner done, if that is all of it."""
    return x if x is None or part == slice(0, x.shape[0]) else x[part]


class Problem(NamedTuple):
    """The operands of one call of `linear_logprob`."""

    hidden: Tensor  # [*, H], any strides
    weight: Tensor  # [V, H], any strides
    bias: Tensor | None  # [V]
    positions: Tensor  # [N], which of hidden's vectors count, among its leading dimensions in row-major order
    labels: Tensor  # [N], the tokens there; outside [0, V) where weight is a slice of the head that lacks the token
    transform: Transform = Transform()
    grad_filter: float = 0.0  # the cut below which the backward may leave entries out (`dpofast.grad_filter`); 0: none

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        positions: Tensor,
        labels: Tensor,
        numbers: Sequence[float],
    ) -> Problem:
        """With the numbers of the transform and of the filter in one list, as an op has them."""
        return cls(hidden, weight, bias, positions, labels, Transform(*numbers[:3]), numbers[3])

    @property
    def n_tokens(self) -> int:
        return self.positions.numel()

    @property
    def n_hidden(self) -> int:
        return self.hidden.shape[-1]

    @property
    def n_vocab(self) -> int:
        return self.weight.shape[0]

    @property
    def wide(self) -> torch.dtype:
        """The accumulators' dtype."""
        return wide_dtype(self.hidden.dtype, self.weight.dtype)

    def wide_bias(self) -> Tensor | None:
        return None if self.bias is None else self.bias.to(self.wide).contiguous()

    def chunk(self, part: slice) -> Problem:
        return self._replace(positions=chunk(self.positions, part), labels=chunk(self.labels, part))


class LogitsProblem(NamedTuple):
    """The operands of one call of `logprob`."""

    logits: Tensor  # [*, V], unit stride along V
    positions: Tensor  # [N]
    labels: Tensor  # [N]
    transform: Transform = Transform()

    @property
    def n_tokens(self) -> int:
        return self.positions.numel()

    @property
    def n_vocab(self) -> int:
        return self.logits.shape[-1]

    @property
    def wide(self) -> torch.dtype:
        """The accumulators' dtype."""
        return wide_dtype(self.logits.dtype)


class Saved(NamedTuple):
    """What a forward leaves for its backward."""

    logps: Tensor  # [N]
    lse: Tensor  # [N, 2]: the largest z, and log sum exp(z - it)
    entropy: Tensor | None = None  # [N], where its gradient is given
    cache: Tensor | None = None  # bytes, as many as the schedule says

    def chunk(self, part: slice) -> Saved:
        """What was saved of some of the tokens; without the cache, which is of all."""
        return Saved(*(chunk(x, part) for x in self[:3]))


class OutputGrads(NamedTuple):
    """The gradients that arrive, [N]; None: of zeros."""

    logps: Tensor | None = None
    entropy: Tensor | None = None

    def chunk(self, part: slice) -> OutputGrads:
        return OutputGrads(*(chunk(x, part) for x in self))


PAIR_OPTIONS = (
    "beta", "margin", "label_smoothing", "discopop_tau", "simpo_gamma", "alphapo_alpha", "dpop_lambda",
    "f_alpha_divergence_coef",
)  # fmt: skip
"""The options of `PairsProblem`, in its order."""


class PairsProblem(NamedTuple):
    """The operands of a loss that each pair of ``[chosen; rejected]`` decides alone."""

    logps: Tensor  # [2B, T], or packed [N] with cu_seqlens; fp32 or fp64
    labels: Tensor  # as logps, integers, ignore_index where a token does not count
    cu_seqlens: Tensor | None  # [2B + 1], integers
    ref_logps: Tensor | None  # [2B], where the loss has a reference
    beta: Tensor | None  # [B] or [], and likewise the next two; None: `options` has it, and the weight is 1
    margin: Tensor | None
    weight: Tensor | None
    ignore_index: int
    loss_type: str  # among the backend's ``pair_losses``
    options: Sequence[float]  # `PAIR_OPTIONS`
    f_divergence: str


class PairsResult(NamedTuple):
    """What `PairBackend.sequence_dpo` returns, in logps' dtype but for the lengths."""

    losses: Tensor  # [B], times the weight
    sums: Tensor  # [2B]
    lengths: Tensor  # [2B], int64, tokens that count
    coefficients: Tensor  # d losses.mean() / d logps, of their shape; exactly 0 where a token does not count


class InputGrads(NamedTuple):
    """The gradients to fill; None: not wanted.

    Of hidden's, which may be wider than it and is contiguous, the vectors at the problem's positions; of weight's and
    bias's, everything. Weight's may be wider than it, too. ``adds``: weight's and bias's have the accumulators' dtype,
    and are added to, under a schedule that keeps all exponentials.
    """

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    adds: bool = False

    @property
    def of_head(self) -> bool:
        return self.weight is not None or self.bias is not None


@runtime_checkable
class Backend(Protocol):
    """What computes. Nothing here checks an argument, and on a GPU nothing waits for it."""

    def cache(self, n_bytes: int, device: torch.device) -> Tensor:
        """New memory for what the forward keeps for the backward."""

    def grad_weight(self, weight: Tensor) -> Tensor:
        """New memory for the gradient of ``weight``, contiguous."""

    def forward(
        self, problem: Problem, schedule: Schedule, outputs: tuple[str, ...], cache: Tensor
    ) -> dict[str, Tensor]:
        """``logps``, ``lse`` in two parts, and the statistics among ``outputs``; fills ``cache``.

        With a filter of gradients (`dpofast.grad_filter`), ``dropped_mass``, too.
        """

    def fold(self, problem: Problem, schedule: Schedule, outputs: tuple[str, ...]) -> Tensor:
        """The running statistics (`dpofast.contract.Stat`), [Stat.COUNT, N], of a slice of the vocabulary.

        Labels count from the slice's first row; one before it is negative, one after it is at least V.
        """

    def backward(
        self, problem: Problem, schedule: Schedule, saved: Saved, incoming: OutputGrads, grads: InputGrads
    ) -> None:
        """Fills ``grads``. With a gradient of the entropy, logits are made again whatever the cache holds."""

    def logits_forward(self, problem: LogitsProblem, outputs: tuple[str, ...]) -> dict[str, Tensor]:
        """`forward` from logits that exist."""

    def logits_backward(self, problem: LogitsProblem, saved: Saved, incoming: OutputGrads, grad_logits: Tensor) -> None:
        """Fills ``grad_logits`` at the problem's positions; it may be the logits themselves."""


class PairBackend(Backend, Protocol):
    """A backend that also has whole losses. Those that it does not name are computed by `dpofast.losses`."""

    pair_losses: tuple[str, ...]
    """The losses of `dpofast.losses.LOSSES` that `sequence_dpo` has; in cpo's, ``cpo_alpha`` is 0."""

    def sequence_dpo(self, problem: PairsProblem) -> PairsResult:
        """Sums, losses and their gradient."""
