"""Builds dpofast._C: one compiler call per source of csrc/, run in parallel.

The module is free of torch, so a Python and a C++17 compiler are all it needs, and one build serves every
torch version. No flag names an instruction set: the kernels' sources open their own target regions and the
best one is chosen at run time, so a wheel built on one machine runs on another.

The CUDA half is built where nvcc is found, whatever torch there is, and needs neither a GPU nor a driver. The runtime
is linked statically, so the module imports on machines without CUDA.

What cannot be built is left out, for dpofast also runs as plain Python: the build ends by saying what and why, and
writes it beside the module, from where `dpofast env` repeats it. What was asked for by name is an error instead.

The metadata is in pyproject.toml. Heeds CXX, CXXFLAGS, LDFLAGS, MAX_JOBS, PYBIND11_INCLUDE, DPOFAST_BUILD (auto,
required), DPOFAST_BUILD_CUDA (auto, 0, 1), CUDA_HOME, NVCCFLAGS and TORCH_CUDA_ARCH_LIST (as torch does: "8.0;9.0+PTX",
"Ada;Hopper"). The flags are those of g++ and clang++; MSVC's are not here and nothing was tried on Windows.
"""

import atexit
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import setuptools
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
JOB_MEMORY = 2 << 30  # bytes that one compiler call may take; nvcc's are the large ones
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "backslashreplace"}
NOTES = "_build_notes.json"  # beside the module; read by dpofast/backends/registry.py and dpofast/env_info

# The names that torch.utils.cpp_extension (2.13) takes in TORCH_CUDA_ARCH_LIST, and its "native", for which it asks the
# GPUs: a build that needs none takes the default for it.
NAMED_ARCHS = {
    "Kepler+Tesla": "3.7",
    "Kepler": "3.5+PTX",
    "Maxwell+Tegra": "5.3",
    "Maxwell": "5.0;5.2+PTX",
    "Pascal": "6.0;6.1+PTX",
    "Volta+Tegra": "7.2",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    **dict.fromkeys(["native", "All", "Common"], CUDA_ARCHS),
}

AGAIN = ", and install dpofast again (pip install --force-reinstall --no-deps --no-cache-dir)"


class Missing(Exception):
    """Why a part cannot be built here, and what to do about it."""

    def __init__(self, why, remedy):
        super().__init__(f"{why}: {remedy}")
        self.why, self.remedy = why, remedy


class Step(NamedTuple):
    """One call of a compiler or of the linker."""

    inputs: list[str]
    output: str
    command: list[str]

    @property
    def links(self):
        return "-c" not in self.command


# ---- What was asked for ------------------------------------------------------------------------------------------


def setting(name, *choices):
    """The value of an environment variable; the first choice where it is not set."""
    value = os.environ.get(name, choices[0])
    if value not in choices:
        raise CompileError(f"{name}: got {value!r}, expected {', '.join(choices[:-1])} or {choices[-1]}")
    return value


def jobs():
    """How many compilers run at a time: MAX_JOBS, else as many as cores and memory allow."""
    asked = os.environ.get("MAX_JOBS")
    if asked:
        if not asked.isdecimal() or int(asked) < 1:
            raise CompileError(f"MAX_JOBS: got {asked!r}, expected a number of compilers from 1 on")
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, available_memory() // JOB_MEMORY))


