"""Log-probabilities and preference losses of a whole model."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpofast import checks, losses
from dpofast.checks import wrong
from dpofast.functional import DPOLossOutput, linear_dpo_loss, objective_of, scoring_options
from dpofast.integrations.models.head import find
from dpofast.integrations.models.kinds import is_wrapped, unwrapped
from dpofast.integrations.models.probe import HeadInputs, head_inputs
from dpofast.integrations.models.sharing import share_prompt as sharing
from dpofast.integrations.models.wrapped import results_in_wrapper
from dpofast.primitive import LogprobOutput, linear_logprob
from dpofast.sequence_losses import SequenceLossOutput, check_options, linear_list_loss, list_objective

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from dpofast.options import LinearListOptions, LinearLossOptions


ModelLogprobOutput = namedtuple("ModelLogprobOutput", (*LogprobOutput._fields, "aux_loss"), defaults=(None,))
ModelLogprobOutput.__doc__ = "`LogprobOutput` of a model, and its aux_loss: a scalar, as in `HeadInputs`."


def model_logprob(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,
    *,
    temperature: float = 1.0,
    share_prompt: bool = False,
    answers: int = 2,
    **options: Any,
) -> ModelLogprobOutput:
    """Log-probabilities of ``labels`` under a model, shifted as its own loss shifts them.

    Equivalent to::

        logits = model(**inputs).logits[:, :-1]
        logps = logits.log_softmax(-1).gather(-1, labels[:, 1:, None])[..., 0]  # 0 where labels are -100

    Args:
        model: a causal language model, as in `find_head`.
        inputs: what it takes: ``{"input_ids": ..., "attention_mask": ...}``. With padding on the left a model with an
            embedding of positions (GPT-2) needs its ``position_ids``, here as in its own loss; there is a warning where
            they are missing.
        labels: ``[B, T]``, the input ids, with -100 at prompt and padding.
        temperature, options: as in `linear_logprob`, but bias, logit_scale and softcap, which are the model's.
        share_prompt: run what row i and row i + B begin with once, as the context `share_prompt` does; for a batch
            ``[chosen; rejected]`` of 2B rows, or
        answers: so many blocks of rows; of share_prompt only.

    Returns:
        `ModelLogprobOutput` of tensors ``[B, T - 1]``: position t is the log-probability of label t + 1. Of a mixture
        of experts with ``output_router_logits``, aux_loss as well, for you to add to your loss with its coefficient.

    Raises:
        ValueError, TypeError: as `head_inputs` and `linear_logprob`; with share_prompt, as `share_prompt`; answers
            without share_prompt.
    """
    _refuse_transform(options)
    if answers != 2 and not share_prompt:
        raise ValueError(f"answers: got {answers} without share_prompt, whose option it is; pass share_prompt=True")

    def compute(head: HeadInputs, targets: Tensor) -> ModelLogprobOutput:
        out = linear_logprob(
            head.hidden, head.weight, targets, bias=head.bias, temperature=temperature, logit_scale=head.logit_scale,
            softcap=head.softcap, **options,
        )  # fmt: skip
        return ModelLogprobOutput(*out)

    return _results(model, inputs, labels, compute, share_prompt, answers)


def model_dpo_loss(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,
    *,
    ref_model: nn.Module | None = None,
    ref_logps: Tensor | None = None,
    router_aux_loss_coef: float | None = None,
    share_prompt: bool = False,
    loss_type: str | Sequence[str] = "sigmoid",
    beta: float | Tensor | Mapping[str, Any] = 0.1,
    label_smoothing: float | Mapping[str, Any] = 0.0,
    reduction: str = "mean",
    memory_budget: int | str | None = None,
    backend: str = "auto",
    group: Any = None,
    sequence_group: Any = None,
    **options: Unpack[LinearLossOptions],
) -> DPOLossOutput:
    """A preference loss of a model and a batch ``[chosen; rejected]``.

    Equivalent to `dpofast.dpo_loss` of ``model(**inputs).logits[:, :-1]`` and ``labels[:, 1:]``, and for a mixture of
    experts with ``output_router_logits``, as in the model's own loss::

        loss = loss + router_aux_loss_coef * model(**inputs).aux_loss

    The loss is a mean over this batch's pairs. Who divides it by the number of accumulated batches differs between
    trainers: see docs/trainers.md.

    Args:
        model, inputs: as in `model_logprob`, 2B sequences.
        labels: ``[2B, T]``, the input ids, with -100 at prompt and padding.
        ref_model: the reference, run without gradient. None for a PEFT model: itself with its adapters disabled. Or
        ref_logps: of the reference, ``[2B, T - 1]`` as `model_logprob` returns them, or summed ``[2B]``.
        router_aux_loss_coef: of the routers' loss; None for the model's own coefficient, 0 for none of that loss.
        share_prompt: as in `model_logprob`, of the model and of its reference.
        loss_type, beta, label_smoothing, reduction, memory_budget, backend, group, sequence_group, options: as in
            `linear_dpo_loss`, but for the head's own: bias, logit_scale, softcap. token_weights are ``[2B, T - 1]``,
            one for each number that `model_logprob` returns.

    Both models are run as they are: dropout, if they have any, is yours to turn off.

    Returns:
        `DPOLossOutput`, with the routers' aux_loss where the model returns one.

    Raises:
        ValueError, TypeError: as `head_inputs` and `linear_dpo_loss`; with share_prompt, as `share_prompt`; a
            router_aux_loss_coef without an aux_loss, or an aux_loss without a coefficient.
    """
    _refuse_transform(options)
    _check_token_weights(options.get("token_weights"), labels)
    options |= {
        "loss_type": loss_type, "beta": beta, "label_smoothing": label_smoothing, "reduction": reduction,
        "memory_budget": memory_budget, "backend": backend, "group": group,
    }  # fmt: skip
    terms = objective_of(options).terms
    reference = _Reference(model, ref_model, ref_logps).needed(any(term.loss.reference for term in terms))
    losses.check_reference(terms, reference.given, "ref_model or ref_logps")
    scored = reference.logps(inputs, labels, share_prompt=share_prompt, **scoring_options(options))

    def compute(head: HeadInputs, targets: Tensor) -> DPOLossOutput:
        return linear_dpo_loss(
            head.hidden, head.weight, targets, bias=head.bias, ref_logps=scored, logit_scale=head.logit_scale,
            softcap=head.softcap, sequence_group=sequence_group, **options,
        )  # fmt: skip

    return _with_aux_loss(model, _results(model, inputs, labels, compute, share_prompt), router_aux_loss_coef)


def model_list_loss(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,
    *,
    sizes: int | Sequence[int] | Tensor,
    interleaved: bool = False,
    scores: Tensor | None = None,
    ref_model: nn.Module | None = None,
    ref_logps: Tensor | None = None,
    router_aux_loss_coef: float | None = None,
    share_prompt: bool = False,
    loss_type: str | Sequence[str] = "softmax_dpo",
    beta: float | Tensor | Mapping[str, Any] = 0.1,
    reduction: str = "mean",
    memory_budget: int | str | None = None,
    backend: str = "auto",
    group: Any = None,
    sequence_group: Any = None,
    **options: Unpack[LinearListOptions],
) -> SequenceLossOutput:
    """A preference loss of a model and lists of answers.

    Equivalent to `dpofast.list_preference_loss` of the sums over each row of `model_logprob` of both models, and for a
    mixture of experts with ``output_router_logits`` as `model_dpo_loss` says.

    Args:
        model, inputs, labels: as in `model_logprob`, S sequences ``[S, T]``, one for each answer.
        sizes, interleaved, scores: which answers make a list, and how good they are, as in `linear_list_loss`. Of a
            batch of `dpofast.data` these are ``batch.sizes``, True and ``batch.scores``.
        ref_model, ref_logps, router_aux_loss_coef: as in `model_dpo_loss`. All losses of lists need a reference.
        share_prompt: run each list's prompt once; for lists of one size that are interleaved, or of one list.
        loss_type, beta, reduction, memory_budget, backend, group, sequence_group, options: as in `linear_list_loss`,
            but for the head's own: bias, logit_scale, softcap. token_weights are ``[S, T - 1]``.

    Returns:
        `SequenceLossOutput`, with the routers' aux_loss where the model returns one.

    Raises:
        ValueError, TypeError: as `head_inputs` and `linear_list_loss`; with share_prompt, as `share_prompt`, and for
            lists that it does not take; as `model_dpo_loss` for router_aux_loss_coef.
    """
    _refuse_transform(options)
    _check_token_weights(options.get("token_weights"), labels)
    options |= {
        "loss_type": loss_type, "beta": beta, "reduction": reduction, "memory_budget": memory_budget,
        "backend": backend, "group": group,
    }  # fmt: skip
    check_options(list_objective, options)
    sizes = checks.sizes(sizes, len(labels), "labels")
    answers = _answers_of(sizes, interleaved) if share_prompt else 1
    shared = {"share_prompt": True, "answers": answers} if answers > 1 else {}
    reference = _Reference(model, ref_model, ref_logps).needed(True)
    if not reference.given:
        raise ValueError(f"loss_type: {loss_type!r} needs a reference model; pass ref_model or ref_logps")
    scored = reference.logps(inputs, labels, **shared, **scoring_options(options))

    def compute(head: HeadInputs, targets: Tensor) -> SequenceLossOutput:
        return linear_list_loss(
            head.hidden, head.weight, targets, sizes=sizes, interleaved=interleaved, scores=scores, bias=head.bias,
            ref_logps=scored, logit_scale=head.logit_scale, softcap=head.softcap, sequence_group=sequence_group,
            **options,
        )  # fmt: skip

    return _with_aux_loss(model, _results(model, inputs, labels, compute, **shared), router_aux_loss_coef)


def _answers_of(sizes: Sequence[int], interleaved: bool) -> int:
    """How many rows follow one prompt; an error where rows do not lie as `share_prompt` takes them."""
    found = set(sizes)
    if len(found) > 1:
        raise wrong("share_prompt", f"True for lists of {min(found)} to {max(found)} answers", "lists of one size in a "
                    "call; call it for each size, or pass False")  # fmt: skip
    if len(sizes) > 1 and not interleaved:
        raise wrong("share_prompt", "True for lists one after the other", "interleaved=True: the first answers of all "
                    "lists, then the second ones")  # fmt: skip
    return found.pop() if found else 1


@dataclass(frozen=True)
class _Reference:
    """What a policy is compared with: a model, or log-probs that are there already."""

    policy: nn.Module
    model: nn.Module | None
    known: Tensor | None
    without_adapter: bool = False

    def __post_init__(self) -> None:
        if self.model is not None and self.known is not None:
            raise ValueError("ref_logps: given beside a reference, ref_model; pass one of them")

    @property
    def given(self) -> bool:
        return self.model is not None or self.known is not None

    def needed(self, needed: bool) -> _Reference:
        """This; or the policy without its adapters, if something is ``needed`` and nothing was given."""
        bare = unwrapped(self.policy)
        if not needed or self.given or not hasattr(bare, "disable_adapter"):
            return self
        return replace(self, model=bare, without_adapter=True)

    @torch.no_grad()
    def logps(self, inputs: Mapping[str, Any], labels: Tensor, **options: Any) -> Tensor | None:
        if self.model is None:
            return self.known
        with self.model.disable_adapter() if self.without_adapter else nullcontext():
            return model_logprob(self.model, inputs, labels, **options).logps


def _with_aux_loss(model: nn.Module, out: Any, given: float | None) -> Any:
    """``out`` with the routers' loss in its loss."""
    coef = _aux_loss_coef(model, given, out.aux_loss)
    return out._replace(loss=out.loss + coef * out.aux_loss.to(out.loss)) if coef else out


