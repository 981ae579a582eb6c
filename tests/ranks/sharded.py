"""Run by `test_sharded.py` on two ranks: models in the wrappers that people train with.

Each case takes a step of SGD on every rank's own pairs, and compares all parameters with one process's that took it on
all of them. A rank has other tokens than the next, and in one case none that count.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext

import tiny
import torch
import torch.distributed as dist
import training
from families import H, V, build
from peft import LoraConfig, get_peft_model
from ranks import launch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dpofast.integrations import models

T, PAIRS, LR = 7, 2, 0.5
# plain; tied and softcapped; tied with a scale that is no power of two
FAMILIES = ("llama", "gemma2", "cohere")


def lora(family: str = "llama", **options) -> nn.Module:
    base = build(family)
    torch.manual_seed(2)
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **options))


def batch(silent: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Tokens and labels [ranks, 2, pairs, T]: every rank's chosen and rejected; ranks that have no label that counts"""
    world = dist.get_world_size()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, V, (world, 2, PAIRS, T), generator=generator)
    prompts = torch.randint(1, T - 1, (world, 2, PAIRS, 1), generator=generator)
    labels = tokens.masked_fill(torch.arange(T) < prompts, -100)
    for rank in silent:
        labels[rank] = -100
    return tokens, labels


def own(x: Tensor) -> Tensor:
    return x[dist.get_rank()].reshape(-1, T)


def union(x: Tensor) -> Tensor:
    return x.transpose(0, 1).reshape(-1, T)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """All of them, whole; by the names that they have outside of any wrapper."""
    return {
        name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def step(model: nn.Module, take: Callable[[Tensor], Tensor], silent=(), **options) -> dict[str, Tensor]:
    """Two steps, and the numbers on the way."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    tokens, labels = map(take, batch(silent))
    reference = {name: f() for name, f in options.pop("reference", {}).items()}
    for _ in range(2):
        out = models.model_dpo_loss(model, {"input_ids": tokens}, labels, beta=0.5, **reference, **options)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return out


def check(
    build: Callable[[], nn.Module], wrap: Callable[[nn.Module], nn.Module], rtol: float = 1e-5, **options
) -> nn.Module:
    """A model that was trained in its wrapper, having been compared."""
    start, plain, wrapped = build(), build(), wrap(build())
    wanted = step(plain, union, **options)
    found = step(wrapped, own, **options)
    average = found.loss.detach().clone()
    dist.all_reduce(average)
    torch.testing.assert_close(average / dist.get_world_size(), wanted.loss.detach(), rtol=1e-5, atol=1e-6)
    mine = wanted.chosen_rewards.unflatten(0, (-1, PAIRS))[dist.get_rank()]
    torch.testing.assert_close(found.chosen_rewards, mine, rtol=1e-4, atol=1e-5)
    begun, trained = parameters(start), parameters(plain)
    for name, p in parameters(wrapped).items():
        torch.testing.assert_close(p, trained[name], rtol=rtol, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert max((trained[name] - begun[name]).abs().max() for name in trained) > 1e-2
    head = "lm_head.weight"
    if head in trained and dict(start.named_parameters())[head].requires_grad:
        assert (trained[head] - begun[head]).abs().max() > 1e-3
    return wrapped


def reference_model(wrap=lambda model: model, family="llama"):
    return {"reference": {"ref_model": lambda: wrap(build(family, seed=1))}}


# DistributedDataParallel


def ddp(**options):
    return lambda model: DistributedDataParallel(model, **options)


def data_parallel() -> None:
    for family in FAMILIES:
        check(lambda family=family: build(family), ddp(), **reference_model(family=family))


def data_parallel_that_looks_for_unused_parameters() -> None:
    """As Transformers' Trainer sets it: in the graph of the logits."""
    check(build, ddp(find_unused_parameters=True), **reference_model())
    check(lora, ddp(find_unused_parameters=True), metrics=True)


def data_parallel_with_a_static_graph() -> None:
    check(build, ddp(static_graph=True), **reference_model(ddp()))


# FSDP2


def sharded(head=None, reshard=True, root=None, layers=True, **options):
    """`fully_shard` of the layers, of the head ("own", or "with the norm", as accelerate does it), of the model."""

    def wrap(model: nn.Module) -> nn.Module:
        bare = model.get_base_model() if hasattr(model, "get_base_model") else model
        for layer in bare.model.layers if layers else ():
            fully_shard(layer, reshard_after_forward=reshard, **options)
        tied = bare.lm_head.weight is bare.model.embed_tokens.weight
        if head == "own":
            modules = [bare.model.embed_tokens, bare.lm_head] if tied else bare.lm_head
            fully_shard(modules, reshard_after_forward=reshard, **options)
        elif head == "with the norm":
            modules = [bare.model.norm, *([bare.model.embed_tokens] if tied else []), bare.lm_head]
            fully_shard(modules, reshard_after_forward=False, **options)
        return fully_shard(model, **({} if root is None else {"reshard_after_forward": root}), **options)

    return wrap


WAYS = {
    "root": sharded(layers=False),
    "root, resharded": sharded(layers=False, root=True),
    "layers": sharded(),
    "head": sharded(head="own", root=True),
    "accelerate": sharded(head="with the norm"),
}


def fsdp2() -> None:
    for way in WAYS.values():
        check(build, way, **reference_model())


def fsdp2_tied() -> None:
    for family in ("gemma2", "cohere"):
        for way in WAYS.values():
            check(lambda family=family: build(family), way, **reference_model(family=family))


def fsdp2_with_a_sharded_reference() -> None:
    check(build, WAYS["head"], **reference_model(WAYS["head"]))


def fsdp2_with_adapters_disabled_for_the_reference() -> None:
    for way in ("root", "accelerate", "head"):
        check(lora, WAYS[way])
    check(lambda: lora(modules_to_save=["lm_head"]), WAYS["layers"])


def adapter_on_the_head() -> nn.Module:
    base = build()
    torch.manual_seed(2)
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False))