def available_memory(root=Path("/")):
    """Bytes that are free, or fewer where a container or a batch job is limited; ``root`` is for tests."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *memory_limits(root)]
    meminfo = root / "proc/meminfo"
    if meminfo.is_file():  # Linux
        free = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo.read_text(), re.MULTILINE)
        sizes += [int(free[1]) << 10] if free else []
    return min(sizes)


def memory_limits(root):
    """Bytes that the control groups of this process allow."""
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)  # "0::/job" in version 2, "4:memory:/job" in version 1
        if controllers == "":
            top, name = root / "sys/fs/cgroup", "memory.max"
        elif controllers == "memory":
            top, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top) and (folder / name).is_file():
                text = (folder / name).read_text().strip()
                if text != "max":
                    yield int(text)


# ---- The compilers -----------------------------------------------------------------------------------------------


def cxx_compiler():
    """CXX or c++, as words."""
    if sys.platform == "win32":
        raise Missing("the build has no flags for MSVC and was not tried on Windows", "use backend 'torch', or WSL")
    asked = os.environ.get("CXX")
    words = shlex.split(asked or "c++")
    if shutil.which(words[0]) is None:
        if asked:
            raise CompileError(f"CXX: there is no C++ compiler {asked!r}: install it, or unset CXX")
        raise Missing("no C++ compiler 'c++' was found", f"install g++ or clang++ (C++17), or set CXX{AGAIN}")
    return words


def pybind11_include():
    """The folder of pybind11's headers."""
    asked = os.environ.get("PYBIND11_INCLUDE")  # headers alone are enough: torch has them, too
    if asked:
        if not Path(asked, "pybind11", "pybind11.h").is_file():
            raise CompileError(f"PYBIND11_INCLUDE: no pybind11/pybind11.h in {asked!r}")
        return asked
    if importlib.util.find_spec("pybind11") is None:
        raise Missing(
            "pybind11 is not installed, and the build is not isolated",
            f"pip install pybind11, or set PYBIND11_INCLUDE{AGAIN}",
        )
    import pybind11

    return pybind11.get_include()


class Cuda:
    """The CUDA toolkit and what to build for. Raises Missing where there is none that works."""

    def __init__(self):
        self.nvcc, self.libraries = find_toolkit()
        release = re.search(r"release (\d[\d.]*)", self._ask("--version"))
        self._known = re.findall(r"compute_(\d+)", self._ask("--list-gpu-arch"))
        if release is None or not self._known:
            raise Missing(f"{self.nvcc} does not answer as nvcc does", f"repair the CUDA toolkit{AGAIN}")
        self.version = release[1]
        asked = asked_archs()
        self._refusal = ""  # in nvcc's words
        self.archs = [arch for arch in asked if self._accepts(arch)]
        self.refused = [arch for arch in asked if arch not in self.archs]
        if not self.archs:
            raise self.missing_archs()
        if any(arch.endswith("+PTX") for arch in self.refused):
            # What newer GPUs would have run is gone: they compile the PTX of the newest that is left.
            newest = max(self.archs, key=lambda arch: int(arch_number(arch).rstrip("af")))
            self.archs[self.archs.index(newest)] = newest.removesuffix("+PTX") + "+PTX"

    def missing_archs(self):
        numbers = ", ".join(f"sm_{arch_number(arch)}" for arch in self.refused)
        why = f"nvcc {self.version} cannot compile for {numbers}{self._refusal}"
        return Missing(why, f"install a CUDA toolkit that can{AGAIN}")

    def flags(self):
        targets = []
        for arch in self.archs:
            number = arch_number(arch)
            code = f"sm_{number},compute_{number}" if arch.endswith("+PTX") else f"sm_{number}"
            targets.append(f"-gencode=arch=compute_{number},code=[{code}]")
        return [*shlex.split(NVCCFLAGS), *targets, *shlex.split(os.environ.get("NVCCFLAGS", ""))]

    def _accepts(self, arch):
        number = arch_number(arch)
        if number.rstrip("af") not in self._known:
            return False
        # The list is without "90a" and the like, and nothing is compiled here: a few milliseconds.
        command = [self.nvcc, "--dryrun", f"-gencode=arch=compute_{number},code=sm_{number}", "-c", CUDA_SOURCES[-1]]
        done = subprocess.run(command, **PIPES, check=False)
        if done.returncode != 0:
            self._refusal = f" ({first_error(done.stdout)})"
        return done.returncode == 0

    def _ask(self, option):
        try:
            done = subprocess.run([self.nvcc, option], **PIPES, check=False)
        except OSError as error:
            raise Missing(f"{self.nvcc} cannot run ({error})", f"repair the CUDA toolkit{AGAIN}") from None
        if done.returncode != 0:
            why = f"{self.nvcc} {option} exits with {done.returncode}: {first_error(done.stdout)}"
            raise Missing(why, f"repair the CUDA toolkit{AGAIN}")
        return done.stdout


