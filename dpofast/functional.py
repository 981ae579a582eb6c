"""From hidden states or logits to a preference loss: the primitive, sums per sequence, the table."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpofast import distributed, losses
from dpofast.primitive import LogprobOutput, check_inputs, check_logits, linear_logprob, logprob

__all__ = ["DPOLossOutput", "dpo_loss", "linear_dpo_loss", "sequence_logps", "wpo_weights"]


# Sums per sequence


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
    name = _sequence_group(group)
    with distributed.refusing_together(name):
        _check_tokens(labels, cu_seqlens, ignore_index)
        _check_like_labels("logps", logps, labels)
        if token_weights is not None:
            _check_like_labels("token_weights", token_weights, labels)
        _check_ld_alpha(ld_alpha)
    mask = labels != ignore_index
    # what does not count is 0 before any factor: 0 times a NaN would be one, in the value or in the gradient
    values = torch.where(mask, logps.to(torch.promote_types(logps.dtype, torch.float32)), 0.0)
    if token_weights is not None:
        values = values * torch.where(mask, token_weights, 0.0)
    if name is not None:
        n_sequences = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        options = average, ld_alpha, token_weights is not None, values.dtype
        distributed.agree_on_sequences(name, n_sequences, str(options))
    lengths = _lengths(mask, cu_seqlens, name) if average or ld_alpha is not None else None
    if ld_alpha is not None:
        if lengths.shape[0] % 2:
            raise ValueError(f"ld_alpha needs [chosen; rejected], and the batch has {lengths.shape[0]} sequences")
        less = ld_alpha * values if ld_alpha else 0.0
        values = torch.where(_tail(mask, lengths, cu_seqlens, name), less, values)
    sums = _sums(values, cu_seqlens, name)
    return sums / lengths.clamp(min=1) if average else sums


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


_INTEGERS = (torch.int64, torch.int32, torch.int16)
"""Not bool and uint8, which index as masks."""


def _check_tokens(labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int) -> None:
    losses.check_dense("labels", labels)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index={ignore_index!r} is a {type(ignore_index).__name__}; expected an int")
    if labels.dtype not in (*_INTEGERS, torch.uint8):
        raise TypeError(f"labels are of {labels.dtype}; expected integer token ids")
    if cu_seqlens is None:
        if labels.dim() != 2:
            raise ValueError(f"labels have shape {list(labels.shape)}; expected [S, T], or cu_seqlens with [N]")
        return
    losses.check_dense("cu_seqlens", cu_seqlens, labels=labels)
    if cu_seqlens.dtype not in _INTEGERS:
        raise TypeError(f"cu_seqlens is of {cu_seqlens.dtype}; expected int64, int32 or int16")
    if labels.dim() != 1 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(
            f"labels have shape {list(labels.shape)} and cu_seqlens {list(cu_seqlens.shape)}; expected [N] and [S + 1]"
        )
    # on a GPU the values can't be looked at without waiting for it
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != labels.shape[0] or ends != sorted(ends):
            raise ValueError(f"cu_seqlens={ends}; expected boundaries from 0 to N={labels.shape[0]}, not decreasing")


def _check_like_labels(name: str, value: Tensor, labels: Tensor) -> None:
    """A number for each token."""
    losses.check_dense(name, value, labels=labels)
    if value.shape != labels.shape or not value.is_floating_point():
        raise (ValueError if value.is_floating_point() else TypeError)(
            f"{name} is {list(value.shape)} of {value.dtype}; expected floating point, of labels' shape "
            f"{list(labels.shape)}"
        )


def _check_ld_alpha(ld_alpha: float | None) -> None:
    if ld_alpha is None:
        return
    if isinstance(ld_alpha, bool) or not isinstance(ld_alpha, (int, float)):
        raise TypeError(f"ld_alpha={ld_alpha!r} is a {type(ld_alpha).__name__}; expected a number in [0, 1]")
    if not 0 <= ld_alpha <= 1:
        raise ValueError(f"ld_alpha={ld_alpha!r}; expected a number in [0, 1]")


def _sequence_group(group: Any) -> str | None:
    return None if group is None else distributed.group_name(group, "sequence_group")


def _sums(values: Tensor, cu_seqlens: Tensor | None, group: str | None) -> Tensor:
    """Sum each sequence. Packed ones go segment by segment: no atomics, so that the bits do not vary."""
    if cu_seqlens is None:
        sums = values.sum(-1)
    else:
        sums = torch.segment_reduce(values, "sum", offsets=cu_seqlens.long(), initial=0, unsafe=True)
    return sums if group is None else distributed.sum_over_ranks(sums, group)


def _own_lengths(mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Labelled tokens of each sequence that are here."""
    if cu_seqlens is None:
        return mask.sum(-1)
    before = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
    return before[cu_seqlens[1:]] - before[cu_seqlens[:-1]]


