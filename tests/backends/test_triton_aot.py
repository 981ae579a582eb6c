"""The Triton compiler's word on every kernel, with no GPU: registers, stack, shared memory, tensor cores.

What is compiled is what the launchers launch: they run on tensors of the CPU, and each launch is recorded in place of
being made, then compiled to a cubin. ``tests/backends/triton_resources.txt`` is the reviewed result for every tile,
dtype, flag and architecture. The test compiles a part of it that has every kernel, dtype and architecture; all of it is
made by

    python tests/backends/test_triton_aot.py all > tests/backends/triton_resources.txt
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

SNAPSHOT = Path(__file__).parent / "triton_resources.txt"
ARCHS = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "sm_120": 120}
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376}  # bytes a block can have
TENSOR_CORE = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "sm_120": "mma.sync"}
KEPT = {("sm_90", "bf16"), ("sm_90", "fp16")}  # where linear_keep runs, and linear_skip
COLUMNS = ("arch", "kernel", "dtype", "tile", "flags", "registers", "stack", "local", "shared", "product")
OPTIONAL = {"bias", "offsets", "out_offsets", "order", "partials", "grad_entropy", "d_bias", "e", "column"}  # or None
EVERY_FLAG = ("bias", "softcap", "extra", "entropy")


class Case(NamedTuple):
    """A set of launches: what calls with these options make."""

    arch: str
    dtype: str
    tile: int  # which of launch.candidates
    flags: tuple[str, ...]  # of EVERY_FLAG, "odd" (H), "blocks" and "chunks" (more than one)


PART = (
    *(Case(arch, dtype, 0, ()) for arch in ARCHS for dtype in ("fp32", "bf16", "fp16", "fp64")),
    Case("sm_90", "bf16", 0, EVERY_FLAG),
)
# Flags change registers most when they come together, and rows that are not aligned cost most. A bias and sums over
# blocks and chunks are the flags that a plain call (`launch.is_plain`) can have.
ALL = tuple(
    Case(arch, dtype, tile, flags)
    for arch in ARCHS
    for dtype in ("fp32", "bf16", "fp16", "fp64")
    for tile, flags in (
        (0, ()), (0, ("bias", "blocks", "chunks")), (0, EVERY_FLAG), (0, (*EVERY_FLAG, "odd", "blocks", "chunks")),
        (1, (*EVERY_FLAG, "odd")),
    )
    if not (tile and dtype == "fp64") and not (flags == EVERY_FLAG and dtype != "bf16")
)  # fmt: skip


class Launch(NamedTuple):
    kernel: object
    signature: dict[str, str]
    constexprs: dict
    attrs: dict
    options: dict  # of the compiler
    flags: str
    tile: str = "-"


def _described(kernel, arguments: dict, options: dict) -> Launch:
    """A launch in the terms of the compiler: as the launcher of Triton itself specialises arguments."""
    import torch

    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64",
             torch.int64: "i64", torch.int32: "i32"}  # fmt: skip
    from dpofast.kernels.linear_keep import TensorDescriptor

    signature, constexprs, attrs, flags = {}, {}, {}, set()
    for i, param in enumerate(kernel.params):
        x = arguments[param.name]
        aligned = False
        if param.is_constexpr or x is None or (isinstance(x, int) and x == 1 and not param.do_not_specialize):
            signature[param.name] = "constexpr"
            constexprs[i,] = x
            flags |= {param.name} if x is True else set()
        elif isinstance(x, torch.Tensor):
            signature[param.name] = "*" + names[x.dtype]
            aligned = not param.do_not_specialize_on_alignment
            sums = "DOT" in arguments and param.name == "out" and x.dtype == torch.float32
            flags |= {"sums"} if sums else set()  # of chunks, in place of d weight
        elif isinstance(x, TensorDescriptor):
            signature[param.name] = f"tensordesc<{names[x.base.dtype]}{x.block_shape}>"
        elif isinstance(x, float):
            signature[param.name] = param.annotation_type or "fp32"
        else:
            signature[param.name] = "i32"
            aligned = x % 16 == 0 and not param.do_not_specialize
            flags |= set() if aligned or param.do_not_specialize else {"odd"}
        flags |= {param.name} if param.name in OPTIONAL and x is not None else set()
        if aligned:
            attrs[i,] = [["tt.divisibility", 16]]
    return Launch(kernel, signature, constexprs, attrs, options, "+".join(sorted(flags)) or "-")


def recorded(run) -> list[Launch]:
    """The launches of ``run()``, none of which is made."""
    from triton.runtime.jit import JITFunction

    launches = []

    def record(kernel, *args, grid, warmup, **kwargs):
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
        launches.append(_described(kernel, dict(zip(kernel.arg_names, args)) | kwargs, options))

    original, JITFunction.run = JITFunction.run, record
    try:
        run()
    finally:
        JITFunction.run = original
    return launches


@contextlib.contextmanager
def tiles_of(case: Case):
    """Launchers take the tile of the case in place of one for the device at hand; yields those taken, by kernel."""
    from dpofast.kernels import launch, linear_logprob_backward, linear_logprob_forward

    taken = {}

    def choose_tile(kernel, _device, dtype, plain, *_):
        taken[kernel] = launch.candidates(case.arch, kernel, dtype, plain)[case.tile]
        return taken[kernel]

    modules = linear_logprob_forward, linear_logprob_backward
    originals = [module.choose_tile for module in modules]
    for module in modules:
        module.choose_tile = choose_tile
    try:
        yield taken
    finally:
        for module, original in zip(modules, originals):
            module.choose_tile = original


def launches_of(case: Case) -> list[Launch]:
    import torch
    from dpofast.kernels import linear_keep, linear_skip
    from dpofast.kernels.linear_logprob_backward import linear_logprob_backward
    from dpofast.kernels.linear_logprob_forward import linear_logprob_forward

    from dpofast.backends.base import InputGrads, LogitsProblem, OutputGrads, Problem, Saved, Transform
    from dpofast.backends.tiled import Exps, Tile
    from dpofast.backends.triton import TritonPasses

    has = case.flags.__contains__
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}[case.dtype]
    wide = torch.float64 if case.dtype == "fp64" else torch.float32
    n, v, h = 64, 8192, 250 if has("odd") else 256  # so long that rows are split
    transform = Transform(0.7, 1.3, 30.0 if has("softcap") else 0.0)
    outputs = ("entropy",) if has("extra") or has("entropy") else ()
    labels, positions = torch.zeros(n, dtype=torch.int64), torch.arange(n)
    bias = torch.zeros(v, dtype=wide) if has("bias") else None
    one = torch.zeros(n, dtype=wide)
    saved = Saved(one, torch.zeros(n, 2, dtype=wide), one)
    incoming = OutputGrads(one, one if has("entropy") else None)
    passes = TritonPasses(thread_blocks=2 * n)
    stats = passes.new_stats(n, wide, labels.device)

    def passes_over_logits():
        x, g, logits = torch.empty(n, v, dtype=wide), torch.empty(n, v, dtype=dtype), torch.empty(n, v, dtype=dtype)
        tile, rows = Tile(x, bias, labels, 0, transform), LogitsProblem(logits, positions, labels, transform)
        passes.fold(tile, stats, outputs, Exps(g, torch.empty(1, n, dtype=wide), v))
        passes.fold(tile._replace(x=x[:, :1024]), stats, outputs, None)  # too short to be split
        passes.grad(tile, saved, incoming, g)
        passes.logits_forward(rows, outputs)
        passes.logits_backward(rows, saved, incoming, logits)

    def fused():
        hidden, weight = torch.empty(n, h, dtype=dtype), torch.empty(v, h, dtype=dtype)
        problem = Problem(hidden, weight, bias, positions, labels, transform)
        linear_logprob_forward(problem, stats, bool(outputs), 2)
        chunks = [slice(0, 32), slice(32, n)] if has("chunks") else [slice(0, n)]
        grads = InputGrads(torch.empty(n, h), torch.empty(v, h, dtype=dtype), torch.empty(v) if has("bias") else None)
        linear_logprob_backward(problem, chunks, v // 2 if has("blocks") else v, saved, incoming, grads)

    def exponentiating():
        packed, weight, z_label = torch.empty(n, h, dtype=dtype), torch.empty(v, h, dtype=dtype), one
        sums = torch.empty(linear_keep.tiles(v), n)
        partials = linear_keep.Partials(z_label, sums, sums)
        linear_keep.pack_tokens(packed, positions, weight, labels, 1.0, packed, z_label)
        for e in (torch.empty(n, v, dtype=torch.bfloat16), None):
            linear_keep.linear_keep(packed, weight, labels, 1.0, partials, e)
            factor = None if e is None else one
            linear_keep.seal(partials, e, labels, 1.0, one, torch.empty(n, 2), factor)

    def skipping():
        e, right = torch.empty(n, v, dtype=dtype), torch.empty(n, h, dtype=dtype)
        lists, row = torch.empty(1, 1 + v // linear_skip.WIDTH, dtype=torch.int32), torch.empty(h)
        linear_skip.d_hidden(e, torch.empty(v, h, dtype=dtype), lists, one, row, torch.empty(2, n, h))
        grad = torch.empty(v, h, dtype=dtype)
        linear_skip.d_weight(e, right, lists, row, torch.arange(v), grad)
        masses = torch.empty(linear_keep.tiles(v), n)
        linear_skip.mark(linear_keep.Partials(one, masses, masses), one, torch.ones(n, 2), labels, 1e-6)

    if case.dtype == "fp64":  # has products by torch.mm
        return recorded(passes_over_logits)
    with tiles_of(case) as taken:
        launches = recorded(passes_over_logits) + recorded(fused)
    if (case.arch, case.dtype) in KEPT and not (case.flags or case.tile):
        launches += recorded(exponentiating) + recorded(skipping)
        taken["keep"] = linear_keep.FORM
    return [each._replace(tile=_named(taken.get(_use(each)))) for each in launches]


def _use(launch: Launch) -> str | None:
    """The key of launch.TILES, or "keep"; None of a kernel without a tile."""
    name = launch.kernel.__name__.removesuffix("_kernel")
    if not name.startswith("linear"):
        return None
    return name.rpartition("_")[2] if name.endswith(("forward", "keep")) else "backward"


def _named(sizes) -> str:
    """The numbers of a tile or of a form, without what is 0 or a flag."""
    return "x".join(str(size) for size in sizes or () if not isinstance(size, bool) and size) or "-"


def compiled(case: Case) -> set[tuple]:
    """Rows of the table: what the compiler makes of every launch of the case."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    rows = set()
    for each in launches_of(case):
        source = ASTSource(fn=each.kernel, signature=each.signature, constexprs=each.constexprs, attrs=each.attrs)
        binary = triton.compile(source, target=GPUTarget("cuda", ARCHS[case.arch], 32), options=each.options)
        usage = _usage(binary.asm["cubin"])
        ptx = binary.asm["ptx"]
        product = next((name for name in ("wgmma", "tcgen05", "mma.sync") if name in ptx), "-")
        kernel = each.kernel.__name__.removesuffix("_kernel")
        numbers = (usage["REG"], usage["STACK"], usage["LOCAL"], binary.metadata.shared)
        rows.add((case.arch, kernel, case.dtype, each.tile, each.flags, *map(str, numbers), product))
    return rows


