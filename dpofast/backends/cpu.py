"""The compiled CPU kernels: tensors in, addresses down to ``dpofast._C``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpofast.backends import _pages
from dpofast.backends._tensors import element_offsets, empty_results, pointer
from dpofast.backends.base import InputGrads, LogitsProblem, OutputGrads, Problem, Saved, chunk
from dpofast.contract import DTYPE_CODES, STATISTICS, Stat, flags
from dpofast.grad_filter import TOLERANCE
from dpofast.native import C
from dpofast.plan import Schedule

_NO_FILTER = {"grad_filter": 0.0, "tolerance": 0.0, "dropped_mass": None}
_SMALL_WORKSPACE = 1 << 16  # bytes: what a small head needs, so that its kernel is called once; not tuned


class CpuBackend:
    """`dpofast.backends.base.Backend` on the kernels of one instruction set."""

    def __init__(self, isa: str):
        self.isa = isa

    def cache(self, n_bytes: int, _device: torch.device) -> Tensor:
        return _pages.empty((n_bytes,), torch.uint8, "cache")

    def grad_weight(self, weight: Tensor) -> Tensor:
        return _pages.empty(tuple(weight.shape), weight.dtype, "grad_weight")

    def forward(
        self, problem: Problem, schedule: Schedule, outputs: tuple[str, ...], cache: Tensor
    ) -> dict[str, Tensor]:
        results = empty_results(problem.n_tokens, outputs, problem.wide, problem.hidden.device)
        dropped = torch.empty(problem.n_tokens, dtype=problem.wide) if problem.grad_filter else None
        for tokens in schedule.chunks(problem.n_tokens):
            args, alive = _operands(problem.chunk(tokens), schedule)
            args |= {name: pointer(chunk(results.get(name), tokens)) for name in ("logps", "lse", *STATISTICS)}
            args |= {"grad_filter": problem.grad_filter, "tolerance": TOLERANCE, "dropped_mass": pointer(dropped)}
            self._run(
                C.cpu_linear_logprob_forward,
                args | {"outputs": flags(outputs), "stats": None} | _cache_args(schedule, cache),
            )
            del alive
        return results if dropped is None else results | {"dropped_mass": dropped}

    def fold(self, problem: Problem, schedule: Schedule, outputs: tuple[str, ...]) -> Tensor:
        no_results = dict.fromkeys(("logps", "lse", *STATISTICS))
        folded = []
        for tokens in schedule.chunks(problem.n_tokens):
            args, alive = _operands(problem.chunk(tokens), schedule)
            folded.append(torch.empty(Stat.COUNT, args["n"], dtype=problem.wide))
            args |= no_results | _NO_FILTER | {"outputs": flags(outputs), "stats": folded[-1].data_ptr()}
            self._run(C.cpu_linear_logprob_forward, args | _cache_args(schedule, None))
            del alive
        return torch.cat(folded, 1)

    def backward(
        self, problem: Problem, schedule: Schedule, saved: Saved, incoming: OutputGrads, grads: InputGrads
    ) -> None:
        if incoming.logps is None:
            incoming = incoming._replace(logps=torch.zeros_like(saved.logps))
        bias = grads.bias
        if bias is not None and not grads.adds:
            bias = torch.empty(bias.shape, dtype=problem.wide)
        wide = grads._replace(bias=bias)
        everything = slice(0, problem.n_tokens)
        if schedule.splits_backward or (schedule.token_chunk and not grads.of_head):
            for tokens in schedule.chunks(problem.n_tokens) if grads.hidden is not None else ():
                self._backward(tokens, problem, schedule, saved, incoming, InputGrads(grads.hidden))
            if grads.of_head:
                self._backward(everything, problem, schedule, saved, incoming, wide._replace(hidden=None))
        else:
            self._backward(everything, problem, schedule, saved, incoming, wide)
        if bias is not grads.bias:
            grads.bias.copy_(bias)

    def _backward(
        self,
        tokens: slice,
        problem: Problem,
        schedule: Schedule,
        saved: Saved,
        incoming: OutputGrads,
        grads: InputGrads,
    ) -> None:
        """Fills what some of the tokens add to ``grads``: their own of hidden's, all of the head's."""
        args, alive = _operands(problem.chunk(tokens), schedule)
        saved, incoming, cache = saved.chunk(tokens), incoming.chunk(tokens), saved.cache
        from_saved = (
            incoming.entropy is None
        )  # neither cached exponentials nor the jacobian is enough for the entropy's
        args |= {
            "logps": saved.logps.data_ptr(), "lse": saved.lse.data_ptr(), "grad_logps": incoming.logps.data_ptr(),
            "entropy": None if from_saved else saved.entropy.data_ptr(), "grad_entropy": pointer(incoming.entropy),
            "grad_hidden": pointer(grads.hidden), "grad_positions": chunk(problem.positions, tokens).data_ptr(),
            "grad_hidden_dtype": DTYPE_CODES[(problem.hidden if grads.hidden is None else grads.hidden).dtype],
            "grad_weight": pointer(grads.weight), "grad_bias": pointer(grads.bias), "adds": grads.adds,
            "grad_weight_dtype": DTYPE_CODES[(problem.weight if grads.weight is None else grads.weight).dtype],
            "token_chunk": schedule.token_chunk if grads.of_head else 0, "grad_filter": problem.grad_filter,
        }  # fmt: skip
        self._run(C.cpu_linear_logprob_backward, args | _cache_args(schedule, cache if from_saved else None))
        del alive

    def _run(self, function: Callable[[str, dict[str, Any]], int], args: dict[str, Any]) -> None:
        n_bytes, needed = 0, _SMALL_WORKSPACE
        while n_bytes < needed:  # at most twice: with less than it needs, the function only says how much that is
            n_bytes = needed
            workspace = _pages.empty((n_bytes,), torch.uint8, "workspace")
            needed = function(self.isa, args | {"workspace": workspace.data_ptr(), "workspace_bytes": n_bytes})

    def logits_forward(self, problem: LogitsProblem, outputs: tuple[str, ...]) -> dict[str, Tensor]:
        results = empty_results(problem.n_tokens, outputs, problem.wide, problem.logits.device)
        args, alive = _logits_operands(problem)
        args |= {name: pointer(results.get(name)) for name in ("logps", "lse", *STATISTICS)}
        no_gradients = dict.fromkeys(("grad_logps", "grad_entropy", "grad_logits", "grad_offsets"))
        C.cpu_logits_forward(self.isa, args | no_gradients | {"outputs": flags(outputs)})
        del alive
        return results

    def logits_backward(self, problem: LogitsProblem, saved: Saved, incoming: OutputGrads, grad_logits: Tensor) -> None:
        args, alive = _logits_operands(problem)
        grad_offsets = element_offsets(grad_logits, problem.positions)
        args |= dict.fromkeys(STATISTICS) | {
            "logps": saved.logps.data_ptr(), "lse": saved.lse.data_ptr(), "entropy": pointer(saved.entropy),
            "grad_logps": pointer(incoming.logps), "grad_entropy": pointer(incoming.entropy),
            "grad_logits": grad_logits.data_ptr(), "grad_offsets": grad_offsets.data_ptr(), "outputs": 0,
        }  # fmt: skip
        C.cpu_logits_backward(self.isa, args)
        del alive


def _operands(problem: Problem, schedule: Schedule) -> tuple[dict[str, Any], tuple[Tensor | None, ...]]:
    """The arguments that forward and backward share, and the tensors that must outlive the call."""
    hidden, weight = problem.hidden, problem.weight
    offsets, bias = element_offsets(hidden, problem.positions), problem.wide_bias()
    args = {
        "n": problem.n_tokens, "h": problem.n_hidden, "v": problem.n_vocab,
        "hidden": hidden.data_ptr(), "hidden_dtype": DTYPE_CODES[hidden.dtype],
        "token_offsets": offsets.data_ptr(), "hidden_col_stride": hidden.stride(-1),
        "weight": weight.data_ptr(), "weight_dtype": DTYPE_CODES[weight.dtype],
        "weight_row_stride": weight.stride(0), "weight_col_stride": weight.stride(1),
        "bias": pointer(bias), "labels": problem.labels.data_ptr(), **problem.transform._asdict(),
        "block": schedule.block, "threads": torch.get_num_threads(),
    }  # fmt: skip
    return args, (offsets, bias)


def _cache_args(schedule: Schedule, cache: Tensor | None) -> dict[str, Any]:
    """The arguments that say what the forward writes to the cache, or the backward finds there; None: nothing."""
    at = pointer(cache)
    return {
        "cache": at if schedule.keeps_exps else None,
        "jacobian": at if schedule.keeps_jacobian else None,
        "cache_bytes": 0 if cache is None else cache.numel(),
    }


def _logits_operands(problem: LogitsProblem) -> tuple[dict[str, Any], Tensor]:
    """The arguments that both directions share, and the tensor that must outlive the call."""
    offsets = element_offsets(problem.logits, problem.positions)
    return {
        "n": problem.n_tokens, "v": problem.n_vocab, "logits": problem.logits.data_ptr(),
        "dtype": DTYPE_CODES[problem.logits.dtype], "row_offsets": offsets.data_ptr(),
        "labels": problem.labels.data_ptr(), **problem.transform._asdict(), "threads": torch.get_num_threads(),
    }, offsets  # fmt: skip
