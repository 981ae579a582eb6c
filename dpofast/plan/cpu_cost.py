"""What a schedule costs on a CPU: the work that csrc/cpu/head_*.h does, counted, at the rates of a machine.

The model takes for granted:

- A product runs at the micro-kernel's speed, as `dpofast.plan.rates` measures it, times a factor for where its operands
  lie: rows of W as they are in memory (logits), sums in an L3 cache (d hidden), rows of g (d weight).
- What is done to a logit, or to an element of W, takes so many operations of a core's multiply-adds (`Prices`). Logits
  never leave the caches.
- W, d weight and what is kept for the backward go through memory at the speed of a copy, in turn with the rest. Their
  pages are there already, as they are from the second call on.
- Threads share the work evenly, and meet once a step.
- A filter keeps the share of entries that it is told, `KEPT` unless somebody knows better, and no token is flat.

The prices were fitted to one machine; docs/design.md says how far predictions are off. NEON and the portable code have
AVX2's, and were not measured.
"""

from __future__ import annotations

from typing import NamedTuple

from dpofast.plan import cpu
from dpofast.plan.cpu import FIRST_PANELS, PANELS_A_FIRST_PANEL, TRAITS, Layout, Traits
from dpofast.plan.rates import Rates
from dpofast.plan.schedule import Request, Schedule, ceil_div, up

BARRIER = 4e-6  # s that threads lose where a step ends
CALL = 2.5e-4  # s of Python and of autograd, forward or backward
TILE_ROWS = 6  # MR of the micro-kernels for x86
KEPT = 0.01
"""The share of a softmax's entries that a filter keeps, where nothing else is said."""
ENTRY_COST = 6  # kEntryCost of csrc/cpu/head_forward.h: what a filter takes a kept entry for, in entries of a product


class Prices(NamedTuple):
    """Of a unit of each kind of work."""

    logits: float  # a flop of a product, in flop of the micro-kernel
    hidden: float
    weight: float
    fold: float  # a logit, in operations of a core: folded into the statistics
    keep: float  # folded, and its exponential stored
    to_product: float  # folded, and made an operand of d hidden
    from_cache: float  # made g, of a stored exponential
    from_logit: float  # made g
    scan: float  # compared with a filter's cut
    sort: float  # a kept entry, found in the forward and put among those of its row in the backward
    entry: float  # a kept entry times one element of W or of hidden
    convert: float  # an element of W, where it has not the product's dtype
    transpose: float  # an element of W
    write: float  # an element of d weight that is not its own sum
    read_row: float  # an element of W behind a filter, where a row is taken some columns at a time
    widen_row: float  # likewise, of 16 bits
    write_row: float  # likewise, of d weight
    pack: float  # an element of hidden


class Work(NamedTuple):
    """How much of each kind a phase does: the names of `Prices`, and what needs no price."""

    logits: float = 0.0
    hidden: float = 0.0
    weight: float = 0.0
    fold: float = 0.0
    keep: float = 0.0
    to_product: float = 0.0
    from_cache: float = 0.0
    from_logit: float = 0.0
    scan: float = 0.0
    sort: float = 0.0
    entry: float = 0.0
    convert: float = 0.0
    transpose: float = 0.0
    write: float = 0.0
    read_row: float = 0.0
    widen_row: float = 0.0
    write_row: float = 0.0
    pack: float = 0.0
    bytes: float = 0.0  # through memory
    steps: float = 0.0  # at whose ends threads meet

    def plus(self, **more: float) -> Work:
        return self._replace(**{name: getattr(self, name) + x for name, x in more.items()})

    @property
    def flops(self) -> float:
        return self.logits + self.hidden + self.weight

    def seconds(self, prices: Prices, rates: Rates, threads: int) -> float:
        cost = {name: price * getattr(self, name) for name, price in prices._asdict().items()}
        products = sum(cost.pop(name) for name in ("logits", "hidden", "weight"))
        busy = products / rates.kernel + sum(cost.values()) / rates.core
        return CALL + busy / threads + self.bytes / rates.bandwidth + (self.steps * BARRIER if threads > 1 else 0.0)


class Cost(NamedTuple):
    """What a schedule is predicted to take."""

    forward: float  # s
    backward: float  # s
    bytes: float  # through memory

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


