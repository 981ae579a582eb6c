"""A GEMM in Triton for Hopper whose epilogue exponentiates, timed against torch.mm: a prototype, alone in its file.

e[n, v] = exp2(scale2 * (h W^T)[n, v] - shift2[n])    bf16, the label's own entry 0
sums[tile, n] = sum of e over the column tile         fp32, without the label; it also tells rows that outgrow shift2
z_label[n] = (h W^T)[n, label]                        fp32

python gpu_exp_gemm.py --seconds 45 --out exp_gemm.json     on an H100: values, then times
python bench/gpu_exp_gemm.py --production --seconds 25      on an H100: the kernels of kernels/linear_keep.py
python gpu_exp_gemm.py --aot                                anywhere: registers, shared memory, instructions for sm_90
TRITON_INTERPRET=1 python gpu_exp_gemm.py --values          anywhere: values (fp16, fp32)
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOGITS, EXP, SCORE = 0, 1, 2  # what the epilogue does: logits in bf16; e and its sums; the sums alone
UNMASKED, SELECT, BRANCH = 0, 1, 2  # label and tail columns: ignored (wrong); by a select; only in tiles that have them
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def store(x, c, row0, col0, rows, N, V, ld, POINTER: tl.constexpr):
    if POINTER:
        cols = col0 + tl.arange(0, x.shape[1])
        at = c + (rows * ld)[:, None] + cols[None, :]  # 32 bits: enough for what is timed here
        tl.store(at, x.to(c.dtype.element_ty), mask=(rows < N)[:, None] & (cols < V)[None, :])
    else:
        c.store([row0, col0], x.to(c.dtype))


@triton.jit
def finish(
    acc, c, row0, col0, rows, label, shift, special, z_label, N, V, ld, scale2,
    EPILOGUE: tl.constexpr, MASK: tl.constexpr, POINTER: tl.constexpr,
):  # fmt: skip
    """Stores one piece of a tile; its row sums."""
    if EPILOGUE == 0:
        store(acc, c, row0, col0, rows, N, V, ld, POINTER)
        total = shift
    else:
        t = acc * scale2 - shift[:, None]
        if MASK == 1:
            cols = col0 + tl.arange(0, acc.shape[1])
            own = cols[None, :] == label[:, None]
            hit = (label >= col0) & (label < col0 + acc.shape[1])
            tl.store(z_label + rows, tl.sum(tl.where(own, acc, 0.0), 1), mask=hit & (rows < N))
            t = tl.where(own | (cols >= V)[None, :], float("-inf"), t)
        if MASK == 2:
            if special:
                cols = col0 + tl.arange(0, acc.shape[1])
                own = cols[None, :] == label[:, None]
                hit = (label >= col0) & (label < col0 + acc.shape[1])
                tl.store(z_label + rows, tl.sum(tl.where(own, acc, 0.0), 1), mask=hit & (rows < N))
                t = tl.where(own | (cols >= V)[None, :], float("-inf"), t)
        e = tl.exp2(t)
        total = tl.sum(e, 1)
        if EPILOGUE == 1:
            store(e, c, row0, col0, rows, N, V, ld, POINTER)
    return total


@triton.jit
def halves(x):
    """The left and the right half of the columns, in registers."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit(do_not_specialize=["N", "V", "H", "ld"])
