"""The CUDA kernels: a tile of logits made by `torch.mm` (cuBLAS), what happens to it by ``csrc/cuda/``.

The schedules are those of `dpofast.backends.tiled`. Operands of products keep their 16 bits, logits and sums are fp32.
Nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpofast.backends._tensors import element_offsets, empty_results, pointer, take
from dpofast.backends.base import PAIR_OPTIONS, OutputGrads, PairsProblem, PairsResult, Saved, Transform
from dpofast.backends.gpu import GpuPasses
from dpofast.backends.tiled import Exps, Tile
from dpofast.backends.torch import nothing_folded, put_label, slope
from dpofast.contract import DTYPE_CODES, STATISTICS, Stat, flags
from dpofast.losses import F_DIVERGENCES

_SPLIT = 4096  # columns of a row that a thread block reads at least, where rows are split: 16 a thread; not tuned


def launch(library: Any, function: str, device: torch.device, args: dict[str, Any]) -> None:
    """Calls a launcher of ``library``, dpofast._C or another module that has them, on ``device``'s current stream."""
    if device.type != "cuda":
        args["stream"] = None
        getattr(library, f"cuda_{function}")(args)
        return
    args["stream"] = torch._C._cuda_getCurrentRawStream(device.index)
    if torch.cuda.current_device() == device.index:  # entering a device costs more than most launches
        getattr(library, f"cuda_{function}")(args)
        return
    with torch.cuda.device(device):
        getattr(library, f"cuda_{function}")(args)


