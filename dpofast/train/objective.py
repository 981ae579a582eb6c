"""The loss of a batch of preferences, and what is known of each of its records."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpofast.checks import wrong
from dpofast.data import Record
from dpofast.functional import DPOLossOutput
from dpofast.functional import objective_of as pair_objective_of
from dpofast.integrations.models import model_dpo_loss, model_list_loss, model_logprob
from dpofast.lists import LIST_LOSSES
from dpofast.losses import UNPAIRED_LOSSES, RunningMean, unpaired_preference_loss
from dpofast.sequence_losses import SequenceLossOutput, list_objective
from dpofast.sequences import sequence_logps
from dpofast.train.config import Config
from dpofast.train.feed import Batch
from dpofast.train.ranking import first_is_best, ndcg
from dpofast.train.ranks import Ranks


class Scored(NamedTuple):
    """A batch's loss, and numbers of each of its records ``[B]``, by name: nan where a record has none."""

    loss: Tensor
    values: dict[str, Tensor]


class Objective:
    """What is trained: which records it learns from, and what it makes of a batch of them."""

    mismatches = False
    needs_reference = True

    def expect(self, record: Record) -> None:
        """Raise for a record that it cannot learn from."""
        raise NotImplementedError

    def score(self, model: nn.Module, batch: Batch, ref_logps: Tensor | None, reduction: str = "mean") -> Scored:
        """The loss of ``batch``, ``[B]`` for reduction="none"."""
        raise NotImplementedError

    def logps(self, model: nn.Module, batch: Batch) -> Tensor:
        """The log-probs ``[N]`` of the answers in ``batch``."""
        raise NotImplementedError

    def advance(self, scored: Sequence[Scored], ranks: Ranks) -> None:
        """Take in a step that was done; ``scored`` are this rank's micro-batches."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to keep of it."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""


def objective_of(config: Config) -> Objective:
    """What the options of a training say that is trained: a loss of pairs, of lists, or of single answers."""
    names = set(config.loss_type)
    if names & set(UNPAIRED_LOSSES):
        return UnpairedObjective(config)
    return ListObjective(config) if names & set(LIST_LOSSES) else PairObjective(config)


class PairObjective(Objective):
    """A loss of pairs."""

    def __init__(self, config: Config) -> None:
        self.head = {"memory_budget": config.memory_budget or None, "share_prompt": config.share_prompt}
        self.options = _options(config) | {"label_smoothing": config.label_smoothing}
        self.needs_reference = any(term.loss.reference for term in pair_objective_of(self.options).terms)

    def expect(self, record: Record) -> None:
        _expect(record, len(record.answers) == 2, "chosen and rejected")

    def score(self, model: nn.Module, batch: Batch, ref_logps: Tensor | None, reduction: str = "mean") -> Scored:
        options = self.options | _present({"margin": batch.margin, "pair_weight": batch.weight})
        out = model_dpo_loss(
            model, batch.inputs, batch.labels, ref_logps=ref_logps, reduction=reduction, **self.head, **options
        )
        return Scored(out.loss, _values(out))

    def logps(self, model: nn.Module, batch: Batch) -> Tensor:
        return _sums(model, batch.inputs, batch.labels, **self.head)


class ListObjective(Objective):
    """A loss of lists of answers, the best first, of any sizes. Means are over lists, whatever their sizes."""

    def __init__(self, config: Config) -> None:
        self.head = {"memory_budget": config.memory_budget or None}
        self.options = _options(config)
        terms = list_objective(**{name: x for name, x in self.options.items() if name != "grad_filter"}).terms
        if config.label_smoothing:
            raise wrong("label_smoothing", f"{config.label_smoothing}", "0, for losses of lists have none")
        self.takes_scores = any({"scores", "worse"} & set(term.loss.inputs) for term in terms)
        self.scored = [term.loss.name for term in terms if "scores" in term.loss.needs]
        self.shares, self.one_size = config.share_prompt, config.share_prompt and config.micro_batch > 1
        self.first: Record | None = None

    def expect(self, record: Record) -> None:
        _expect(record, len(record.answers) > 1, "two or more, of which one is better than another")
        if self.scored and record.scores is None:
            raise ValueError(f"data: {record.where}: got no scores, expected one of each answer, which {self.scored} "
                             "needs")  # fmt: skip
        self.first = self.first or record
        sizes = [len(x.answers) for x in (record, self.first)]
        if self.one_size and sizes[0] != sizes[1]:
            raise ValueError(f"share_prompt: {record.where} has {sizes[0]} answers and {self.first.where} {sizes[1]}, "
                             "expected lists of one size; or set micro_batch = 1, or share_prompt = false")  # fmt: skip

    def score(self, model: nn.Module, batch: Batch, ref_logps: Tensor | None, reduction: str = "mean") -> Scored:
        columns: Mapping[str, Tensor | None] = {
            "margin": batch.margin, "list_weight": batch.weight, "scores": self._scores(batch),
        }  # fmt: skip
        out = model_list_loss(
            model, batch.inputs, batch.labels, sizes=batch.sizes, interleaved=True, ref_logps=ref_logps,
            reduction=reduction, share_prompt=self.shares, **self.head, **self.options, **_present(columns),
        )  # fmt: skip
        return Scored(out.loss, _list_values(out, batch))

    def logps(self, model: nn.Module, batch: Batch) -> Tensor:
        shared = {"share_prompt": True, "answers": batch.sizes[0]} if self.shares else {}
        return _sums(model, batch.inputs, batch.labels, **self.head, **shared)

    def _scores(self, batch: Batch) -> Tensor | None:
        """The scores, if the loss looks at them: where a record has none, any that fall from answer to answer."""
        if batch.scores is None or not self.takes_scores:
            return None
        falling = -torch.arange(len(batch.scores), device=batch.scores.device, dtype=batch.scores.dtype)
        return torch.where(batch.scores.isnan(), falling, batch.scores)


class UnpairedObjective(Objective):
    """A loss of single answers, each marked good or bad; of `kto` with a mismatched answer to the same prompt behind.

    Means are over the records of a micro-batch; so is the KL of `kto`, which a rank does not share with the others. The
    reward shift of `bco` is the mean of all rewards of the steps before, on all ranks: how a step is cut into
    micro-batches does not tell.
    """

    def __init__(self, config: Config) -> None:
        if len(config.loss_type) > 1 or config.loss_weights:
            raise wrong("loss_type", f"{config.loss_type} with {config.loss_weights}", "one loss of single answers")
        (self.name,) = config.loss_type
        needs = UNPAIRED_LOSSES[self.name].needs
        if config.share_prompt:
            raise wrong("share_prompt", "True", f"False: {self.name} has one answer to a prompt")
        if config.label_smoothing:
            raise wrong("label_smoothing", f"{config.label_smoothing}", f"0, for {self.name} has none")
        self.mismatches = "kl" in needs
        self.rewards = RunningMean() if "reward_shift" in needs else None
        self.head = {"memory_budget": config.memory_budget or None}
        self.filter, self.beta, self.options = config.filter, config.beta, config.loss_options

    def expect(self, record: Record) -> None:
        _expect(record, record.label is not None, "a completion with a label")

    def score(self, model: nn.Module, batch: Batch, ref_logps: Tensor | None, reduction: str = "mean") -> Scored:
        n, kl = batch.records, None
        if self.mismatches:
            with torch.no_grad():
                kl = _sums(model, _rows(batch.inputs, n, None), batch.labels[n:], **self.head) - ref_logps[n:]
        own = _rows(batch.inputs, 0, n)
        logps = _sums(model, own, batch.labels[:n], grad_filter=self.filter, **self.head)
        shift = None if self.rewards is None else self.rewards.mean.to(logps.device)
        columns: Mapping[str, Tensor | None] = {"weight": batch.weight, "kl": kl, "reward_shift": shift}
        loss = unpaired_preference_loss(
            logps, ref_logps[:n], batch.good, loss_type=self.name, beta=self.beta, reduction=reduction, **self.options,
            **_present(columns),
        )  # fmt: skip
        rewards = self.beta * (logps - ref_logps[:n]).detach()
        nowhere = torch.full_like(rewards, math.nan)
        values = {
            "rewards/chosen": rewards.where(batch.good, nowhere),
            "rewards/rejected": rewards.where(~batch.good, nowhere),
            "rewards/accuracies": ((rewards > 0) == batch.good).to(rewards.dtype),
            "logps/chosen": logps.detach().where(batch.good, nowhere),
            "logps/rejected": logps.detach().where(~batch.good, nowhere),
        }
        return Scored(loss, values)

    def logps(self, model: nn.Module, batch: Batch) -> Tensor:
        """The log-probs ``[N]`` of the answers in ``batch``, mismatched ones included."""
        return _sums(model, batch.inputs, batch.labels, **self.head)

    def advance(self, scored: Sequence[Scored], ranks: Ranks) -> None:
        """Take the step's rewards into their mean."""
        if self.rewards is not None:
            sides = ([each.values[f"rewards/{side}"] for each in scored] for side in ("chosen", "rejected"))
            mine = [x for side in sides for x in torch.cat(side).tolist() if not math.isnan(x)]
            self.rewards.update(torch.tensor([x for part in ranks.gathered(mine) for x in part]))

    def state_dict(self) -> dict[str, Any]:
        return {} if self.rewards is None else self.rewards.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.rewards is not None:
            self.rewards.load_state_dict(state)


