"""From hidden states to a loss of lists, or of single completions: the primitive, sums per sequence, and the tables.

What `dpofast.functional` is for pairs. No two halves of a batch belong together here: it is S sequences, and what is
said of each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dpofast import checks, distributed, lists, losses
from dpofast.functional import OF_HEAD, STATISTICS, Operands, check_ref_logps, reference_logps, split
from dpofast.lists import Lists
from dpofast.losses import RunningMean
from dpofast.options import LinearListOptions, LinearUnpairedOptions
from dpofast.primitive import HeadScorer, score_options
from dpofast.reference import LogprobOutput
from dpofast.sequences import Sequences

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SequenceLossOutput", "linear_list_loss", "linear_unpaired_loss"]


class SequenceLossOutput(NamedTuple):
    """What `linear_list_loss` and `linear_unpaired_loss` return. ``loss`` and ``logps`` are differentiable.

    Attributes:
        loss: a scalar, or ``[L]`` of lists and ``[S]`` of completions for reduction="none".
        logps: sums over each sequence ``[S]``, weighted by token_weights.
        rewards: implicit rewards ``[S]``: beta times the log-ratios.
        lengths: labelled tokens ``[S]``.
        ref_logps: of the reference ``[S]``, weighted alike.
        is_chosen: bool ``[S]``, as given, or the best answer of each list, the first if several are.
        accuracy: of lists, the share of those of two or more whose best answer has the largest reward.
        entropy, mean_token_accuracy, chosen_logits, rejected_logits: as in `DPOLossOutput`, None unless
            ``metrics=True``; rejected are all sequences that are not chosen.
        aux_loss: of a mixture's routers, from `dpofast.integrations.models.model_list_loss`; its share is in ``loss``.
    """

    loss: Tensor
    logps: Tensor
    rewards: Tensor
    lengths: Tensor
    ref_logps: Tensor
    is_chosen: Tensor
    accuracy: Tensor | None = None
    entropy: Tensor | None = None
    mean_token_accuracy: Tensor | None = None
    chosen_logits: Tensor | None = None
    rejected_logits: Tensor | None = None
    aux_loss: Tensor | None = None

    def metrics(self) -> dict[str, Tensor]:
        """The numbers that trainers log, under TRL's names: scalar tensors of this rank, without gradient."""
        chosen, rejected = _mean_of(self.rewards, self.is_chosen), _mean_of(self.rewards, ~self.is_chosen)
        values = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": self.accuracy,
            "rewards/margins": chosen - rejected,
            "logps/chosen": _mean_of(self.logps, self.is_chosen),
            "logps/rejected": _mean_of(self.logps, ~self.is_chosen),
            "logits/chosen": self.chosen_logits,
            "logits/rejected": self.rejected_logits,
            "entropy": self.entropy,
            "mean_token_accuracy": self.mean_token_accuracy,
            "aux_loss": self.aux_loss,
        }
        return {name: value.detach() for name, value in values.items() if value is not None}


def _mean_of(values: Tensor, where: Tensor) -> Tensor:
    """0 if there are none."""
    return torch.where(where, values, 0.0).sum() / where.sum().clamp(min=1)


@dataclass(frozen=True)
class _Objective:
    """The options of a loss, checked as far as they can be before there is any data."""

    terms: Sequence[losses.Term]
    reduction: str
    token_weights: Tensor | None
    metrics: bool

    @property
    def outputs(self) -> tuple[str, ...]:
        return STATISTICS if self.metrics else ()


def _objective(
    resolve: Callable[..., Sequence[losses.Term]],
    *,
    reduction: str = "mean",
    own_weight: tuple[str, Tensor | None],
    token_weights: Tensor | None = None,
    metrics: bool = False,
    **options: Any,
) -> _Objective:
    """``own_weight``: what the caller calls the losses' weight, since the head's has its name, and its value."""
    name, value = own_weight
    if "weight" in options:
        raise TypeError(f"weight: the head's own name; the weight of each is {name}")
    losses.check_reduction(reduction)
    checks.flag("metrics", metrics)
    if token_weights is not None:
        checks.dense("token_weights", token_weights)
    terms = resolve(**options)
    if value is not None:
        losses.check_value(name, value, terms[0].loss, losses.OPTIONS["weight"])
    return _Objective(losses.weighted(terms, value), reduction, token_weights, metrics)


