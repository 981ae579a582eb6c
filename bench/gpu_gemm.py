"""The products and passes that the head is made of, each alone: what dpofast/plan/cost.py ought to know of a GPU.

    dpofast bench gpu_gemm --out gemm.json
    dpofast bench gpu_gemm --rehearse --out gemm.json      on the CPU, the passes emulated, tiny

Medians by CUDA events after a warm-up. Products walk through the rows of one large weight as the head does, so that
their operands come from memory and not from a cache. Cases run from the most to the least telling; those left after
--seconds are not run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import dpofast
from dpofast.backends.base import LogitsProblem, OutputGrads, Saved, Transform
from dpofast.backends.cuda import CudaPasses
from dpofast.backends.tiled import Exps, Tile
from dpofast.bench import record
from dpofast.bench.measure import Timer, cuda_library, device_for, error, first_line, machine
from dpofast.bench.record import Record

BF16, FP32 = torch.bfloat16, torch.float32


class Sweep:
    """The measurements so far, written to a file after every group."""

    def __init__(self, device: torch.device, rehearse: bool, seconds: float, out: Path | None):
        self.device, self.rehearse, self.timer = device, rehearse, Timer(device)
        self.results, self.out = record.begin(out, "gemm", machine(device))
        self.end = time.monotonic() + seconds
        self.rounds = 1 if rehearse else 5

    def late(self) -> bool:
        return time.monotonic() > self.end

    def add(self, name: str, shape: list[int], work: Callable[[], object], calls: int = 1, flops=0.0, n_bytes=0.0):
        """``work`` is ``calls`` calls; flops and bytes are of one."""
        facts = Record("gemm", "time", shape=tuple(shape), case=name)
        if self.late():
            return
        try:
            seconds = self.timer.median(work, self.rounds, 1 if self.rehearse else 2) / calls
        except Exception as failure:
            self.results.add([[facts._replace(failed=first_line(failure))]])
            return
        row = [facts.of("time", seconds, "s")]
        if flops:
            row.append(facts.of("speed", flops / seconds / 1e12, "TFLOP/s"))
        if n_bytes:
            row.append(facts.of("speed", n_bytes / seconds / 1e9, "GB/s"))
        self.results.add([row])

    def write(self) -> None:
        self.results.save(self.out)

    def rand(self, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype)

    def empty(self, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.empty(shape, device=self.device, dtype=dtype)


def mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """A product in out's dtype, accumulated in fp32."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_mm(sums: Tensor, a: Tensor, b: Tensor) -> None:
    if a.is_cuda:
        torch.addmm(sums, a, b, out_dtype=sums.dtype, out=sums)
    else:
        sums.addmm_(a.to(sums.dtype), b.to(sums.dtype))


