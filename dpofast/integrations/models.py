"""Log-probabilities and losses of a Transformers model, whatever its head does, without its logits.

Families differ in what they do between the last hidden state and the logits: a bias, a softcap, a scale under one of
half a dozen names, multiplied or divided, before the head or after it. So nothing is read from a config. The model runs
as it is, only with its head standing aside: that shows the exact hidden states that the head would have had, and
what the model makes of known logits, one row of them, shows the transform. A model that does anything else to its
logits (masks, cuts, mixes them) is refused, never approximated. What surrounds the head when the model calls it
(autocast, a LoRA adapter, trained rows) is noted in its place, and so the numbers are those of the model's own head.

A model in a wrapper (DistributedDataParallel, FSDP2, DeepSpeed) has more to it: a sharded head is at hand in its own
forward and backward only, and a wrapper learns from the logits' graph which parameters a backward will reach, and when.
So there the numbers are computed where the head would be, and their gradient travels through the logits; see `_Ticket`.

Works wherever there is a model to call: Transformers' Trainer, Lightning, a plain loop; see ``examples/``.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from dpofast import checks, distributed, losses
from dpofast.functional import DPOLossOutput, linear_dpo_loss, objective_of, scoring_options
from dpofast.primitive import linear_logprob

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from dpofast.options import LinearLossOptions

__all__ = ["HeadInputs", "ModelLogprobOutput", "find_head", "head_inputs", "model_dpo_loss", "model_logprob"]


class HeadInputs(NamedTuple):
    """What `linear_logprob` needs of a model and a batch: ``z = softcap tanh(logit_scale (h W^T + b) / softcap)``.

    Attributes:
        hidden, weight, bias: as the model's head multiplies them: in the autocast dtype where the head runs under
            autocast; with an adapter, of its effective weight.
        logit_scale, softcap: the transform.
        aux_loss: the loss of a mixture's routers, where the model returns one; add it with its coefficient.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    aux_loss: Tensor | None = None


class ModelLogprobOutput(NamedTuple):
    """`LogprobOutput` of a model, and its aux_loss: a scalar, as in `HeadInputs`."""

    logps: Tensor
    entropy: Tensor | None
    log_sum_sq_probs: Tensor | None
    mean_logits: Tensor | None
    is_top1: Tensor | None
    dropped_mass: Tensor | None
    aux_loss: Tensor | None = None


class _Head(NamedTuple):
    """What a model calls for its logits, and the linear layer in it: the same, but where PEFT has put an adapter."""

    module: nn.Module
    linear: nn.Linear


def _loaded(module: str, name: str) -> type | tuple[()]:
    """A class for `isinstance`; of a module that nobody has imported there are no instances."""
    return getattr(sys.modules.get(module), name, ())


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel or a DeepSpeed engine. FSDP2 adds to a model and wraps nothing."""
    while isinstance(model, (DistributedDataParallel, _loaded("deepspeed", "DeepSpeedEngine"))):
        model = model.module
    return model


def _has(model: nn.Module, kind: type | tuple[()]) -> bool:
    return any(isinstance(module, kind) for module in model.modules())


def _is_zero3(head: nn.Linear) -> bool:
    return hasattr(head.weight, "ds_id")


def _is_sharded(model: nn.Module, head: nn.Linear) -> bool:
    return _is_zero3(head) or _has(model, _loaded("torch.distributed.fsdp", "FSDPModule"))


def _is_wrapped(model: nn.Module, head: nn.Linear) -> bool:
    """Whether a wrapper has a part in the model's forward and backward."""
    return _unwrapped(model) is not model or _has(model, DistributedDataParallel) or _is_sharded(model, head)


def find_head(model: nn.Module) -> nn.Linear:
    """The language-model head: an `nn.Linear`.

    Args:
        model: with a ``get_output_embeddings``; inside PEFT, DistributedDataParallel or a DeepSpeed engine, too. Of a
            head that PEFT trains as a whole (``modules_to_save``), the copy that is active. Under FSDP2
            (``fully_shard``) and ZeRO-3, its weight is sharded.

    Raises:
        ValueError: no head; one with an active adapter on it, quantised, or offloaded; a model with an encoder, in
            DataParallel or in FSDP1.
    """
    head = _find(model)
    if _active_adapters(head.module):
        raise ValueError(
            f"model: the head of {type(_unwrapped(model)).__name__} carries an adapter ({_kind(head.module)}), which "
            "its weight does not show; use head_inputs, model_logprob or model_dpo_loss, which apply it, or merge it"
        )
    return head.linear


