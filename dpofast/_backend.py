"""Which backend runs, and why each other one would not.

A backend is named ``"cpu"``, ``"cpu:avx2"`` (one instruction set) or ``"torch"``. ``resolve`` turns what
the user wrote into the exact name that an op is called with, so that forward and backward agree.
"""

from __future__ import annotations

import os

try:
    from dpofast import _C
except ImportError as error:  # the package also works as plain Python, on backend "torch"
    _C = None
    _why_no_C = f"the compiled module dpofast._C cannot be imported ({error})"

BACKENDS = ("cpu", "torch")
_ISAS = tuple(_C.cpu_isas()) if _C is not None else ()  # asked once: torch.compile cannot look into _C


def cpu_isas() -> tuple[str, ...]:
    """Instruction sets of the compiled CPU kernels that this machine has, best first."""
    return _ISAS


def _cpu_isa(requested: str | None) -> str:
    available = cpu_isas()
    if _C is None:
        raise ValueError(f"backend='cpu' cannot run: {_why_no_C}; reinstall dpofast or use backend='torch'")
    source = "backend"
    if requested is None:
        requested, source = os.environ.get("DPOFAST_CPU_ISA") or available[0], "DPOFAST_CPU_ISA"
    if requested not in available:
        raise ValueError(
            f"{source} asks for the CPU instruction set {requested!r}, which this machine or build does not have; "
            f"expected one of {', '.join(available)}"
        )
    return requested


def resolve(backend: str, device_type: str) -> str:
    """The exact backend for tensors on ``device_type``: ``"cpu:<instruction set>"`` or ``"torch"``.

    ``"auto"`` takes ``DPOFAST_BACKEND`` if it is set, else the fastest that can run here, and never fails for
    lack of one. Raises ValueError for a name that is unknown or cannot run.
    """
    if backend == "auto":
        backend = os.environ.get("DPOFAST_BACKEND") or "auto"
    if backend == "auto":
        if device_type == "cpu" and _C is not None:
            return f"cpu:{_cpu_isa(None)}"
        return "torch"
    name, _, isa = backend.partition(":")
    if name not in BACKENDS or (isa and name != "cpu"):
        raise ValueError(f"backend: got {backend!r}, expected 'auto', 'torch', 'cpu' or 'cpu:<instruction set>'")
    if name == "torch":
        return name
    if device_type != "cpu":
        raise ValueError(f"backend={backend!r} needs tensors on the CPU, got device {device_type!r}")
    return f"cpu:{_cpu_isa(isa or None)}"


def explain() -> list[tuple[str, bool, str]]:
    """``(backend, can run, why or why not)`` for every backend, the one that ``"auto"`` takes on a CPU first."""
    rows = []
    for name in BACKENDS:
        try:
            exact = resolve(name, "cpu")
            rows.append(
                (exact, True, "plain PyTorch, chunked; runs on every device" if name == "torch" else "compiled")
            )
        except ValueError as error:
            rows.append((name, False, str(error)))
    if rows[0][1]:
        best = rows[0][0].partition(":")[2]
        rows += [(f"cpu:{isa}", True, "compiled, not the default here") for isa in cpu_isas() if isa != best]
    return rows
