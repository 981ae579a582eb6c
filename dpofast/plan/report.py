"""`plan`: what a call will do, with its reasons, for people."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch

from dpofast import grad_filter as filters
from dpofast.backends import registry
from dpofast.contract import DTYPE_CODES
from dpofast.env_info import amx_note
from dpofast.plan import cost, peers, predict, tiled
from dpofast.plan.choice import choose
from dpofast.plan.cpu_cost import KEPT
from dpofast.plan.pairs import pairs_schedule
from dpofast.plan.peers import LONGEST_PAIR, Peer
from dpofast.plan.predict import Considered, Prediction
from dpofast.plan.schedule import Request, Schedule, parse_bytes

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
    considered: tuple[Considered, ...] = ()  # schedules that fit the budget
    peers: tuple[Peer, ...] = ()  # other libraries' ways, if they were asked for
    gradient_bytes: int = 0
    kept: float | None = None  # the share of entries that a filter is assumed to keep
    scores_fused: bool = False  # the forward has no tiles: its product exponentiates

    @property
    def on_gpu(self) -> bool:
        return self.backend.startswith(("cuda", "triton"))

    def __str__(self) -> str:
        mib = 1 << 20
        lines = [
            ("problem", f"{self.n_tokens} completion tokens, H {self.hidden_size}, V {self.vocab_size}, {self.dtype}"),
            ("backend", self.backend if self.on_gpu else f"{self.backend}, {self.threads} threads"),
            ("schedule", self.schedule),
            ("tiles", self._tiles()),
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
        if self.kept is not None:
            what = "entries" if self.backend.startswith("cpu") else "tiles"
            lines.append(("filter", f"keeps {self.kept:.2%} of the {what}: assumed, since only the data can tell"))
        if len(self.considered) > 1:
            found = zip(("considered", *[""] * len(self.considered)), predict.lines(self.considered), strict=False)
            lines.extend(found)
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
        table = "\n".join(f"{name:<12} {text}" for name, text in lines)
        return f"{table}\n\n{self.peers_table()}" if self.peers else table

    def _tiles(self) -> str:
        exponentiates = "the product exponentiates"
        rows = f"{self.block} vocabulary rows a block, " if self.block else f"none, {exponentiates}; "
        tokens = f"{self.token_chunk} tokens a chunk" if self.token_chunk else "all tokens at once"
        return rows + tokens + (f"; none in the forward, {exponentiates}" if self.scores_fused else "")

    def peers_table(self) -> str:
        """Other libraries' ways, beside this one: the peak is above the inputs, with the gradients."""
        peak = self.cache_bytes + self.workspace_bytes + self.gradient_bytes
        own = f"dpofast, {self.schedule}", self.n_tokens, self.products, self.bytes_moved, peak, self.predicted_seconds
        titles, mib = ("tokens", "products", "moved, MiB", "peak, MiB", "ms"), 1 << 20
        lines = [f"{'by their algorithms':<26} " + " ".join(f"{title:>10}" for title in titles)]
        for name, tokens, products, moved, most, took in (own, *self.peers):
            cells = (
                str(tokens),
                f"{products:.2f}",
                f"{moved / mib:.0f}",
                f"{most / mib:.0f}",
                f"{1e3 * (took or 0):.1f}",
            )
            lines.append(f"{name:<26} " + " ".join(f"{cell:>10}" for cell in cells))
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, for JSON."""
        nested = {name: [row._asdict() for row in getattr(self, name)] for name in ("considered", "peers")}
        return self._asdict() | nested


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
    grad_filter: float | str | None = None,
    kept: float = KEPT,
    with_peers: bool = False,
    positions: int | None = None,
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
        grad_filter: as for `linear_logprob`.
        kept: the share of entries that such a filter keeps, in [0, 1]: it depends on the data. For a GPU a share of
            tiles is assumed, `dpofast.plan.cost.MATTERS`.
        with_peers: whether to say what other libraries' ways would take.
        positions: tokens of the batch with prompts and padding, which some of them work on; default ``n_tokens``.

    Returns:
        A `Plan`. Times are predicted: on the CPU by `dpofast.plan.cpu_cost` at rates measured on this machine, for a
        GPU by the model of `dpofast.plan.cost`, None for "torch" on a CPU.

    Raises:
        ValueError: for an unknown dtype or backend, sizes below 1, a budget that cannot be met, or peers where
            nothing is known of the device.

    Example:
        >>> import dpofast
        >>> dpofast.plan(1000, 576, 49152, "bf16", train_head=False, backend="torch").schedule
        'jacobian'
    """
    sizes = {"n_tokens": n_tokens, "hidden_size": hidden_size, "vocab_size": vocab_size, "positions": positions or 1}
    torch_dtype = _checked(sizes, dtype, kept)
    exact, sheet = _device(device, backend)
    cut = filters.cut_of(grad_filter, torch_dtype, torch_dtype, 0.0)
    request = Request(
        n_tokens, hidden_size, vocab_size, torch_dtype, torch_dtype,
        parse_bytes(memory_budget, default=sheet.default_budget), train_hidden, train_head,
        fuses=fused and tiled.can_fuse(sheet, exact, torch_dtype, torch_dtype, hidden_size), filters=cut > 0,
    )  # fmt: skip
    threads = threads or torch.get_num_threads()
    schedule = choose(request, exact, threads, sheet)
    found = _predicted(request, schedule, exact, threads, sheet, kept, with_peers)
    taken = found.chosen
    others = _peers(request, found, positions, longest_pair, exact) if with_peers else ()
    pairs = _pairs(request, schedule, exact, longest_pair, sheet) if longest_pair else None
    return Plan(
        f"cuda on {device}" if device else exact, schedule.name, n_tokens, hidden_size, vocab_size,
        str(torch_dtype).removeprefix("torch."), threads, schedule.block, schedule.token_chunk, request.budget,
        schedule.cache_bytes, schedule.workspace_bytes, taken.products, 1 + request.n_grads, taken.bytes_moved,
        taken.seconds, found.floor_seconds, found.core_flops, found.kernel_flops, found.otherwise, pairs,
        found.considered, others, _gradient_bytes(request), found.kept,
        schedule.scores_fused,
    )  # fmt: skip


