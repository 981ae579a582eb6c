"""TRL's trainers on dpofast: one function replaced, so that everything the trainers do around it stays theirs.

TRL >= 1.15 gives its DPO, KTO, GRPO, RLOO and SFT trainers a fused head (`trl.trainer.utils.add_fused_lm_head`) that
calls one autograd function for log-probabilities and statistics. `patch` puts `linear_logprob` in its place. On the CPU
it also makes TRL drop prompt and padding before the product, which TRL itself does on a GPU only.

In TRL 1.8 to 1.10 the DPO and KTO trainers call a Liger loss object instead, with ``use_liger_kernel=True``; there
`patch` replaces these objects, for trainers that are built after it.

With ``grad_filter`` gradients are made from the entries of the softmax that matter: see docs/filter.md.

With ``share_prompt=True`` the DPO trainer also runs the prompt of each pair once, in policy and reference: see
`dpofast.integrations.models.share_prompt` and docs/shared_prompt.md.

The numbers are TRL's, up to rounding in fp32. With a 16-bit head they are closer to the exact ones: TRL rounds each
logit to 16 bits before the softmax, `linear_logprob` does not.

Importing this module patches nothing.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import CodeType, ModuleType
from typing import Any

import torch
import trl
from torch import Tensor
from trl import DPOTrainer as _TrlDPOTrainer

from dpofast import checks
from dpofast.integrations.liger import LigerFusedLinearDPOLoss, LigerFusedLinearKTOLoss
from dpofast.integrations.models.sharing import check_refuse
from dpofast.integrations.models.sharing import share_prompt as sharing
from dpofast.primitive import linear_logprob

__all__ = ["DPOTrainer", "patch", "patched", "unpatch"]

_ARGUMENTS = (
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)
"""What TRL's function takes, in order."""
_STATISTICS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
"""What it returns after the log-probabilities, in order; None where not asked for."""
_TESTED = (
    "dpofast goes by what it finds, not by the version, and is tested with trl 1.16 (fused head) and 1.9 (Liger loss). "
    "Look for a newer dpofast, or train without patch()"
)


class _LogprobFunction:
    """Stands where TRL's autograd function stands."""

    grad_filter: float | str | None = None

    @classmethod
    def apply(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,  # TRL's tile width; the planner chooses its own
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = _STATISTICS,
    ) -> tuple[Tensor | None, ...]:
        if type(weight.grad_fn).__name__ == "_ToTorchTensorBackward":
            raise ValueError(
                "weight: TRL gathered the head with DTensor.full_tensor, whose gradient is each rank's own and never "
                "averaged; shard the head with the model's last norm, fully_shard([norm, lm_head]) as accelerate does, "
                "and not by itself"
            )
        out = linear_logprob(
            hidden,
            weight,
            targets,
            bias=bias,
            ignore_index=None,  # TRL has removed the positions that do not count, or wants all of them
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=final_logit_softcapping,
            grad_filter=cls.grad_filter,
            outputs=tuple(name for name in _STATISTICS if name in outputs),
        )
        if hasattr(weight, "ds_id") and out.logps.requires_grad:
            out.logps.grad_fn.register_prehook(lambda _grads: _expect_gathered(weight))
        values = (out.logps, *(getattr(out, name) for name in _STATISTICS))
        # fp32 for every input, as TRL's
        return tuple(x.float() if x is not None and x.dtype == torch.float64 else x for x in values)


def _expect_gathered(weight: Tensor) -> None:
    """ZeRO-3 takes the head away when the forward ends, and an engine brings it back before the model's backward."""
    if weight.numel() == 0:
        raise RuntimeError(
            "weight: ZeRO-3 has not gathered the head for the backward; let the model's forward, run by its engine, "
            "gather it, and not deepspeed.zero.GatheredParameters around that"
        )