def _results(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,
    compute: Callable[[HeadInputs, Tensor], Any],
    share_prompt: bool = False,
    answers: int = 2,
) -> Any:
    """``compute``, which returns a named tuple, of the model's hidden states and the labels aligned with them.

    The tuple has an ``aux_loss``, in which that of the model comes out.
    """

    def aligned(found: HeadInputs) -> Any:
        hidden = _shifted(found.hidden, labels)
        return compute(found._replace(hidden=hidden), labels[:, 1:].to(hidden.device))

    checks.flag("share_prompt", share_prompt)
    head = find(model)
    with sharing(model, answers=answers) if share_prompt else nullcontext():
        if is_wrapped(model, head.linear):
            return results_in_wrapper(model, head, inputs, aligned)
        found = head_inputs(model, **inputs)
    return aligned(found)._replace(aux_loss=found.aux_loss)


def _refuse_transform(options: Mapping[str, Any]) -> None:
    for name in ("bias", "logit_scale", "softcap"):
        if name in options:
            raise TypeError(f"{name}: the model's own, which is read from the model")


def _check_token_weights(weights: Any, labels: Tensor) -> None:
    """Weights are of the log-probs, which are one fewer than the labels."""
    if isinstance(weights, Tensor) and labels.dim() == 2 and weights.shape != labels[:, 1:].shape:
        expected = f"{tuple(labels[:, 1:].shape)}, one for each log-prob that model_logprob returns"
        hint = "; of weights of the labels' shape pass [:, 1:]" if weights.shape == labels.shape else ""
        raise wrong("token_weights", f"shape {tuple(weights.shape)}", expected + hint)


