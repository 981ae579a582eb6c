"""What other libraries' ways to the same gradients cost: products, bytes and time of their algorithms.

As read from the sources of TRL 1.16, liger-kernel 0.8.5 and cut-cross-entropy 25.1.1: bare products, and passes at the
speed of memory. So a time is what the algorithm allows; an implementation may be slower. Sizes that are not those of
the head are assumed:

- TRL takes tiles of 4096 tokens x 32768 vocabulary rows, always that wide.
- Liger takes a pair at a time, of `LONGEST_PAIR` tokens unless it is said; compiled on a GPU, not compiled on a CPU.
- cut-cross-entropy's kernels have tiles of 128 x 128, and read and write the gradients that a tile adds to. By default
  a tile in which no gradient is large is left out: all but `KEPT_TILES` of them. On a CPU it is a compiled graph over
  all logits, which leaves nothing out.

Plain PyTorch and Liger work on every position, and so does TRL on a CPU; the others on completion tokens.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from dpofast.plan import cost
from dpofast.plan.cost import DataSheet, Product
from dpofast.plan.rates import Rates
from dpofast.plan.schedule import Request, ceil_div
from dpofast.plan.tiled import TiledTraits

LONGEST_PAIR = 1024
TRL_TOKENS, TRL_COLUMNS = 4096, 32768
CCE_TILE = 128
KEPT_TILES = 0.1


class Peer(NamedTuple):
    """A library's way, for one problem."""

    name: str
    tokens: int  # that it works on
    products: float  # of tokens x H x V
    bytes_moved: int
    peak_bytes: int  # above the inputs, with the gradients
    seconds: float


class Machine(Protocol):
    """What times are made of."""

    @property
    def on_gpu(self) -> bool: ...

    def product(self, m: int, n: int, k: int, count: float) -> float:
        """Seconds of ``count`` products [m, k] x [k, n]."""

    def passes(self, moved: float, fresh: float) -> float:
        """Seconds of passes that read and write so many bytes, ``fresh`` of them to memory just allocated."""


class Gpu(NamedTuple):
    """By the data sheet; memory that was freed is allocated again without cost."""

    sheet: DataSheet
    elem: int
    on_gpu: bool = True

    def product(self, m: int, n: int, k: int, count: float) -> float:
        traits = TiledTraits(self.elem, 4, 1, self.elem, False, False)
        return count * Product(1, m, n, k, self.elem).seconds(self.sheet, traits)

    def passes(self, moved: float, fresh: float) -> float:
        return moved / (cost.BANDWIDTH_SHARE * self.sheet.bandwidth)


class Cpu(NamedTuple):
    """By what was measured: `torch.mm`, copies, and pages that the system hands out."""

    rates: Rates
    mm: float  # flop/s
    on_gpu: bool = False

    def product(self, m: int, n: int, k: int, count: float) -> float:
        return count * 2.0 * m * n * k / self.mm

    def passes(self, moved: float, fresh: float) -> float:
        return moved / self.rates.bandwidth + fresh / self.rates.fresh


class _Problem:
    """A head, and what all ways to it need."""

    def __init__(self, request: Request, tokens: int, machine: Machine):
        self.request, self.machine, self.tokens = request, machine, tokens
        self.h, self.v, self.e = request.n_hidden, request.n_vocab, request.hidden_dtype.itemsize
        self.converts = 6 if self.e == 2 else 0  # bytes of an element, read in 16 bits and written in 32
        self.logits = tokens * self.v
        self.head = self.h * self.v
        self.grads = self.e * (request.to_hidden * tokens * self.h + request.to_weight * self.head)

    def peer(
        self, name: str, products: tuple[float, float], passes: float, operands: float, fresh: float, peak: float
    ) -> Peer:
        """``products`` to logits, and to each gradient; bytes of passes, of products, and of those the fresh ones."""
        r, n = self.request, self.tokens
        to_logits, to_grads = products
        shapes = ((n, self.v, self.h, to_logits), (n, self.h, self.v, to_grads * r.to_hidden),
                  (self.v, self.h, n, to_grads * r.to_weight))  # fmt: skip
        seconds = sum(self.machine.product(*shape) for shape in shapes) + self.machine.passes(passes, fresh)
        count = to_logits + to_grads * r.n_grads
        return Peer(name, n, count, int(passes + operands), int(peak), seconds)