def an_adapter_on_the_head() -> None:
    for way in (ddp(), WAYS["root"], WAYS["accelerate"], WAYS["head"]):
        check(adapter_on_the_head, way, rtol=1e-4)  # its factors are large, and so are their steps


def fsdp2_checkpointed() -> None:
    def checkpointing(way):
        def wrap(model: nn.Module) -> nn.Module:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            return way(model.train())

        return wrap

    for way in ("accelerate", "head"):
        check(build, checkpointing(WAYS[way]), **reference_model())


def a_rank_without_labels() -> None:
    for wrap in (ddp(find_unused_parameters=True), WAYS["head"], WAYS["accelerate"]):
        check(build, wrap, silent=(1,), **reference_model())


def fsdp2_accumulates() -> None:
    """Two backwards before a step, the first without a reduction: the gradient of a plain model's two."""
    tokens, labels = batch()
    for way in ("head", "accelerate", "root"):
        plain, wrapped = build(), WAYS[way](build())
        for model, take in ((plain, union), (wrapped, own)):
            for last in (False, True):
                if model is wrapped:
                    model.set_requires_gradient_sync(last)
                out = models.model_logprob(model, {"input_ids": take(tokens)}, take(labels), outputs=("entropy",))
                share = out.logps.numel() if last else 2 * out.logps.numel()
                ((out.logps.square() + out.entropy).sum() / share).backward()
        for (name, wanted), p in zip(plain.named_parameters(), wrapped.parameters()):
            torch.testing.assert_close(p.grad.full_tensor(), wanted.grad, rtol=1e-4, atol=1e-5, msg=name)


def fsdp2_scores_without_gradient() -> None:
    """And by turns with training; another number of tokens on each rank."""
    plain, wrapped = build("gemma2"), WAYS["head"](build("gemma2"))
    tokens, labels = batch()
    length = T - dist.get_rank()
    inputs, targets = {"input_ids": own(tokens)[:, :length]}, own(labels)[:, :length]
    for with_graph in (False, True, False, False):
        with torch.set_grad_enabled(with_graph):
            found = models.model_logprob(wrapped, inputs, targets).logps
            torch.testing.assert_close(found, models.model_logprob(plain, inputs, targets).logps, rtol=1e-5, atol=1e-5)
            assert found.requires_grad == with_graph
        if with_graph:
            found.sum().backward()