class CudaPasses(GpuPasses):
    """`Passes` by the launchers of ``library``, which `launch` calls; `GpuPasses` says what ``thread_blocks`` are."""

    def __init__(self, library: Any, thread_blocks: int | None = None):
        super().__init__(thread_blocks)
        self._library = library
        self.pair_losses: tuple[str, ...] = tuple(getattr(library, "cuda_pair_losses", ()))

    def _most_splits(self, n: int, device: torch.device) -> int:
        """The number of splits of each of n rows that makes enough thread blocks."""
        return -(-self.thread_blocks(device) // max(n, 1))

    def new_stats(self, n: int, wide: torch.dtype, device: torch.device) -> Tensor:
        # Partials of split rows lie behind the statistics, so that no tile makes a buffer.
        stats = torch.empty(1 + self._most_splits(n, device), Stat.COUNT, n, dtype=wide, device=device)[0]
        return nothing_folded(stats)

    def _splits(self, n: int, width: int, device: torch.device) -> tuple[int, int]:
        """The number of splits that makes enough thread blocks, and their width, in 64s: whole vectors of any dtype."""
        splits = max(1, min(-(-width // _SPLIT), self._most_splits(n, device)))
        split_width = -(-width // (64 * splits)) * 64 if splits > 1 else width
        return -(-width // split_width), split_width

    def _launch(self, function: str, device: torch.device, args: dict[str, Any]) -> None:
        launch(self._library, function, device, args)

    def _tile(self, tile: Tile) -> dict[str, Any]:
        x, offsets = tile.x, tile.offsets
        n, width = (len(offsets), x.shape[-1]) if offsets is not None else x.shape
        splits, split_width = self._splits(n, width, x.device)
        return {
            "x": x.data_ptr(), "dtype": DTYPE_CODES[x.dtype], "row_offsets": pointer(offsets),
            "ld": x.stride(0) if offsets is None else 0, "n": n, "width": width, "v0": tile.v0,
            "bias": pointer(tile.bias), "labels": pointer(tile.labels), **tile.transform._asdict(),
            "splits": splits, "split_width": split_width,
        }  # fmt: skip

    def scale_rows(
        self, x: Tensor, x_rows: Tensor | None, scales: tuple[Tensor, ...], out: Tensor, out_rows: Tensor | None
    ) -> None:
        n, width = (len(x) if x_rows is None else len(x_rows)), x.shape[-1]
        x_ld = x.stride(0) if x.ndim == 2 else width
        if x.stride(-1) != 1:
            x, x_rows, x_ld = take(x, torch.arange(n, device=x.device) if x_rows is None else x_rows), None, width
        elif x_rows is not None and x.ndim != 2 and not x.is_contiguous():
            x_rows, x_ld = element_offsets(x, x_rows), 1
        scale = [pointer(scale) for scale in scales] + [None, None]
        args = {
            "x": x.data_ptr(), "x_rows": pointer(x_rows), "x_ld": x_ld, "first": scale[0], "second": scale[1],
            "out": out.data_ptr(), "out_rows": pointer(out_rows), "out_ld": width, "n": n, "width": width,
            "dtype": DTYPE_CODES[x.dtype], "out_dtype": DTYPE_CODES[out.dtype],
        }  # fmt: skip
        self._launch("scale_rows", x.device, args)

    def fold(self, tile: Tile, stats: Tensor, outputs: tuple[str, ...], exps: Exps | None) -> None:
        args, device = self._tile(tile), tile.x.device
        folds = exps is not None and not outputs and args["splits"] == 1
        if not folds:
            more = {"outputs": flags(outputs), "stats": stats.data_ptr(), "partials": stats.data_ptr() + stats.nbytes}
            self._launch("logprob_fold", device, args | more)
        if exps is not None:
            i, shifts = tile.v0 // exps.block, exps.shifts
            more = {
                "folds": folds, "stats": stats.data_ptr(), "shift_before": shifts[i - 1].data_ptr() if i else None,
                "shift": shifts[i].data_ptr(), "out": exps.e.data_ptr(), "out_dtype": DTYPE_CODES[exps.e.dtype],
                "out_ld": exps.e.stride(0),
            }  # fmt: skip
            self._launch("logprob_keep", device, args | more)

    def seal(
        self,
        exps: Exps,
        labels: Tensor,
        transform: Transform,
        stats: Tensor,
        results: dict[str, Tensor],
        factor: Tensor,
    ) -> None:
        e = exps.e
        args = {
            "stats": stats.data_ptr(), "lse": results["lse"].data_ptr(), "shift": exps.shifts[-1].data_ptr(),
            "labels": labels.data_ptr(), "n": e.shape[0], "width": e.shape[1], **transform._asdict(),
            "factor": factor.data_ptr(), "out": e.data_ptr(), "out_ld": e.stride(0),
            "dtype": DTYPE_CODES[stats.dtype], "out_dtype": DTYPE_CODES[e.dtype],
        }  # fmt: skip
        self._launch("logprob_seal", e.device, args)
        if e.dtype == torch.float16:
            # Its exponent holds neither the sum of a flat row nor a factor that makes up for it.
            e.mul_(factor.unsqueeze(-1))
            put_label(e, labels, -torch.expm1(results["logps"]) * slope(stats[Stat.Z_LABEL], transform))
            factor.fill_(1)

    def finish(self, stats: Tensor, labels: Tensor, n_vocab: int, outputs: tuple[str, ...]) -> dict[str, Tensor]:
        n = stats.shape[1]
        results = empty_results(n, outputs, stats.dtype, stats.device)
        args = {"stats": stats.data_ptr(), "labels": labels.data_ptr(), "n": n, "v": n_vocab,
                "dtype": DTYPE_CODES[stats.dtype]}  # fmt: skip
        args |= {name: pointer(results.get(name)) for name in ("logps", "lse", *STATISTICS)}
        self._launch("logprob_finish", stats.device, args)
        return results

    def grad(
        self, tile: Tile, saved: Saved, incoming: OutputGrads, out: Tensor, out_offsets: Tensor | None = None
    ) -> None:
        args = self._tile(tile) | {
            "logps": saved.logps.data_ptr(), "lse": saved.lse.data_ptr(), "grad_logps": pointer(incoming.logps),
            "entropy": pointer(saved.entropy), "grad_entropy": pointer(incoming.entropy),
            "out": out.data_ptr(), "out_dtype": DTYPE_CODES[out.dtype],
            "out_offsets": pointer(out_offsets), "out_ld": out.stride(0) if out_offsets is None else 0,
        }  # fmt: skip
        self._launch("logprob_grad", tile.x.device, args)

    def sequence_dpo(self, problem: PairsProblem) -> PairsResult:
        p, logps = problem, problem.logps.contiguous()
        dtype, device = logps.dtype, logps.device
        pairs = (len(logps) if p.cu_seqlens is None else len(p.cu_seqlens) - 1) // 2
        inputs = {
            "logps": logps,
            "labels": p.labels.long().contiguous(),
            "cu_seqlens": None if p.cu_seqlens is None else p.cu_seqlens.long().contiguous(),
            "ref_logps": None if p.ref_logps is None else p.ref_logps.to(dtype).contiguous(),
        }
        for name in ("beta", "margin", "weight"):
            x = getattr(p, name)
            inputs[name] = None if x is None else x.to(dtype).expand(pairs).contiguous()
        result = PairsResult(
            torch.empty(pairs, dtype=dtype, device=device),
            torch.empty(2 * pairs, dtype=dtype, device=device),
            torch.empty(2 * pairs, dtype=torch.int64, device=device),
            torch.empty_like(logps),
        )
        args = {name: pointer(x) for name, x in {**inputs, **result._asdict()}.items()}
        numbers = dict(zip(PAIR_OPTIONS, p.options, strict=True))
        args |= {f"{name}_value": numbers.pop(name) for name in ("beta", "margin")}
        args |= numbers
        args |= {
            "dtype": DTYPE_CODES[dtype], "ignore_index": p.ignore_index, "pairs": pairs,
            "width": 0 if p.cu_seqlens is not None else logps.shape[1], "loss": self.pair_losses.index(p.loss_type),
            "f_divergence": F_DIVERGENCES.index(p.f_divergence),
        }  # fmt: skip
        self._launch("sequence_dpo", device, args)
        return result
