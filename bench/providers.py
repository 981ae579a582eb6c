"""Who does the head's work: dpofast, plain PyTorch, other libraries, and the bare products that all of them need.

A provider is a function of hidden states, weight and labels that returns a loss, so that its backward is measured, too.
An optional library is imported when its provider is called.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import dpofast
from dpofast.bench.workloads import IGNORE

Provider = Callable[[Tensor, Tensor, Tensor], Tensor]


class Products:
    """``torch.mm`` of a head's shapes: logits, d hidden, d weight; into fresh memory, or into memory that is there."""

    def __init__(self, hidden: Tensor, weight: Tensor, reuse: bool = False):
        grad = torch.randn(len(hidden), len(weight), device=hidden.device, dtype=hidden.dtype)
        made = (grad, hidden, weight)
        logits, d_hidden, d_weight = map(torch.empty_like, made) if reuse else (None, None, None)
        self.each: tuple[Callable[[], object], ...] = (
            lambda: torch.mm(hidden, weight.T, out=logits),
            lambda: torch.mm(grad, weight, out=d_hidden),
            lambda: torch.mm(grad.T, hidden, out=d_weight),
        )

    def first(self, count: int) -> Callable[[], None]:
        """One, two or three of them, in their order."""

        def run() -> None:
            for product in self.each[:count]:
                product()

        return run


def training_step(
    provider: Provider, hidden: Tensor, weight: Tensor, labels: Tensor, train_head: bool = True
) -> tuple[Callable[[], None], tuple[Tensor, Tensor]]:
    """One forward and backward, and the leaves that it leaves gradients at."""
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_(train_head)

    def run() -> None:
        h.grad = w.grad = None
        provider(h, w, labels).backward()

    return run, (h, w)


def ours(**how) -> Provider:
    """dpofast, with these keywords of `dpofast.linear_logprob`."""
    return lambda h, w, y: dpofast.linear_logprob(h, w, y, **how).logps.sum()


def plain_logps(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """What people write: the logits in the inputs' dtype, log-softmax in fp32."""
    return F.linear(h, w).float().log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)


def _plain(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return -plain_logps(h, w, y.clamp(min=0))[y != IGNORE].sum()


def _trl(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    logps, *_ = ChunkedLogProbFunction.apply(h, w, None, y.clamp(min=0), 1.0, 32768, None, 1.0, ())
    return -logps[y != IGNORE].sum()


def _liger(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """DPO without a reference on pairs of halves: the loss that has its head fused."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    half = len(y) // 2
    pairs = h[: 2 * half].view(2, half, -1)
    # Compiled is its default; on a CPU here that takes longer than what it saves.
    loss = LigerFusedLinearDPOLoss(ignore_index=IGNORE, use_ref_model=False, compiled=h.is_cuda)
    return loss(w, pairs, y[: 2 * half].view(2, half))[0]


def _cut_cross_entropy(h: Tensor, w: Tensor, y: Tensor, filter_eps: str | None = "high") -> Tensor:
    """By default it leaves out gradients of probabilities below 2**-12."""
    from cut_cross_entropy import linear_cross_entropy

    options = {"impl": "cce", "filter_eps": filter_eps} if h.is_cuda else {"impl": "torch_compile"}
    return linear_cross_entropy(h, w, y, reduction="sum", ignore_index=IGNORE, **options)


def _cut_cross_entropy_exact(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """What its later versions call "cce_exact": nothing is left out."""
    return _cut_cross_entropy(h, w, y, None)


def _liger_cross_entropy(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """The cross entropy summed over all tokens. A preference loss needs more: its gradients are made in the forward."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(h, w, y, ignore_index=IGNORE, reduction="sum")


def _torch_linear_cross_entropy(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.linear_cross_entropy(h, w, y, reduction="sum", ignore_index=IGNORE)


PEERS = {
    "plain PyTorch": _plain,
    "TRL": _trl,
    "Liger": _liger,
    "cut-cross-entropy": _cut_cross_entropy,
    "F.linear_cross_entropy": _torch_linear_cross_entropy,
}
PEERS_ON_GPU = PEERS | {
    "cut-cross-entropy, exact": _cut_cross_entropy_exact,
    "Liger, cross entropy of the sum": _liger_cross_entropy,
}