class _Counter:
    """Counts what the loops of csrc/cpu/head_forward.h, head_backward.h and head_sparse.h do for one schedule."""

    def __init__(self, request: Request, schedule: Schedule, traits: Traits, kept: float):
        self.request, self.schedule, self.traits = request, schedule, traits
        self.layout = Layout(request, traits, self.schedule.block, request.n_tokens)
        self.n, self.h, self.v = self.layout.n_pad, request.n_hidden, request.n_vocab
        self.head = self.v * self.h  # elements of W
        self.head_bytes = self.head * request.weight_dtype.itemsize
        self.cached = self.schedule.cached_share * self.n * self.v  # logits whose exponentials are kept
        self.samples = schedule.filters  # some tokens go first, to find out whether the filter pays
        self.filters = schedule.filters and filter_pays(kept)
        self.entries = kept * self.n * self.v

    def forward(self) -> Work:
        windows, n_logits = len(self.schedule.chunks(self.request.n_tokens)), self.n * self.v
        work = self._over_head(windows).plus(logits=self._flops(self.h), pack=self.n * self.h)
        if self.schedule.keeps_jacobian:
            work = work.plus(hidden=self._flops(up(self.h, TILE_ROWS)), to_product=n_logits, transpose=self.head)
        elif self.filters:
            work = work.plus(fold=n_logits, scan=n_logits, sort=self.entries)
        else:
            kept_bytes = self.cached * self.traits.cached
            work = work.plus(fold=n_logits - self.cached, keep=self.cached, bytes=kept_bytes)
        return work.plus(**self._first_tokens()._asdict()) if self.samples else work

    def _first_tokens(self) -> Work:
        """Those that a filter asks whether it pays, and then what they drop."""
        panels = ceil_div(self.request.n_tokens, self.traits.panel)
        if panels < FIRST_PANELS:
            return Work()
        share = ceil_div(panels, PANELS_A_FIRST_PANEL) / panels
        n_logits = share * self.n * self.v
        return self._over_head(1 + self.filters).plus(
            logits=(1 + self.filters) * share * self._flops(self.h), fold=(1 + self.filters) * n_logits, scan=n_logits
        )

    def backward(self) -> Work:
        r = self.request
        if not r.n_grads:
            return Work()
        if self.schedule.keeps_jacobian:
            return Work(pack=self.n * self.h)
        if self.filters:
            return self._sparse()
        if not self.schedule.splits_backward:
            return self._dense(r.to_hidden, r.to_weight)
        return self._dense(True, False).plus(**self._dense(False, True)._asdict())

    def _dense(self, to_hidden: bool, to_weight: bool) -> Work:
        """From what was cached, or from logits made again: for each group of blocks, for each window of tokens."""
        windows = len(self.schedule.chunks(self.request.n_tokens))
        groups = 1
        if windows > 1 and to_weight and not self.layout.direct:
            groups = ceil_div(self.layout.blocks, max(1, self.schedule.token_chunk // self.schedule.block))
        again = self.n * self.v - self.cached
        work = Work(
            logits=2 * self.h * again,
            from_cache=self.cached,
            from_logit=again,
            bytes=self.cached * self.traits.cached,
            pack=groups * self.n * self.h * ((again > 0) + to_weight),
        )
        work = work.plus(**self._over_head(windows, reads=again > 0 or to_hidden)._asdict())
        if to_hidden:
            work = work.plus(hidden=self._flops(up(self.h, TILE_ROWS)), transpose=windows * self.head)
        if to_weight:
            writes = 2 * windows - 1 if self.layout.direct else 1  # its own sum is read and written again
            written = 0 if self.layout.direct else self.head
            weight = self._flops(up(self.h, self.traits.panel))
            work = work.plus(weight=weight, write=written, bytes=writes * self.head_bytes)
        return work

    def _sparse(self) -> Work:
        """From the entries that a filter kept: each row of W read, and each row of d weight written, once."""
        r = self.request
        entries = self.entries * self.h * r.n_grads
        return Work(
            sort=self.entries, entry=entries, pack=self.n * self.h,
            read_row=r.to_hidden * self.layout.direct * self.head,
            widen_row=r.to_hidden * (not self.layout.direct) * self.head,
            write_row=r.to_weight * self.head,
            bytes=self.head_bytes * r.n_grads + self.entries * (self.traits.acc + 2),
            steps=2 * max(1.0, self.entries / (self.n * self.schedule.block)),
        )  # fmt: skip

    def _over_head(self, windows: int, reads: bool = True) -> Work:
        """What it takes to have W's rows, ``windows`` times over."""
        convert = 0 if self.layout.as_is or not reads else self.head * windows
        return Work(convert=convert, bytes=reads * self.head_bytes * windows, steps=self.layout.blocks * windows)

    def _flops(self, depth: int) -> float:
        return 2.0 * self.n * depth * self.v


BF16 = Prices(
    logits=1.02, hidden=1.11, weight=1.22, fold=57, keep=61, to_product=80, from_cache=28, from_logit=62, scan=32,
    sort=300, entry=10.5, convert=10, transpose=10, write=10, read_row=50, widen_row=115, write_row=37, pack=10,
)  # fmt: skip
AVX512 = Prices(
    logits=1.03, hidden=1.21, weight=1.13, fold=63, keep=74, to_product=76, from_cache=30, from_logit=60, scan=36,
    sort=300, entry=10.5, convert=10, transpose=10, write=10, read_row=47, widen_row=100, write_row=64, pack=10,
)  # fmt: skip
AVX2 = Prices(
    logits=1.10, hidden=1.21, weight=1.28, fold=70, keep=74, to_product=76, from_cache=29, from_logit=62, scan=36,
    sort=300, entry=12.5, convert=10, transpose=10, write=10, read_row=57, widen_row=166, write_row=77, pack=10,
)  # fmt: skip
"""Fitted to heads of an AMD EPYC (Zen 4) on 2026-11-27. What takes no time beside the rest was guessed: sort, convert,
transpose, write, pack; and AVX512's widen_row, which fp32 and AVX512-BF16 have no use for."""

NOMINAL = Rates(kernel=1.17e11, core=1.18e11, bandwidth=2.7e10, fresh=2.2e9, threads=1)
"""What schedules are chosen by: one core of an AMD EPYC (Zen 4). They may depend neither on the machine and what it is
busy with, or ranks would differ, nor on the number of threads."""
AS_FAST = 1.02  # a schedule that is preferred may take so much longer than the fastest


def filter_pays(kept: float) -> bool:
    """Whether a filter that keeps this share of the entries lets the call have gradients of these alone."""
    return ENTRY_COST * kept < 1


def prices_of(traits: Traits) -> Prices:
    """Those of the kind of product that two dtypes get."""
    return BF16 if traits.elem == 2 else AVX512 if traits.vector >= 16 else AVX2


def cost(request: Request, schedule: Schedule, isa: str, rates: Rates, kept: float = KEPT) -> Cost:
    """What a schedule is predicted to take at the rates of a machine; ``kept`` of the entries pass a filter."""
    traits = TRAITS[isa, request.hidden_dtype, request.weight_dtype]
    counter = _Counter(request, schedule, traits, kept)
    forward, backward = counter.forward(), counter.backward()
    prices = prices_of(traits)
    threads = Layout(request, traits, schedule.block, request.n_tokens, rates.threads).started(2)
    seconds = (
        forward.seconds(prices, rates, threads),
        backward.seconds(prices, rates, threads) if request.n_grads else 0.0,
    )
    return Cost(*seconds, forward.bytes + backward.bytes)


def choose(request: Request, isa: str, threads: int) -> Schedule:
    """The schedule on an instruction set that is predicted to be the fastest; see `dpofast.plan.choice.choose`."""
    found = cpu.candidates(request, isa, threads)
    first = next(found, None)
    if first is None:
        return cpu.first_fit(request, isa, threads)  # which raises
    if not request.filters and _keeps_all(first, request):
        return first
    fit = [first, *found]
    if any(s.filters for s in fit):  # how much it keeps is not known: who asks for it gets it, but for two products
        fit = [s for s in fit if s.filters or s.keeps_jacobian]
    every = {s: cost(request, s, isa, nominal(request, isa)).seconds for s in fit}
    limit = AS_FAST * min(every.values())
    return next(s for s, seconds in every.items() if seconds <= limit)


def _keeps_all(schedule: Schedule, request: Request) -> bool:
    """Whether nothing is made twice, so that there is nothing to gain by another schedule."""
    if not request.n_grads:
        return not schedule.token_chunk
    return schedule.keeps_jacobian or schedule.cached_share == 1


def nominal(request: Request, isa: str) -> Rates:
    """`NOMINAL` for the dtypes of a request: a product of 16-bit operands is twice as fast."""
    elem = TRAITS[isa, request.hidden_dtype, request.weight_dtype].elem
    return NOMINAL._replace(kernel=NOMINAL.kernel * (2 if elem == 2 else 1))
