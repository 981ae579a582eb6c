"""Sequences of tokens, padded or packed, on one rank or on several: what counts, how long they are, their sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpofast import checks, distributed

__all__ = ["sequence_logps", "wpo_weights"]


class Sequences:
    """Which tokens belong to which sequence, and which of them count. Checked once, when it is made.

    Attributes:
        labels: token ids ``[S, T]``, or packed ``[N]`` with ``cu_seqlens`` ``[S + 1]``; in 64 bits.
        mask: where a token counts, of labels' shape.
        group: the name of the ranks that hold the sequences together, each some tokens of all S; None: they are here.
    """

    def __init__(self, labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int, group: str | None):
        labels = checks.integers(labels)
        checks.ignored(ignore_index, optional=False)
        if cu_seqlens is not None:
            checks.boundaries(cu_seqlens, labels)
        elif labels.dim() != 2:
            raise checks.wrong("labels", f"shape {tuple(labels.shape)}", "[S, T], or cu_seqlens with [N]")
        self.labels, self.cu_seqlens, self.ignore_index, self.group = labels, cu_seqlens, ignore_index, group
        self._mask: Tensor | None = None
        self._lengths: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        if self._mask is None:
            self._mask = self.labels != self.ignore_index
        return self._mask

    def __len__(self) -> int:
        return self.labels.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def sum(self, values: Tensor) -> Tensor:
        """The sum of each sequence. Packed ones go segment by segment: no atomics, so that the bits do not vary."""
        if self.cu_seqlens is None:
            sums = values.sum(-1)
        else:
            sums = torch.segment_reduce(values, "sum", offsets=self.cu_seqlens.long(), initial=0, unsafe=True)
        return sums if self.group is None else distributed.sum_over_ranks(sums, self.group)

    def lengths(self) -> Tensor:
        """Tokens of each sequence that count, on all ranks."""
        if self._lengths is None:
            own = self._own_lengths()
            self._lengths = own if self.group is None else distributed.sum_over_ranks(own, self.group)
        return self._lengths

    def found_lengths(self, lengths: Tensor) -> None:
        """What `lengths` would compute, where somebody has."""
        self._lengths = lengths

    def _own_lengths(self) -> Tensor:
        if self.cu_seqlens is None:
            return self.mask.sum(-1)
        before = torch.nn.functional.pad(self.mask.cumsum(0), (1, 0))
        return before[self.cu_seqlens[1:]] - before[self.cu_seqlens[:-1]]

    def tail(self) -> Tensor:
        """Where a token of ``[chosen; rejected]`` lies past the end of the shorter completion of its pair."""
        shared = torch.minimum(*self.lengths().chunk(2)).repeat(2)
        if self.group is not None:  # less what the pair has on earlier ranks
            shared = shared - distributed.sum_over_earlier_ranks(self._own_lengths(), self.group)
        if self.cu_seqlens is None:
            return self.mask.cumsum(-1) > shared.unsqueeze(-1)
        index = torch.arange(self.mask.shape[0], device=self.mask.device)
        sequence = torch.searchsorted(self.cu_seqlens.long(), index, right=True) - 1
        before = torch.nn.functional.pad(self.mask.cumsum(0), (1, 0))
        return before[1:] - before[self.cu_seqlens[sequence]] > shared[sequence]

    def logps(
        self,
        logps: Tensor,
        *,
        average: bool = False,
        token_weights: Tensor | None = None,
        ld_alpha: float | None = None,
    ) -> Tensor:
        """`sequence_logps` of arguments that were checked."""
        # what does not count is 0 before any factor: 0 times a NaN would be one, in the value or in the gradient
        values = torch.where(self.mask, logps.to(_wide(logps)), 0.0)
        if token_weights is not None:
            values = values * torch.where(self.mask, token_weights, 0.0)
        if ld_alpha is not None:
            less = ld_alpha * values if ld_alpha else 0.0
            values = torch.where(self.tail(), less, values)
        sums = self.sum(values)
        return sums / self.lengths().clamp(min=1) if average else sums

    def wpo_weights(self, logps: Tensor, log_sum_sq_probs: Tensor) -> Tensor:
        """`wpo_weights` of arguments that were checked."""
        return torch.exp(self.logps((logps - log_sum_sq_probs).detach(), average=True))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def sequence_logps(
    logps: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    average: bool = False,
    token_weights: Tensor | None = None,
    ld_alpha: float | None = None,
    ignore_index: int = -100,
    group: Any = None,
) -> Tensor:
    """Log-probability of each sequence: the sum over its labelled tokens.

    Equivalent to::

        mask = labels != ignore_index
        out = torch.where(mask, logps, 0).sum(-1)
        if average:
            out = out / mask.sum(-1).clamp(min=1)

    Args:
        logps: per-token log-probabilities ``[S, T]``, or packed ``[N]`` with cu_seqlens. Floating point.
        labels: token ids of the same shape; ``ignore_index`` where a token does not count.
        cu_seqlens: boundaries of packed sequences ``[S + 1]``, integer, from 0 to N, not decreasing.
        average: divide by the number of labelled tokens, 1 for a sequence without any, whatever their weights.
        token_weights: a factor for each token, of the shape of logps. Differentiable. Where a token does not count it
            is not looked at and may be anything, NaN included.
        ld_alpha: LD-DPO. The sequences are ``[chosen; rejected]``, and in each pair the tokens past the
            length of the shorter completion count ld_alpha, in [0, 1]: for 0, not at all, even at a log-probability
            of -inf. None counts every token fully.
        ignore_index: the label that does not count.
        group: a `torch.distributed.ProcessGroup` or one-dimensional `DeviceMesh` whose ranks hold the sequences
            together: sequence- (context-) parallel. Each passes its own tokens of all S sequences, as many as it has
            of each, none included. For ld_alpha the order of ranks must be that of the tokens.

    Returns:
        ``[S]``, fp32, or fp64 for fp64. A sequence without labels has 0, with gradient 0. With ``group``, the sums over
        all ranks, on each; every rank has the same loss of them, and the gradient goes to its own logps.

    Raises:
        ValueError: shapes that do not match, bad boundaries, ld_alpha out of range or with an odd S.
        TypeError: logps that are not floating, labels or boundaries that are not integers. With ``group``, on every
            rank of it.

    LD-DPO: arXiv:2409.06411 eq. 9 and 10.

    >>> logps = torch.tensor([[-1.0, -2.0, -4.0], [-8.0, -16.0, 0.0]])
    >>> labels = torch.tensor([[5, 6, 7], [8, 9, -100]])
    >>> sequence_logps(logps, labels)
    tensor([ -7., -24.])
    >>> sequence_logps(logps, labels, ld_alpha=0.5)
    tensor([ -5., -24.])
    """
    name = sequence_group_name(group)
    with distributed.refusing_together(name):
        sequences = Sequences(labels, cu_seqlens, ignore_index, name)
        checks.like_labels("logps", logps, sequences.labels)
        if token_weights is not None:
            checks.like_labels("token_weights", token_weights, sequences.labels)
        checks.ld_alpha(ld_alpha)
    if name is not None:
        dtype = _wide(logps) if token_weights is None else torch.promote_types(_wide(logps), token_weights.dtype)
        options = average, ld_alpha, token_weights is not None, dtype
        distributed.agree_on_sequences(name, len(sequences), str(options))
    if ld_alpha is not None and len(sequences) % 2:
        raise ValueError(f"ld_alpha: needs [chosen; rejected], and the batch has {len(sequences)} sequences")
    return sequences.logps(logps, average=average, token_weights=token_weights, ld_alpha=ld_alpha)


def wpo_weights(
    logps: Tensor,
    log_sum_sq_probs: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    group: Any = None,
) -> Tensor:
    """WPO's weight of each sequence: its mean token probability, relative to the policy's own expectation.

    A pair's weight is the product of its two, as in TRL. Equivalent to::

        torch.exp(sequence_logps(logps - log_sum_sq_probs, labels, average=True)).detach()

    Args:
        logps, log_sum_sq_probs: as `linear_logprob` returns them with ``outputs=("log_sum_sq_probs",)``.
        labels, cu_seqlens, ignore_index, group: as in `sequence_logps`.

    Returns:
        ``[S]``, without gradient.

    WPO: arXiv:2406.11827 eq. 2.

    >>> wpo_weights(torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -1.0]]), torch.tensor([[3, 4]]))
    tensor([1.])
    """
    aligned = (logps - log_sum_sq_probs).detach()
    averages = sequence_logps(
        aligned, labels, cu_seqlens=cu_seqlens, average=True, ignore_index=ignore_index, group=group
    )
    return torch.exp(averages)


def sequence_group_name(group: Any) -> str | None:
    return None if group is None else distributed.group_name(group, "sequence_group")
