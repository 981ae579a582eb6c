"""Liger's preference losses, as its users call them, on dpofast: the same names, constructors, calls and returns.

    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss            # before
    from dpofast.integrations.liger import LigerFusedLinearDPOLoss           # after

``compiled`` and ``chunk_size`` are accepted and change nothing: nothing is compiled at run time, and the tiles follow
from the sizes (`dpofast.plan`). Prompt and padding cost nothing. liger-kernel need not be installed.

Where this differs from liger-kernel 0.8.5, which is what the contract was read from:

- ``label_smoothing`` of the "sigmoid" DPO loss is applied (cDPO), as Liger's docstring says; Liger's code ignores it.
  Where a loss has no smoothing it raises, and so does a ``discopop_tau`` for any other loss.
- A completion without tokens has average 0, and a batch without tokens nll 0; Liger divides by zero.
- ORPO's odds, in the loss and in the metrics, are those of the largest probability below 1 where a completion has
  probability 1, or no tokens; Liger's are infinite.
- A ``kl`` of KTO with one value per completion is taken per completion, as Liger's docstring says; Liger's code
  subtracts all of it from each chunk, which is the same only if there is one chunk.
- A reference that is passed although ``use_ref_model=False`` raises; Liger ignores it.
- DPO takes every loss of `dpofast.losses.LOSSES` and their options, a list of losses, LD-DPO, and reference
  log-probabilities that were computed before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpofast import checks, losses
from dpofast.functional import make_objective
from dpofast.primitive import linear_logprob
from dpofast.sequences import sequence_logps

__all__ = [
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
]

_DISCOPOP_TAU = 0.05


class _Pairs:
    """The log-probabilities of a batch ``[chosen; rejected]``, and what Liger reports of it."""

    def __init__(self, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int) -> None:
        checks.dense("_input", hidden)
        checks.dense("target", target)
        if target.dim() != 2 or target.shape[0] % 2 or hidden.shape[:-1] != target.shape:
            raise checks.wrong(
                "_input", f"shape {tuple(hidden.shape)} with target {tuple(target.shape)}",
                "[2B, T, H] with [2B, T], all chosen completions and then all rejected ones",
            )  # fmt: skip
        self.target, self.ignore_index = target, ignore_index
        self.logps = linear_logprob(hidden, weight, target, bias=bias, ignore_index=ignore_index).logps
        self.lengths = (target != ignore_index).sum(-1)
        with torch.no_grad():
            self.mean_logits = tuple(
                _sum_logits(half, weight, bias) / max(half[..., 0].numel() * weight.shape[0], 1)
                for half in hidden.chunk(2)
            )

    def sums(self, average: bool = False, ld_alpha: float | None = None) -> tuple[Tensor, Tensor]:
        options = {"average": average, "ld_alpha": ld_alpha, "ignore_index": self.ignore_index}
        return sequence_logps(self.logps, self.target, **options).chunk(2)

    def nll(self) -> Tensor:
        """The loss of the chosen completions, a mean over the tokens of the batch."""
        return -self.sums()[0].sum() / self.lengths.chunk(2)[0].sum().clamp(min=1)

    def output(self, loss: Tensor, logps: Sequence[Tensor], nll: Tensor, rewards: Sequence[Tensor], *more: Tensor):
        values = (*logps, *self.mean_logits, nll, *rewards, *more)
        return loss, tuple(x.detach() for x in values)


def _sum_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The sum of all logits of all positions, prompt and padding too, without any of them: the product is linear."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    dtype = torch.promote_types(torch.promote_types(rows.dtype, weight.dtype), torch.float32)
    total = rows.sum(0, dtype=dtype) @ weight.sum(0, dtype=dtype)
    return total if bias is None else total + rows.shape[0] * bias.sum(dtype=dtype)


class _LigerLoss(nn.Module):
    """Keeps the options under Liger's names, as attributes."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        for name, value in options.items():
            setattr(self, name, value)

    def _nll(self, pairs: _Pairs) -> Tensor:
        return pairs.nll() if self.compute_nll_loss else pairs.logps.new_zeros(())


