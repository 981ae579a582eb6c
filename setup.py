"""Builds dpofast._C: one compiler call per source of csrc/, run in parallel by ninja.

The module is free of torch, so a Python and a C++17 compiler are all it needs, and one build serves every
torch version. No flag names an instruction set: the kernels' sources open their own target regions and the
best one is chosen at run time, so a wheel built on one machine runs on another.
The metadata is in pyproject.toml. Heeds CXX, CXXFLAGS, LDFLAGS and MAX_JOBS.
"""

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

CXXFLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -pthread -Wall -Wextra"
LDFLAGS = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
BINDINGS = "csrc/bind.cpp"  # the only source that sees Python's headers and the version
HEADERS = sorted(map(str, Path("csrc").rglob("*.h")))
SOURCES = [BINDINGS, *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]

RULES = """\
rule compile
  command = $cxx $cxxflags -Icsrc $bindflags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx $cxxflags $in -o $out $ldflags
"""


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
        command = [sys.executable, "-m", "ninja", "-f", str(ninja_file), *jobs]
        if subprocess.run(command, check=False).returncode != 0:
            raise CompileError(f"the compilation of {ext.name} failed: see the compiler's messages above")

    def _ninja_file(self, ext, cxx, build_dir):
        import pybind11

        cxxflags = shlex.split(f"{CXXFLAGS} {os.environ.get('CXXFLAGS', '')}")
        ldflags = shlex.split(f"{LDFLAGS} {os.environ.get('LDFLAGS', '')}")
        bindflags = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
        bindflags += [
            f"-DDPOFAST_VERSION={json.dumps(self.distribution.get_version())}",
            f"-DDPOFAST_BUILD_FLAGS={json.dumps(shlex.join(cxxflags))}",
        ]
        lines = [
            f"builddir = {build_dir}",
            f"cxx = {_words(shlex.split(cxx))}",
            f"cxxflags = {_words(cxxflags)}",
            f"ldflags = {_words(ldflags)}",
            RULES,
        ]
        objects = []
        for source in ext.sources:
            objects.append(_path(f"{build_dir / source}.o"))
            lines.append(f"build {objects[-1]}: compile {source}")
            if source == BINDINGS:
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
    packages=find_packages(include=["dpofast", "dpofast.*"]),
    ext_modules=[Extension("dpofast._C", SOURCES, depends=HEADERS)],
    cmdclass={"build_ext": NinjaBuildExt},
)
