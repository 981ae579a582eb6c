"""The build: what it compiles and how, what it ships, and that it needs no torch, no git and no network.

A stand-in compiler, which only records how it is called, keeps whole builds down to seconds.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import dpofast
from dpofast import _C, demo

ROOT = Path(__file__).parents[1]
EXTENSION = f"dpofast/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
SOURCES = {"csrc/bind.cpp", *(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cpu/*.cpp"))}
CUDA_SOURCES = {str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cuda/*.cu")}

COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo "release 99.1, V99.1.0"; exit; fi
echo "begin $*" >> "$COMPILER_LOG"
while [ $# -gt 0 ]; do
    case $1 in -o) output=$2 ;; -MF) : > "$2" ;; esac
    shift
done
: > "$output"
echo end >> "$COMPILER_LOG"
"""
FORBIDDEN_MODULE = "raise RuntimeError('the build imports torch')"
FORBIDDEN_PROGRAM = "#!/bin/sh\necho 'the build calls git' >&2\nexit 1\n"


class Project:
    """A copy of what the build reads, with stand-ins for the compiler, torch and git."""

    def __init__(self, folder):
        self.root = folder / "project"
        self.log = folder / "compiler.log"
        self.tools = folder / "tools"
        self.tools.mkdir()
        for name, text in {"c++": COMPILER, "git": FORBIDDEN_PROGRAM, "torch.py": FORBIDDEN_MODULE}.items():
            (self.tools / name).write_text(text, encoding="utf-8")
            (self.tools / name).chmod(0o755)
        self.root.mkdir()
        for name in ("csrc", "dpofast", "kernels", "tests"):
            ignore = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / name, self.root / name, ignore=ignore)
        for name in ("LICENSE", "MANIFEST.in", "Makefile", "README.md", "pyproject.toml", "setup.py"):
            shutil.copy(ROOT / name, self.root)

    def toolkit(self):
        """What makes the build see a CUDA toolkit: the environment, with a stand-in nvcc."""
        home = self.root.parent / "toolkit"
        (home / "bin").mkdir(parents=True)
        (home / "lib64").mkdir()
        (home / "lib64" / "libcudart_static.a").touch()
        shutil.copy(self.tools / "c++", home / "bin" / "nvcc")
        return {"CUDA_HOME": str(home), "DPOFAST_BUILD_CUDA": "auto"}

    def build(self, kind, root=None, **environment):
        """Build a "wheel" or an "sdist" as pip would; return its path and the compiler's log since."""
        self.log.write_text("", encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-c", f"from setuptools import build_meta as b; print(b.build_{kind}('dist'))"],
            cwd=root or self.root,
            env={
                **{name: value for name, value in os.environ.items() if name not in ("CXXFLAGS", "LDFLAGS")},
                "CXX": str(self.tools / "c++"),
                "COMPILER_LOG": str(self.log),
                "PATH": f"{self.tools}{os.pathsep}{os.environ['PATH']}",
                "PYTHONPATH": str(self.tools),
                "DPOFAST_BUILD_CUDA": "0",
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        built = (root or self.root) / "dist" / done.stdout.splitlines()[-1]
        return built, self.log.read_text(encoding="utf-8").splitlines()


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def compiled(log):
    """The arguments of each compiler call by its source; the call that links is left out."""
    calls = [line.split()[1:] for line in log if line.startswith("begin")]
    return {call[call.index("-c") + 1]: call for call in calls if "-c" in call}


def test_wheel_holds_the_package_and_nothing_else(project):
    wheel, _ = project.build("wheel")
    version = dpofast.__version__
    names = set(zipfile.ZipFile(wheel).namelist())
    assert EXTENSION in names
    assert {str(path.relative_to(project.root)) for path in project.root.glob("dpofast/**/*.py")} <= names
    assert {f"dpofast/kernels/{path.name}" for path in project.root.glob("kernels/*.py")} <= names
    assert f"dpofast-{version}.dist-info/licenses/LICENSE" in names
    assert {name.partition("/")[0] for name in names} == {"dpofast", f"dpofast-{version}.dist-info"}


def test_every_source_is_compiled_with_the_same_portable_flags(project):
    _, log = project.build("wheel")
    calls = compiled(log)
    assert set(calls) == SOURCES
    shared = {tuple(call[: call.index("-Icsrc") + 1]) for call in calls.values()}
    assert len(shared) == 1
    flags = shared.pop()
    assert {"-O3", "-std=c++17", "-fvisibility=hidden", "-pthread"} <= set(flags)
    # What instruction set to use is decided at run time, and fast-math would break inf and nan.
    assert not [flag for flag in flags if flag.startswith(("-m", "-ffast-math"))]


def test_only_the_bindings_see_python(project):
    _, log = project.build("wheel")
    with_python = {
        source
        for source, call in compiled(log).items()
        if any(arg.startswith("-I") and "python" in arg for arg in call)
    }
    assert with_python == {"csrc/bind.cpp"}


def test_only_what_changed_is_compiled_again(project):
    project.build("wheel")
    changed = "csrc/cpu/dispatch.cpp"
    with (project.root / changed).open("a", encoding="utf-8") as source:
        source.write("// changed\n")
    _, log = project.build("wheel")
    assert set(compiled(log)) == {changed}


def test_max_jobs_is_respected(project):
    _, log = project.build("wheel", MAX_JOBS="1")
    assert [line.split()[0] for line in log] == ["begin", "end"] * (len(SOURCES) + 1)


def test_compiler_flags_from_the_environment_are_used_and_recorded(project):
    _, log = project.build("wheel", CXXFLAGS="-DEXTRA=1", LDFLAGS="-Wl,-rpath,$ORIGIN")
    for call in compiled(log).values():
        assert "-DEXTRA=1" in call
    assert "-Wl,-rpath,$ORIGIN" in log[-2]


def test_the_cuda_half_is_built_where_there_is_a_toolkit(project):
    _, log = project.build("wheel", **project.toolkit(), TORCH_CUDA_ARCH_LIST="")
    calls = compiled(log)
    assert CUDA_SOURCES and set(calls) == SOURCES | CUDA_SOURCES | {"csrc/bind_cuda.cpp"}
    for source in CUDA_SOURCES:
        targets = [arg for arg in calls[source] if arg.startswith("-gencode")]
        assert [arg.rpartition("code=")[2] for arg in targets] == [
            "[sm_80]", "[sm_86]", "[sm_89]", "[sm_90]", "[sm_100]", "[sm_120,compute_120]",
        ]  # fmt: skip
    assert "-lcudart_static" in log[-2]  # no shared runtime, so that it imports where there is no CUDA


def test_architectures_are_chosen_as_torch_chooses_them(project):
    toolkit = project.toolkit()
    _, log = project.build("wheel", **toolkit, TORCH_CUDA_ARCH_LIST="9.0a 8.0+PTX", NVCCFLAGS="-lineinfo")
    for source in CUDA_SOURCES:
        call = compiled(log)[source]
        assert "-gencode=arch=compute_90a,code=[sm_90a]" in call and "-lineinfo" in call
        assert "-gencode=arch=compute_80,code=[sm_80,compute_80]" in call
    with pytest.raises(AssertionError, match="TORCH_CUDA_ARCH_LIST: got 'Hopper'"):
        project.build("wheel", **toolkit, TORCH_CUDA_ARCH_LIST="Hopper")


def test_the_cuda_half_can_be_left_out_or_insisted_on(project, tmp_path):
    _, log = project.build("wheel", **project.toolkit() | {"DPOFAST_BUILD_CUDA": "0"})
    assert set(compiled(log)) == SOURCES
    (tmp_path / "toolkit" / "bin" / "nvcc").unlink()
    empty = {"CUDA_HOME": str(tmp_path / "toolkit")}
    with pytest.raises(AssertionError, match="DPOFAST_BUILD_CUDA: got 'yes', expected auto, 0 or 1"):
        project.build("wheel", **empty, DPOFAST_BUILD_CUDA="yes")
    with pytest.raises(AssertionError, match="DPOFAST_BUILD_CUDA=1, but no nvcc: install the CUDA toolkit"):
        project.build("wheel", **empty, DPOFAST_BUILD_CUDA="1")


def test_missing_compiler_is_named(project):
    with pytest.raises(AssertionError, match=r"no C\+\+ compiler 'no-such-compiler'.*set CXX"):
        project.build("wheel", CXX="no-such-compiler")


def test_failed_compilation_fails_the_build(project):
    (project.tools / "c++").write_text("#!/bin/sh\necho 'a message'\nexit 1\n", encoding="utf-8")
    with pytest.raises(AssertionError, match=r"(?s)a message.*compilation of dpofast\._C failed"):
        project.build("wheel")


def test_sdist_has_what_a_build_needs(project, tmp_path):
    sdist, _ = project.build("sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    headers = {path.relative_to(ROOT) for path in ROOT.glob("csrc/**/*.h")}
    assert all((unpacked / header).is_file() for header in headers)
    assert (unpacked / "Makefile").is_file() and (unpacked / "tests" / "test_build.py").is_file()
    _, log = project.build("wheel", root=unpacked)
    assert set(compiled(log)) == SOURCES


def test_the_tests_run_against_the_installed_package():
    origin = json.loads(importlib.metadata.distribution("dpofast").read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        pytest.skip("an editable install is the working tree by intent")
    site_packages = Path(sysconfig.get_path("platlib")).resolve()
    for module in (dpofast, _C):
        assert Path(module.__file__).resolve().is_relative_to(site_packages), "run `make test`"


def test_one_version_everywhere():
    assert importlib.metadata.version("dpofast") == dpofast.__version__
    assert _C.build_info()["version"] == dpofast.__version__


def test_the_demo_asks_for_what_its_extra_and_the_makefile_install():
    requirements = importlib.metadata.requires("dpofast")
    extra = {text.partition(";")[0].strip() for text in requirements if 'extra == "demo"' in text}
    assert extra == set(demo.PACKAGES.values()) - {"torch"}
    assert demo.WEIGHTS[1] in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_compiled_module_loads_without_torch():
    program = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("dpofast._C", {_C.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "torch" not in sys.modules
print(module.cpu_isas()[-1])
"""
    # -I -S: no site-packages, so no torch to be found either
    command = [sys.executable, "-I", "-S", "-c", program]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "scalar\n"
