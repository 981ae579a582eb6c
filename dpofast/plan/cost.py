"""What a schedule over tiles costs on a GPU: bytes by construction, and seconds by a simple model of the device.

Predictions, never measurements: `bench/gpu.sh` holds them against a real device.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from dpofast.plan.schedule import Request, Schedule, ceil_div

PRODUCT_EFFICIENCY = 0.74
"""Of the data sheet's peak that large products reach: as quoted in TRL's issue 7244, 42 ms for three of
8192 x 4096 x 151936 in bf16 on an H100."""

LAUNCH_SECONDS = 4e-6
"""Of one kernel from PyTorch, where the device waits for the next one."""


class DataSheet(NamedTuple):
    """Figures of a device."""

    flops_16: float  # dense bf16 or fp16 products, accumulated in fp32
    flops_32: float  # fp32 products, without tf32
    bandwidth: float  # bytes/s of its memory
    l2_bytes: int

    def product_flops(self, dtype: torch.dtype) -> float:
        """Flop/s that large products of this dtype reach."""
        return PRODUCT_EFFICIENCY * (self.flops_16 if dtype.itemsize == 2 else self.flops_32)


DEVICES = {
    "a100": DataSheet(312e12, 19.5e12, 2.039e12, 40 << 20),
    "h100": DataSheet(989e12, 67e12, 3.35e12, 50 << 20),
    "h200": DataSheet(989e12, 67e12, 4.8e12, 50 << 20),
    "b200": DataSheet(2250e12, 75e12, 8.0e12, 126 << 20),
    "rtx4090": DataSheet(165e12, 82.6e12, 1.008e12, 72 << 20),
}


HOST = DataSheet(2e11, 2e11, 2e10, 32 << 20)
"""Some CPU, for backend "torch" anywhere but on a GPU: only ratios matter, since they choose among tiles."""


@functools.cache
def device_of(device: torch.device) -> DataSheet:
    """The figures of a CUDA device: by its name, else those of an A100 with this one's L2 cache. `HOST` for others."""
    if device.type != "cuda":
        return HOST
    properties = torch.cuda.get_device_properties(device)
    name = properties.name.lower().replace(" ", "")
    known = next((figures for key, figures in DEVICES.items() if key in name), None)
    return known or DEVICES["a100"]._replace(l2_bytes=properties.L2_cache_size)


class Traffic(NamedTuple):
    """Bytes that are read and written, by construction, and the number of launches."""

    logits: int  # of the wide tiles of logits, which cost no memory traffic where they fit in L2
    kept: int  # of g: written by passes, read by products
    operands: int  # of the other operands and of the results of products
    launches: int

    @property
    def total(self) -> int:
        return self.logits + self.kept + self.operands


class TiledTraits(NamedTuple):
    """What sizes depend on, of a backend whose products are `torch.mm` (dpofast/backends/tiled.py)."""

    elem: int  # bytes of a product's operand, and so of g
    acc: int  # bytes of an accumulator, and so of a logit
    tiles: int  # tiles of logits alive at once, temporaries included
    hidden: int  # bytes of an element of hidden
    converts_hidden: bool  # rows of hidden and weight that are not of the product's dtype are converted
    converts_weight: bool


class _Counter:
    """Adds up what the loops of dpofast/backends/tiled.py read and write, line by line."""

    def __init__(self, schedule: Schedule, columns: int, request: Request, traits: TiledTraits):
        self.schedule, self.request, self.traits = schedule, request, traits
        self.n, self.h, self.v = request[:3]
        self.columns = self.v if schedule.keeps_jacobian else columns  # of g, that are kept
        self.parts = ceil_div(self.n, schedule.token_chunk or self.n)
        self.logits = self.kept = self.operands = self.launches = 0

    def pieces(self, width: int) -> int:
        return ceil_div(width, self.schedule.block or width)

    def tiles(self, width: int) -> None:
        """Every tile of ``width`` columns made once."""
        count = self.pieces(width)
        self.logits += self.n * width * self.traits.acc
        self.operands += (self.n * count + width * self.parts) * self.h * self.traits.elem
        self.launches += count * self.parts

    def times_weight(self, width: int, calls: int) -> None:
        """``calls`` products of g [n in all, width] with the weight."""
        steps = self.pieces(width) if self.traits.converts_weight else 1
        self.kept += self.n * width * self.traits.elem
        self.operands += calls * width * self.h * self.traits.elem + self.n * self.h * self.traits.acc * (2 * steps - 1)
        self.launches += calls * steps

    def forward(self) -> None:
        n, v, e, a = self.n, self.v, self.traits.elem, self.traits.acc
        self.tiles(v)
        self.logits += n * v * a  # folded
        self.launches += self.pieces(v) * self.parts + self.parts
        if self.columns:
            self.kept += n * self.columns * e  # stored by the pass that folds
            self.launches += self.parts  # and sealed
        if self.schedule.keeps_jacobian:
            self.times_weight(v, self.parts)

    def from_cached(self) -> None:
        """The backward of what was kept."""
        e, a, weight = self.traits.elem, self.traits.acc, self.request.weight_dtype.itemsize
        if self.request.to_hidden:
            self.times_weight(self.columns, 1)
        slices = 1 if weight in (e, a) else self.pieces(self.columns)
        self.kept += self.n * self.columns * e
        self.operands += self.n * self.h * e * slices + self.columns * self.h * (weight if weight in (e, a) else a)
        self.launches += slices

    def recompute(self, rest: int, to_hidden: bool, to_weight: bool) -> None:
        """The backward of the other columns."""
        n, h, e, a, parts = self.n, self.h, self.traits.elem, self.traits.acc, self.parts
        weight, count = self.request.weight_dtype.itemsize, self.pieces(rest)
        self.tiles(rest)
        self.logits += n * rest * a
        self.kept += n * rest * e
        self.launches += count * parts
        if to_hidden:
            self.kept += n * rest * e
            self.operands += rest * parts * h * e + 2 * n * h * a * count
            self.launches += count * parts
        if to_weight:
            self.kept += n * rest * e
            out = weight if weight in (e, a) else a
            self.operands += n * h * e * count + (rest * h * out if parts == 1 else rest * h * a * (2 * parts - 1))
            self.launches += count * parts


def traffic(schedule: Schedule, columns: int, request: Request, traits: TiledTraits) -> Traffic:
    """What forward and backward move, without bias, numbers of tokens and conversions; ``columns`` of g are kept.

    A test counts what the loops really ask for.
    """
    counter = _Counter(schedule, columns, request, traits)
    counter.forward()
    if request.n_grads and not schedule.keeps_jacobian:
        if columns:
            counter.from_cached()
        rest = request.n_vocab - columns
        both = request.to_hidden, request.to_weight
        for to_hidden, to_weight in ((True, False), (False, True)) if schedule.splits_backward else (both,):
            if rest:
                counter.recompute(rest, to_hidden, to_weight)
    return Traffic(counter.logits, counter.kept, counter.operands, counter.launches)


def seconds(device: DataSheet, moved: Traffic, flops: float, dtype: torch.dtype, tile_bytes: int) -> float:
    """Products at their share of the peak, the traffic that no cache saves, and the launches, in turn.

    Operands that are read once per tile are counted in full: small tiles are as bad as this says, large ones a little
    better, for a product hides most of its own traffic.
    """
    outside = moved.kept + moved.operands + (0 if tile_bytes <= device.l2_bytes else moved.logits)
    return flops / device.product_flops(dtype) + outside / device.bandwidth + moved.launches * LAUNCH_SECONDS
