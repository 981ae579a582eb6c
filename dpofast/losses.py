"""The table of preference losses: each a short function of log-probabilities, with its paper and equation.

A function's signature is its declaration. Its positional parameters name the tensors it needs, its keyword
parameters the options it defines and their defaults. `LOSSES`, `UNPAIRED_LOSSES` and `dpofast.lists.LIST_LOSSES`
are read off these signatures and drive every check, here, in `dpofast.functional` and in `dpofast.modules`: an option
that a loss does not define raises, and so does a tensor that it needs and does not get.

Tensors a paired loss may name, all ``[B]``, ``w`` the chosen and ``l`` the rejected completion:

    chosen_logps       log pi(y_w)                           ref_chosen_logps   log pi_ref(y_w)
    chosen_logratios   r_w = log pi(y_w) - log pi_ref(y_w)   chosen_scores      s_w = f'(exp(r_w))
    chosen_lengths     |y_w|, tokens                         chosen_averages    a_w = log pi(y_w) / |y_w|
    chosen_rewards     (1 - exp(-alpha a_w)) / alpha         chosen_nll         -log pi(y_w), never weighted
    delta              D = s_w - s_l                         normalized_delta   s_w / |y_w| - s_l / |y_l|

and the same for ``rejected_*`` (but no rejected_nll). The scores are the log-ratios unless
``f_divergence_type`` says otherwise.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpofast import checks
from dpofast.checks import is_number, shown, wrong

__all__ = [
    "LOSSES",
    "OPTIONS",
    "UNPAIRED_LOSSES",
    "Loss",
    "RunningMean",
    "preference_loss",
    "unpaired_preference_loss",
]

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
REDUCTIONS = ("mean", "sum", "none")
_MAX_EXPONENT = 80.0
"""Where an f-divergence's exponent is cut, as in TRL: exp(80) = 5.5e34, and fp32 ends at 3.4e38."""


@dataclass(frozen=True)
class Option:
    """What an option takes: a number, or ``text``, that is ``valid``; and, ``per_pair``, a tensor ``[B]``.

    For losses of lists and of single completions, what is said of a pair is meant of a list or of a completion.
    """

    expected: str
    valid: Callable[[Any], bool] | None
    per_pair: bool = False
    text: bool = False


OPTIONS: dict[str, Option] = {
    "beta": Option("a finite number > 0", lambda x: 0 < x < math.inf, per_pair=True),
    "label_smoothing": Option("a number in [0, 0.5)", lambda x: 0 <= x < 0.5),
    "margin": Option("a finite number", math.isfinite, per_pair=True),
    "weight": Option("a floating tensor [B]", None, per_pair=True),
    "f_divergence_type": Option(f"one of {F_DIVERGENCES}", lambda x: x in F_DIVERGENCES, text=True),
    "f_alpha_divergence_coef": Option("a finite number", math.isfinite),
    "discopop_tau": Option("a finite number > 0", lambda x: 0 < x < math.inf),
    "simpo_gamma": Option("a finite number >= 0", lambda x: 0 <= x < math.inf),
    "alphapo_alpha": Option("a finite number other than 0", lambda x: math.isfinite(x) and x != 0),
    "cpo_alpha": Option("a finite number >= 0", lambda x: 0 <= x < math.inf),
    "dpop_lambda": Option("a finite number >= 0", lambda x: 0 <= x < math.inf),
    "desirable_weight": Option("a finite number >= 0", lambda x: 0 <= x < math.inf),
    "undesirable_weight": Option("a finite number >= 0", lambda x: 0 <= x < math.inf),
}
"""Every option of every loss. Which loss defines which is in the losses' signatures."""

_BOTH = ("chosen", "rejected")
_LENGTHS = ("chosen_lengths", "rejected_lengths")
_REFERENCE = tuple(f"ref_{side}_logps" for side in _BOTH)
TENSORS = (*(f"{side}_logps" for side in _BOTH), *_REFERENCE, *_LENGTHS, "chosen_nll")
"""What a caller may pass to a loss of pairs; the others are derived."""
_RATIOS = tuple(f"{side}_logratios" for side in _BOTH)
_NEEDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*_RATIOS, "delta"), _REFERENCE),
    "normalized_delta": _REFERENCE + _LENGTHS,
    **{f"{side}_{what}": (f"{side}_lengths",) for side in _BOTH for what in ("averages", "rewards")},
}
"""Derived tensors and the tensors a caller has to pass for them, beside the policy's log-probabilities."""
_ALWAYS = ("chosen_logps", "rejected_logps", "logratios", "sign", "worse", "layout")
REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Loss:
    """One row of the table.

    Attributes:
        name: the ``loss_type``.
        fn: tensors in ``inputs`` order, then ``keywords``, to a loss per pair.
        paper, equation: where it is from, and what it is.
        inputs: names of the tensors that ``fn`` takes.
        keywords: names of the options that ``fn`` takes.
        options: every option it defines, with its default; those that are no keywords shape ``inputs``, weigh
            the result, or, as beta always does, scale the rewards. ``REQUIRED`` has no default.
        needs: tensors a caller must pass, beside the policy's log-probabilities.
        compares: False for a purely supervised term; options of a list address the other losses in it.
        reward: the tensor that beta times is the implicit reward when there is no reference.
    """

    name: str
    fn: Callable[..., Tensor]
    paper: str
    equation: str
    inputs: tuple[str, ...]
    keywords: tuple[str, ...]
    options: Mapping[str, Any]
    needs: tuple[str, ...]
    compares: bool = True
    reward: str = "logps"

    @property
    def reference(self) -> bool:
        """Whether it needs the reference's log-probabilities."""
        return _REFERENCE[0] in self.needs