class _KTOLoss(LigerFusedLinearKTOLoss):
    """TRL asks for no reference where it has no separate reference model, which under PEFT is a slip of its own: it
    passes the hidden states of the model with its adapter disabled, and they must not be dropped."""

    def __init__(self, beta: float, use_ref_model: bool) -> None:
        super().__init__(beta=beta, use_ref_model=True)


def _replacements() -> list[tuple[ModuleType, str, Any]]:
    """What to set where, for the TRL that is installed, checked before anything is set."""
    utils = importlib.import_module("trl.trainer.utils")
    if hasattr(utils, "add_fused_lm_head"):
        return _fused_head(utils)
    trainers = [importlib.import_module(f"trl.trainer.{name}_trainer") for name in ("dpo", "kto")]
    names = ("LigerFusedLinearDPOLoss", "LigerFusedLinearKTOLoss")
    if not all(map(hasattr, trainers, names)):
        raise ImportError(
            f"trl {trl.__version__} has neither a fused head (trl.trainer.utils.add_fused_lm_head) nor, with "
            f"liger-kernel installed, a Liger loss, which are what dpofast can replace. {_TESTED}"
        )
    return [(trainers[0], names[0], LigerFusedLinearDPOLoss), (trainers[1], names[1], _KTOLoss)]


def _fused_head(utils: ModuleType) -> list[tuple[ModuleType, str, Any]]:
    function = getattr(utils, "_ChunkedLogProbFunction", None)
    if function is None or "_ChunkedLogProbFunction" not in _names(utils.add_fused_lm_head.__code__):
        raise ImportError(
            f"trl {trl.__version__}: expected add_fused_lm_head to call trl.trainer.utils._ChunkedLogProbFunction, "
            f"found that it does not (trl 1.15 has it only where Triton is installed). {_TESTED}"
        )
    _check_parameters("its log-prob function", function.forward, ("ctx", *_ARGUMENTS))
    replacements: list[tuple[ModuleType, str, Any]] = [(utils, "_ChunkedLogProbFunction", _LogprobFunction)]
    if hasattr(utils, "_use_triton"):  # trl 1.15 drops prompt and padding everywhere
        _check_parameters("_use_triton", utils._use_triton, ("device",))
        replacements.append((utils, "_use_triton", _drops_ignored(utils._use_triton)))
    return replacements


def _check_parameters(what: str, function: Callable[..., Any], expected: tuple[str, ...]) -> None:
    found = tuple(inspect.signature(function).parameters)
    if found != expected:
        raise ImportError(
            f"trl {trl.__version__}: expected {what} to take {', '.join(expected)}; found {', '.join(found)}. {_TESTED}"
        )


def _drops_ignored(use_triton: Callable[[torch.device], bool]) -> Callable[[torch.device], bool]:
    """TRL's question whether to drop positions that do not count: on the CPU too."""
    return lambda device: device.type == "cpu" or use_triton(device)


def _names(code: CodeType) -> set[str]:
    """The globals and attributes that a function and those inside it use."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))


_MODEL_CALLS = ("compute_loss", "compute_ref_log_probs")
"""The methods in which TRL's DPO trainer calls policy and reference; the second is of TRL >= 1.15."""


def _sharing_calls(refuse: str) -> list[tuple[type, str, Any]]:
    """TRL's DPO trainer with its models patched while it calls them."""
    return [
        (_TrlDPOTrainer, name, _with_shared_prompts(getattr(_TrlDPOTrainer, name), refuse))
        for name in _MODEL_CALLS
        if hasattr(_TrlDPOTrainer, name)
    ]


