"""What a bug report needs: versions, CPU, GPUs, backends and why not the others, how the module was built.

It must work exactly when something else does not, so every probe is guarded by itself and a failed one
is reported in its place. (A package, not a module, so that `python -m dpofast.env_info` runs although
`dpofast` has imported it for the function of the same name.)
"""

import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["env_info", "format_env_info"]

_CPUINFO = Path("/proc/cpuinfo")  # Linux
_NOTES = Path(__file__).parents[1] / "_build_notes.json"  # setup.py writes it beside dpofast._C
_ENVIRONMENT = re.compile(r"DPOFAST_|OMP_NUM_THREADS$|MKL_NUM_THREADS$|CUDA_VISIBLE_DEVICES$|TRITON_INTERPRET$")


def env_info() -> dict[str, dict[str, Any]]:
    """Describe the machine, the installed versions and the backends; never raises.

    Returns:
        Sections ("versions", "cpu", "gpu", "backends", "build", "environment"), each a dict of strings,
        numbers and lists that `json.dumps` takes. A probe that failed holds "failed: " and the error.

    Example:
        >>> import dpofast
        >>> list(dpofast.env_info())
        ['versions', 'cpu', 'gpu', 'backends', 'build', 'environment']
    """
    backends = _probe(_backends)
    build = _probe(_build)
    return {
        "versions": {
            "dpofast": _probe(_version, "dpofast"),
            "python": platform.python_version(),
            "platform": _probe(platform.platform),
            "torch": _probe(lambda: importlib.import_module("torch").__version__),
            "numpy": _probe(lambda: importlib.import_module("numpy").__version__),
            "triton": _probe(_version, "triton"),
            "cuda of torch": _probe(lambda: importlib.import_module("torch").version.cuda or "none"),
            "cuda toolkit": _probe(_nvcc),
            "nvidia driver": _probe(_driver),
        },
        "cpu": {
            "model": _probe(_cpu_model),
            "machine": _probe(platform.machine),
            "logical cores": _probe(os.cpu_count),
            "usable cores": _probe(_usable_cores),
            "torch threads": _probe(lambda: importlib.import_module("torch").get_num_threads()),
            "features": _probe(lambda: _compiled().cpu_features()),
            "amx": _probe(lambda: amx_note() or "no"),
            "instruction sets": _probe(lambda: _compiled().cpu_isas()),
        },
        "gpu": {"devices": _probe(_gpus)},
        "backends": backends if isinstance(backends, dict) else {"all": backends},
        "build": (build if isinstance(build, dict) else {"dpofast._C": build}) | _probe_left_out(),
        "environment": {name: os.environ[name] for name in sorted(os.environ) if _ENVIRONMENT.match(name)},
    }


def format_env_info(info: dict[str, dict[str, Any]]) -> str:
    """Lay out `env_info()` as one aligned line per entry under the name of its section."""
    lines = []
    for section, entries in info.items():
        lines.append(section)
        width = max(map(len, entries), default=0)
        lines += [f"  {name:<{width}}  {_one_line(value)}" for name, value in entries.items()]
    return "\n".join(lines)


def left_out() -> dict[str, str]:
    """What the build could not have, by its name ("cpu", "cuda", "cuda architectures"): why, and the remedy."""
    if not _NOTES.is_file():  # the sources themselves, never built
        return {}
    notes = json.loads(_NOTES.read_text(encoding="utf-8"))
    return {part: f"{note['why']}: {note['remedy']}" for part, note in notes.items()}


def amx_note() -> str | None:
    """A sentence where this CPU multiplies bf16 in a way that only PyTorch uses, else None."""
    flags = re.search(r"^flags\s*:.*\bamx_bf16\b", _CPUINFO.read_text(), re.M) if _CPUINFO.is_file() else None
    return "yes: PyTorch's bf16 products use it and dpofast's do not, so that torch.mm may be faster" if flags else None


def _probe_left_out() -> dict[str, str]:
    notes = _probe(left_out)
    return {f"left out: {part}": why for part, why in notes.items()} if isinstance(notes, dict) else {"left out": notes}


def _probe(function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except Exception as error:  # whatever is broken, the other probes must still report
        return f"failed: {type(error).__name__}: {error}"


def _one_line(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(str(name) if on is True else f"{name}={on}" for name, on in value.items() if on is not False)
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return " ".join(str(value).split())


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _compiled() -> Any:
    return importlib.import_module("dpofast._C")


def _build() -> dict[str, Any]:
    module = _compiled()
    return {**module.build_info(), "file": module.__file__}


def _backends() -> dict[str, str]:
    backend = importlib.import_module("dpofast.backends.registry")
    devices = ["cpu", *(["cuda"] if importlib.import_module("torch").cuda.is_available() else [])]
    return {
        **{f"auto on {device}": _probe(backend.resolve, "auto", device) for device in devices},
        **{name: f"{'yes' if runs else 'no'}: {why}" for name, runs, why in backend.explain()},
    }


def _cpu_model() -> str:
    if platform.system() == "Darwin":
        return _run("sysctl", "-n", "machdep.cpu.brand_string")
    match = re.search(r"model name\s*:\s*(.*)", _CPUINFO.read_text(encoding="utf-8"))
    return match[1] if match else platform.processor() or "unknown"


def _usable_cores() -> int | None:
    # Containers and taskset leave a process fewer cores than the machine has; macOS has no affinity.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _nvcc() -> str:
    if shutil.which("nvcc") is None:
        return "no nvcc on the PATH"
    return _run("nvcc", "--version").splitlines()[-1]


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi on the PATH"
    return _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]


def _gpus() -> list[str]:
    cuda = importlib.import_module("torch").cuda
    devices = [cuda.get_device_properties(index) for index in range(cuda.device_count())]
    return [f"{d.name} (sm_{d.major}{d.minor}, {d.total_memory / 2**30:.0f} GiB)" for d in devices]


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
