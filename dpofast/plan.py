"""Schedules and tiles: what a call will do, how much memory it will take, and roughly how long.

`choose` is what the op runs on; `plan` is the same answer with its reasons, for people. Sizes are those of
the kernels' own layout (``csrc/cpu/head_*.h``); a test holds the two equal.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from dpofast import _backend, cost
from dpofast.contract import DTYPE_CODES
from dpofast.env_info import amx_note

DEFAULT_MEMORY_BUDGET = 1 << 30
"""Bytes of workspace beyond inputs, outputs and gradients, unless ``memory_budget`` says otherwise."""

GROUP_ROWS, FOLD_ROWS = 192, 48  # kGroupRows, kFoldRows of csrc/cpu/head_layout.h
BLOCKS = (GROUP_ROWS, GROUP_ROWS // 2, GROUP_ROWS // 4)
"""Vocabulary rows per block, the first that the budget allows. 192 are deep enough that accumulators are loaded and
stored rarely, and few enough that a block of W stays in an L2 cache at common hidden sizes. Log-probs have the same
bits with each."""

WIDEST_BLOCK = 8 * GROUP_ROWS
"""For small problems, where a step of one ordinary block is over sooner than two threads can meet."""
BLOCK_BYTES = 448 << 10  # of W, and of g, that a wide block may take: what stays in an L2 cache

PIECES, PANELS_TOGETHER = 8, 4  # kPieces, kPanelsTogether of csrc/cpu/head_layout.h
BUFFERS = 3  # WeightBlocks::kBuffers

_DTYPE_NAMES = {
    "fp32": torch.float32, "float32": torch.float32, "fp64": torch.float64, "float64": torch.float64,
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16,
}  # fmt: skip


class Traits(NamedTuple):
    """Of the product that two dtypes get on an instruction set (csrc/cpu/kernels.h)."""

    vector: int  # tokens in a vector
    panel: int  # tokens in a panel
    unit: int  # k in one dot-product step
    elem: int  # bytes of a product's element
    acc: int  # bytes of an accumulator
    cached: int  # bytes of an exponential that is kept for the backward


TRAITS: dict[tuple[str, torch.dtype, torch.dtype], Traits] = {
    (isa, hidden, weight): Traits(*_backend._C.traits(isa, DTYPE_CODES[hidden], DTYPE_CODES[weight]))
    for isa in _backend.cpu_isas()
    for hidden in DTYPE_CODES
    for weight in DTYPE_CODES
}


class Schedule(NamedTuple):
    """How an op will run. Plain numbers, so that it passes through ``torch.compile``."""

    name: str  # score | jacobian | cached | mixed | recompute | recompute-split
    block: int  # vocabulary rows per block
    token_chunk: int  # completion tokens at a time, where the schedule allows it; 0: all
    cache_bytes: int  # kept from the forward to the backward
    workspace_bytes: int  # the larger of forward's and backward's, without the cache
    cached_share: float  # of the vocabulary

    @classmethod
    def of(cls, name: str, sizes: Sequence[int]) -> Schedule:
        """From what an op is told: the name, and ``sizes`` block, token_chunk and cache_bytes."""
        block, token_chunk, cache_bytes = sizes
        return cls(name, block, token_chunk, cache_bytes, 0, 0.0)

    @property
    def sizes(self) -> list[int]:
        return [self.block, self.token_chunk, self.cache_bytes]

    @property
    def keeps_jacobian(self) -> bool:
        """The cache is d logps / d hidden."""
        return self.name == "jacobian"

    @property
    def keeps_exps(self) -> bool:
        """The cache is the exponentials of some blocks of the vocabulary, or what was made of them."""
        return self.name in ("cached", "mixed")

    @property
    def keeps_nothing(self) -> bool:
        return not (self.keeps_jacobian or self.keeps_exps)

    @property
    def splits_backward(self) -> bool:
        """D hidden is made before the head's gradient, from logits of its own."""
        return self.name == "recompute-split"

    def products(self, to_hidden: bool, to_weight: bool) -> float:
        """How many of N x H x V each, forward and backward."""
        n_grads = to_hidden + to_weight
        if self.keeps_jacobian or not n_grads:
            return 1.0 + n_grads
        if self.splits_backward:
            return 1.0 + 2 * n_grads
        return 1.0 + n_grads + (1 - self.cached_share)

    def chunks(self, n: int) -> list[slice]:
        """The n tokens, as many at a time as the schedule takes."""
        size = self.token_chunk or n
        return [slice(i, min(n, i + size)) for i in range(0, n, size)]