def _usage(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and bytes of stack and local memory, as cuobjdump reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def header() -> str:
    import triton

    return f"Triton {triton.__version__}"


def table(rows) -> str:
    """Aligned columns, sorted."""
    lines = [COLUMNS, *sorted(rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(line, widths)).rstrip() for line in lines)


def parsed(text: str) -> dict[tuple[str, ...], tuple[str, ...]]:
    """(registers .. product) of a table by (arch, kernel, dtype, tile, flags)."""
    lines = [tuple(line.split()) for line in text.splitlines()[2:]]
    return {line[:5]: line[5:] for line in lines}


def main() -> None:
    """Prints the table of ``sys.argv[1]``, "part" or "all"."""
    cases = {"part": PART, "all": ALL}[sys.argv[1]]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = set().union(*pool.map(compiled, cases))
    print(header(), table(rows), sep="\n")


# The tests. The compiler runs in a process of its own, since the interpreter's tests change Triton for theirs.


@pytest.fixture(scope="module")
def part(tmp_path_factory) -> str:
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, __file__, "part"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def _both(part: str) -> dict[str, dict]:
    return {"compiled now": parsed(part), "snapshot": parsed(SNAPSHOT.read_text())}


def test_every_kernel_is_compiled_for_every_dtype_and_architecture(part):
    for what, rows in _both(part).items():
        for arch, dtype in itertools.product(ARCHS, ("fp32", "bf16", "fp16", "fp64")):
            kernels = {kernel for a, kernel, d, *_ in rows if (a, d) == (arch, dtype)}
            passes = {"logprob_fold", "logprob_merge", "logprob_keep", "logprob_grad"}
            fused = {f"linear_logprob_{name}" for name in ("forward", "grad", "d_hidden", "d_weight")}
            kept = {"pack_tokens", "linear_keep", "seal", "threshold", "mark", "skip_product"}
            kept = kept if (arch, dtype) in KEPT else set()
            assert kernels == (passes if dtype == "fp64" else passes | fused | kept), (what, arch, dtype)


def test_nothing_spills_and_shared_memory_fits(part):
    for what, rows in _both(part).items():
        for key, (registers, stack, local, shared, _) in rows.items():
            # Spills show as stack. 8 bytes: one word, stored once before the loop and loaded once after it (nvdisasm).
            # linear_keep: four words, which its epilogue loads once for each tile; none with Triton 3.6.
            # A word of fp64 is twice as large.
            limit = 16 if key[1] == "linear_keep" or key[2] == "fp64" else 8
            small = int(stack) <= limit and local == "0"
            assert 0 < int(registers) <= 255 and small, (what, key, registers, stack, local)
            assert int(shared) <= SHARED_LIMIT[key[0]], (what, key, shared)


def test_products_of_16_bits_run_on_tensor_cores_and_those_of_fp32_do_not(part):
    for what, rows in _both(part).items():
        for (arch, kernel, dtype, *_), (*_, product) in rows.items():
            multiplies = kernel.startswith("linear") or kernel == "skip_product"
            expected = TENSOR_CORE[arch] if multiplies and dtype in ("bf16", "fp16") else "-"
            assert product == expected, (what, arch, kernel, dtype)


def test_what_is_compiled_is_in_the_snapshot(part):
    """Keys always; the numbers where the compiler is the snapshot's."""
    now, before = _both(part).values()
    missing = now.keys() - before.keys()
    assert not missing, f"not in {SNAPSHOT.name}, which this renews: {__doc__.splitlines()[-2].strip()}: {missing}"
    if SNAPSHOT.read_text().startswith(header() + "\n"):
        assert now == {key: before[key] for key in now}


if __name__ == "__main__":
    main()
