"""`plan`: what a call will do, with its reasons, for people."""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch

from dpofast import native
from dpofast.backends import registry
from dpofast.contract import DTYPE_CODES
from dpofast.env_info import amx_note
from dpofast.plan import cost, tiled
from dpofast.plan.choice import choose
from dpofast.plan.pairs import pairs_schedule
from dpofast.plan.schedule import Request, Schedule, parse_bytes
from dpofast.plan.tiled import Candidate, cached_columns, tiled_traits

_DTYPE_NAMES = {
    "fp32": torch.float32, "float32": torch.float32, "fp64": torch.float64, "float64": torch.float64,
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16,
}  # fmt: skip


class Plan(NamedTuple):
    """What `linear_logprob` will do for one problem; ``str()`` of it is a table."""

    backend: str
    schedule: str
    n_tokens: int
    hidden_size: int
    vocab_size: int
    dtype: str
    threads: int
    block: int
    token_chunk: int
    memory_budget: int
    cache_bytes: int
    workspace_bytes: int
    products: float
    floor_products: int
    bytes_moved: int
    predicted_seconds: float | None
    floor_seconds: float | None
    core_flops: float | None  # of multiply-adds on one CPU core, measured
    kernel_flops: float | None  # of the micro-kernel on it
    otherwise: str | None = None  # on a GPU: the best schedule of the other kind, and why it was not taken
    pairs: str | None = None  # of a loss: whether it runs by whole pairs instead

    @property
    def on_gpu(self) -> bool:
        return self.backend.startswith(("cuda", "triton"))

    def __str__(self) -> str:
        mib = 1 << 20
        lines = [
            ("problem", f"{self.n_tokens} completion tokens, H {self.hidden_size}, V {self.vocab_size}, {self.dtype}"),
            ("backend", self.backend if self.on_gpu else f"{self.backend}, {self.threads} threads"),
            ("schedule", self.schedule),
            ("tiles", (f"{self.block} vocabulary rows a block, " if self.block else "none, the product exponentiates; ")
             + (f"{self.token_chunk} tokens a chunk" if self.token_chunk else "all tokens at once")),
            ("products", f"{self.products:.2f} (the least for these gradients: {self.floor_products})"),
            ("memory", f"{self.cache_bytes / mib:.1f} MiB cache + {self.workspace_bytes / mib:.1f} MiB workspace, "
             f"budget {self.memory_budget / mib:.1f} MiB"),
            ("bytes moved", f"{self.bytes_moved / mib:.0f} MiB"),
        ]  # fmt: skip
        if self.predicted_seconds is not None and self.floor_seconds is not None:
            source = "from the data sheet" if self.on_gpu else "at this machine's measured peak"
            lines.append(
                ("predicted", f"{self.predicted_seconds * 1e3:.1f} ms, floor {self.floor_seconds * 1e3:.1f} ms "
                 f"(products alone, {source})")
            )  # fmt: skip
        if self.otherwise:
            lines.append(("otherwise", self.otherwise))
        if self.pairs:
            lines.append(("a loss", self.pairs))
        if self.core_flops is not None and self.kernel_flops is not None:
            share = self.kernel_flops / self.core_flops
            lines.append(
                ("a core", f"{self.core_flops / 1e9:.0f} GFLOP/s of multiply-adds; the micro-kernel "
                 f"{self.kernel_flops / 1e9:.0f} ({share:.0%})")
            )  # fmt: skip
        amx = amx_note() if self.backend.startswith("cpu") and self.dtype == "bfloat16" else None
        if amx:
            lines.append(("amx", amx))
        return "\n".join(f"{name:<12} {text}" for name, text in lines)


@functools.lru_cache(maxsize=64)
def _peak(isa: str, hidden_dtype: torch.dtype, weight_dtype: torch.dtype) -> tuple[float, float]:
    """Flop/s of one core and of the micro-kernel on it, measured here and now (about 30 ms)."""
    return native.C.peak(isa, DTYPE_CODES[hidden_dtype], DTYPE_CODES[weight_dtype])