def _find(model: nn.Module) -> _Head:
    if _has(model, _loaded("torch.distributed.fsdp", "FullyShardedDataParallel")):
        raise ValueError(
            "model: is in FullyShardedDataParallel (FSDP1), which keeps the head in a flat tensor; shard it with "
            "torch.distributed.fsdp.fully_shard (FSDP2; fsdp_version: 2 in accelerate)"
        )
    if _has(model, nn.DataParallel):
        raise ValueError(
            "model: is in DataParallel, whose copies of it on other devices run out of reach; start one process a "
            "device (torchrun or accelerate launch), which wraps it in DistributedDataParallel, or let the process see "
            "one device (CUDA_VISIBLE_DEVICES=0)"
        )
    bare = _unwrapped(model)
    module = bare.get_output_embeddings() if hasattr(bare, "get_output_embeddings") else None
    name = type(bare).__name__
    if module is None:
        inner = next((m for m in bare.modules() if _has_head(m)), None)
        if inner is not None:
            raise ValueError(
                f"model: {name} has a {type(inner).__name__} in it and no get_output_embeddings of its own; pass the "
                f"{type(inner).__name__}, or give {name} a get_output_embeddings if it has a part in the logits"
            )
        raise ValueError(f"model: {name} has no output embeddings; expected a causal language model with its head")
    if getattr(getattr(bare, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"model: {name} has an encoder, whose decoder's labels are not its shifted inputs; call its decoder "
            "yourself and pass the hidden states to linear_logprob"
        )
    if hasattr(module, "modules_to_save"):  # peft's wrapper of a module that is trained as a whole
        enabled = module.active_adapters and not module.disable_adapters
        module = module.modules_to_save[module.active_adapters[0]] if enabled else module.original_module
    head = _Head(module, _without_adapter(module, name))
    weight = head.linear.weight
    if type(head.linear).forward is not nn.Linear.forward or not weight.is_floating_point():
        raise ValueError(
            f"model: the head of {name} is a {type(head.linear).__name__} of {weight.dtype}; expected a plain "
            "nn.Linear. Leave a quantised head in its own dtype (llm_int8_skip_modules, modules_to_not_convert), or "
            "dequantise it"
        )
    if weight.is_meta or (weight.numel() == 0 and not _is_zero3(head.linear)):
        where = "on the meta device" if weight.is_meta else "sharded away"
        raise ValueError(
            f"model: the head of {name} is {where}; keep it on one device (device_map), or gather it and call "
            "linear_logprob inside the gathering context"
        )
    return head


def _has_head(module: nn.Module) -> bool:
    return hasattr(module, "get_output_embeddings") and module.get_output_embeddings() is not None


# Adapters on the head


def _kind(module: nn.Module) -> str:
    """As in peft.tuners.lora.layer.Linear, whose own name says little."""
    return f"{type(module).__module__}.{type(module).__name__}"


def _is_lora(module: nn.Module) -> bool:
    """Of that forward and no other, which is what is made again here; FSDP2 makes a class of its own around it."""
    lora = _loaded("peft.tuners.lora.layer", "Linear")
    return isinstance(module, lora) and type(module).forward is lora.forward


def _token_layer(module: nn.Module) -> nn.Module | None:
    """PEFT's layer that has some rows of a weight replaced: trainable_token_indices, or a TrainableTokensConfig."""
    if isinstance(module, _loaded("peft.utils.other", "TrainableTokensWrapper")):
        module = module.token_adapter
    return module if isinstance(module, _loaded("peft.tuners.trainable_tokens.layer", "TrainableTokensLayer")) else None


def _without_adapter(module: nn.Module, name: str) -> nn.Module:
    layer = _token_layer(module) or module
    if not hasattr(layer, "base_layer"):
        return module
    active = _active_adapters(module)
    variants = [type(v).__name__ for n, v in getattr(layer, "lora_variant", {}).items() if n in active]
    if active and (variants or not (_is_lora(layer) or _token_layer(layer))):
        raise ValueError(
            f"model: the head of {name} carries an adapter that is neither plain LoRA nor trainable_token_indices "
            f"({', '.join([_kind(layer), *variants])}); take it out of target_modules, train the head whole with "
            "modules_to_save, or merge the adapter"
        )
    if _token_layer(layer) and len(active) > 1:
        raise ValueError(f"model: the head of {name} has rows of several adapters ({', '.join(active)}); activate one")
    return layer.base_layer


def _active_adapters(module: nn.Module) -> list[str]:
    """The adapters by which the head is more than its weight."""
    layer = _token_layer(module) or module
    if not hasattr(layer, "base_layer") or layer.disable_adapters or layer.merged:
        return []
    owned = getattr(layer, layer.adapter_layer_names[0])
    return [name for name in layer.active_adapters if name in owned]


def _as_linear(head: _Head, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden, weight and bias whose product is that of the head, called here and now.

    LoRA's ``h W^T + s (h A^T) B^T`` is ``[h, s h A^T] [W, B]^T``: so B is not lost in the rounding of W, and dropout
    remains that of the adapter's path alone. [W, B] is a copy of the head, and so is its gradient.
    """
    module, tokens = head.module, _token_layer(head.module)
    weight, bias = head.linear.weight, head.linear.bias
    layer = tokens or module
    if layer is not head.linear and layer.disable_adapters and layer.merged:
        layer.unmerge()  # as its own forward does
    names = _active_adapters(module)
    if names and tokens:
        weight, bias = tokens.get_merged_weights(names), None  # the layer has none in its product either
    elif names:
        low, high = [module.lora_A[n] for n in names], [module.lora_B[n] for n in names]
        _expect_whole(module, weight, *(layer.weight for layer in (*low, *high)))
        dropped = [module.lora_dropout[n](hidden.to(down.weight.dtype)) for n, down in zip(names, low)]
        paths = [down(x) * module.scaling[n] for n, down, x in zip(names, low, dropped)]
        hidden = torch.cat([hidden, *(path.to(hidden.dtype) for path in paths)], -1)
        weight = torch.cat([weight, *(up.weight.to(weight.dtype) for up in high)], 1)
        for n, up in zip(names, high):
            if up.bias is not None:
                extra = up.bias * module.scaling[n]
                bias = extra if bias is None else bias + extra
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and torch.float64 not in (hidden.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return hidden, weight, bias


def _expect_whole(module: nn.Module, *weights: Tensor) -> None:
    for weight in weights:
        if distributed.is_dtensor(weight) or weight.dim() != 2:
            raise ValueError(
                f"model: a weight is sharded in the head's own forward, {list(weight.shape)} in {module}; expected "
                "that FSDP2 or ZeRO-3 gathers it there, and no tensor parallelism beside them"
            )


def head_inputs(model: nn.Module, **inputs: Any) -> HeadInputs:
    """Run ``model(**inputs)`` up to its head.

    Hooks, adapters and checkpointing all act as ever, since it is the model's own forward that runs.

    Args:
        model: as in `find_head`, but not sharded: an FSDP2 or ZeRO-3 head is gone when the forward is over.
            DistributedDataParallel without ``find_unused_parameters``, which looks for the parameters in the graph of
            the logits. `model_logprob` and `model_dpo_loss` know neither limit.
        inputs: what the model takes: input_ids, attention_mask, ...; no labels. ``use_cache`` is False if not given.

    Returns:
        `HeadInputs`, hidden ``[*, T, H]`` with its graph.

    Raises:
        ValueError: as `find_head`; a model that does not call its head once, or does something else to its logits.
    """
    head = _find(model)
    if _is_sharded(model, head.linear):
        raise ValueError(
            "model: is sharded, and its head is gone when the forward is over; use model_logprob or model_dpo_loss"
        )
    seen: list[tuple[Tensor, Tensor, Tensor | None]] = []
    probe = _probe(head.linear.weight)

    def note(hidden: Tensor) -> Tensor:
        seen.append(_as_linear(head, hidden))  # here, for what is around the head (autocast) is gone afterwards
        return probe

    with _standing_aside(head.module, note), _watching_positions(model, inputs):
        output = model(**_checked(inputs))
    _expect_once(model, len(seen))
    logits = _logits(output)
    logit_scale, softcap = _read_transform(probe, logits, type(model).__name__)
    if logits.requires_grad:
        raise _more_than_a_transform(type(model).__name__, "with something that has a gradient")
    return HeadInputs(*seen[0], logit_scale, softcap, _aux_loss(output))


def _checked(inputs: Mapping[str, Any]) -> dict[str, Any]:
    if "labels" in inputs:
        raise ValueError("labels: the model would compute a loss of its own from logits; pass them beside the inputs")
    return {"use_cache": False, **inputs}


def _logits(output: Any) -> Tensor:
    return output["logits"] if isinstance(output, Mapping) else output[0]


def _aux_loss(output: Any) -> Tensor | None:
    """The loss of a mixture's routers, which Transformers' models return with ``output_router_logits``."""
    found = output.get("aux_loss") if isinstance(output, Mapping) else None
    return found if isinstance(found, Tensor) else None


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
    bare = _unwrapped(model)
    config = getattr(bare, "config", None)
    for place in (*bare.modules(), *(() if config is None else (config.get_text_config(),))):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            if isinstance(vars(place).get(name), (int, float)):
                return vars(place)[name]
    raise ValueError(
        f"router_aux_loss_coef: {type(bare).__name__} returned an aux_loss and has no coefficient for it; pass one, "
        "0 to leave it out"
    )


@contextmanager
def _watching_positions(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Warn where a model counts positions from the padding on the left: what an embedding of positions is asked for."""
    mask = inputs.get("attention_mask")
    padded = None
    if isinstance(mask, Tensor) and mask.dim() == 2 and inputs.get("position_ids") is None:
        padded = (mask[:, 0] == 0) & (mask != 0).any(-1)
    if padded is None or not padded.any():
        yield
        return

    def look(_module: nn.Module, args: tuple[Any, ...]) -> None:
        index = args[0] if args else None
        if not isinstance(index, Tensor) or index.dim() not in (1, 2) or index.shape[-1] != mask.shape[1]:
            return
        rows = index if index.dim() == 2 else index[None]
        if len(rows) not in (1, len(mask)):
            return
        rows = rows.expand(mask.shape)[padded.to(rows.device)]
        if torch.equal(rows, rows[:, :1] + torch.arange(rows.shape[1], device=rows.device)):
            warnings.warn(
                f"inputs: padding on the left and no position_ids, and {type(_unwrapped(model)).__name__} counts its "
                "positions from the padding, so that log-probabilities depend on it, as in the model's own loss; pass "
                "position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0), or pad on the right",
                stacklevel=2,
            )

    embeddings = [m for m in model.modules() if type(m).forward is nn.Embedding.forward]
    hooks = [m.register_forward_pre_hook(look) for m in embeddings]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _expect_once(model: nn.Module, times: int) -> None:
    if times != 1:
        raise ValueError(f"model: {type(model).__name__} called its head {times} times; expected once")


_TINY, _HUGE = 2.0**-12, 2.0**20
"""A logit so small that tanh is linear there (to 2^-24 for caps >= 1), and one so large that it is 1; powers of two,
so that a scale is read exactly."""


def _probe(weight: Tensor) -> Tensor:
    """Known logits ``[1, 1, V]``: tiny, huge, then a ramp over a range where a softcap bends."""
    probe = torch.linspace(-40, 40, weight.shape[0], device=weight.device, dtype=torch.float32)
    probe[:2] = torch.tensor([_TINY, _HUGE])[: probe.shape[0]]
    return probe.reshape(1, 1, -1)


def _read_transform(probe: Tensor, logits: Tensor, name: str) -> tuple[float, float | None]:
    """The scale and the softcap that turned ``probe`` into ``logits``; an error where no two numbers did."""
    if logits.shape == probe.shape and probe.numel() >= 2:
        z = logits.detach().float().flatten()
        tiny, huge = z[:2].tolist()
        scale, softcap = tiny / _TINY, None
        if huge < 0.5 * _HUGE * scale:
            softcap = huge
        wanted = probe.flatten() * scale
        if softcap is not None:
            wanted = softcap * torch.tanh(wanted / softcap)
        if scale and torch.allclose(z, wanted, rtol=1e-4, atol=1e-5):
            return scale, softcap
    raise _more_than_a_transform(
        name, f"known logits {list(probe.shape)} came back as {list(logits.shape)}, or changed otherwise"
    )


def _more_than_a_transform(name: str, how: str) -> ValueError:
    return ValueError(
        f"model: {name} does more to its logits than scale and softcap them ({how}); use dpofast.logprob on its logits"
    )


@contextmanager
def _standing_aside(head: nn.Module, stand_in: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let ``head`` do what ``stand_in`` does."""
    before = vars(head).get("forward")  # an instance attribute only where a hook has put one
    head.forward = stand_in
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


# In a wrapper


class _Ticket(torch.autograd.Function):
    """Known logits, in whose place ``results`` wait for the gradient that `_Claim` has left in ``incoming``.

    So the results' graph begins behind the logits', as that of a loss of the logits would. DistributedDataParallel
    finds every parameter in it. FSDP2 and ZeRO-3 gather a weight when the gradient of its module's output arrives, and
    the gradient of what was computed there waits for that. A DeepSpeed engine divides the gradient of its outputs by
    the number of accumulated batches, and does so here: the gradient of the first logit is the factor.
    """

    @staticmethod
    def forward(ctx, incoming: list[Tensor | None], probe: Tensor, *results: Tensor) -> Tensor:
        ctx.incoming = incoming
        return probe.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        factor = grad.flatten()[0]
        return (None, None, *(g if g is None else g * factor.to(g.dtype) for g in ctx.incoming))


class _Exact(torch.autograd.Function):
    """``probe`` again, where the wrapper of the head has rounded it; what comes next scales logits by ``scale``."""

    @staticmethod
    def forward(ctx, rounded: Tensor, probe: Tensor, scale: float) -> Tensor:
        ctx.dtype, ctx.scale = rounded.dtype, scale
        return probe.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return (grad / ctx.scale).to(ctx.dtype), None, None


class _Claim(torch.autograd.Function):
    """``results``, whose gradient goes into ``incoming``, for the `_Ticket` that ``logits`` were made from."""

    @staticmethod
    def forward(ctx, incoming: list[Tensor | None], logits: Tensor, *results: Tensor) -> tuple[Tensor, ...]:
        ctx.incoming = incoming
        ctx.shape, ctx.options = logits.shape, {"dtype": logits.dtype, "device": logits.device}
        ctx.set_materialize_grads(False)
        return tuple(result.clone() for result in results)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None):
        ctx.incoming[:] = grads
        ticket = torch.zeros(ctx.shape, **ctx.options)
        ticket.view(-1)[0] = 1
        return (None, ticket, *(None for _ in grads))


_transforms: WeakKeyDictionary[nn.Module, tuple[float, float | None]] = WeakKeyDictionary()
"""Scale and softcap behind each head that has been met in a wrapper."""


def _transform_behind(model: nn.Module, head: _Head, inputs: Mapping[str, Any]) -> tuple[float, float | None]:
    """Scale and softcap, which a head's place has to know before there are logits; takes a forward, the first time."""
    if head.module not in _transforms:
        probes: list[Tensor] = []

        def stand_in(hidden: Tensor) -> Tensor:
            _expect_whole(head.module, head.linear.weight)
            probes.append(_probe(head.linear.weight))
            return probes[-1]

        bare = _unwrapped(model)
        with torch.no_grad(), _same_random_numbers():
            inner, _ = _run(bare, head.module, inputs, stand_in, probes, 1.0)
        _transforms[head.module] = _read_transform(probes[0], inner, type(bare).__name__)
    return _transforms[head.module]


def _same_random_numbers():
    """A context in which random numbers are drawn for nothing."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None or device.type == "mps":  # which has no such wrappers, and no fork either
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[torch.accelerator.current_device_index()], device_type=device.type)


def _run(
    model: nn.Module,
    head: nn.Module,
    inputs: Mapping[str, Any],
    stand_in: Callable[[Tensor], Tensor],
    probes: list[Tensor],
    scale: float,
) -> tuple[Tensor, Any]:
    """``model(**inputs)`` with a stand-in for its head, which notes in ``probes`` what it returns.

    FSDP2 rounds what a module returns (`MixedPrecisionPolicy.output_dtype`), the head and the model alike; between the
    two the logits here are exact.

    Returns:
        The logits that the model made of the probe, and the output that the wrappers made of its own.
    """
    bare, name = _unwrapped(model), type(model).__name__
    whole = bare.get_output_embeddings()
    owners = [m for m in bare.modules() if hasattr(type(m), "get_output_embeddings")]
    owner = next((m for m in reversed(owners) if m.get_output_embeddings() is whole), bare)
    entered, inner = [], []

    def enter(_module: nn.Module, _args: Any, hooked: Any) -> Tensor:
        _expect_once(model, len(probes))
        if not _is_rounded(hooked, probes[0]):
            raise _more_than_a_transform(name, "a hook changes what the head returns")
        entered.append(_Exact.apply(hooked, probes[0].detach(), scale))
        return entered[-1]

    hooks = (
        head.register_forward_hook(enter),
        owner.register_forward_hook(lambda _module, _args, output: inner.append(_logits(output)), prepend=True),
    )
    try:
        with _standing_aside(head, stand_in), _watching_positions(model, inputs):
            output = model(**_checked(inputs))
    finally:
        for hook in hooks:
            hook.remove()
    outer = _logits(output)
    _expect_once(model, len(probes))
    if len(entered) != 1 or len(inner) != 1:
        raise ValueError(
            f"model: {name} does not run the hooks of its head and of {type(owner).__name__}; compile its layers and "
            "not the whole of it"
        )
    if not _is_rounded(outer, inner[0]):
        raise _more_than_a_transform(name, "after its own forward")
    needed = entered[0].requires_grad
    if needed != inner[0].requires_grad or needed != outer.requires_grad:
        raise _more_than_a_transform(name, "with something that has a gradient" if not needed else "without a graph")
    if needed and not _comes_from(entered[0].grad_fn, inner[0].grad_fn):
        raise _more_than_a_transform(name, "with something that has a gradient")
    return inner[0], output


def _is_rounded(found: Any, exact: Tensor) -> bool:
    """Whether ``found`` is ``exact``, rounded to its dtype if at all."""
    return isinstance(found, Tensor) and found.shape == exact.shape and torch.equal(found, exact.to(found.dtype))


def _comes_from(source: torch.autograd.graph.Node, node: torch.autograd.graph.Node) -> bool:
    """Whether nothing that has a gradient, but ``source``, leads to ``node``."""
    waiting, found = [node], False
    while waiting:
        node = waiting.pop()
        if node is source:
            found = True
        elif not node.next_functions:
            return False
        else:
            waiting.extend(before for before, _ in node.next_functions if before is not None)
    return found


def _results(
    model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, compute: Callable[[HeadInputs, Tensor], Any]
) -> Any:
    """``compute``, which returns a named tuple, of the model's hidden states and the labels aligned with them.

    The tuple has an ``aux_loss``, in which that of the model comes out.
    """

    def aligned(head: HeadInputs) -> Any:
        hidden = _shifted(head.hidden, labels)
        return compute(head._replace(hidden=hidden), labels[:, 1:].to(hidden.device))

    head = _find(model)
    if not _is_wrapped(model, head.linear):
        found = head_inputs(model, **inputs)
        return aligned(found)._replace(aux_loss=found.aux_loss)

    transform = _transform_behind(model, head, inputs)
    incoming: list[Tensor | None] = []
    probes: list[Tensor] = []
    computed: list[Any] = []

    def stand_in(hidden: Tensor) -> Tensor:
        _expect_whole(head.module, head.linear.weight)
        computed.append(aligned(HeadInputs(*_as_linear(head, hidden), *transform)))
        waiting = [x for x in computed[-1] if x is not None and x.requires_grad]
        probes.append(_Ticket.apply(incoming, _probe(head.linear.weight), *waiting))
        return probes[-1]

    inner, output = _run(model, head.module, inputs, stand_in, probes, transform[0])
    found = _read_transform(probes[0].detach(), inner, type(model).__name__)
    if found != transform:
        del _transforms[head.module]
        raise ValueError(
            f"model: scale and softcap of the logits are {found} and were {transform} at the call before; they may "
            "not change under a sharded head"
        )
    values = [None if x is None else x.detach() for x in computed[0]]
    where = [i for i, x in enumerate(computed[0]) if x is not None and x.requires_grad]
    for i, x in zip(where, _Claim.apply(incoming, _logits(output), *(values[i] for i in where)) if where else ()):
        values[i] = x
    return type(computed[0])(*values)._replace(aux_loss=_aux_loss(output))


def model_logprob(
    model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, *, temperature: float = 1.0, **options: Any
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

    Returns:
        `ModelLogprobOutput` of tensors ``[B, T - 1]``: position t is the log-probability of label t + 1. Of a mixture
        of experts with ``output_router_logits``, aux_loss as well, for you to add to your loss with its coefficient.

    Raises:
        ValueError, TypeError: as `head_inputs` and `linear_logprob`.
    """
    _refuse_transform(options)

    def compute(head: HeadInputs, targets: Tensor) -> ModelLogprobOutput:
        out = linear_logprob(
            head.hidden, head.weight, targets, bias=head.bias, temperature=temperature, logit_scale=head.logit_scale,
            softcap=head.softcap, **options,
        )  # fmt: skip
        return ModelLogprobOutput(*out)

    return _results(model, inputs, labels, compute)


def model_dpo_loss(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,
    *,
    ref_model: nn.Module | None = None,
    ref_logps: Tensor | None = None,
    router_aux_loss_coef: float | None = None,
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
        loss_type, beta, label_smoothing, reduction, memory_budget, backend, group, sequence_group, options: as in
            `linear_dpo_loss`, but for the head's own: bias, logit_scale, softcap.

    Both models are run as they are: dropout, if they have any, is yours to turn off.

    Returns:
        `DPOLossOutput`, with the routers' aux_loss where the model returns one.

    Raises:
        ValueError, TypeError: as `head_inputs` and `linear_dpo_loss`; a router_aux_loss_coef without an aux_loss, or an
            aux_loss without a coefficient.
    """
    _refuse_transform(options)
    if ref_model is not None and ref_logps is not None:
        raise ValueError("ref_logps: given beside a reference, ref_model; pass one of them")
    options |= {
        "loss_type": loss_type, "beta": beta, "label_smoothing": label_smoothing, "reduction": reduction,
        "memory_budget": memory_budget, "backend": backend, "group": group,
    }  # fmt: skip
    terms = objective_of(options).terms
    disabled = nullcontext()
    if ref_model is None and ref_logps is None and any(term.loss.reference for term in terms):
        bare = _unwrapped(model)
        if hasattr(bare, "disable_adapter"):
            ref_model, disabled = bare, bare.disable_adapter()
    losses.check_reference(terms, ref_model is not None or ref_logps is not None, "ref_model or ref_logps")
    if ref_model is not None:
        with torch.no_grad(), disabled:
            scoring = scoring_options(options)
            ref_logps = model_logprob(ref_model, inputs, labels, **scoring).logps

    def compute(head: HeadInputs, targets: Tensor) -> DPOLossOutput:
        return linear_dpo_loss(
            head.hidden, head.weight, targets, bias=head.bias, ref_logps=ref_logps, logit_scale=head.logit_scale,
            softcap=head.softcap, sequence_group=sequence_group, **options,
        )  # fmt: skip

    out = _results(model, inputs, labels, compute)
    coef = _aux_loss_coef(model, router_aux_loss_coef, out.aux_loss)
    return out._replace(loss=out.loss + coef * out.aux_loss.to(out.loss)) if coef else out


def _refuse_transform(options: Mapping[str, Any]) -> None:
    for name in ("bias", "logit_scale", "softcap"):
        if name in options:
            raise TypeError(f"{name}: the model's own, which is read from the model")


def _shifted(hidden: Tensor, labels: Tensor) -> Tensor:
    checks.dense("labels", labels)
    if labels.dim() != 2 or hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels: got shape {list(labels.shape)}, expected {list(hidden.shape[:-1])}, that of the positions that "
            "reach the head (no pre-shifted labels, and no logits_to_keep or prompt learning, which change them)"
        )
    return hidden[:, :-1]
