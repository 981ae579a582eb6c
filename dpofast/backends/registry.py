"""Backends by name: which one runs, why each other one would not, and the object behind a name.

A backend is named ``"cpu"``, ``"cpu:avx2"`` (one instruction set), ``"cuda"``, ``"triton"`` or ``"torch"``. ``resolve``
turns what the user wrote into the exact name that an op is called with, so that forward and backward agree.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from dpofast import native
from dpofast.backends.base import Backend
from dpofast.backends.tiled import TiledBackend
from dpofast.backends.torch import TorchPasses

_HAS_TRITON = importlib.util.find_spec("triton") is not None

BACKENDS = ("cpu", "cuda", "triton", "torch")
added: dict[str, Backend] = {}
"""Backends beside these, by exact name."""
# asked once: torch.compile cannot look into the module
_PAIR_LOSSES = tuple(getattr(native.C, "cuda_pair_losses", ()))


def register(name: str, backend: Backend) -> None:
    """Makes ``backend=name`` run on an object of yours, on every device; see `dpofast.backends.base.Backend`.

    It is never taken by "auto". Its schedules are those of the backends whose products are `torch.mm`.
    """
    if not name or name == "auto" or name.partition(":")[0] in BACKENDS:
        raise ValueError(f"name: got {name!r}, expected one that is not among 'auto', {', '.join(map(repr, BACKENDS))}")
    added[name] = backend


def _cpu_isa(requested: str | None) -> str:
    available = native.cpu_isas()
    if native.C is None:
        raise ValueError(f"backend: 'cpu' cannot run: {native.why_no_C}; or use backend='torch'")
    source = "backend"
    if requested is None:
        requested, source = os.environ.get("DPOFAST_CPU_ISA") or available[0], "DPOFAST_CPU_ISA"
    if requested not in available:
        raise ValueError(
            f"{source}: asks for the CPU instruction set {requested!r}, which this machine or build does not have; "
            f"expected one of {', '.join(available)}"
        )
    return requested


def why_not(name: str, device_type: str) -> str | None:
    """Why a backend cannot take tensors on a device of this type, or None."""
    if name == "cpu":
        return None if device_type == "cpu" else f"needs tensors on the CPU, got device {device_type!r}"
    if name == "cuda":
        if native.C is None:
            return f"cannot run: {native.why_no_C}"
        if not hasattr(native.C, "cuda_logprob_fold"):
            return f"is not compiled in: {native.LEFT_OUT.get('cuda', 'dpofast was built without the CUDA toolkit')}"
        if device_type != "cuda":
            return f"needs tensors on a CUDA device, got device {device_type!r}"
        if torch.version.cuda is None:
            return "is for NVIDIA GPUs, and this torch is built without CUDA"
    if name == "triton":
        if not _HAS_TRITON:
            return "cannot run: the package triton is missing: pip install triton"
        if device_type not in ("cuda", "xpu"):
            return f"needs tensors on a GPU, got device {device_type!r}"
    return None


def resolve(backend: str, device_type: str) -> str:
    """The exact backend for tensors on ``device_type``: ``"cpu:<instruction set>"``, ``"cuda"``, ``"triton"``,
    ``"torch"`` or one that was added.

    ``"auto"`` takes ``DPOFAST_BACKEND`` if it is set, else the fastest that can run here, and never fails for
    lack of one. Raises ValueError for a name that is unknown or cannot run.
    """
    if not isinstance(backend, str):
        raise TypeError(f"backend: got {type(backend).__name__}, expected a name such as 'auto'")
    if backend == "auto":
        backend = os.environ.get("DPOFAST_BACKEND") or "auto"
    if backend in added:
        return backend
    if backend == "auto":
        if device_type == "cpu" and native.C is not None:
            return f"cpu:{_cpu_isa(None)}"
        return next(name for name in BACKENDS[1:] if why_not(name, device_type) is None)
    name, _, isa = backend.partition(":")
    if name not in BACKENDS or (isa and name != "cpu"):
        known = ", ".join(f"'{known}'" for known in BACKENDS)
        raise ValueError(f"backend: got {backend!r}, expected 'auto', {known} or 'cpu:<instruction set>'")
    reason = why_not(name, device_type)
    if reason is not None:
        raise ValueError(f"backend: {backend!r} {reason}")
    return f"cpu:{_cpu_isa(isa or None)}" if name == "cpu" else name


def get(name: str) -> Backend:
    """What runs an exact backend, as `resolve` names it."""
    return added.get(name) or _built_in(name)


@functools.cache
def _built_in(name: str) -> Backend:
    kind, _, isa = name.partition(":")
    if kind == "cpu":
        from dpofast.backends.cpu import CpuBackend

        return CpuBackend(isa)
    if kind == "cuda":
        from dpofast.backends.cuda import CudaPasses

        return TiledBackend(CudaPasses(native.C))
    if kind == "triton":
        from dpofast.backends.triton import TritonBackend, TritonPasses

        return TritonBackend(TritonPasses())
    return TiledBackend(TorchPasses())


def pair_losses(backend: str) -> tuple[str, ...]:
    """The losses that an exact backend computes whole; see `dpofast.backends.base.PairBackend`."""
    if backend in added:
        return getattr(added[backend], "pair_losses", ())
    return _PAIR_LOSSES if backend == "cuda" else ()


_WHAT = {
    "cpu": "compiled",
    "cuda": "compiled",
    "triton": "compiled when first used",
    "torch": "plain PyTorch, chunked; runs on every device",
}


def explain() -> list[tuple[str, bool, str]]:
    """``(backend, can run, why or why not)`` for every backend, the one that ``"auto"`` takes on a CPU first."""
    gpu = torch.cuda.is_available()
    rows = []
    for name in BACKENDS:
        try:
            rows.append((resolve(name, "cuda" if name != "cpu" and gpu else "cpu"), True, _WHAT[name]))
        except ValueError as error:
            rows.append((name, False, str(error)))
    if rows[0][1]:
        best = rows[0][0].partition(":")[2]
        rows += [(f"cpu:{isa}", True, "compiled, not the default here") for isa in native.cpu_isas() if isa != best]
    return rows