def _lengths(mask: Tensor, cu_seqlens: Tensor | None, group: str | None) -> Tensor:
    lengths = _own_lengths(mask, cu_seqlens)
    return lengths if group is None else distributed.sum_over_ranks(lengths, group)


def _tail(mask: Tensor, lengths: Tensor, cu_seqlens: Tensor | None, group: str | None) -> Tensor:
    """Where a token lies past the end of the shorter completion of its pair."""
    shared = torch.minimum(*lengths.chunk(2)).repeat(2)
    if group is not None:  # less what the pair has on earlier ranks
        shared = shared - distributed.sum_over_earlier_ranks(_own_lengths(mask, cu_seqlens), group)
    if cu_seqlens is None:
        return mask.cumsum(-1) > shared.unsqueeze(-1)
    index = torch.arange(mask.shape[0], device=mask.device)
    sequence = torch.searchsorted(cu_seqlens.long(), index, right=True) - 1
    before = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
    return before[1:] - before[cu_seqlens[sequence]] > shared[sequence]


# The losses


class DPOLossOutput(NamedTuple):
    """What `linear_dpo_loss` and `dpo_loss` return. ``loss`` and the policy's logps are differentiable.

    Attributes:
        loss: a scalar, or ``[B]`` for reduction="none".
        chosen_logps, rejected_logps: sums over each completion ``[B]``, weighted by token_weights and ld_alpha.
        chosen_rewards, rejected_rewards: implicit rewards ``[B]``: beta times the log-ratios, or without a
            reference beta times what the loss compares.
        chosen_lengths, rejected_lengths: labelled tokens ``[B]``.
        ref_chosen_logps, ref_rejected_logps: of the reference ``[B]``, weighted alike; None without one.
        entropy, mean_token_accuracy, chosen_logits, rejected_logits: scalars, None unless ``metrics=True``:
            means over all labelled tokens, over the chosen ones, and of the mean logit over each side's.
        aux_loss: of a mixture's routers, from `dpofast.integrations.models.model_dpo_loss`; its share is in ``loss``.
    """

    loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    ref_chosen_logps: Tensor | None = None
    ref_rejected_logps: Tensor | None = None
    entropy: Tensor | None = None
    mean_token_accuracy: Tensor | None = None
    chosen_logits: Tensor | None = None
    rejected_logits: Tensor | None = None
    aux_loss: Tensor | None = None

    def metrics(self) -> dict[str, Tensor]:
        """The numbers that trainers log, under TRL's names: scalar tensors of this rank, without gradient."""
        accuracies = (self.chosen_rewards > self.rejected_rewards).to(self.chosen_rewards.dtype)
        values = {
            "rewards/chosen": _mean(self.chosen_rewards),
            "rewards/rejected": _mean(self.rejected_rewards),
            "rewards/accuracies": _mean(accuracies),
            "rewards/margins": _mean(self.chosen_rewards - self.rejected_rewards),
            "logps/chosen": _mean(self.chosen_logps),
            "logps/rejected": _mean(self.rejected_logps),
            "logits/chosen": self.chosen_logits,
            "logits/rejected": self.rejected_logits,
            "entropy": self.entropy,
            "mean_token_accuracy": self.mean_token_accuracy,
            "aux_loss": self.aux_loss,
        }
        return {name: value.detach() for name, value in values.items() if value is not None}


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(values.shape[0], 1)


