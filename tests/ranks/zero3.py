"""Run by `test_sharded.py` on two ranks: DeepSpeed's ZeRO-3, whose CPU accelerator stands in for a GPU.

As `sharded.py`: parameters after steps, against one process with all pairs.
"""

from __future__ import annotations

import deepspeed
import torch
import torch.distributed as dist
from accelerate import PartialState
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
from ranks import launch
from ranks import sharded as cases
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig
from trl.trainer.utils import add_fused_lm_head

from dpofast.integrations import models
from dpofast.integrations import trl as integration

deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False  # shared-memory collectives: minutes to compile


def config(accumulate: int = 1, **zero) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 1e9,  # the default clips
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        # nothing is kept whole because it is small, or soon to be used again
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_reuse_distance": 0,
            "reduce_bucket_size": 10_000,
            **zero,
        },
    }


def engine(model: nn.Module, **options) -> nn.Module:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=cases.LR)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config(**options))[0]


def parameters(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, p in model.named_parameters():
        with deepspeed.zero.GatheredParameters([p]):
            found[name] = p.detach().clone()
    return found


def is_sharded(weight: nn.Parameter) -> bool:
    return weight.numel() == 0 and weight.ds_status.name == "NOT_AVAILABLE"


def check(build, ref_model=None, silent=(), accumulate: int = 1, direct=False, **zero) -> None:
    """Two steps of each; ``direct``: by ``loss.backward()`` instead of the engine's."""
    plain, start = build(), cases.parameters(build())
    reference = {"reference": {"ref_model": lambda: cases.build(seed=1)}} if ref_model is not None else {}
    wanted = cases.step(plain, cases.union, silent, **reference)
    wrapped = engine(build(), accumulate=accumulate, **zero)
    tokens, labels = map(cases.own, cases.batch(silent))
    ref = {} if ref_model is None else {"ref_model": ref_model()}
    weight = models.head.find(wrapped).linear.weight
    for _ in range(2 * accumulate):
        out = models.model_dpo_loss(wrapped, {"input_ids": tokens}, labels, beta=0.5, **ref)
        assert is_sharded(weight) or zero  # between forward and backward
        if direct:
            out.loss.backward()
        else:
            wrapped.backward(out.loss)
        wrapped.step()
    assert is_sharded(weight) or zero
    mine = wanted.chosen_rewards.unflatten(0, (-1, cases.PAIRS))[dist.get_rank()]
    torch.testing.assert_close(out.chosen_rewards, mine, rtol=1e-4, atol=1e-5)
    trained = cases.parameters(plain)
    for name, p in parameters(wrapped.module).items():
        torch.testing.assert_close(p, trained[name], rtol=5e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert max((trained[name] - start[name]).abs().max() for name in trained) > 1e-2
    wrapped.destroy()


def plain_reference() -> nn.Module:
    return cases.build(seed=1)


def sharded_reference() -> nn.Module:
    model = deepspeed.initialize(model=cases.build(seed=1), config=config())[0]
    model.eval()
    return model


def zero3() -> None:
    check(cases.build, plain_reference)


def zero3_tied() -> None:
    for family in ("gemma2", "cohere"):
        check(lambda family=family: cases.build(family), plain_reference)
        check(lambda family=family: cases.build(family), plain_reference, stage3_max_reuse_distance=10**9)


def zero3_with_a_sharded_reference() -> None:
    check(cases.build, sharded_reference)


def zero3_with_adapters_disabled_for_the_reference() -> None:
    check(cases.lora)


def zero3_where_a_rank_has_no_label() -> None:
    check(cases.build, plain_reference, silent=(1,))


def zero3_accumulating() -> None:
    """The engine divides by the number of batches in ``backward``, or in a hook on the model's output."""
    check(cases.build, plain_reference, accumulate=2)
    check(cases.build, plain_reference, accumulate=2, direct=True)


def an_adapter_on_the_head() -> None:
    """Whose weights are read in its place and not in their own modules' forward: DeepSpeed's external parameters."""
    check(cases.adapter_on_the_head)
    check(cases.adapter_on_the_head, accumulate=2)


def trl_in_zero3() -> None:
    """Its own trainer and engine, launched as users do, but that accelerate has to be told that a CPU has ranks too."""

    def prepare(arguments) -> None:
        assert arguments.device.type == "cpu"
        rank = dist.get_rank()
        PartialState._shared_state.update(
            num_processes=dist.get_world_size(), process_index=rank, local_process_index=rank
        )

    for family, zero in {"llama": {}, "gemma2": {"stage3_max_reuse_distance": 10**9}}.items():
        options = {"deepspeed": config(**zero), "use_cpu": False, "max_grad_norm": 1e9}
        cases.same(family, prepare=prepare, read=parameters, **options)


def trl_refuses_a_head_that_is_gone_in_the_backward() -> None:
    """An engine gathers for the backward what its forward has had to gather, and not what somebody else did."""
    tokens, labels = cases.batch()
    model = cases.build()
    zero3_enabled = HfDeepSpeedConfig(config())  # what TRL asks; for as long as it lives
    add_fused_lm_head(model)
    wrapped = engine(model)
    with integration.patched(), deepspeed.zero.GatheredParameters([model.lm_head.weight]):
        out = wrapped(input_ids=cases.own(tokens), labels=cases.own(labels), fused_lm_head=True)
    try:
        wrapped.backward(out.log_probs.mean())
    except RuntimeError as error:
        assert "has not gathered the head for the backward" in str(error)
    else:
        raise AssertionError("expected a refusal")
    del zero3_enabled


CASES = {f.__name__: f for f in (
    zero3, zero3_tied, zero3_with_a_sharded_reference, zero3_with_adapters_disabled_for_the_reference,
    zero3_where_a_rank_has_no_label, zero3_accumulating, an_adapter_on_the_head,
    trl_in_zero3,  # from here on models are made in pieces
    trl_refuses_a_head_that_is_gone_in_the_backward,
)}  # fmt: skip

if __name__ == "__main__":
    launch.main(CASES)
