"""Plain PyTorch, chunked over tokens and vocabulary: the readable twin of the kernels and the last resort.

Works on any device. Same interface as `dpofast.backends.cpu`; the logits of a tile are recomputed in the
backward, and the label's own entry is kept apart as in csrc/core/softmax.h.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import softplus

from dpofast.plan import Choice


def _wide(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def cache_tensor(n_bytes: int, device: torch.device) -> Tensor:
    """Nothing is cached by this backend; the op's output has to exist all the same."""
    return torch.empty(n_bytes, dtype=torch.uint8, device=device)


def _without_autocast(function):
    """Autocast reaches into the body of an op, where it would round the logits of a wide tile."""

    @functools.wraps(function)
    def inner(isa, x, *args):
        with torch.autocast(x.device.type, enabled=False):
            return function(isa, x, *args)

    return inner


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of ``x`` [*, H] by number, whatever its strides."""
    x = x.unsqueeze(0) if x.ndim == 1 else x
    return x[torch.unravel_index(rows, x.shape[:-1])]


def grad_weight_tensor(weight: Tensor) -> Tensor:
    """Where d weight goes."""
    return weight.new_empty(weight.shape)


class _Statistics:
    """Running statistics of one chunk of tokens over all entries but the label's (RowStats in csrc/core/softmax.h)."""

    def __init__(self, y: Tensor, dtype: torch.dtype):
        zeros = torch.zeros(y.shape, dtype=dtype, device=y.device)
        self.y = y
        self.m, self.m_before = zeros - torch.inf, zeros - torch.inf
        self.sum, self.sum_x, self.sum_sq, self.sum_z, self.z_label = (zeros.clone() for _ in range(5))
        self.n_vocab = 0

    def fold(self, z: Tensor, v0: int) -> None:
        self.n_vocab += z.shape[1]
        self.sum_z += z.sum(-1)
        local = (self.y - v0).unsqueeze(-1)
        column = torch.arange(z.shape[1], device=z.device)
        is_label = column == local
        self.z_label = torch.where(is_label.any(-1), z.masked_fill(~is_label, 0).sum(-1), self.z_label)
        before = z.masked_fill(~(column < local), -torch.inf).amax(-1)
        self.m_before = torch.maximum(self.m_before, before)
        z = z.masked_fill(is_label, -torch.inf)
        m = torch.maximum(self.m, z.amax(-1))
        safe = torch.where(m == -torch.inf, 0.0, m)
        x = z - safe.unsqueeze(-1)
        e = x.exp()
        shift = torch.where(self.m == -torch.inf, 0.0, self.m - safe)
        f = (self.m - safe).exp()
        self.sum_x = (self.sum_x + shift * self.sum) * f + torch.where(e == 0, 0.0, e * x).sum(-1)
        self.sum_sq = self.sum_sq * f * f + (e * e).sum(-1)
        self.sum = self.sum * f + e.sum(-1)
        self.m = m

    def finish(self) -> dict[str, Tensor]:
        none = self.sum == 0
        d = torch.where(none, -torch.inf - self.z_label, self.m - self.z_label + self.sum.log())
        d = torch.where(self.z_label == torch.inf, torch.nan, d)
        logps = -softplus(d, threshold=torch.inf)
        logps = torch.where(d > 30, -d - torch.log1p((-d).exp()), logps)
        z_max = torch.maximum(self.m, self.z_label)
        log_sum = (self.sum * (self.m - z_max).exp() + (self.z_label - z_max).exp()).log()
        log_sum = torch.where(none, self.z_label - z_max, log_sum)
        p = logps.exp()
        to_z = self.m - z_max - log_sum
        to_p = torch.where(none, 0.0, to_z.exp())
        others = torch.where(none, 0.0, to_p * (self.sum_x + self.sum * to_z))
        return {
            "logps": logps,
            "lse": torch.stack((z_max, log_sum), -1),
            "entropy": -(torch.where(p == 0, 0.0, p * logps) + others),
            "log_sum_sq_probs": (to_p * to_p * self.sum_sq + p * p).log(),
            "mean_logits": self.sum_z / self.n_vocab,
            "is_top1": (self.z_label >= self.m) & (self.z_label > self.m_before),
        }


def _transform(x: Tensor, transform) -> tuple[Tensor, Tensor | float]:
    """z and d z / d x."""
    temperature, logit_scale, softcap = transform
    if not softcap:
        return x * (logit_scale / temperature), logit_scale / temperature
    t = torch.tanh(x * (logit_scale / softcap))
    return t * (softcap / temperature), (1 - t * t) * (logit_scale / temperature)