@dataclass(frozen=True)
class Objective:
    """The options of a loss, checked as far as they can be before there is any data."""

    terms: Sequence[losses.Term]
    options: Mapping[str, Any]
    pair_weight: Tensor | None
    token_weights: Tensor | None
    use_weighting: bool
    ld_alpha: float | None
    metrics: bool

    @property
    def outputs(self) -> tuple[str, ...]:
        """The statistics that the primitive has to compute: none that nobody asked for."""
        return (("log_sum_sq_probs",) if self.use_weighting else ()) + (_STATISTICS if self.metrics else ())


_SIDES = ("chosen_logps", "rejected_logps")
_REFERENCE_SIDES = ("ref_chosen_logps", "ref_rejected_logps")
_STATISTICS = ("entropy", "mean_logits", "is_top1")


def make_objective(
    *,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    pair_weight: Tensor | None = None,
    token_weights: Tensor | None = None,
    use_weighting: bool = False,
    ld_alpha: float | None = None,
    metrics: bool = False,
    reduction: str = "mean",
    **options: Any,
) -> Objective:
    """Check the options of `linear_dpo_loss`, `dpo_loss` and their modules: all that is not data."""
    if "weight" in options:
        raise TypeError("weight is the head's; the weight of each pair is pair_weight")
    losses.check_reduction(reduction)
    _check_ld_alpha(ld_alpha)
    if token_weights is not None:
        losses.check_dense("token_weights", token_weights)
    for name, value in {"use_weighting": use_weighting, "metrics": metrics}.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}={value!r} is a {type(value).__name__}; expected True or False")
    terms = losses.resolve(loss_type, loss_weights, **options)
    for term in terms:
        if "weight" not in term.loss.options and (use_weighting or pair_weight is not None):
            name = "use_weighting" if use_weighting else "pair_weight"
            raise ValueError(f"{name} is not defined for loss_type={term.loss.name!r}, which sorts its pairs")
        if pair_weight is not None:
            losses.check_value("pair_weight", pair_weight, term.loss, losses.OPTIONS["weight"])
    options = {"loss_type": loss_type, "loss_weights": loss_weights, "reduction": reduction, **options}
    return Objective(terms, options, pair_weight, token_weights, use_weighting, ld_alpha, metrics)


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    sequence_group: Any = None,
    **options: Any,
) -> DPOLossOutput:
    """A preference loss from hidden states and the language-model head; the logits are never built.

    Equivalent, for the default loss, to::

        logps = linear_logprob(hidden, weight, labels, bias=bias).logps.sum(-1)
        with torch.no_grad():
            ref_logps = linear_logprob(ref_hidden, ref_weight, labels, bias=ref_bias).logps.sum(-1)
        chosen, rejected = (logps - ref_logps).chunk(2)
        loss = -F.logsigmoid(beta * (chosen - rejected)).mean()

    Args:
        hidden: ``[2B, T, H]``, all chosen completions and then all rejected ones; or packed ``[N, H]``.
        weight, bias: the head ``[V, H]`` and ``[V]``.
        labels: ``[2B, T]`` or ``[N]``, aligned with hidden: label t is the token that hidden t predicts.
        ref_logps: of the reference, per token ``[2B, T]`` or ``[N]``, or already summed ``[2B]`` (weighted by
            token_weights and ld_alpha, if these are set). Or instead
        ref_hidden, ref_weight, ref_bias: the reference's hidden states and head, scored without gradient.
        cu_seqlens: boundaries of packed sequences ``[2B + 1]``, as in `sequence_logps`.
        ignore_index: the label of prompt and padding; those positions are not computed.
        sequence_group: the ranks that hold the sequences together, each some tokens of all 2B, as ``group`` in
            `sequence_logps`. Every rank then has the same loss; the gradients of the head and of all below it are
            each rank's share, to be added up.
        options: loss_type, loss_weights, beta, label_smoothing, reduction and the losses' other options, as
            in `preference_loss`, but that a pair's weight ``[B]`` is called pair_weight; token_weights, of labels'
            shape, and ld_alpha, as in `sequence_logps`, for the sums of policy and reference alike (lengths, the
            supervised terms, WPO's weights and metrics have every token whole); use_weighting=True for `wpo_weights`;
            metrics=True for the statistics that `DPOLossOutput.metrics` then has; and temperature, logit_scale,
            softcap, backend, group (of a head in slices) and whatever else `linear_logprob` takes.

    Returns:
        `DPOLossOutput`.

    Raises:
        ValueError, TypeError: as `preference_loss` and `linear_logprob` do; an odd batch; two references,
            none where the loss needs one, or one where no loss uses it. Before anything is computed.

    >>> _ = torch.manual_seed(0)
    >>> hidden, weight = torch.randn(2, 3, 4), torch.randn(7, 4)
    >>> labels = torch.tensor([[-100, 3, 5], [-100, 1, 2]])
    >>> linear_dpo_loss(hidden, weight, labels, ref_hidden=hidden, ref_weight=weight).loss  # log 2
    tensor(0.6931)
    """
    with distributed.refusing_together(_sequence_group(sequence_group)):
        if ref_hidden is None and (ref_weight is not None or ref_bias is not None):
            raise ValueError("ref_weight and ref_bias belong to ref_hidden, which is None")
        if ref_hidden is not None and ref_weight is None:
            raise ValueError(
                "ref_weight is None; pass the reference's head beside ref_hidden (weight, if they share it)"
            )
        _check_rows({"hidden": hidden, "ref_hidden": ref_hidden}, labels)
        _check_tokens(labels, cu_seqlens, ignore_index)
        head, rest = _split(options, linear_logprob)
        objective = make_objective(**rest)
        # that of a vocabulary in slices is left to linear_logprob, which refuses on all of its ranks together
        if ref_hidden is not None and head.get("group") is None and not distributed.is_dtensor(ref_weight):
            check_inputs(ref_hidden, ref_weight, labels, ref_bias, prefix="ref_")

    def score(outputs: tuple[str, ...]) -> LogprobOutput:
        return linear_logprob(hidden, weight, labels, bias=bias, ignore_index=ignore_index, outputs=outputs, **head)

    def score_reference() -> Tensor:
        return linear_logprob(ref_hidden, ref_weight, labels, bias=ref_bias, ignore_index=ignore_index, **head).logps

    reference = score_reference if ref_hidden is not None else None
    return _preference(score, reference, ref_logps, labels, cu_seqlens, ignore_index, sequence_group, objective)


