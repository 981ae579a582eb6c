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

What that makes of d hidden and d weight, beside plain PyTorch in the same dtype, was measured: see docs/filter.md.
"""

from __future__ import annotations

import torch

TOLERANCE = 2.0**-3
"""The largest dropped mass, as a share of what the label leaves to the others, of a token that is filtered."""

AUTO = {torch.bfloat16: 2.0**-14, torch.float16: 2.0**-17}
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


def check_backend(exact_backend: str, sharded: bool) -> None:
    """Raises where there is no filter."""
    if sharded:
        raise ValueError("grad_filter: not available with group (a head in slices); pass grad_filter=None")
    if exact_backend.partition(":")[0] != "cpu":
        raise ValueError(
            f"grad_filter: not available on backend {exact_backend!r}; pass grad_filter=None, or backend='cpu' with "
            "tensors there"
        )