def find_toolkit():
    """nvcc, and the folder of the static runtime."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which(os.path.join(home, "bin", "nvcc") if home else "nvcc")
    nvcc = nvcc or (None if home else shutil.which("/usr/local/cuda/bin/nvcc"))
    remedy = f"for NVIDIA GPUs install the CUDA toolkit or set CUDA_HOME{AGAIN}"
    if nvcc is None:
        raise Missing(f"no nvcc in {home}/bin" if home else "no nvcc was found", remedy)
    roots = [*([Path(home)] if home else []), Path(nvcc).resolve().parents[1], Path("/usr/local/cuda")]
    folders = [folder for root in roots for folder in (root / "lib64", root / "lib", *root.glob("targets/*/lib"))]
    libraries = next((folder for folder in folders if (folder / "libcudart_static.a").exists()), None)
    if libraries is None:
        raise Missing(f"no libcudart_static.a beside {nvcc}", remedy)
    return nvcc, libraries


def asked_archs():
    """TORCH_CUDA_ARCH_LIST as torch reads it, names replaced: ["8.0", "9.0+PTX"]."""
    text = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHS
    archs = []
    for word in text.replace(" ", ";").split(";"):
        archs += NAMED_ARCHS.get(word, word).split(";") if word else []
    for arch in archs:
        if not re.fullmatch(r"\d+\.?\d[af]?(\+PTX)?", arch):
            names = ", ".join(NAMED_ARCHS)
            raise CompileError(
                f"TORCH_CUDA_ARCH_LIST: got {arch!r}, expected numbers such as '9.0' or '12.0+PTX', or {names}"
            )
    return list(dict.fromkeys(archs))


def arch_number(arch):
    """ "9.0a+PTX" -> "90a"."""
    return arch.removesuffix("+PTX").replace(".", "")


# ---- Running them ------------------------------------------------------------------------------------------------


def run_steps(steps, build_dir):
    """Compile and link: by ninja, only what changed; without ninja everything. Raises Missing with the first error."""
    if importlib.util.find_spec("ninja"):
        ninja = [sys.executable, "-m", "ninja"]
    else:
        ninja = ["ninja"] if shutil.which("ninja") else None
    if ninja:
        ninja_file = build_dir / "build.ninja"
        ninja_file.write_text(ninja_text(steps, build_dir), encoding="utf-8")
        run_step([*ninja, "-f", str(ninja_file), "-j", str(jobs())])
        return
    for step in steps:
        Path(step.output).parent.mkdir(parents=True, exist_ok=True)
    pool = ThreadPoolExecutor(jobs())
    try:
        for compiled in [pool.submit(run_step, step.command) for step in steps if not step.links]:
            compiled.result()
    finally:
        pool.shutdown(cancel_futures=True)
    for step in steps:
        if step.links:
            run_step(step.command)


def run_step(command):
    """Run one command and show what it prints."""
    output = ""
    try:
        with subprocess.Popen(command, **PIPES) as run:
            for line in run.stdout:
                print(line, end="", flush=True)
                output += line
    except OSError as error:  # a script without an interpreter, a program for another machine
        raise Missing(f"{command[0]} cannot run ({error})", f"repair it{AGAIN}") from None
    if run.returncode != 0:
        error = first_error(output)
        remedy = "install Python's headers (python3-dev)" if "Python.h" in error else "mend that (pip -v shows more)"
        raise Missing(f"the compiler stopped with {error!r}", remedy + AGAIN)


def first_error(output):
    """The line of a compiler's output that says what went wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith("ninja: build stop")]
    return next((line for line in lines if re.search(r"\b(error|fatal)\b", line)), lines[-1] if lines else "no message")


