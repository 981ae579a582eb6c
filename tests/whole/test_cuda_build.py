"""What nvcc says of the CUDA kernels: no warning, spill or stack, and the registers of tests/whole/cuda_resources.txt.

    python tests/whole/test_cuda_build.py      writes that table anew, to be read before it is committed

Registers change with the compiler: with another nvcc than the table's only the limits are held.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).parent / "cuda_resources.txt"
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHS = ("80", "90a", "100a", "120")
NVCC = shutil.which(os.path.join(os.environ["CUDA_HOME"], "bin", "nvcc") if os.environ.get("CUDA_HOME") else "nvcc")
STRICT = ["-Werror", "all-warnings", "-Xptxas", "-v,--warn-on-spills,--warn-on-local-memory-usage"]

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc")

# One kernel's part of what `ptxas -v` prints.
_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<more>[^\n]*)",
    re.DOTALL,
)


def compile_strictly(source: Path, archs: tuple[str, ...] = ARCHS) -> subprocess.CompletedProcess:
    """One call of nvcc for all ``archs``, two at a time, with warnings as errors and setup.py's other flags."""
    with tempfile.TemporaryDirectory() as folder:
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        command = [NVCC, "-O3", "-std=c++17", "--threads=2", f"-I{ROOT / 'csrc'}", *STRICT, *targets]
        command += ["-c", str(source), "-o", f"{folder}/out.o"]
        return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def resources(output: str) -> dict[tuple[str, str], dict[str, int]]:
    """(kernel, arch): registers, and bytes of shared memory, stack and spills, from what nvcc printed."""
    found = {}
    names = {}
    for match in _KERNEL.finditer(output):
        shared = re.search(r"(\d+) bytes smem", match["more"])
        names[match["name"]] = ""
        found[match["name"], match["arch"]] = {
            "registers": int(match["registers"]),
            "shared": int(shared[1]) if shared else 0,
            "stack": int(match["stack"]),
            "spills": int(match["stores"]) + int(match["loads"]),
        }
    demangled = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    for name, text in zip(list(names), demangled):
        names[name] = re.search(r"(\w+<.*?>)\(", text)[1].replace("dpofast::cuda::", "")
    return {(names[name], arch): values for (name, arch), values in found.items()}


def nvcc_version() -> str:
    """Major.minor."""
    text = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", text)[1]


def as_text(version: str, table: dict[tuple[str, str], dict[str, int]]) -> str:
    width = max(len(kernel) for kernel, _ in table)
    lines = [
        "# Registers a thread, bytes of shared memory and of stack, of every CUDA kernel. Written by",
        "# `python tests/whole/test_cuda_build.py`, compared by the test in that file.",
        f"# nvcc {version}",
        f"{'kernel':<{width}} {'arch':>7} registers shared stack",
    ]
    lines += [
        f"{kernel:<{width}} {'sm_' + arch:>7} {r['registers']:>9} {r['shared']:>6} {r['stack']:>5}"
        for (kernel, arch), r in sorted(table.items(), key=lambda item: (item[0][0], ARCHS.index(item[0][1])))
    ]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def compiled() -> dict[Path, subprocess.CompletedProcess]:
    return {source: compile_strictly(source) for source in SOURCES}


def test_no_kernel_gives_a_warning_or_spills(compiled):
    for source, done in compiled.items():
        assert done.returncode == 0, f"{source.name}: {(done.stdout + done.stderr)[-4000:]}"


def test_every_kernel_keeps_to_the_limits_and_to_the_table(compiled):
    table = {}
    for done in compiled.values():
        table |= resources(done.stdout + done.stderr)
    text = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cuh"))
    assert {kernel.partition("<")[0] for kernel, _ in table} == set(re.findall(r"(\w+_kernel)\(", text))
    assert {arch for _, arch in table} == set(ARCHS)
    for key, r in table.items():
        assert (r["stack"], r["spills"]) == (0, 0) and r["registers"] <= 255 and r["shared"] <= 48 << 10, (key, r)
    version, want = nvcc_version(), TABLE.read_text()
    if f"# nvcc {version}\n" not in want:
        pytest.skip(f"the limits hold; the table is another nvcc's than {version}")
    assert as_text(version, table).splitlines() == want.splitlines()


