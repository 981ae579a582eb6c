"""What a schedule over tiles costs on a GPU: bytes by construction, and seconds by a model of the device.

The model was fitted to one H100 (bench/results/gpu-h100-sweep-2026-11-26.json) and is scaled to other devices by their
data sheets. What it takes for granted:

- A product is whole waves of CTA tiles over the multiprocessors, in the shape of tile that is over first. A tile is
  its main loop, slower the smaller the tile, and an epilogue that stores its results in turn. Of 196 products
  measured, half are within 5 % and 90 % within 12 %; the worst is 25 % off.
- A pass is its bytes at 85 % of the memory's bandwidth and its instructions, in turn. A tile of logits that stays in
  the L2 cache beside the operands of its product is not counted: a discount, not a limit on tiles.
- The host is in front by what it has issued. A phase takes as long as the slower of host and device, and each call
  waits for the host once.
- Of 33 whole steps measured (four shapes, cached and jacobian, tiles of 25 MB to 1.2 GB) 32 are within 15 %, with the
  host times of that day, and one is 16 % off. Three mixed ones at N 5735 and 8192 are predicted 9 to 13 % too short;
  mixed ones of H around 1024, in which the host was the slower, up to a third.
- Fused steps of four workloads, trained and frozen, were from 2 % shorter to 14 % longer than predicted. Small
  budgets at H ~1024, in tiles of a few MB, took up to 40 % longer.
- Bare products of H ~1024 alone were 3 to 18 % shorter than predicted, of H 4096 up to 10 % longer: clocks fall in a
  long run. A ratio to them is off by as much: 1.23 is predicted for N 1638, where 1.30 to 1.36 was measured.
- Not measured: other devices, and chunks below 410 tokens.

Predictions, never measurements: `bench/gpu.sh` holds them against a real device.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from typing import NamedTuple

import torch

from dpofast.plan.schedule import DEFAULT_MEMORY_BUDGET, Request, Schedule, ceil_div

CTA_TILES = (
    (64, 128), (64, 256), (128, 64), (128, 96), (128, 128), (128, 160), (128, 192), (128, 224), (128, 256), (192, 128),
    (256, 64), (256, 96), (256, 128), (256, 160),
)  # fmt: skip
"""Rows and columns of the tiles that a product may be cut into. cuBLAS has more; these are the shapes between which its
choices fall."""
PEAK_SHARE = 0.887
"""The share of the data sheet's peak that a main loop would reach with tiles without end."""
TILE_LOSS = 10.4
"""A main loop of tm x tn takes ``1 + TILE_LOSS (1 / tm + 1 / tn)`` of that: 1.12 for 128 x 256, hence 780 TFLOP/s."""
EPILOGUE_SHARE = 1.147
"""The part of its share of the memory's bandwidth with which a multiprocessor stores results: 29 GB/s on an H100."""
PRODUCT_LATENCY = 2.5e-6  # from a product's launch to its first main loop, and of its end
KEEP_INSTRUCTIONS = 41  # an element, of the pass that folds and stores, beyond what its bytes hide
PASS_LATENCY = 3e-6
BANDWIDTH_SHARE = 0.85  # of the data sheet's: what passes over 300 MB reach
FUSED_CYCLES = 4650
"""Cycles of the exponentials in the epilogue of a 128 x 256 tile (`linear_keep`): 0.84 of a bf16 product's speed at
H 1024, 0.94 at H 4096, as measured on that H100."""
FUSED_COLUMNS = 128  # of the vocabulary, that have a sum and a shift of their own there
RANKING_TOKENS = 128
"""Tokens, at most, that go first where a filter skips tiles, to bring the vocabulary into an order."""
MATTERS = 0.3
"""The share of tiles that a filter is assumed to multiply, since only the data can tell."""
SKIP_SPEED = 0.8
"""The speed of a product that skips tiles, of those that it does multiply, to cuBLAS's: never measured. The kernel that
it is like, `linear_keep`, reaches 0.84 to 0.94 with the exponentials."""
TORCH_PASSES = 6  # times the bytes of a kernel of our own, for passes that are written in PyTorch


