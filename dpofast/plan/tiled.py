"""Schedules of the backends whose products are `torch.mm`: the cheapest, by `dpofast.plan.cost`, that fits."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from dpofast.plan import cost
from dpofast.plan.cost import DataSheet, TiledTraits
from dpofast.plan.schedule import Request, Schedule, ceil_div, too_little, up

TILE_MIB = (16, 32, 64, 128, 256, 512)
"""Sizes of a tile of logits on a GPU. From 150 MB on no step of the sweep of 2026-11-26 is more than 3 % faster."""
SMALLEST_CHUNK = 1024
"""Tokens at a time on a GPU, where a budget allows it: the model does not know what reading the weight again costs."""
NARROWEST = 64
"""Vocabulary rows of the narrowest tile, and what the width of every tile is a multiple of: no product of cuBLAS has a
narrower one. Not compared with others."""
_ALIGNMENT = 256  # bytes, that of memory which PyTorch hands out on a GPU
STATS_BYTES = 8 * 8
"""Bytes of running statistics a token: at most eight numbers of eight bytes."""
TRACED_TILE_BYTES = 256 << 20
"""The largest tile of `first_fit`: beyond `TILE_MIB`'s measured 150 MB nothing is gained."""
SKIP_ROWS = 128
"""Tokens of a tile that a filter keeps or skips (`dpofast.kernels.linear_skip.ROWS`); it has `cost.FUSED_COLUMNS`."""
SKIP_HIDDEN = 256
"""Columns of d hidden or d weight that one program sums there."""
SKIP_PROGRAMS = 512
"""Programs of a product there, if they can be so many: about four for each multiprocessor of an H100. Not tuned."""
AS_FAST = 1.02
"""A schedule that needs less memory is taken where its predicted time is longer by no more than this share."""


def tiled_traits(backend: str, hidden_dtype: torch.dtype, weight_dtype: torch.dtype) -> TiledTraits:
    wide = torch.float64 if torch.float64 in (hidden_dtype, weight_dtype) else torch.float32
    dtypes = hidden_dtype, weight_dtype
    product, tiles = (wide, 3) if backend == "torch" else (torch.promote_types(*dtypes), 1)
    return TiledTraits(product.itemsize, wide.itemsize, tiles, hidden_dtype.itemsize, *(d != product for d in dtypes))


def cached_columns(schedule: Schedule, n: int, v: int, elem: int) -> tuple[int, int]:
    """How many vocabulary columns of e [n, columns] a tiled backend's cache holds, and the stride of its rows.

    The factors of the rows lie behind them: n accumulators.
    """
    if not schedule.keeps_exps:
        return 0, 0
    fit, whole = (schedule.cache_bytes - n * max(elem, 4)) // (n * elem), up(v, 8)
    columns = 0 if schedule.is_fused else fit // schedule.block * schedule.block
    return (v, whole) if fit >= whole else (columns, columns)


def skip_tiles(n: int, v: int) -> tuple[int, int]:
    """The tiles of e that a filter keeps or skips: rows of them, and columns."""
    return ceil_div(n, SKIP_ROWS), ceil_div(v, cost.FUSED_COLUMNS)


def skip_splits(n: int, h: int) -> int:
    """Into how many parts each sum of d hidden is cut where tiles are skipped."""
    return min(8, ceil_div(SKIP_PROGRAMS, ceil_div(n, SKIP_ROWS) * ceil_div(h, SKIP_HIDDEN)))


def skip_bytes(n: int, h: int, v: int, elem: int) -> list[int]:
    """Bytes of the fields of `dpofast.backends.tiled.Kept`, which lie at the end of a cache."""
    rows, columns = skip_tiles(n, v)
    sizes = 8 * v, elem * v * h, 4 * n, 4 * rows * (1 + columns), 4 * columns * (1 + rows)
    return [up(size, _ALIGNMENT) for size in sizes]


