"""The schedules over tiles of logits, for every backend whose products are `torch.mm`.

A backend of this kind is a `Passes`: what is done to a tile once it is computed. The loops, the buffers and the order
of products are here, once. No buffer is made inside a loop over tiles (but for slices of a weight of another dtype
than the product's), and nothing waits for a device.

Two ways to a gradient. *Cached*: while a tile is at hand the forward stores ``e = exp(z - shift)`` in the dtype of the
products. When a token's log-sum-exp is known, so is the factor with which its row of e is ``d logps / d x``; the
backward is then two products, whose rows that factor and the incoming gradient scale. *Recomputed*: the backward makes
the tile again, and its ``g`` holds the incoming gradients already.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dpofast.backends._tensors import take
from dpofast.backends.base import (
    InputGrads,
    LogitsProblem,
    OutputGrads,
    PairsProblem,
    PairsResult,
    Problem,
    Saved,
    Transform,
)
from dpofast.backends.base import chunk as chunk_of
from dpofast.plan import Schedule, cached_columns
from dpofast.plan.schedule import up
from dpofast.plan.tiled import skip_bytes, skip_tiles


class Tile(NamedTuple):
    """Logits of n tokens and of columns v0, v0 + 1, .. of the vocabulary, before bias and transform."""

    x: Tensor  # [n, width]
    bias: Tensor | None  # [width]
    labels: Tensor  # [n], of the whole vocabulary
    v0: int
    transform: Transform
    offsets: Tensor | None = None  # [n], the element where each row of x starts, for backends that take whole rows so


class Exps(NamedTuple):
    """The cached exponentials of n tokens' logits, column by column, and how the passes find their way in them."""

    e: Tensor  # [n, columns]: exp(z - shift) dz/dx, but for factors that belong to the row
    shifts: Tensor  # [blocks, n]: a tile's, for those passes that have one a tile, or the row's up to that tile
    block: int  # columns of a tile

    def tile(self, v0: int, v1: int) -> Tensor:
        return columns_of(self.e, v0, v1)


class Kept(NamedTuple):
    """What a filter of gradients leaves for the backward, beside e and the factors of its rows."""

    order: Tensor  # [V] int64, which row of the weight each column of e is
    weight: Tensor  # [V, H], in that order
    spread: Tensor  # [N], what every entry of a row of e gets back of what was dropped of the row
    of_tokens: Tensor  # the tiles of e that matter, row by row; see `dpofast.kernels.linear_skip.Marks`
    of_vocab: Tensor  # and column by column

    @classmethod
    def within(cls, cache: Tensor, n: int, weight: Tensor) -> Kept:
        """Views of the end of ``cache``."""
        (v, h), (rows, columns) = weight.shape, skip_tiles(n, weight.shape[0])
        sizes = skip_bytes(n, h, v, weight.itemsize)
        kinds = torch.int64, weight.dtype, torch.float32, torch.int32, torch.int32
        shapes = (v,), (v, h), (n,), (rows, 1 + columns), (columns, 1 + rows)
        parts = cache[cache.numel() - sum(sizes) :].split_with_sizes(sizes)
        views = (x.view(kind)[: math.prod(shape)] for x, kind, shape in zip(parts, kinds, shapes, strict=True))
        return cls(*(x.view(shape) for x, shape in zip(views, shapes, strict=True)))


