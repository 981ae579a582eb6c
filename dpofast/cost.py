"""What a schedule over tiles costs on a GPU: bytes by construction, and seconds by a simple model of the device.

Predictions, never measurements: `bench/gpu.sh` holds them against a real device.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from dpofast.plan import Schedule, TiledTraits

PRODUCT_EFFICIENCY = 0.74
"""Of the data sheet's peak that large products reach: as quoted in TRL's issue 7244, 42 ms for three of
8192 x 4096 x 151936 in bf16 on an H100."""

LAUNCH_SECONDS = 4e-6
"""Of one kernel from PyTorch, where the device waits for the next one."""


class Device(NamedTuple):
    """Figures of a data sheet."""

    flops_16: float  # dense bf16 or fp16 products, accumulated in fp32
    flops_32: float  # fp32 products, without tf32
    bandwidth: float  # bytes/s of its memory
    l2_bytes: int

    def product_flops(self, dtype: torch.dtype) -> float:
        """Flop/s that large products of this dtype reach."""
        return PRODUCT_EFFICIENCY * (self.flops_16 if dtype.itemsize == 2 else self.flops_32)


DEVICES = {
    "a100": Device(312e12, 19.5e12, 2.039e12, 40 << 20),
    "h100": Device(989e12, 67e12, 3.35e12, 50 << 20),
    "h200": Device(989e12, 67e12, 4.8e12, 50 << 20),
    "b200": Device(2250e12, 75e12, 8.0e12, 126 << 20),
    "rtx4090": Device(165e12, 82.6e12, 1.008e12, 72 << 20),
}


HOST = Device(2e11, 2e11, 2e10, 32 << 20)
"""Some CPU, for backend "torch" anywhere but on a GPU: only ratios matter, since they choose among tiles."""


@functools.cache
def device_of(device: torch.device) -> Device:
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


def traffic(
    choice: Schedule, columns: int, n: int, h: int, v: int, traits: TiledTraits, weight_bytes: int, to_hidden: bool,
    to_weight: bool,
) -> Traffic:  # fmt: skip
    """Of forward and backward under ``choice``, for n tokens; without bias, per-row numbers and conversions.

    ``columns`` of g are kept, ``weight_bytes`` are those of an element of the head. Follows
    dpofast/backends/tiled.py line by line; a test counts what that really asks for.
    """
    e, a = traits.elem, traits.acc
    out = weight_bytes if weight_bytes in (e, a) else a
    parts, blocks = _pieces(n, choice.token_chunk), _pieces(v, choice.block)
    columns = v if choice.keeps_jacobian else columns
    logits = kept = operands = launches = 0

    def tiles(width: int) -> None:
        """Every tile of ``width`` columns made once."""
        nonlocal logits, operands, launches
        count = _pieces(width, choice.block)
        logits += n * width * a
        operands += (n * count + width * parts) * h * e
        launches += count * parts

    def times_weight(width: int, calls: int, rows: int) -> None:
        """``calls`` products of g [rows in all, width] with the weight."""
        nonlocal kept, operands, launches
        steps = _pieces(width, choice.block) if traits.converts_weight else 1
        kept += rows * width * e
        operands += calls * width * h * e + rows * h * a * (2 * steps - 1)
        launches += calls * steps

    tiles(v)
    logits += n * v * a  # folded
    launches += blocks * parts + parts
    if columns:
        logits += n * columns * a
        kept += 3 * n * columns * e  # stored, then read and written once more by normalise
        launches += 2 * _pieces(columns, choice.block) * parts
    if choice.keeps_jacobian:
        times_weight(v, parts, n)
        return Traffic(logits, kept, operands, launches)
    if not (to_hidden or to_weight):
        return Traffic(logits, kept, operands, launches)

    if columns:
        if to_hidden:
            times_weight(columns, 1, n)
        slices = _pieces(columns, choice.block)
        kept += n * columns * e
        operands += n * h * e * slices + columns * h * out
        launches += slices
    rest = v - columns
    split = choice.splits_backward
    for hidden, weight in ((True, False), (False, True)) if split else ((to_hidden, to_weight),):
        if not rest:
            break
        count = _pieces(rest, choice.block)
        tiles(rest)
        logits += n * rest * a
        kept += n * rest * e
        launches += count * parts
        if hidden:
            kept += n * rest * e
            operands += rest * parts * h * e + 2 * n * h * a * count
            launches += count * parts
        if weight:
            kept += n * rest * e
            written = rest * h * out if parts == 1 else rest * h * a * (2 * parts - 1)
            operands += n * h * e * count + written
            launches += count * parts
    return Traffic(logits, kept, operands, launches)


def _pieces(size: int, piece: int) -> int:
    return -(-size // (piece or size))


def seconds(device: Device, moved: Traffic, flops: float, dtype: torch.dtype, tile_bytes: int) -> float:
    """Products at their share of the peak, the traffic that no cache saves, and the launches, in turn.

    Operands that are read once per tile are counted in full: small tiles are as bad as this says, large ones a little
    better, for a product hides most of its own traffic.
    """
    outside = moved.kept + moved.operands + (0 if tile_bytes <= device.l2_bytes else moved.logits)
    return flops / device.product_flops(dtype) + outside / device.bandwidth + moved.launches * LAUNCH_SECONDS
