"""Builds the emulator's programs under build/emu/: the Python module, and the test program with sanitizers.

Nothing is compiled while what was built is newer than every source. Heeds CXX.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
OUT = ROOT / "build" / "emu"
CUDA = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
INCLUDES = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'emu'}"]
FLAGS = ["-std=c++17", "-DDPOFAST_EMULATE", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def compiler() -> list[str] | None:
    """The C++ compiler, or None: g++ unless CXX says otherwise."""
    words = shlex.split(os.environ.get("CXX") or "g++")
    return words if shutil.which(words[0]) else None


def _compile(target: Path, sources: list[Path], flags: list[str]) -> Path:
    """``target`` from ``sources``, each compiled on its own, those out of date in parallel.

    Where several processes want it at once, one compiles and the others wait for it.
    """
    headers = [path for kind in ("*.h", "*.cuh") for path in (ROOT / "csrc").rglob(kind)]
    newest = max(path.stat().st_mtime for path in [*headers, *(ROOT / "tests" / "emu").iterdir(), *sources])
    command = [*compiler(), *FLAGS, *INCLUDES, *flags]
    key = hashlib.sha256(shlex.join(command).encode()).hexdigest()[:12]  # other flags, other files
    folder = OUT / key
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _compile_alone(folder / target, newest, sources, command)


def _compile_alone(target: Path, newest: float, sources: list[Path], command: list[str]) -> Path:
    if target.exists() and target.stat().st_mtime > newest:
        return target
    folder = target.parent
    lines = [
        f"rule compile\n  command = {shlex.join(command)} -MMD -MF $out.d -c -x c++ $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {shlex.join(command)} $in -o $out\n",
    ]
    objects = [folder / f"{source.name}.o" for source in sources]
    lines += [f"build {o}: compile {source}" for o, source in zip(objects, sources)]
    lines.append(f"build {target}: link {' '.join(map(str, objects))}\n")
    (folder / "build.ninja").write_text("\n".join(lines))
    import ninja

    done = subprocess.run(
        [Path(ninja.BIN_DIR) / "ninja", "-C", folder], capture_output=True, text=True, timeout=900, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"the compilation of {target.name} failed:\n{done.stdout[-8000:]}{done.stderr[-2000:]}")
    target.touch()
    return target


def module() -> ModuleType:
    """The module `_emu`: the launchers of `dpofast._C`'s CUDA half on the emulator, and ``set_seed``."""
    import pybind11

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    sources = [ROOT / "csrc" / "bind_cuda.cpp", ROOT / "tests" / "emu" / "module.cpp", *CUDA]
    name = f"_emu{sysconfig.get_config_var('EXT_SUFFIX')}"
    path = _compile(Path(name), sources, ["-O2", "-fPIC", "-fvisibility=hidden", "-shared", *includes])
    spec = importlib.util.spec_from_file_location("_emu", path)
    built = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(built)
    return built


def program() -> Path:
    """The emulator's and the kernels' own tests, under AddressSanitizer and UBSan."""
    return _compile(Path("test_emu"), [ROOT / "tests" / "emu" / "test_emu.cpp", *CUDA], SANITIZE)