LOSSES: dict[str, Loss] = {}
"""Losses of pairs, by ``loss_type``."""
UNPAIRED_LOSSES: dict[str, Loss] = {}
"""Losses of single completions marked good or bad, by ``loss_type``."""


def register(paper: str, equation: str, *, table: dict[str, Loss] = LOSSES, sorts: bool = False, **fields: Any):
    """Enter a function into ``table``, under its name without a leading underscore: a new ``loss_type`` everywhere.

    Its positional parameters are the tensors it takes, [B], by the names in this module's docstring; its keywords are
    its options, among `OPTIONS`. So nothing else has to be told of it.

    Args:
        paper, equation: where the loss is from, and what it is.
        table: `LOSSES`, `UNPAIRED_LOSSES` or `dpofast.lists.LIST_LOSSES`, whose tensors its own file lists.
        sorts: it sorts its batch, and so has no options for single pairs.
        fields: ``compares`` and ``reward``, as in `Loss`.

    >>> @register("Huber's, of the margin by which DPO's is missed", "huber(1 - beta D)")
    ... def _huber_margin(delta, *, beta):
    ...     return F.huber_loss(beta * delta, torch.ones_like(delta), reduction="none")
    >>> logps = torch.tensor([-10.0])
    >>> preference_loss(logps, logps, logps, logps, loss_type="huber_margin")
    tensor(0.5000)
    >>> del LOSSES["huber_margin"]
    """

    def enter(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        parameters = inspect.signature(fn).parameters.values()
        inputs = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
        options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        keywords = tuple(options)
        options["beta"] = 0.1
        if {"delta", "normalized_delta"} & set(inputs):
            options |= {"f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5}
        if "chosen_rewards" in inputs:
            options["alphapo_alpha"] = 0.25
        if not sorts:
            options["weight"] = None
        if table is UNPAIRED_LOSSES:
            options |= {"desirable_weight": 1.0, "undesirable_weight": 1.0}
        wanted = dict.fromkeys(need for name in inputs for need in _NEEDS.get(name, (name,)))
        needs = tuple(name for name in wanted if name not in _ALWAYS)
        name = fn.__name__.removeprefix("_")
        table[name] = Loss(name, fn, paper, equation, inputs, keywords, options, needs, **fields)
        return fn

    return enter


def _logistic(x: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """``-log sigmoid(x)``, with the label flipped with probability ``label_smoothing``."""
    loss = -F.logsigmoid(x)
    if label_smoothing == 0.0:
        return loss
    return (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-x)


def _token_mean(nll: Tensor, lengths: Tensor) -> Tensor:
    """Per-pair shares of the mean over all tokens of the batch: their mean over pairs is that mean."""
    return nll * (nll.shape[0] / lengths.sum().clamp(min=1))


def log_odds(average: Tensor) -> Tensor:
    """``logit(exp(average))``, of the largest probability below 1 where it is 1: ORPO's odds, finite in every log."""
    # log(1 - p) is -inf for p = 1, which a completion without tokens has
    average = average.clamp(max=-torch.finfo(average.dtype).eps)
    return average - torch.log(-torch.expm1(average))


# The 15 losses of TRL 1.16


@register("DPO, arXiv:2305.18290 eq. 7; cDPO, ericmitchell.ai/cdpo.pdf; margin: ODPO, arXiv:2402.10571",
       "-(1 - eps) log sigmoid(x) - eps log sigmoid(-x), x = beta D - margin")  # fmt: skip
def _sigmoid(delta, *, beta, label_smoothing=0.0, margin=0.0):
    return _logistic(beta * delta - margin, label_smoothing)


@register("RSO, arXiv:2309.06657; SLiC-HF, arXiv:2305.10425", "max(0, 1 + margin - beta D)")
def _hinge(delta, *, beta, margin=0.0):
    return torch.relu(1 + margin - beta * delta)


@register("IPO, arXiv:2310.12036 eq. 17, averaged over tokens", "(s_w / |y_w| - s_l / |y_l| - 1 / (2 beta))^2")
def _ipo(normalized_delta, *, beta):
    return (normalized_delta - 1 / (2 * beta)) ** 2


@register("EXO, arXiv:2402.00856 eq. 16", "KL(q || (1 - eps, eps)), q = softmax(beta s_w, beta s_l)")
def _exo_pair(delta, *, beta, label_smoothing):
    x = beta * delta
    chosen = F.logsigmoid(x) - math.log1p(-label_smoothing)
    rejected = F.logsigmoid(-x) - math.log(label_smoothing)
    return torch.sigmoid(x) * chosen + torch.sigmoid(-x) * rejected


@register("NCA, arXiv:2402.05369",
       "-log sigmoid(beta r_w) - (log sigmoid(-beta r_w) + log sigmoid(-beta r_l)) / 2")  # fmt: skip
def _nca_pair(chosen_logratios, rejected_logratios, *, beta):
    chosen, rejected = beta * chosen_logratios, beta * rejected_logratios
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


@register("Robust DPO, arXiv:2403.00409",
       "(-(1 - eps) log sigmoid(beta D) + eps log sigmoid(-beta D)) / (1 - 2 eps)")  # fmt: skip
def _robust(delta, *, beta, label_smoothing=0.0):
    clean, flipped = -F.logsigmoid(beta * delta), -F.logsigmoid(-beta * delta)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


@register("BCO, arXiv:2404.04656, on pairs", "-log sigmoid(beta r_w) - log sigmoid(-beta r_l)")
def _bco_pair(chosen_logratios, rejected_logratios, *, beta):
    return -F.logsigmoid(beta * chosen_logratios) - F.logsigmoid(-beta * rejected_logratios)


@register("SPPO, arXiv:2405.00675 eq. 4.7, hard", "(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2")
def _sppo_hard(chosen_logratios, rejected_logratios, *, beta):
    return (chosen_logratios - 0.5 / beta) ** 2 + (rejected_logratios + 0.5 / beta) ** 2


@register("AOT, arXiv:2406.05882, paired",
       "cDPO of sort(log pi(y_w) - log pi(y_l)) - sort(same of pi_ref)", sorts=True)  # fmt: skip
def _aot(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta, label_smoothing=0.0):
    policy, reference = chosen_logps - rejected_logps, ref_chosen_logps - ref_rejected_logps
    return _logistic(beta * (policy.sort().values - reference.sort().values), label_smoothing)


@register("AOT, arXiv:2406.05882, unpaired", "cDPO of sort(r_w) - sort(r_l)", sorts=True)
def _aot_unpaired(chosen_logratios, rejected_logratios, *, beta, label_smoothing=0.0):
    delta = chosen_logratios.sort().values - rejected_logratios.sort().values
    return _logistic(beta * delta, label_smoothing)


@register("APO, arXiv:2408.06266 eq. 7", "sigmoid(-beta r_w) + sigmoid(beta r_l)")
def _apo_zero(chosen_logratios, rejected_logratios, *, beta):
    return torch.sigmoid(-beta * chosen_logratios) + torch.sigmoid(beta * rejected_logratios)


@register("APO, arXiv:2408.06266 eq. 8", "sigmoid(beta r_w) + sigmoid(-beta (r_w - r_l))")
def _apo_down(chosen_logratios, rejected_logratios, *, beta):
    delta = chosen_logratios - rejected_logratios
    return torch.sigmoid(beta * chosen_logratios) + torch.sigmoid(-beta * delta)


@register("DiscoPOP, arXiv:2406.08414 eq. 5",
       "(1 - m) -log sigmoid(x) + m exp(-x), x = beta D, m = sigmoid(x / tau)")  # fmt: skip
def _discopop(delta, *, beta, discopop_tau=0.05):
    x = beta * delta
    # m exp(-x) as one exponential: for x = -100 the factors are 0 and infinity, and their product nan
    return -F.logsigmoid(x) * torch.sigmoid(-x / discopop_tau) + torch.exp(F.logsigmoid(x / discopop_tau) - x)


@register("supervised term of MPO, arXiv:2411.10442",
       "-log pi(y_w), mean over the tokens of the batch", compares=False)  # fmt: skip
def _sft(chosen_nll, chosen_lengths):
    return _token_mean(chosen_nll, chosen_lengths)


@register("length-normalized DPO, Tulu 3, arXiv:2411.15124 eq. 6", "as sigmoid, of s_w / |y_w| - s_l / |y_l|")
def _sigmoid_norm(normalized_delta, *, beta, label_smoothing=0.0, margin=0.0):
    return _logistic(beta * normalized_delta - margin, label_smoothing)


# Beyond DPOTrainer


@register("supervised term of RPO, arXiv:2404.19733 eq. 1",
       "-log pi(y_w) / |y_w|, mean over pairs", compares=False)  # fmt: skip
def _sft_norm(chosen_nll, chosen_lengths):
    return chosen_nll / chosen_lengths.clamp(min=1)


@register("SimPO, arXiv:2405.14734 eq. 6", "cDPO of beta (a_w - a_l) - gamma - margin", reward="averages")
def _simpo(chosen_averages, rejected_averages, *, beta, simpo_gamma=0.5, label_smoothing=0.0, margin=0.0):
    return _logistic(beta * (chosen_averages - rejected_averages) - simpo_gamma - margin, label_smoothing)


@register("AlphaPO, arXiv:2501.03884", "as simpo, of rewards (1 - exp(-alpha a)) / alpha", reward="rewards")
def _alphapo(chosen_rewards, rejected_rewards, *, beta, simpo_gamma=0.5, label_smoothing=0.0, margin=0.0):
    return _logistic(beta * (chosen_rewards - rejected_rewards) - simpo_gamma - margin, label_smoothing)


@register("CPO, arXiv:2401.08417 eq. 3 and 4",
       "cDPO of beta (log pi(y_w) - log pi(y_l)) - margin, + cpo_alpha sft")  # fmt: skip
def _cpo(chosen_logps, rejected_logps, chosen_nll, chosen_lengths,
         *, beta, cpo_alpha=1.0, label_smoothing=0.0, margin=0.0):  # fmt: skip
    preference = _logistic(beta * (chosen_logps - rejected_logps) - margin, label_smoothing)
    return preference + cpo_alpha * _token_mean(chosen_nll, chosen_lengths)


@register("ORPO, arXiv:2403.07691 eq. 6 and 7",
       "sft - beta log sigmoid(logit(exp(a_w)) - logit(exp(a_l)))", reward="averages")  # fmt: skip
def _orpo(chosen_averages, rejected_averages, chosen_nll, chosen_lengths, *, beta):
    ratio = F.logsigmoid(log_odds(chosen_averages) - log_odds(rejected_averages))
    return _token_mean(chosen_nll, chosen_lengths) - beta * ratio


@register("DPOP, Smaug, arXiv:2402.13228 eq. 3", "-log sigmoid(beta (r_w - r_l - lambda max(0, -r_w)))")
def _dpop(chosen_logratios, rejected_logratios, *, beta, dpop_lambda=50.0):
    penalty = torch.relu(-chosen_logratios)
    return _logistic(beta * (chosen_logratios - rejected_logratios - dpop_lambda * penalty))


@register("Cal-DPO, arXiv:2412.14516",
       "-log sigmoid(r_w - r_l) + (r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2")  # fmt: skip
def _cal_dpo(chosen_logratios, rejected_logratios, *, beta):
    calibration = _sppo_hard(chosen_logratios, rejected_logratios, beta=beta)
    return _logistic(chosen_logratios - rejected_logratios) + calibration


# Single completions: sign is +1 for a good one and -1 for a bad one


@register("KTO, arXiv:2402.01306 eq. 7", "sigmoid(-sign beta (r - kl))", table=UNPAIRED_LOSSES)
def _kto(logratios, sign, kl, *, beta):
    return torch.sigmoid(-sign * beta * (logratios - kl))


@register("APO, arXiv:2408.06266 eq. 7, unpaired", "sigmoid(-sign beta r)", table=UNPAIRED_LOSSES)
def _apo_zero_unpaired(logratios, sign, *, beta):
    return torch.sigmoid(-sign * beta * logratios)


@register("BCO, arXiv:2404.04656", "-log sigmoid(sign (beta r - shift))", table=UNPAIRED_LOSSES)
def _bco(logratios, sign, reward_shift, *, beta):
    return -F.logsigmoid(sign * (beta * logratios - reward_shift))


# Validation and evaluation


@dataclass(frozen=True)
class Term:
    """One loss of an objective, with its factor and every option decided."""

    loss: Loss
    factor: float
    options: Mapping[str, Any]


def resolve(
    loss_type: str | Sequence[str],
    loss_weights: Sequence[float] | None = None,
    *,
    table: Mapping[str, Loss] = LOSSES,
    **options: Any,
) -> tuple[Term, ...]:
    """The one check of every loss name and option: an objective, or an error that says what to do.

    ``None`` and ``label_smoothing=0.0`` mean "not given". A mapping gives an option to the losses it names.
    """
    if not isinstance(loss_type, (str, list, tuple)):
        raise wrong("loss_type", shown(loss_type), "a name or a list of names", TypeError)
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    for name in names:
        if not isinstance(name, str) or name not in table:
            raise wrong("loss_type", f"{name!r}", f"one of {', '.join(sorted(table))}")
    if not names:
        raise wrong("loss_type", "an empty list", "at least one name")
    if loss_weights is not None and not isinstance(loss_weights, (list, tuple)):
        raise wrong("loss_weights", shown(loss_weights), "a list of numbers, one for each loss", TypeError)
    factors = [1.0] * len(names) if loss_weights is None else list(loss_weights)
    if len(factors) != len(names):
        raise wrong("loss_weights", f"{len(factors)} numbers", f"{len(names)}, one for each of {names}")
    for factor in factors:
        if not is_number(factor) or not math.isfinite(factor):
            raise wrong("loss_weights", f"{factor!r} among them", "finite numbers")
    losses = [table[name] for name in names]
    given: list[dict[str, Any]] = [{} for _ in losses]
    for option, value in options.items():
        if option not in OPTIONS:
            known = sorted({name for loss in losses for name in loss.options})
            raise TypeError(f"{option}: not an option; those of loss_type={names} are {', '.join(known)}")
        if _is_unset(option, value):
            continue
        for target, loss_value in _targets(option, value, losses, table).items():
            if not _is_unset(option, loss_value):
                check_value(option, loss_value, losses[target])
                given[target][option] = loss_value
    for loss, chosen in zip(losses, given, strict=True):
        if "f_alpha_divergence_coef" in chosen and chosen.get("f_divergence_type") != "alpha_divergence":
            raise ValueError(
                "f_alpha_divergence_coef: defined for f_divergence_type='alpha_divergence', not "
                f"{chosen.get('f_divergence_type', 'reverse_kl')!r}"
            )
        for option, default in loss.options.items():
            if default is REQUIRED and option not in chosen:
                raise ValueError(f"{option}: must be given, and not be 0, for loss_type={loss.name!r}: {loss.equation}")
    return tuple(
        Term(loss, float(factor), {**loss.options, **chosen})
        for loss, factor, chosen in zip(losses, factors, given, strict=True)
    )


def _is_unset(option: str, value: Any) -> bool:
    return value is None or (option == "label_smoothing" and is_number(value) and value == 0)


def _targets(option: str, value: Any, losses: Sequence[Loss], table: Mapping[str, Loss]) -> dict[int, Any]:
    """The positions in ``losses`` that an option's value is for; raises where it would mean nothing."""
    if isinstance(value, Mapping):
        strangers = sorted(set(value) - {loss.name for loss in losses})
        if strangers:
            names = [loss.name for loss in losses]
            raise ValueError(f"{option}: names {strangers}, which loss_type={names} does not")
        targets = {i: value[loss.name] for i, loss in enumerate(losses) if loss.name in value}
        undefined = [losses[i] for i in targets if option not in losses[i].options]
    else:
        targets = {i: value for i, loss in enumerate(losses) if option in loss.options}
        undefined = [loss for loss in losses if option not in loss.options and (loss.compares or not targets)]
    if undefined:
        hint = f"; in a list, name its losses: {option}={{name: value}}" if len(losses) > 1 else ""
        others = ", ".join(sorted(name for name, loss in table.items() if option in loss.options))
        where = f"; it is for {others}" if others else ", nor for another of its kind"
        raise ValueError(f"{option}: not defined for loss_type={undefined[0].name!r}{where}{hint}")
    return targets


def check_value(option: str, value: Any, loss: Loss, rule: Option | None = None) -> None:
    """``rule``: that of the option, if the value has another name."""
    rule = rule or OPTIONS[option]
    if isinstance(value, Tensor):
        checks.dense(option, value)
        if not rule.per_pair or "weight" not in loss.options:
            raise wrong(option, "a tensor", f"{rule.expected} for loss_type={loss.name!r}", TypeError)
        if not value.is_floating_point() or value.dim() > 1:
            found = f"a tensor {tuple(value.shape)} of {value.dtype}"
            raise wrong(option, found, "a floating tensor [B]", TypeError)
        return
    if not (isinstance(value, str) if rule.text else is_number(value)) or rule.valid is None:
        raise wrong(option, shown(value), rule.expected, TypeError)
    if not rule.valid(value):
        raise wrong(option, f"{value!r}", rule.expected)


def needed(terms: Sequence[Term]) -> set[str]:
    """The tensors that an objective needs beside the policy's log-probabilities."""
    return {name for term in terms for name in term.loss.needs}


def check_reference(terms: Sequence[Term], given: bool, how: str) -> None:
    """A reference that is missing, or that no loss would use, raises."""
    names = [term.loss.name for term in terms]
    uses = any(term.loss.reference for term in terms)
    if uses and not given:
        raise ValueError(f"loss_type: {names} needs a reference model; pass {how}")
    if given and not uses and any(term.loss.compares for term in terms):
        raise ValueError(f"loss_type: {names} uses no reference model, and one was given; drop {how}")


def check_vectors(tensors: Mapping[str, Tensor | None], like: str, required: Sequence[str]) -> None:
    """Every tensor there is must be a vector as long as ``tensors[like]``, and on its device."""
    for name in required:
        checks.dense(name, tensors[name])
    pattern: Any = tensors[like]
    for name, value in tensors.items():
        if value is None:
            continue
        checks.dense(name, value, **{like: pattern})
        if value.dim() != 1 or value.shape != pattern.shape:
            raise wrong(name, f"shape {tuple(value.shape)}", f"[B], as long as {like}")
        if name.endswith(("logps", "nll")):
            checks.floating(name, value)
        if value.is_complex():
            raise wrong(name, f"dtype {value.dtype}", "real numbers", TypeError)


def check_per_pair(terms: Sequence[Term], batch: int, **beside: Tensor) -> None:
    for term in terms:
        for name, value in term.options.items():
            if isinstance(value, Tensor) and value.dim() == 1:
                checks.dense(name, value, **beside)
                checks.shape(name, value, (batch,), what=f"({batch},), one for each")


def _score(logratios: Tensor, divergence: str, alpha: float) -> Tensor:
    """``f'(t)`` of the log of t, for f-DPO (arXiv:2309.16240, table 1)."""
    if divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(logratios)
    if divergence == "forward_kl":
        alpha = 0.0  # f'(t) = 1 - 1/t is the alpha-divergence at 0
    if divergence == "reverse_kl" or abs(alpha - 1) < 1e-6:  # f'(t) = log t is its limit at 1
        return logratios
    return torch.expm1(((alpha - 1) * logratios).clamp(max=_MAX_EXPONENT)) / (alpha - 1)


def _derive(term: Term, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that a loss may name, from those its caller gave."""
    values, loss, options = dict(given), term.loss, term.options
    for side in _BOTH:
        logps = values[f"{side}_logps"]
        if loss.reference:
            values[f"{side}_logratios"] = logps - values[f"ref_{side}_logps"]
        if "f_divergence_type" in options:
            values[f"{side}_scores"] = _score(
                values[f"{side}_logratios"], options["f_divergence_type"], options["f_alpha_divergence_coef"]
            )
        if loss.reward in ("averages", "rewards"):
            values[f"{side}_averages"] = logps / values[f"{side}_lengths"].clamp(min=1)
        if loss.reward == "rewards":
            alpha = options["alphapo_alpha"]
            values[f"{side}_rewards"] = -torch.expm1(-alpha * values[f"{side}_averages"]) / alpha
    if "delta" in loss.inputs:
        values["delta"] = values["chosen_scores"] - values["rejected_scores"]
    if "normalized_delta" in loss.inputs:
        chosen = values["chosen_scores"] / values["chosen_lengths"].clamp(min=1)
        values["normalized_delta"] = chosen - values["rejected_scores"] / values["rejected_lengths"].clamp(min=1)
    return values


def evaluate_terms(terms: Sequence[Term], values: Sequence[Mapping[str, Tensor]], reduction: str) -> Tensor:
    total: Any = 0.0
    for term, tensors in zip(terms, values, strict=True):
        loss = term.loss.fn(
            *(tensors[name] for name in term.loss.inputs),
            **{name: term.options[name] for name in term.loss.keywords},
        )
        if term.options.get("weight") is not None:
            loss = loss * term.options["weight"]
        if "desirable_weight" in term.options:
            good, bad = term.options["desirable_weight"], term.options["undesirable_weight"]
            loss = torch.where(tensors["sign"] > 0, good * loss, bad * loss)
        total = total + term.factor * loss
    if reduction == "none":
        return total
    # the mean of an empty batch is 0, with a graph behind it
    return total.sum() if reduction == "sum" else total.sum() / max(total.shape[0], 1)


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise wrong("reduction", f"{reduction!r}", f"one of {REDUCTIONS}")


def implicit_rewards(terms: Sequence[Term], given: Mapping[str, Tensor | None]) -> tuple[Tensor, Tensor]:
    """``beta`` times the log-ratios, or, without a reference, what the first loss compares; no gradient."""
    term = [*(term for term in terms if term.loss.compares), terms[0]][0]
    present = {name: value.detach() for name, value in given.items() if value is not None}
    beta = term.options["beta"]
    if _REFERENCE[0] in present:
        chosen, rejected = (present[f"{side}_logps"] - present[f"ref_{side}_logps"] for side in _BOTH)
    else:
        values = _derive(term, present)
        chosen, rejected = (values[f"{side}_{term.loss.reward}"] for side in _BOTH)
    return beta * chosen, beta * rejected


def upcast(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """All in one dtype, the widest there is and at least fp32; tensors that are None are left out."""
    present = {name: value for name, value in tensors.items() if value is not None}
    dtype = torch.float32
    for value in present.values():
        dtype = torch.promote_types(dtype, value.dtype)
    return {name: value.to(dtype) for name, value in present.items()}


def preference_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float | Tensor | Mapping[str, Any] = 0.1,
    label_smoothing: float | Mapping[str, Any] = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    chosen_nll: Tensor | None = None,
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    """A preference loss, or a weighted sum of several, of the log-probabilities of pairs of completions.

    The default is DPO::

        chosen_logratios = chosen_logps - ref_chosen_logps
        rejected_logratios = rejected_logps - ref_rejected_logps
        loss = -F.logsigmoid(beta * (chosen_logratios - rejected_logratios)).mean()

    Args:
        chosen_logps, rejected_logps: summed over each completion's tokens ``[B]``, floating point. The loss
            is computed in fp32, or fp64 for fp64.
        ref_chosen_logps, ref_rejected_logps: the same under the reference model. Required by the losses that
            compare with it, refused where no loss does.
        loss_type: a key of `LOSSES`, or a list of them.
        loss_weights: a factor for each entry of the list; 1 if None.
        beta: > 0, a number or one per pair ``[B]``.
        label_smoothing: in [0, 0.5), the probability that a preference is the wrong way round.
        chosen_lengths, rejected_lengths: completion tokens ``[B]``, for the losses that average over them.
        chosen_nll: ``-chosen_logps`` before any weighting such as ld_alpha ``[B]``, for the supervised terms.
        reduction: "mean" over pairs, "sum", or "none" for ``[B]`` (sorted, where the loss sorts).
        options: what else the losses define, see `OPTIONS`: margin (a number or ``[B]``), weight ``[B]``,
            f_divergence_type, f_alpha_divergence_coef, discopop_tau, simpo_gamma, alphapo_alpha, cpo_alpha,
            dpop_lambda. ``None`` means its default. In a list, an option must be defined for every loss that
            compares completions; ``{loss_type: value}`` gives it to some.

    Returns:
        A scalar, or ``[B]`` for reduction="none".

    Raises:
        ValueError: an unknown loss, an option that a loss does not define, a value out of range, a missing
            tensor.
        TypeError: an unknown option, a value of the wrong type.

    Papers and equations: ``dpofast.losses.LOSSES[loss_type].paper`` and ``.equation``.

    >>> import torch
    >>> logps = torch.tensor([-10.0, -12.0])
    >>> preference_loss(logps, logps - 3, logps, logps - 3)  # policy == reference: log 2
    tensor(0.6931)
    >>> preference_loss(logps, logps, loss_type="hinge", label_smoothing=0.1)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: label_smoothing: not defined for loss_type='hinge'; it is for alphapo, aot, ...
    """
    check_reduction(reduction)
    terms = resolve(loss_type, loss_weights, beta=beta, label_smoothing=label_smoothing, **options)
    references, lengths = (ref_chosen_logps, ref_rejected_logps), (chosen_lengths, rejected_lengths)
    given = dict(zip(TENSORS, (chosen_logps, rejected_logps, *references, *lengths, chosen_nll), strict=True))
    if (ref_chosen_logps is None) != (ref_rejected_logps is None):
        raise ValueError("ref_chosen_logps: goes with ref_rejected_logps; one of them is None")
    check_reference(terms, ref_chosen_logps is not None, "ref_chosen_logps and ref_rejected_logps")
    for name in sorted(needed(terms)):
        if given[name] is None:
            raise ValueError(f"{name}: is None, and loss_type={[term.loss.name for term in terms]} needs it")
    check_vectors(given, like="chosen_logps", required=("chosen_logps", "rejected_logps"))
    check_per_pair(terms, chosen_logps.shape[0], chosen_logps=chosen_logps)
    return evaluate(terms, given, reduction)


def evaluate(terms: Sequence[Term], given: Mapping[str, Tensor | None], reduction: str) -> Tensor:
    """`preference_loss` of terms and tensors that were checked."""
    tensors = upcast(given)
    return evaluate_terms(terms, [_derive(term, tensors) for term in terms], reduction)


def weighted(terms: Sequence[Term], weight: Tensor | None) -> Sequence[Term]:
    """``terms`` with the weight of each pair; None: as they are."""
    return terms if weight is None else [replace(x, options={**x.options, "weight": weight}) for x in terms]


class RunningMean(torch.nn.Module):
    """The mean of every reward seen so far: BCO's reward shift. ``eval()`` freezes it, as for a BatchNorm.

    The equivalent is ``torch.cat(all_rewards).mean()``, in two buffers that a checkpoint keeps. It does no
    communication: with several ranks, ``update`` it with the gathered rewards and pass ``running.mean`` on.

    >>> running = RunningMean()
    >>> running.update(torch.tensor([1.0, 3.0])), running.update(torch.tensor([8.0]))
    (tensor(2.), tensor(4.))
    """

    mean: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros((), dtype=torch.float32))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn, recurse=True):
        """``module.bfloat16()`` and the like leave the mean as it is: in 16 bits that of many values stands still."""
        mean = self.mean
        super()._apply(fn, recurse)
        if self.mean.dtype != torch.float32:
            self.mean = mean.to(self.mean.device)
        return self

    @torch.no_grad()
    def update(self, rewards: Tensor) -> Tensor:
        """Take in rewards of any shape, and return the mean; in eval mode only return it."""
        checks.dense("rewards", rewards)
        if self.training and rewards.numel() > 0:
            self.count += rewards.numel()
            self.mean += (rewards.to(self.mean.dtype).mean() - self.mean) * (rewards.numel() / self.count)
        return self.mean.clone()

    forward = update


def unpaired_preference_loss(
    logps: Tensor,
    ref_logps: Tensor,
    is_chosen: Tensor,
    *,
    loss_type: str = "kto",
    beta: float | Tensor = 0.1,
    kl: float | Tensor | None = None,
    reward_shift: float | Tensor | RunningMean | None = None,
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    """A loss of single completions that are marked good or bad.

    The default is KTO::

        sign = torch.where(is_chosen, 1.0, -1.0)
        loss = torch.sigmoid(-sign * beta * (logps - ref_logps - kl.mean().clamp(min=0))).mean()

    Args:
        logps, ref_logps: summed over each completion's tokens ``[N]``, floating point.
        is_chosen: bool ``[N]``, True for a good completion.
        loss_type: a key of `UNPAIRED_LOSSES`: "kto", "apo_zero_unpaired", "bco".
        beta: > 0, a number or one per completion ``[N]``.
        kl: for "kto": log-ratios of mismatched completions ``[*]``, or their mean over all ranks. Averaged,
            clamped at 0, and without gradient, as in TRL. Of no completions it is 0.
        reward_shift: for "bco": a number, a tensor of one value or ``[N]``, or a `RunningMean`, which first takes in
            this batch's rewards, beta times the log-ratios.
        reduction: "mean", "sum", or "none" for ``[N]``.
        options: weight ``[N]``, desirable_weight and undesirable_weight >= 0.

    Returns:
        A scalar, or ``[N]`` for reduction="none".

    Raises:
        ValueError, TypeError: as in `preference_loss`; also for kl or reward_shift where the loss takes none.

    KTO, arXiv:2402.01306 eq. 7; APO, arXiv:2408.06266 eq. 7; BCO, arXiv:2404.04656.

    >>> logps, is_chosen = torch.tensor([-5.0, -7.0]), torch.tensor([True, False])
    >>> unpaired_preference_loss(logps, logps, is_chosen, kl=0.0)
    tensor(0.5000)
    """
    check_reduction(reduction)
    term = resolve_unpaired(loss_type, {"kl": kl, "reward_shift": reward_shift}, beta=beta, **options)
    tensors = {"logps": logps, "ref_logps": ref_logps, "is_chosen": is_chosen}
    check_vectors(tensors, like="logps", required=tuple(tensors))
    check_unpaired(is_chosen, reward_shift)
    check_per_pair([term], logps.shape[0], logps=logps)
    return evaluate_unpaired(term, tensors, {"kl": kl, "reward_shift": reward_shift}, reduction)


def resolve_unpaired(loss_type: Any, state: Mapping[str, Any] | None, **options: Any) -> Term:
    """The one loss of single completions; ``state`` has kl and reward_shift, None before there are any to check."""
    if not isinstance(loss_type, str):
        raise wrong("loss_type", shown(loss_type), "one name", TypeError)
    (term,) = resolve(loss_type, table=UNPAIRED_LOSSES, **options)
    for name, value in (state or {}).items():
        if (value is None) == (name in term.loss.needs):
            verb = "needs" if value is None else "does not take"
            raise ValueError(f"{name}: loss_type={loss_type!r} {verb} it")
    return term


def check_unpaired(is_chosen: Tensor, reward_shift: Any) -> None:
    if is_chosen.dtype != torch.bool:
        raise wrong("is_chosen", f"dtype {is_chosen.dtype}", "torch.bool", TypeError)
    if reward_shift is None or isinstance(reward_shift, RunningMean):
        return
    shape = torch.as_tensor(reward_shift).shape
    if shape not in ((), (1,), is_chosen.shape):  # else it would be broadcast, to no loss or to one for each two
        raise wrong("reward_shift", f"shape {tuple(shape)}", f"one value, or ({is_chosen.shape[0]},)")


def evaluate_unpaired(
    term: Term, tensors: Mapping[str, Tensor | None], state: Mapping[str, Any], reduction: str
) -> Tensor:
    """`unpaired_preference_loss` of logps, ref_logps and is_chosen, and of kl and reward_shift, that were checked."""
    given = upcast(tensors)
    ratios = given["logps"] - given["ref_logps"]
    values = {"logratios": ratios, "sign": 2 * given["is_chosen"] - 1}
    for name, value in state.items():
        if isinstance(value, RunningMean):
            value = value.update(term.options["beta"] * ratios.detach())
        if value is not None:
            values[name] = torch.as_tensor(value, dtype=ratios.dtype, device=ratios.device).detach()
    if "kl" in values:
        values["kl"] = (values["kl"].sum() / max(values["kl"].numel(), 1)).clamp(min=0)
    return evaluate_terms([term], [values], reduction)
