"""How well numbers order the answers of a list: whether the best answer is ahead, and nDCG."""

from __future__ import annotations

import math
from collections.abc import Sequence


def first_is_best(values: Sequence[float]) -> bool:
    """Whether the first value is above all others; a tie is not."""
    return values[0] > max(values[1:])


def ndcg(values: Sequence[float], scores: Sequence[float]) -> float:
    """nDCG of the order that ``values`` give to answers that are as good as ``scores``, in [0, 1].

    ``DCG / ideal DCG``, ``DCG = sum_i (2^score_i - 1) / log2(1 + rank_i)``, the ideal one by the scores themselves.
    Equal values share their ranks: each has the mean discount of these, which is the mean over all ways to break the
    ties (McSherry and Najork, 2008). So an order that says nothing is worth what a random one is.

    Returns:
        nan for scores of which none is above 0 or one is below, where there is no such share, and where one is nan.

    >>> round(ndcg([0.1, 0.7, 0.3], [2.0, 1.0, 0.0]), 4)
    0.6885
    >>> ndcg([3.0, 2.0, 1.0], [2.0, 1.0, 0.0])
    1.0
    """
    if any(map(math.isnan, values)) or not all(score >= 0 for score in scores) or not any(scores):
        return math.nan
    gains = [math.expm1(score * math.log(2)) for score in scores]
    ideal = math.fsum(gain * _discount(place) for place, gain in enumerate(sorted(gains, reverse=True)))
    found = []
    for value, gain in zip(values, gains, strict=True):
        above, level = sum(x > value for x in values), sum(x == value for x in values)
        found.append(gain * math.fsum(map(_discount, range(above, above + level))) / level)
    return math.fsum(found) / ideal


def _discount(place: int) -> float:
    """Of a place from 0."""
    return 1 / math.log2(place + 2)
