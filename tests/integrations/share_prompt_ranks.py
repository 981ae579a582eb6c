"""Run by `test_share_prompt.py` on two ranks: wrapped models that share prompts, against one process that does not."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from families import V, build
from ranks import launch, sharded
from torch import Tensor, nn

from dpofast.integrations import models
from dpofast.integrations.models import sharing

T, PROMPT, PAIRS, LR = 40, 30, 2, 0.05


def batch(alike: tuple[bool, ...]) -> tuple[Tensor, Tensor]:
    """Tokens and labels [ranks, 2, pairs, T]; the pairs of a rank have a prompt in common, if it is ``alike``."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, V, (len(alike), 2, PAIRS, T), generator=generator)
    for rank, same in enumerate(alike):
        if same:
            tokens[rank, 1, :, :PROMPT] = tokens[rank, 0, :, :PROMPT]
    return tokens, tokens.masked_fill(torch.arange(T) < PROMPT, -100)


def train(model: nn.Module, tokens: Tensor, labels: Tensor, share_prompt: bool, **reference: nn.Module) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    for _ in range(2):
        models.model_dpo_loss(model, inputs, labels, beta=0.5, share_prompt=share_prompt, **reference).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def check(make: Callable[[], nn.Module], wrap: Callable[[nn.Module], nn.Module], alike=(True, True), ref=None) -> None:
    rank = dist.get_rank()
    tokens, labels = batch(alike)
    plain, wrapped = make(), wrap(make())
    start = sharded.parameters(plain)
    references = [{} if ref is None else {"ref_model": f(build(seed=1))} for f in (lambda model: model, ref)]
    union = [x.transpose(0, 1).reshape(-1, T) for x in (tokens, labels)]
    train(plain, *union, False, **references[0])
    rows = []
    bare = wrapped.module if hasattr(wrapped, "module") else wrapped
    bare.get_decoder().layers[-1].register_forward_hook(lambda _m, _a, out: rows.append(len(out)))
    train(wrapped, *(x[rank].reshape(-1, T) for x in (tokens, labels)), True, **references[1])
    assert rows[-1] == (PAIRS if alike[rank] else 2 * PAIRS), rows
    wanted = sharded.parameters(plain)
    assert max((wanted[name] - start[name]).abs().max() for name in wanted) > 1e-2
    for name, p in sharded.parameters(wrapped).items():
        torch.testing.assert_close(p, wanted[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def data_parallel() -> None:
    check(build, sharded.ddp(), ref=sharded.ddp())
    check(sharded.lora, sharded.ddp(find_unused_parameters=True))


def fsdp2() -> None:
    for way in ("root", "head", "accelerate"):
        check(build, sharded.WAYS[way], ref=sharded.WAYS[way])
    check(sharded.lora, sharded.WAYS["accelerate"])


def one_rank_has_nothing_to_share() -> None:
    """And so no rank waits for another in a collective."""
    for wrap in (sharded.ddp(), sharded.WAYS["head"]):
        check(build, wrap, alike=(True, False), ref=wrap)


def trl_in_data_parallel() -> None:
    """TRL's own trainer, launched as users do, with every batch shared."""
    cost, plan, shared = sharing._cost, sharing._plan, []
    sharing._cost = lambda hidden_size, rows, width, causal=False: rows
    sharing._plan = lambda *args: shared.append(plan(*args)) or shared[-1]
    sharded.same(share_prompt=True)
    sharing._cost, sharing._plan = cost, plan
    assert len(shared) == 3 * 2 and None not in shared  # policy and reference


def zero3() -> None:
    """By its name alone, for DeepSpeed is slow to import. Its engine shares, and the plain model beside it does not."""
    from ranks import zero3 as deepspeed

    plain, plan, shared = models.model_dpo_loss, sharing._plan, []
    sharded.T, sharded.LR = T, LR

    def loss(model: nn.Module, *args, **options):
        return plain(model, *args, share_prompt=hasattr(model, "zero_optimization"), **options)

    def noted(*args):
        shared.append(plan(*args))
        return shared[-1]

    models.model_dpo_loss, sharing._plan = loss, noted
    for alike in ((True, True), (True, False)):
        sharded.batch = lambda silent=(), alike=alike: batch(alike)
        deepspeed.check(build, deepspeed.plain_reference)
        deepspeed.check(sharded.lora)
        # two steps each of a model and its reference, and of an adapter and its base; and the transform's, once each
        assert len(shared) >= 8 and all((found is None) != alike[dist.get_rank()] for found in shared)
        shared.clear()


CASES = {f.__name__: f for f in (data_parallel, fsdp2, one_rank_has_nothing_to_share, trl_in_data_parallel, zero3)}

if __name__ == "__main__":
    launch.main(CASES)
