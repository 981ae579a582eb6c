"""Schedules of the backends whose products are `torch.mm`: the cheapest, by `dpofast.plan.cost`, that fits."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dpofast.plan import cost
from dpofast.plan.cost import DataSheet, TiledTraits
from dpofast.plan.schedule import Request, Schedule, too_little, up


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
    columns = fit // schedule.block * schedule.block
    return (v, whole) if fit >= whole else (columns, columns)


class _Needs:
    """Bytes of the buffers of dpofast/backends/tiled.py, for one size of tile."""

    def __init__(self, n, h, v, traits: TiledTraits, chunk, block):
        self.n, self.h, self.v, self.t, self.chunk, self.block = n, h, v, traits, chunk, up(block, 8)
        self.weight_slice = block * h * traits.elem if traits.converts_weight else 0

    def _tokens(self, n):
        return n * self.h * (self.t.elem + (self.t.hidden if self.t.converts_hidden else 0))

    def forward(self, kept=0, g_rows=0):
        t, c = self.t, self.chunk
        references = -(-kept // self.block) * c * t.acc
        tiles = c * self.block * t.acc * t.tiles
        return self._tokens(c) + tiles + self.weight_slice + 8 * 8 * c + references + g_rows * c * t.elem

    def _sums(self, n):
        return n * self.h * (self.t.acc + self.t.hidden)  # and their rounded copy

    def from_kept(self, to_hidden):
        t = self.t
        scaled = self._tokens(self.n) + self.n * self.h * (t.acc + t.elem)
        return self._sums(self.n if to_hidden else 0) + scaled + self.weight_slice + self.block * self.h * t.acc

    def recompute(self, to_hidden, to_weight):
        t, c = self.t, self.chunk
        tiles = c * self.block * (t.acc * t.tiles + (t.elem if t.elem != t.acc else 0))
        sums = self._sums((self.n if to_weight else c) if to_hidden else 0)
        d_weight = self.block * (self.h + -(-self.n // c)) * t.acc if to_weight else 0
        return self._tokens(self.n if to_weight else c) + tiles + self.weight_slice + sums + d_weight


def _tile_sizes(n, v, acc, tile_bytes):
    """(tokens, vocabulary rows) of tiles worth considering: ``tile_bytes``, down to an eighth, and the narrowest."""
    for halvings in range(max(1, n.bit_length())):
        chunk = -(-n >> halvings)
        for size in (tile_bytes, tile_bytes // 2, tile_bytes // 4, tile_bytes // 8, 0):
            yield chunk, min(v, max(64, size // (acc * chunk) // 64 * 64))


def _schedules(request: Request, traits: TiledTraits, size: tuple[int, int]) -> Iterator[Schedule]:
    """For one size of tile: the schedules that fit, those that are never worse than a later one only."""
    r, need = request, _Needs(*request[:3], traits, *size)
    factors = r.n_tokens * traits.acc

    def schedule(name: str, workspace: int, cache: int = 0, share: float = 0.0) -> Schedule:
        return Schedule(name, size[1], need.chunk, cache, workspace, share)

    if not r.to_weight:
        jacobian, v = r.n_tokens * r.n_hidden * traits.acc + factors, r.n_vocab
        again = need.recompute(True, False) if r.entropy else need.chunk * r.n_hidden * traits.acc
        whole = max(need.forward(v, v), again)
        if r.keeps and r.to_hidden and jacobian + whole <= r.budget and need.chunk >= min(r.n_tokens, 128):
            yield schedule("jacobian", whole, jacobian)
            return
        workspace = max(need.forward(), need.recompute(True, False) if r.to_hidden else 0)
        if workspace <= r.budget:
            yield schedule("recompute" if r.to_hidden else "score", workspace)
        return
    recompute = need.recompute(r.to_hidden, True)
    everything = r.n_tokens * up(r.n_vocab, 8) * traits.elem + factors
    whole = max(need.forward(r.n_vocab), need.from_kept(r.to_hidden), recompute if r.entropy else 0)
    if r.keeps and everything + whole <= r.budget:
        yield schedule("cached", whole, everything, 1.0)
        return
    # In a mixed backward the sums and the tokens of both halves are alive together.
    mixed = max(need.forward(r.n_vocab), need.from_kept(r.to_hidden) + need.recompute(False, True))
    columns = max(0, r.budget - mixed - factors) // (r.n_tokens * traits.elem) // size[1] * size[1]
    if r.keeps and columns:
        yield schedule("mixed", mixed, columns * r.n_tokens * traits.elem + factors, columns / r.n_vocab)
    workspace = max(need.forward(), recompute)
    if workspace <= r.budget:
        yield schedule("recompute", workspace)
    elif r.to_hidden:
        workspace = max(need.forward(), need.recompute(False, True), need.recompute(True, False))
        if workspace <= r.budget:
            yield schedule("recompute-split", workspace)


def choose(request: Request, backend: str, device: DataSheet) -> Schedule:
    """The cheapest by `dpofast.plan.cost`, among tiles that stay in the device's L2 cache where the budget allows.

    Where the whole g can be used without a second product of logits, that is taken whatever the model of costs says.
    """
    traits = tiled_traits(backend, request.hidden_dtype, request.weight_dtype)
    n, h, v = request[:3]
    best = None
    for size in dict.fromkeys(_tile_sizes(n, v, traits.acc, min(device.l2_bytes // 2, request.budget // 8))):
        for schedule in _schedules(request, traits, size):
            columns, _ = cached_columns(schedule, n, v, traits.elem)
            moved = cost.traffic(schedule, columns, request, traits)
            flops = schedule.products(request.n_grads) * request.flops
            tile_bytes = schedule.token_chunk * schedule.block * traits.acc
            seconds = cost.seconds(device, moved, flops, request.hidden_dtype, tile_bytes)
            rank = schedule.name not in ("cached", "jacobian"), seconds
            if best is None or rank < best[0]:
                best = rank, schedule
    if best is not None:
        return best[1]
    least = _Needs(n, h, v, traits, 1, min(v, 64))
    raise too_little(
        request,
        max(least.forward(), least.recompute(False, request.to_weight), least.recompute(request.to_hidden, False)),
    )