def the_first_call_draws_the_random_numbers_of_every_other() -> None:
    """It reads what the model does to its logits in a forward of its own."""
    model, drawn = WAYS["head"](build()), []
    model.register_forward_pre_hook(lambda *_: drawn.append(torch.rand(1)))
    for passes in (2, 1):
        drawn.clear()
        torch.manual_seed(0)
        models.model_logprob(model, {"input_ids": own(batch()[0])}, own(batch()[1]))
        torch.manual_seed(0)
        assert len(drawn) == passes and torch.equal(drawn[-1], torch.rand(1))


def fsdp2_in_bf16() -> None:
    """What accelerate asks for: bf16 weights, and outputs rounded to it. Ours are not, and their gradients neither."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.bfloat16)
    tokens, labels = batch()
    inputs = {"input_ids": own(tokens)}
    for family in FAMILIES:
        rounded = build(family).to(torch.bfloat16)
        for head in ("own", "with the norm", None):
            wrapped = sharded(head=head, mp_policy=policy)(build(family))
            rounded.zero_grad()
            wanted = models.model_logprob(rounded, inputs, own(labels)).logps
            found = models.model_logprob(wrapped, inputs, own(labels)).logps
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.1)
            assert not torch.equal(found, found.bfloat16().float())
            scale, softcap = models.wrapped.transforms[models.find_head(wrapped)]
            assert (scale, softcap) == models.head_inputs(rounded, **inputs)[3:5]
            (wanted.sum() / dist.get_world_size()).backward()
            found.sum().backward()
            for (name, p), q in zip(wrapped.named_parameters(), rounded.parameters()):
                mean = q.grad.float()
                dist.all_reduce(mean)
                error = (p.grad.full_tensor() - mean).norm() / mean.norm()
                assert p.grad.dtype == torch.float32 and error < 0.05, (family, head, name, error)


def the_whole_head_is_gone_between_forward_and_backward() -> None:
    """Of what is saved for the backward, all that has the head's size has no memory."""
    tokens, labels = batch()

    def check_memory(wrapped: nn.Module, size: int = V * H) -> None:
        head, saved = models.find_head(wrapped), []

        def pack(x: Tensor) -> Tensor:
            if x.numel() == size:
                saved.append(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = models.model_logprob(wrapped, {"input_ids": own(tokens)}, own(labels))
        sizes = [[x.untyped_storage().nbytes() for x in saved]]
        out.logps.register_hook(lambda _: sizes.append([x.untyped_storage().nbytes() for x in saved]))
        out.logps.sum().backward()
        sizes.append([x.untyped_storage().nbytes() for x in saved])
        assert len(sizes) == 3 and saved and not any(map(any, sizes)), sizes
        assert isinstance(head.weight, DTensor) and head.weight.grad.full_tensor().any()

    for family in ("llama", "gemma2"):
        check_memory(WAYS["head"](build(family)))


def what_cannot_work_is_refused() -> None:
    inputs, labels = {"input_ids": own(batch()[0])}, own(batch()[1])

    def refuses(message: str, model: nn.Module, call=models.model_logprob, arguments=(inputs, labels), **keywords):
        try:
            call(model, *arguments, **keywords)
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"expected: {message}")

    from torch.distributed.fsdp import FullyShardedDataParallel

    refuses("FSDP1", FullyShardedDataParallel(build(), device_id=torch.device("cpu"), use_orig_params=True))
    refuses("use model_logprob", WAYS["root"](build()), models.head_inputs, (), **inputs)

    def scaled(by):
        model = build()
        original = model.forward

        def forward(*args, **kwargs):
            output = original(*args, **kwargs)
            output.logits = output.logits * by()
            return output

        model.forward = forward
        return model

    learned = nn.Parameter(torch.tensor(2.0))
    for wrap in (WAYS["root"], ddp()):
        refuses("something that has a gradient", wrap(scaled(lambda: learned)))
        refuses("known logits", wrap(scaled(lambda: torch.arange(V))))
    changing = WAYS["root"](scaled(lambda at=[]: at.append(1) or float(2 + (len(at) > 2))))
    models.model_logprob(changing, inputs, labels)
    refuses("were (2.0, None) at the call before", changing)
    assert models.model_logprob(changing, inputs, labels).logps.requires_grad
    hooked = build()
    hooked.lm_head.register_forward_hook(lambda _module, _args, output: output + 1)
    refuses("a hook changes", WAYS["root"](hooked))
    refuses("something that has a gradient", scaled(lambda: learned))


