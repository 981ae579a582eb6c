"""What every launcher here shares: the factors of the transform, the device, and tile sizes by architecture.

Tiles are fixed by architecture and dtype, since a search on the first step would take minutes. With
``DPOFAST_AUTOTUNE=1`` in the environment the candidates below are timed once per kernel, architecture, dtype and class
of shape (sizes rounded up to a power of two), and the fastest is used for the rest of the process.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from dpofast.backends.base import Problem


class Tile(NamedTuple):
    """Sizes of the blocks of a product of ``n`` tokens with ``v`` vocabulary rows, ``h`` of hidden at a time.

    The second products of a backward take ``k`` of the tokens or of the vocabulary at a time, and make ``c`` columns.
    ``plain``: for `is_plain` calls alone.
    """

    n: int
    v: int
    h: int
    warps: int
    stages: int
    c: int = 0
    k: int = 0
    plain: bool = False


# By kernel and whether the operands are 16-bit; the first that may be taken is the default. None may spill with any
# flag it is taken for (tests/backends/triton_resources.txt), and that limits them: 255 registers a thread. With all
# flags and rows that are not aligned, 64 x 128 is the most. A plain call has room for 128 x 128, which reads two thirds
# of the bytes for the same product; that was not run on a GPU yet. 128 x 256 spills even there, and so do 256 columns.
_NVIDIA = {
    ("forward", True): (Tile(128, 128, 64, 8, 4, plain=True), Tile(64, 128, 64, 8, 3), Tile(128, 64, 64, 8, 3)),
    ("forward", False): (Tile(64, 64, 32, 8, 2), Tile(32, 32, 32, 4, 2)),
    ("backward", True): (
        Tile(128, 128, 64, 8, 4, c=128, k=64, plain=True),
        Tile(64, 128, 64, 8, 3, c=64, k=32),
        Tile(128, 64, 64, 8, 3, c=64, k=32),
    ),
    ("backward", False): (Tile(32, 64, 32, 4, 2, c=64, k=32), Tile(64, 32, 32, 4, 2, c=64, k=32)),
}
# 64 KiB of shared memory, the least that a GPU has.
_OTHER = {
    ("forward", True): (Tile(64, 128, 32, 8, 2), Tile(128, 64, 32, 8, 2)),
    ("forward", False): _NVIDIA["forward", False],
    ("backward", True): (Tile(64, 128, 32, 8, 2, c=64, k=32), Tile(128, 64, 32, 8, 2, c=64, k=32)),
    ("backward", False): _NVIDIA["backward", False],
}
# Tests need tiles so small that a small problem has several of each.
_INTERPRETER = {key: (Tile(16, 32, 16, 1, 1, c=32, k=16),) for key in _NVIDIA}

TILES: dict[str, dict[tuple[str, bool], tuple[Tile, ...]]] = {
    "sm_80": _NVIDIA,
    "sm_90": _NVIDIA,
    "sm_100": _NVIDIA,
    "sm_120": _NVIDIA,
    "other": _OTHER,
    "interpreter": _INTERPRETER,
}


@functools.cache
def architecture(device: torch.device) -> str:
    """The device's key of `TILES`."""
    if device.type == "cpu":
        return "interpreter"
    if device.type != "cuda" or torch.version.cuda is None:
        return "other"
    major, minor = torch.cuda.get_device_capability(device)
    name = f"sm_{major}0" if major > 8 else f"sm_{major}{minor}"
    return name if name in TILES else "other"


def is_plain(problem: Problem) -> bool:
    """Says whether a product's code is short: no softcap, rows to be read 16 bytes at a time, and no hidden dimension
    that ends inside a block."""
    hidden, weight = problem.hidden, problem.weight
    dense = hidden.stride(-1) == 1 and weight.stride(-1) == 1 and aligned(hidden) and aligned(weight)
    return dense and problem.n_hidden % 64 == 0 and not problem.transform.softcap  # 64: the longest h of a plain tile


def candidates(arch: str, kernel: str, dtype: torch.dtype, plain: bool) -> tuple[Tile, ...]:
    """The tiles that may be taken, the default first."""
    return tuple(tile for tile in TILES[arch][kernel, dtype.itemsize == 2] if plain or not tile.plain)


_fastest: dict[tuple, Tile] = {}


def choose_tile(
    kernel: str, device: torch.device, dtype: torch.dtype, plain: bool, shape: tuple[int, ...],
    launch: Callable[[Tile], Any],
) -> Tile:  # fmt: skip
    """The tile for one launch: the default, or the fastest where ``DPOFAST_AUTOTUNE=1``.

    ``launch`` runs the kernel with a tile, any number of times, and must leave nothing behind that matters.
    """
    arch = architecture(device)
    tiles = candidates(arch, kernel, dtype, plain)
    if os.environ.get("DPOFAST_AUTOTUNE") != "1":
        return tiles[0]
    key = (kernel, arch, dtype, plain, *(triton.next_power_of_2(size) for size in shape))
    if key not in _fastest:
        _fastest[key] = min(tiles, key=lambda tile: time_of(lambda: launch(tile)))
    return _fastest[key]


def time_of(launch: Callable[[], Any]) -> float:
    """Milliseconds, on the device."""
    # Ten milliseconds to warm up and fifty to measure: a search over a few tiles stays below a second.
    return triton.testing.do_bench(launch, warmup=10, rep=50)


def factors(transform: tuple[float, float, float]) -> dict[str, Any]:
    """The numbers that device.transformed takes of (temperature, logit_scale, softcap)."""
    temperature, logit_scale, softcap = transform
    return {
        "scale": logit_scale / temperature,
        "inner": logit_scale / softcap if softcap else 0.0,
        "cap": softcap / temperature,
        "SOFTCAP": softcap != 0,
    }


def grad_factors(transform: tuple[float, float, float]) -> dict[str, Any]:
    """`factors`, and the number that device.slope takes beside them."""
    temperature, _, softcap = transform
    return factors(transform) | {"inv_cap": temperature / softcap if softcap else 0.0}


def dot_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.dtype, tl.dtype]:
    """The dtype that both operands of the products are converted to, in PyTorch's words and in Triton's."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return dtype, {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def aligned(x: torch.Tensor) -> bool:
    """Says whether every row of x [*, H] begins at a multiple of 16 elements, which 16-byte loads need to be told."""
    return all(stride % 16 == 0 for stride in x.stride()[:-1])


def on(device: torch.device):
    """Makes ``device`` the current one, on which Triton launches."""
    if device.type == "cpu" or (device.type == "cuda" and torch.cuda.current_device() == device.index):
        return contextlib.nullcontext()  # entering a device that is current costs as much as a launch
    return torch.get_device_module(device).device(device)


def split_rows(jobs: int, width: int, least: int, programs: int) -> tuple[int, int]:
    """Cuts ``jobs`` rows (or tiles of rows) of ``width`` columns so that ``programs`` are busy.

    Returns (splits of a row, columns of each, a multiple of ``least``).
    """
    splits = max(1, min(triton.cdiv(width, least), triton.cdiv(programs, jobs)))
    split_width = triton.cdiv(triton.cdiv(width, splits), least) * least
    return triton.cdiv(width, split_width), split_width