class Passes(Protocol):
    """The functions of a backend that do something to a tile of logits."""

    def product_dtype(self, hidden: torch.dtype, weight: torch.dtype) -> torch.dtype:
        """The dtype of the operands of every product, and so of ``g``."""

    def product(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """``out = a @ b``, accumulated in fp32 (fp64) and rounded at most once, to out's dtype."""

    def accumulate(self, sums: Tensor, a: Tensor, b: Tensor) -> None:
        """``sums += a @ b``, in the dtype of ``sums``."""

    def scale_rows(
        self, x: Tensor, x_rows: Tensor | None, scales: tuple[Tensor, ...], out: Tensor, out_rows: Tensor | None
    ) -> None:
        """``out[out_rows] = x[x_rows]``, row i times its number in each of ``scales``, rounded once to out's dtype.

        x is [*, H], any strides, of which ``x_rows`` are positions in row-major order; out is [*, H], contiguous.
        """

    def new_stats(self, n: int, wide: torch.dtype, device: torch.device) -> Tensor:
        """Running statistics of n tokens with nothing folded in."""

    def fold(self, tile: Tile, stats: Tensor, outputs: tuple[str, ...], exps: Exps | None) -> None:
        """Folds ``tile`` into ``stats`` and stores its part of ``exps`` if given. May overwrite the tile."""

    def finish(self, stats: Tensor, labels: Tensor, n_vocab: int, outputs: tuple[str, ...]) -> dict[str, Tensor]:
        """logps, lse (in its two parts) and the outputs of tokens whose every logit is folded in.

        A label outside [0, n_vocab), which only a device that is not asked can meet, makes its row NaN.
        """

    def seal(
        self,
        exps: Exps,
        labels: Tensor,
        transform: Transform,
        stats: Tensor,
        results: dict[str, Tensor],
        factor: Tensor,
    ) -> None:
        """Completes what `fold` stored, the label's entry too, so that ``d logps / d x = factor e`` (factor [n])."""

    def grad(self, tile: Tile, saved: Saved, incoming: OutputGrads, out: Tensor) -> None:
        """``out = d loss / d x``; ``out`` is ``tile.x`` itself where the dtypes agree."""

    def fused(self, problem: Problem, e: Tensor | None, factor: Tensor | None) -> dict[str, Tensor]:
        """logps and lse without logits; ``e`` [n, V] and ``factor`` [n], if given, as after `fold` and `seal`.

        Called only where `dpofast.plan.can_fuse` says so.
        """

    def skipping(self, problem: Problem, e: Tensor, factor: Tensor, kept: Kept) -> dict[str, Tensor]:
        """As `fused`, with e in an order of the vocabulary that is chosen here, and the dropped mass; fills ``kept``.

        This and the next two are called only where a schedule filters and `dpofast.plan.can_fuse` says so.
        """

    def skip_to_hidden(self, e: Tensor, kept: Kept, sums: Tensor) -> None:
        """``sums = e weight`` of the tiles of e that matter, with what is given back of the others."""

    def skip_to_weight(self, e: Tensor, scaled: Tensor, kept: Kept, grad: Tensor) -> None:
        """``grad = e^T scaled``, likewise, in the order of the weight."""

    def logits_forward(self, problem: LogitsProblem, outputs: tuple[str, ...]) -> dict[str, Tensor]:
        """Does what `dpofast.backends.base.Backend.logits_forward` does."""

    def logits_backward(self, problem: LogitsProblem, saved: Saved, incoming: OutputGrads, grad_logits: Tensor) -> None:
        """Does what `dpofast.backends.base.Backend.logits_backward` does."""

    def sequence_dpo(self, problem: PairsProblem) -> PairsResult:
        """Does what `dpofast.backends.base.PairBackend.sequence_dpo` does, where there are ``pair_losses``."""


class TiledBackend:
    """`dpofast.backends.base.Backend` on top of ``passes``."""

    def __init__(self, passes: Passes):
        self.passes = passes
        self.pair_losses: tuple[str, ...] = getattr(passes, "pair_losses", ())

    def cache(self, n_bytes: int, device: torch.device) -> Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8, device=device)

    def grad_weight(self, weight: Tensor) -> Tensor:
        return weight.new_empty(weight.shape)

    def forward(
        self, problem: Problem, schedule: Schedule, outputs: tuple[str, ...], cache: Tensor
    ) -> dict[str, Tensor]:
        with _no_autocast(problem.hidden):
            return _Loops(self.passes, problem, schedule).forward(outputs, cache)

    def fold(self, problem: Problem, schedule: Schedule, outputs: tuple[str, ...]) -> Tensor:
        with _no_autocast(problem.hidden):
            return _Loops(self.passes, problem, schedule).fold(outputs)

    def backward(
        self, problem: Problem, schedule: Schedule, saved: Saved, incoming: OutputGrads, grads: InputGrads
    ) -> None:
        with _no_autocast(problem.hidden):
            _Loops(self.passes, problem, schedule).backward(saved, incoming, grads)

    def logits_forward(self, problem: LogitsProblem, outputs: tuple[str, ...]) -> dict[str, Tensor]:
        return self.passes.logits_forward(problem, outputs)

    def logits_backward(self, problem: LogitsProblem, saved: Saved, incoming: OutputGrads, grad_logits: Tensor) -> None:
        self.passes.logits_backward(problem, saved, incoming, grad_logits)

    def sequence_dpo(self, problem: PairsProblem) -> PairsResult:
        return self.passes.sequence_dpo(problem)


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Turns autocast off, which reaches into the body of an op and would round the logits of a wide tile."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


