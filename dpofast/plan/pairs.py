"""The pairs schedule: a loss whose pairs decide alone, whole pairs at a time.

Logits, loss and both gradients of some pairs are made before the next pairs begin, so a cache need hold the
exponentials of these alone: three products wherever a budget holds the longest pair. The price is sums of the head's
gradient, in the accumulators' dtype, that live from the forward to the backward, and are read and written once for each
part of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from dpofast.backends._tensors import wide_dtype
from dpofast.plan import cost, cpu_cost
from dpofast.plan.choice import chosen
from dpofast.plan.cost import DataSheet
from dpofast.plan.schedule import Request, Schedule, ceil_div
from dpofast.plan.tiled import cached_columns, tiled_traits

WORTHWHILE = 0.95
"""The share of the ordinary schedule's predicted time that the pairs' must stay below: about the error of the two."""


class Pairs(NamedTuple):
    """How a loss runs by whole pairs."""

    schedule: Schedule  # of one part of the batch
    tokens: int  # at most, of a part
    kept_bytes: int  # from the forward to the backward: sums of d hidden, and of d weight where these are not it


def sums_bytes(request: Request) -> int:
    """Bytes of the sums of d hidden and d weight; d weight's are the gradient itself, if they have its dtype."""
    wide = wide_dtype(request.hidden_dtype, request.weight_dtype)
    head = 0 if request.weight_dtype == wide else request.n_vocab * request.n_hidden * wide.itemsize
    return head + request.to_hidden * request.n_tokens * request.n_hidden * wide.itemsize


def pairs_schedule(
    request: Request, ordinary: Schedule, backend: str, longest_pair: Callable[[], int], device: DataSheet
) -> Pairs | None:
    """The pairs schedule where it is predicted to be faster than the ``ordinary`` one.

    ``longest_pair`` counts the tokens of the longest, and is asked only where there is something to gain.
    None as well for fp16, whose small gradients need the factor that scales a loss, which only its backward knows.
    """
    if not (request.to_weight and request.keeps) or torch.float16 in (request.hidden_dtype, request.weight_dtype):
        return None
    if ordinary.cached_share == 1:
        return None
    kept, longest, parts = sums_bytes(request), longest_pair(), 2
    while parts <= 2 * request.n_tokens:
        tokens = max(longest, ceil_div(request.n_tokens, parts))
        found = _cached(request, backend, tokens, kept, device)
        if found is not None:
            limit = WORTHWHILE * _seconds(request, backend, ordinary, device)
            return found if _seconds_by_pairs(request, backend, found, device) < limit else None
        if tokens == longest:
            return None
        parts += max(1, parts // 2)
    return None


def _cached(request: Request, backend: str, tokens: int, kept: int, device: DataSheet) -> Pairs | None:
    """The schedule that keeps all exponentials of ``tokens`` tokens, if that fits beside what is kept."""
    picked = tokens * request.n_hidden * request.hidden_dtype.itemsize
    left = request.budget - kept - picked
    if left <= 0:
        return None
    part = request._replace(n_tokens=tokens, budget=left, entropy=False, filters=False)  # sums are exact
    try:
        schedule = chosen(part, backend, device=device)
    except ValueError:
        return None
    return Pairs(schedule, tokens, kept) if schedule.cached_share == 1 else None


def _seconds(request: Request, backend: str, schedule: Schedule, device: DataSheet) -> float:
    if backend.startswith("cpu:"):
        isa = backend.partition(":")[2]
        return cpu_cost.cost(request, schedule, isa, cpu_cost.nominal(request, isa)).seconds
    traits = tiled_traits(backend, request.hidden_dtype, request.weight_dtype)
    columns, _ = cached_columns(schedule, request.n_tokens, request.n_vocab, traits.elem)
    return sum(cost.seconds(device, schedule, columns, request, traits))


def _seconds_by_pairs(request: Request, backend: str, pairs: Pairs, device: DataSheet) -> float:
    parts = request.n_tokens / pairs.tokens
    one = _seconds(request._replace(n_tokens=pairs.tokens), backend, pairs.schedule, device)
    acc = wide_dtype(request.hidden_dtype, request.weight_dtype).itemsize
    moved = request.n_vocab * request.n_hidden * (2 * acc * parts + acc + request.weight_dtype.itemsize)
    on_cpu = backend.startswith("cpu:")
    return parts * one + moved / (cpu_cost.NOMINAL.bandwidth if on_cpu else device.bandwidth)