def cuobjdump() -> str | None:
    """NVIDIA's disassembler: of the toolkit, or the one that Triton brings."""
    triton = importlib.util.find_spec("triton")
    places = [str(Path(triton.origin).parent / "backends" / "nvidia" / "bin")] if triton and triton.origin else []
    toolkit = [str(Path(os.path.realpath(NVCC)).parent)] if NVCC else []
    return shutil.which("cuobjdump", path=os.pathsep.join([*toolkit, os.environ.get("PATH", ""), *places]))


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory):
    """{instance: [(address, instruction)]} of a source's kernels, for sm_90."""
    tool = cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump")
    folder = tmp_path_factory.mktemp("sass")

    @functools.cache
    def of(source: str) -> dict[str, list[tuple[int, str]]]:
        cubin = folder / f"{source}.cubin"
        command = [NVCC, "-O3", "-std=c++17", f"-I{ROOT / 'csrc'}", "-arch=sm_90", "-cubin", "-o", str(cubin)]
        subprocess.run([*command, str(ROOT / "csrc" / "cuda" / f"{source}.cu")], check=True, timeout=300)
        text = subprocess.run([tool, "-sass", str(cubin)], check=True, capture_output=True, text=True).stdout
        names, bodies = (re.split(r"Function : (\S+)", text)[i::2] for i in (1, 2))
        plain = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout
        kernels = [re.search(r"(\w+<.*?>)\(", line)[1].replace("dpofast::cuda::", "") for line in plain.splitlines()]
        lines = ([(int(m[1], 16), m[2]) for m in _INSTRUCTION.finditer(body)] for body in bodies)
        return dict(zip(kernels, lines, strict=True))

    return of


_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);")
_BRANCH = re.compile(r"\bBRA\b.* (?:`\(\S+\)|0x([0-9a-f]+))")


def innermost_loops(code: list[tuple[int, str]]) -> list[list[str]]:
    """The instructions of each loop that has no other in it, both ways of every branch."""
    place = {address: i for i, (address, _) in enumerate(code)}
    ends = [(i, _BRANCH.search(text)) for i, (_, text) in enumerate(code)]
    spans = [(place[int(m[1], 16)], i) for i, m in ends if m and m[1] and int(m[1], 16) <= code[i][0]]
    alone = [(a, b) for a, b in spans if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in spans)]
    return [[text for _, text in code[a : b + 1]] for a, b in alone]


@pytest.mark.parametrize("kernel", ("logprob_keep", "logprob_grad", "scale_rows"))
def test_results_are_stored_16_bytes_at_a_time(machine_code, kernel):
    """The compiler takes a struct of small elements apart, without a word."""
    for name, code in machine_code(kernel).items():
        if "seal" not in name:
            assert any("STG.E.128" in text for _, text in code), name


def test_fold_and_keep_take_few_instructions_an_element(machine_code):
    """The one pass over a plain tile: 16 with both ways to load and to store, of which a row takes one."""
    code = machine_code("logprob_keep")["logprob_keep_kernel<float, bf16, true, true>"]
    loops = [loop for loop in innermost_loops(code) if any("STG.E.128" in text for text in loop)]
    assert len(loops) == 4  # first and second try, with one vector and with two
    for loop in loops:
        elements = sum("MUFU.EX2" in text for text in loop)
        assert elements in (8, 16) and len(loop) <= 16 * elements, (len(loop), elements)
        assert sum("LDG.E.128" in text for text in loop) == elements // 4


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ("int unused; out[0] = 1;", "unused"),
        ("float x[64]; for (int i = 0; i < n; ++i) x[i] = out[i]; out[0] = x[n % 64];", "Local memory"),
    ],
)
def test_what_the_strict_flags_are_for_is_refused(tmp_path, body, word):
    source = tmp_path / "planted.cu"
    source.write_text(f"__global__ void planted(float* out, int n) {{\n  {body}\n}}\n")
    done = compile_strictly(source, ("80",))
    assert done.returncode != 0 and word in done.stdout + done.stderr, done.stdout + done.stderr


if __name__ == "__main__":
    output = ""
    for path in SOURCES:
        run = compile_strictly(path)
        output += run.stdout + run.stderr
        if run.returncode != 0:
            sys.exit(output)
    TABLE.write_text(as_text(nvcc_version(), resources(output)))