def _up(x: int, to: int) -> int:
    return (x + to - 1) // to * to


def parse_bytes(value: int | str | None, name: str = "memory_budget") -> int:
    """Bytes from an int or a string such as ``"512MiB"``, ``"1.5GB"``; None is the default budget."""
    if value is None:
        return DEFAULT_MEMORY_BUDGET
    if isinstance(value, str):
        text = value.strip()
        units = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1}
        unit = next((u for u in units if text.endswith(u)), None)
        try:
            value = int(float(text[: -len(unit)] if unit else text) * (units[unit] if unit else 1))
        except (ValueError, OverflowError):
            raise ValueError(f"{name}: got {text!r}, expected bytes or a size such as '512MiB'") from None
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an int (bytes) or a string such as '512MiB'")
    if value <= 0:
        raise ValueError(f"{name}: got {value}, expected a positive number of bytes")
    return value


class _Layout:
    """Bytes of each buffer of csrc/cpu/head_*.h, for n tokens and one block size.

    ``direct`` says that d weight has the accumulator's type, and is its own sum.
    """

    def __init__(self, n, h, v, traits: Traits, block, threads, as_is, outputs, direct):
        self.n, self.h, self.v, self.t, self.block, self.threads, self.as_is = n, h, v, traits, block, threads, as_is
        self.n_pad = _up(n, traits.vector)
        self.h_pad = _up(h, traits.unit)
        self.blocks = (v + block - 1) // block
        self.outputs, self.direct = outputs, direct
        self.tile_rows = min(block, GROUP_ROWS)

    def cache_per_block(self):
        folds = -(-self.block // FOLD_ROWS)
        return _up(self.block * self.n_pad * self.t.cached, 64) + _up(folds * self.n_pad * self.t.acc, 64)

    def jacobian(self):
        return self.h * self.n_pad * self.t.acc

    def _weight_blocks(self, rows, columns):
        t = self.t
        converted = BUFFERS * _up(self.block * self.h_pad * t.elem, 64) if rows and not self.as_is else 0
        return converted + (BUFFERS * _up(self.block * self.h * t.elem, 64) if columns else 0)

    def tiles(self):
        """What the threads have of their own: at most the sum over forward's and backward's buffers."""
        t = self.t
        per_thread = (
            PANELS_TOGETHER * (self.tile_rows + 2) * t.panel * t.acc
            + self.tile_rows * t.panel * t.elem
            + max(self.h_pad, t.panel) * t.acc
        )
        return _up(self.threads * per_thread, 64) + 128

    def forward(self, jacobian=False):
        t = self.t
        pieces = min(-(-self.v // GROUP_ROWS), PIECES)
        stats = (2 + self.outputs) * _up(pieces * self.n_pad * t.acc, 64) + _up(self.n_pad * t.acc, 64)
        span = PANELS_TOGETHER  # at most: the kernels may start fewer threads, with more panels each
        if self.threads <= 1:
            span = max(1, min(span, -(-self.n // t.panel) // 2))
        scratch = _up(self.threads * span * (self.tile_rows + 2) * t.panel * t.acc, 64) + _up(
            self.threads * self.h_pad * t.elem, 64
        )
        if jacobian:
            scratch += _up(self.threads * self.tile_rows * t.panel * t.elem, 64) + _up(self.n_pad * t.acc, 64)
        packed = _up(self.h_pad * self.n_pad * t.elem, 64)
        return self._weight_blocks(True, jacobian) + packed + stats + scratch

    def backward(self, to_hidden, to_weight, recomputes, entropy, chunk=0):
        """``chunk``: tokens packed at a time, 0: all."""
        t = self.t
        window = _up(chunk, t.panel) if 0 < chunk < self.n_pad else self.n_pad
        windows = -(-self.n // window)
        row = max(self.h_pad, t.panel)
        total = _up(self.threads * (self.tile_rows + 1) * t.panel * t.acc, 64) + _up(self.threads * row * t.acc, 64)
        total += self._weight_blocks(recomputes or to_hidden, to_hidden)
        ld = window + (64 // t.elem if window * t.elem % 4096 == 0 else 0)
        total += 2 * _up(self.block * ld * t.elem, 64) if to_weight else 0
        total += 2 * _up(self.block * window * t.elem, 64) if to_hidden else 0
        total += (5 if entropy else 3) * _up(self.n_pad * t.acc, 64)
        total += _up(self.h_pad * window * t.elem, 64) if recomputes else 0
        total += _up(self.h * self.n_pad * t.acc, 64) if to_hidden else 0
        if to_weight:
            columns = _up(self.h, t.panel)
            total += _up(columns * _up(min(window, self.n), t.unit) * t.elem, 64)
            if windows > 1 and not self.direct:
                group = min(self.blocks, max(1, window // self.block))
                total += _up(group * self.block * columns * t.acc, 64)
        return total


def _block_sizes(n, h, v, elem):
    """Blocks to consider for n tokens, the preferred first: wide ones where nothing is lost by it."""
    wide = GROUP_ROWS
    while 2 * wide <= WIDEST_BLOCK and 2 * wide * max(n, h) * elem <= BLOCK_BYTES:
        wide *= 2
    return [min(block, _up(v, 2)) for block in dict.fromkeys((wide, *BLOCKS))]


def choose(
    n: int,
    h: int,
    v: int,
    *,
    backend: str,
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    budget: int,
    to_hidden: bool,
    to_weight: bool,
    threads: int = 0,
    as_is: bool = True,
    outputs: int = 0,
    entropy: bool = False,
    device: cost.Device = cost.HOST,
    keeps: bool = True,
) -> Schedule:
    """The schedule for n completion tokens under ``budget`` bytes of workspace.

    Each thread's own tiles (about 100 KiB at common sizes) are not counted against the budget, because results must
    not depend on the number of threads; ``threads`` only adds them to the ``workspace_bytes`` that are reported.

    ``to_hidden`` and ``to_weight`` (or bias) say which gradients will be wanted; ``as_is`` that W's
    columns have unit stride; ``outputs`` counts the optional statistics; ``entropy`` that its gradient may be wanted.
    ``keeps=False`` leaves out the schedules that keep something of the logits from the forward to the backward.
    ``device`` has the figures by which a backend whose products are `torch.mm` chooses its tiles.

    Raises:
        ValueError: if no schedule fits the budget.
    """
    if not backend.startswith("cpu:"):
        tiled = tiled_traits(backend, hidden_dtype, weight_dtype)
        dtypes = hidden_dtype, weight_dtype
        return _choose_tiled(n, h, v, dtypes, tiled, budget, device, to_hidden, to_weight, entropy, keeps)
    traits = TRAITS[backend.partition(":")[2], hidden_dtype, weight_dtype]
    # Rows of another type than the product's are converted, odd ones padded (Shape::weight_as_is).
    as_is = as_is and traits.elem == weight_dtype.itemsize and h % traits.unit == 0
    direct = weight_dtype.itemsize == traits.acc
    needed = 0
    for block in _block_sizes(n, h, v, traits.elem):

        def layout(tokens, threads=0, block=block):
            return _Layout(tokens, h, v, traits, block, threads, as_is, outputs, direct)

        whole = layout(n)
        tiles = layout(n, threads).tiles()
        if not to_weight:
            if to_hidden and keeps:
                workspace = max(whole.forward(True), whole.backward(True, False, True, True) if entropy else 0)
                if workspace + whole.jacobian() <= budget:
                    return Schedule("jacobian", block, 0, whole.jacobian(), workspace + tiles, 0.0)

            def chunk_need(tokens, layout=layout):
                part = layout(tokens)
                return max(part.forward(), part.backward(True, False, True, entropy) if to_hidden else 0)

            schedule = "recompute" if to_hidden else "score"
            if chunk_need(n) <= budget:
                return Schedule(schedule, block, 0, 0, chunk_need(n) + tiles, 0.0)
            if block > GROUP_ROWS:  # wide ones are for problems that fit as they are
                continue
            chunk = _fitting_chunk(n, traits.panel, budget, chunk_need)
            if chunk:
                return Schedule(schedule, block, chunk, 0, chunk_need(chunk) + tiles, 0.0)
            needed = chunk_need(min(n, traits.panel))
            continue

        all_cached = max(whole.forward(), whole.backward(to_hidden, True, entropy, entropy))
        per_block = whole.cache_per_block()
        if keeps and all_cached + per_block * whole.blocks <= budget:
            return Schedule("cached", block, 0, per_block * whole.blocks, all_cached + tiles, 1.0)
        if block > GROUP_ROWS:
            continue
        partly = max(whole.forward(), whole.backward(to_hidden, True, True, entropy))
        if partly <= budget:
            cached = (budget - partly) // per_block if keeps else 0
            share = cached / whole.blocks
            return Schedule("mixed" if cached else "recompute", block, 0, cached * per_block, partly + tiles, share)

        # Tokens a window at a time: the same products, of operands packed and widened more than once.
        def window_need(tokens, layout=layout, whole=whole):
            return max(layout(tokens).forward(), whole.backward(to_hidden, True, True, entropy, tokens))

        chunk = _fitting_chunk(n, traits.panel, budget, window_need)
        if chunk:
            return Schedule("recompute", block, chunk, 0, window_need(chunk) + tiles, 0.0)

        # Not both gradients at once: d hidden by token chunks, then d weight; one product more.
        def split_need(tokens, layout=layout, whole=whole):
            part = layout(tokens)
            weight_only = whole.backward(False, True, True, entropy, tokens)
            return max(part.forward(), part.backward(to_hidden, False, True, entropy), weight_only)

        chunk = _fitting_chunk(n, traits.panel, budget, split_need)
        if chunk and to_hidden:
            return Schedule("recompute-split", block, chunk, 0, split_need(chunk) + tiles, 0.0)
        needed = split_need(min(n, traits.panel))
    raise ValueError(
        f"memory_budget: {budget} bytes cannot be met for {n} completion tokens, hidden size {h} and vocabulary {v}; "
        f"the smallest workspace is about {needed} bytes: raise memory_budget or pass fewer sequences at a time"
    )


chosen = functools.lru_cache(maxsize=1024)(choose)
"""`choose`, remembered: a training loop asks the same again and again, and a small call is over before the answer."""


def _fitting_chunk(n, panel, budget, need):
    """The largest power-of-two number of panels of tokens whose need fits, 0 if not even one does."""
    chunk = _up(n, panel)
    while chunk >= panel:
        if need(chunk) <= budget:
            return chunk
        chunk = _up(chunk // 2, panel) if chunk > panel else 0
    return 0


class TiledTraits(NamedTuple):
    """Of a backend whose products are `torch.mm` (dpofast/backends/tiled.py)."""

    elem: int  # bytes of a product's operand, and so of g
    acc: int  # bytes of an accumulator, and so of a logit
    forward_tiles: int  # tiles of logits alive at once, temporaries included
    backward_tiles: int
    hidden: int  # bytes of an element of hidden
    converts_hidden: bool  # rows of hidden and weight that are not of the product's dtype are converted
    converts_weight: bool


def tiled_traits(backend: str, hidden_dtype: torch.dtype, weight_dtype: torch.dtype) -> TiledTraits:
    wide = torch.float64 if torch.float64 in (hidden_dtype, weight_dtype) else torch.float32
    dtypes = hidden_dtype, weight_dtype
    product, tiles = (wide, 3) if backend == "torch" else (torch.promote_types(*dtypes), 1)
    return TiledTraits(
        product.itemsize, wide.itemsize, tiles, tiles, hidden_dtype.itemsize, *(d != product for d in dtypes)
    )


def cached_columns(choice: Schedule, n: int, v: int, elem: int) -> tuple[int, int]:
    """How many vocabulary columns of g [n, columns] a tiled backend's cache holds, and the stride of its rows."""
    if not choice.keeps_exps:
        return 0, 0
    fit, whole = choice.cache_bytes // (n * elem), _up(v, 8)
    columns = fit // choice.block * choice.block
    return (v, whole) if fit >= whole else (columns, columns)


class _TiledNeeds:
    """Bytes of the buffers of dpofast/backends/tiled.py, for one size of tile."""

    def __init__(self, n, h, v, traits: TiledTraits, chunk, block):
        self.n, self.h, self.v, self.t, self.chunk, self.block = n, h, v, traits, chunk, block
        self.weight_slice = block * h * traits.elem if traits.converts_weight else 0

    def _tokens(self, n):
        return n * self.h * (self.t.elem + (self.t.hidden if self.t.converts_hidden else 0))

    def forward(self, kept=0, g_rows=0):
        t, c = self.t, self.chunk
        references = -(-kept // self.block) * c * t.acc
        tiles = c * self.block * t.acc * t.forward_tiles
        return self._tokens(c) + tiles + self.weight_slice + 8 * 8 * c + references + g_rows * c * t.elem

    def _sums(self, n):
        return n * self.h * (self.t.acc + self.t.hidden)  # and their rounded copy

    def from_kept(self, to_hidden):
        t = self.t
        scaled = self._tokens(self.n) + self.n * self.h * (t.acc + t.elem)
        return self._sums(self.n if to_hidden else 0) + scaled + self.weight_slice + self.block * self.h * t.acc

    def recompute(self, to_hidden, to_weight):
        t, c = self.t, self.chunk
        tiles = c * self.block * (t.acc * t.backward_tiles + (t.elem if t.elem != t.acc else 0))
        sums = self._sums((self.n if to_weight else c) if to_hidden else 0)
        d_weight = self.block * (self.h + -(-self.n // c)) * t.acc if to_weight else 0
        return self._tokens(self.n if to_weight else c) + tiles + self.weight_slice + sums + d_weight


def _tile_sizes(n, v, acc, tile_bytes):
    """(tokens, vocabulary rows) of tiles worth considering: ``tile_bytes``, down to an eighth, and the narrowest."""
    for halvings in range(max(1, n.bit_length())):
        chunk = -(-n >> halvings)
        for size in (tile_bytes, tile_bytes // 2, tile_bytes // 4, tile_bytes // 8, 0):
            yield chunk, min(v, max(64, size // (acc * chunk) // 64 * 64))


def _tiled_choices(n, h, v, traits: TiledTraits, budget, to_hidden, to_weight, entropy, keeps, size):
    """For one size of tile: the schedules that fit, those that are never worse than a later one only."""
    need = _TiledNeeds(n, h, v, traits, *size)

    def choice(schedule, workspace, cache=0, share=0.0):
        return Schedule(schedule, need.block, need.chunk, cache, workspace, share)

    if not to_weight:
        jacobian = n * h * traits.acc
        whole = max(need.forward(v, v), need.recompute(True, False) if entropy else need.chunk * h * traits.acc)
        if keeps and to_hidden and jacobian + whole <= budget and need.chunk >= min(n, 128):
            yield choice("jacobian", whole, jacobian)
            return
        workspace = max(need.forward(), need.recompute(True, False) if to_hidden else 0)
        if workspace <= budget:
            yield choice("recompute" if to_hidden else "score", workspace)
        return
    recompute = need.recompute(to_hidden, True)
    everything = n * _up(v, 8) * traits.elem
    whole = max(need.forward(v), need.from_kept(to_hidden), recompute if entropy else 0)
    if keeps and everything + whole <= budget:
        yield choice("cached", whole, everything, 1.0)
        return
    # In a mixed backward the sums and the tokens of both halves are alive together.
    mixed = max(need.forward(v), need.from_kept(to_hidden) + need.recompute(False, True))
    columns = max(0, budget - mixed) // (n * traits.elem) // need.block * need.block
    if keeps and columns:
        yield choice("mixed", mixed, columns * n * traits.elem, columns / v)
    workspace = max(need.forward(), recompute)
    if workspace <= budget:
        yield choice("recompute", workspace)
    elif to_hidden:
        workspace = max(need.forward(), need.recompute(False, True), need.recompute(True, False))
        if workspace <= budget:
            yield choice("recompute-split", workspace)


def _choose_tiled(n, h, v, dtypes, traits: TiledTraits, budget, device, to_hidden, to_weight, entropy, keeps):
    """The cheapest by `dpofast.cost`, among tiles that stay in the device's L2 cache where the budget allows.

    Where the whole g can be used without a second product of logits, that is taken whatever the model of costs says.
    """
    best = None
    for size in dict.fromkeys(_tile_sizes(n, v, traits.acc, min(device.l2_bytes // 2, budget // 8))):
        for choice in _tiled_choices(n, h, v, traits, budget, to_hidden, to_weight, entropy, keeps, size):
            columns, _ = cached_columns(choice, n, v, traits.elem)
            moved = cost.traffic(choice, columns, n, h, v, traits, dtypes[1].itemsize, to_hidden, to_weight)
            flops = choice.products(to_hidden, to_weight) * 2.0 * n * h * v
            seconds = cost.seconds(device, moved, flops, dtypes[0], choice.token_chunk * choice.block * traits.acc)
            rank = choice.name not in ("cached", "jacobian"), seconds
            if best is None or rank < best[0]:
                best = rank, choice
    if best is not None:
        return best[1]
    least = _TiledNeeds(n, h, v, traits, 1, min(v, 64))
    least = max(least.forward(), least.recompute(False, to_weight), least.recompute(to_hidden, False))
    raise ValueError(
        f"memory_budget: {budget} bytes cannot be met for {n} completion tokens, hidden size {h} and vocabulary {v}; "
        f"the smallest workspace is about {least} bytes: raise memory_budget or pass fewer sequences at a time"
    )


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
    gemms: float
    floor_gemms: int
    bytes_moved: int
    predicted_seconds: float | None
    floor_seconds: float | None
    core_flops: float | None  # of multiply-adds on one CPU core, measured
    kernel_flops: float | None  # of the micro-kernel on it

    def __str__(self) -> str:
        mib = 1 << 20
        lines = [
            ("problem", f"{self.n_tokens} completion tokens, H {self.hidden_size}, V {self.vocab_size}, {self.dtype}"),
            ("backend", self.backend if self.backend.startswith("cuda") else f"{self.backend}, {self.threads} threads"),
            ("schedule", self.schedule),
            ("tiles", f"{self.block} vocabulary rows a block, "
             + (f"{self.token_chunk} tokens a chunk" if self.token_chunk else "all tokens at once")),
            ("products", f"{self.gemms:.2f} (the least for these gradients: {self.floor_gemms})"),
            ("memory", f"{self.cache_bytes / mib:.1f} MiB cache + {self.workspace_bytes / mib:.1f} MiB workspace, "
             f"budget {self.memory_budget / mib:.1f} MiB"),
            ("bytes moved", f"{self.bytes_moved / mib:.0f} MiB"),
        ]  # fmt: skip
        if self.predicted_seconds is not None and self.floor_seconds is not None:
            source = "from the data sheet" if "cuda" in self.backend else "at this machine's measured peak"
            lines.append(
                ("predicted", f"{self.predicted_seconds * 1e3:.1f} ms, floor {self.floor_seconds * 1e3:.1f} ms "
                 f"(products alone, {source})")
            )  # fmt: skip
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
    return _backend._C.peak(isa, DTYPE_CODES[hidden_dtype], DTYPE_CODES[weight_dtype])


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
) -> Plan:
    """What `linear_logprob` will do for a problem of these sizes, without doing it.

    Args:
        n_tokens: completion tokens (labels that are not ``ignore_index``).
        hidden_size, vocab_size: H and V.
        dtype: of hidden and weight: "bf16", "fp16", "fp32", "fp64" or the torch dtype.
        train_hidden, train_head: whether gradients of hidden and of the head are wanted.
        memory_budget: bytes, or a string such as "512MiB"; default 1 GiB.
        backend: as for `linear_logprob`.
        threads: default ``torch.get_num_threads()``.
        device: a GPU that need not be here, among "a100", "h100", "h200", "b200" and "rtx4090": what backend "cuda"
            would do on it.

    Returns:
        A `Plan`. Times are predicted: on the CPU from the micro-kernel's speed measured on this machine, for a
        ``device`` from its data sheet, None for "torch".

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
        on_gpu = backend in ("cuda", "triton") and torch.cuda.is_available()
        exact = _backend.resolve(backend, "cuda" if on_gpu else "cpu")
    budget = parse_bytes(memory_budget)
    threads = threads or torch.get_num_threads()
    choice = choose(
        n_tokens, hidden_size, vocab_size, backend=exact, hidden_dtype=torch_dtype, weight_dtype=torch_dtype,
        budget=budget, to_hidden=train_hidden, to_weight=train_head, threads=threads,
        device=gpu or cost.device_of(torch.device("cuda" if on_gpu else "cpu")),
    )  # fmt: skip
    n_grads = train_hidden + train_head
    gemms = choice.products(train_hidden, train_head)
    flops = 2.0 * n_tokens * hidden_size * vocab_size
    size = torch_dtype.itemsize
    predicted = floor = core = kernel = None
    if exact.startswith("cpu:"):
        weight_bytes = hidden_size * vocab_size * size
        # W is read in the forward and again in the backward unless it has no products left to do with it; d weight
        # is written once; the cache is written once and read once.
        reads_of_weight = 1 + (n_grads > 0 and not choice.keeps_jacobian)
        bytes_moved = reads_of_weight * weight_bytes + train_head * weight_bytes + 2 * choice.cache_bytes
        bytes_moved += (1 + train_hidden) * n_tokens * hidden_size * size
        core, kernel = _peak(exact.partition(":")[2], torch_dtype, torch_dtype)
        predicted, floor = (products * flops / (threads * kernel) for products in (gemms, 1 + n_grads))
    else:
        traits = tiled_traits(exact, torch_dtype, torch_dtype)
        columns, _ = cached_columns(choice, n_tokens, vocab_size, traits.elem)
        sizes = (n_tokens, hidden_size, vocab_size)
        moved = cost.traffic(choice, columns, *sizes, traits, size, train_hidden, train_head)
        bytes_moved = moved.total
        if gpu:
            tile = (choice.token_chunk or n_tokens) * choice.block * traits.acc
            predicted = cost.seconds(gpu, moved, gemms * flops, torch_dtype, tile)
            floor = (1 + n_grads) * flops / gpu.product_flops(torch_dtype)
    return Plan(
        f"cuda on {device}" if gpu else exact, choice.name, n_tokens, hidden_size, vocab_size,
        str(torch_dtype).removeprefix("torch."), threads,
        choice.block, choice.token_chunk, budget, choice.cache_bytes, choice.workspace_bytes, gemms, 1 + n_grads,
        int(bytes_moved), predicted, floor, core, kernel,
    )  # fmt: skip