def _sums(model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor, **options: Any) -> Tensor:
    return sequence_logps(model_logprob(model, inputs, labels, **options).logps, labels[:, 1:])


def _rows(inputs: Mapping[str, Tensor], first: int, last: int | None) -> dict[str, Tensor]:
    return {name: x[first:last] for name, x in inputs.items()}


def _options(config: Config) -> dict[str, Any]:
    """The options of a loss that several others may be added to."""
    options = {
        "loss_type": config.loss_type if len(config.loss_type) > 1 else config.loss_type[0],
        "beta": config.beta, "grad_filter": config.filter, **config.loss_options,
    }  # fmt: skip
    return options | {"loss_weights": config.loss_weights} if config.loss_weights else options


def _expect(record: Record, fits: bool, expected: str) -> None:
    single = record.label is not None
    if not fits:
        got = "a label" if single else f"{len(record.answers)} answer{'s' * (len(record.answers) != 1)}"
        raise ValueError(f"data: {record.where}: got {got}, expected {expected}, which the loss needs")


def _present(columns: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """What the data says of each record, where it does."""
    return {name: value for name, value in columns.items() if value is not None}


def _values(out: DPOLossOutput) -> dict[str, Tensor]:
    margins = out.chosen_rewards - out.rejected_rewards
    values = {
        "rewards/chosen": out.chosen_rewards,
        "rewards/rejected": out.rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).to(margins.dtype),
        "logps/chosen": out.chosen_logps,
        "logps/rejected": out.rejected_logps,
        "logps/accuracies": (out.chosen_logps > out.rejected_logps).to(margins.dtype),
    }
    return {name: value.detach() for name, value in values.items()}


