"""From hidden states or logits to a preference loss: the primitive, sums per sequence, the table of losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dpofast import _ops, checks, distributed, losses
from dpofast.backends import registry
from dpofast.backends.base import PAIR_OPTIONS, PairsProblem
from dpofast.options import HeadOptions, LinearLossOptions, LogitsLossOptions, LossOptions
from dpofast.pairs import Evaluate, PairsCall
from dpofast.plan import cost
from dpofast.plan.pairs import pairs_schedule
from dpofast.primitive import HeadCall, HeadScorer, LogitsScorer, LogprobOutput, score_options
from dpofast.sequences import Sequences, sequence_group_name

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["DPOLossOutput", "dpo_loss", "linear_dpo_loss"]


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
    reduction: str
    pair_weight: Tensor | None
    token_weights: Tensor | None
    use_weighting: bool
    ld_alpha: float | None
    metrics: bool

    @property
    def outputs(self) -> tuple[str, ...]:
        """The statistics that the primitive has to compute: none that nobody asked for."""
        return (("log_sum_sq_probs",) if self.use_weighting else ()) + (STATISTICS if self.metrics else ())


_SIDES = ("chosen_logps", "rejected_logps")
_REFERENCE_SIDES = ("ref_chosen_logps", "ref_rejected_logps")
STATISTICS = ("entropy", "mean_logits", "is_top1")


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
        raise TypeError("weight: the head's own name; the weight of each pair is pair_weight")
    losses.check_reduction(reduction)
    checks.ld_alpha(ld_alpha)
    if token_weights is not None:
        checks.dense("token_weights", token_weights)
    checks.flag("use_weighting", use_weighting)
    checks.flag("metrics", metrics)
    terms = losses.resolve(loss_type, loss_weights, **options)
    for term in terms:
        if "weight" not in term.loss.options and (use_weighting or pair_weight is not None):
            name = "use_weighting" if use_weighting else "pair_weight"
            raise ValueError(f"{name}: not defined for loss_type={term.loss.name!r}, which sorts its pairs")
        if pair_weight is not None:
            losses.check_value("pair_weight", pair_weight, term.loss, losses.OPTIONS["weight"])
    return Objective(terms, reduction, pair_weight, token_weights, use_weighting, ld_alpha, metrics)


class Operands(NamedTuple):
    """The tensors that a ``linear_`` loss scores, as they came."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_bias: Tensor | None
    cu_seqlens: Tensor | None

    def scorers(
        self,
        group: Any,
        sequence_group: Any,
        how: Mapping[str, Any],
        objective: Callable[..., Any],
        what: Mapping[str, Any],
    ) -> tuple[HeadScorer, HeadScorer | None, Sequences, Any]:
        """The policy, the reference, their sequences and ``objective(**what)``, checked together with the other ranks.

        ``how``: the options of scoring.
        """
        ranks = sequence_group_name(sequence_group)
        with distributed.refusing_together(ranks):
            hidden, weight, labels, bias, name = distributed.plain_head(*self[:4], group)
        with distributed.refusing_together(ranks), distributed.refusing_together(name):
            if self.ref_hidden is None and (self.ref_weight is not None or self.ref_bias is not None):
                raise ValueError("ref_weight: goes with ref_hidden, which is None, and so does ref_bias")
            if self.ref_hidden is not None and self.ref_weight is None:
                raise ValueError(
                    "ref_weight: is None; pass the reference's head beside ref_hidden (weight, if they share it)"
                )
            sequences = Sequences(labels, self.cu_seqlens, how["ignore_index"], ranks)
            options = score_options(**how)
            made = objective(**what)
            policy, reference = HeadScorer(hidden, weight, bias, sequences.labels, name, options), None
            if self.ref_hidden is not None:
                h, w, _, b, ref_name = distributed.plain_head(
                    self.ref_hidden, self.ref_weight, labels, self.ref_bias, group
                )
                reference = HeadScorer(h, w, b, sequences.labels, ref_name, options, prefix="ref_")
        return policy, reference, sequences, made


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
    loss_type: str | Sequence[str] = "sigmoid",
    beta: float | Tensor | Mapping[str, Any] = 0.1,
    label_smoothing: float | Mapping[str, Any] = 0.0,
    reduction: str = "mean",
    memory_budget: int | str | None = None,
    backend: str = "auto",
    group: Any = None,
    sequence_group: Any = None,
    **options: Unpack[LinearLossOptions],
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
        loss_type, beta, label_smoothing, reduction: as in `preference_loss`.
        memory_budget, backend: as in `linear_logprob`. Where the exponentials of all tokens do not fit the budget, a
            loss that each pair decides alone may run by whole pairs (docs/design.md, "Schedules"): the gradients are
            then made in the forward, and a gradient that comes to the logps beside the loss's costs scoring again.
        group: the ranks that hold the head together, as in `linear_logprob`.
        sequence_group: the ranks that hold the sequences together, each some tokens of all 2B, as ``group`` in
            `sequence_logps`. Every rank then has the same loss; the gradients of the head and of all below it are
            each rank's share, to be added up.
        options: loss_weights and the losses' other options, as in `preference_loss`, but that a pair's weight ``[B]``
            is called pair_weight; token_weights, of labels' shape, and ld_alpha, as in `sequence_logps`, for the sums
            of policy and reference alike (lengths, the supervised terms, WPO's weights and metrics have every token
            whole); use_weighting=True for `wpo_weights`; metrics=True for the statistics that `DPOLossOutput.metrics`
            then has; and temperature, logit_scale and softcap, as in `linear_logprob`.

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
    operands = Operands(hidden, weight, labels, bias, ref_hidden, ref_weight, ref_bias, cu_seqlens)
    of_head, of_loss = split(options, OF_HEAD)
    how = {"ignore_index": ignore_index, "memory_budget": memory_budget, "backend": backend, **of_head}
    what = {"loss_type": loss_type, "beta": beta, "label_smoothing": label_smoothing, "reduction": reduction, **of_loss}
    policy, reference, sequences, objective = operands.scorers(group, sequence_group, how, make_objective, what)
    return _preference(policy, reference, ref_logps, sequences, objective)


