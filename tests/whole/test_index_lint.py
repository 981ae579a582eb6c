"""Indices that could pass 2^31 are made in 64 bits: a look at the text of the CUDA and the Triton kernels.

A block's number times anything, in 32 bits, wraps for large tensors only, which no test has the memory to meet. So
every product with one of the words below must widen it first.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CUDA = sorted(path for kind in ("*.cu", "*.cuh", "*.h") for path in (ROOT / "csrc" / "cuda").glob(kind))
TRITON = sorted((ROOT / "kernels").glob("*.py"))

_WORD = r"(?:blockIdx|threadIdx|blockDim|gridDim)\.[xyz]"
# `int64_t(blockIdx.x)` and `static_cast<int64_t>(blockIdx.x)` are widened; what is left is not.
_WIDENED = re.compile(rf"(?:int64_t|size_t)\s*\(\s*{_WORD}\s*\)|static_cast<\s*(?:int64_t|size_t)\s*>\(\s*{_WORD}\s*\)")
_NARROW_PRODUCT = re.compile(rf"{_WORD}[\s)]*\*|\*[\s(]*{_WORD}")
_PROGRAM_ID = re.compile(r"tl\.program_id\([^()]*\)(?!\.to\(tl\.int64\))")
# a name that holds a block's number in 32 bits
_NARROW_NAME = re.compile(rf"\b(?:int|unsigned|uint32_t|int32_t|auto)\s+(?:const\s+)?(\w+)\s*=[^;]*{_WORD}")
_NARROW_ID = re.compile(r"^\s*(\w+)\s*=\s*tl\.program_id\([^()]*\)\s*$")


def _products_with(name: str) -> re.Pattern:
    return re.compile(rf"\b{name}\b[\s)]*\*|\*[\s(]*\b{name}\b")


def cuda_faults(text: str) -> list[str]:
    """Lines of CUDA C++ that multiply a block's or a thread's number, or a 32-bit copy of it, in 32 bits."""
    lines = [_WIDENED.sub("wide", line.partition("//")[0]) for line in text.splitlines()]
    narrow = {match[1] for line in lines for match in _NARROW_NAME.finditer(line)}
    patterns = [_NARROW_PRODUCT, *map(_products_with, narrow)]
    return [line.strip() for line in lines if any(pattern.search(line) for pattern in patterns)]


def triton_faults(text: str) -> list[str]:
    """Lines of a Triton kernel that multiply a program's number, or a 32-bit copy of it, in 32 bits."""
    lines = [line.partition("#")[0] for line in text.splitlines()]
    narrow = {match[1] for line in lines for match in _NARROW_ID.finditer(line)}
    faults = []
    for line in lines:
        marked = _PROGRAM_ID.sub("narrow_program_id", line)
        for name in narrow:
            marked = re.sub(rf"\b{name}\b(?!\.to\(tl\.int64\))", "narrow_program_id", marked)
        if _products_with("narrow_program_id").search(marked):
            faults.append(line.strip())
    return faults


@pytest.mark.parametrize("path", CUDA, ids=lambda path: path.name)
def test_cuda_kernels_make_indices_in_64_bits(path):
    assert cuda_faults(path.read_text()) == []


@pytest.mark.parametrize("path", TRITON, ids=lambda path: path.name)
def test_triton_kernels_make_indices_in_64_bits(path):
    assert triton_faults(path.read_text()) == []


@pytest.mark.parametrize(
    ("line", "bad"),
    [
        ("const int64_t row = blockIdx.x * kThreads + threadIdx.x;", True),
        ("x += kThreads * blockIdx.x;", True),
        ("x += kThreads * (blockIdx.x + 1);", True),
        ("const int64_t i = int64_t(blockIdx.x * blockDim.x) + threadIdx.x;", True),
        ("const int block = blockIdx.x;\nx += block * ld;", True),
        ("for (unsigned i = threadIdx.x; i < n; i += kThreads) x[i * ld] = 0;", True),
        ("const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;", False),
        ("const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads;", False),
        ("for (int64_t i = threadIdx.x; i < n; i += kThreads) x[i * ld] = 0;", False),
        ("if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = p;", False),
        ("x += 1;  // blockIdx.x * kThreads", False),
    ],
)
def test_the_look_at_cuda_finds_narrow_products_and_no_others(line, bad):
    assert bool(cuda_faults(line)) == bad


@pytest.mark.parametrize(
    ("line", "bad"),
    [
        ("row = tl.program_id(0) * BLOCK", True),
        ("row = BLOCK * tl.program_id(axis=0)", True),
        ("row = tl.program_id(0)\nx_ptr += row * stride", True),
        ("row = tl.program_id(0)\nx_ptr += stride * row", True),
        ("row = tl.program_id(0).to(tl.int64)\nx_ptr += row * stride", False),
        ("row = tl.program_id(0)\nx_ptr += row.to(tl.int64) * stride", False),
        ("row = tl.program_id(0).to(tl.int64) * BLOCK", False),
        ("row = tl.program_id(0)\nx_ptr += row", False),
        ("x_ptr += 1  # tl.program_id(0) * BLOCK", False),
    ],
)
def test_the_look_at_triton_finds_narrow_products_and_no_others(line, bad):
    assert bool(triton_faults(line)) == bad