# TRL


def trl_in_data_parallel() -> None:
    """Its own trainer, launched as users do."""
    same()


def same(family: str = "llama", share_prompt: bool = False, **options) -> None:
    """TRL's trainer with dpofast and without it."""
    from dpofast.integrations import trl as integration

    theirs, their_parameters = trained(family, **options)
    calls, linear_logprob = [], integration.linear_logprob
    integration.linear_logprob = lambda *args, **kwargs: calls.append(1) or linear_logprob(*args, **kwargs)
    with integration.patched(share_prompt=share_prompt):
        ours, our_parameters = trained(family, **options)
    integration.linear_logprob = linear_logprob
    assert len(calls) == 3 * 2  # policy and reference
    training.assert_same_numbers(ours, theirs)
    for name, p in their_parameters.items():
        torch.testing.assert_close(our_parameters[name], p, rtol=1e-5, atol=1e-6, msg=lambda m, at=name: f"{at}: {m}")
    start = dict(build(family).named_parameters())
    assert max((p - start[name]).abs().max() for name, p in their_parameters.items()) > 1e-3


def trained(family: str = "llama", prepare=lambda arguments: None, read=parameters, **options):
    """What TRL's DPOTrainer logs, and the parameters in the end."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    with tempfile.TemporaryDirectory() as path:
        arguments = DPOConfig(**training.arguments(path, 3, per_device_train_batch_size=2, **options))
        prepare(arguments)
        trainer = DPOTrainer(
            model=build(family),
            ref_model=build(family, seed=1),
            args=arguments,
            train_dataset=Dataset.from_list(tiny.pairs(16)),
            processing_class=tiny.tokenizer(padding_side="left"),
        )
        trainer.train()
    return training.without_timings(trainer.state.log_history), read(trainer.model)


def trl_in_fsdp2() -> None:
    """TRL's head in a model that is sharded as accelerate does it; accelerate itself does it on a GPU only."""
    from trl.trainer.utils import add_fused_lm_head

    from dpofast.integrations import trl as integration

    tokens, labels = batch()
    for family in ("llama", "gemma2"):
        grads = []
        for patched in (False, True):
            model = build(family)
            add_fused_lm_head(model, outputs=("log_probs", "entropy"))
            model = WAYS["accelerate"](model)
            with integration.patched() if patched else nullcontext():
                for _ in range(2):
                    out = model(input_ids=own(tokens), labels=own(labels), fused_lm_head=True)
                    (out.log_probs.square().mean() + out.entropy.mean()).backward()
            grads.append([p.grad.full_tensor() for p in model.parameters()])
        for found, wanted in zip(*grads[::-1]):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    alone = build()
    add_fused_lm_head(alone)
    alone = WAYS["head"](alone)
    with integration.patched():
        try:
            alone(input_ids=own(tokens), labels=own(labels), fused_lm_head=True)
        except ValueError as error:
            assert "never averaged" in str(error)
        else:
            raise AssertionError("TRL's gradient of a head that is sharded by itself is wrong")


CASES = {f.__name__: f for f in (
    data_parallel, data_parallel_that_looks_for_unused_parameters, data_parallel_with_a_static_graph, fsdp2,
    fsdp2_tied, fsdp2_with_a_sharded_reference, fsdp2_with_adapters_disabled_for_the_reference,
    an_adapter_on_the_head, fsdp2_checkpointed,
    a_rank_without_labels, fsdp2_accumulates, fsdp2_scores_without_gradient,
    the_first_call_draws_the_random_numbers_of_every_other, fsdp2_in_bf16,
    the_whole_head_is_gone_between_forward_and_backward, what_cannot_work_is_refused, trl_in_data_parallel,
    trl_in_fsdp2,
)}  # fmt: skip

if __name__ == "__main__":
    warnings.simplefilter("error", UserWarning)
    launch.main(CASES)
