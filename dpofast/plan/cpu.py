"""Schedules of the compiled CPU kernels, by the bytes of their own layout (``csrc/cpu/head_*.h``).

A test holds the two layouts equal, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from dpofast import native
from dpofast.contract import DTYPE_CODES
from dpofast.plan.schedule import Request, Schedule, ceil_div, too_little, up

GROUP_ROWS, FOLD_ROWS = 192, 48  # kGroupRows, kFoldRows of csrc/cpu/head_layout.h
BLOCKS = (GROUP_ROWS, GROUP_ROWS // 2, GROUP_ROWS // 4)
"""Vocabulary rows per block, the first that the budget allows. 192 are deep enough that accumulators are loaded and
stored rarely, and few enough that a block of W stays in an L2 cache at common hidden sizes. Log-probs have the same
bits with each."""

WIDEST_BLOCK = 8 * GROUP_ROWS
"""The most rows that a block of a small problem has: a step of an ordinary one is over sooner than two threads meet."""
BLOCK_BYTES = 448 << 10  # of W, and of g, that a wide block may take: what stays in an L2 cache

PIECES, PANELS_TOGETHER, THREAD_FLOPS = 8, 4, 1e7  # kPieces, kPanelsTogether, kThreadFlops of csrc/cpu/head_layout.h
BUFFERS = 3  # WeightBlocks::kBuffers
FILTER_HEADER = 64  # kFilterHeader of csrc/cpu/head_filter.h
FIRST_PANELS, PANELS_A_FIRST_PANEL = 4, 64  # kLeastPanels, kPanelsAPanel of csrc/cpu/head_forward.h


class Traits(NamedTuple):
    """What the product of two dtypes on an instruction set is made of (csrc/cpu/kernels.h)."""

    vector: int  # tokens in a vector
    panel: int  # tokens in a panel
    unit: int  # k in one dot-product step
    elem: int  # bytes of a product's element
    acc: int  # bytes of an accumulator
    cached: int  # bytes of an exponential that is kept for the backward


TRAITS: dict[tuple[str, torch.dtype, torch.dtype], Traits] = {
    (isa, hidden, weight): Traits(*native.C.traits(isa, DTYPE_CODES[hidden], DTYPE_CODES[weight]))
    for isa in native.cpu_isas()
    for hidden in DTYPE_CODES
    for weight in DTYPE_CODES
}


class Layout:
    """Bytes of each buffer of csrc/cpu/head_*.h, for ``tokens`` of a request and one block size.

    With ``threads`` they are exactly what the kernels ask for, which start fewer threads where the work is small;
    without (0), those that all threads share.
    """

    def __init__(self, request: Request, traits: Traits, block: int, tokens: int, threads: int = 0):
        self.request = request
        self.n, self.h, self.v, self.outputs = tokens, request.n_hidden, request.n_vocab, request.outputs
        self.t, self.block, self.threads = traits, block, threads
        self.n_pad, self.h_pad = up(tokens, traits.vector), up(self.h, traits.unit)
        self.blocks = ceil_div(self.v, block)
        self.tile_rows = min(block, GROUP_ROWS)
        elem = request.weight_dtype.itemsize
        self.as_is = request.as_is and traits.elem == elem and self.h == self.h_pad  # Shape::weight_as_is
        self.direct = elem == traits.acc  # d weight has the accumulator's type, and is its own sum

    def cache_per_block(self):
        folds = ceil_div(self.block, FOLD_ROWS)
        return self._bytes(self.block * self.n_pad * self.t.cached) + self._bytes(folds * self.n_pad * self.t.acc)

    def jacobian(self):
        return self.h * self.n_pad * self.t.acc

    def forward(self, jacobian=False):
        t, started = self.t, self.started(1 + jacobian)
        pieces = min(ceil_div(self.v, GROUP_ROWS), PIECES)
        stats = (2 + self.outputs) * self._bytes(pieces * self.n_pad * t.acc) + self._bytes(self.n_pad * t.acc)
        tile = self._panels_together(started) * (self.tile_rows + 2) * t.panel
        own = self._bytes(started * tile * t.acc) + self._bytes(started * self.h_pad * t.elem)
        if jacobian:
            own += self._bytes(started * self.tile_rows * t.panel * t.elem)
            stats += self._bytes(self.n_pad * t.acc)
        packed = self._bytes(self.h_pad * self.n_pad * t.elem)
        return self._weight_blocks(True, jacobian) + packed + stats + own

    def filter_overhead(self):
        """What a cache has before it has room for entries (Kept of csrc/cpu/head_filter.h)."""
        panels = ceil_div(self.n, self.t.panel)
        pieces = min(ceil_div(self.v, GROUP_ROWS), PIECES)
        segments = self._bytes(4 * panels * pieces) + self._bytes(8 * panels * self.blocks)
        return FILTER_HEADER + self._bytes(self.n * self.t.acc) + self._bytes(self.v * self.t.acc) + segments + 128

    def first_entries(self):
        """Half of the entries in each piece's first rows: before others are seen, real texts keep up to so many."""
        rows = min(self.v, GROUP_ROWS * min(ceil_div(self.v, GROUP_ROWS), PIECES))
        return ceil_div(self.n, self.t.panel) * self.t.panel * rows * (self.t.acc + 2) // 2

    def filtered_forward(self):
        """`forward` with a filter, or of the tokens that go first."""
        panels = ceil_div(self.n, self.t.panel)
        if panels < FIRST_PANELS:
            return self._forward_with_filter()
        n, acc = self.t.panel * ceil_div(panels, PANELS_A_FIRST_PANEL), self.t.acc
        first = Layout(self.request._replace(outputs=0), self.t, self.block, n, self.threads)
        own = 2 * self._bytes(8 * n) + 3 * self._bytes(n * acc) + self._bytes(2 * n * acc)
        return max(self._forward_with_filter(), own + first._forward_with_filter())

    def _forward_with_filter(self):
        t, started = self.t, self.started(1)
        pieces = min(ceil_div(self.v, GROUP_ROWS), PIECES)
        running = 2 * self._bytes(2 * pieces * self.n_pad * t.acc)
        found = started * self.tile_rows * t.panel
        return self.forward() + running + self._bytes(found * t.acc) + self._bytes(2 * found)

    def filtered_backward(self, to_hidden):
        """That of csrc/cpu/head_sparse.h."""
        t, started, n, b = self.t, self.started(2), self.n, self._bytes
        chunk = 8 * t.vector
        ld = up(self.h, chunk)
        total = 2 * b(self.n_pad * t.acc) + (1 + to_hidden) * b(n * ld * t.acc) + 2 * b(ld * t.acc)
        total += b(self.h_pad * self.n_pad * t.elem)
        total += 0 if self.as_is else b(started * self.block * self.h_pad * t.elem)
        total += b(started * (self.tile_rows + 1) * t.panel * t.acc) + b(started * max(ld, t.panel) * t.acc)
        total += 2 * b(8 * n) + 2 * b(8 * self.blocks) + b(8 * (self.blocks + 1)) + b(4 * self.blocks * self.block)
        return total + b(4 * self.block * n) + b(t.acc * self.block * n)

    def backward(self, to_hidden, to_weight, recomputes, entropy, chunk=0):
        """``chunk``: tokens packed at a time, 0: all."""
        t, started = self.t, self.started(recomputes + to_weight + to_hidden)
        window = up(chunk, t.panel) if 0 < chunk < self.n_pad else self.n_pad
        windows = ceil_div(self.n, window)
        tile, row = (self.tile_rows + 1) * t.panel, max(self.h_pad, t.panel)
        total = self._bytes(started * tile * t.acc) + self._bytes(started * row * t.acc)
        total += self._weight_blocks(recomputes or to_hidden, to_hidden)
        ld = window + (64 // t.elem if window * t.elem % 4096 == 0 else 0)
        total += 2 * self._bytes(self.block * ld * t.elem) if to_weight else 0
        total += 2 * self._bytes(self.block * window * t.elem) if to_hidden else 0
        total += (5 if entropy else 3) * self._bytes(self.n_pad * t.acc)
        total += self._bytes(self.h_pad * window * t.elem) if recomputes else 0
        total += self._bytes(self.h * self.n_pad * t.acc) if to_hidden else 0
        if to_weight:
            columns = up(self.h, t.panel)
            total += self._bytes(columns * up(min(window, self.n), t.unit) * t.elem)
            if windows > 1 and not self.direct:
                group = min(self.blocks, max(1, window // self.block))
                total += self._bytes(group * self.block * columns * t.acc)
        return total

    def _weight_blocks(self, rows, columns):
        t = self.t
        converted = BUFFERS * self._bytes(self.block * self.h_pad * t.elem) if rows and not self.as_is else 0
        return converted + (BUFFERS * self._bytes(self.block * self.h * t.elem) if columns else 0)

    def started(self, products: int) -> int:
        """Threads that so many products are worth."""
        if not self.threads:
            return 0
        useful = 2.0 * self.n * (self.h + 16) * self.v * products / THREAD_FLOPS
        return self.threads if useful >= self.threads else max(1, int(useful))

    def _panels_together(self, threads: int) -> int:
        """Panels of tokens that one task takes."""
        share = ceil_div(self.n, self.t.panel) // (2 * threads) if threads else 1
        return min(max(1, share), PANELS_TOGETHER)

    @staticmethod
    def _bytes(n: int) -> int:
        """What an arena hands out for ``n`` bytes."""
        return up(n, 64)


def _block_sizes(n, h, v, elem):
    """Blocks to consider for n tokens, the preferred first: wide ones where nothing is lost by it."""
    wide = GROUP_ROWS
    while 2 * wide <= WIDEST_BLOCK and 2 * wide * max(n, h) * elem <= BLOCK_BYTES:
        wide *= 2
    return [min(block, up(v, 2)) for block in dict.fromkeys((wide, *BLOCKS))]


class _Sizes:
    """One size of blocks, and the schedules that fit with it."""

    def __init__(self, request: Request, traits: Traits, block: int, threads: int):
        self.request, self.traits, self.block = request, traits, block
        self.whole = self._layout(request.n_tokens)
        started = self._layout(request.n_tokens, threads)
        self.own = max(  # bytes that the threads have each for themselves, at most
            started.forward(True) - self.whole.forward(True),
            started.backward(True, True, True, True) - self.whole.backward(True, True, True, True),
            started.filtered_forward() - self.whole.filtered_forward() if request.filters else 0,
            started.filtered_backward(True) - self.whole.filtered_backward(True) if request.filters else 0,
        )

    def _layout(self, tokens: int, threads: int = 0) -> Layout:
        return Layout(self.request, self.traits, self.block, tokens, threads)

    def _schedule(self, name: str, workspace: int, chunk: int = 0, cache: int = 0, share: float = 0.0) -> Schedule:
        return Schedule(name, self.block, chunk, cache, workspace + self.own, share)

    def _chunk_need(self, tokens: int) -> int:
        """So many tokens at a time, without the head's gradient."""
        r, part = self.request, self._layout(tokens)
        return max(part.forward(), part.backward(True, False, True, r.entropy) if r.to_hidden else 0)

    def _window_need(self, tokens: int) -> int:
        """Tokens a window at a time: the same products, of operands packed and widened more than once."""
        r = self.request
        backward = self.whole.backward(r.to_hidden, True, True, r.entropy, tokens)
        return max(self._layout(tokens).forward(), backward)

    def _split_need(self, tokens: int) -> int:
        """Not both gradients at once: d hidden by token chunks, then d weight; one product more."""
        r, part = self.request, self._layout(tokens)
        weight_only = self.whole.backward(False, True, True, r.entropy, tokens)
        return max(part.forward(), part.backward(r.to_hidden, False, True, r.entropy), weight_only)

    def least(self) -> int:
        need = self._split_need if self.request.to_weight else self._chunk_need
        return need(min(self.request.n_tokens, self.traits.panel))

    def frozen_ways(self) -> tuple[Callable[[], Schedule | None], ...]:
        """Ways to run with a frozen head, the preferred first."""
        return self._jacobian, self._without_keeping

    def ways(self) -> tuple[Callable[[], Schedule | None], ...]:
        """Ways to run with a head that is trained, the preferred first. Wide blocks are for problems that fit whole."""
        return (self._cached,) if self._is_wide else (self._cached, self._partly_cached, self._by_windows, self._split)

    def _jacobian(self) -> Schedule | None:
        r, whole = self.request, self.whole
        if not (r.to_hidden and r.keeps):
            return None
        workspace = max(whole.forward(True), whole.backward(True, False, True, True) if r.entropy else 0)
        if workspace + whole.jacobian() > r.budget:
            return None
        return self._schedule("jacobian", workspace, cache=whole.jacobian())

    def _without_keeping(self) -> Schedule | None:
        r = self.request
        name = "recompute" if r.to_hidden else "score"
        if self._chunk_need(r.n_tokens) <= r.budget:
            return self._schedule(name, self._chunk_need(r.n_tokens))
        chunk = self._fitting_chunk(self._chunk_need)
        return self._schedule(name, self._chunk_need(chunk), chunk) if chunk else None

    def _cached(self) -> Schedule | None:
        r, whole = self.request, self.whole
        workspace = max(whole.forward(), whole.backward(r.to_hidden, True, r.entropy, r.entropy))
        cache = whole.cache_per_block() * whole.blocks
        if not r.keeps or workspace + cache > r.budget:
            return None
        return self._schedule("cached", workspace, cache=cache, share=1.0)

    def _partly_cached(self) -> Schedule | None:
        """The exponentials of some blocks kept, or of none where not even one has room."""
        r, whole = self.request, self.whole
        workspace = max(whole.forward(), whole.backward(r.to_hidden, True, True, r.entropy))
        if workspace > r.budget:
            return None
        per_block = whole.cache_per_block()
        blocks = (r.budget - workspace) // per_block if r.keeps else 0
        if not blocks:
            return self._schedule("recompute", workspace)
        if blocks >= whole.blocks:
            return None  # `_cached` fits
        return self._schedule("mixed", workspace, cache=blocks * per_block, share=blocks / whole.blocks)

    def _by_windows(self) -> Schedule | None:
        chunk = self._fitting_chunk(self._window_need)
        return self._schedule("recompute", self._window_need(chunk), chunk) if chunk else None

    def _split(self) -> Schedule | None:
        chunk = self._fitting_chunk(self._split_need) if self.request.to_hidden else 0
        return self._schedule("recompute-split", self._split_need(chunk), chunk) if chunk else None

    def with_filter(self) -> Schedule | None:
        """Room for either the entries that a filter keeps or, where they are too many, all exponentials."""
        r, whole = self.request, self.whole
        if not r.keeps or self._is_wide:
            return None
        forward, backward = whole.filtered_forward(), whole.filtered_backward(r.to_hidden)
        exact = whole.backward(r.to_hidden, r.to_weight, True, r.entropy)
        workspace = max(whole.forward(), forward, backward, exact)
        full = FILTER_HEADER + whole.cache_per_block() * whole.blocks
        cache = min(full, r.budget - workspace)
        if cache < full and cache < whole.filter_overhead() + whole.first_entries():
            return None
        return self._schedule("filtered", workspace, cache=cache, share=cache / full)

    @property
    def _is_wide(self) -> bool:
        """Wide blocks are for problems that fit as they are."""
        return self.block > GROUP_ROWS

    def _fitting_chunk(self, need: Callable[[int], int]) -> int:
        """The largest power-of-two number of panels of tokens whose need fits, 0 if not even one does."""
        panel = self.traits.panel
        chunk = 0 if self._is_wide else up(self.request.n_tokens, panel)
        while chunk >= panel:
            if need(chunk) <= self.request.budget:
                return chunk
            chunk = up(chunk // 2, panel) if chunk > panel else 0
        return 0


def first_fit(request: Request, isa: str, threads: int) -> Schedule:
    """The first schedule that fits, in as few steps as `torch.compile` can follow; see `dpofast.plan.choice.choose`."""
    needed = 0
    for sizes in _all_sizes(request, isa, threads, wide=not request.filters):
        found = sizes.with_filter() if request.filters else None
        for way in sizes.ways() if request.to_weight else sizes.frozen_ways():
            if found is None:
                found = way()
        if found is not None:
            return found
        needed = sizes.least()
    raise too_little(request, needed)


def candidates(request: Request, isa: str, threads: int) -> Iterator[Schedule]:
    """All schedules that fit the budget, the preferred first: one that keeps all it can in the widest blocks."""
    # A filter takes no wide blocks; a frozen head that keeps d logps / d hidden hands it nothing.
    for sizes in _all_sizes(request, isa, threads, wide=not (request.filters and request.to_weight)):
        ways = sizes.ways() if request.to_weight else sizes.frozen_ways()
        filtered = sizes.with_filter() if request.filters else None
        if filtered is not None:
            yield filtered
        for way in ways:
            schedule = way()
            if schedule is not None:
                yield schedule


def _all_sizes(request: Request, isa: str, threads: int, wide: bool) -> list[_Sizes]:
    """Those of the blocks to consider, the preferred first; ``wide``: those of small problems, too."""
    traits = TRAITS[isa, request.hidden_dtype, request.weight_dtype]
    blocks = _block_sizes(request.n_tokens, request.n_hidden, request.n_vocab, traits.elem)
    return [_Sizes(request, traits, b, threads) for b in blocks if wide or b <= GROUP_ROWS]
