"""The schedules over tiles of logits, for every backend whose products are `torch.mm`.

A backend of this kind is a `Passes`: what is done to a tile once it is computed. The loops, the buffers and the order
of products are here, once. No buffer is made inside a loop over tiles (but for slices of a weight of another dtype
than the product's), and nothing waits for a device.

Two ways to a gradient. *Kept*: while a tile is at hand the forward stores ``exp(z - reference)`` in the dtype of the
products, and turns it into ``g = d logps / d x`` when the row's log-sum-exp is known; the backward is then two
products, and the incoming gradient only scales rows. *Recomputed*: the backward makes the tile again, and its
``g`` holds the incoming gradients already.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dpofast.backends._tensors import wide_dtype
from dpofast.plan import Choice, kept_columns

Transform = tuple[float, float, float]  # temperature, logit_scale, softcap (0: none)


class Passes(Protocol):
    """What a backend does to a tile of logits ``x`` [n, width], before bias and transform, of columns v0, v0 + 1, .."""

    def product_dtype(self, hidden: torch.dtype, weight: torch.dtype) -> torch.dtype:
        """Of the operands of every product, and so of ``g``."""

    def product(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """``out = a @ b``, accumulated in fp32 (fp64) and rounded at most once, to out's dtype."""

    def accumulate(self, sums: Tensor, a: Tensor, b: Tensor) -> None:
        """``sums += a @ b``, in the dtype of ``sums``."""

    def new_stats(self, n: int, wide: torch.dtype, device: torch.device) -> Tensor:
        """Running statistics of n rows with nothing folded in."""

    def fold(
        self, x: Tensor, bias: Tensor | None, y: Tensor, v0: int, transform: Transform, stats: Tensor,
        outputs: tuple[str, ...], keep: Tensor | None, reference: Tensor | None,
    ) -> None:  # fmt: skip
        """Folds ``x`` into ``stats``; stores ``exp(z - reference) dz/dx`` in ``keep`` if given. May overwrite ``x``."""

    def finish(self, stats: Tensor, y: Tensor, n_vocab: int, outputs: tuple[str, ...]) -> dict[str, Tensor]:
        """logps, lse (in its two parts) and the outputs of rows whose every entry is folded in.

        A label outside [0, n_vocab), which only a device that is not asked can meet, makes its row NaN.
        """

    def normalise(
        self, kept: Tensor, references: Tensor, block: int, y: Tensor, transform: Transform, stats: Tensor,
        results: dict[str, Tensor],
    ) -> None:  # fmt: skip
        """Turns what `fold` stored, a reference for each ``block`` of columns, into ``g``, the label's entry too."""

    def grad(
        self, x: Tensor, bias: Tensor | None, y: Tensor, v0: int, transform: Transform, saved: dict[str, Tensor],
        grad_logps: Tensor | None, grad_entropy: Tensor | None, out: Tensor,
    ) -> None:  # fmt: skip
        """``out = d loss / d x``; ``out`` is ``x`` itself where the dtypes agree."""

    def rows_forward(self, logits: Tensor, rows: Tensor, y: Tensor, transform, outputs) -> dict[str, Tensor]:
        """See `dpofast.backends.cpu.rows_forward`."""

    def rows_backward(
        self, logits: Tensor, rows: Tensor, y: Tensor, transform, saved, grad_logps, grad_entropy, grad_logits: Tensor
    ) -> None:  # fmt: skip
        """See `dpofast.backends.cpu.rows_backward`."""


class TiledBackend:
    """The functions of `dpofast.backends.cpu` on top of ``passes``; the instruction set they are told means nothing."""

    def __init__(self, passes: Passes):
        self.passes = passes

    def cache_tensor(self, n_bytes: int, device: torch.device) -> Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8, device=device)

    def grad_weight_tensor(self, weight: Tensor) -> Tensor:
        return weight.new_empty(weight.shape)

    def forward(self, _isa: str, hidden: Tensor, *args) -> dict[str, Tensor]:
        with _no_autocast(hidden):
            return forward(self.passes, hidden, *args)

    def fold(self, _isa: str, hidden: Tensor, *args) -> Tensor:
        with _no_autocast(hidden):
            return fold(self.passes, hidden, *args)

    def backward(self, _isa: str, hidden: Tensor, *args) -> None:
        with _no_autocast(hidden):
            backward(self.passes, hidden, *args)

    def rows_forward(self, _isa: str, *args) -> dict[str, Tensor]:
        return self.passes.rows_forward(*args)

    def rows_backward(self, _isa: str, *args) -> None:
        self.passes.rows_backward(*args)


