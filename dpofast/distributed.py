"""One problem on several processes, on `torch.distributed` as it is.

*Vocabulary-parallel*: each rank of a group has some rows of the head. It folds its own logits into the running
statistics of each token (`dpofast.contract.Stat`), seven numbers; these are gathered, merged in double and
finished, in the same order on every rank, so that every rank has the same bits. The backward makes its own logits
again, and the ranks' shares of d hidden are added up. What travels is O(tokens), never O(tokens x vocabulary).

*Sequence-parallel*: each rank has some tokens of every sequence; their sums are added up.

No collective depends on data that ranks may disagree about: before anything else they tell each other the facts of
their calls, a few integers, which is also how an error on one rank becomes an error on each.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpofast.backends.base import Problem
from dpofast.backends.torch import TorchPasses
from dpofast.contract import Stat

if dist.is_available():
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate, Shard


# Groups, and what their ranks tell each other


def group_name(group: Any, argument: str = "group") -> str:
    """The name of a process group, which is how an op is told of it.

    Args:
        group: a `torch.distributed.ProcessGroup` that this process is in, or a one-dimensional `DeviceMesh`.
    """
    if not dist.is_available():
        raise ValueError(f"{argument}: this PyTorch was built without torch.distributed; pass None")
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"{argument}: got a DeviceMesh of {group.ndim} dimensions, expected one; slice it: mesh['tp']"
            )
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{argument}: got {type(group).__name__}, expected a torch.distributed.ProcessGroup that this process is "
            "in, or a one-dimensional DeviceMesh"
        )
    return group.group_name


def _resolve(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, *x.shape], in the order of ranks."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.stack(parts)


_FACTS = 8  # in every exchange, so that a rank that fails early and one that does not are never at odds


def _exchange(name: str, facts: Mapping[str, int], error: Exception | None = None) -> dict[str, list[int]]:
    """Each rank's ``facts``, in the order of ranks; if any rank has an error, an error on all the others, too."""
    group = _resolve(name)
    on_cpu = "gloo" in dist.get_backend(group)
    device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
    numbers = [int(error is not None), *facts.values()]
    mine = torch.tensor(numbers + [0] * (_FACTS - len(numbers)), dtype=torch.int64, device=device)
    failed, *columns = _gather(mine, group).T.tolist()
    if any(failed):
        messages: list[str | None] = [None] * len(failed)
        dist.all_gather_object(messages, None if error is None else str(error), group=group)
        if error is None:
            rank = failed.index(1)
            raise ValueError(f"group: its rank {rank} refuses the call: {messages[rank]}")
    return dict(zip(facts, columns))