class _Needs:
    """Bytes of the buffers of dpofast/backends/tiled.py, for one size of tile."""

    def __init__(self, n, h, v, traits: TiledTraits, chunk, block):
        self.n, self.h, self.v, self.t, self.chunk, self.block = n, h, v, traits, chunk, up(block, 8)
        self.weight_slice = block * h * traits.elem if traits.converts_weight else 0

    def _tokens(self, n):
        return n * self.h * (self.t.elem + (self.t.hidden if self.t.converts_hidden else 0))

    def forward(self, cached=0, g_rows=0):
        t, c = self.t, self.chunk
        shifts = ceil_div(cached, self.block) * c * t.acc
        tiles = c * self.block * t.acc * t.tiles
        return self._tokens(c) + tiles + self.weight_slice + STATS_BYTES * c + shifts + g_rows * c * t.elem

    def _sums(self, n):
        return n * self.h * (self.t.acc + self.t.hidden)  # and their rounded copy

    def from_cached(self, to_hidden):
        t = self.t
        scaled = self._tokens(self.n) + self.n * self.h * (t.acc + t.elem)
        return self._sums(self.n if to_hidden else 0) + scaled + self.weight_slice + self.block * self.h * t.acc

    def recompute(self, to_hidden, to_weight):
        t, c = self.t, self.chunk
        tiles = c * self.block * (t.acc * t.tiles + (t.elem if t.elem != t.acc else 0))
        sums = self._sums((self.n if to_weight else c) if to_hidden else 0)
        d_weight = self.block * (self.h + -(-self.n // c)) * t.acc if to_weight else 0
        return self._tokens(self.n if to_weight else c) + tiles + self.weight_slice + sums + d_weight

    def fused(self, g_rows=0):
        """Bytes of a forward whose product exponentiates itself: sums and shifts are all it writes beside e."""
        c, parts = self.chunk, ceil_div(self.v, cost.FUSED_COLUMNS)
        return self._tokens(c) + 2 * parts * c * self.t.acc + STATS_BYTES * c + g_rows * c * self.t.elem

    def filtered(self):
        """Bytes of a forward and a backward that skip tiles: masses of tiles; sums of d hidden, in parts."""
        t, n, h = self.t, self.n, self.h
        splits = skip_splits(n, h)
        ranking = 3 * min(n, cost.RANKING_TOKENS) * self.v * t.acc  # logits, and what their sums need beside them
        forward = max(ranking, self.fused()) + 32 * self.v
        backward = self._sums(n) + n * h * (t.acc * (splits if splits > 1 else 0) + t.elem)
        return max(forward, backward)


def _host_sizes(n, v, acc, tile_bytes):
    """(tokens, vocabulary rows) of tiles worth considering: ``tile_bytes``, down to an eighth, and the narrowest."""
    for halvings in range(max(1, n.bit_length())):
        chunk = -(-n >> halvings)
        for size in (tile_bytes, tile_bytes // 2, tile_bytes // 4, tile_bytes // 8, 0):
            yield chunk, min(v, max(NARROWEST, size // (acc * chunk) // NARROWEST * NARROWEST))


def _gpu_sizes(n, v, acc, budget):
    """(tokens, vocabulary rows) of tiles worth considering: equal shares of the vocabulary, the largest first."""
    for halvings in range(max(1, n.bit_length())):
        chunk = -(-n >> halvings)
        for mib in reversed(TILE_MIB):
            pieces = ceil_div(v * chunk * acc, min(mib << 20, budget // 2))
            yield chunk, min(v, max(NARROWEST, up(ceil_div(v, pieces), NARROWEST)))
        yield chunk, min(v, NARROWEST)


def _fused(request: Request, traits: TiledTraits) -> Iterator[Schedule]:
    """Schedules whose product exponentiates itself, for all tokens at once or as many as the budget has room for."""
    r = request
    if r.filters and r.n_grads:
        yield from _filtered(r, traits)
    factors, found = r.n_tokens * traits.acc, False
    for halvings in range(1 if r.to_weight else max(1, r.n_tokens.bit_length())):
        chunk = -(-r.n_tokens >> halvings)
        if chunk < 128 <= r.n_tokens or (found and chunk < SMALLEST_CHUNK):
            return
        need = _Needs(r.n_tokens, r.n_hidden, r.n_vocab, traits, chunk, 0)
        if r.to_weight:
            name, cache = "cached", r.n_tokens * up(r.n_vocab, 8) * traits.elem + factors
            workspace = max(need.fused(), need.from_cached(r.to_hidden))
        elif r.to_hidden:
            name, cache = "jacobian", r.n_tokens * r.n_hidden * traits.acc + factors
            workspace = max(need.fused(up(r.n_vocab, 8)), chunk * r.n_hidden * traits.acc)
        else:
            name, cache, workspace = "score", 0, need.fused()
        if cache and not r.keeps:
            return
        if cache + workspace <= r.budget:
            found = True
            yield Schedule(name, 0, chunk, cache, workspace, float(name == "cached"))


def _filtered(request: Request, traits: TiledTraits) -> Iterator[Schedule]:
    """The schedule that keeps e, and multiplies those tiles of it that matter."""
    n, h, v = request.n_tokens, request.n_hidden, request.n_vocab
    cache = up(n * up(v, 8) * traits.elem + n * traits.acc, _ALIGNMENT) + sum(skip_bytes(n, h, v, traits.elem))
    workspace = _Needs(n, h, v, traits, n, 0).filtered()
    if request.keeps and cache + workspace <= request.budget:
        yield Schedule("filtered", 0, n, cache, workspace, 1.0)


def _schedules(request: Request, traits: TiledTraits, size: tuple[int, int], every: bool = False) -> Iterator[Schedule]:
    """The schedules that fit with one size of tile; unless ``every``, only those that none is always better than."""
    r, need = request, _Needs(request.n_tokens, request.n_hidden, request.n_vocab, traits, *size)
    factors = r.n_tokens * traits.acc
    fuses = r.is_plain and r.keeps and need.chunk >= min(r.n_tokens, 128)

    def schedule(name: str, workspace: int, cache: int = 0, share: float = 0.0) -> Schedule:
        return Schedule(name, size[1], need.chunk, cache, workspace, share)

    def again(name: str, backward: int) -> Iterator[Schedule]:
        """What makes logits again, after a score without any where that fits."""
        for forward, fused in ((need.fused(), True), (need.forward(), False)):
            if (fuses or not fused) and max(forward, backward) <= r.budget:
                yield schedule(name, max(forward, backward))._replace(scores_fused=fused)
                if not every:
                    return

    if not r.to_weight:
        jacobian, v = r.n_tokens * r.n_hidden * traits.acc + factors, r.n_vocab
        backward = need.recompute(True, False) if r.entropy else need.chunk * r.n_hidden * traits.acc
        whole = max(need.forward(v, v), backward)
        if r.keeps and r.to_hidden and jacobian + whole <= r.budget and need.chunk >= min(r.n_tokens, 128):
            yield schedule("jacobian", whole, jacobian)
            if not every:
                return
        if r.to_hidden:
            yield from again("recompute", need.recompute(True, False))
        elif need.forward() <= r.budget:
            yield schedule("score", need.forward())
        return
    recompute = need.recompute(r.to_hidden, True)
    everything = r.n_tokens * up(r.n_vocab, 8) * traits.elem + factors
    whole = max(need.forward(r.n_vocab), need.from_cached(r.to_hidden), recompute if r.entropy else 0)
    if r.keeps and everything + whole <= r.budget:
        yield schedule("cached", whole, everything, 1.0)
        if not every:
            return
    # In a mixed backward the sums and the tokens of both halves are alive together.
    mixed = max(need.forward(r.n_vocab), need.from_cached(r.to_hidden) + need.recompute(False, True))
    columns = max(0, r.budget - mixed - factors) // (r.n_tokens * traits.elem) // size[1] * size[1]
    if r.keeps and 0 < columns < r.n_vocab:
        yield schedule("mixed", mixed, columns * r.n_tokens * traits.elem + factors, columns / r.n_vocab)
    found = list(again("recompute", recompute))
    if not found and r.to_hidden:
        found = list(again("recompute-split", max(need.recompute(False, True), need.recompute(True, False))))
    yield from found


class Candidate(NamedTuple):
    """A schedule and its predicted seconds, forward and backward."""

    schedule: Schedule
    seconds: float

    @property
    def memory(self) -> int:
        return self.schedule.cache_bytes + self.schedule.workspace_bytes


def candidates(request: Request, traits: TiledTraits, device: DataSheet, every: bool = False) -> Iterator[Candidate]:
    """Schedules that fit the budget, over tiles and fused; all of them if ``every``."""
    n, v = request.n_tokens, request.n_vocab

    def candidate(schedule: Schedule) -> Candidate:
        columns, _ = cached_columns(schedule, n, v, traits.elem)
        return Candidate(schedule, sum(cost.seconds(device, schedule, columns, request, traits)))

    if device.sms:
        sizes = _gpu_sizes(n, v, traits.acc, request.budget)
    else:
        sizes = _host_sizes(n, v, traits.acc, min(device.l2_bytes // 2, request.budget // 8))
    found = False
    for size in dict.fromkeys(sizes):
        if found and device.sms and size[0] < min(n, SMALLEST_CHUNK):
            break
        for schedule in _schedules(request, traits, size, every):
            found = True
            yield candidate(schedule)
    if request.is_plain:
        yield from map(candidate, _fused(request, traits))


def best_of(found: Iterable[Candidate], as_fast: float = AS_FAST) -> Candidate | None:
    """The one that needs least memory among those predicted to be nearly as fast as the fastest."""
    found, fastest, best = list(found), float("inf"), None
    for c in found:  # as loops, which torch.compile can follow
        fastest = min(fastest, c.seconds)
    for c in found:
        if c.seconds <= as_fast * fastest:
            rank = (c.memory, c.seconds) if as_fast != 1.0 else (c.seconds, c.memory)
            if best is None or rank < best[0]:
                best = rank, c
    return None if best is None else best[1]


@functools.lru_cache(maxsize=1024)
def _best(request: Request, traits: TiledTraits, device: DataSheet) -> Candidate | None:
    return best_of(candidates(request, traits, device), AS_FAST if device.sms else 1.0)


def can_fuse(device: DataSheet, backend: str, hidden: torch.dtype, weight: torch.dtype, n_hidden: int) -> bool:
    """Whether `linear_keep` has a variant for these, without bias, softcap and statistics."""
    return device.fuses and backend in ("cuda", "triton") and {hidden, weight} == {torch.bfloat16} and n_hidden % 8 == 0


def choose(request: Request, backend: str, device: DataSheet) -> Schedule:
    """The cheapest by `dpofast.plan.cost`, or what needs less memory and is nearly as fast.

    On a GPU it is looked for once for numbers of tokens that differ by less than 3 %: the number is another in every
    step of a training run, and the search takes milliseconds.
    """
    traits = tiled_traits(backend, request.hidden_dtype, request.weight_dtype)
    n, h, v = request.n_tokens, request.n_hidden, request.n_vocab
    if device.sms:
        about = up(n, 1 << max(0, n.bit_length() - 6))
        best = _best(request._replace(n_tokens=about), traits, device)
        schedule = best and _for_fewer(best.schedule, about, request, traits)
        if schedule:
            return schedule
    best = _best(request, traits, device)
    if best is not None:
        return best.schedule
    least = _Needs(n, h, v, traits, 1, min(v, NARROWEST))
    raise too_little(
        request,
        max(least.forward(), least.recompute(False, request.to_weight), least.recompute(request.to_hidden, False)),
    )


def first_fit(request: Request, backend: str, device: DataSheet) -> Schedule:
    """`choose` in as few steps as a symbolic number of tokens allows: what keeps most, in the largest tiles that fit.

    `torch.compile` with dynamic shapes takes more than a minute to follow the other, and that of PyTorch 2.8 cannot.
    """
    traits = tiled_traits(backend, request.hidden_dtype, request.weight_dtype)
    n, v = request.n_tokens, request.n_vocab
    if request.is_plain:
        for schedule in _fused(request, traits):
            return schedule
    fits, most = None, TRACED_TILE_BYTES if device.sms else device.l2_bytes // 2
    for halvings in range(12):
        chunk = -(-n // (1 << halvings))
        size = min(most, request.budget // 8)  # an eighth: some three tiles and what is beside them fit
        block = min(v, max(NARROWEST, size // (traits.acc * chunk) // NARROWEST * NARROWEST))
        for schedule in _schedules(request, traits, (chunk, block)):
            if schedule.name in ("cached", "jacobian", "score"):
                return schedule
            if fits is None:
                fits = schedule
    return choose(request, backend, device) if fits is None else fits


def _for_fewer(schedule: Schedule, about: int, request: Request, traits: TiledTraits) -> Schedule | None:
    """What was chosen for ``about`` tokens, for the somewhat fewer of the request, in as many chunks."""
    chunk = ceil_div(request.n_tokens, ceil_div(about, schedule.token_chunk))
    if schedule.block == 0:
        fused = _fused(request, traits)
        same = (s for s in fused if s.name == schedule.name)
        return next((s for s in same if s.token_chunk >= chunk and s.token_chunk <= 2 * chunk), None)
    found = _schedules(request, traits, (chunk, schedule.block))
    kind = schedule.name, schedule.scores_fused
    return next((s for s in found if (s.name, s.scores_fused) == kind), None)
