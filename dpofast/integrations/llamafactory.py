"""LLaMA-Factory's DPO training (``stage: dpo``) on dpofast: one method of its trainer replaced.

`CustomDPOTrainer.concatenated_forward` turns a batch into log-probabilities, through logits of the whole vocabulary in
fp32. `patch` puts one in its place that never makes them. Losses, metrics, data and checkpoints stay LLaMA-Factory's,
and so do the numbers, up to rounding in fp32. With a 16-bit model they are closer to the exact ones: LLaMA-Factory
rounds each logit to 16 bits before the softmax, `linear_logprob` does not.

With ``share_prompt=True`` it also runs the prompt of each pair once, in policy and reference: see
docs/shared_prompt.md. Two logged numbers are then others: LLaMA-Factory's mean logits (``logits/chosen`` and
``logits/rejected``) count padding, where shared rows have no hidden states.

For its command line, a file of three lines takes the place of ``llamafactory-cli train``, with the same arguments::

    from dpofast.integrations.llamafactory import patch
    from llamafactory.train.tuner import run_exp
    patch(), run_exp()

Importing this module patches nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from llamafactory.extras.env import VERSION
from llamafactory.train.dpo.trainer import CustomDPOTrainer
from llamafactory.train.trainer_utils import get_batch_logps
from torch import Tensor, nn

from dpofast.checks import flag
from dpofast.integrations.models import HeadInputs, head_inputs
from dpofast.integrations.models import share_prompt as sharing
from dpofast.integrations.models.sharing import check_refuse
from dpofast.primitive import linear_logprob
from dpofast.sequences import sequence_logps

__all__ = ["patch", "patched", "unpatch"]

_FORWARD = ("self", "model", "batch", "is_ref_model")
_LOGPS = ("logits", "labels", "label_pad_token_id", "ld_alpha")
_AVERAGING = ("ipo", "orpo", "simpo")
"""Losses of which LLaMA-Factory divides by the number of tokens."""


def _concatenated_forward(
    self: CustomDPOTrainer, model: nn.Module, batch: Mapping[str, Tensor], is_ref_model: bool = False
) -> dict[str, Tensor]:
    """Stands where LLaMA-Factory's method stands."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"][:, 1:]
    head = head_inputs(model, **inputs, return_dict=True)
    logps = linear_logprob(
        head.hidden[:, :-1], head.weight, labels, bias=head.bias, logit_scale=head.logit_scale, softcap=head.softcap
    ).logps
    means = _mean_logits(head)
    ld_alpha = None if is_ref_model else self.ld_alpha
    sums = sequence_logps(logps, labels, ld_alpha=ld_alpha)
    averages = sequence_logps(logps, labels, ld_alpha=ld_alpha, average=True)
    chosen, rejected = (averages if self.loss_type in _AVERAGING else sums).chunk(2)
    return {
        "chosen_logps": chosen,
        "rejected_logps": rejected,
        "chosen_logits": means.chunk(2)[0],  # the trainer only averages them, for its log
        "rejected_logits": means.chunk(2)[1],
        "chosen_logps_avg": averages.chunk(2)[0],
    }


def _with_shared_prompts(refuse: str) -> Callable[..., dict[str, Tensor]]:
    def forward(
        self: CustomDPOTrainer, model: nn.Module, batch: Mapping[str, Tensor], is_ref_model: bool = False
    ) -> dict[str, Tensor]:
        with sharing(model, refuse=refuse):
            return _concatenated_forward(self, model, batch, is_ref_model)

    return forward


@torch.no_grad()
def _mean_logits(head: HeadInputs) -> Tensor:
    """A tensor of each sequence whose mean is that of its logits, at prompt and padding too, as the trainer logs it."""
    if head.softcap is None:  # the mean of a product is the product of the means
        of_vocabulary = head.weight.float().mean(0)
        offset = 0.0 if head.bias is None else head.bias.float().mean()
        return head.logit_scale * (head.hidden.float().mean(1) @ of_vocabulary + offset)
    return linear_logprob(
        head.hidden, head.weight, torch.zeros(head.hidden.shape[:-1], dtype=torch.long, device=head.hidden.device),
        bias=head.bias, ignore_index=None, logit_scale=head.logit_scale, softcap=head.softcap, outputs=("mean_logits",),
    ).mean_logits  # fmt: skip


def _check(what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise ImportError(
            f"llamafactory {VERSION}: expected {what} {expected}; found {found}. dpofast is tested with llamafactory "
            "0.9.5 and cannot replace what it does not know; look for a newer dpofast, or train without patch()"
        )


_original: list[Callable[..., Any]] = []


def patch(*, share_prompt: bool = False, refuse: str = "error") -> None:
    """Let LLaMA-Factory's DPO trainer compute its log-probabilities with dpofast, trainers that exist included.

    A model whose head is sharded (ZeRO-3, FSDP) or quantised is refused when it is first run, with a ValueError that
    says what to do; see `dpofast.integrations.models.head_inputs`. LLaMA-Factory's DPO leaves out the loss of a
    mixture's routers, and so does this.

    Args:
        share_prompt: also run what a chosen and a rejected sequence begin with once. It may be added by a second call.
        refuse: of models and batches that have no shared form, as in `dpofast.integrations.models.share_prompt`:
            "error" raises at the first step, "warn" warns once and runs them unshared.

    Raises:
        ImportError: the installed LLaMA-Factory is one whose trainer this dpofast does not know; nothing is patched.
        ValueError: a refuse of another name.
    """
    flag("share_prompt", share_prompt)
    check_refuse(refuse)
    if not _original:
        forward = CustomDPOTrainer.concatenated_forward
        _check("concatenated_forward to take", tuple(inspect.signature(forward).parameters), _FORWARD)
        _check("get_batch_logps to take", tuple(inspect.signature(get_batch_logps).parameters), _LOGPS)
        _check("concatenated_forward calling get_batch_logps:", "get_batch_logps" in forward.__code__.co_names, True)
        _original.append(forward)
        CustomDPOTrainer.concatenated_forward = _concatenated_forward
    if share_prompt:
        CustomDPOTrainer.concatenated_forward = _with_shared_prompts(refuse)


def unpatch() -> None:
    """Put back what `patch` replaced."""
    while _original:
        CustomDPOTrainer.concatenated_forward = _original.pop()


@contextmanager
def patched(*, share_prompt: bool = False, refuse: str = "error") -> Iterator[None]:
    """`patch` for the length of a ``with``; inside an outer `patch` or `patched` it changes nothing."""
    if _original:
        yield
        return
    patch(share_prompt=share_prompt, refuse=refuse)
    try:
        yield
    finally:
        unpatch()
