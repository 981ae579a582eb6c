"""Builds dpofast._C: one compiler call per source of csrc/, run in parallel by ninja.

The module is free of torch, so a Python and a C++17 compiler are all it needs, and one build serves every
torch version. No flag names an instruction set: the kernels' sources open their own target regions and the
best one is chosen at run time, so a wheel built on one machine runs on another.

The CUDA half is built where nvcc is found, whatever torch there is, and needs neither a GPU nor a driver. The runtime
is linked statically, so the module imports on machines without CUDA.

The metadata is in pyproject.toml. Heeds CXX, CXXFLAGS, LDFLAGS, MAX_JOBS, PYBIND11_INCLUDE, DPOFAST_BUILD_CUDA
(auto, 0, 1), CUDA_HOME, NVCCFLAGS and TORCH_CUDA_ARCH_LIST (as torch does: "8.0;9.0+PTX").
"""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CXXFLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -pthread -ffp-contract=off -Wall -Wextra"
LDFLAGS = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
BINDINGS = "csrc/bind.cpp"  # the only source that sees Python's headers and the version
HEADERS = sorted(str(path) for kind in ("*.h", "*.cuh") for path in Path("csrc").rglob(kind))
SOURCES = [BINDINGS, *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]
CUDA_BINDINGS = "csrc/bind_cuda.cpp"
CUDA_SOURCES = [CUDA_BINDINGS, *sorted(map(str, Path("csrc/cuda").glob("*.cu")))]
CUDA_ARCHS = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
NVCCFLAGS = "-O3 -std=c++17 -Xcompiler=-fPIC,-fvisibility=hidden"

RULES = """\
rule compile
  command = $cxx $cxxflags -Icsrc $bindflags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule nvcc
  command = $nvcc $nvccflags -Icsrc -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx $cxxflags $in -o $out $ldflags
"""


class Cuda:
    """Where the CUDA toolkit is and what to build for; ``found`` is False for a build without CUDA."""

    def __init__(self):
        wanted = os.environ.get("DPOFAST_BUILD_CUDA", "auto")
        if wanted not in ("auto", "0", "1"):
            raise CompileError(f"DPOFAST_BUILD_CUDA: got {wanted!r}, expected auto, 0 or 1")
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        nvcc = os.path.join(home, "bin", "nvcc") if home else "nvcc"
        self.nvcc = shutil.which(nvcc) or (None if home else shutil.which("/usr/local/cuda/bin/nvcc"))
        roots = [Path(home)] if home else []
        if self.nvcc:
            roots += [Path(self.nvcc).resolve().parents[1], Path("/usr/local/cuda")]
        folders = [folder for root in roots for folder in (root / "lib64", root / "lib", *root.glob("targets/*/lib"))]
        self.libraries = next((folder for folder in folders if (folder / "libcudart_static.a").exists()), None)
        self.found = wanted != "0" and self.nvcc is not None and self.libraries is not None
        if wanted == "1" and not self.found:
            missing = "nvcc" if self.nvcc is None else "libcudart_static.a"
            raise CompileError(f"DPOFAST_BUILD_CUDA=1, but no {missing}: install the CUDA toolkit or set CUDA_HOME")
        self.archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHS

    def flags(self):
        targets = []
        for arch in self.archs.replace(" ", ";").split(";"):
            number = arch.removesuffix("+PTX").replace(".", "")
            if not number.rstrip("af").isdigit():
                raise CompileError(f"TORCH_CUDA_ARCH_LIST: got {arch!r}, expected numbers such as '9.0' or '12.0+PTX'")
            code = f"sm_{number},compute_{number}" if arch.endswith("+PTX") else f"sm_{number}"
            targets.append(f"-gencode=arch=compute_{number},code=[{code}]")
        return [*shlex.split(NVCCFLAGS), *targets, *shlex.split(os.environ.get("NVCCFLAGS", ""))]

    def version(self):
        text = subprocess.run([self.nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        return next(line for line in text.splitlines() if "release" in line).split("release ")[1].split(",")[0]


class NinjaBuildExt(build_ext):
    """Writes a ninja file for the extension and runs it: parallel, and only what changed."""

    def build_extension(self, ext):
        cxx = os.environ.get("CXX", "c++")
        if shutil.which(shlex.split(cxx)[0]) is None:
            raise CompileError(f"no C++ compiler {cxx!r}: install g++ or clang++ (C++17), or set CXX")
        build_dir = Path(self.build_temp)
        build_dir.mkdir(parents=True, exist_ok=True)
        ninja_file = build_dir / "build.ninja"
        ninja_file.write_text(self._ninja_file(ext, cxx, build_dir))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
        command = [*ninja, "-f", str(ninja_file), *jobs]
        if subprocess.run(command, check=False).returncode != 0:
            raise CompileError(f"the compilation of {ext.name} failed: see the compiler's messages above")

    def _ninja_file(self, ext, cxx, build_dir):
        if "PYBIND11_INCLUDE" in os.environ:  # headers alone are enough: torch has them, too
            pybind11_include = os.environ["PYBIND11_INCLUDE"]
        else:
            import pybind11

            pybind11_include = pybind11.get_include()
        cxxflags = shlex.split(f"{CXXFLAGS} {os.environ.get('CXXFLAGS', '')}")
        ldflags = shlex.split(f"{LDFLAGS} {os.environ.get('LDFLAGS', '')}")
        bindflags = [f"-I{path}" for path in (pybind11_include, sysconfig.get_path("include"))]
        bindflags += [
            f"-DDPOFAST_VERSION={json.dumps(self.distribution.get_version())}",
            f"-DDPOFAST_BUILD_FLAGS={json.dumps(shlex.join(cxxflags))}",
        ]
        cuda = Cuda()
        if cuda.found:
            ldflags += [f"-L{cuda.libraries}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
            bindflags += [
                f"-DDPOFAST_CUDA_ARCHS={json.dumps(cuda.archs)}",
                f"-DDPOFAST_CUDA_COMPILER={json.dumps('nvcc ' + cuda.version())}",
            ]
        lines = [
            f"builddir = {build_dir}",
            f"cxx = {_words(shlex.split(cxx))}",
            f"cxxflags = {_words(cxxflags)}",
            f"ldflags = {_words(ldflags)}",
            *([f"nvcc = {_words([cuda.nvcc])}", f"nvccflags = {_words(cuda.flags())}"] if cuda.found else []),
            RULES,
        ]
        objects = []
        for source in [*ext.sources, *(CUDA_SOURCES if cuda.found else [])]:
            objects.append(_path(f"{build_dir / source}.o"))
            lines.append(f"build {objects[-1]}: {'nvcc' if source.endswith('.cu') else 'compile'} {source}")
            if source in (BINDINGS, CUDA_BINDINGS):
                lines.append(f"  bindflags = {_words(bindflags)}")
        lines.append(f"build {_path(self.get_ext_fullpath(ext.name))}: link {' '.join(objects)}\n")
        return "\n".join(lines)


def _words(words):
    """Quote the words for the shell, and the whole for ninja."""
    return shlex.join(words).replace("$", "$$")


def _path(path):
    """Quote a path for ninja's `build` lines."""
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(
    # The Triton kernels lie at the top, but a package named "kernels" would be somebody else's.
    packages=[*find_packages(include=["dpofast", "dpofast.*"]), "dpofast.kernels"],
    package_dir={"dpofast.kernels": "kernels"},
    ext_modules=[Extension("dpofast._C", SOURCES, depends=[*HEADERS, *CUDA_SOURCES])],
    cmdclass={"build_ext": NinjaBuildExt},
)