def dpo_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    ref_logps: Tensor | None = None,
    ref_logits: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    loss_type: str | Sequence[str] = "sigmoid",
    beta: float | Tensor | Mapping[str, Any] = 0.1,
    label_smoothing: float | Mapping[str, Any] = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
    sequence_group: Any = None,
    **options: Unpack[LogitsLossOptions],
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
        labels, ref_logps, cu_seqlens, ignore_index, loss_type, beta, label_smoothing, reduction, backend,
            sequence_group, options: as in `linear_dpo_loss`, with the options of `logprob` for those of
            `linear_logprob`.

    Returns:
        `DPOLossOutput`.

    Raises:
        ValueError, TypeError: as `linear_dpo_loss` does.

    >>> logits, labels = torch.zeros(2, 3, 8), torch.tensor([[-100, 3, 5], [-100, 1, 2]])
    >>> dpo_loss(logits, labels, loss_type="simpo", beta=2.0, simpo_gamma=0.0).loss  # log 2
    tensor(0.6931)
    """
    ranks = sequence_group_name(sequence_group)
    with distributed.refusing_together(ranks):
        sequences = Sequences(labels, cu_seqlens, ignore_index, ranks)
        of_logits, of_loss = split(options, _OF_LOGITS)
        how = score_options(ignore_index=ignore_index, backend=backend, **of_logits)
        objective = make_objective(
            loss_type=loss_type, beta=beta, label_smoothing=label_smoothing, reduction=reduction, **of_loss
        )
        policy, reference = LogitsScorer(logits, sequences.labels, how), None
        if ref_logits is not None:
            reference = LogitsScorer(ref_logits, sequences.labels, how, name="ref_logits")
    return _preference(policy, reference, ref_logps, sequences, objective)


OF_HEAD = HeadOptions.__optional_keys__
_OF_LOGITS = LogitsLossOptions.__optional_keys__ - LossOptions.__optional_keys__
"""The options of the losses that go to the head, or to the logits."""
_ELSEWHERE = frozenset(("ignore_index", "memory_budget", "backend", "group", "sequence_group"))
"""The named arguments that say nothing of the loss."""


def split(options: Mapping[str, Any], names: frozenset[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options among ``names``, and the others."""
    chosen = {name: value for name, value in options.items() if name in names}
    return chosen, {name: value for name, value in options.items() if name not in names}


