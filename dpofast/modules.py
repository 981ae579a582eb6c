"""The functions as `torch.nn.Module`: options at construction, tensors at the call.

Values of options are checked by the same code that checks them in a call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dpofast import functional, primitive, sequence_losses
from dpofast.functional import DPOLossOutput, dpo_loss, linear_dpo_loss
from dpofast.losses import UNPAIRED_LOSSES, RunningMean
from dpofast.primitive import LogprobOutput, linear_logprob
from dpofast.sequence_losses import SequenceLossOutput, linear_list_loss, linear_unpaired_loss

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from dpofast.options import LinearListOptions, LinearLossOptions, LinearUnpairedOptions, LogitsLossOptions

__all__ = ["DPOLoss", "LinearDPOLoss", "LinearListLoss", "LinearLogprob", "LinearUnpairedLoss", "RunningMean"]


class _Options(nn.Module):
    """Keeps the options, which are plain Python values, so that the module pickles and copies."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        for name, value in options.items():
            for x in value.values() if isinstance(value, Mapping) else (value,):
                if isinstance(x, Tensor):
                    raise TypeError(f"{name}: got a tensor, expected a plain value; pass tensors to forward()")
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _not_defaults(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options whose value is not the signature's default: what a module shows and passes on."""
    defaults = {name: p.default for name, p in inspect.signature(function).parameters.items()}
    return {name: x for name, x in options.items() if isinstance(x, Tensor) or x != defaults[name]}


class LinearLogprob(_Options):
    """`linear_logprob` as a module. Equivalent to ``linear_logprob(hidden, weight, labels, **options)``.

    Args:
        options: the keywords of `linear_logprob`, but bias.

    Raises:
        ValueError, TypeError: as `linear_logprob` does for its options; a tensor.

    >>> import torch
    >>> module = LinearLogprob(outputs=("entropy",))
    >>> module(torch.zeros(1, 4), torch.zeros(8, 4), torch.tensor([3])).entropy  # log 8
    tensor([2.0794])
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(options)
        primitive.check_options(**options)

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> LogprobOutput:
        return linear_logprob(hidden, weight, labels, bias=bias, **self.options)


class LinearDPOLoss(_Options):
    """`linear_dpo_loss` as a module. Equivalent to ``linear_dpo_loss(..., **options, **tensors)``.

    Args:
        options: the options of `linear_dpo_loss`, of the loss and of the head.

    Raises:
        ValueError, TypeError: as `linear_dpo_loss` does for its options; a tensor.

    >>> LinearDPOLoss(loss_type="ipo", beta=0.05)
    LinearDPOLoss(loss_type='ipo', beta=0.05)
    >>> LinearDPOLoss(beta=-1.0)
    Traceback (most recent call last):
    ValueError: beta: got -1.0, expected a finite number > 0
    """

    def __init__(
        self,
        *,
        loss_type: str | Sequence[str] = "sigmoid",
        beta: float | Mapping[str, Any] = 0.1,
        label_smoothing: float | Mapping[str, Any] = 0.0,
        reduction: str = "mean",
        memory_budget: int | str | None = None,
        backend: str = "auto",
        group: Any = None,
        sequence_group: Any = None,
        ignore_index: int = -100,
        **options: Unpack[LinearLossOptions],
    ) -> None:
        given = {
            "loss_type": loss_type, "beta": beta, "label_smoothing": label_smoothing, "reduction": reduction,
            "memory_budget": memory_budget, "backend": backend, "group": group, "sequence_group": sequence_group,
            "ignore_index": ignore_index,
        }  # fmt: skip
        super().__init__(_not_defaults(linear_dpo_loss, given) | options)
        functional.check_options(linear_dpo_loss, self.options)

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor, **tensors: Any) -> DPOLossOutput:
        """``tensors``: ref_logps, ref_hidden, ref_weight, bias, cu_seqlens, token_weights, and per-pair beta, margin,
        pair_weight."""
        return linear_dpo_loss(hidden, weight, labels, **{**self.options, **tensors})


class DPOLoss(_Options):
    """`dpo_loss` as a module. Equivalent to ``dpo_loss(logits, labels, **options, **tensors)``.

    Args:
        options: the options of `dpo_loss`.

    Raises:
        ValueError, TypeError: as `LinearDPOLoss` does.

    >>> import torch
    >>> logits, labels = torch.zeros(2, 1, 8), torch.tensor([[3], [1]])
    >>> DPOLoss()(logits, labels, ref_logits=logits).loss  # log 2
    tensor(0.6931)
    """

    def __init__(
        self,
        *,
        loss_type: str | Sequence[str] = "sigmoid",
        beta: float | Mapping[str, Any] = 0.1,
        label_smoothing: float | Mapping[str, Any] = 0.0,
        reduction: str = "mean",
        backend: str = "auto",
        sequence_group: Any = None,
        ignore_index: int = -100,
        **options: Unpack[LogitsLossOptions],
    ) -> None:
        given = {
            "loss_type": loss_type, "beta": beta, "label_smoothing": label_smoothing, "reduction": reduction,
            "backend": backend, "sequence_group": sequence_group, "ignore_index": ignore_index,
        }  # fmt: skip
        super().__init__(_not_defaults(dpo_loss, given) | options)
        functional.check_options(dpo_loss, self.options)

    def forward(self, logits: Tensor, labels: Tensor, **tensors: Any) -> DPOLossOutput:
        """``tensors``: ref_logps or ref_logits, cu_seqlens, token_weights, and per-pair beta, margin, pair_weight."""
        return dpo_loss(logits, labels, **{**self.options, **tensors})


class LinearListLoss(_Options):
    """`linear_list_loss` as a module. Equivalent to ``linear_list_loss(..., **options, **tensors)``.

    Args:
        options: the options of `linear_list_loss`, of the loss and of the head.

    Raises:
        ValueError, TypeError: as `linear_list_loss` does for its options; a tensor.

    >>> LinearListLoss(loss_type="plackett_luce", beta=0.2)
    LinearListLoss(loss_type='plackett_luce', beta=0.2)
    """

    def __init__(
        self,
        *,
        loss_type: str | Sequence[str] = "softmax_dpo",
        beta: float | Mapping[str, Any] = 0.1,
        reduction: str = "mean",
        memory_budget: int | str | None = None,
        backend: str = "auto",
        group: Any = None,
        sequence_group: Any = None,
        ignore_index: int = -100,
        **options: Unpack[LinearListOptions],
    ) -> None:
        given = {
            "loss_type": loss_type, "beta": beta, "reduction": reduction, "memory_budget": memory_budget,
            "backend": backend, "group": group, "sequence_group": sequence_group, "ignore_index": ignore_index,
        }  # fmt: skip
        super().__init__(_not_defaults(linear_list_loss, given) | options)
        sequence_losses.check_options(sequence_losses.list_objective, self.options)

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor, **tensors: Any) -> SequenceLossOutput:
        """``tensors``: sizes, interleaved, scores, ref_logps, ref_hidden, ref_weight, bias, cu_seqlens, token_weights,
        and per-list beta, margin, list_weight."""
        return linear_list_loss(hidden, weight, labels, **{**self.options, **tensors})


class LinearUnpairedLoss(_Options):
    """`linear_unpaired_loss` as a module. Equivalent to ``linear_unpaired_loss(..., **options, **tensors)``.

    BCO's reward shift, if none is passed at the call, is a `RunningMean` that the module keeps, ``reward_mean``; it is
    in the module's state.

    Args:
        options: the options of `linear_unpaired_loss`, of the loss and of the head.

    Raises:
        ValueError, TypeError: as `linear_unpaired_loss` does for its options; a tensor.

    >>> LinearUnpairedLoss(beta=0.2, desirable_weight=1.5)
    LinearUnpairedLoss(beta=0.2, desirable_weight=1.5)
    """

    def __init__(
        self,
        *,
        loss_type: str = "kto",
        beta: float = 0.1,
        reduction: str = "mean",
        memory_budget: int | str | None = None,
        backend: str = "auto",
        group: Any = None,
        sequence_group: Any = None,
        ignore_index: int = -100,
        **options: Unpack[LinearUnpairedOptions],
    ) -> None:
        given = {
            "loss_type": loss_type, "beta": beta, "reduction": reduction, "memory_budget": memory_budget,
            "backend": backend, "group": group, "sequence_group": sequence_group, "ignore_index": ignore_index,
        }  # fmt: skip
        super().__init__(_not_defaults(linear_unpaired_loss, given) | options)
        sequence_losses.check_options(sequence_losses.unpaired_objective, self.options)
        self.reward_mean = RunningMean() if "reward_shift" in UNPAIRED_LOSSES[loss_type].needs else None

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor, **tensors: Any) -> SequenceLossOutput:
        """``tensors``: is_chosen, kl, reward_shift, ref_logps, ref_hidden, ref_weight, bias, cu_seqlens, token_weights,
        and per-completion beta, sequence_weight."""
        kept = {} if self.reward_mean is None else {"reward_shift": self.reward_mean}
        return linear_unpaired_loss(hidden, weight, labels, **{**self.options, **kept, **tensors})
