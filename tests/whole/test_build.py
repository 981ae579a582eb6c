"""The build: what it compiles and how, what it ships, and that it needs no torch, no git and no network.

A stand-in compiler, which only records how it is called, keeps whole builds down to seconds.
"""

import importlib.metadata
import inspect
import json
import os
import re
import runpy
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

ROOT = Path(__file__).parents[2]
EXTENSION = f"dpofast/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
SOURCES = {"csrc/bind.cpp", *(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cpu/*.cpp"))}
CUDA_SOURCES = {str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cuda/*.cu")}

COMPILER = """#!/bin/sh
echo "begin $*" >> "$COMPILER_LOG"
while [ $# -gt 0 ]; do
    case $1 in -o) output=$2 ;; -MF) : > "$2" ;; esac
    shift
done
: > "$output"
echo end >> "$COMPILER_LOG"
"""
NVCC = """#!/bin/sh
case $1 in
    --version) echo "release 99.1, V99.1.0"; exit ;;
    --list-gpu-arch) for arch in {knows}; do echo compute_$arch; done; exit ;;
    --dryrun) case $2 in {refuses}) echo "nvcc fatal: an architecture of the future"; exit 1 ;; *) exit 0 ;; esac ;;
esac
exec "{compiler}" "$@"
"""
FORBIDDEN_MODULE = "raise RuntimeError('the build imports torch')"
FORBIDDEN_PROGRAM = "#!/bin/sh\necho 'the build calls git' >&2\nexit 1\n"


# Without what the build heeds.
HEEDED = re.compile("DPOFAST_|CXX|LDFLAGS|NVCCFLAGS|PYBIND11_INCLUDE|CUDA_HOME|CUDA_PATH|TORCH_CUDA_ARCH_LIST")
CLEAN_ENVIRONMENT = {name: value for name, value in os.environ.items() if not HEEDED.match(name)}


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
        for name in ("bench", "csrc", "dpofast", "kernels", "tests"):
            ignore = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / name, self.root / name, ignore=ignore)
        for name in ("LICENSE", "MANIFEST.in", "Makefile", "README.md", "pyproject.toml", "setup.py"):
            shutil.copy(ROOT / name, self.root)

    def toolkit(self, *, knows="80 86 87 89 90 100 103 120 121", refuses="none", nvcc=NVCC):
        """What makes the build see a CUDA toolkit: the environment, with a stand-in nvcc.

        ``knows``: what it lists; ``refuses``: a pattern of the targets that it takes no notice of its list for.
        """
        home = self.root.parent / "toolkit"
        (home / "bin").mkdir(parents=True)
        (home / "lib64").mkdir()
        (home / "lib64" / "libcudart_static.a").touch()
        text = nvcc.format(knows=knows, refuses=refuses, compiler=self.tools / "c++")
        (home / "bin" / "nvcc").write_text(text, encoding="utf-8")
        (home / "bin" / "nvcc").chmod(0o755)
        return {"CUDA_HOME": str(home), "DPOFAST_BUILD_CUDA": "auto", "TORCH_CUDA_ARCH_LIST": ""}

    def bare(self, *modules):
        """An environment whose PATH has the stand-ins alone, and where these modules are not installed."""
        hide = f"import sys\nfor name in {modules}: sys.modules[name] = None\n"
        (self.tools / "sitecustomize.py").write_text(hide, encoding="utf-8")
        return {"PATH": str(self.tools), "CXX": ""}

    def build(self, kind, root=None, **environment):
        """Build a "wheel" or an "sdist" as pip would; return its path and the compiler's log since.

        What the build printed is then in ``output``.
        """
        self.log.write_text("", encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-c", f"from setuptools import build_meta as b; print(b.build_{kind}('dist'))"],
            cwd=root or self.root,
            env={
                **CLEAN_ENVIRONMENT,
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
        self.output = done.stdout + done.stderr
        assert done.returncode == 0, self.output
        built = (root or self.root) / "dist" / done.stdout.splitlines()[-1]
        return built, self.log.read_text(encoding="utf-8").splitlines()


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def notes(wheel):
    """What the build wrote down of what it left out: by its name, why and the remedy."""
    return json.loads(zipfile.ZipFile(wheel).read("dpofast/_build_notes.json"))


def targets(log):
    """What nvcc was to make, the same for every source: ["sm_80", "sm_90,compute_90"]."""
    calls = compiled(log)
    found = {tuple(arg.rpartition("code=")[2] for arg in calls[s] if "-gencode" in arg) for s in CUDA_SOURCES}
    assert len(found) == 1
    return [code.strip("[]") for code in found.pop()]


def compiled(log):
    """The arguments of each compiler call by its source; the call that links is left out."""
    calls = [line.split()[1:] for line in log if line.startswith("begin")]
    return {call[call.index("-c") + 1]: call for call in calls if "-c" in call}


def test_wheel_holds_the_package_and_nothing_else(project):
    wheel, _ = project.build("wheel")
    version = dpofast.__version__
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {EXTENSION, "dpofast/_build_notes.json"} <= names
    assert {str(path.relative_to(project.root)) for path in project.root.glob("dpofast/**/*.py")} <= names
    for folder in ("bench", "kernels"):
        sources = {f"dpofast/{folder}/{path.name}" for path in project.root.glob(f"{folder}/*.py")}
        assert sources == {name for name in names if name.startswith(f"dpofast/{folder}/")}
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
    with pytest.raises(AssertionError, match="MAX_JOBS: got 'many', expected a number of compilers from 1 on"):
        project.build("wheel", MAX_JOBS="many")


@pytest.fixture
def setup_py(monkeypatch):
    """The functions of setup.py, without a build."""
    monkeypatch.chdir(ROOT)
    return runpy.run_path("setup.py")


@pytest.mark.parametrize(("gib", "expected"), [(1, 1), (5, 2), (64, 8)])
def test_without_max_jobs_every_compiler_has_2_gib(setup_py, monkeypatch, gib, expected):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setitem(setup_py["jobs"].__globals__, "available_memory", lambda: gib << 30)
    assert setup_py["jobs"]() == expected


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/\n", {}, 900 << 10),
        ("0::/a/job\n", {"a/memory.max": "500000", "a/job/memory.max": "max"}, 500_000),
        ("4:memory:/job\n0::/\n", {"memory/job/memory.limit_in_bytes": "400000"}, 400_000),
        ("4:memory:/elsewhere\n", {"memory/memory.limit_in_bytes": "300000"}, 300_000),  # as a container sees it
        ("4:memory:/job\n", {"memory/job/memory.limit_in_bytes": str(2**63 - 4096)}, 900 << 10),
    ],
)
def test_memory_is_what_is_free_and_allowed(setup_py, tmp_path, groups, limits, expected):
    files = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:   900 kB\n", "proc/self/cgroup": groups}
    for name, text in (files | {f"sys/fs/cgroup/{name}": text for name, text in limits.items()}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert setup_py["available_memory"](tmp_path) == expected


def test_compiler_flags_from_the_environment_are_used_and_recorded(project):
    _, log = project.build("wheel", CXXFLAGS="-DEXTRA=1", LDFLAGS="-Wl,-rpath,$ORIGIN")
    for call in compiled(log).values():
        assert "-DEXTRA=1" in call
    assert "-Wl,-rpath,$ORIGIN" in log[-2]


def test_the_cuda_half_is_built_where_there_is_a_toolkit(project):
    wheel, log = project.build("wheel", **project.toolkit())
    assert CUDA_SOURCES and set(compiled(log)) == SOURCES | CUDA_SOURCES | {"csrc/bind_cuda.cpp"}
    assert targets(log) == ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120,compute_120"]
    assert "-lcudart_static" in log[-2]  # no shared runtime, so that it imports where there is no CUDA
    assert notes(wheel) == {} and "without" not in project.output


def test_architectures_are_chosen_as_torch_chooses_them(project):
    toolkit = project.toolkit() | {"NVCCFLAGS": "-lineinfo"}
    _, log = project.build("wheel", **toolkit | {"TORCH_CUDA_ARCH_LIST": "9.0a 8.0+PTX"})
    assert targets(log) == ["sm_90a", "sm_80,compute_80"]
    assert all("-lineinfo" in compiled(log)[source] for source in CUDA_SOURCES)
    _, log = project.build("wheel", **toolkit | {"TORCH_CUDA_ARCH_LIST": "Ada;9.0a Ampere+Tegra"})
    assert targets(log) == ["sm_89,compute_89", "sm_90a", "sm_87"]
    _, log = project.build("wheel", **toolkit | {"TORCH_CUDA_ARCH_LIST": "Hopper"})
    assert targets(log) == ["sm_90,compute_90"]
    with pytest.raises(AssertionError, match="TORCH_CUDA_ARCH_LIST: got 'Hoper', expected numbers .* Hopper"):
        project.build("wheel", **toolkit | {"TORCH_CUDA_ARCH_LIST": "8.0;Hoper"})


def test_the_names_of_architectures_are_those_of_torch(setup_py):
    from torch.utils import cpp_extension

    source = inspect.getsource(cpp_extension._get_cuda_arch_flags)
    of_torch = dict(re.findall(r"\('([A-Z][A-Za-z+]+)', '([^']+)'\)", source))
    assert of_torch and of_torch.keys() <= setup_py["NAMED_ARCHS"].keys()


@pytest.mark.parametrize("stand_in", [{"knows": "75 80 86 89 90"}, {"refuses": "*100*|*120*"}], ids=str)
def test_what_an_older_nvcc_does_not_know_is_left_out(project, stand_in):
    wheel, log = project.build("wheel", **project.toolkit(**stand_in))
    # Newer GPUs compile the PTX of the newest that is left.
    assert targets(log) == ["sm_80", "sm_86", "sm_89", "sm_90,compute_90"]
    assert list(notes(wheel)) == ["cuda architectures"]
    assert ("architecture of the future" in notes(wheel)["cuda architectures"]["why"]) == ("refuses" in stand_in)
    assert "sm_100, sm_120" in notes(wheel)["cuda architectures"]["why"]
    assert "dpofast is built, but without:" in project.output and "cannot compile for sm_100" in project.output


def test_an_architecture_asked_for_by_name_is_an_error_only_where_the_cuda_half_is(project):
    # Images set the list for other packages' sake.
    toolkit = project.toolkit() | {"TORCH_CUDA_ARCH_LIST": "7.0 8.0"}
    wheel, log = project.build("wheel", **toolkit)
    assert targets(log) == ["sm_80"] and "sm_70" in notes(wheel)["cuda architectures"]["why"]
    with pytest.raises(AssertionError, match="DPOFAST_BUILD_CUDA=1, but nvcc 99.1 cannot compile for sm_70"):
        project.build("wheel", **toolkit | {"DPOFAST_BUILD_CUDA": "1"})
    wheel, log = project.build("wheel", **toolkit | {"TORCH_CUDA_ARCH_LIST": "7.0"})
    assert not CUDA_SOURCES & set(compiled(log)) and "sm_70" in notes(wheel)["cuda"]["why"]


COMPILES_NOTHING = NVCC.replace("exec", "echo 'error: unsupported GNU version!'; exit 1 #")
BROKEN_NVCC = {
    "exits": ("#!/bin/sh\necho 'libfoo.so: no such file'\nexit 1\n", "libfoo.so: no such file"),
    "garbage": ("#!/bin/sh\nprintf '\\377garbage'\n", "does not answer as nvcc does"),
    "cannot start": ("#!/no/such/interpreter\n", "cannot run"),
    "cannot compile": (COMPILES_NOTHING, "unsupported GNU version"),
    "makes no file": (NVCC.replace("exec", "exit 0 #"), "stopped with"),
}


@pytest.mark.parametrize("kind", BROKEN_NVCC)
def test_a_broken_nvcc_costs_the_cuda_half_and_nothing_else(project, kind):
    script, why = BROKEN_NVCC[kind]
    toolkit = project.toolkit(nvcc=script)
    # Linking is what notices a file that is not there.
    missing = 'for arg in "$@"; do case $arg in *.cu.o) [ -f "$arg" ] || exit 1 ;; esac; done\n'
    (project.tools / "c++").write_text(COMPILER.replace("#!/bin/sh\n", "#!/bin/sh\n" + missing), encoding="utf-8")
    wheel, log = project.build("wheel", **toolkit)
    assert EXTENSION in zipfile.ZipFile(wheel).namelist()
    assert SOURCES <= set(compiled(log)) and "cudart" not in log[-2]
    assert "DPOFAST_CUDA" not in compiled(log)["csrc/bind.cpp"]
    assert list(notes(wheel)) == ["cuda"] and why in notes(wheel)["cuda"]["why"] and notes(wheel)["cuda"]["remedy"]
    assert "dpofast is built, but without:" in project.output
    with pytest.raises(AssertionError, match="DPOFAST_BUILD_CUDA=1, but"):
        project.build("wheel", **toolkit | {"DPOFAST_BUILD_CUDA": "1"})


def test_the_cuda_half_can_be_left_out_or_insisted_on(project, tmp_path):
    wheel, log = project.build("wheel", **project.toolkit() | {"DPOFAST_BUILD_CUDA": "0"})
    assert set(compiled(log)) == SOURCES and "DPOFAST_BUILD_CUDA=0" in notes(wheel)["cuda"]["why"]
    (tmp_path / "toolkit" / "bin" / "nvcc").unlink()
    empty = {"CUDA_HOME": str(tmp_path / "toolkit")}
    wheel, log = project.build("wheel", **empty, DPOFAST_BUILD_CUDA="auto")
    assert set(compiled(log)) <= SOURCES and "no nvcc" in notes(wheel)["cuda"]["why"]
    with pytest.raises(AssertionError, match="DPOFAST_BUILD_CUDA: got 'yes', expected auto, 0 or 1"):
        project.build("wheel", **empty, DPOFAST_BUILD_CUDA="yes")
    with pytest.raises(AssertionError, match="DPOFAST_BUILD_CUDA=1, but no nvcc in .*: .*install the CUDA toolkit"):
        project.build("wheel", **empty, DPOFAST_BUILD_CUDA="1")


@pytest.mark.parametrize("missing", ["c++", "pybind11"])
def test_what_the_module_needs_and_is_missing_costs_the_module_and_is_named(project, missing):
    bare = project.bare("pybind11" if missing == "pybind11" else "no_such_module")
    if missing == "c++":
        (project.tools / "c++").unlink()
    wheel, log = project.build("wheel", **bare)
    assert log == [] and EXTENSION not in zipfile.ZipFile(wheel).namelist()
    why = {"c++": r"no C\+\+ compiler", "pybind11": "pybind11 is not installed"}[missing]
    remedy = {"c++": r"install g\+\+ or clang\+\+", "pybind11": "pip install pybind11"}[missing]
    assert re.match(why, notes(wheel)["cpu"]["why"]) and re.match(remedy, notes(wheel)["cpu"]["remedy"])
    # The last thing that the build says.
    assert "cuda" not in project.output.partition("dpofast is built, but without:")[2].replace("cpu and cuda: ", "")
    said = " ".join(project.output[project.output.index("dpofast is built, but without:") :].replace("*", "").split())
    assert re.search(f"cpu and cuda: {why}.* Remedy: {remedy}.*`dpofast env` says this again.$", said)
    with pytest.raises(AssertionError, match=f"DPOFAST_BUILD=required, but {why}"):
        project.build("wheel", **bare, DPOFAST_BUILD="required")
    with pytest.raises(AssertionError, match="DPOFAST_BUILD: got 'no', expected auto or required"):
        project.build("wheel", **bare, DPOFAST_BUILD="no")


def test_what_was_named_and_is_not_there_is_an_error(project, tmp_path):
    with pytest.raises(AssertionError, match=r"CXX: there is no C\+\+ compiler 'no-such-compiler'"):
        project.build("wheel", CXX="no-such-compiler")
    with pytest.raises(AssertionError, match=r"PYBIND11_INCLUDE: no pybind11/pybind11.h in "):
        project.build("wheel", PYBIND11_INCLUDE=str(tmp_path))


def test_a_failed_compilation_costs_the_module_even_where_an_older_one_lies(project):
    project.build("wheel")
    failing = "#!/bin/sh\necho note\necho 'x.cpp:1: error: a message'\necho more\nexit 1\n"
    (project.tools / "c++").write_text(failing, encoding="utf-8")
    (project.root / "csrc" / "bind.cpp").touch()
    wheel, _ = project.build("wheel")
    assert EXTENSION not in zipfile.ZipFile(wheel).namelist()
    assert "x.cpp:1: error: a message" in notes(wheel)["cpu"]["why"]
    with pytest.raises(AssertionError, match=r"DPOFAST_BUILD=required, but the compiler stopped with .*a message"):
        project.build("wheel", DPOFAST_BUILD="required")


def test_without_ninja_the_same_is_compiled(project):
    _, with_ninja = project.build("wheel", MAX_JOBS="1")
    shutil.rmtree(project.root / "build")
    wheel, log = project.build("wheel", **project.bare("ninja"), MAX_JOBS="1")
    assert sorted(log) == sorted(line.replace(f"{project.tools}/c++", "c++") for line in with_ninja)
    assert EXTENSION in zipfile.ZipFile(wheel).namelist()
    (project.tools / "c++").write_text("#!/bin/sh\necho 'error: a message'\nexit 1\n", encoding="utf-8")
    wheel, _ = project.build("wheel", **project.bare("ninja"), MAX_JOBS="1")
    assert EXTENSION not in zipfile.ZipFile(wheel).namelist() and "a message" in notes(wheel)["cpu"]["why"]


def test_a_build_in_place_keeps_its_notes_beside_the_module(project):
    def in_place(**environment):
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        environment = {**CLEAN_ENVIRONMENT, "COMPILER_LOG": str(project.log), "DPOFAST_BUILD_CUDA": "0", **environment}
        subprocess.run(command, cwd=project.root, env=environment, capture_output=True, check=True, timeout=300)
        return (project.root / EXTENSION).exists(), (project.root / "dpofast" / "_build_notes.json").read_text()

    without = project.bare("pybind11") | {"PYTHONPATH": str(project.tools)}
    built, written = in_place(**without)
    assert not built and "pybind11 is not installed" in written
    built, written = in_place(CXX=str(project.tools / "c++"))
    assert built and "DPOFAST_BUILD_CUDA=0" in written
    built, written = in_place(**without)
    assert not built and "pybind11 is not installed" in written


def test_a_wheel_leaves_the_sources_as_they_are(project):
    before = {path for path in project.root.rglob("*") if path.is_file()}
    project.build("wheel")
    new = {path for path in project.root.rglob("*") if path.is_file()} - before
    folders = {path.relative_to(project.root).parts[0] for path in new}
    assert folders == {"build", "dist", "dpofast.egg-info"}


# 65.5 is what Python 3.10 and 3.11 bring along; 3.12 needs a newer one, which is still before the licence's new form.
OLD_SETUPTOOLS = "setuptools==65.5.0" if sys.version_info < (3, 12) else "setuptools==68.2.2"


def test_an_old_setuptools_builds_it(project, tmp_path):
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "old")]
    fetched = subprocess.run([*command, OLD_SETUPTOOLS, "wheel"], capture_output=True, text=True, check=False)
    if fetched.returncode != 0:
        pytest.skip(f"{OLD_SETUPTOOLS} is not to be had: {fetched.stderr.strip().splitlines()[-1]}")
    path = f"{tmp_path / 'old'}{os.pathsep}{project.tools}"
    wheel, log = project.build("wheel", PYTHONPATH=path)
    archive = zipfile.ZipFile(wheel)
    assert set(compiled(log)) == SOURCES and EXTENSION in archive.namelist()
    metadata = archive.read(f"dpofast-{dpofast.__version__}.dist-info/METADATA").decode()
    assert "License: Apache-2.0" in metadata and f"Version: {dpofast.__version__}" in metadata
    sdist, _ = project.build("sdist", PYTHONPATH=path)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.*")} <= names
    shutil.rmtree(tmp_path / "old" / "wheel")
    (project.tools / "sitecustomize.py").write_text("import sys\nsys.modules['wheel'] = None\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="needs the package wheel: pip install wheel"):
        project.build("wheel", PYTHONPATH=path)


def test_the_licence_is_said_in_a_form_that_no_setuptools_warns_of(project):
    wheel, _ = project.build("wheel")
    metadata = zipfile.ZipFile(wheel).read(f"dpofast-{dpofast.__version__}.dist-info/METADATA").decode()
    assert "License: Apache-2.0" in metadata
    assert "deprecated" not in project.output.lower()


def test_sdist_has_what_a_build_needs(project, tmp_path):
    unpacked = unpacked_sdist(project, tmp_path)
    headers = {path.relative_to(ROOT) for kind in ("h", "cuh") for path in ROOT.glob(f"csrc/**/*.{kind}")}
    assert all((unpacked / header).is_file() for header in headers)
    assert (unpacked / "Makefile").is_file() and (unpacked / "tests" / "whole" / "test_build.py").is_file()
    _, log = project.build("wheel", root=unpacked)
    assert set(compiled(log)) == SOURCES


def test_sdist_works_and_says_what_it_lacks_where_nothing_can_be_compiled(project, tmp_path):
    unpacked = unpacked_sdist(project, tmp_path)
    (project.tools / "c++").unlink()
    wheel, _ = project.build("wheel", root=unpacked, **project.bare("ninja", "pybind11"))
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = """
import contextlib, io, torch, dpofast
from dpofast import cli
hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(20, 8)
out = dpofast.linear_logprob(hidden, weight, torch.arange(3))
expected = (hidden @ weight.T).log_softmax(-1)[range(3), range(3)]
torch.testing.assert_close(out.logps, expected)
out.logps.sum().backward()
assert hidden.grad.abs().sum() > 0 and dpofast.plan(100, 64, 1000).backend == "torch"
try: dpofast.linear_logprob(hidden, weight, torch.arange(3), backend="cpu")
except ValueError as error: print(error)
print(dpofast.__file__)
cli.main(["env"])
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    refusal, file, *report = done.stdout.splitlines()
    assert file.startswith(str(tmp_path))
    assert re.search(r"was not built: no C\+\+ compiler .* was found: install g\+\+ .*use backend='torch'", refusal)
    (left_out,) = (line for line in report if line.startswith("  left out: cpu"))
    assert "no C++ compiler 'c++' was found: install g++ or clang++" in left_out


def unpacked_sdist(project, tmp_path):
    sdist, _ = project.build("sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    return unpacked


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
    extra = {text.partition(";")[0].strip() for text in requirements if 'extra == "demo"' in text} - {"tomli"}
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