def objective_of(options: Mapping[str, Any]) -> Objective:
    """The objective among the keywords of `linear_dpo_loss` or `dpo_loss`, checked."""
    return make_objective(**split(options, OF_HEAD | _OF_LOGITS | _ELSEWHERE)[1])


def scoring_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of `linear_dpo_loss` by which it scores, which `linear_logprob` takes, too."""
    return split(options, OF_HEAD | {"memory_budget", "backend", "group"})[0]


def check_options(function: Callable[..., DPOLossOutput], options: Mapping[str, Any]) -> None:
    """What the module of `linear_dpo_loss` or `dpo_loss` checks before it has data; ranks are judged when it has."""
    names = OF_HEAD | {"memory_budget"} if function is linear_dpo_loss else _OF_LOGITS
    given = {name: x for name, x in options.items() if name not in ("group", "sequence_group")}
    of_score, of_loss = split(given, names | {"ignore_index", "backend"})
    make_objective(**of_loss)
    score_options(**of_score)


def _preference(
    policy: HeadScorer | LogitsScorer,
    reference: HeadScorer | LogitsScorer | None,
    ref_logps: Tensor | None,
    sequences: Sequences,
    objective: Objective,
) -> DPOLossOutput:
    """Check what is left to check, score the reference and the policy, and apply the losses."""
    group, has_reference = sequences.group, ref_logps is not None or reference is not None
    with distributed.refusing_together(group):
        if ref_logps is not None and reference is not None:
            raise ValueError("ref_logps: given beside a reference to score; pass one of them")
        _check_pairs(objective, sequences, ref_logps, has_reference)
        ref = reference_logps(reference, ref_logps)
        call = policy.ask(objective.outputs) if isinstance(policy, HeadScorer) else policy
        by_pairs = _by_pairs(call, sequences, objective)
        if by_pairs is None:
            scored = call.score(objective.outputs)
    if group is not None:
        _agree(group, sequences, objective, ref_logps, has_reference)
    if ref is not None and ref.shape == sequences.labels.shape:
        ref = _weighted(ref, sequences, objective)  # with a graph: token_weights may be learned, and weigh these too

    def evaluate(scored: LogprobOutput, reduction: str) -> Tensor:
        terms, given, beside = _loss_inputs(scored, ref, sequences, objective)
        return losses.evaluate(terms, given | beside, reduction)

    if by_pairs is not None:
        loss, scored = by_pairs(evaluate)
    elif _is_one_launch(scored.logps, ref, sequences, objective, policy.exact_backend):
        return _one_launch(scored, ref, sequences, objective, policy.exact_backend)
    else:
        loss = evaluate(scored, objective.reduction)
    _, given, beside = _loss_inputs(scored, ref, sequences, objective)
    return _result(loss, given, losses.implicit_rewards(objective.terms, given | beside), scored, sequences, objective)


def reference_logps(reference: HeadScorer | LogitsScorer | None, ref_logps: Tensor | None) -> Tensor | None:
    """Of the reference, as they came or scored now, without gradient."""
    if reference is None:
        return None if ref_logps is None else ref_logps.detach()
    with torch.no_grad():
        return reference.score(()).logps


def _by_pairs(
    call: HeadCall | LogitsScorer, sequences: Sequences, objective: Objective
) -> Callable[[Evaluate], tuple[Tensor, LogprobOutput]] | None:
    """The loss and the scores by whole pairs, if each decides alone, only the model is learned, and it is faster."""
    if not isinstance(call, HeadCall) or not call.request.to_weight or call.n_tokens < 1:
        return None
    if call.group is not None or sequences.group is not None or _ops.is_traced(*call[:4]):
        return None
    if call.grad_filter or objective.reduction == "none":
        return None
    if any(_TABLE.get(x.loss.name) is not x.loss or "weight" not in x.loss.options for x in objective.terms):
        return None
    options = [value for term in objective.terms for value in term.options.values()]
    beside = [x for x in (*options, objective.pair_weight, objective.token_weights) if isinstance(x, Tensor)]
    if any(x.requires_grad or distributed.is_dtensor(x) for x in beside):
        return None

    def longest() -> int:
        return int(sequences.lengths().view(2, -1).sum(0).max())

    device = cost.device_of(call.hidden.device)
    found = pairs_schedule(call.request, call.schedule, call.exact_backend, longest, device)
    if found is None:
        return None
    return PairsCall(call, found, sequences.lengths(), objective.outputs, objective.reduction).loss_and_scores


def _loss_inputs(
    scored: LogprobOutput, ref: Tensor | None, sequences: Sequences, objective: Objective
) -> tuple[Sequence[losses.Term], dict[str, Tensor], dict[str, Tensor]]:
    """The terms with the weights of pairs, the fields of the output, and what the terms take beside those."""
    logps = _weighted(scored.logps, sequences, objective)
    given, beside = _given(logps, ref, sequences), {}
    if "chosen_nll" in losses.needed(objective.terms):
        is_weighted = objective.token_weights is not None or objective.ld_alpha is not None
        beside["chosen_nll"] = -(sequences.logps(scored.logps) if is_weighted else logps).chunk(2)[0]
    weight = objective.pair_weight
    if objective.use_weighting:
        chosen, rejected = sequences.wpo_weights(scored.logps, scored.log_sum_sq_probs).chunk(2)
        weight = chosen * rejected if weight is None else weight * chosen * rejected
    return losses.weighted(objective.terms, weight), given, beside


def _weighted(logps: Tensor, sequences: Sequences, objective: Objective) -> Tensor:
    return sequences.logps(logps, token_weights=objective.token_weights, ld_alpha=objective.ld_alpha)


def _result(loss, given, rewards, scored: LogprobOutput, sequences: Sequences, objective: Objective) -> DPOLossOutput:
    statistics = _statistics(scored, sequences) if objective.metrics else {}
    return DPOLossOutput(loss=loss, chosen_rewards=rewards[0], rejected_rewards=rewards[1], **given, **statistics)


def _given(logps: Tensor, reference: Tensor | None, sequences: Sequences) -> dict[str, Tensor]:
    """The fields of the output that a loss starts from, of sums ``[2B]``."""
    given = dict(zip(_SIDES, logps.chunk(2), strict=True))
    given |= dict(zip(("chosen_lengths", "rejected_lengths"), sequences.lengths().chunk(2), strict=True))
    if reference is not None:
        given |= dict(zip(_REFERENCE_SIDES, reference.chunk(2), strict=True))
    return given


def _is_one_launch(
    logps: Tensor, reference: Tensor | None, sequences: Sequences, objective: Objective, exact_backend: str
) -> bool:
    """Whether the backend has this loss whole, and nothing is asked for that only the table does."""
    term = objective.terms[0]
    if _TABLE.get(term.loss.name) is not term.loss or len(objective.terms) > 1 or term.factor != 1:
        return False
    if term.options.get("cpo_alpha") or objective.use_weighting or objective.ld_alpha is not None:
        return False
    if sequences.group is not None or objective.token_weights is not None:
        return False
    per_pair = [term.options.get("beta"), term.options.get("margin"), objective.pair_weight]
    tensors = [x for x in (reference, *per_pair) if isinstance(x, Tensor)]
    if any(distributed.is_dtensor(x) for x in (logps, sequences.labels, *tensors)):
        return False
    for x in tensors:
        # the loss of a wider one is wider, and options may be learned
        wider = x.dim() > 0 and torch.promote_types(x.dtype, logps.dtype) != logps.dtype
        if wider or x.device != logps.device or (x.requires_grad and torch.is_grad_enabled()):
            return False
    return term.loss.name in registry.pair_losses(exact_backend)


_TABLE = dict(losses.LOSSES)
"""The table as it is here: a loss of the same name that was registered later is another."""


def _one_launch(
    scored: LogprobOutput, reference: Tensor | None, sequences: Sequences, objective: Objective, exact_backend: str
) -> DPOLossOutput:
    """What `_preference` returns, by the backend's `sequence_dpo`."""
    (term,) = objective.terms
    problem = pairs_problem(
        term, scored.logps, labels=sequences.labels, cu_seqlens=sequences.cu_seqlens,
        ref_logps=reference if term.loss.reference else None, weight=objective.pair_weight,
        ignore_index=sequences.ignore_index,
    )  # fmt: skip
    loss, logps, lengths = _ops.call_sequence_dpo(problem, objective.reduction, exact_backend)
    sequences.found_lengths(lengths)
    given, beta = _given(logps, reference, sequences), term.options["beta"]
    if reference is None or isinstance(beta, Tensor):
        rewards = losses.implicit_rewards(objective.terms, given)
    else:  # the same in half the launches
        rewards = (beta * (logps.detach() - reference)).chunk(2)
    return _result(loss, given, rewards, scored, sequences, objective)