def list_objective(*, loss_type: Any = "softmax_dpo", list_weight: Tensor | None = None, **options: Any) -> _Objective:
    """Check the options of `linear_list_loss` that are not data."""

    def resolve(loss_weights: Any = None, **others: Any) -> Sequence[losses.Term]:
        return losses.resolve(loss_type, loss_weights, table=lists.LIST_LOSSES, **others)

    return _objective(resolve, own_weight=("list_weight", list_weight), **options)


def unpaired_objective(
    *,
    loss_type: Any = "kto",
    state: Mapping[str, Any] | None = None,
    sequence_weight: Tensor | None = None,
    **options: Any,
) -> _Objective:
    """Check the options of `linear_unpaired_loss` that are not data; ``state``: as in `losses.resolve_unpaired`."""

    def resolve(**others: Any) -> Sequence[losses.Term]:
        return [losses.resolve_unpaired(loss_type, state, **others)]

    return _objective(resolve, own_weight=("sequence_weight", sequence_weight), **options)


def check_options(objective: Callable[..., _Objective], options: Mapping[str, Any]) -> None:
    """What a module checks before it has data; ranks are judged when it has."""
    given = {name: x for name, x in options.items() if name not in ("group", "sequence_group")}
    of_score, of_loss = split(given, OF_HEAD | {"memory_budget", "backend", "ignore_index"})
    objective(**of_loss)
    score_options(**of_score)


def linear_list_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    sizes: int | Sequence[int] | Tensor,
    interleaved: bool = False,
    scores: Tensor | None = None,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    loss_type: str | Sequence[str] = "softmax_dpo",
    beta: float | Tensor | Mapping[str, Any] = 0.1,
    reduction: str = "mean",
    memory_budget: int | str | None = None,
    backend: str = "auto",
    group: Any = None,
    sequence_group: Any = None,
    **options: Unpack[LinearListOptions],
) -> SequenceLossOutput:
    """A preference loss of lists of answers, from hidden states and the language-model head, without logits.

    Equivalent to::

        logps = linear_logprob(hidden, weight, labels, bias=bias).logps.sum(-1)
        with torch.no_grad():
            ref_logps = linear_logprob(ref_hidden, ref_weight, labels, bias=ref_bias).logps.sum(-1)
        loss = list_preference_loss(logps, sizes, ref_logps=ref_logps, scores=scores)

    Args:
        hidden: ``[S, T, H]``, S answers; or packed ``[N, H]``.
        weight, bias, labels, ref_logps, ref_hidden, ref_weight, ref_bias, cu_seqlens, ignore_index: as in
            `linear_dpo_loss`, for S sequences.
        sizes: how many answers each list has ``[L]``, S in all, or one int for all, as in `list_preference_loss`.
        interleaved: whether the first answers of all lists come first, and so on, as in `list_preference_loss` and as
            `share_prompt` has them; with sizes=2 it is the ``[chosen; rejected]`` of `linear_dpo_loss`.
        scores: how good each answer is ``[S]``, as in `list_preference_loss`.
        loss_type, beta, reduction: as in `list_preference_loss`.
        memory_budget, backend, group, sequence_group: as in `linear_dpo_loss`.
        options: loss_weights and margin, as in `list_preference_loss`; list_weight, a factor for each list ``[L]``;
            token_weights, of labels' shape, for the sums of policy and reference alike; metrics=True for the
            statistics that `SequenceLossOutput.metrics` then has; and temperature, logit_scale, softcap and
            grad_filter, as in `linear_logprob`.

    Returns:
        `SequenceLossOutput`.

    Raises:
        ValueError, TypeError: as `list_preference_loss` and `linear_logprob` do; no reference, or two. Before
            anything is computed.

    >>> _ = torch.manual_seed(0)
    >>> hidden, weight, labels = torch.randn(3, 2, 4), torch.randn(7, 4), torch.tensor([[3, 5], [1, 2], [0, 6]])
    >>> linear_list_loss(hidden, weight, labels, sizes=[3], ref_hidden=hidden, ref_weight=weight).loss  # log 3
    tensor(1.0986)
    """
    operands = Operands(hidden, weight, labels, bias, ref_hidden, ref_weight, ref_bias, cu_seqlens)
    of_head, of_loss = split(options, OF_HEAD)
    how = {"ignore_index": ignore_index, "memory_budget": memory_budget, "backend": backend, **of_head}
    what = {"loss_type": loss_type, "beta": beta, "reduction": reduction, **of_loss}
    run = _Run(*operands.scorers(group, sequence_group, how, list_objective, what), ref_logps)
    with distributed.refusing_together(run.sequences.group):
        checks.flag("interleaved", interleaved)
        made_of = Lists(checks.sizes(sizes, len(run.sequences), "labels"), interleaved)
        lists.check_scores(run.objective.terms, scores, {"labels": run.one_each()})
        run.check("list_weight", len(made_of))
    logps, ref, scored = run.sums((made_of.sizes, interleaved))
    ratios = logps - ref
    loss = lists.evaluate(run.objective.terms, ratios, scores, made_of, run.objective.reduction)
    rewards = lists.implicit_rewards(run.objective.terms, ratios, made_of)
    is_chosen = lists.chosen(made_of, scores, rewards.device)
    out = SequenceLossOutput(loss, logps, rewards, run.sequences.lengths(), ref, is_chosen)
    return out._replace(accuracy=lists.accuracy(rewards, is_chosen, made_of), **run.statistics(scored, is_chosen))