def _grad_logits(x, y, v0, transform, saved, grad_logps, grad_entropy) -> Tensor:
    """d loss / d x of one tile of untransformed logits."""
    z, slope = _transform(x, transform)
    z_max, log_sum = saved["lse"].unsqueeze(-2).unbind(-1)
    log_p = z - z_max - log_sum
    p = log_p.exp()
    local = (y - v0).unsqueeze(-1)
    is_label = torch.arange(x.shape[1], device=x.device) == local
    g = torch.zeros_like(z)
    if grad_logps is not None:
        own = -torch.expm1(saved["logps"]).unsqueeze(-1)
        g = g + torch.where(is_label, own, -p) * grad_logps.unsqueeze(-1)
    if grad_entropy is not None:
        h = torch.where(p == 0, 0.0, log_p) + saved["entropy"].unsqueeze(-1)
        g = g - p * h * grad_entropy.unsqueeze(-1)
    return g * slope


def _wide_tile(hidden_rows, weight, bias, v0, v1, dtype):
    w = weight[v0:v1].to(dtype)
    x = hidden_rows @ w.T
    if bias is not None:
        x += bias[v0:v1].to(dtype)
    return x, w


@_without_autocast
def forward(_isa, hidden, weight, bias, rows, y, transform, outputs, choice: Choice, _cache) -> dict[str, Tensor]:
    """See `dpofast.backends.cpu.forward`."""
    dtype, n_vocab = _wide(hidden.dtype, weight.dtype), weight.shape[0]
    names = ("logps", "lse", *outputs)
    parts = []
    for start in range(0, rows.numel(), choice.token_chunk):
        part = slice(start, start + choice.token_chunk)
        h = _take(hidden, rows[part]).to(dtype)
        stats = _Statistics(y[part], dtype)
        for v0 in range(0, n_vocab, choice.block):
            x, _ = _wide_tile(h, weight, bias, v0, v0 + choice.block, dtype)
            stats.fold(_transform(x, transform)[0], v0)
        parts.append(stats.finish())
    return {name: torch.cat([p[name] for p in parts]) for name in names}


@_without_autocast
def backward(
    _isa, hidden, weight, bias, rows, y, transform, choice: Choice, _cache, saved, grad_logps, grad_entropy,
    grad_hidden, grad_weight, grad_bias,
) -> None:  # fmt: skip
    """See `dpofast.backends.cpu.backward`."""
    dtype, n_vocab = _wide(hidden.dtype, weight.dtype), weight.shape[0]
    chunks = [slice(i, i + choice.token_chunk) for i in range(0, rows.numel(), choice.token_chunk)]

    def tile(part, v0):
        h = _take(hidden, rows[part]).to(dtype)
        x, w = _wide_tile(h, weight, bias, v0, v0 + choice.block, dtype)
        held = {name: s[part] for name, s in saved.items()}
        c, e = (None if g is None else g[part] for g in (grad_logps, grad_entropy))
        return h, w, _grad_logits(x, y[part], v0, transform, held, c, e)

    # Vocabulary outside, so that each slice of d weight is accumulated in a tile and rounded once; d hidden
    # is then accumulated over slices in a wide buffer of its own, one chunk of tokens being the usual case.
    sums = (
        None if grad_hidden is None else torch.zeros(rows.numel(), hidden.shape[-1], dtype=dtype, device=hidden.device)
    )
    for v0 in range(0, n_vocab, choice.block):
        d_weight = d_bias = 0
        for part in chunks:
            h, w, g = tile(part, v0)
            if sums is not None:
                sums[part] += g @ w
            if grad_weight is not None:
                d_weight = d_weight + g.T @ h
            if grad_bias is not None:
                d_bias = d_bias + g.sum(0)
        if grad_weight is not None:
            grad_weight[v0 : v0 + choice.block] = d_weight
        if grad_bias is not None:
            grad_bias[v0 : v0 + choice.block] = d_bias
    if grad_hidden is not None:
        grad_hidden.view(-1, grad_hidden.shape[-1])[rows] = sums.to(grad_hidden.dtype)


def rows_forward(_isa, logits, rows, y, transform, outputs) -> dict[str, Tensor]:
    """See `dpofast.backends.cpu.rows_forward`."""
    stats = _Statistics(y, _wide(logits.dtype))
    x = _take(logits, rows).to(_wide(logits.dtype))
    stats.fold(_transform(x, transform)[0], 0)
    results = stats.finish()
    return {name: results[name] for name in ("logps", "lse", *outputs)}


def rows_backward(_isa, logits, rows, y, transform, saved, grad_logps, grad_entropy, grad_logits) -> None:
    """See `dpofast.backends.cpu.rows_backward`."""
    x = _take(logits, rows).to(_wide(logits.dtype))
    grad = _grad_logits(x, y, 0, transform, saved, grad_logps, grad_entropy).to(grad_logits.dtype)
    out = grad_logits.unsqueeze(0) if grad_logits.ndim == 1 else grad_logits
    out[torch.unravel_index(rows, out.shape[:-1])] = grad
