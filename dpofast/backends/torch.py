"""Plain PyTorch, chunked over tokens and vocabulary: the readable twin of the kernels and the last resort.

Works on any device. The schedules are those of `dpofast.backends.tiled`; here is what happens to one tile, in place
and with at most two tiles more. The label's own entry is kept apart as in csrc/core/softmax.h. Products are made in
the wide type, since that is where PyTorch keeps an unrounded sum on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from dpofast.backends._tensors import places, take, wide_dtype
from dpofast.backends.base import LogitsProblem, OutputGrads, Saved, Transform
from dpofast.backends.tiled import Exps, Tile
from dpofast.contract import FLOOR_LOGP, Stat

_ROWS = 1024
"""Rows that are scaled at a time: their temporaries are small beside what the planner counts."""


def nothing_folded(stats: Tensor) -> Tensor:
    """``stats``, filled with the statistics of no logits."""
    stats.fill_(-torch.inf)
    stats[Stat.SUM : Stat.SUM_Z + 1].zero_()
    return stats


def _label_place(labels: Tensor, v0: int, width: int) -> tuple[Tensor, Tensor]:
    """Finds the labels in a tile: whether each is there, [n], and its column there (any, if it is not), [n, 1]."""
    local = labels - v0
    return (local >= 0) & (local < width), local.clamp(0, width - 1).unsqueeze(-1)


def put_label(e: Tensor, labels: Tensor, own: Tensor) -> None:
    """Sets the labels' entries to ``own`` [n], of those labels that lie in the columns of ``e``."""
    inside, index = _label_place(labels, 0, e.shape[1])
    e.scatter_(1, index, torch.where(inside.unsqueeze(-1), own.to(e.dtype).unsqueeze(-1), e.gather(1, index)))


def _transformed(tile: Tile) -> Tensor:
    """z [n, width], in the place of x."""
    temperature, logit_scale, softcap = tile.transform
    if tile.bias is not None:
        tile.x.add_(tile.bias)
    if softcap:
        return tile.x.mul_(logit_scale / softcap).tanh_().mul_(softcap / temperature)
    return tile.x.mul_(logit_scale / temperature)


def slope(z: Tensor, transform: Transform) -> Tensor | float:
    """dz / dx."""
    temperature, logit_scale, softcap = transform
    if not softcap:
        return logit_scale / temperature
    return (z * (temperature / softcap)).square_().neg_().add_(1).mul_(logit_scale / temperature)