def _list_values(out: SequenceLossOutput, batch: Batch) -> dict[str, Tensor]:
    """As of pairs: the first answer is chosen; of the others means, but that it must be above each of them."""
    rewards, logps, scores = (_by_record(x, batch.sizes) for x in (out.rewards, out.logps, batch.scores))

    def means(lists: Iterable[list[float]]) -> list[float]:
        return [sum(values) / len(values) for values in lists]

    columns = {
        "rewards/chosen": [values[0] for values in rewards],
        "rewards/rejected": means(values[1:] for values in rewards),
        "rewards/accuracies": [float(first_is_best(values)) for values in rewards],
        "rewards/ndcg": list(map(ndcg, rewards, scores)),
        "logps/chosen": [values[0] for values in logps],
        "logps/rejected": means(values[1:] for values in logps),
        "logps/accuracies": [float(first_is_best(values)) for values in logps],
        "logps/ndcg": list(map(ndcg, logps, scores)),
    }
    columns["rewards/margins"] = [a - b for a, b in zip(columns["rewards/chosen"], columns["rewards/rejected"])]
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}


def _by_record(values: Tensor | None, sizes: Sequence[int]) -> list[list[float]]:
    """A number of each answer, in blocks of all first, all second, ... answers, by the record that they are of."""
    found: list[list[float]] = [[] for _ in sizes]
    flat = iter([math.nan] * sum(sizes) if values is None else values.tolist())
    for place in range(max(sizes)):
        for record, size in zip(found, sizes):
            if place < size:
                record.append(next(flat))
    return found