class LigerFusedLinearDPOLoss(_LigerLoss):
    """DPO and all its relatives: ``alpha * nll + preference_loss(...)``.

    Args:
        ignore_index, beta, alpha, compute_nll_loss, compiled, use_ref_model, average_log_prob, chunk_size, loss_type,
            label_smoothing, discopop_tau: as in Liger. Without a reference model its log-probabilities count as 0.
        ld_alpha: LD-DPO, as in `dpofast.sequence_logps`.
        options: whatever else `dpofast.preference_loss` takes: loss_weights (``loss_type`` may be a list),
            f_divergence_type, margin, ...

    Raises:
        ValueError, TypeError: as `dpofast.preference_loss` does, here already; an ``average_log_prob`` of a loss that
            averages by itself ("ipo", "sigmoid_norm", ...).
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str | Sequence[str] = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = _DISCOPOP_TAU,
        *,
        ld_alpha: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            ignore_index=ignore_index,
            beta=beta,
            alpha=alpha,
            compute_nll_loss=compute_nll_loss,
            compiled=compiled,
            use_ref_model=use_ref_model,
            average_log_prob=average_log_prob,
            chunk_size=chunk_size,
            loss_type=loss_type,
            label_smoothing=label_smoothing,
            discopop_tau=discopop_tau,
            ld_alpha=ld_alpha,
            options=options,
        )
        self._objective()

    def _objective(self):
        """The options as they stand now, checked."""
        objective = make_objective(
            loss_type=self.loss_type,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            discopop_tau=None if self.discopop_tau == _DISCOPOP_TAU else self.discopop_tau,
            ld_alpha=self.ld_alpha,
            **self.options,
        )
        for name in ("use_weighting", "metrics", "pair_weight", "token_weights"):
            if getattr(objective, name) is not None and getattr(objective, name) is not False:
                raise TypeError(f"{name}: an option of linear_dpo_loss, not of this class")
        averaging = [term.loss.name for term in objective.terms if "chosen_lengths" in term.loss.needs]
        if self.average_log_prob and (averaging or self.ld_alpha is not None):
            what = f"loss_type={averaging[0]!r}" if averaging else f"ld_alpha={self.ld_alpha!r}"
            raise ValueError(f"average_log_prob: True has no meaning with {what}, which goes by the lengths itself")
        return objective

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        *,
        ref_logps: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``[2B, T, H]``, chosen and then rejected, to the loss and Liger's seven metrics.

        Args:
            ref_input, ref_weight, ref_bias: the reference's hidden states and head. Or instead
            ref_logps: its log-probabilities, per token ``[2B, T]`` or already summed ``[2B]`` (averaged, if
                ``average_log_prob``; weighted by ld_alpha, if that is set).

        Returns:
            loss, (chosen_logps, rejected_logps ``[B]``, mean chosen logit, mean rejected logit, nll, chosen_rewards,
            rejected_rewards ``[B]``); all but the loss without gradient.
        """
        objective = self._objective()
        given = ref_input is not None or ref_logps is not None
        if given != self.use_ref_model or (ref_input is not None and ref_logps is not None):
            raise ValueError(
                f"use_ref_model: got {self.use_ref_model}, with which is expected "
                f"{'one of ref_input or' if self.use_ref_model else 'neither ref_input nor'} ref_logps"
            )
        if ref_input is not None and ref_weight is None:
            raise ValueError("ref_weight: is None; pass the reference's head beside ref_input")
        reference_free = not any(term.loss.reference for term in objective.terms)
        losses.check_reference(objective.terms, given or not reference_free, "ref_input and ref_weight, or ref_logps")
        pairs = _Pairs(_input, lin_weight, target, bias, self.ignore_index)
        logps = pairs.sums(self.average_log_prob, self.ld_alpha)
        ref = self._reference(target, ref_input, ref_weight, ref_bias, ref_logps)
        if ref is None:
            ref = tuple(x.new_zeros(x.shape) for x in logps)
        given = dict(zip(losses.TENSORS, (*logps, *ref, *pairs.lengths.chunk(2), -pairs.sums()[0]), strict=True))
        losses.check_per_pair(objective.terms, target.shape[0] // 2, target=target)
        loss = losses.evaluate(objective.terms, given, objective.reduction)
        nll = self._nll(pairs)
        rewards = [self.beta * (policy - reference) for policy, reference in zip(logps, ref)]
        return pairs.output(loss + self.alpha * nll, logps, nll, rewards)

    def _reference(self, target, ref_input, ref_weight, ref_bias, ref_logps) -> tuple[Tensor, Tensor] | None:
        with torch.no_grad():
            if ref_input is not None:
                ref_logps = linear_logprob(
                    ref_input, ref_weight, target, bias=ref_bias, ignore_index=self.ignore_index
                ).logps
            if ref_logps is None:
                return None
            if ref_logps.shape == target.shape:
                options = {"average": self.average_log_prob, "ld_alpha": self.ld_alpha}
                ref_logps = sequence_logps(ref_logps, target, ignore_index=self.ignore_index, **options)
            if ref_logps.shape != target.shape[:1]:
                expected = f"{tuple(target.shape)} or ({target.shape[0]},)"
                raise checks.wrong("ref_logps", f"shape {tuple(ref_logps.shape)}", expected)
            return ref_logps.chunk(2)


class LigerFusedLinearCPOLoss(_LigerLoss):
    """CPO: ``alpha * nll + cDPO of beta (log pi(y_w) - log pi(y_l))``. Arguments as in Liger."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(
            ignore_index=ignore_index,
            beta=beta,
            alpha=alpha,
            label_smoothing=label_smoothing,
            compute_nll_loss=compute_nll_loss,
            compiled=compiled,
            average_log_prob=average_log_prob,
            chunk_size=chunk_size,
        )
        losses.resolve("cpo", beta=beta, label_smoothing=label_smoothing)

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and Liger's seven metrics, as for `LigerFusedLinearDPOLoss`; rewards are beta times the logps."""
        pairs = _Pairs(_input, lin_weight, target, bias, self.ignore_index)
        logps = pairs.sums(self.average_log_prob)
        nll = self._nll(pairs)
        loss = losses.preference_loss(
            *logps,
            loss_type="cpo",
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            cpo_alpha=self.alpha if self.compute_nll_loss else 0.0,
            chosen_nll=-pairs.sums()[0],
            chosen_lengths=pairs.lengths.chunk(2)[0],
        )
        return pairs.output(loss, logps, nll, [self.beta * x for x in logps])


class LigerFusedLinearSimPOLoss(_LigerLoss):
    """SimPO: ``alpha * nll + cDPO of beta (a_w - a_l) - gamma``, of averages ``a``. Arguments as in Liger."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(
            ignore_index=ignore_index,
            beta=beta,
            alpha=alpha,
            label_smoothing=label_smoothing,
            compute_nll_loss=compute_nll_loss,
            compiled=compiled,
            gamma=gamma,
            chunk_size=chunk_size,
        )
        losses.resolve("simpo", beta=beta, label_smoothing=label_smoothing, simpo_gamma=gamma)

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and Liger's seven metrics, as for `LigerFusedLinearDPOLoss`; logps are averages over tokens."""
        pairs = _Pairs(_input, lin_weight, target, bias, self.ignore_index)
        averages = pairs.sums(average=True)
        lengths = pairs.lengths.chunk(2)
        nll = self._nll(pairs)
        loss = losses.preference_loss(
            *pairs.sums(),
            loss_type="simpo",
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            simpo_gamma=self.gamma,
            chosen_lengths=lengths[0],
            rejected_lengths=lengths[1],
        )
        return pairs.output(loss + self.alpha * nll, averages, nll, [self.beta * x for x in averages])


class LigerFusedLinearORPOLoss(_LigerLoss):
    """ORPO: ``nll - beta log sigmoid(log odds ratio)`` of averages. Arguments as in Liger."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(
            ignore_index=ignore_index,
            beta=beta,
            compute_nll_loss=compute_nll_loss,
            compiled=compiled,
            chunk_size=chunk_size,
        )
        losses.resolve("orpo", beta=beta)

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and Liger's nine metrics: the seven of `LigerFusedLinearDPOLoss`, then the means of the log
        sigmoid of the log odds ratio and of that ratio itself.

        Args:
            nll_target: other labels ``[2B, T]`` for the nll, of which the chosen half counts; scored beside target.
        """
        pairs = _Pairs(_input, lin_weight, target, bias, self.ignore_index)
        averages = pairs.sums(average=True)
        nll = self._nll(pairs) if nll_target is None else self._other_nll(_input, lin_weight, nll_target, bias)
        lengths = pairs.lengths.chunk(2)
        sums = pairs.sums()
        ratio_loss = losses.preference_loss(
            *sums,
            loss_type="orpo",
            beta=self.beta,
            chosen_lengths=lengths[0],
            rejected_lengths=lengths[1],
            chosen_nll=torch.zeros_like(sums[0]),  # the nll is added below, since it may have labels of its own
        )
        log_odds = [losses.log_odds(x.detach()) for x in averages]
        log_odds_ratio = (log_odds[0] - log_odds[1]).sum() / max(log_odds[0].shape[0], 1)
        rewards = [self.beta * x for x in averages]
        return pairs.output(ratio_loss + nll, averages, nll, rewards, -ratio_loss / self.beta, log_odds_ratio)

    def _other_nll(self, hidden: Tensor, weight: Tensor, nll_target: Tensor, bias: Tensor | None) -> Tensor:
        if nll_target.shape != hidden.shape[:-1]:
            expected = f"{tuple(hidden.shape[:-1])}, that of target"
            raise checks.wrong("nll_target", f"shape {tuple(nll_target.shape)}", expected)
        chosen, labels = hidden.chunk(2)[0], nll_target.chunk(2)[0]
        if not self.compute_nll_loss:
            return hidden.new_zeros((), dtype=torch.float32)
        logps = linear_logprob(chosen, weight, labels, bias=bias, ignore_index=self.ignore_index).logps
        return -logps.sum() / (labels != self.ignore_index).sum().clamp(min=1)


class LigerFusedLinearKTOLoss(_LigerLoss):
    """KTO: the mean of ``sigmoid(-sign beta (r - kl))``. Arguments as in Liger."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(
            ignore_index=ignore_index,
            beta=beta,
            compiled=compiled,
            use_ref_model=use_ref_model,
            average_log_prob=average_log_prob,
            chunk_size=chunk_size,
        )
        losses.resolve("kto", table=losses.UNPAIRED_LOSSES, beta=beta)

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``[N, T, H]`` of single completions to the loss and Liger's six metrics.

        Args:
            preference_labels: bool ``[N]``, True for a good completion.
            kl: a scalar, ``[1]`` or ``[N]``; used as it is, neither averaged nor clamped at 0; None is 0.

        Returns:
            loss, (the sums over good completions and over bad ones of logps, logits and rewards, in this order); all
            but the loss without gradient.
        """
        checks.dense("_input", _input)
        checks.dense("target", target)
        if preference_labels is None or preference_labels.dtype != torch.bool:
            what = "None" if preference_labels is None else f"dtype {preference_labels.dtype}"
            raise checks.wrong("preference_labels", what, "torch.bool [N], True for a good completion", TypeError)
        if self.use_ref_model != (ref_input is not None) or (ref_input is not None and ref_weight is None):
            expected = "ref_input and ref_weight" if self.use_ref_model else "no ref_input"
            raise ValueError(f"use_ref_model: got {self.use_ref_model}, with which is expected {expected}")
        if target.dim() != 2 or _input.shape[:-1] != target.shape or preference_labels.shape != target.shape[:1]:
            beside = f"target {tuple(target.shape)} and preference_labels {tuple(preference_labels.shape)}"
            raise checks.wrong("_input", f"shape {tuple(_input.shape)} with {beside}", "[N, T, H] with [N, T] and [N]")
        if kl is not None:
            checks.dense("kl", kl)
        if kl is not None and kl.numel() != 1 and kl.shape != target.shape[:1]:
            raise checks.wrong("kl", f"shape {tuple(kl.shape)}", f"one value, or {tuple(target.shape[:1])}")

        def score(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            logps = linear_logprob(hidden, weight, target, bias=bias, ignore_index=self.ignore_index).logps
            return sequence_logps(logps, target, average=self.average_log_prob, ignore_index=self.ignore_index)

        logps = score(_input, lin_weight, bias)
        with torch.no_grad():
            ref = torch.zeros_like(logps) if ref_input is None else score(ref_input, ref_weight, ref_bias)
            shift = 0.0 if kl is None else kl.reshape(-1)
        # apo_zero_unpaired is kto without a kl of its own, which would be averaged and clamped
        loss = losses.unpaired_preference_loss(
            logps - shift, ref, preference_labels, loss_type="apo_zero_unpaired", beta=self.beta
        )
        sides = (preference_labels, ~preference_labels)
        with torch.no_grad():
            logits = [_sum_logits(_input[side], lin_weight, bias) for side in sides]
        rewards = self.beta * (logps - ref)
        values = (*(logps[side].sum() for side in sides), *logits, *(rewards[side].sum() for side in sides))
        return loss, tuple(x.detach() for x in values)