def plan(
    n_tokens: int,
    hidden_size: int,
    vocab_size: int,
    dtype: str | torch.dtype = "bf16",
    *,
    train_hidden: bool = True,
    train_head: bool = True,
    memory_budget: int | str | None = None,
    backend: str = "auto",
    threads: int | None = None,
    device: str | None = None,
    fused: bool = True,
    longest_pair: int | None = None,
) -> Plan:
    """What `linear_logprob` will do for a problem of these sizes, without doing it.

    Args:
        n_tokens: completion tokens (labels that are not ``ignore_index``).
        hidden_size, vocab_size: H and V.
        dtype: of hidden and weight: "bf16", "fp16", "fp32", "fp64" or the torch dtype.
        train_hidden, train_head: whether gradients of hidden and of the head are wanted.
        memory_budget: bytes, or a string such as "512MiB"; default 1 GiB, on a GPU a sixteenth of its memory if that
            is more.
        backend: as for `linear_logprob`, with tensors on a GPU where there is one; "cpu" and "torch" plan for the CPU.
        threads: default ``torch.get_num_threads()``.
        device: a GPU that need not be here, among "a100", "h100", "h200", "b200" and "rtx4090": what backend "cuda"
            would do on it. Its memory is that of the data sheet.
        fused: whether the call has neither bias nor softcap nor outputs, which leaves room for products that
            exponentiate themselves (block 0).
        longest_pair: completion tokens of the longest pair of a preference loss, which then may run by whole pairs.

    Returns:
        A `Plan`. Times are predicted: on the CPU from the micro-kernel's speed measured on this machine, for a
        GPU by the model of `dpofast.plan.cost`, None for "torch" on a CPU.

    Raises:
        ValueError: for an unknown dtype or backend, sizes below 1, or a budget that cannot be met.

    Example:
        >>> import dpofast
        >>> dpofast.plan(1000, 576, 49152, "bf16", train_head=False, backend="torch").schedule
        'jacobian'
    """
    for name, size in (("n_tokens", n_tokens), ("hidden_size", hidden_size), ("vocab_size", vocab_size)):
        if size < 1:
            raise ValueError(f"{name}: got {size}, expected at least 1")
    torch_dtype = _DTYPE_NAMES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if torch_dtype not in DTYPE_CODES:
        raise ValueError(f"dtype: got {dtype!r}, expected one of {', '.join(_DTYPE_NAMES)}")
    gpu, on_gpu = None, False
    if device is not None:
        if device not in cost.DEVICES or backend not in ("auto", "cuda"):
            raise ValueError(f"device: got {device!r} with backend={backend!r}, expected one of "
                             f"{', '.join(cost.DEVICES)} with backend 'auto' or 'cuda'")  # fmt: skip
        gpu, exact = cost.DEVICES[device], "cuda"
    else:
        on_gpu = _is_for_gpu(backend)
        exact = registry.resolve(backend, "cuda" if on_gpu else "cpu")
    sheet = gpu or cost.device_of(torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu"))
    budget = parse_bytes(memory_budget, default=sheet.default_budget)
    request = Request(
        n_tokens, hidden_size, vocab_size, torch_dtype, torch_dtype, budget, train_hidden, train_head,
        fuses=fused and tiled.can_fuse(sheet, exact, torch_dtype, torch_dtype, hidden_size),
    )  # fmt: skip
    threads = threads or torch.get_num_threads()
    schedule = choose(request, exact, threads, sheet)
    products = schedule.products(request.n_grads)
    predicted = floor = core = kernel = otherwise = None
    if exact.startswith("cpu:"):
        bytes_moved = _bytes_on_cpu(request, schedule)
        core, kernel = _peak(exact.partition(":")[2], torch_dtype, torch_dtype)
        predicted, floor = (x * request.flops / (threads * kernel) for x in (products, 1 + request.n_grads))
    else:
        traits = tiled_traits(exact, torch_dtype, torch_dtype)
        columns, _ = cached_columns(schedule, n_tokens, vocab_size, traits.elem)
        moved = cost.traffic(schedule, columns, request, traits)
        bytes_moved = moved.total
        if sheet.sms:
            predicted = sum(cost.seconds(sheet, schedule, columns, request, traits))
            floor = cost.floor_seconds(sheet, request, traits)
            otherwise = _otherwise(request, traits, sheet, Candidate(schedule, predicted))
    return Plan(
        f"cuda on {device}" if gpu else exact, schedule.name, n_tokens, hidden_size, vocab_size,
        str(torch_dtype).removeprefix("torch."), threads, schedule.block, schedule.token_chunk, request.budget,
        schedule.cache_bytes, schedule.workspace_bytes, products, 1 + request.n_grads, int(bytes_moved), predicted,
        floor, core, kernel, otherwise, _pairs(request, schedule, exact, longest_pair, sheet) if longest_pair else None,
    )  # fmt: skip


def _pairs(request: Request, ordinary: Schedule, backend: str, longest_pair: int, device: cost.DataSheet) -> str:
    """How `linear_dpo_loss` would run."""
    found = pairs_schedule(request, ordinary, backend, lambda: longest_pair, device)
    if found is None:
        return "as above: whole pairs at a time would not be faster, or have no room"
    s, mib = found.schedule, 1 << 20
    return (
        f"by whole pairs, up to {found.tokens} tokens at a time: {s.products(request.n_grads):.2f} products, "
        f"{found.kept_bytes / mib:.1f} MiB of sums + {(s.cache_bytes + s.workspace_bytes) / mib:.1f} MiB"
    )


def _is_for_gpu(backend: str) -> bool:
    """Whether the op would be called with tensors on a GPU: where there is one, unless a CPU backend is named."""
    if backend == "auto":
        backend = os.environ.get("DPOFAST_BACKEND") or "auto"
    return backend in ("auto", "cuda", "triton") and torch.cuda.is_available()


def _otherwise(request: Request, traits: cost.TiledTraits, device: cost.DataSheet, chosen: Candidate) -> str | None:
    """The best schedule of the other kind: fused or over tiles where both exist, else one that keeps or makes again."""
    found = list(tiled.candidates(request, traits, device, every=True))
    of_both = {c.schedule.is_fused for c in found} == {True, False}

    def is_other(schedule: Schedule) -> bool:
        if of_both:
            return schedule.is_fused != chosen.schedule.is_fused
        return schedule.keeps_nothing != chosen.schedule.keeps_nothing

    other = tiled.best_of(c for c in found if is_other(c.schedule))
    if other is None:
        return "nothing of another kind fits the budget" if request.n_grads else None
    s, more = other.schedule, other.seconds / chosen.seconds - 1
    tiles = f"{s.token_chunk} x {s.block or 'all'}"
    why = f"{more:+.0%}" if more > 0 else f"{more:+.0%}, but {other.memory / max(1, chosen.memory) - 1:+.0%} memory"
    return (
        f"{s.name}, {tiles}, {s.products(request.n_grads):.2f} products, {other.memory / (1 << 20):.1f} MiB: "
        f"{other.seconds * 1e3:.1f} ms ({why})"
    )


def _bytes_on_cpu(request: Request, schedule: Schedule) -> int:
    weight = request.n_hidden * request.n_vocab * request.weight_dtype.itemsize
    # W is read in the forward and again in the backward unless it has no products left to do with it; d weight is
    # written once; the cache is written once and read once.
    reads = 1 + (request.n_grads > 0 and not schedule.keeps_jacobian)
    tokens = request.n_tokens * request.n_hidden * request.hidden_dtype.itemsize
    return (reads + request.to_weight) * weight + 2 * schedule.cache_bytes + (1 + request.to_hidden) * tokens
