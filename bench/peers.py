"""Other libraries doing the same work: forward and backward of log-probs or of a loss, head trained.

Each is called as its users call it: on every position ("all"), or told which tokens count ("mask").
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

IGNORE = -100


def _plain(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    logps = F.linear(h, w).float().log_softmax(-1)
    return -logps.gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)[y != IGNORE].sum()


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
    """Of the sum of all tokens, which is not enough for a preference loss: its gradients are made in the forward."""
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
ON_GPU = PEERS | {
    "cut-cross-entropy, exact": _cut_cross_entropy_exact,
    "Liger, cross entropy of the sum": _liger_cross_entropy,
}


def times(states, rounds: int, ratio: Callable, products: Callable) -> dict[str, tuple[float, float]]:
    """``{row: (ratio to three torch.mm of the completion tokens, seconds)}``, bf16."""
    weight = states.weight.bfloat16()
    packed, packed_labels = states.completion
    three = products(packed.bfloat16(), weight, 3)
    rows = {}
    for name, head in PEERS.items():
        for which, hidden, labels in (("all", states.hidden, states.labels), ("mask", packed, packed_labels)):
            h, w = hidden.bfloat16().detach().requires_grad_(), weight.detach().requires_grad_()

            def run(head=head, h=h, w=w, labels=labels) -> None:
                h.grad = w.grad = None
                head(h, w, labels).backward()

            try:
                rows[f"peer {name}, {which}"] = ratio(run, three, max(2, rounds // 3))
            except (ImportError, AttributeError, RuntimeError, TypeError) as error:
                print(f"  peer {name}, {which}: not run ({type(error).__name__}: {str(error).splitlines()[0][:90]})")
    return rows