def dpo_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    ref_logps: Tensor | None = None,
    ref_logits: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    sequence_group: Any = None,
    **options: Any,
) -> DPOLossOutput:
    """A preference loss from logits already at hand.

    Equivalent, for the default loss, to::

        logps = logprob(logits, labels).logps.sum(-1)
        with torch.no_grad():
            ref_logps = logprob(ref_logits, labels).logps.sum(-1)
        chosen, rejected = (logps - ref_logps).chunk(2)
        loss = -F.logsigmoid(beta * (chosen - rejected)).mean()

    Args:
        logits: ``[2B, T, V]``, all chosen completions and then all rejected ones; or packed ``[N, V]``.
        ref_logits: the reference's logits, read without gradient; or ref_logps.
        labels, ref_logps, cu_seqlens, ignore_index, sequence_group, options: as in `linear_dpo_loss`, with the options
            of `logprob` for those of `linear_logprob`.

    Returns:
        `DPOLossOutput`.

    Raises:
        ValueError, TypeError: as `linear_dpo_loss` does.

    >>> logits, labels = torch.zeros(2, 3, 8), torch.tensor([[-100, 3, 5], [-100, 1, 2]])
    >>> dpo_loss(logits, labels, loss_type="simpo", beta=2.0, simpo_gamma=0.0).loss  # log 2
    tensor(0.6931)
    """
    with distributed.refusing_together(_sequence_group(sequence_group)):
        _check_rows({"logits": logits, "ref_logits": ref_logits}, labels)
        _check_tokens(labels, cu_seqlens, ignore_index)
        head, rest = _split(options, logprob)
        objective = make_objective(**rest)
        if ref_logits is not None:
            check_logits(ref_logits, labels, "ref_logits")

    def score(outputs: tuple[str, ...]) -> LogprobOutput:
        return logprob(logits, labels, ignore_index=ignore_index, outputs=outputs, **head)

    def score_reference() -> Tensor:
        return logprob(ref_logits, labels, ignore_index=ignore_index, **head).logps

    reference = score_reference if ref_logits is not None else None
    return _preference(score, reference, ref_logps, labels, cu_seqlens, ignore_index, sequence_group, objective)