def exp_gemm_kernel(
    h, w, out, labels, shift2, sums, z_label, N, V, H, ld, scale2,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SUB: tl.constexpr, GROUP: tl.constexpr,
    EPILOGUE: tl.constexpr, MASK: tl.constexpr, ON_DEVICE: tl.constexpr, EARLY: tl.constexpr, BY_ROWS: tl.constexpr,
    FLATTEN: tl.constexpr, WS: tl.constexpr, POINTER: tl.constexpr,
):  # fmt: skip
    """h [N, H], w [V, H]: tensors if ON_DEVICE, else descriptors; out too, of BN / SUB columns.

    Tiles go in groups of GROUP columns of tiles by all rows (BY_ROWS: GROUP rows by all columns), so that what runs at
    one time is about square.
    """
    if ON_DEVICE:
        a = tl.make_tensor_descriptor(h, shape=[N, H], strides=[H, 1], block_shape=[BM, BK])
        b = tl.make_tensor_descriptor(w, shape=[V, H], strides=[H, 1], block_shape=[BN, BK])
        if POINTER:
            c = out
        else:
            c = tl.make_tensor_descriptor(out, shape=[N, V], strides=[ld, 1], block_shape=[BM, BN // SUB])
    else:
        a, b = h, w
        c = out
    row_tiles = tl.cdiv(N, BM)
    col_tiles = tl.cdiv(V, BN)
    across = col_tiles if BY_ROWS else row_tiles
    along = row_tiles if BY_ROWS else col_tiles
    for t in tl.range(tl.program_id(0), row_tiles * col_tiles, tl.num_programs(0), flatten=FLATTEN, warp_specialize=WS):
        first = t // (GROUP * across) * GROUP
        size = tl.minimum(along - first, GROUP)
        i = first + (t % (GROUP * across)) % size
        j = (t % (GROUP * across)) // size
        row0 = (i if BY_ROWS else j) * BM
        col0 = (j if BY_ROWS else i) * BN
        if EARLY:
            rows = row0 + tl.arange(0, BM)
            shift = tl.load(shift2 + rows, mask=rows < N, other=0.0)
            label = tl.load(labels + rows, mask=rows < N, other=-1)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, H, BK):
            acc = tl.dot(a.load([row0, k]), b.load([col0, k]).T, acc, input_precision="ieee")
        if not EARLY:
            rows = row0 + tl.arange(0, BM)
            shift = tl.load(shift2 + rows, mask=rows < N, other=0.0)
            label = tl.load(labels + rows, mask=rows < N, other=-1)
        special = False
        if MASK == 2:
            special = (tl.max(((label >= col0) & (label < col0 + BN)).to(tl.int32), 0) > 0) | (col0 + BN > V)
        if SUB == 1:
            total = finish(
                acc, c, row0, col0, rows, label, shift, special, z_label, N, V, ld, scale2, EPILOGUE, MASK, POINTER
            )
        elif SUB == 2:
            left, right = halves(acc)
            total = finish(
                left, c, row0, col0, rows, label, shift, special, z_label, N, V, ld, scale2, EPILOGUE, MASK, POINTER
            )
            total += finish(
                right,
                c,
                row0,
                col0 + BN // 2,
                rows,
                label,
                shift,
                special,
                z_label,
                N,
                V,
                ld,
                scale2,
                EPILOGUE,
                MASK,
                POINTER,
            )
        else:
            left, right = halves(acc)
            a0, a1 = halves(left)
            a2, a3 = halves(right)
            Q: tl.constexpr = BN // 4
            total = finish(
                a0, c, row0, col0, rows, label, shift, special, z_label, N, V, ld, scale2, EPILOGUE, MASK, POINTER
            )
            total += finish(
                a1, c, row0, col0 + Q, rows, label, shift, special, z_label, N, V, ld, scale2, EPILOGUE, MASK, POINTER
            )
            total += finish(
                a2,
                c,
                row0,
                col0 + 2 * Q,
                rows,
                label,
                shift,
                special,
                z_label,
                N,
                V,
                ld,
                scale2,
                EPILOGUE,
                MASK,
                POINTER,
            )
            total += finish(
                a3,
                c,
                row0,
                col0 + 3 * Q,
                rows,
                label,
                shift,
                special,
                z_label,
                N,
                V,
                ld,
                scale2,
                EPILOGUE,
                MASK,
                POINTER,
            )
        if EPILOGUE != 0:
            tl.store(sums + (col0 // BN) * N + rows, total, mask=rows < N)


class Config(NamedTuple):
    bm: int = 128
    bn: int = 256
    bk: int = 64
    warps: int = 8
    stages: int = 3
    sub: int = 2
    group: int = 8
    epilogue: int = EXP
    mask: int = BRANCH
    flatten: bool = True
    ws: bool = False
    on_device: bool = False
    early: bool = False
    by_rows: bool = False
    per_sm: int = 1
    pointer: bool = False

    @property
    def name(self) -> str:
        words = [f"{self.bm}x{self.bn}x{self.bk} {self.warps}w {self.stages}s sub{self.sub} g{self.group}"]
        words += [("logits", "exp", "score")[self.epilogue], ("nomask", "select", "branch")[self.mask]]
        words += ["flat" if self.flatten else "nest"]
        words += [x for x in ("ws", "on_device", "early", "by_rows", "pointer") if getattr(self, x)]
        return " ".join(words) + (f" {self.per_sm}/SM" if self.per_sm > 1 else "")

    def constants(self) -> dict:
        return {
            "BM": self.bm, "BN": self.bn, "BK": self.bk, "SUB": self.sub, "GROUP": self.group,
            "EPILOGUE": self.epilogue, "MASK": self.mask, "ON_DEVICE": self.on_device, "EARLY": self.early,
            "BY_ROWS": self.by_rows, "FLATTEN": self.flatten, "WS": self.ws, "POINTER": self.pointer,
        }  # fmt: skip


BASE = Config()
R = BASE._replace
CONFIGS = [  # the most promising first
    BASE,
    R(stages=4),
    R(sub=1, mask=SELECT),  # the sketch
    R(epilogue=LOGITS, mask=UNMASKED),
    R(epilogue=SCORE),
    R(stages=4, flatten=False),
    R(flatten=False),
    R(group=16),
    R(bn=128, warps=4, stages=3, per_sm=2),
    R(stages=4, sub=4),
    R(mask=UNMASKED),
    R(mask=SELECT),
    R(stages=4, epilogue=LOGITS, mask=UNMASKED),
    R(stages=4, epilogue=SCORE),
    R(group=4),
    R(group=16, by_rows=True),
    R(group=8, by_rows=True),
    R(bm=256, bn=128),
    R(bm=64, warps=4, stages=4),
    R(bn=128, bk=128),
    R(bn=128, warps=4, stages=4),
    R(bm=64, warps=4, stages=2, per_sm=2),
    R(on_device=True),
    R(early=True),
    R(bk=32, stages=6),
    R(group=32),
    R(epilogue=LOGITS, mask=UNMASKED, flatten=False),
]
# Warp specialisation: a producer and two consumers of 64 rows each. The pass halves the tile, which a store by
# descriptor and a branch do not survive (3.6.0). Timed last, since a hang would end everything.
WS = Config(warps=4, sub=1, ws=True, flatten=False, pointer=True, mask=SELECT)
CONFIGS += [
    WS,
    WS._replace(epilogue=LOGITS, mask=UNMASKED),
    WS._replace(epilogue=SCORE),
    WS._replace(stages=4),
    WS._replace(epilogue=LOGITS, mask=UNMASKED, stages=4),
]
SHAPES = [(8192, 4096, 151936), (2900, 1152, 262144), (1638, 1024, 151936), (8192, 4096, 38000)]  # N, H, V


class Problem:
    """Operands on a device, and space for the results of any configuration."""

    def __init__(self, n: int, hidden: int, v: int, dtype: torch.dtype, device: str, out_dtype=torch.bfloat16):
        self.n, self.hidden, self.v = n, hidden, v
        make = torch.Generator(device).manual_seed(n + v)
        self.h = torch.randn(n, hidden, device=device, dtype=dtype, generator=make)
        self.w = torch.randn(v, hidden, device=device, dtype=dtype, generator=make).mul_(hidden**-0.5)
        self.labels = torch.randint(0, v, (n,), device=device, generator=make, dtype=torch.int32)
        self.labels[0], self.labels[-1] = v - 1, 0
        self.scale2 = math.log2(math.e) * 0.9
        self.shift2 = torch.randn(n, device=device, generator=make) + 4
        self.ld = -(-v // 8) * 8 + 8  # a store of the TMA ends at a multiple of 16 bytes
        self.out = torch.empty(n * self.ld, device=device, dtype=out_dtype).as_strided((n, v), (self.ld, 1))
        self.sums = torch.empty(-(-v // 32) * n, device=device)  # for tiles of 32 columns or wider
        self.z_label = torch.empty(n, device=device)
        self.sms = torch.cuda.get_device_properties(0).multi_processor_count if device == "cuda" else 3

    def arguments(self, x: Config) -> tuple:
        from triton.tools.tensor_descriptor import TensorDescriptor

        operands = self.h, self.w, self.out
        if not x.on_device:
            blocks = [x.bm, x.bk], [x.bn, x.bk], [x.bm, x.bn // x.sub]
            operands = tuple(map(TensorDescriptor.from_tensor, operands, blocks))
        if x.pointer:
            operands = *operands[:2], self.out
        return (
            *operands, self.labels, self.shift2, self.sums, self.z_label, self.n, self.v, self.hidden, self.ld,
            self.scale2,
        )  # fmt: skip

    def options(self, x: Config) -> dict:
        return x.constants() | {"num_warps": x.warps, "num_stages": x.stages}

    def tiles(self, x: Config) -> int:
        return triton.cdiv(self.n, x.bm) * triton.cdiv(self.v, x.bn)

    def launcher(self, x: Config):
        arguments, options = self.arguments(x), self.options(x)
        grid = (min(self.sms * x.per_sm, self.tiles(x)),)
        return lambda: exp_gemm_kernel[grid](*arguments, **options)


def values(p: Problem, x: Config) -> dict[str, float]:
    """Errors of one configuration: e in parts of itself, the sums and z of the label likewise."""
    p.out.fill_(float("nan"))
    p.z_label.fill_(float("nan"))
    p.sums.fill_(float("nan"))
    guard = torch.as_strided(p.out, (p.n, p.ld), (p.ld, 1))
    guard[:, p.v :] = 7.0
    p.launcher(x)()
    z = p.h.double() @ p.w.double().T
    if x.epilogue == LOGITS:
        return {"logits": float((p.out.double() - z).abs().max() / z.abs().max())}
    rows = torch.arange(p.n, device=z.device)
    label = p.labels.long()
    e = torch.exp2(z * p.scale2 - p.shift2.double()[:, None])
    e[rows, label] = 0
    tiles = -(-p.v // x.bn)
    sums = p.sums[: tiles * p.n].view(tiles, p.n).double()
    true = torch.stack([piece.sum(1) for piece in e.split(x.bn, 1)])
    found = {"sums": float(((sums - true) / true.clamp_min(1e-300)).abs().nan_to_num(nan=9.0).max())}
    found["z_label"] = float((p.z_label.double() - z[rows, label]).abs().nan_to_num(nan=9.0).max())
    if x.epilogue == EXP:
        wrong = (p.out.double() - e).abs() / e.clamp_min(1e-30)
        found["e"] = float(wrong.nan_to_num(nan=9.0).max())
        found["padding"] = float((guard[:, -8:] - 7).abs().max())
        found["touched"] = float((guard[:, p.v :] != 7).any(0).sum())  # columns beyond V
    return found


LIMITS = {"logits": 1e-2, "sums": 2e-3, "z_label": 2e-4, "e": 6e-3, "padding": 0.0, "touched": 7.0}


def usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def facts(compiled) -> dict:
    ptx = compiled.asm["ptx"]
    found = {"registers": 0, "stack": 0} | {
        {"REG": "registers", "STACK": "stack"}.get(k, k): v for k, v in usage(compiled.asm["cubin"]).items()
    }
    shapes = sorted(set(re.findall(r"wgmma\.mma_async\S*?(m64n\d+)k16", ptx)))
    return found | {
        "shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps,
        "wgmma": ptx.count("wgmma.mma_async"), "n": " ".join(shapes),
        "tma": len(re.findall(r"cp\.async\.bulk\.tensor\.2d\.shared", ptx)),
        "tma_store": len(re.findall(r"cp\.async\.bulk\.tensor\.2d\.global", ptx)),
        "ex2": ptx.count("ex2.approx"), "setmaxnreg": ptx.count("setmaxnreg"),
    }  # fmt: skip


def ahead(x: Config) -> dict:
    """What the compiler makes of a configuration for sm_90, without a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if x.on_device:
        operands = {"h": "*bf16", "w": "*bf16", "out": "*bf16"}
    else:
        blocks = {"h": (x.bm, x.bk), "w": (x.bn, x.bk), "out": (x.bm, x.bn // x.sub)}
        operands = {name: f"tensordesc<bf16[{r}, {c}]>" for name, (r, c) in blocks.items()}
    if x.pointer:
        operands["out"] = "*bf16"
    signature = operands | {
        "labels": "*i32", "shift2": "*fp32", "sums": "*fp32", "z_label": "*fp32", "N": "i32", "V": "i32", "H": "i32",
        "ld": "i32", "scale2": "fp32",
    }  # fmt: skip
    names = exp_gemm_kernel.arg_names
    pointers = [name for name, kind in signature.items() if kind.startswith("*")]
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    constants = x.constants()
    source = ASTSource(
        fn=exp_gemm_kernel,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs=attrs,
    )
    start = time.time()
    try:
        options = {"num_warps": x.warps, "num_stages": x.stages}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        return {"name": x.name} | facts(compiled) | {"seconds": round(time.time() - start, 1)}
    except Exception as error:
        return {"name": x.name, "failed": f"{type(error).__name__}: {str(error)[-300:]}"}


def medians(functions: list, rounds: int, warm: int = 2) -> list[float]:
    """Milliseconds of each, called by turns."""
    for _ in range(warm):
        for f in functions:
            f()
    marks = []
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000)  # about a millisecond, so that launches are ahead of the device
    for _ in range(rounds):
        row = [torch.cuda.Event(enable_timing=True) for _ in range(len(functions) + 1)]
        row[0].record()
        for f, mark in zip(functions, row[1:]):
            f()
            mark.record()
        marks.append(row)
    torch.cuda.synchronize()
    return [statistics.median(row[i].elapsed_time(row[i + 1]) for row in marks) for i in range(len(functions))]


def compile_all(p: Problem, configs: list[Config], threads: int) -> None:
    """Into Triton's cache, in threads."""
    calls = {x.name: lambda x=x: exp_gemm_kernel.warmup(*p.arguments(x), grid=(1,), **p.options(x)) for x in configs}
    compile_calls(calls, threads)


def compile_launches(run, threads: int) -> None:
    """What ``run()`` would launch, none of which is launched."""
    from triton.runtime.jit import JITFunction

    calls = {}

    def record(kernel, *arguments, grid, warmup, **options):
        calls[f"{kernel.__name__} {len(calls)}"] = lambda: kernel.warmup(*arguments, grid=grid, **options)

    original, JITFunction.run = JITFunction.run, record
    try:
        run()
    finally:
        JITFunction.run = original
    compile_calls(calls, threads)


def compile_calls(calls: dict, threads: int) -> None:
    from triton.runtime._async_compile import AsyncCompileMode

    futures = {}
    with ThreadPoolExecutor(threads) as pool, AsyncCompileMode(pool, ignore_errors=True):
        for name, warmup in calls.items():
            try:
                futures[name] = warmup()
            except Exception as error:
                print(f"warmup {name}: {type(error).__name__}: {str(error)[-200:]}", flush=True)

    def make_launcher(future) -> str:  # C, by the host's compiler; found in the cache when the kernel is launched
        try:
            kernel = future.result()
            triton.runtime.driver.active.launcher_cls(kernel.src, kernel.metadata)
            return ""
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[-200:]}"

    with ThreadPoolExecutor(threads) as pool:
        for x, error in zip(futures, pool.map(make_launcher, futures.values())):
            if error:
                print(f"launcher: {x}: {error}", flush=True)


def checked(small: Problem, configs: list[Config], report: dict, left) -> list[Config]:
    """Those that run and are right."""
    good = []
    for x in configs:
        if left() < 4:
            break
        try:
            errors = values(small, x)
            right = (x.mask, x.epilogue) == (UNMASKED, EXP) or all(errors[k] <= LIMITS[k] for k in errors)
            report["values"][x.name] = errors
            print("ok   " if right else "WRONG", x.name, {k: f"{e:.1e}" for k, e in errors.items()}, flush=True)
            if right:
                good.append(x)
        except Exception as error:
            report["values"][x.name] = f"{type(error).__name__}: {str(error)[-500:]}"
            print("FAILS", x.name, type(error).__name__, str(error)[-200:].replace("\n", " "), flush=True)
            torch.cuda.synchronize()  # raises if the device is lost to this process
    return good


def timed(good: list[Config], report: dict, left, rounds: int, save) -> None:
    """Each of ``good`` by turns with torch.mm, shape by shape."""
    dead: set[Config] = set()
    share = dict(zip(SHAPES, (0.5, 0.6, 0.6, 1.0)))  # of the time that is left
    for shape in SHAPES:
        n, hidden, v = shape
        until = time.time() + max(left() - 1, 0) * share[shape]
        if left() < 2 or not good:
            break
        p = Problem(n, hidden, v, torch.bfloat16, "cuda")
        flop = 2 * n * hidden * v
        key = f"{n}x{hidden}x{v}"
        rows = report["times"].setdefault(key, {})
        wt = p.w.T
        full = torch.empty(n, v, device="cuda", dtype=torch.float32)
        bf16 = lambda p=p, wt=wt: torch.mm(p.h, wt, out=p.out)  # noqa: E731
        base, fp32 = medians(
            [bf16, lambda p=p, wt=wt, full=full: torch.mm(p.h, wt, out_dtype=torch.float32, out=full)], rounds
        )
        full = None
        print(f"\n{key}: mm bf16 {base:.3f} ms {flop / base / 1e9:.0f} TF/s, mm fp32 out {fp32:.3f} ms", end=" ")
        print(f"{flop / fp32 / 1e9:.0f} TF/s", flush=True)
        rows["mm bf16"], rows["mm fp32"] = {"ms": base}, {"ms": fp32}
        for x in good:
            if time.time() > until:
                print("  time is up for this shape", flush=True)
                break
            if x in dead:
                continue
            try:
                beside, ms = medians([bf16, p.launcher(x)], rounds)
                rows[x.name] = {"ms": ms, "mm": beside, "tflops": flop / ms / 1e9, "of_mm": beside / ms}
                print(f"  {beside / ms:.3f} of mm  {ms:7.3f} ms {flop / ms / 1e9:4.0f} TF/s  {x.name}", flush=True)
                if beside / ms < 0.4:
                    dead.add(x)
            except Exception as error:
                dead.add(x)
                print("  FAILS", x.name, type(error).__name__, str(error)[-200:].replace("\n", " "), flush=True)
        save()
        p = wt = None
        torch.cuda.empty_cache()


def on_gpu(args, report: dict) -> None:
    start = time.time()
    left = lambda: args.seconds - (time.time() - start)  # noqa: E731
    watch = threading.Timer(args.seconds + 10, lambda: os._exit(3))  # a kernel that hangs
    watch.daemon = True
    watch.start()
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__, flush=True)
    report["device"] = torch.cuda.get_device_name()

    def save():
        Path(args.out).write_text(json.dumps(report, indent=1))

    configs = CONFIGS[: args.configs]
    small = Problem(300, 1000, 1035, torch.bfloat16, "cuda")
    try:
        compile_all(small, configs, args.threads)
    except Exception as error:
        print("compiling in threads failed, goes on one by one:", type(error).__name__, str(error)[-300:], flush=True)
    print(f"compiled in {time.time() - start:.1f} s", flush=True)
    plain = [x for x in configs if not x.ws]
    for part in (plain, [x for x in configs if x.ws]):
        good = checked(small, part, report, left)
        save()
        timed(good, report, left if part is not plain else lambda: left() - 5, args.rounds, save)
    print(f"timed by {time.time() - start:.1f} s", flush=True)
    print("\nbest, as a part of the speed of mm bf16")
    for key, rows in report["times"].items():
        for kind in (" exp branch", " exp select", " score ", " logits "):
            found = [(row["of_mm"], name) for name, row in rows.items() if "of_mm" in row and kind in name]
            if found:
                print(f"  {key:>18} {kind.strip():12} {max(found)[0]:.3f} {max(found)[1]}")
    print(f"done in {time.time() - start:.1f} s", flush=True)
    save()


# ---- The kernels of kernels/linear_keep.py -------------------------------------------------------------------------


def production_module():
    """dpofast.kernels.linear_keep, of an installed dpofast or of the checkout that this file is in."""
    try:
        from dpofast.kernels import linear_keep
    except ModuleNotFoundError:
        root = Path(__file__).resolve().parents[1]
        sys.path.insert(0, str(root))
        package = types.ModuleType("dpofast.kernels")
        package.__path__ = [str(root / "kernels")]
        sys.modules["dpofast.kernels"] = package
        from dpofast.kernels import linear_keep
    return linear_keep


class Production:
    """Operands and results of the three kernels at one shape."""

    def __init__(self, keep, shape: tuple[int, int, int], device: str = "cuda"):
        self.keep, (n, hidden, v) = keep, shape
        make = torch.Generator(device).manual_seed(n + v)
        dtype = torch.bfloat16 if device == "cuda" else torch.float16
        self.hidden = torch.randn(n, hidden, device=device, dtype=dtype, generator=make)
        self.weight = torch.randn(v, hidden, device=device, dtype=dtype, generator=make).mul_(hidden**-0.5)
        self.labels = torch.randint(0, v, (n,), device=device, generator=make)
        self.offsets = torch.arange(n, device=device) * hidden
        self.packed = torch.empty_like(self.hidden)
        ld = -(-v // 8) * 8
        self.storage = torch.empty(n, ld, device=device, dtype=torch.bfloat16)
        self.e = self.storage[:, :v]
        most = -(-v // 128)
        self.sums, self.shifts = torch.empty(2, most, n, device=device).unbind(0)
        self.z_label, self.logps, self.factor = torch.empty(3, n, device=device).unbind(0)
        self.lse = torch.empty(n, 2, device=device)
        self.scale = 0.9

    def pack(self) -> None:
        self.keep.pack_tokens(
            self.hidden, self.offsets, self.weight, self.labels, self.scale, self.packed, self.z_label
        )

    def product(self, e, form) -> None:
        tiles = self.keep.tiles(len(self.weight), form)
        self.keep.linear_keep(
            self.packed, self.weight, self.labels, self.scale, self.z_label, e, self.sums[:tiles], self.shifts[:tiles],
            form,
        )  # fmt: skip

    def seal(self, e, form) -> None:
        tiles, factor = self.keep.tiles(len(self.weight), form), None if e is None else self.factor
        self.keep.seal(
            self.z_label, self.sums[:tiles], self.shifts[:tiles], e, self.labels, self.scale, self.logps, self.lse,
            factor, form,
        )  # fmt: skip

    def error(self, e, form) -> float:
        """Of the log-probs, and of the gradient in parts of its largest entry."""
        self.pack(), self.product(e, form), self.seal(e, form)
        z = self.scale * (self.hidden.double() @ self.weight.double().T)
        true = z.log_softmax(1)
        rows = torch.arange(len(z), device=z.device)
        found = float((self.logps.double() - true[rows, self.labels]).abs().max())
        if e is not None:
            grad = -self.scale * true.exp()
            grad[rows, self.labels] += self.scale
            kept = self.factor.double()[:, None] * e.double()
            found = max(found, float(((kept - grad).abs() / grad.abs().amax(1, keepdim=True)).max()) / 100)
        return found if math.isfinite(found) else 9.0


def existing_keep(p: Production, x):
    """The pass of backend "cuda" over fp32 logits ``x`` that folds them and stores e; None where it is not there."""
    try:
        from dpofast import _C
        from dpofast.backends.base import Transform
        from dpofast.backends.cuda import CudaPasses
        from dpofast.backends.tiled import Exps, Tile

        passes = CudaPasses(_C)
        stats = passes.new_stats(len(x), torch.float32, x.device)
        tile = Tile(x, None, p.labels, 0, Transform(1.0, p.scale, 0.0))
        shifts = torch.zeros(1, len(x), device=x.device)
        run = lambda: passes.fold(tile, stats, (), Exps(p.e, shifts, x.shape[1]))  # noqa: E731
        run()
        torch.cuda.synchronize()
        return run
    except Exception as error:
        print(f"  no existing keep pass: {type(error).__name__}: {str(error)[-150:]}", flush=True)
        return None


def production(args, report: dict) -> None:
    start = time.time()
    left = lambda: args.seconds - (time.time() - start)  # noqa: E731
    watch = threading.Timer(args.seconds + 10, lambda: os._exit(3))  # a kernel that hangs
    watch.daemon = True
    watch.start()
    keep = production_module()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__, flush=True)
    base = keep.FORM
    forms = [base, base._replace(group=16), base._replace(early=True), base._replace(pieces=1)]
    small = Production(keep, (300, 1000, 1035))
    good = []

    def everything():
        small.pack()
        for form, e in itertools.product(forms, (small.e, None)):
            small.product(e, form), small.seal(e, form)

    try:
        compile_launches(everything, args.threads)
    except Exception as error:
        print("compiling in threads failed, goes on one by one:", type(error).__name__, str(error)[-300:], flush=True)
    print(f"compiled in {time.time() - start:.1f} s", flush=True)
    for form in forms:
        for kept in (True, False):
            began = time.time()
            name = f"{'keep ' if kept else 'score'} group {form.group} pieces {form.pieces}" + " early" * form.early
            try:
                error = small.error(small.e if kept else None, form)
                print(
                    "ok   " if error < 1e-4 else "WRONG", name, f"{error:.1e}, {time.time() - began:.1f} s", flush=True
                )
                if error < 1e-4:
                    good.append((name, kept, form))
            except Exception as error:
                print("FAILS", name, type(error).__name__, str(error)[-300:], flush=True)
    tiny = Production(keep, (64, 1024, 32000))
    for name, call in (
        ("pack", tiny.pack), ("product", lambda: tiny.product(tiny.e, base)), ("seal", lambda: tiny.seal(tiny.e, base)),
    ):  # fmt: skip
        call()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(50):
            call()
        host = (time.perf_counter() - began) / 50 * 1e6
        torch.cuda.synchronize()
        print(f"host time of {name}: {host:.0f} us a call; no more than the device's where that is slower", flush=True)
        report["values"][f"host us {name}"] = host
    share = dict(zip(SHAPES, (0.35, 0.4, 0.5, 1.0)))  # of the time that is left
    for shape in SHAPES:
        n, hidden, v = shape
        until = time.time() + max(left() - 2, 0) * share[shape]
        p = Production(keep, shape)
        p.pack()
        flop, key = 2 * n * hidden * v, f"{n}x{hidden}x{v}"
        rows = report["times"].setdefault(key, {})
        bf16 = lambda p=p: torch.mm(p.packed, p.weight.T, out=p.storage[:, : p.weight.shape[0]])  # noqa: E731
        full = torch.empty(n, v, device="cuda")
        fp32 = lambda p=p, full=full: torch.mm(p.packed, p.weight.T, out_dtype=torch.float32, out=full)  # noqa: E731
        old = existing_keep(p, full)
        times = medians([bf16, fp32, p.pack, *([old] if old else [])], args.rounds)
        names = "mm bf16", "mm fp32", "pack", "existing keep pass"
        rows.update({name: {"ms": ms} for name, ms in zip(names, times)})
        print(f"\n{key}:", ", ".join(f"{name} {ms:.3f} ms" for name, ms in zip(names, times)), flush=True)
        full = fp32 = old = None
        torch.cuda.empty_cache()
        for name, kept, form in good:
            if time.time() > until:
                print("  time is up for this shape", flush=True)
                break
            e = p.e if kept else None
            try:
                beside, ms, seal = medians(
                    [bf16, lambda e=e, f=form, p=p: p.product(e, f), lambda e=e, f=form, p=p: p.seal(e, f)], args.rounds
                )
                rows[name] = {"ms": ms, "mm": beside, "of_mm": beside / ms, "seal": seal}
                print(f"  {beside / ms:.3f} of mm {ms:7.3f} ms {flop / ms / 1e9:4.0f} TF/s, seal {seal:.3f} ms  {name}")
            except Exception as error:
                print("  FAILS", name, type(error).__name__, str(error)[-200:], flush=True)
        p = bf16 = None
        torch.cuda.empty_cache()
        Path(args.out).write_text(json.dumps(report, indent=1))
    print(f"done by {time.time() - start:.1f} s", flush=True)
    if left() < 5:
        return
    # The last, since it may hang: the prototype whose warps are specialised.
    chosen = [WS, WS._replace(epilogue=SCORE)]
    timed(checked(Problem(300, 1000, 1035, torch.bfloat16, "cuda"), chosen, report, left), report, left, args.rounds,
          lambda: Path(args.out).write_text(json.dumps(report, indent=1)))  # fmt: skip


def interpreted() -> bool:
    right = True
    for dtype in (torch.float32, torch.float16):
        p = Problem(37, 40, 93, dtype, "cpu", out_dtype=torch.float32)
        tile = R(bm=16, bn=32, bk=16, group=2, warps=1)
        for x in (
            tile, tile._replace(sub=1), tile._replace(sub=4), tile._replace(mask=SELECT), tile._replace(group=3),
            tile._replace(epilogue=SCORE), tile._replace(epilogue=LOGITS), tile._replace(on_device=True),
            tile._replace(early=True), tile._replace(by_rows=True),
        ):  # fmt: skip
            errors = values(p, x)
            ok = all(errors[k] <= LIMITS[k] for k in errors)
            right &= ok
            print("ok   " if ok else "WRONG", dtype, x.name, {k: f"{e:.1e}" for k, e in errors.items()})
    return right


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=45)
    parser.add_argument("--out", default="exp_gemm.json")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--configs", type=int, default=len(CONFIGS), help="only the first so many")
    parser.add_argument("--skip", type=int, nargs="*", default=[], help="places in CONFIGS to leave out")
    parser.add_argument("--aot", action="store_true")
    parser.add_argument("--production", action="store_true")
    parser.add_argument("--values", action="store_true")
    args = parser.parse_args()
    CONFIGS[:] = [x for i, x in enumerate(CONFIGS) if i not in args.skip]
    if args.aot:
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            for i, row in enumerate(pool.map(ahead, CONFIGS[: args.configs])):
                print(i, row.pop("name"), "|", *(f"{k} {v}" for k, v in row.items()), flush=True)
        return
    if args.values:
        sys.exit(not interpreted())
    report: dict = {"values": {}, "times": {}}
    if args.production:
        production(args, report)
        return
    on_gpu(args, report)


if __name__ == "__main__":
    main()