def _plain(p: _Problem) -> Peer:
    """``F.linear(h, w).float().log_softmax(-1).gather(...)`` and its backward."""
    r, grads = p.request, p.request.n_grads
    passes = p.converts + 8 + ((4 + 12 + p.converts) if grads else 0)
    fresh = p.e + (4 if p.converts else 0) + 4 + ((8 + (2 if p.converts else 0)) if grads else 0)
    operands = p.logits * p.e * (1 + grads) + (1 + grads) * p.head * p.e
    alive = max(12 * p.logits, (4 + (2 if p.converts else 0)) * p.logits, p.e * p.logits + p.grads)
    peak = alive if grads else 8 * p.logits
    fresh_bytes = fresh * p.logits + r.to_weight * p.head * p.e
    return p.peer("plain PyTorch", (1, 1), passes * p.logits, operands, fresh_bytes, peak)


def _trl(p: _Problem) -> Peer:
    r, grads, e = p.request, p.request.n_grads, p.e
    chunk, columns = min(p.tokens, TRL_TOKENS), min(p.v, TRL_COLUMNS)
    chunks, tile = ceil_div(p.tokens, TRL_TOKENS), chunk * columns
    if p.machine.on_gpu:
        passes, beside, fresh = e + (2 * e if grads else 0), (0, 0), 0.0
    else:  # every step of the fold, and of the gradient, is a pass of PyTorch
        forward, backward = p.converts + 40, p.converts + 94 + e + grads * p.converts
        passes, beside = forward + (backward if grads else 0), (12, 29)
        fresh = (8 + 12 + (4 if p.converts else 0)) * p.logits + (44 if grads else 0) * p.logits
    sums = 4 * (r.to_hidden * p.tokens * p.h + r.to_weight * p.head)
    moved = passes * p.logits + (2 * chunks - 1) * sums * bool(grads) + (p.converts + 4) * p.head * r.to_weight
    operands = p.logits * e * (1 + (1 + grads) * bool(grads)) + chunks * p.head * e * (1 + (1 + grads) * bool(grads))
    buffer = e * chunk * TRL_COLUMNS
    rounded = sums + p.grads if p.converts else 0
    peak = max(buffer + beside[0] * tile, grads and buffer + sums + beside[1] * tile, grads and buffer + rounded)
    return p.peer("TRL", (2 if grads else 1, 1), moved, operands, fresh + sums * bool(grads), peak)


def _liger(p: _Problem, longest_pair: int) -> Peer:
    r, grads, e = p.request, p.request.n_grads, p.e
    tokens = min(p.tokens, longest_pair)
    pairs, of_pair = ceil_div(p.tokens, tokens), tokens * p.v
    head, hidden = r.to_weight * e * p.head, r.to_hidden * e * tokens * p.h
    if p.machine.on_gpu:  # compiled: logits, a gradient in fp32, and what makes the 7 bytes that were measured in bf16
        passes, fresh, peak = 4 * e + 8, 0.0, (5 + e) * of_pair + head
    else:  # torch.func.grad keeps everything to the end
        passes = p.converts + 8 + e + ((16 + p.converts) if grads else 0)
        fresh = (e + (4 if p.converts else 0) + 4 + (8 if grads else 0)) * p.logits + pairs * head
        peak = max((14 if p.converts else 12) * of_pair, 12 * of_pair + head + hidden) if grads else 8 * of_pair
    moved = passes * p.logits + 3 * pairs * head
    operands = p.logits * e * (1 + grads) + pairs * e * p.head * (1 + grads)
    peak += p.grads
    return p.peer("Liger", (1, 1), moved, operands, fresh, peak)


def _cut_cross_entropy(p: _Problem, kept: float) -> Peer:
    """``kept`` of the tiles, in the backward."""
    grads, e = p.request.n_grads, p.e
    name = "cut-cross-entropy" + (", exact" if kept == 1 and p.machine.on_gpu else "")
    if not p.machine.on_gpu:
        passes = (2 + (2 if grads else 0)) * e * p.logits
        operands = (1 + grads) * e * (p.logits + p.head)
        fresh = (2 if grads else 1) * e * p.logits + p.request.to_weight * e * p.head
        return p.peer(
            name, (1, 1), passes, operands, fresh, max((2 if grads else 1) * e * p.logits, e * p.logits + p.grads)
        )
    tiles = p.logits / CCE_TILE**2
    adds = kept * grads * tiles * 2 * CCE_TILE * p.h * e
    return p.peer(name, (2 if grads else 1, kept), adds, 3 * e * p.head, 0.0, p.grads)


def peers(request: Request, machine: Machine, positions: int, longest_pair: int = LONGEST_PAIR) -> list[Peer]:
    """Each peer's way to what a request asks for; ``positions`` counts prompts and padding, too."""
    every = _Problem(request, positions, machine)
    told = _Problem(request, request.n_tokens, machine)
    found = [_plain(every), _trl(told if machine.on_gpu else every), _liger(every, longest_pair)]
    if machine.on_gpu:
        return [*found, _cut_cross_entropy(told, KEPT_TILES), _cut_cross_entropy(told, 1)]
    return [*found, _cut_cross_entropy(told, 1)]