class TorchPasses:
    """`dpofast.backends.tiled.Passes`, written with PyTorch."""

    def product_dtype(self, hidden: torch.dtype, weight: torch.dtype) -> torch.dtype:
        return wide_dtype(hidden, weight)

    def product(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        if out.dtype == a.dtype:
            torch.mm(a, b, out=out)
        else:
            out.copy_(a @ b)

    def accumulate(self, sums: Tensor, a: Tensor, b: Tensor) -> None:
        sums.addmm_(a, b)

    def scale_rows(
        self, x: Tensor, x_rows: Tensor | None, scales: tuple[Tensor, ...], out: Tensor, out_rows: Tensor | None
    ) -> None:
        n = len(x) if x_rows is None else len(x_rows)
        for i in range(0, n, _ROWS):
            part = slice(i, i + _ROWS)
            y = x[part] if x_rows is None else take(x, x_rows[part])
            for scale in scales:
                y = y * scale[part].unsqueeze(-1)
            if out_rows is None:
                out[part] = y
            else:
                out[out_rows[part]] = y.to(out.dtype)

    def new_stats(self, n: int, wide: torch.dtype, device: torch.device) -> Tensor:
        return nothing_folded(torch.empty(Stat.COUNT, n, dtype=wide, device=device))

    def fold(self, tile: Tile, stats: Tensor, outputs: tuple[str, ...], exps: Exps | None) -> None:
        z, S = _transformed(tile), Stat
        inside, index = _label_place(tile.labels, tile.v0, z.shape[1])
        own = z.gather(1, index)
        stats[S.Z_LABEL] = torch.where(inside, own.squeeze(-1), stats[S.Z_LABEL])
        if "mean_logits" in outputs:
            stats[S.SUM_Z] += z.sum(-1)
        if "is_top1" in outputs:
            columns = torch.arange(tile.v0, tile.v0 + z.shape[1], device=z.device)
            before = columns < tile.labels.unsqueeze(-1)
            stats[S.TOP_BEFORE] = torch.maximum(stats[S.TOP_BEFORE], torch.where(before, z, -torch.inf).amax(-1))
        z.scatter_(1, index, torch.where(inside.unsqueeze(-1), -torch.inf, own))

        m = torch.maximum(stats[S.M], z.amax(-1))
        safe = torch.where(m == -torch.inf, 0.0, m)
        d_m = torch.where(stats[S.M] == -torch.inf, 0.0, stats[S.M] - safe)
        factor = (stats[S.M] - safe).exp()
        dz_dx = 1.0 if exps is None else slope(z, tile.transform)
        e = (z - safe.unsqueeze(-1)).exp_()
        if exps is not None:
            torch.mul(e, dz_dx, out=exps.tile(tile.v0, tile.v0 + z.shape[1]))
            exps.shifts[tile.v0 // exps.block].copy_(safe)
        if "entropy" in outputs:
            z.sub_(safe.unsqueeze(-1)).clamp_(min=FLOOR_LOGP).mul_(e)
            stats[S.SUM_X] = (stats[S.SUM_X] + d_m * stats[S.SUM]) * factor + z.sum(-1)
        stats[S.SUM] = stats[S.SUM] * factor + e.sum(-1)
        if "log_sum_sq_probs" in outputs:
            stats[S.SUM_SQ] = stats[S.SUM_SQ] * factor * factor + e.square_().sum(-1)
        stats[S.M] = m

    def finish(self, stats: Tensor, labels: Tensor, n_vocab: int, outputs: tuple[str, ...]) -> dict[str, Tensor]:
        m, total, sum_x, sum_sq, sum_z, top_before, z_label = stats.unbind()
        valid = (labels >= 0) & (labels < n_vocab)
        z_label = torch.where(valid, z_label, torch.nan)
        none = total == 0
        d = torch.where(none, -torch.inf - z_label, m - z_label + total.log())
        d = torch.where(z_label == torch.inf, torch.nan, d)
        logps = -softplus(d, threshold=torch.inf)
        # exp(d) overflows far beyond 30; exp(-d) is below the rounding of d from there on.
        logps = torch.where(d > 30, -d - torch.log1p((-d).exp()), logps)
        z_max = torch.maximum(m, z_label)
        log_sum = (total * (m - z_max).exp() + (z_label - z_max).exp()).log()
        log_sum = torch.where(none, z_label - z_max, log_sum)
        p = logps.exp()
        to_z = m - z_max - log_sum
        to_p = torch.where(none, 0.0, to_z.exp())
        others = torch.where(none, 0.0, to_p * (sum_x + total * to_z))
        results = {
            "logps": logps,
            "lse": torch.stack((z_max, log_sum), -1),
            "entropy": -(torch.where(p == 0, 0.0, p * logps) + others),
            "log_sum_sq_probs": (to_p * to_p * sum_sq + p * p).log(),
            "mean_logits": torch.where(valid, sum_z / n_vocab, torch.nan),
            "is_top1": (z_label >= m) & (z_label > top_before),
        }
        return {name: results[name] for name in ("logps", "lse", *outputs)}

    def seal(
        self,
        exps: Exps,
        labels: Tensor,
        transform: Transform,
        stats: Tensor,
        results: dict[str, Tensor],
        factor: Tensor,
    ) -> None:
        z_max, log_sum = results["lse"].unbind(-1)
        factors = ((exps.shifts - z_max) - log_sum).exp().neg_().unsqueeze(-1)
        for of_tile, v0 in zip(factors, range(0, exps.e.shape[1], exps.block)):
            exps.e[:, v0 : v0 + exps.block] *= of_tile
        put_label(exps.e, labels, -torch.expm1(results["logps"]) * slope(stats[Stat.Z_LABEL], transform))
        factor.fill_(1)

    def grad(self, tile: Tile, saved: Saved, incoming: OutputGrads, out: Tensor) -> None:
        z = _transformed(tile)
        dz_dx = slope(z, tile.transform)
        z_max, log_sum = saved.lse.unsqueeze(-2).unbind(-1)
        log_p = z.sub_(z_max).sub_(log_sum)
        p = log_p.exp()
        inside, index = _label_place(tile.labels, tile.v0, z.shape[1])
        c = torch.zeros_like(saved.logps) if incoming.logps is None else incoming.logps
        if incoming.entropy is None:
            g = p.mul_(c.unsqueeze(-1)).neg_()
            own = torch.zeros_like(c)
        else:  # d logps: -p c; d entropy: -p (log p + entropy) d_entropy
            g = log_p.clamp_(min=FLOOR_LOGP).add_(saved.entropy.unsqueeze(-1)).mul_(incoming.entropy.unsqueeze(-1))
            own = -(p.gather(1, index) * g.gather(1, index)).squeeze(-1)
            g.add_(c.unsqueeze(-1)).mul_(p).neg_()
        own = (own - torch.expm1(saved.logps) * c).unsqueeze(-1)
        g.scatter_(1, index, torch.where(inside.unsqueeze(-1), own, g.gather(1, index)))
        torch.mul(g, dz_dx, out=out)

    def logits_forward(self, problem: LogitsProblem, outputs: tuple[str, ...]) -> dict[str, Tensor]:
        x = take(problem.logits, problem.positions).to(problem.wide)
        stats = self.new_stats(problem.n_tokens, x.dtype, x.device)
        self.fold(Tile(x, None, problem.labels, 0, problem.transform), stats, outputs, None)
        return self.finish(stats, problem.labels, problem.n_vocab, outputs)

    def logits_backward(self, problem: LogitsProblem, saved: Saved, incoming: OutputGrads, grad_logits: Tensor) -> None:
        x = take(problem.logits, problem.positions).to(problem.wide)
        self.grad(Tile(x, None, problem.labels, 0, problem.transform), saved, incoming, x)
        out = grad_logits.unsqueeze(0) if grad_logits.ndim == 1 else grad_logits
        out[places(out.shape[:-1], problem.positions)] = x.to(grad_logits.dtype)
