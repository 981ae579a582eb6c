"""The compiled module `dpofast._C`, where it is there, and why it is not, where it is not."""

from __future__ import annotations

from typing import Any

from dpofast.env_info import left_out

LEFT_OUT = left_out()
"""What the build left out, and why. Read once: torch.compile cannot look into files."""

C: Any  # the module, or None
why_no_C = ""
try:
    from dpofast import _C as C
except ImportError as error:  # the package also works as plain Python, on backend "torch"
    C = None
    why_no_C = f"the compiled module dpofast._C cannot be imported ({error}): reinstall dpofast"
    if "cpu" in LEFT_OUT:
        why_no_C = f"the compiled module dpofast._C was not built: {LEFT_OUT['cpu']}"

# asked once: torch.compile cannot look into the module
_ISAS = tuple(C.cpu_isas()) if C is not None else ()


def cpu_isas() -> tuple[str, ...]:
    """Instruction sets of the compiled CPU kernels that this machine has, best first."""
    return _ISAS