def _shifted(hidden: Tensor, labels: Tensor) -> Tensor:
    checks.dense("labels", labels)
    if labels.dim() != 2 or hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels: got shape {list(labels.shape)}, expected {list(hidden.shape[:-1])}, that of the positions that "
            "reach the head (no pre-shifted labels, and no logits_to_keep or prompt learning, which change them)"
        )
    return hidden[:, :-1]


def _aux_loss_coef(model: nn.Module, given: float | None, aux_loss: Tensor | None) -> float:
    """What the routers' loss is multiplied by, before it is added to another: as the model does, if not ``given``."""
    if aux_loss is None:
        if given:
            raise ValueError(
                f"router_aux_loss_coef: got {given}, but {type(model).__name__} returned no aux_loss; set "
                "output_router_logits=True in its config or in inputs, or drop router_aux_loss_coef"
            )
        return 0.0
    if given is not None:
        return given
    bare = unwrapped(model)
    config = getattr(bare, "config", None)
    for place in (*bare.modules(), *(() if config is None else (config.get_text_config(),))):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            if isinstance(vars(place).get(name), (int, float)):
                return vars(place)[name]
    raise ValueError(
        f"router_aux_loss_coef: {type(bare).__name__} returned an aux_loss and has no coefficient for it; pass one, "
        "0 to leave it out"
    )