@contextmanager
def refusing_together(group: str | None) -> Iterator[None]:
    """Tells the other ranks of an error in its body, where they wait to exchange facts; None: nobody else is there."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if group is not None and not torch.compiler.is_compiling():
            _exchange(group, {}, error)
        raise


def _check_equal(facts: Mapping[str, list[int]], argument: str) -> None:
    for what, values in facts.items():
        for rank, value in enumerate(values):
            if value != values[0]:
                shown = f" ({values[0]} and {value})" if what.startswith("the number") else ""
                raise ValueError(
                    f"{argument}: its ranks 0 and {rank} differ in {what}{shown}, which must be the same on all of it"
                )


def _fingerprint(x: Tensor) -> int:
    """A number that differs, all but surely, where two integer tensors do."""
    flat = x.reshape(-1).long()
    odd = torch.arange(flat.numel(), device=x.device) * 0x5851F42D4C957F2D + 0x14057B7EF767814F
    return int((flat * odd).sum())


def _row_fingerprint(row: Tensor) -> int:
    """A number as `_fingerprint` makes it; 0 of a row that says nothing, all of whose numbers are equal."""
    row = row.detach().double().cpu()
    return 0 if bool((row == row[0]).all()) else 1 + zlib.crc32(row.numpy().tobytes())


@torch.library.custom_op("dpofast::vocabulary_bounds", mutates_args=())
def vocabulary_bounds(labels: Tensor, weight: Tensor, options: str, group: str) -> Tensor:
    """[ranks + 1], on the CPU: the vocabulary number of each rank's first row of the head, then the vocabulary's size.

    Raises on every rank if their calls do not belong together.
    """
    n_rows = weight.shape[0]
    facts = _exchange(group, {
        "rows": n_rows,
        "first": _row_fingerprint(weight[0]) if n_rows else 0,
        "last": _row_fingerprint(weight[-1]) if n_rows else 0,
        "the number of positions": labels.numel(),
        "the options, dtypes or gradients wanted": zlib.crc32(options.encode()),
        "the labels": _fingerprint(labels),
    })  # fmt: skip
    rows, first, last = (facts.pop(name) for name in ("rows", "first", "last"))
    try:
        _check_equal(facts, "group")
    except ValueError as error:
        raise ValueError(
            f"{error}: each has a slice of the head, and all have the same tokens. Where each rank has tokens of its "
            "own, as in data-parallel training and FSDP, the head has to be gathered: "
            "dpofast.integrations.models.model_logprob does that"
        ) from None
    ends = list(zip(first, last))
    for rank, both in enumerate(ends):
        if all(both) and both in ends[:rank]:
            raise ValueError(
                f"group: its ranks {ends.index(both)} and {rank} have the same rows of weight (of {rows[rank]}, the "
                "first and the last are equal); pass each rank a slice of the head of its own, or the whole head and "
                "group=None"
            )
    if not sum(rows):
        raise ValueError("weight: no rank of the group has a row of it")
    return torch.tensor([0, *rows]).cumsum(0)


@vocabulary_bounds.register_fake
def _(labels, weight, options, group):
    return torch.empty(dist.get_world_size(_resolve(group)) + 1, dtype=torch.int64)


# Vocabulary-parallel


def is_dtensor(x: Any) -> bool:
    return dist.is_available() and isinstance(x, DTensor)


def local_head(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, group: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Any]:
    """Plain tensors and the group, of a head that is a DTensor with its rows sharded; nothing is gathered.

    Raises:
        ValueError: a head that is sharded otherwise, or tensors beside it that do not go with it.
    """
    mesh = weight.device_mesh
    replicated = [Replicate()] * mesh.ndim

    def whole(name: str, x: Tensor | None) -> Tensor | None:
        if x is None or not is_dtensor(x):
            return x
        if list(x.placements) != replicated or x.device_mesh != mesh:
            raise ValueError(
                f"{name}: got a DTensor with placements {x.placements}, expected a tensor that every rank has, as "
                f"weight's rows are sharded; pass {name}.redistribute(weight.device_mesh, {replicated})"
            )
        return x.to_local(grad_placements=replicated)

    if mesh.size() == 1:
        return whole("hidden", hidden), weight.to_local(), whole("labels", labels), whole("bias", bias), group
    several = [i for i in range(mesh.ndim) if mesh.size(i) > 1]
    placement = weight.placements[several[0]]
    if len(several) != 1 or type(placement) is not Shard or placement.dim != 0:
        raise ValueError(
            f"weight: got a DTensor with placements {weight.placements} on a mesh of shape {tuple(mesh.shape)}; "
            "expected its rows, Shard(0), on one dimension of several devices and no other. Pass weight.to_local() and "
            "group=, or weight.full_tensor()"
        )
    found = mesh.get_group(several[0])
    if group is not None and group_name(group) != found.group_name:
        raise ValueError("group: not the one that weight, a DTensor, is sharded over; leave it out")
    if bias is not None and (not is_dtensor(bias) or bias.placements != weight.placements):
        raise ValueError("bias: expected a DTensor with the placements of weight, which is one")
    bias = None if bias is None else bias.to_local()
    return whole("hidden", hidden), weight.to_local(), whole("labels", labels), bias, found


def plain_head(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, group: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, str | None]:
    """Plain tensors and the group's name, of a head that may be a DTensor; None: this process has all of it."""
    if is_dtensor(weight):
        hidden, weight, labels, bias, group = local_head(hidden, weight, labels, bias, group)
    return hidden, weight, labels, bias, None if group is None else group_name(group)