def linear_unpaired_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    is_chosen: Tensor,
    kl: float | Tensor | None = None,
    reward_shift: float | Tensor | RunningMean | None = None,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    loss_type: str = "kto",
    beta: float | Tensor = 0.1,
    reduction: str = "mean",
    memory_budget: int | str | None = None,
    backend: str = "auto",
    group: Any = None,
    sequence_group: Any = None,
    **options: Unpack[LinearUnpairedOptions],
) -> SequenceLossOutput:
    """A loss of completions that are marked good or bad, from hidden states and the head, without logits.

    Equivalent to::

        logps = linear_logprob(hidden, weight, labels, bias=bias).logps.sum(-1)
        with torch.no_grad():
            ref_logps = linear_logprob(ref_hidden, ref_weight, labels, bias=ref_bias).logps.sum(-1)
        loss = unpaired_preference_loss(logps, ref_logps, is_chosen, kl=kl)

    Args:
        hidden: ``[S, T, H]``, S completions; or packed ``[N, H]``.
        weight, bias, labels, ref_logps, ref_hidden, ref_weight, ref_bias, cu_seqlens, ignore_index: as in
            `linear_dpo_loss`, for S sequences.
        is_chosen: bool ``[S]``, True for a good completion.
        kl, reward_shift, loss_type, beta, reduction: as in `unpaired_preference_loss`. The log-ratios of mismatched
            completions, for KTO's kl, are two calls of `linear_logprob` without gradient, less one another.
        memory_budget, backend, group, sequence_group: as in `linear_dpo_loss`.
        options: desirable_weight and undesirable_weight, as in `unpaired_preference_loss`; sequence_weight, a factor
            for each completion ``[S]``; and token_weights, metrics and the options of `linear_logprob`, as in
            `linear_list_loss`.

    Returns:
        `SequenceLossOutput`.

    Raises:
        ValueError, TypeError: as `unpaired_preference_loss` and `linear_logprob` do; no reference, or two. Before
            anything is computed.

    >>> _ = torch.manual_seed(0)
    >>> hidden, weight, labels = torch.randn(2, 2, 4), torch.randn(7, 4), torch.tensor([[3, 5], [1, 2]])
    >>> good = torch.tensor([True, False])
    >>> linear_unpaired_loss(
    ...     hidden, weight, labels, is_chosen=good, kl=0.0, ref_hidden=hidden, ref_weight=weight
    ... ).loss
    tensor(0.5000)
    """
    operands = Operands(hidden, weight, labels, bias, ref_hidden, ref_weight, ref_bias, cu_seqlens)
    of_head, of_loss = split(options, OF_HEAD)
    state = {"kl": kl, "reward_shift": reward_shift}
    how = {"ignore_index": ignore_index, "memory_budget": memory_budget, "backend": backend, **of_head}
    what = {"loss_type": loss_type, "beta": beta, "reduction": reduction, "state": state, **of_loss}
    run = _Run(*operands.scorers(group, sequence_group, how, unpaired_objective, what), ref_logps)
    with distributed.refusing_together(run.sequences.group):
        checks.dense("is_chosen", is_chosen, labels=run.sequences.labels)
        n = len(run.sequences)
        checks.shape("is_chosen", is_chosen, (n,), what=f"({n},), one for each sequence")
        losses.check_unpaired(is_chosen, reward_shift)
        run.check("sequence_weight", n)
    logps, ref, scored = run.sums()
    (term,), beta = run.objective.terms, run.objective.terms[0].options["beta"]
    tensors = {"logps": logps, "ref_logps": ref, "is_chosen": is_chosen}
    loss = losses.evaluate_unpaired(term, tensors, state, run.objective.reduction)
    out = SequenceLossOutput(loss, logps, (beta * (logps - ref)).detach(), run.sequences.lengths(), ref, is_chosen)
    return out._replace(**run.statistics(scored, is_chosen))


