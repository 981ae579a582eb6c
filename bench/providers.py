"""Who does the head's work: dpofast, plain PyTorch, other libraries, and the bare products that all of them need.

A provider is a function of hidden states, weight and labels that returns a loss, so that its backward is measured, too.
An optional library is imported when its provider is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import dpofast
from dpofast.bench.workloads import IGNORE

Provider = Callable[[Tensor, Tensor, Tensor], Tensor]
BETA = 0.1  # of DPO's loss


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


def trl_logps(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(h, w, None, y, 1.0, 32768, None, 1.0, ())[0]


def _trl(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return -trl_logps(h, w, y.clamp(min=0))[y != IGNORE].sum()


def _liger(h: Tensor, w: Tensor, y: Tensor, pairs: int = 1) -> Tensor:
    """DPO without a reference, by default of halves as a pair: the loss that has its head fused."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    n = len(y) // (2 * pairs)
    h, y = (x[: 2 * pairs * n].view(2 * pairs, n, *x.shape[1:]) for x in (h, y))
    # Compiled is its default; on a CPU here that takes longer than what it saves.
    return LigerFusedLinearDPOLoss(ignore_index=IGNORE, beta=BETA, use_ref_model=False, compiled=h.is_cuda)(w, h, y)[0]


def _cut_cross_entropy(h: Tensor, w: Tensor, y: Tensor, filter_eps: str | None = "high") -> Tensor:
    """By default it leaves out gradients of probabilities below 2**-12; on a CPU it has no code that does."""
    from cut_cross_entropy import linear_cross_entropy

    options = {"impl": "cce", "filter_eps": filter_eps} if h.is_cuda else {"impl": "torch_compile"}
    return linear_cross_entropy(h, w, y, reduction="sum", ignore_index=IGNORE, **options)


def _cut_cross_entropy_exact(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """What its later versions call "cce_exact": nothing is left out."""
    return _cut_cross_entropy(h, w, y, None)


def _liger_cross_entropy(h: Tensor, w: Tensor, y: Tensor, reduction: str = "sum") -> Tensor:
    """The cross entropy summed over all tokens. A preference loss needs more: its gradients are made in the forward."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(h, w, y, ignore_index=IGNORE, reduction=reduction)


def _liger_per_token(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """A cross entropy for each token, whose gradients can differ: logits are made again for them."""
    return _liger_cross_entropy(h, w, y, "none").sum()


def _torch_linear_cross_entropy(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.linear_cross_entropy(h, w, y, reduction="sum", ignore_index=IGNORE)


def _torch_chunked(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """The same with its chunks, which are for those who ask. Gradients of a sum are made in the forward; these not."""
    each = F.linear_cross_entropy(
        h, w, y, reduction="none", ignore_index=IGNORE, options=torch.nn.LinearCrossEntropyOptions()
    )
    return each.sum()


def _compiled(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return torch.compile(_plain_of_all, fullgraph=True, dynamic=True)(h, w, y)


def _plain_of_all(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return -plain_logps(h, w, y.clamp(min=0)).masked_fill(y == IGNORE, 0).sum()


def told(provider: Provider) -> Provider:
    """With the mask applied before the head, which some trainers do."""

    def only_those(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        counts = y != IGNORE
        return provider(h[counts], w, y[counts])

    return only_those


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


EVERY, TOLD, DROPS = "every position", "told which tokens count", "drops ignored labels"
"""What a provider does with positions that do not count."""


class Contender(NamedTuple):
    """Who is compared, and in what it differs from the others."""

    name: str
    loss: Provider | None  # the negative sum of log-probs; None: the bare products
    mask: str = EVERY
    products: int = 3  # that its time is a ratio to
    frozen: bool = False
    summed: bool = True  # its gradients are those of the sum, so that they have an error
    device: str = ""  # the only kind it has code for
    twin: bool = False  # another is the same where no position is of a prompt
    once: bool = False  # prompts change nothing for it
    by_states: bool = False  # what it takes depends on the hidden states, or it stands for those with which it does not
    twice: bool = False  # of the bare products: logits are made twice


def _minus(**how) -> Provider:
    of = ours(**how)
    return lambda h, w, y: -of(h, w, y)


CONTENDERS = (
    Contender("torch.mm", None, TOLD, once=True),
    Contender("torch.mm, logits twice", None, TOLD, once=True, twice=True),
    Contender("plain PyTorch", _plain_of_all, by_states=True),
    Contender("plain PyTorch, told", told(_plain_of_all), TOLD, twin=True),
    Contender("plain PyTorch, compiled", _compiled),
    Contender("F.linear_cross_entropy", _torch_linear_cross_entropy),
    Contender("F.linear_cross_entropy, chunked", _torch_chunked),
    Contender("TRL", _trl, device="cpu"),  # as its trainer calls it; on a GPU that applies the mask
    Contender("TRL, told", told(_trl), TOLD, twin=True),
    Contender("Liger DPO", _liger, summed=False),
    Contender("Liger cross entropy, per token", _liger_per_token, device="cuda"),
    Contender("cut-cross-entropy", _cut_cross_entropy, DROPS, by_states=True),
    Contender("cut-cross-entropy, exact", _cut_cross_entropy_exact, DROPS, device="cuda"),
    Contender("dpofast", _minus(), DROPS, by_states=True),
    Contender("dpofast, auto", _minus(grad_filter="auto"), DROPS, by_states=True),
    Contender("dpofast, 32MiB", _minus(memory_budget="32MiB"), DROPS, once=True),
    Contender("dpofast, 256MiB", _minus(memory_budget="256MiB"), DROPS, once=True),
    Contender("dpofast, frozen", _minus(), DROPS, products=2, frozen=True, once=True),
)
BY_NAME = {contender.name: contender for contender in CONTENDERS}


def of_pairs(name: str, pairs: int) -> Provider:
    """DPO's loss without a reference, of so many pairs of sequences of one length: [chosen; rejected], packed."""
    if name == "Liger DPO":
        return lambda h, w, y: _liger(h, w, y, pairs)
    how = {"dpofast, auto": {"grad_filter": "auto"}, "dpofast, 32MiB": {"memory_budget": "32MiB"}, "dpofast": {}}
    if name in how:

        def fused(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
            rows = h.view(2 * pairs, -1, h.shape[-1]), w, y.view(2 * pairs, -1)
            return dpofast.linear_dpo_loss(
                *rows, ref_logps=h.new_zeros(2 * pairs, dtype=torch.float32), **how[name]
            ).loss

        return fused
    logps = {"plain PyTorch": plain_logps, "TRL, told": trl_logps}[name]

    def paired(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        chosen, rejected = logps(h, w, y).view(2 * pairs, -1).sum(-1).chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()

    return paired