def _with_shared_prompts(method: Callable[..., Any], refuse: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def shared(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for model in (trainer.model, trainer.ref_model):
                if model is not None:
                    stack.enter_context(sharing(model, refuse=refuse))
            return method(trainer, *args, **kwargs)

    return shared


_originals: list[tuple[Any, str, Any]] = []


def _replace(replacements: Sequence[tuple[Any, str, Any]]) -> None:
    _originals.extend((owner, name, getattr(owner, name)) for owner, name, _ in replacements)
    for owner, name, value in replacements:
        setattr(owner, name, value)


def _filtering(grad_filter: float | str | None) -> list[tuple[type, str, Any]]:
    """What to set for trainers to filter gradients."""
    checks.grad_filter(grad_filter)
    if grad_filter is None:
        return []
    if not hasattr(importlib.import_module("trl.trainer.utils"), "add_fused_lm_head"):
        raise ImportError(
            f"trl {trl.__version__}: has no fused head (trl.trainer.utils.add_fused_lm_head), which grad_filter is an "
            "option of; pass grad_filter=None, or use trl 1.15 or later"
        )
    return [(_LogprobFunction, "grad_filter", grad_filter)]


def patch(*, share_prompt: bool = False, refuse: str = "error", grad_filter: float | str | None = None) -> None:
    """Let every TRL trainer compute its log-probabilities with dpofast. Once is enough; twice does no harm.

    With TRL >= 1.15 it counts for trainers that exist already, too: TRL looks its function up at each call.

    Args:
        share_prompt: let every DPO trainer also run what a chosen and a rejected sequence begin with once. It may be
            added by a second call.
        refuse: of models and batches that have no shared form, as in `dpofast.integrations.models.share_prompt`:
            "error" raises at the first step, "warn" warns once and runs them unshared.
        grad_filter: None (exact gradients), "auto" or a cut, as in `linear_logprob`; it may be added, or changed, by a
            second call. Log-probabilities and metrics stay exact; on a CPU only.

    Raises:
        ImportError: the installed TRL, whatever its version, has no function that this dpofast knows; nothing is
            patched.
        ValueError, TypeError: a refuse of another name; a grad_filter that `linear_logprob` would not take.
    """
    checks.flag("share_prompt", share_prompt)
    check_refuse(refuse)
    filtering = _filtering(grad_filter)
    replacements = [] if _originals else list(_replacements())
    replacements += filtering
    if share_prompt and _TrlDPOTrainer not in [owner for owner, _, _ in _originals]:
        replacements += _sharing_calls(refuse)
    _replace(replacements)


def unpatch() -> None:
    """Put back what `patch` replaced."""
    while _originals:
        setattr(*_originals.pop())


@contextmanager
def patched(
    *, share_prompt: bool = False, refuse: str = "error", grad_filter: float | str | None = None
) -> Iterator[None]:
    """`patch` for the length of a ``with``; inside an outer `patch` or `patched` it changes nothing."""
    if _originals:
        yield
        return
    patch(share_prompt=share_prompt, refuse=refuse, grad_filter=grad_filter)
    try:
        yield
    finally:
        unpatch()


class DPOTrainer(_TrlDPOTrainer):
    """TRL's DPOTrainer computing with dpofast, and no other trainer in the process.

    Same arguments, same numbers, same checkpoints; ``share_prompt``, ``refuse`` and ``grad_filter`` are as in `patch`,
    for this trainer. The backward needs no patch: autograd knows the op by then.
    """

    def __init__(
        self,
        *args: Any,
        share_prompt: bool = False,
        refuse: str = "error",
        grad_filter: float | str | None = None,
        **kwargs: Any,
    ) -> None:
        checks.flag("share_prompt", share_prompt)
        check_refuse(refuse)
        self._refuse = refuse if share_prompt else None
        self._filtering = _filtering(grad_filter)
        with patched():
            super().__init__(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(super().compute_loss.__func__, *args, **kwargs)

    def compute_ref_log_probs(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(super().compute_ref_log_probs.__func__, *args, **kwargs)

    def _call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A method of TRL's, with dpofast inside."""
        if self._refuse is not None:
            method = _with_shared_prompts(method, self._refuse)
        with patched(), ExitStack() as stack:
            for owner, name, value in self._filtering:
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, value)
            return method(self, *args, **kwargs)