class _Run(NamedTuple):
    """One call: who scores, and what is made of the scores."""

    policy: HeadScorer
    reference: HeadScorer | None
    sequences: Sequences
    objective: _Objective
    ref_logps: Tensor | None

    def one_each(self) -> Tensor:
        """Something for each sequence, where the labels are."""
        return self.sequences.labels.new_empty(len(self.sequences))

    def check(self, name: str, n: int) -> None:
        """What can only be checked with data: a number for each of n lists or completions, or for each token.

        ``name``: what the losses' weight is called.
        """
        labels, objective = self.sequences.labels, self.objective
        if objective.token_weights is not None:
            checks.like_labels("token_weights", objective.token_weights, labels)
        for term in objective.terms:
            options = {name if option == "weight" else option: x for option, x in term.options.items()}
            losses.check_per_pair([losses.Term(term.loss, term.factor, options)], n, labels=labels)
        check_ref_logps(self.ref_logps, self.sequences)
        if self.ref_logps is None and self.reference is None:
            raise ValueError("ref_logps: is None, and a reference is needed; pass it, or ref_hidden with ref_weight")
        if self.ref_logps is not None and self.reference is not None:
            raise ValueError("ref_logps: given beside a reference to score; pass one of them")

    def sums(self, of: object = None) -> tuple[Tensor, Tensor, LogprobOutput]:
        """Log-probabilities of the sequences under policy and reference, and what the policy's scores have beside.

        ``of``: what the ranks that hold the sequences together have to agree on, beside the options.
        """
        sequences, objective = self.sequences, self.objective
        with distributed.refusing_together(sequences.group):
            ref: Any = reference_logps(self.reference, self.ref_logps)
            scored = self.policy.score(objective.outputs)
        if sequences.group is not None:
            weights = objective.token_weights
            same = (
                objective.outputs, [term.loss.name for term in objective.terms], ref.ndim,
                None if weights is None else weights.dtype, of,
            )  # fmt: skip
            distributed.agree_on_sequences(sequences.group, len(sequences), str(same))
        if ref.shape == sequences.labels.shape:
            ref = sequences.logps(ref, token_weights=objective.token_weights)
        return sequences.logps(scored.logps, token_weights=objective.token_weights), ref, scored

    def statistics(self, scored: LogprobOutput, is_chosen: Tensor) -> dict[str, Tensor]:
        """Token means of the primitive's statistics, which are 0 where a token does not count."""
        if not self.objective.metrics:
            return {}
        dtype, lengths = scored.logps.dtype, self.sequences.lengths()
        sums = {name: self.sequences.sum(getattr(scored, name).detach().to(dtype)) for name in STATISTICS}

        def mean(name: str, where: Tensor) -> Tensor:
            return torch.where(where, sums[name], 0.0).sum() / torch.where(where, lengths, 0).sum().clamp(min=1)

        return {
            "entropy": mean("entropy", torch.ones_like(is_chosen)),
            "mean_token_accuracy": mean("is_top1", is_chosen),
            "chosen_logits": mean("mean_logits", is_chosen),
            "rejected_logits": mean("mean_logits", ~is_chosen),
        }