class _Loops:
    """One call's loops over tiles."""

    def __init__(self, passes: Passes, problem: Problem, schedule: Schedule):
        self.passes, self.problem, self.schedule = passes, problem, schedule
        self.bias = problem.wide_bias()
        self.dtype = passes.product_dtype(problem.hidden.dtype, problem.weight.dtype)
        self.chunks = schedule.chunks(problem.n_tokens)
        self.longest = self.chunks[0].stop
        self.block = min(schedule.block or problem.n_vocab, problem.n_vocab)

    def forward(self, outputs: tuple[str, ...], cache: Tensor) -> dict[str, Tensor]:
        problem, schedule, passes = self.problem, self.schedule, self.passes
        if schedule.filters:
            rows, _, factors = self.cached(cache)
            return passes.skipping(problem, rows, factors, Kept.within(cache, problem.n_tokens, problem.weight))
        if schedule.is_fused:
            return self.fused(cache)
        logits = self.tile_memory(problem.wide)
        cached, jacobian, factors = self.cached(cache)
        e_rows = self.empty(self.longest, up(problem.n_vocab, 8), dtype=self.dtype) if jacobian is not None else None
        results = []
        for chunk in self.chunks:
            n, labels = chunk.stop - chunk.start, chunk_of(problem.labels, chunk)
            e = e_rows[:n, : problem.n_vocab] if e_rows is not None else chunk_of(cached, chunk)
            columns = 0 if e is None else e.shape[1]
            exps = Exps(e, self.empty(-(-columns // schedule.block), n), schedule.block) if columns else None
            stats = passes.new_stats(n, problem.wide, problem.hidden.device)
            for tile in self.tiles(self.tokens(chunk), labels, logits, 0):
                passes.fold(tile, stats, outputs, exps if tile.v0 < columns else None)
            results.append(passes.finish(stats, labels, problem.n_vocab, outputs))
            if exps is not None:
                passes.seal(exps, labels, problem.transform, stats, results[-1], chunk_of(factors, chunk))
            if jacobian is not None:
                self.times_weight(e, jacobian[chunk])
        return _concatenated(results)

    def fused(self, cache: Tensor) -> dict[str, Tensor]:
        """The forward whose products exponentiate: a launch for all of the vocabulary, and no logits in memory."""
        cached, jacobian, factors = self.cached(cache)
        room = self.empty(self.longest, up(self.problem.n_vocab, 8), dtype=self.dtype) if jacobian is not None else None
        results = []
        for chunk in self.chunks:
            n = chunk.stop - chunk.start
            e = room[:n, : self.problem.n_vocab] if room is not None else chunk_of(cached, chunk)
            results.append(self.passes.fused(self.problem.chunk(chunk), e, chunk_of(factors, chunk)))
            if jacobian is not None:
                self.times_weight(e, jacobian[chunk])
        return _concatenated(results)

    def fold(self, outputs: tuple[str, ...]) -> Tensor:
        problem = self.problem
        logits, folded = self.tile_memory(problem.wide), []
        for chunk in self.chunks:
            stats = self.passes.new_stats(chunk.stop - chunk.start, problem.wide, problem.hidden.device)
            for tile in self.tiles(self.tokens(chunk), problem.labels[chunk], logits, 0):
                self.passes.fold(tile, stats, outputs, None)
            folded.append(stats)
        return torch.cat(folded, 1)

    def backward(self, saved: Saved, incoming: OutputGrads, grads: InputGrads) -> None:
        from_saved = incoming.entropy is None
        cached, jacobian, factors = self.cached(saved.cache)
        if from_saved and jacobian is not None:
            self.put(slice(0, self.problem.n_tokens), jacobian, grads, factors, incoming.logps)
            return
        if self.schedule.filters:
            kept = Kept.within(saved.cache, self.problem.n_tokens, self.problem.weight)
            self.from_kept(cached, kept, (factors, incoming.logps), grads)
            return
        if not grads.of_head or self.schedule.splits_backward:
            for chunk in self.chunks if grads.hidden is not None else ():
                sums = self.sums(chunk.stop - chunk.start)
                self.recompute(0, [chunk], saved, incoming, InputGrads(sums))
                self.put(chunk, sums, grads)
            if grads.of_head:
                self.recompute(0, self.chunks, saved, incoming, grads._replace(hidden=None))
            return
        everything = slice(0, self.problem.n_tokens)
        if not from_saved or cached is None:
            sums = None if grads.hidden is None else self.sums(self.problem.n_tokens)
            self.recompute(0, self.chunks, saved, incoming, grads._replace(hidden=sums))
            scales = ()
        else:
            sums = None if grads.hidden is None else self.empty(self.problem.n_tokens, self.problem.n_hidden)
            scales = factors, incoming.logps
            self.from_cached(cached, scales, grads._replace(hidden=sums))
            if cached.shape[1] < self.problem.n_vocab:
                if sums is not None:
                    self.passes.scale_rows(sums, None, scales, sums, None)
                    scales = ()
                self.recompute(cached.shape[1], self.chunks, saved, incoming, grads._replace(hidden=sums))
        if sums is not None:
            self.put(everything, sums, grads, *scales)

    def from_cached(self, e: Tensor, scales: tuple[Tensor, ...], grads: InputGrads) -> None:
        """Both products with the ``e`` that the forward left, d loss / d x = e times ``scales``.

        ``grads.hidden`` are its sums, before they are scaled.
        """
        if grads.hidden is not None:
            self.times_weight(e, grads.hidden)
        if grads.weight is not None:
            scaled = self.empty(self.problem.n_tokens, self.problem.n_hidden, dtype=self.dtype)
            self.passes.scale_rows(self.problem.hidden, self.problem.positions, scales, scaled, None)
            step = self.problem.n_vocab if self.is_written(grads.weight) else self.schedule.block
            for v0, v1 in self.vocabulary(0, e.shape[1], step):
                operands, part = (columns_of(e, v0, v1).T, scaled), chunk_of(grads.weight, slice(v0, v1))
                self.passes.accumulate(part, *operands) if grads.adds else self.into(*operands, part)
        if grads.bias is not None:
            # Two columns that add up to c, so that a product of 16-bit operands loses nothing of it.
            c = (scales[0] * scales[1]).unsqueeze(-1)
            high = c.to(self.dtype)
            two = self.empty(e.shape[1], 2)
            self.passes.product(e.T, torch.cat((high, (c - high).to(self.dtype)), -1), two)
            sums = two.sum(-1)
            grads.bias[: e.shape[1]] = sums + grads.bias[: e.shape[1]] if grads.adds else sums

    def from_kept(self, e: Tensor, kept: Kept, scales: tuple[Tensor, ...], grads: InputGrads) -> None:
        """Both products with the tiles of ``e`` that matter."""
        n, h = self.problem.n_tokens, self.problem.n_hidden
        if grads.hidden is not None:
            sums = self.empty(n, h)
            self.passes.skip_to_hidden(e, kept, sums)
            self.put(slice(0, n), sums, grads, *scales)
        if grads.weight is not None:
            scaled = self.empty(n, h, dtype=self.dtype)
            self.passes.scale_rows(self.problem.hidden, self.problem.positions, scales, scaled, None)
            self.passes.skip_to_weight(e, scaled, kept, grads.weight)

    def recompute(
        self, first: int, chunks: list[slice], saved: Saved, incoming: OutputGrads, grads: InputGrads
    ) -> None:
        """Both products of the vocabulary from ``first`` on, each slice of it for all ``chunks`` in turn.

        ``grads.hidden``, sums of the tokens of ``chunks``, is added to; slices of the others are written once.
        """
        if first == self.problem.n_vocab:
            return
        start = chunks[0].start
        logits = self.tile_memory(self.problem.wide)
        g_tile = logits if self.dtype == self.problem.wide else self.tile_memory(self.dtype)
        head = _HeadSums(self, len(chunks), grads)
        tokens = self.tokens(slice(start, chunks[-1].stop))
        for v0, v1 in self.vocabulary(first, self.problem.n_vocab):
            for i, chunk in enumerate(chunks):
                h = tokens[chunk.start - start : chunk.stop - start]
                tile = self.tile(h, self.problem.labels[chunk], logits, v0, v1)
                g = tile_in(g_tile, *tile.x.shape)
                self.passes.grad(tile, saved.chunk(chunk), incoming.chunk(chunk), g)
                if grads.hidden is not None:
                    sums = grads.hidden[chunk.start - start : chunk.stop - start]
                    self.passes.accumulate(sums, g, self.slice_of_weight(v0, v1))
                head.add(g, h, v0, i)
            head.write(v0, v1)

    def tiles(self, h: Tensor, labels: Tensor, logits: Tensor, first: int) -> Iterator[Tile]:
        """Every tile of the tokens ``h``, one after the other in the memory of ``logits``."""
        for v0, v1 in self.vocabulary(first, self.problem.n_vocab):
            yield self.tile(h, labels, logits, v0, v1)

    def tile(self, h: Tensor, labels: Tensor, logits: Tensor, v0: int, v1: int) -> Tile:
        x = tile_in(logits, len(h), v1 - v0)
        self.passes.product(h, self.slice_of_weight(v0, v1).T, x)
        bias = None if self.bias is None else self.bias[v0:v1]
        return Tile(x, bias, labels, v0, self.problem.transform)

    def times_weight(self, g: Tensor, out: Tensor) -> None:
        """``out = g @ weight[: columns of g]``."""
        # All rows of the weight in one product, unless they are converted.
        step = self.problem.n_vocab if self.problem.weight.dtype == self.dtype else self.schedule.block
        for v0, v1 in self.vocabulary(0, g.shape[1], step):
            operands = columns_of(g, v0, v1), self.slice_of_weight(v0, v1)
            self.passes.accumulate(out, *operands) if v0 else self.passes.product(*operands, out)

    def into(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """``out = left @ right`` where out may have a dtype that products do not write."""
        if self.is_written(out):
            self.passes.product(left, right, out)
        else:
            wide = self.empty(*out.shape)
            self.passes.product(left, right, wide)
            out.copy_(wide)

    def is_written(self, out: Tensor) -> bool:
        """Says whether products write to ``out`` itself, and need no buffer for their sums."""
        return out.dtype in (self.dtype, self.problem.wide)

    def put(self, tokens: slice, sums: Tensor, grads: InputGrads, *scales: Tensor) -> None:
        """Writes the sums of some tokens, times ``scales``, to their places in d hidden."""
        rows = grads.hidden.view(-1, grads.hidden.shape[-1])
        self.passes.scale_rows(sums, None, scales, rows, self.problem.chunk(tokens).positions)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.problem.wide, device=self.problem.hidden.device)

    def sums(self, n: int) -> Tensor:
        """Makes zeros, to which d hidden of n tokens is added."""
        return torch.zeros(n, self.problem.n_hidden, dtype=self.problem.wide, device=self.problem.hidden.device)

    def tokens(self, chunk: slice) -> Tensor:
        return take(self.problem.hidden, self.problem.positions[chunk]).to(self.dtype)

    def vocabulary(self, start: int, stop: int, step: int | None = None) -> Iterator[tuple[int, int]]:
        step = step or self.schedule.block
        return ((v0, min(stop, v0 + step)) for v0 in range(start, stop, step))

    def slice_of_weight(self, v0: int, v1: int) -> Tensor:
        return chunk_of(self.problem.weight, slice(v0, v1)).to(self.dtype)

    def tile_memory(self, dtype: torch.dtype) -> Tensor:
        """Makes room for one tile; `tile_in` takes it from there."""
        return self.empty(self.longest * up(self.block, 8), dtype=dtype)

    def cached(self, cache: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Views of ``cache``: e [N, columns], or e W [N, H], or neither, and the factors of their rows [N]."""
        n, h, wide = self.problem.n_tokens, self.problem.n_hidden, self.problem.wide
        dtype, v = self.dtype, self.problem.n_vocab
        columns, stride = cached_columns(self.schedule, n, v, dtype.itemsize)
        if self.schedule.keeps_jacobian:
            columns, stride, dtype = h, h, wide
        if not columns:
            return None, None, None
        end = n * stride * dtype.itemsize
        rows = cache.view(dtype).as_strided((n, columns), (stride, 1))
        factors = cache[end : end + n * wide.itemsize].view(wide)
        return (None, rows, factors) if self.schedule.keeps_jacobian else (rows, None, factors)


def columns_of(x: Tensor, v0: int, v1: int) -> Tensor:
    """``x[:, v0:v1]``; ``x`` itself, which is sooner done, if that is all of it."""
    return x if v0 == 0 and v1 >= x.shape[1] else x[:, v0:v1]


def _concatenated(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The results of all tokens, from those of chunks of them."""
    return results[0] if len(results) == 1 else {name: torch.cat([r[name] for r in results]) for name in results[0]}


def tile_in(memory: Tensor, n: int, width: int) -> Tensor:
    """[n, width] at the start of ``memory``, with rows that begin at multiples of 16 bytes, as products want them."""
    return memory[: n * up(width, 8)].view(n, up(width, 8))[:, :width]


class _HeadSums:
    """The gradients of a block of the head, added up over chunks of tokens, and of its bias."""

    def __init__(self, loops: _Loops, n_chunks: int, grads: InputGrads):
        self.loops, self.grads, self.whole = loops, grads, n_chunks == 1
        wants_sums = grads.weight is not None and not self.whole
        self.weight = loops.empty(loops.block, loops.problem.n_hidden) if wants_sums else None
        self.bias = None if grads.bias is None else loops.empty(n_chunks, loops.block)

    def add(self, g: Tensor, h: Tensor, v0: int, i: int) -> None:
        """Adds what ``g`` of the i-th chunk of tokens ``h`` says of the block that begins at v0."""
        width, passes = g.shape[1], self.loops.passes
        if self.weight is not None:
            operands, sums = (g.T, h), self.weight[:width]
            passes.accumulate(sums, *operands) if i else passes.product(*operands, sums)
        elif self.grads.weight is not None:
            self.loops.into(g.T, h, self.grads.weight[v0 : v0 + width])
        if self.bias is not None:
            torch.sum(g, 0, dtype=self.loops.problem.wide, out=self.bias[i, :width])

    def write(self, v0: int, v1: int) -> None:
        if self.weight is not None:
            self.grads.weight[v0:v1] = self.weight[: v1 - v0]
        if self.bias is not None:
            torch.sum(self.bias[:, : v1 - v0], 0, out=self.grads.bias[v0:v1])