def head_options(primitive: Callable[..., Any]) -> frozenset[str]:
    """The keywords of a primitive that a loss hands through to it; the others it sets itself."""
    return _HEAD_OPTIONS[primitive]


# read once: torch.compile does not trace inspect
_HEAD_OPTIONS = {
    primitive: frozenset(
        parameter.name
        for parameter in inspect.signature(primitive).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in ("bias", "ignore_index", "outputs")
    )
    for primitive in (linear_logprob, logprob)
}


def _split(options: Mapping[str, Any], primitive: Callable[..., Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of the primitive, and those of the loss."""
    names = head_options(primitive)
    head = {name: value for name, value in options.items() if name in names}
    return head, {name: value for name, value in options.items() if name not in names}


def check_head(primitive: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Let the primitive check its options on no rows. Not backend and group: the device is not known yet."""
    options = {name: value for name, value in options.items() if name not in ("backend", "group")}
    tensors = (torch.zeros(0, 1),) if primitive is logprob else (torch.zeros(0, 1), torch.zeros(1, 1))
    with torch.no_grad():
        primitive(*tensors, torch.zeros(0, dtype=torch.long), **options)


def check_options(primitive: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """What the module of a loss checks before it has data."""
    own = ("ignore_index", "sequence_group")
    head, rest = _split({name: value for name, value in options.items() if name not in own}, primitive)
    make_objective(**rest)
    check_head(primitive, head)


def _check_rows(tensors: Mapping[str, Tensor | None], labels: Tensor) -> None:
    losses.check_dense("labels", labels)
    for name, value in tensors.items():
        if value is None:
            continue
        losses.check_dense(name, value)
        if value.shape[:-1] != labels.shape:
            raise ValueError(
                f"{name} has shape {list(value.shape)}; expected that of labels, "
                f"{list(labels.shape)}, and one dimension more"
            )


def _preference(
    score: Callable[[tuple[str, ...]], LogprobOutput],
    score_reference: Callable[[], Tensor] | None,
    ref_logps: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    sequence_group: Any,
    objective: Objective,
) -> DPOLossOutput:
    """Check everything that is left to check, score the policy and the reference, and apply the losses."""
    group = _sequence_group(sequence_group)
    with distributed.refusing_together(group):
        sequences = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if sequences % 2:
            raise ValueError(
                f"labels hold {sequences} sequences; a paired loss expects [chosen; rejected], an even number"
            )
        if ref_logps is not None:
            if score_reference is not None:
                raise ValueError("ref_logps and a reference to score are both given; pass one of them")
            losses.check_dense("ref_logps", ref_logps, labels=labels)
            if ref_logps.shape not in (labels.shape, (sequences,)) or not ref_logps.is_floating_point():
                raise ValueError(
                    f"ref_logps is {list(ref_logps.shape)} of {ref_logps.dtype}; expected floating point, per "
                    f"token {list(labels.shape)} or per sequence [{sequences}]"
                )
        has_reference = ref_logps is not None or score_reference is not None
        losses.check_reference(objective.terms, has_reference, "ref_logps, ref_hidden with ref_weight, or ref_logits")
        losses.check_per_pair(objective.terms, sequences // 2, labels=labels)
        if objective.pair_weight is not None:
            losses.check_dense("pair_weight", objective.pair_weight, labels=labels)
            if objective.pair_weight.shape != (sequences // 2,):
                raise ValueError(
                    f"pair_weight has shape {list(objective.pair_weight.shape)}; expected [{sequences // 2}]"
                )
        if objective.token_weights is not None:
            _check_like_labels("token_weights", objective.token_weights, labels)
        policy = score(objective.outputs)
    if group is not None:
        reference_shape = None if ref_logps is None else ref_logps.ndim
        options = objective.outputs, objective.ld_alpha, objective.options["loss_type"], has_reference, reference_shape
        distributed.agree_on_sequences(group, sequences, str(options))
    weights = {"token_weights": objective.token_weights, "ld_alpha": objective.ld_alpha}

    def total(logps: Tensor, **weights: Any) -> Tensor:
        return sequence_logps(
            logps, labels, cu_seqlens=cu_seqlens, ignore_index=ignore_index, group=sequence_group, **weights
        )

    logps = total(policy.logps, **weights)
    lengths = _lengths(labels != ignore_index, cu_seqlens, group)
    given = dict(zip(_SIDES, logps.chunk(2), strict=True))
    given |= dict(zip(("chosen_lengths", "rejected_lengths"), lengths.chunk(2), strict=True))
    if has_reference:
        with torch.no_grad():
            reference = score_reference() if ref_logps is None else ref_logps.detach()
        if reference.shape == labels.shape:  # with a graph: token_weights may be learned, and weigh these too
            reference = total(reference, **weights)
        given |= dict(zip(_REFERENCE_SIDES, reference.chunk(2), strict=True))
    if "chosen_nll" in losses.needed(objective.terms):
        plain = total(policy.logps) if any(x is not None for x in weights.values()) else logps
        given["chosen_nll"] = -plain.chunk(2)[0]

    weight = objective.pair_weight
    if objective.use_weighting:
        chosen, rejected = wpo_weights(
            policy.logps, policy.log_sum_sq_probs, labels, cu_seqlens=cu_seqlens, ignore_index=ignore_index,
            group=sequence_group,
        ).chunk(2)  # fmt: skip
        weight = chosen * rejected if weight is None else weight * chosen * rejected
    loss = losses.preference_loss(**given, weight=weight, **objective.options)
    rewards = losses.implicit_rewards(objective.terms, given)
    given.pop("chosen_nll", None)
    statistics = _statistics(policy, lengths, cu_seqlens, group) if objective.metrics else {}
    return DPOLossOutput(loss=loss, chosen_rewards=rewards[0], rejected_rewards=rewards[1], **given, **statistics)


def _statistics(
    policy: LogprobOutput, lengths: Tensor, cu_seqlens: Tensor | None, group: str | None
) -> dict[str, Tensor]:
    """Token means of the primitive's statistics, which are 0 where a token does not count."""
    dtype = policy.logps.dtype
    sums = {name: _sums(getattr(policy, name).detach().to(dtype), cu_seqlens, group).chunk(2) for name in _STATISTICS}
    chosen, rejected = (half.sum().clamp(min=1) for half in lengths.chunk(2))
    return {
        "entropy": sum(half.sum() for half in sums["entropy"]) / lengths.sum().clamp(min=1),
        "mean_token_accuracy": sums["is_top1"][0].sum() / chosen,
        "chosen_logits": sums["mean_logits"][0].sum() / chosen,
        "rejected_logits": sums["mean_logits"][1].sum() / rejected,
    }