def pairs_problem(
    term: losses.Term,
    logps: Tensor,
    *,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    ref_logps: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
) -> PairsProblem:
    """One loss of a batch, with the options of ``term`` and the weight of each pair."""
    given = term.options
    beta, margin = (x if isinstance(x, Tensor) else None for x in (given.get("beta"), given.get("margin")))
    numbers = [given.get(name, 0.0) for name in PAIR_OPTIONS]
    options = [0.0 if isinstance(x, Tensor) else float(x) for x in numbers]
    divergence = given.get("f_divergence_type", losses.F_DIVERGENCES[0])
    return PairsProblem(
        logps, labels, cu_seqlens, ref_logps, beta, margin, weight, ignore_index, term.loss.name, options,
        divergence,
    )  # fmt: skip


def _check_pairs(objective: Objective, sequences: Sequences, ref_logps: Tensor | None, has_reference: bool) -> None:
    """What can only be checked with an objective and data at hand."""
    labels, n = sequences.labels, len(sequences)
    if n % 2:
        raise checks.wrong("labels", f"{n} sequences", "[chosen; rejected], an even number, for a loss of pairs")
    check_ref_logps(ref_logps, sequences)
    losses.check_reference(objective.terms, has_reference, "ref_logps, ref_hidden with ref_weight, or ref_logits")
    losses.check_per_pair(objective.terms, n // 2, labels=labels)
    if objective.pair_weight is not None:
        checks.dense("pair_weight", objective.pair_weight, labels=labels)
        checks.shape("pair_weight", objective.pair_weight, (n // 2,), what=f"({n // 2},), one for each pair")
    if objective.token_weights is not None:
        checks.like_labels("token_weights", objective.token_weights, labels)


def check_ref_logps(ref_logps: Tensor | None, sequences: Sequences) -> None:
    if ref_logps is not None:
        labels, n = sequences.labels, len(sequences)
        checks.dense("ref_logps", ref_logps, labels=labels)
        checks.floating("ref_logps", ref_logps)
        per_token = tuple(labels.shape)
        checks.shape("ref_logps", ref_logps, per_token, (n,), what=f"one per token {per_token} or per sequence ({n},)")


def _agree(
    group: str, sequences: Sequences, objective: Objective, ref_logps: Tensor | None, has_reference: bool
) -> None:
    """An error on every rank, unless all are about to add up the same things."""
    weights = objective.token_weights
    options = (
        objective.outputs, objective.ld_alpha, [term.loss.name for term in objective.terms], has_reference,
        None if ref_logps is None else ref_logps.ndim, None if weights is None else weights.dtype,
    )  # fmt: skip
    distributed.agree_on_sequences(group, len(sequences), str(options))


def _statistics(policy: LogprobOutput, sequences: Sequences) -> dict[str, Tensor]:
    """Token means of the primitive's statistics, which are 0 where a token does not count."""
    dtype, lengths = policy.logps.dtype, sequences.lengths()
    sums = {name: sequences.sum(getattr(policy, name).detach().to(dtype)).chunk(2) for name in STATISTICS}
    chosen, rejected = (half.sum().clamp(min=1) for half in lengths.chunk(2))
    return {
        "entropy": sum(half.sum() for half in sums["entropy"]) / lengths.sum().clamp(min=1),
        "mean_token_accuracy": sums["is_top1"][0].sum() / chosen,
        "chosen_logits": sums["mean_logits"][0].sum() / chosen,
        "rejected_logits": sums["mean_logits"][1].sum() / rejected,
    }