def blocks_of(weight: Tensor, block: int, flops: float) -> list[Tensor]:
    """Consecutive blocks of the weight's rows, enough for a few milliseconds."""
    count = max(1, min(len(weight) // block, int(2.5e12 / flops)))
    return [weight[i * block : (i + 1) * block] for i in range(count)]


def products(sweep: Sweep, h: int, chunks: tuple[int, ...], blocks: tuple[int, ...], v: int) -> None:
    """Tiles of logits, in fp32 and bf16, and sums that are added to: chunk x block."""
    weight, hidden = sweep.rand(v, h), sweep.rand(max(chunks), h)
    room = sweep.empty(max(chunks) * max(blocks), dtype=FP32)
    for name, dtype in (("logits, fp32 out", FP32), ("logits, bf16 out", BF16)):
        for chunk in chunks:
            for block in blocks:
                flops = 2.0 * chunk * block * h
                slices, out = blocks_of(weight, block, flops), room.view(dtype)[: chunk * block].view(chunk, block)

                def run(slices=slices, out=out, tokens=hidden[:chunk]) -> None:
                    for w in slices:
                        mm(tokens, w.T, out)

                sweep.add(name, [chunk, block, h], run, len(slices), flops)
    del room
    name = "sums += g W, fp32"
    g = sweep.rand(max(chunks), max(blocks))
    for chunk in chunks:
        for block in blocks:
            flops = 2.0 * chunk * block * h
            slices, sums = blocks_of(weight, block, flops), sweep.empty(chunk, h, dtype=FP32).zero_()
            part = g[:chunk, :block].contiguous()

            def run(slices=slices, sums=sums, part=part) -> None:
                for w in slices:
                    add_mm(sums, part, w)

            sweep.add(name, [chunk, block, h], run, len(slices), flops)
    sweep.write()


def large_products(sweep: Sweep, n: int, h: int, v: int, slices: tuple[int, ...]) -> None:
    """The three products of a whole step, d weight in one product and in slices, and d hidden."""
    hidden, weight, g = sweep.rand(n, h), sweep.rand(v, h), sweep.rand(n, v)
    flops = 2.0 * n * h * v
    sweep.add("logits, whole, bf16", [n, h, v], lambda: mm(hidden, weight.T, g), 1, flops)
    for dtype, of in ((BF16, "bf16"), (FP32, "fp32")):
        out = sweep.empty(n, h, dtype=dtype)
        sweep.add(f"d hidden, whole, {of}", [n, v, h], lambda out=out: mm(g, weight, out), 1, flops)
        out = sweep.empty(v, h, dtype=dtype)
        sweep.add(f"d weight, whole, {of}", [v, n, h], lambda out=out: mm(g.T, hidden, out), 1, flops)
        if dtype == BF16:
            for width in slices:

                def run(width=width, out=out) -> None:
                    for v0 in range(0, v, width):
                        mm(g[:, v0 : v0 + width].T, hidden, out[v0 : v0 + width])

                sweep.add(f"d weight, slices of {width}, bf16", [v, n, h], run, 1, flops)
    sweep.write()


def passes(sweep: Sweep, chunk: int, megabytes: tuple[float, ...]) -> None:
    """What happens to a tile, by its size in fp32; bytes are those that a pass reads and writes at least."""
    kernels = CudaPasses(cuda_library(sweep.rehearse), 8 if sweep.rehearse else None)
    for size in megabytes:
        passes_of(sweep, kernels, chunk, max(64, int(size * 1e6) // (4 * chunk) // 64 * 64), f"{size:g} MB")
    sweep.write()


def passes_of(sweep: Sweep, kernels: CudaPasses, chunk: int, width: int, size: str) -> None:
    x, e = sweep.rand(chunk, width, dtype=FP32), sweep.empty(chunk, 2 * width)
    labels = torch.randint(width, (chunk,), device=sweep.device)
    stats = kernels.new_stats(chunk, FP32, sweep.device)
    exps = Exps(e, sweep.empty(2, chunk, dtype=FP32), width)
    first, later = (Tile(x, None, labels, v0, Transform()) for v0 in (0, width))
    outputs = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    n, shape = chunk * width, [chunk, width]

    def add(name: str, bytes_each: int, work: Callable[[], object]) -> None:
        sweep.add(f"{name} {size}", shape, work, n_bytes=bytes_each * n)

    add("fold", 4, lambda: kernels.fold(first, stats, (), None))
    add("fold, all outputs", 4, lambda: kernels.fold(first, stats, outputs, None))
    # For its shift a row's first tile is read twice.
    add("fold + keep, first", 10, lambda: kernels.fold(first, stats, (), exps))
    add("fold + keep, later", 6, lambda: kernels.fold(later, stats, (), exps))
    fresh = kernels.new_stats(chunk, FP32, sweep.device)
    for tile in (first, later):
        kernels.fold(tile, fresh, (), exps)
    results = kernels.finish(fresh, labels, 2 * width, ())
    saved, c = Saved(results["logps"], results["lse"]), OutputGrads(torch.ones_like(results["logps"]))
    add("grad", 6, lambda: kernels.grad(first, saved, c, e[:, :width]))
    factor = sweep.empty(chunk, dtype=FP32)
    sweep.add(f"seal {size}", shape, lambda: kernels.seal(exps, labels, Transform(), fresh, results, factor))


def from_logits(sweep: Sweep, n: int, v: int) -> None:
    """`logprob` of logits that exist, in bf16, and the copy that bounds it."""
    logits, other = sweep.rand(n, v), sweep.empty(n, v)
    kernels = CudaPasses(cuda_library(sweep.rehearse), 8 if sweep.rehearse else None)
    labels, positions = torch.randint(v, (n,), device=sweep.device), torch.arange(n, device=sweep.device)
    problem = LogitsProblem(logits, positions, labels)
    sweep.add("copy, bf16", [n, v], lambda: other.copy_(logits), 1, 0, 4 * n * v)
    sweep.add("logprob forward, bf16", [n, v], lambda: kernels.logits_forward(problem, ()), 1, 0, 2 * n * v)
    results = kernels.logits_forward(problem, ())
    saved, c = Saved(results["logps"], results["lse"]), OutputGrads(torch.ones_like(results["logps"]))
    backward = lambda: kernels.logits_backward(problem, saved, c, other)  # noqa: E731
    sweep.add("logprob backward, bf16", [n, v], backward, 1, 0, 4 * n * v)
    leaf = logits.requires_grad_()

    def step() -> None:
        leaf.grad = None
        dpofast.logprob(leaf, labels, ignore_index=None, backend="cuda").logps.sum().backward()

    sweep.add("logprob, public call, both", [n, v], step, 1, 0, 6 * n * v)
    sweep.write()


def fused(sweep: Sweep, n: int, h: int, v: int) -> None:
    """The product that exponentiates, what comes before and after it, and the bare product beside them."""
    from dpofast.kernels import linear_keep as kernels

    weight, hidden, e = sweep.rand(v, h), sweep.rand(n, h), sweep.empty(n, -(-v // 8) * 8)[:, :v]
    if not kernels.supported(sweep.device, weight.dtype, h, weight):
        print("the kernel linear_keep is not for this device")
        return
    labels = torch.randint(v, (n,), device=sweep.device)
    offsets, packed = torch.arange(n, device=sweep.device) * h, torch.empty_like(hidden)
    tiles, wide = kernels.tiles(v), {"device": sweep.device, "dtype": FP32}
    z_label, factor, logps, lse = (torch.empty(*shape, **wide) for shape in ((n,), (n,), (n,), (n, 2)))
    partials = kernels.Partials(z_label, *torch.empty(2, tiles, n, **wide))
    scale, flops = h**-0.5, 2.0 * n * h * v
    sweep.add("bare product, bf16", [n, h, v], lambda: mm(hidden, weight.T, e), flops=flops)
    pack = hidden, offsets, weight, labels, scale, packed, z_label
    sweep.add("pack_tokens", [n, h, v], lambda: kernels.pack_tokens(*pack))
    for name, cached in (("linear_keep", e), ("linear_keep, score", None)):

        def product(cached: Tensor | None = cached) -> None:
            kernels.linear_keep(packed, weight, labels, scale, partials, cached)

        sweep.add(name, [n, h, v], product, flops=flops)
    sweep.add("seal", [n, v], lambda: kernels.seal(partials, e, labels, scale, logps, lse, factor))
    sweep.write()


def reduced_precision(sweep: Sweep, n: int, h: int, blocks: tuple[int, ...]) -> None:
    """Whether d weight in bf16 is rounded once only: PyTorch lets cuBLAS add parts of a sum in bf16."""
    flags = torch.backends.cuda.matmul
    before = flags.allow_bf16_reduced_precision_reduction
    for block in blocks:
        g, hidden = sweep.rand(n, block), sweep.rand(n, h)
        exact = g.double().T @ hidden.double()
        for allowed in (True, False):
            flags.allow_bf16_reduced_precision_reduction = allowed
            out = sweep.empty(block, h)
            mm(g.T, hidden, out)
            case = f"d weight, bf16 parts {'allowed' if allowed else 'forbidden'}"
            facts = Record("gemm", shape=(block, n, h), case=case)
            sweep.results.add([[facts.of("error", error(out, exact))]])
    flags.allow_bf16_reduced_precision_reduction = before
    sweep.write()


def groups(sweep: Sweep) -> Iterator[tuple[str, Callable[[], None]]]:
    if sweep.rehearse:
        yield "products", lambda: products(sweep, 16, (8, 16), (32, 64), 256)
        yield "large products", lambda: large_products(sweep, 16, 8, 96, (32,))
        yield "passes", lambda: passes(sweep, 4, (0.002, 0.01))
        yield "from logits", lambda: from_logits(sweep, 4, 300)
        yield "reduced precision", lambda: reduced_precision(sweep, 64, 8, (16,))
        return
    chunks, blocks = (512, 1024, 2048, 4096, 8192), (1056, 2112, 4224, 8448, 16896, 33792)
    yield "large products", lambda: large_products(sweep, 8192, 4096, 151936, (3200, 8448, 33792))
    yield "passes", lambda: passes(sweep, 2048, (8, 25, 70, 300))
    yield "from logits", lambda: from_logits(sweep, 4096, 151936)
    yield "fused 4096", lambda: fused(sweep, 8192, 4096, 151936)
    yield "fused 1024", lambda: fused(sweep, 1638, 1024, 151936)
    yield "products 4096", lambda: products(sweep, 4096, chunks, blocks, 151936)
    yield "products 1024", lambda: products(sweep, 1024, chunks, blocks, 151936)
    yield "large products, small", lambda: large_products(sweep, 1638, 1024, 151936, (3200, 8448, 33792))
    yield "reduced precision", lambda: reduced_precision(sweep, 8192, 1024, (64, 256, 3200))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    record.add_out(parser)
    parser.add_argument("--seconds", type=float, default=35, help="begin nothing after this time (default 35)")
    parser.add_argument("--only", default="", help="groups whose name has one of these in it, separated by commas")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU")
    args = parser.parse_args()
    sweep = Sweep(device_for(args.rehearse), args.rehearse, args.seconds, args.out)
    failed = False
    for name, group in groups(sweep):
        if not any(word in name for word in args.only.split(",")):
            continue
        if sweep.late():
            print(f"no time left for: {name}")
            continue
        start = time.perf_counter()
        try:
            group()
        except Exception as failure:
            failed = True
            print(f"{name}: {first_line(failure)}", flush=True)
        print(f"-- {name}: {time.perf_counter() - start:.1f}s", flush=True)
    sweep.write()
    sys.exit(failed or any(r.failed for r in sweep.results.records))


if __name__ == "__main__":
    main()