def ninja_text(steps, build_dir):
    """What ninja reads."""
    lines = [
        f"builddir = {build_dir}",
        "rule compile\n  command = $command\n  depfile = $out.d\n  deps = gcc",
        "rule link\n  command = $command",
    ]
    for step in steps:
        inputs = " ".join(map(ninja_path, step.inputs))
        lines.append(f"build {ninja_path(step.output)}: {'link' if step.links else 'compile'} {inputs}")
        lines.append(f"  command = {shlex.join(step.command).replace('$', '$$')}")
    return "\n".join(lines) + "\n"


def ninja_path(path):
    """Quote a path for ninja's `build` lines."""
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


# ---- setuptools' command -----------------------------------------------------------------------------------------


class BuildExt(build_ext):
    """Builds what can be built here, and says what cannot."""

    def build_extension(self, ext):
        required = setting("DPOFAST_BUILD", "auto", "required") == "required"
        wanted_cuda = setting("DPOFAST_BUILD_CUDA", "auto", "0", "1")
        module = Path(self.get_ext_fullpath(ext.name))
        module.parent.mkdir(parents=True, exist_ok=True)
        left_out = {}
        try:
            cxx, include = cxx_compiler(), pybind11_include()
            cuda = self._cuda(wanted_cuda, left_out)
            self._compile(module, cxx, include, cuda, wanted_cuda == "1", left_out)
        except Missing as missing:
            if required or wanted_cuda == "1":
                asked = "DPOFAST_BUILD=required" if required else "DPOFAST_BUILD_CUDA=1"
                raise CompileError(f"{asked}, but {missing}") from None
            module.unlink(missing_ok=True)  # of an earlier build in the same place
            ext.optional = True  # setuptools' word for "go on without the file"
            left_out["cpu"] = missing
            left_out.setdefault("cuda", missing)
        self._write_notes(module.with_name(NOTES), left_out)

    def _cuda(self, wanted, left_out):
        """The toolkit to build with, or None."""
        if wanted == "0":
            left_out["cuda"] = Missing("DPOFAST_BUILD_CUDA=0 was set", f"unset it{AGAIN}")
            return None
        try:
            cuda = Cuda()
            if cuda.refused and wanted == "1" and os.environ.get("TORCH_CUDA_ARCH_LIST"):
                raise cuda.missing_archs()
        except Missing as missing:
            if wanted == "1":
                raise CompileError(f"DPOFAST_BUILD_CUDA=1, but {missing}") from None
            left_out["cuda"] = missing
            return None
        if cuda.refused:
            left_out["cuda architectures"] = cuda.missing_archs()
        return cuda

    def _compile(self, module, cxx, include, cuda, cuda_required, left_out):
        """Build the module; where the CUDA half is what stops it and nobody insists, without it."""
        build_dir = Path(self.build_temp)
        build_dir.mkdir(parents=True, exist_ok=True)
        try:
            run_steps(self._steps(module, cxx, include, cuda), build_dir)
        except Missing as missing:
            if cuda is None or cuda_required:
                raise
            left_out.pop("cuda architectures", None)
            print("dpofast: once more, without the CUDA half", flush=True)
            run_steps(self._steps(module, cxx, include, None), build_dir)
            remedy = f"make this nvcc and the C++ compiler work together, or set DPOFAST_BUILD_CUDA=0{AGAIN}"
            left_out["cuda"] = Missing(missing.why, remedy)

    def _steps(self, module, cxx, include, cuda):
        """Every command, in the order of a build that runs one at a time."""
        cxxflags = shlex.split(f"{CXXFLAGS} {os.environ.get('CXXFLAGS', '')}")
        ldflags = shlex.split(f"{LDFLAGS} {os.environ.get('LDFLAGS', '')}")
        bindflags = [f"-I{path}" for path in (include, sysconfig.get_path("include"))]
        bindflags += [
            f"-DDPOFAST_VERSION={json.dumps(self.distribution.get_version())}",
            f"-DDPOFAST_BUILD_FLAGS={json.dumps(shlex.join(cxxflags))}",
        ]
        if cuda:
            ldflags += [f"-L{cuda.libraries}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
            bindflags += [
                f"-DDPOFAST_CUDA_ARCHS={json.dumps(';'.join(cuda.archs))}",
                f"-DDPOFAST_CUDA_COMPILER={json.dumps('nvcc ' + cuda.version)}",
            ]
        steps = []
        for source in [*SOURCES, *(CUDA_SOURCES if cuda else [])]:
            output = str(Path(self.build_temp, f"{source}.o"))
            if source.endswith(".cu"):
                command = [cuda.nvcc, *cuda.flags(), "-Icsrc", "-MD"]
            else:
                bindings = bindflags if source in (BINDINGS, CUDA_BINDINGS) else []
                command = [*cxx, *cxxflags, "-Icsrc", *bindings, "-MMD"]
            steps.append(Step([source], output, [*command, "-MF", f"{output}.d", "-c", source, "-o", output]))
        objects = [step.output for step in steps]
        return [*steps, Step(objects, str(module), [*cxx, *cxxflags, *objects, "-o", str(module), *ldflags])]

    def _write_notes(self, path, left_out):
        notes = {part: {"why": missing.why, "remedy": missing.remedy} for part, missing in left_out.items()}
        path.write_text(json.dumps(notes, indent=1), encoding="utf-8")
        if notes:
            # At exit, for setuptools has much to say after the compilers.
            atexit.register(print, summary(notes), file=sys.stderr)

    def copy_extensions_to_source(self):
        """Of an in-place or editable build: the notes follow the module."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            in_place = Path(self.get_ext_fullpath(ext.name))
            shutil.copy(built.with_name(NOTES), in_place.with_name(NOTES))
            if not built.exists():
                in_place.unlink(missing_ok=True)  # of an earlier build


def summary(notes):
    """What was left out, for the last lines of the build."""
    parts = {}
    for part, note in notes.items():
        parts.setdefault(f"{note['why']}.\nRemedy: {note['remedy']}.", []).append(part)
    lines = [f"{' and '.join(names)}: {text}" for text, names in parts.items()]
    text = "\n".join(["dpofast is built, but without:", *lines, "`dpofast env` says this again."])
    wrap = textwrap.TextWrapper(96, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False).wrap
    rows = [row for line in text.splitlines() for row in wrap(line)]
    return "\n".join(["", "*" * 100, *(f"* {row}" for row in rows), "*" * 100])


def check_for_wheel():
    """Name the package without which an old setuptools only says "invalid command 'bdist_wheel'"."""
    old = tuple(map(int, setuptools.__version__.split(".")[:2])) < (70, 1)
    if old and {"dist_info", "bdist_wheel"} & set(sys.argv) and importlib.util.find_spec("wheel") is None:
        sys.exit(f"setuptools {setuptools.__version__} needs the package wheel: pip install wheel, or setuptools>=70.1")


if __name__ == "__main__":
    check_for_wheel()
    setup(
        # Here, for no form of it in pyproject.toml is read by setuptools before 77 and without a warning after.
        license="Apache-2.0",
        # The Triton kernels and the benchmarks lie at the top, but packages named so would be somebody else's.
        package_data={"dpofast": ["py.typed", "demo/demo.toml"]},
        include_package_data=False,  # not the results of the benchmarks
        packages=[*find_packages(include=["dpofast", "dpofast.*"]), "dpofast.bench", "dpofast.kernels"],
        package_dir={"dpofast.bench": "bench", "dpofast.kernels": "kernels"},
        ext_modules=[Extension("dpofast._C", SOURCES, depends=[*HEADERS, *CUDA_SOURCES])],
        cmdclass={"build_ext": BuildExt},
    )
