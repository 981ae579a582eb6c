"""Gradients from the entries of the softmax that matter: how small an entry must be to be left out, and for whom.

The gradient of a token's log-prob by its logits is ``onehot(label) - p``, and nearly all of ``p`` sits in few entries
of the vocabulary. With a cut c those are kept whose probability is more than ``c * (1 - p[label])``, and the label's.
The sum of the others, the dropped mass, is given back to all entries, in the shares in which some tokens of the batch
dropped it. What that costs:

- Let d be the dropped mass as a share of ``1 - p[label]``. Each dropped entry is at most c of that, and their sum is d
  of it: so its 2-norm is at most ``sqrt(c * d)`` of that of the gradient of a token's logits.
- d is at most `TOLERANCE`: a token with more, whose distribution is flat, keeps everything.
- The squares of the shares add up to at most ``c / TOLERANCE``, with some equal parts if they must. So what is given
  back is no longer either, and the error is at most ``2 * sqrt(c * TOLERANCE)`` of the gradient for every token: 5.5e-3
  with the cut of bfloat16, which rounds one entry by up to 3.9e-3.

On a GPU whole tiles are left out, within the same bound: see `square_budget` and `dpofast.kernels.linear_skip`.

What that makes of d hidden and d weight, beside plain PyTorch in the same dtype, was measured: see docs/filter.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 2.0**-3
"""The largest dropped mass, as a share of what the label leaves to the others, of a token that is filtered."""

AUTO = {torch.bfloat16: 2.0**-14, torch.float16: 2.0**-18}
"""The cuts of ``grad_filter="auto"``: errors of d hidden and d weight below half of plain PyTorch's in the dtype of the
gradients. In fp32 and fp64 half of the vocabulary would be kept, which costs more than everything: they are exact."""
WITH_SOFTCAP = 2.0**-2
"""The cut under a softcap, where the dropped mass is not given back, as a share of the other."""


def cut_of(grad_filter: float | str | None, hidden: torch.dtype, weight: torch.dtype, softcap: float) -> float:
    """The cut that an option means; 0: gradients are exact."""
    if grad_filter is None:
        return 0.0
    if grad_filter != "auto":
        return float(grad_filter)
    cut = min(AUTO.get(hidden, 0.0), AUTO.get(weight, 0.0))
    return cut * WITH_SOFTCAP if softcap else cut


def square_budget(cut: float, tiles: int) -> float:
    """What masses that a token drops may be, squared and added up, where whole tiles of a row are dropped.

    As a share of ``(1 - p[label])^2``: the square of the bound on the 2-norm above. With no more than this, the sum of
    as many masses as there are ``tiles`` is at most `TOLERANCE`.
    """
    return min(cut * TOLERANCE, TOLERANCE**2 / tiles)


LEVELS = 16
"""Thresholds to choose from, each sqrt(1/2) of the one before, from the root of the budget on."""


def thresholds(masses: Tensor, budget: float) -> Tensor:
    """The largest number [n] for which what is not more of a token's masses, squared and added up, is in the budget.

    Args:
        masses: of tiles, [n, tiles], as shares of what the label leaves to the others.
        budget: that of `square_budget`.
    """
    found = masses.new_zeros(len(masses))
    for k in reversed(range(LEVELS)):
        level = (budget * 2.0**-k) ** 0.5
        stays = (masses.square() * (masses <= level)).sum(1) <= budget
        found = torch.where(stays, level, found)
    return found


def ranked(z: Tensor, labels: Tensor) -> Tensor:
    """The vocabulary, int64 [V], by the mean probability that some tokens give to what is not their label.

    Args:
        z: [n, V], their logits, which are overwritten.
        labels: [n], int64, within the vocabulary.
    """
    z.scatter_(1, labels.unsqueeze(1), float("-inf"))
    z -= z.logsumexp(1, keepdim=True)
    return z.logsumexp(0).argsort(descending=True, stable=True)


def check_group(sharded: bool) -> None:
    """Raises where there is no filter."""
    if sharded:
        raise ValueError("grad_filter: not available with group (a head in slices); pass grad_filter=None")
