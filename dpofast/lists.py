"""Losses of lists of answers to one prompt: which answers make up a list, the table of losses, and their two doors.

The table is read off signatures, as `dpofast.losses` says. A loss of lists may name these, for N answers in L lists,
one list after the other:

    logratios   r = log pi(y) - log pi_ref(y), or a model's scores   [N]
    scores      psi, how good each answer is, as the data have it    [N]
    worse       of every two answers of a list, by `Layout.pairs`:
                whether the second is worse than the first           [P]
    layout      which answers, and which pairs of them, make a list  `Layout`

Answers of a list are compared by differences of log-ratios before beta, as those of a pair are: so a list of two has
the loss of its pair to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpofast import checks, losses
from dpofast.checks import wrong
from dpofast.losses import Loss, Term

__all__ = ["LIST_LOSSES", "Lists", "list_preference_loss", "list_score_loss"]


class Layout(NamedTuple):
    """Where lists lie, one after the other, on the answers' device."""

    sizes: Tensor  # [L]
    list_of: Tensor  # [N], the list of each answer
    first: Tensor  # [N], the first answer of its list
    ends: Tensor  # [L + 1], boundaries
    n_pairs: int

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Every ordered two answers of a list ``[P]``, by the first of them, and the boundaries ``[N + 1]``."""
        count = self.sizes[self.list_of]
        answers = torch.arange(len(count), device=count.device)
        one = answers.repeat_interleave(count, output_size=self.n_pairs)
        ends = _ends(count)
        return one, torch.arange(self.n_pairs, device=one.device) - ends[one] + self.first[one], ends

    def each(self, option: float | Tensor, lists: Tensor) -> float | Tensor:
        """An option, which may have a value for each list, for everything that is of the list ``lists``."""
        return option[lists] if isinstance(option, Tensor) and option.dim() == 1 else option

    def sum(self, values: Tensor) -> Tensor:
        """Of each list."""
        return _segment("sum", values, self.ends, 0.0)

    def places(self, values: Tensor) -> Tensor:
        """The place of each answer in its list by ``values``, the largest first, from 0; equal ones as they lie."""
        order = values.argsort(descending=True, stable=True)
        order = order[self.list_of[order].argsort(stable=True)]
        answers = torch.arange(len(order), device=order.device)
        return torch.empty_like(order).index_put((order,), answers - self.first)


class Lists:
    """Which of the answers in a row make up a list.

    Attributes:
        sizes: answers in each list, at least 1, on the host: shapes depend on them, and a device is not waited for.
        interleaved: the first answer of every list comes first, then the second answers of those that have one, and so
            on; else one list comes after the other.
    """

    def __init__(self, sizes: Sequence[int], interleaved: bool = False) -> None:
        self.sizes, self.interleaved = tuple(sizes), interleaved
        self._layouts: dict[torch.device, Layout] = {}

    def __len__(self) -> int:
        return len(self.sizes)

    def layout(self, device: torch.device) -> Layout:
        if device not in self._layouts:
            sizes = torch.tensor(self.sizes, dtype=torch.long)
            ends, list_of = _ends(sizes), self._list_of(sizes)
            first = ends[list_of]
            sizes, list_of, first, ends = (x.to(device, non_blocking=True) for x in (sizes, list_of, first, ends))
            self._layouts[device] = Layout(sizes, list_of, first, ends, sum(n * n for n in self.sizes))
        return self._layouts[device]

    def together(self, x: Tensor) -> Tensor:
        """A number for each answer, with those of a list together."""
        return x[self._order(x.device)] if self.interleaved else x

    def apart(self, x: Tensor) -> Tensor:
        """What `together` was made of."""
        return torch.empty_like(x).index_put((self._order(x.device),), x) if self.interleaved else x

    def _list_of(self, sizes: Tensor) -> Tensor:
        return torch.arange(len(self)).repeat_interleave(sizes, output_size=sum(self.sizes))

    def _order(self, device: torch.device) -> Tensor:
        """Where each answer is, with those of a list together, among those that are interleaved."""
        sizes = torch.tensor(self.sizes, dtype=torch.long)
        list_of = self._list_of(sizes)
        place = torch.arange(len(list_of)) - _ends(sizes)[list_of]
        return place.argsort(stable=True).argsort().to(device, non_blocking=True)


def _ends(sizes: Tensor) -> Tensor:
    return F.pad(sizes.cumsum(0), (1, 0))


def _segment(reduce: str, values: Tensor, ends: Tensor, initial: float) -> Tensor:
    """By segments and without atomics, so that the bits do not vary."""
    return torch.segment_reduce(values, reduce, offsets=ends, initial=initial, unsafe=True)


def _logsumexp(x: Tensor, where: Tensor, segment: Tensor, ends: Tensor) -> Tensor:
    """Over each segment, ``where`` it is true; -inf where that is nowhere. ``segment``: that of each x.

    Of one x it is x, to the bit, and its gradient is finite where torch.logsumexp's is nan: of infinite x alone.
    """
    x = torch.where(where, x, -torch.inf)
    top = _segment("max", x, ends, -torch.inf)
    top_of = top[segment]
    below = torch.where(x == top_of, 0.0, x - top_of)
    return top + _segment("sum", below.exp(), ends, 0.0).log()


# The losses


LIST_LOSSES: dict[str, Loss] = {}
"""Losses of lists, by ``loss_type``."""


def _register(paper: str, equation: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    return losses.register(paper, equation, table=LIST_LOSSES)


@_register("softmax-DPO, S-DPO, arXiv:2406.09215; the first answer is chosen, w, the others are rejected, l",
           "-log sigmoid(-log sum_l exp(beta (r_l - r_w) + margin))")  # fmt: skip
def _softmax_dpo(logratios, layout, *, beta, margin=0.0):
    is_rejected = layout.first != torch.arange(len(logratios), device=logratios.device)
    behind, of = torch.where(is_rejected, logratios - logratios[layout.first], 0.0), layout.list_of
    x = layout.each(beta, of) * behind + layout.each(margin, of)
    return -F.logsigmoid(-_logsumexp(x, is_rejected, of, layout.ends))


@_register("DPO for rankings, Plackett-Luce, arXiv:2305.18290 appendix A.3; answers that tie do not compete",
           "-sum_i log(exp(beta r_i) / (exp(beta r_i) + sum_{j worse than i} exp(beta r_j)))")  # fmt: skip
def _plackett_luce(logratios, worse, layout, *, beta):
    one, other, ends = layout.pairs()
    behind = torch.where(worse, logratios[other] - logratios[one], 0.0)  # one of an infinity and itself is nan
    x = layout.each(beta, layout.list_of[one]) * behind
    return layout.sum(-F.logsigmoid(-_logsumexp(x, worse, one, ends)))


@_register("LiPO-lambda, arXiv:2402.01878; LambdaLoss",
           "-sum_{psi_i > psi_j} |2^psi_i - 2^psi_j| |1 / D_i - 1 / D_j| log sigmoid(beta (r_i - r_j)), "
           "D = log2(1 + place among the r)")  # fmt: skip
def _lipo_lambda(logratios, scores, worse, layout, *, beta):
    one, other, ends = layout.pairs()
    gain, discount = torch.exp2(scores), 1 / torch.log2(layout.places(logratios.detach()).to(scores.dtype) + 2)
    weight = (gain[one] - gain[other]).abs() * (discount[one] - discount[other]).abs()
    x = torch.where(worse, logratios[one] - logratios[other], 0.0)
    pairs = weight * -F.logsigmoid(layout.each(beta, layout.list_of[one]) * x)
    return layout.sum(_segment("sum", torch.where(worse, pairs, 0.0), ends, 0.0))


@_register("ListNet, Cao et al. 2007, top one; the softmax loss of LiPO, arXiv:2402.01878",
           "-sum_i softmax(psi)_i log softmax(beta r)_i")  # fmt: skip
def _listnet(logratios, scores, layout, *, beta):
    of, ends, everywhere = layout.list_of, layout.ends, torch.ones_like(layout.list_of, dtype=torch.bool)
    x = layout.each(beta, of) * logratios
    target = torch.exp(scores - _logsumexp(scores, everywhere, of, ends)[of])
    log_share = x - _logsumexp(x, everywhere, of, ends)[of]
    return -layout.sum(torch.where(target > 0, target * log_share, 0.0))


# Validation and evaluation


def check_scores(terms: Sequence[Term], scores: Tensor | None, like: Mapping[str, Tensor]) -> None:
    """What the data say of the answers: there if a loss needs it, not there if none would look, and one number each."""
    ((name, pattern),) = like.items()
    names = [term.loss.name for term in terms]
    if scores is None:
        needing = [term.loss.name for term in terms if "scores" in term.loss.needs]
        if needing:
            raise ValueError(f"scores: is None, and loss_type={needing} needs it")
        return
    if not any({"scores", "worse"} & set(term.loss.inputs) for term in terms):
        raise ValueError(f"scores: loss_type={names} does not look at them; put the best answer of each list first")
    checks.dense("scores", scores, **like)
    checks.shape("scores", scores, tuple(pattern.shape), what=f"{tuple(pattern.shape)}, one for each in {name}")
    if scores.is_complex() or scores.dtype == torch.bool:
        raise wrong("scores", f"dtype {scores.dtype}", "real numbers", TypeError)


def evaluate(terms: Sequence[Term], logratios: Tensor, scores: Tensor | None, lists: Lists, reduction: str) -> Tensor:
    """The losses of log-ratios or scores ``[N]``, with everything checked."""
    given = losses.upcast({"logratios": logratios, "scores": scores})
    values: dict[str, Any] = {name: lists.together(x) for name, x in given.items()}
    values["layout"] = layout = lists.layout(logratios.device)
    if any("worse" in term.loss.inputs for term in terms):
        one, other, _ = layout.pairs()
        order = values.get("scores")
        values["worse"] = other > one if order is None else order[other] < order[one]
    return losses.evaluate_terms(terms, [values] * len(terms), reduction)


def implicit_rewards(terms: Sequence[Term], logratios: Tensor, lists: Lists) -> Tensor:
    """``beta`` times the log-ratios, of the first loss; no gradient."""
    layout, ratios = lists.layout(logratios.device), lists.together(logratios.detach())
    return lists.apart(layout.each(terms[0].options["beta"], layout.list_of) * ratios).detach()


def chosen(lists: Lists, scores: Tensor | None, device: torch.device) -> Tensor:
    """Which answer of each list is the best, the first of them if several are: bool ``[N]``."""
    layout = lists.layout(device)
    answers = torch.arange(len(layout.list_of), device=device)
    place = answers - layout.first if scores is None else layout.places(lists.together(scores))
    return lists.apart(place == 0)


def accuracy(rewards: Tensor, is_chosen: Tensor, lists: Lists) -> Tensor:
    """The share of the lists, of those of two or more, whose best answer has the largest reward."""
    layout, rewards, best = lists.layout(rewards.device), lists.together(rewards), lists.together(is_chosen)
    own, rival = (
        _segment("max", torch.where(where, rewards, -torch.inf), layout.ends, -torch.inf) for where in (best, ~best)
    )
    right = (layout.sizes > 1) & (own > rival)
    return right.sum().to(rewards.dtype) / max(sum(n > 1 for n in lists.sizes), 1)


def _lists_of(name: str, x: Any, sizes: Any, interleaved: Any) -> Lists:
    checks.dense(name, x)
    checks.floating(name, x)
    if x.dim() != 1:
        raise wrong(name, f"shape {tuple(x.shape)}", "[N], one for each answer")
    checks.flag("interleaved", interleaved)
    return Lists(checks.sizes(sizes, x.shape[0], name), interleaved)


def list_preference_loss(
    logps: Tensor,
    sizes: int | Sequence[int] | Tensor,
    *,
    ref_logps: Tensor | None = None,
    scores: Tensor | None = None,
    loss_type: str | Sequence[str] = "softmax_dpo",
    beta: float | Tensor | Mapping[str, Any] = 0.1,
    interleaved: bool = False,
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    """A preference loss of lists of answers, each list to one prompt, from log-probabilities.

    The default is softmax-DPO, of one chosen answer, the first of its list, and any number of rejected ones::

        for r in (logps - ref_logps).split(sizes):
            losses.append(-F.logsigmoid(-torch.logsumexp(beta * (r[1:] - r[0]), dim=0)))
        loss = torch.stack(losses).mean()

    For lists of two, "softmax_dpo" and "plackett_luce" are `preference_loss` with "sigmoid", to the bit.

    Args:
        logps: summed over each answer's tokens ``[N]``, floating point; the loss is computed in fp32, or fp64 for fp64.
        sizes: the number of answers in each list ``[L]``, each >= 1, N in all: a list or a tensor; or an int, of lists
            of one size. Shapes depend on it, so a GPU that has it is waited for. A list of one answer has the loss 0.
        ref_logps: the logps under the reference model ``[N]``.
        scores: how good each answer is, as the data have it ``[N]``, more for a better one. "lipo_lambda" and "listnet"
            need them; "plackett_luce" takes answers from the best to the worst if they are None, and those of equal
            scores do not compete; "softmax_dpo" takes none. For "lipo_lambda" they are exponents of 2 in a gain: in
            [0, 1] in the paper, small integers in search; see below.
        loss_type: a key of `LIST_LOSSES`, or a list of them.
        beta: > 0, a number or one per list ``[L]``.
        interleaved: False: one list lies after the other. True: the first answers of all lists, then the second answers
            of those that have one, and so on: as in ``[chosen; rejected]``, in the batches of `dpofast.data`, and as
            `share_prompt` takes them.
        reduction: "mean" over lists, "sum", or "none" for ``[L]``.
        options: weight, one per list ``[L]``; margin, for "softmax_dpo", by which the chosen answer has to be ahead, a
            number or ``[L]``; loss_weights, a factor for each entry of a list of losses, in which
            ``{loss_type: value}`` gives an option to some.

    Returns:
        A scalar, or ``[L]`` for reduction="none"; 0 for a list of one answer, which counts in the mean, and for no
        lists. "plackett_luce" and "lipo_lambda" need memory for the square of the size of each list.

    "lipo_lambda" is a logistic loss of every two answers of which i is better than j, weighed by what exchanging them
    would change in DCG, with their places in the order that the policy has them in::

        gain, discount = 2**scores - 1, 1 / torch.log2(1 + rank)  # rank from 1, of r = logps - ref_logps, falling
        for i, j with scores[i] > scores[j]:
            loss += abs(gain[i] - gain[j]) * abs(discount[i] - discount[j]) * -F.logsigmoid(beta * (r[i] - r[j]))

    The weights have no gradient. The paper's discount is log(1 + rank); its base, 2 here as in DCG, is a factor of the
    loss. No sum is divided by the number of answers or by the ideal DCG.

    Raises:
        ValueError, TypeError: as `preference_loss`; sizes that do not add up; scores that are missing, or that no loss
            would look at.

    Papers and equations: ``dpofast.lists.LIST_LOSSES[loss_type].paper`` and ``.equation``.

    >>> logps = torch.tensor([-10.0, -12.0, -11.0, -9.0, -9.5])
    >>> list_preference_loss(logps, [3, 2], ref_logps=logps, reduction="none")  # policy == reference: log 3, log 2
    tensor([1.0986, 0.6931])
    """
    losses.check_reduction(reduction)
    terms = losses.resolve(loss_type, table=LIST_LOSSES, beta=beta, **options)
    lists = _lists_of("logps", logps, sizes, interleaved)
    if ref_logps is None:
        raise ValueError("ref_logps: is None; pass the reference's, or call list_score_loss for scores without one")
    checks.dense("ref_logps", ref_logps, logps=logps)
    checks.floating("ref_logps", ref_logps)
    checks.shape("ref_logps", ref_logps, tuple(logps.shape), what=f"{tuple(logps.shape)}, that of logps")
    given = losses.upcast({"logps": logps, "ref_logps": ref_logps})
    return _loss(terms, {"logps": logps}, given["logps"] - given["ref_logps"], scores, lists, reduction)


def list_score_loss(
    outputs: Tensor,
    sizes: int | Sequence[int] | Tensor,
    *,
    scores: Tensor | None = None,
    loss_type: str | Sequence[str] = "softmax_dpo",
    beta: float | Tensor | Mapping[str, Any] = 1.0,
    interleaved: bool = False,
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    """A loss of lists from a model's scores of answers: for rerankers and reward models, which have no reference.

    As `list_preference_loss`, with ``outputs`` in place of the log-ratios. The default, for lists of one size K, is the
    cross-entropy of the first answer::

        loss = F.cross_entropy(beta * outputs.view(-1, K), torch.zeros(len(outputs) // K, dtype=torch.long))

    Args:
        outputs: of a model, for each answer or document ``[N]``, floating point.
        scores: how good each of them is, as the data have it ``[N]``.
        beta: > 0, a factor of the outputs, a number or one per list ``[L]``.
        sizes, loss_type, interleaved, reduction, options: as in `list_preference_loss`.

    Returns:
        A scalar, or ``[L]`` for reduction="none".

    Raises:
        ValueError, TypeError: as `list_preference_loss` does.

    >>> outputs, scores = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 3.0])
    >>> list_score_loss(outputs, 3, scores=scores, loss_type="lipo_lambda")
    tensor(8.9606)
    """
    losses.check_reduction(reduction)
    terms = losses.resolve(loss_type, table=LIST_LOSSES, beta=beta, **options)
    lists = _lists_of("outputs", outputs, sizes, interleaved)
    return _loss(terms, {"outputs": outputs}, outputs, scores, lists, reduction)


def _loss(
    terms: Sequence[Term],
    like: Mapping[str, Tensor],
    logratios: Tensor,
    scores: Tensor | None,
    lists: Lists,
    reduction: str,
) -> Tensor:
    check_scores(terms, scores, like)
    losses.check_per_pair(terms, len(lists), **like)
    return evaluate(terms, logratios, scores, lists, reduction)