def _checked(sizes: dict[str, int], dtype: str | torch.dtype, kept: float) -> torch.dtype:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: got {size}, expected at least 1")
    if not 0 <= kept <= 1:
        raise ValueError(f"kept: got {kept}, expected a share in [0, 1]")
    torch_dtype = _DTYPE_NAMES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if torch_dtype not in DTYPE_CODES:
        raise ValueError(f"dtype: got {dtype!r}, expected one of {', '.join(_DTYPE_NAMES)}")
    return torch_dtype


def _device(device: str | None, backend: str) -> tuple[str, cost.DataSheet]:
    """The exact backend, and the figures of what it runs on."""
    if device is not None:
        if device not in cost.DEVICES or backend not in ("auto", "cuda"):
            raise ValueError(f"device: got {device!r} with backend={backend!r}, expected one of "
                             f"{', '.join(cost.DEVICES)} with backend 'auto' or 'cuda'")  # fmt: skip
        return "cuda", cost.DEVICES[device]
    on_gpu = _is_for_gpu(backend)
    exact = registry.resolve(backend, "cuda" if on_gpu else "cpu")
    here = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    return exact, cost.device_of(here)


def _predicted(
    request: Request, schedule: Schedule, exact: str, threads: int, sheet: cost.DataSheet, kept: float, with_peers: bool
) -> Prediction:
    name, _, isa = exact.partition(":")
    if name == "cpu":
        return predict.on_cpu(request, schedule, isa, threads, kept, with_peers)
    return predict.on_tiles(request, schedule, exact, sheet)


def _peers(
    request: Request, found: Prediction, positions: int | None, longest_pair: int | None, exact: str
) -> tuple[Peer, ...]:
    if found.machine is None:
        raise ValueError(f"with_peers: not available on backend {exact!r}, of whose device nothing is known: pass "
                         "backend='cpu' or a device")  # fmt: skip
    positions = max(positions or 0, request.n_tokens)
    return tuple(peers.peers(request, found.machine, positions, longest_pair or LONGEST_PAIR))


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


def _gradient_bytes(request: Request) -> int:
    """Of the gradients of hidden and of the head."""
    hidden = request.to_hidden * request.n_tokens * request.hidden_dtype.itemsize
    return request.n_hidden * (hidden + request.to_weight * request.n_vocab * request.weight_dtype.itemsize)
