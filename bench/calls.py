"""What a call costs the host on a GPU backend, the launches emulated: Python and PyTorch's own small operators.

    dpofast bench calls           ten seconds, on one thread

Tensors are on the CPU and few, kernels and products of backend "cuda" are functions that return at once, and plans are
an H100's, seen before. So neither launches nor a device are in these times: on an H100 a call took about twice as long
(docs/design.md). Of many short runs the shortest counts, for other work on the machine only adds to them.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import dpofast
from dpofast.backends import registry
from dpofast.backends.cuda import CudaPasses
from dpofast.backends.tiled import TiledBackend
from dpofast.bench import record
from dpofast.bench.measure import machine, seconds
from dpofast.bench.record import Record
from dpofast.plan import cost

SHAPE = (64, 128, 4096)  # tokens, H, V: so few that no memory has to come from the system
SEQUENCES = 16
PAIR_LOSSES = ("sigmoid",)
H100 = cost.DEVICES["h100"]


def nothing(*_: Any, **__: Any) -> None:
    """What is launched."""


LAUNCHERS = SimpleNamespace(
    cuda_pair_losses=PAIR_LOSSES,
    **{f"cuda_{name}": nothing for name in (
        "logprob_fold", "logprob_keep", "logprob_seal", "logprob_finish", "logprob_grad", "scale_rows", "sequence_dpo",
    )},
)  # fmt: skip


class Passes(CudaPasses):
    """Those of backend "cuda", without products."""

    product = accumulate = nothing


class Empty(torch.autograd.Function):
    """What PyTorch alone takes for a function of a hidden state and a head: gradients are made, of nothing."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return hidden.new_empty(hidden.shape[:-1], dtype=torch.float32)

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.new_empty(x.shape) for x in ctx.saved_tensors)


@contextlib.contextmanager
def emulated(fuses: bool) -> Iterator[None]:
    """Backend "cuda" on the CPU, planned as for an H100, whose product exponentiates if it ``fuses``."""
    sheet = H100._replace(fuses=fuses)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(registry.added, cuda=TiledBackend(Passes(LAUNCHERS))))
        patches: list[tuple[str, Any]] = [
            ("dpofast._ops.check_range", nothing),  # a GPU is not asked
            ("dpofast.backends.registry.pair_losses", lambda _: PAIR_LOSSES),
            ("dpofast.plan.cost.device_of", lambda _: sheet),
            ("dpofast.plan.cost.default_budget", lambda _: sheet.default_budget),
        ]
        if fuses:
            kernels = ("pack_tokens", "linear_keep", "seal")
            patches += [(f"dpofast.kernels.linear_keep.{name}", nothing) for name in kernels]
        for target, stand_in in patches:
            stack.enter_context(mock.patch(target, stand_in))
        yield


def calls() -> dict[str, Callable[[], object]]:
    n, h, v = SHAPE
    hidden = torch.randn(SEQUENCES, n // SEQUENCES, h, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(v, h, dtype=torch.bfloat16).requires_grad_()
    labels, ref_logps = torch.randint(v, (SEQUENCES, n // SEQUENCES)), torch.randn(SEQUENCES)

    def forward() -> Tensor:
        return dpofast.linear_logprob(hidden, weight, labels, backend="cuda").logps.sum()

    def score() -> None:
        with torch.no_grad():
            forward()

    def backward_of(loss: Tensor) -> None:
        hidden.grad = weight.grad = None
        loss.backward()

    def step() -> None:
        backward_of(dpofast.linear_dpo_loss(hidden, weight, labels, ref_logps=ref_logps, backend="cuda").loss)

    return {
        "score": score,
        "forward": forward,
        "forward + backward": lambda: backward_of(forward()),
        "an empty function, forward + backward": lambda: backward_of(Empty.apply(hidden, weight).sum()),
        "step of linear_dpo_loss": step,
    }


def rows(rounds: int, count: int) -> Iterator[list[Record]]:
    for fuses in (True, False):
        with emulated(fuses):
            for case, call in calls().items():
                for _ in range(50):  # caches fill, and the allocator's
                    call()
                best = min(seconds(lambda call=call: [call() for _ in range(count)]) / count for _ in range(rounds))
                facts = Record("calls", shape=SHAPE, provider="dpofast", backend="cuda", dtype="bf16", case=case)
                tile = (SHAPE[0], 0) if fuses else ()
                yield [facts.of("time of the host, launches emulated", 1e3 * best, "ms", tile=tile)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=400, help="runs a row, the shortest taken (default 400)")
    parser.add_argument("--calls", type=int, default=2, help="calls a run (default 2)")
    record.add_out(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results, out = record.begin(args.out, "calls", machine())
    results.add(rows(args.rounds, args.calls))
    results.save(out)


if __name__ == "__main__":
    main()