class HostTimes(NamedTuple):
    """Seconds of the host, which issues the work."""

    forward: float = 150e-6  # of a call, before its first product
    backward: float = 200e-6
    launch: float = 30e-6  # of a product or pass in a loop over tiles: 40 to 80 us for the two of a tile
    chunk: float = 60e-6  # of the statistics of a chunk of tokens


HOST_TIMES = HostTimes()


class DataSheet(NamedTuple):
    """Figures of a device. Without multiprocessors it is a CPU, for which only ratios matter."""

    flops_16: float  # dense bf16 or fp16 products, accumulated in fp32
    flops_32: float  # fp32 products, without tf32
    bandwidth: float  # bytes/s of its memory
    l2_bytes: int
    memory_bytes: int = 0
    sms: int = 0
    clock: float = 0.0  # Hz, boost
    fuses: bool = False  # it is an sm_90, which the kernel `linear_keep` is for

    @property
    def default_budget(self) -> int:
        """Bytes of workspace where nothing is said: a sixteenth of a GPU's memory, at least 1 GiB."""
        return max(DEFAULT_MEMORY_BUDGET, self.memory_bytes // 16 if self.sms else 0)

    def flops(self, elem: int) -> float:
        """Peak of products whose operands have ``elem`` bytes."""
        return self.flops_16 if elem == 2 else self.flops_32 if elem == 4 else self.flops_32 / 2


DEVICES = {
    "a100": DataSheet(312e12, 19.5e12, 2.039e12, 40 << 20, 80 * 10**9, 108, 1.41e9),
    "h100": DataSheet(989e12, 67e12, 3.35e12, 50 << 20, 80 * 10**9, 132, 1.755e9, True),
    "h200": DataSheet(989e12, 67e12, 4.8e12, 50 << 20, 141 * 10**9, 132, 1.755e9, True),
    "b200": DataSheet(2250e12, 75e12, 8.0e12, 126 << 20, 180 * 10**9, 148, 1.85e9),
    "rtx4090": DataSheet(165e12, 82.6e12, 1.008e12, 72 << 20, 24 * 10**9, 128, 2.52e9),
}
"""Devices that `dpofast.plan` knows by name."""

_LIKE_THEM = {
    "h100 pcie": DataSheet(756e12, 51e12, 2.0e12, 50 << 20, 80 * 10**9, 114, 1.755e9, True),
    "h20": DataSheet(148e12, 44e12, 4.0e12, 60 << 20, 96 * 10**9, 78, 1.98e9, True),
    "h800": DEVICES["h100"],
    "gh200": DEVICES["h100"]._replace(bandwidth=4.0e12),
    "a800": DEVICES["a100"],
    "rtx 4090": DEVICES["rtx4090"],
}
_BY_CAPABILITY = {8: "a100", 9: "h100", 10: "b200"}

HOST = DataSheet(2e11, 2e11, 2e10, 32 << 20)
"""Some CPU, for backend "torch" anywhere but on a GPU: only ratios matter, since they choose among tiles."""


def sheet_named(name: str) -> DataSheet | None:
    """The figures of a device that calls itself ``name``, such as "NVIDIA H100 80GB HBM3"."""
    names = {**_LIKE_THEM, **DEVICES}  # the longer come first: an H100 PCIe is no H100
    return next((names[n] for n in names if re.search(rf"(?<![a-z0-9]){n}(?![0-9])", name.lower())), None)


def device_of(device: torch.device) -> DataSheet:
    """The figures of a CUDA device, `HOST` for others. Opaque to `torch.compile`."""
    return _device_of(device)


def default_budget(device: torch.device) -> int:
    """`DataSheet.default_budget` of a device. Opaque to `torch.compile`."""
    return _device_of(device).default_budget


for _function in (device_of, default_budget):
    # What torch.compiler.assume_constant_result does, which imports all of torch._dynamo first.
    _function._dynamo_marked_constant = True  # type: ignore[union-attr]


@functools.cache
def _device_of(device: torch.device) -> DataSheet:
    """The figures of the device's name, or else of its generation, scaled to what the device says of itself."""
    if device.type != "cuda":
        return HOST
    there = torch.cuda.get_device_properties(device)
    sheet = sheet_named(there.name)
    if sheet is None:
        sheet = DEVICES[_BY_CAPABILITY.get(there.major, "a100")]
        share = there.multi_processor_count / sheet.sms
        sheet = sheet._replace(flops_16=sheet.flops_16 * share, flops_32=sheet.flops_32 * share)
    return sheet._replace(
        l2_bytes=there.L2_cache_size, memory_bytes=there.total_memory, sms=there.multi_processor_count,
        fuses=there.major == 9 and _has_descriptors(),
    )  # fmt: skip


def _has_descriptors() -> bool:
    """Whether Triton is here and can describe a tensor to the hardware that copies its tiles."""
    try:
        return importlib.util.find_spec("triton.tools.tensor_descriptor") is not None
    except ImportError:
        return False


class Traffic(NamedTuple):
    """Bytes that are read and written, by construction, and the number of launches."""

    logits: int  # of the wide tiles of logits, which cost no memory traffic where they fit in L2
    cached: int  # of g: written by passes, read by products
    operands: int  # of the other operands and of the results of products
    launches: int

    @property
    def total(self) -> int:
        return self.logits + self.cached + self.operands


class TiledTraits(NamedTuple):
    """What sizes depend on, of a backend whose products are `torch.mm` (dpofast/backends/tiled.py)."""

    elem: int  # bytes of a product's operand, and so of g
    acc: int  # bytes of an accumulator, and so of a logit
    tiles: int  # tiles of logits alive at once, temporaries included
    hidden: int  # bytes of an element of hidden
    converts_hidden: bool  # rows of hidden and weight that are not of the product's dtype are converted
    converts_weight: bool


class Product(NamedTuple):
    """``count`` products [m, k] x [k, n]."""

    count: int  # type: ignore[assignment]  # tuple.count, which nobody calls
    m: int
    n: int
    k: int
    out: int  # bytes of an element of the result
    accumulates: bool = False
    fused: bool = False  # it exponentiates its results itself

    def seconds(self, device: DataSheet, traits: TiledTraits) -> float:
        one = _product_seconds(device, self.m, self.n, self.k, traits.elem, self.out, self.accumulates, self.fused)
        return self.count * one


@functools.lru_cache(maxsize=4096)
def _product_seconds(
    device: DataSheet, m: int, n: int, k: int, elem: int, out: int, accumulates: bool, fused: bool
) -> float:
    """Seconds of one product with the best of `CTA_TILES`; k is cut in up to four where tiles fill no two waves."""
    flops = PEAK_SHARE * device.flops(elem) / device.sms
    stores = EPILOGUE_SHARE * device.bandwidth / device.sms
    best = float("inf")
    for tm, tn in ((128, 256),) if fused else CTA_TILES:
        tiles, area = ceil_div(m, tm) * ceil_div(n, tn), tm * tn
        loop = 2 * k * area / flops * (1 + TILE_LOSS * (1 / tm + 1 / tn))
        store = area * out * (2 if accumulates else 1) / stores + (FUSED_CYCLES / device.clock if fused else 0.0)
        for split in (1,) if fused or tiles > 2 * device.sms else (1, 2, 4):
            waves = ceil_div(tiles * split, device.sms)
            best = min(best, waves * (loop / split + store + (8 * area / stores if split > 1 else 0.0)))
    return PRODUCT_LATENCY + best


class Pass(NamedTuple):
    """``count`` passes over ``elements`` each."""

    count: int  # type: ignore[assignment]
    elements: int
    logits: int  # bytes an element, of a tile that may be in L2
    others: int  # bytes an element, of what else is read and written
    instructions: int = 0  # an element, beyond those that hide behind the bytes
    beside: int = 0  # bytes of the operands of the product that made the tile

    def seconds(self, device: DataSheet, traits: TiledTraits) -> float:
        # All of the tile is in L2 up to three quarters of it, nothing from five quarters on.
        fill = (self.elements * self.logits + self.beside) / max(1, device.l2_bytes)
        outside = min(1.0, max(0.0, 2 * (fill - 0.75)))
        moved = self.elements * (outside * self.logits + self.others) / (BANDWIDTH_SHARE * device.bandwidth)
        if traits.tiles > 1:  # written in PyTorch
            moved *= TORCH_PASSES
        issued = self.elements * self.instructions / (device.sms * 128 * device.clock)
        return self.count * (PASS_LATENCY + moved + issued)


class Skipping(NamedTuple):
    """A product of tiles, of which only those that matter to a filter are multiplied."""

    whole: Product
    writes: int  # bytes of its result

    def seconds(self, device: DataSheet, traits: TiledTraits) -> float:
        multiplied = MATTERS / SKIP_SPEED * self.whole.seconds(device, traits)
        return max(multiplied, PRODUCT_LATENCY + self.writes / (BANDWIDTH_SHARE * device.bandwidth))


class Phase(NamedTuple):
    """Forward or backward: what the device does, and how much of it the host issues one by one."""

    work: list[Product | Pass | Skipping]
    launches: int
    chunks: int
    last: Product | None = None  # of a size that the host cannot be late for: it follows all the others

    def seconds(self, device: DataSheet, traits: TiledTraits, host: HostTimes, call: float) -> float:
        busy = sum(w.seconds(device, traits) for w in self.work)
        issued = self.launches * host.launch + self.chunks * host.chunk
        last = self.last.seconds(device, traits) if self.last else 0.0
        return call + max(busy, issued + last)


class _Counter:
    """Adds up what the loops of dpofast/backends/tiled.py read and write, line by line."""

    def __init__(self, schedule: Schedule, columns: int, request: Request, traits: TiledTraits):
        self.schedule, self.request, self.traits = schedule, request, traits
        self.n, self.h, self.v = request.n_tokens, request.n_hidden, request.n_vocab
        self.columns = self.v if schedule.keeps_jacobian else columns  # of g, that are cached
        self.parts = ceil_div(self.n, schedule.token_chunk or self.n)
        self.logits = self.cached = self.operands = self.launches = 0
        self.work: list[Product | Pass | Skipping] = []
        self.phases: list[Phase] = []
        self.chunk = ceil_div(self.n, self.parts)
        self.fused = schedule.is_fused

    def end_phase(self, launches: int, chunks: int, last: Product | None = None) -> None:
        self.phases.append(Phase(self.work, launches, chunks, last))
        self.work = []

    def over_tokens(self, n_bytes: int) -> None:
        """Small steps over [n, H], ``n_bytes`` an element."""
        self.work.append(Pass(1, self.n * self.h, 0, n_bytes))

    def pieces(self, width: int) -> int:
        return 1 if self.fused else ceil_div(width, self.schedule.block)

    def tiles(self, width: int) -> None:
        """Every tile of ``width`` columns made once."""
        count = self.pieces(width)
        self.logits += 0 if self.fused else self.n * width * self.traits.acc
        self.operands += (self.n * count + width * self.parts) * self.h * self.traits.elem
        self.launches += count * self.parts
        out = self.traits.elem if self.fused else self.traits.acc
        self.work.append(Product(count * self.parts, self.chunk, ceil_div(width, count), self.h, out, fused=self.fused))

    def passes(self, width: int, others: int, instructions: int = 0) -> None:
        """One over every tile of ``width`` columns."""
        count = self.pieces(width)
        columns = ceil_div(width, count)
        beside = (self.chunk + columns) * self.h * self.traits.elem + self.chunk * columns * others
        self.work.append(Pass(count * self.parts, self.chunk * columns, self.traits.acc, others, instructions, beside))

    def times_weight(self, width: int, calls: int) -> None:
        """``calls`` products of g [n in all, width] with the weight."""
        steps = self.pieces(width) if self.traits.converts_weight else 1
        self.cached += self.n * width * self.traits.elem
        self.operands += calls * width * self.h * self.traits.elem + self.n * self.h * self.traits.acc * (2 * steps - 1)
        self.launches += calls * steps
        count = calls * steps
        self.work.append(
            Product(count, ceil_div(self.n, calls), self.h, ceil_div(width, steps), self.traits.acc, steps > 1)
        )

    def forward(self) -> None:
        n, v, e, a = self.n, self.v, self.traits.elem, self.traits.acc
        self.tiles(v)
        if not self.fused:
            self.logits += n * v * a  # folded
            self.launches += self.pieces(v) * self.parts
            if self.columns:  # folded and cached by one pass
                self.passes(self.columns, e, KEEP_INSTRUCTIONS)
            if self.columns < v:
                self.passes(v - self.columns, 0)
        self.launches += self.parts
        if self.schedule.filters:
            self.rank_and_mark()
        issued = self.launches
        if self.columns:
            self.cached += n * self.columns * e  # stored by the pass that folds
            self.launches += self.parts  # and sealed
        if self.schedule.keeps_jacobian:
            self.times_weight(v, self.parts)
        self.fused = not self.schedule.block  # what follows may have tiles
        last = self.work[-1] if self.schedule.keeps_jacobian else None
        last = last._replace(count=1) if isinstance(last, Product) else None
        self.end_phase(issued, self.parts, last)

    def rank_and_mark(self) -> None:
        """What a filter adds to a forward: the head in an order of its own, and the masses of tiles."""
        e, a, first = self.traits.elem, self.traits.acc, min(self.n, RANKING_TOKENS)
        self.work.append(Product(1, first, self.v, self.h, a))
        self.work.append(Pass(1, first * self.v, 0, 8 * a))
        self.work.append(Pass(1, self.v * self.h, 0, 2 * e))
        self.work.append(Pass(1, self.n * ceil_div(self.v, FUSED_COLUMNS), 0, 4 * a))
        self.operands += 3 * self.v * self.h * e
        self.launches += 8  # some forty operations of PyTorch, which take the host less than a pass over tiles

    def from_kept(self) -> None:
        """The backward of the tiles that matter."""
        n, h, v, e, a = self.n, self.h, self.v, self.traits.elem, self.traits.acc
        weight = self.request.weight_dtype.itemsize
        if self.request.to_hidden:
            self.work.append(Pass(1, v * h, 0, e))  # all rows of the head are added up
            self.work.append(Skipping(Product(1, n, h, v, a), n * h * a))
        if self.request.to_weight:
            self.work.append(Skipping(Product(1, v, h, n, weight), v * h * weight))
        self.over_tokens(34)
        self.cached += int(MATTERS * n * v * e) * self.request.n_grads
        self.operands += v * h * (e + weight) + n * h * (e + a)
        self.launches += 5

    def from_cached(self) -> None:
        """The backward of what was cached."""
        e, a, weight = self.traits.elem, self.traits.acc, self.request.weight_dtype.itemsize
        if self.request.to_hidden:
            self.times_weight(self.columns, 1)
        slices = 1 if weight in (e, a) else self.pieces(self.columns)
        out = weight if weight in (e, a) else a
        if self.request.to_weight:
            self.work.append(Product(slices, ceil_div(self.columns, slices), self.h, self.n, out))
        self.over_tokens(34)  # hidden is scaled, d hidden too, and put where it belongs
        self.cached += self.n * self.columns * e
        self.operands += self.n * self.h * e * slices + self.columns * self.h * (weight if weight in (e, a) else a)
        self.launches += slices

    def recompute(self, rest: int, to_hidden: bool, to_weight: bool) -> None:
        """The backward of the other columns."""
        n, h, e, a, parts = self.n, self.h, self.traits.elem, self.traits.acc, self.parts
        weight, count = self.request.weight_dtype.itemsize, self.pieces(rest)
        self.tiles(rest)
        self.passes(rest, e)
        self.logits += n * rest * a
        self.cached += n * rest * e
        self.launches += count * parts
        if to_hidden:
            self.cached += n * rest * e
            self.operands += rest * parts * h * e + 2 * n * h * a * count
            self.launches += count * parts
            self.work.append(Product(count * parts, self.chunk, h, ceil_div(rest, count), a, True))
        if to_weight:
            self.cached += n * rest * e
            out = weight if weight in (e, a) else a
            sums = a if parts > 1 else out
            self.work.append(Product(count * parts, ceil_div(rest, count), h, self.chunk, sums, parts > 1))
            self.operands += n * h * e * count + (rest * h * out if parts == 1 else rest * h * a * (2 * parts - 1))
            self.launches += count * parts


def _counted(schedule: Schedule, columns: int, request: Request, traits: TiledTraits) -> _Counter:
    counter = _Counter(schedule, columns, request, traits)
    counter.forward()
    if not request.n_grads:
        return counter
    before = counter.launches
    if schedule.keeps_jacobian:
        counter.over_tokens(24)  # scaled, rounded, and put where it belongs
    elif schedule.filters:
        counter.from_kept()
    else:
        if columns:
            counter.from_cached()
        rest = request.n_vocab - columns
        both = request.to_hidden, request.to_weight
        for to_hidden, to_weight in ((True, False), (False, True)) if schedule.splits_backward else (both,):
            if rest:
                counter.recompute(rest, to_hidden, to_weight)
    counter.end_phase(counter.launches - before, 0)
    return counter


def traffic(schedule: Schedule, columns: int, request: Request, traits: TiledTraits) -> Traffic:
    """What forward and backward move, without bias, numbers of tokens and conversions; ``columns`` of g are cached.

    A test counts what the loops really ask for.
    """
    counter = _counted(schedule, columns, request, traits)
    return Traffic(counter.logits, counter.cached, counter.operands, counter.launches)


def seconds(
    device: DataSheet, schedule: Schedule, columns: int, request: Request, traits: TiledTraits,
    host: HostTimes = HOST_TIMES,
) -> tuple[float, float]:  # fmt: skip
    """Seconds of a forward and of its backward on a device; ``columns`` of g are cached.

    On a GPU as the head of this file says. On a CPU products at their peak, what leaves the cache, and the launches, in
    turn: small tiles are as bad as this says, large ones a little better, for a product hides most of its own traffic.
    """
    counter = _counted(schedule, columns, request, traits)
    if device.sms:
        calls = host.forward, host.backward
        times = [p.seconds(device, traits, host, call) for p, call in zip(counter.phases, calls, strict=False)]
        return times[0], sum(times[1:])
    tile_bytes = counter.chunk * schedule.block * traits.acc
    outside = counter.cached + counter.operands + (0 if tile_bytes <= device.l2_bytes else counter.logits)
    flops = schedule.products(request.n_grads) * request.flops / (0.74 * device.flops(traits.elem))
    return flops + outside / device.bandwidth + counter.launches * 4e-6, 0.0


def floor_seconds(device: DataSheet, request: Request, traits: TiledTraits) -> float:
    """Seconds of the bare products that no schedule is without."""
    n, h, v = request.n_tokens, request.n_hidden, request.n_vocab
    bare = [Product(1, n, v, h, traits.elem), Product(1, n, h, v, traits.elem), Product(1, v, h, n, traits.elem)]
    wanted = True, request.to_hidden, request.to_weight
    return sum(p.seconds(device, traits) for p, wants in zip(bare, wanted, strict=True) if wants)