_BEYOND = 1 << 40  # stands for any label after a slice: none reaches into what a kernel pads


def _local(labels: Tensor, start: int, n_rows: int) -> Tensor:
    """Labels as a slice's own row numbers: -1 of one before the slice, far beyond its rows of one after it."""
    local = labels - start
    return torch.where(local < 0, -1, torch.where(local < n_rows, local, _BEYOND))


def _merge(stats: Tensor, owner: Tensor) -> Tensor:
    """Statistics [Stat.COUNT, n] in double of those of the slices [ranks, Stat.COUNT, n]; ``owner`` has the label."""
    s, S = stats.double(), Stat
    largest = s[:, S.M].amax(0)
    shift = torch.where(s[:, S.M] == -torch.inf, 0.0, s[:, S.M] - largest)
    factor = torch.where(s[:, S.M] == -torch.inf, 0.0, shift.exp())
    out = torch.empty_like(s[0])
    out[S.M] = largest
    out[S.SUM] = (s[:, S.SUM] * factor).sum(0)
    out[S.SUM_X] = ((s[:, S.SUM_X] + shift * s[:, S.SUM]) * factor).sum(0)
    out[S.SUM_SQ] = (s[:, S.SUM_SQ] * factor.square()).sum(0)
    out[S.SUM_Z] = s[:, S.SUM_Z].sum(0)
    out[S.TOP_BEFORE] = s[:, S.TOP_BEFORE].amax(0)
    out[S.Z_LABEL] = s[:, S.Z_LABEL].gather(0, owner.unsqueeze(0)).squeeze(0)
    return out


def slice_of_head(problem: Problem, bounds: Tensor, group: str) -> Problem:
    """``problem``, whose weight is this rank's rows of the head, with labels that count from the first of them."""
    start = int(bounds[dist.get_rank(_resolve(group))])
    return problem._replace(labels=_local(problem.labels, start, problem.n_vocab))


def finish(
    stats: Tensor | None, problem: Problem, bounds: Tensor, group: str, outputs: tuple[str, ...]
) -> dict[str, Tensor]:
    """The results of the whole head from every rank's statistics of its slice; None: this one has no rows."""
    passes, labels = TorchPasses(), problem.labels
    if stats is None:
        stats = passes.new_stats(problem.n_tokens, problem.wide, problem.hidden.device)
    owner = torch.searchsorted(bounds[1:].to(labels.device), labels, right=True).clamp_(max=bounds.numel() - 2)
    merged = _merge(_gather(stats, _resolve(group)), owner)
    return passes.finish(merged, labels, int(bounds[-1]), outputs)


def add_up(x: Tensor, group: str) -> None:
    """The sum of every rank's ``x``, in its place."""
    dist.all_reduce(x, group=_resolve(group))


# Sequence-parallel


def agree_on_sequences(group: str, n_sequences: int, options: str) -> None:
    """An error on every rank, where they are about to add up different things."""
    if not torch.compiler.is_compiling():
        facts = {"the number of sequences": n_sequences, "the options": zlib.crc32(options.encode())}
        _check_equal(_exchange(group, facts), "sequence_group")


@torch.library.custom_op("dpofast::sum_over_ranks", mutates_args=())
def sum_over_ranks(x: Tensor, group: str) -> Tensor:
    """The sum of every rank's ``x``. Its gradient goes to each rank's own, as every rank has the same loss of it."""
    total = x.clone()
    dist.all_reduce(total, group=_resolve(group))
    return total


sum_over_ranks.register_fake(lambda x, group: torch.empty_like(x))
sum_over_ranks.register_autograd(lambda ctx, grad: (grad, None))


@torch.library.custom_op("dpofast::sum_over_earlier_ranks", mutates_args=())
def sum_over_earlier_ranks(x: Tensor, group: str) -> Tensor:
    """The sum of ``x`` of the ranks before this one in the group; integers, without gradient."""
    ranks = _resolve(group)
    return _gather(x, ranks)[: dist.get_rank(ranks)].sum(0)


sum_over_earlier_ranks.register_fake(lambda x, group: torch.empty_like(x))