def _no_autocast(x: Tensor) -> torch.autocast:
    """Autocast reaches into the body of an op, where it would round the logits of a wide tile."""
    return torch.autocast(x.device.type, enabled=False)


def take(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of ``x`` [*, H] by number, whatever its strides."""
    x = x.unsqueeze(0) if x.ndim == 1 else x
    return x[torch.unravel_index(rows, x.shape[:-1])]


def chunks(n: int, size: int) -> list[slice]:
    """Slices of at most ``size`` tokens; 0: one slice of all."""
    size = size or n
    return [slice(i, min(n, i + size)) for i in range(0, n, size)]


class _Head(NamedTuple):
    """The operands of one call, and its tiles."""

    passes: Passes
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    rows: Tensor
    y: Tensor
    transform: Transform
    choice: Choice
    wide: torch.dtype
    dtype: torch.dtype  # of products

    @property
    def n(self) -> int:
        return self.rows.numel()

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.wide, device=self.hidden.device)

    def tokens(self, part: slice) -> Tensor:
        return take(self.hidden, self.rows[part]).to(self.dtype)

    def vocabulary(self, start: int, stop: int, step: int | None = None) -> Iterator[tuple[int, int]]:
        step = step or self.choice.block
        return ((v0, min(stop, v0 + step)) for v0 in range(start, stop, step))

    def slice_of_weight(self, v0: int, v1: int) -> Tensor:
        return self.weight[v0:v1].to(self.dtype)

    def slice_of_bias(self, v0: int, v1: int) -> Tensor | None:
        return None if self.bias is None else self.bias[v0:v1]

    def product_step(self) -> int:
        """Rows of weight in one product that needs no tile of logits: all, unless they are converted."""
        return self.weight.shape[0] if self.weight.dtype == self.dtype else self.choice.block

    def kept(self, cache: Tensor) -> Tensor | None:
        """The part of ``cache`` that holds g [n, columns]."""
        columns, stride = kept_columns(self.choice, self.n, self.weight.shape[0], self.dtype.itemsize)
        if not columns:
            return None
        return cache[: self.n * stride * self.dtype.itemsize].view(self.dtype).view(self.n, stride)[:, :columns]

    def jacobian(self, cache: Tensor) -> Tensor:
        """The cache of the schedule jacobian: d logps / d hidden [n, H]."""
        h = self.hidden.shape[-1]
        return cache[: self.n * h * self.wide.itemsize].view(self.wide).view(self.n, h)


def _head(passes, hidden, weight, bias, rows, y, transform, choice) -> _Head:
    wide = wide_dtype(hidden.dtype, weight.dtype)
    bias = None if bias is None else bias.to(wide).contiguous()
    dtype = passes.product_dtype(hidden.dtype, weight.dtype)
    return _Head(passes, hidden, weight, bias, rows, y, transform, choice, wide, dtype)


def forward(
    passes: Passes, hidden, weight, bias, rows, y, transform, outputs, choice: Choice, cache: Tensor
) -> dict[str, Tensor]:
    """See `dpofast.backends.cpu.forward`."""
    a = _head(passes, hidden, weight, bias, rows, y, transform, choice)
    n_vocab, block = weight.shape[0], choice.block
    parts = chunks(a.n, choice.token_chunk)
    longest = parts[0].stop
    tile = a.empty(longest * min(block, n_vocab))
    kept = a.kept(cache)
    jacobian = a.jacobian(cache) if choice.schedule == "jacobian" else None
    g_rows = a.empty(longest, n_vocab, dtype=a.dtype) if jacobian is not None else None
    results = []
    for part in parts:
        n = part.stop - part.start
        h, labels = a.tokens(part), y[part]
        stats = passes.new_stats(n, a.wide, hidden.device)
        keep = g_rows[:n] if g_rows is not None else None if kept is None else kept[part]
        columns = 0 if keep is None else keep.shape[1]
        references = a.empty(-(-columns // block), n)
        for v0, v1 in a.vocabulary(0, n_vocab):
            x = tile[: n * (v1 - v0)].view(n, v1 - v0)
            passes.product(h, a.slice_of_weight(v0, v1).T, x)
            here = (keep[:, v0:v1], references[v0 // block]) if v0 < columns else (None, None)
            passes.fold(x, a.slice_of_bias(v0, v1), labels, v0, transform, stats, outputs, *here)
        results.append(passes.finish(stats, labels, n_vocab, outputs))
        if keep is not None:
            passes.normalise(keep, references, block, labels, transform, stats, results[-1])
        if jacobian is not None:
            _times_weight(a, keep, jacobian[part])
    if len(results) == 1:
        return results[0]
    return {name: torch.cat([r[name] for r in results]) for name in results[0]}


def fold(passes: Passes, hidden, weight, bias, rows, y, transform, outputs, choice: Choice) -> Tensor:
    """See `dpofast.backends.cpu.fold`."""
    a = _head(passes, hidden, weight, bias, rows, y, transform, choice)
    parts = chunks(a.n, choice.token_chunk)
    tile = a.empty(parts[0].stop * min(choice.block, weight.shape[0]))
    folded = []
    for part in parts:
        n = part.stop - part.start
        h, stats = a.tokens(part), passes.new_stats(n, a.wide, hidden.device)
        for v0, v1 in a.vocabulary(0, weight.shape[0]):
            x = tile[: n * (v1 - v0)].view(n, v1 - v0)
            passes.product(h, a.slice_of_weight(v0, v1).T, x)
            passes.fold(x, a.slice_of_bias(v0, v1), y[part], v0, transform, stats, outputs, None, None)
        folded.append(stats)
    return torch.cat(folded, 1)


def _times_weight(a: _Head, g: Tensor, out: Tensor) -> None:
    """``out = g @ weight[: columns of g]``."""
    for v0, v1 in a.vocabulary(0, g.shape[1], a.product_step()):
        operands = g[:, v0:v1], a.slice_of_weight(v0, v1)
        a.passes.accumulate(out, *operands) if v0 else a.passes.product(*operands, out)


def backward(
    passes: Passes, hidden, weight, bias, rows, y, transform, choice: Choice, cache: Tensor, saved: dict[str, Tensor],
    grad_logps: Tensor | None, grad_entropy: Tensor | None,
    grad_hidden: Tensor | None, grad_weight: Tensor | None, grad_bias: Tensor | None,
) -> None:  # fmt: skip
    """See `dpofast.backends.cpu.backward`."""
    a = _head(passes, hidden, weight, bias, rows, y, transform, choice)
    parts = chunks(a.n, choice.token_chunk)
    from_saved = grad_entropy is None
    to_weight = grad_weight is not None or grad_bias is not None

    def put(part: slice, sums: Tensor) -> None:
        grad_hidden.view(-1, grad_hidden.shape[-1])[rows[part]] = sums.to(grad_hidden.dtype)

    def sums_of(n: int) -> Tensor:
        return torch.zeros(n, hidden.shape[-1], dtype=a.wide, device=hidden.device)

    if from_saved and choice.schedule == "jacobian":
        for part in parts:
            put(part, a.jacobian(cache)[part] * grad_logps[part].unsqueeze(-1))
        return
    incoming = (saved, grad_logps, grad_entropy)
    if not to_weight or choice.schedule == "recompute-split":
        for part in parts if grad_hidden is not None else ():
            sums = sums_of(part.stop - part.start)
            _recompute(a, 0, [part], *incoming, sums, None, None)
            put(part, sums)
        if to_weight:
            _recompute(a, 0, parts, *incoming, None, grad_weight, grad_bias)
        return
    sums = None if grad_hidden is None else sums_of(a.n)
    kept = a.kept(cache) if from_saved else None
    if kept is not None:
        _from_kept(a, kept, grad_logps, sums, grad_weight, grad_bias)
    _recompute(a, 0 if kept is None else kept.shape[1], parts, *incoming, sums, grad_weight, grad_bias)
    if sums is not None:
        put(slice(0, a.n), sums)


def _from_kept(a: _Head, g: Tensor, grad_logps: Tensor, sums, grad_weight, grad_bias) -> None:
    """Both products with the g that the forward kept."""
    c = grad_logps.unsqueeze(-1)
    if sums is not None:
        _times_weight(a, g, sums)
        sums *= c
    ch = (a.tokens(slice(None)) * c).to(a.dtype) if grad_weight is not None else None
    # Two columns that add up to c, so that a product of 16-bit operands loses nothing of it.
    high = c.to(a.dtype)
    coefficients = torch.cat((high, (c - high).to(a.dtype)), -1)
    for v0, v1 in a.vocabulary(0, g.shape[1]):
        if grad_weight is not None:
            _into(a, g[:, v0:v1].T, ch, grad_weight[v0:v1])
    if grad_bias is not None:
        two = a.empty(g.shape[1], 2)
        a.passes.product(g.T, coefficients, two)
        grad_bias[: g.shape[1]] = two.sum(-1)


def _into(a: _Head, left: Tensor, right: Tensor, out: Tensor) -> None:
    """``out = left @ right`` where out may have a dtype that products do not write."""
    if out.dtype in (a.dtype, a.wide):
        a.passes.product(left, right, out)
    else:
        wide = a.empty(*out.shape)
        a.passes.product(left, right, wide)
        out.copy_(wide)


def _recompute(
    a: _Head, first: int, parts: list[slice], saved, grad_logps, grad_entropy, sums, grad_weight, grad_bias
) -> None:
    """Both products of the vocabulary from ``first`` on, each slice of it for all ``parts`` in turn.

    ``sums`` [tokens of parts, H] are added to; slices of the other gradients are written once.
    """
    n_vocab = a.weight.shape[0]
    if first == n_vocab:
        return
    longest, block = parts[0].stop - parts[0].start, min(a.choice.block, n_vocab)
    tile = a.empty(longest * block)
    g_tile = tile if a.dtype == a.wide else a.empty(longest * block, dtype=a.dtype)
    whole = len(parts) == 1
    d_weight = None if grad_weight is None or whole else a.empty(block, a.hidden.shape[-1])
    d_bias = None if grad_bias is None else a.empty(len(parts), block)
    h = a.tokens(slice(parts[0].start, parts[-1].stop))
    start = parts[0].start
    for v0, v1 in a.vocabulary(first, n_vocab):
        w, b = a.slice_of_weight(v0, v1), a.slice_of_bias(v0, v1)
        for i, part in enumerate(parts):
            n, at = part.stop - part.start, part.start - start
            tokens = h[at : at + n]
            x, g = (t[: n * (v1 - v0)].view(n, v1 - v0) for t in (tile, g_tile))
            a.passes.product(tokens, w.T, x)
            held = {name: s[part] for name, s in saved.items()}
            c, e = (None if d is None else d[part] for d in (grad_logps, grad_entropy))
            a.passes.grad(x, b, a.y[part], v0, a.transform, held, c, e, g)
            if sums is not None:
                a.passes.accumulate(sums[at : at + n], g, w)
            if grad_weight is not None and whole:
                _into(a, g.T, tokens, grad_weight[v0:v1])
            elif grad_weight is not None and i:
                a.passes.accumulate(d_weight[: v1 - v0], g.T, tokens)
            elif grad_weight is not None:
                a.passes.product(g.T, tokens, d_weight[: v1 - v0])
            if grad_bias is not None:
                torch.sum(g, 0, dtype=a.wide, out=d_bias[i, : v1 - v0])
        if grad_weight is not None and not whole:
            grad_weight[v0:v1] = d_weight[: v1 - v0]
        if grad_bias is not None:
            torch.sum(d_bias[:, : v1 - v0], 0, out=grad_bias[v0:v1])
