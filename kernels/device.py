"""What every Triton kernel here shares: the transform of logits, the online softmax, g, and one tile of logits.

The algebra is that of csrc/core/softmax.h and csrc/cuda/: the label's own entry is kept apart, so that a token that is
certain keeps its relative precision. A `piece` is what some entries of a row amount to, a tuple in the order of
`dpofast.contract.Stat`. Names of sizes: n tokens, V the vocabulary, H the hidden size.

`tl.exp` is good enough: its relative error grows with |x|, but exp(x) of a large negative x is as small as that.
"""

import triton
import triton.language as tl

from dpofast import contract
from dpofast.contract import Stat

STATS = tl.constexpr(Stat.COUNT)
FLOOR_LOGP = tl.constexpr(contract.FLOOR_LOGP)


@triton.jit
def larger(a, b):
    """The larger of two; a NaN is never the larger one, and lives on in a sum."""
    return tl.where(b > a, b, a)


@triton.jit
def expm1(x):
    """exp(x) - 1 with full relative precision, for which Triton has no function on every device."""
    # The term after the last is below half a unit in the last place where |x| < 0.5, below which the series is used.
    TERMS: tl.constexpr = 19 if x.dtype == tl.float64 else 10
    series = tl.full(x.shape, 1.0, x.dtype)
    for k in tl.static_range(TERMS, 1, -1):
        series = 1 + series * x * (1.0 / k)
    return tl.where(tl.abs(x) < 0.5, series * x, tl.exp(x) - 1)


@triton.jit
def tanh(x):
    t = expm1(-2 * tl.abs(x))
    y = -t / (t + 2)
    return tl.where(x < 0, -y, y)


@triton.jit
def transformed(x, scale, inner, cap, SOFTCAP: tl.constexpr):
    """z of a logit x: softcap * tanh(logit_scale * x / softcap) / temperature; the numbers come from launch.factors."""
    if SOFTCAP:
        z = tanh(x * tl.full((), inner, x.dtype)) * tl.full((), cap, x.dtype)
    else:
        z = x * tl.full((), scale, x.dtype)
    return z


@triton.jit
def slope(z, scale, inv_cap, SOFTCAP: tl.constexpr):
    """dz / dx."""
    s = tl.full((), scale, z.dtype)
    if SOFTCAP:
        t = z * tl.full((), inv_cap, z.dtype)
        s = s * (1 - t * t)
    return s


@triton.jit
def empty_piece(n: tl.constexpr, A: tl.constexpr):
    none = tl.full((n,), float("-inf"), A)
    zero = tl.zeros((n,), A)
    return none, zero, zero, zero, zero, none, none


@triton.jit
def merged(a, b, EXTRA: tl.constexpr):
    """Two pieces of the same rows as one. ``EXTRA``: with the sums that only the optional statistics need."""
    a_m, a_sum, a_x, a_sq, a_z, a_top, a_label = a
    b_m, b_sum, b_x, b_sq, b_z, b_top, b_label = b
    none = float("-inf")
    m = larger(a_m, b_m)
    # exp(-inf - -inf) would be NaN; a piece whose m is -inf has sums of 0, or of NaN, which times 1 stay.
    da = tl.where(a_m == none, 0.0, a_m - m)
    db = tl.where(b_m == none, 0.0, b_m - m)
    fa, fb = tl.exp(da), tl.exp(db)
    if EXTRA:
        a_x = (a_x + da * a_sum) * fa + (b_x + db * b_sum) * fb
        a_sq = a_sq * fa * fa + b_sq * fb * fb
        a_z += b_z
        a_top = larger(a_top, b_top)
    # The label's logit is in at most one piece. NaN == -inf is false, so a NaN label stays, too.
    return m, a_sum * fa + b_sum * fb, a_x, a_sq, a_z, a_top, tl.where(a_label == none, b_label, a_label)


@triton.jit
def local_label(label, v0, width: tl.constexpr):
    """Columns of labels [n] in a tile that begins at v0, in 32 bits: -1 before it, ``width`` beyond it."""
    return tl.minimum(tl.maximum(label - v0, -1), width).to(tl.int32)


@triton.jit
def fold_tile(piece, z, end, label, EXTRA: tl.constexpr):
    """The piece with the first ``end`` columns of z [n, width] folded in; ``label`` [n] of `local_label`."""
    none = float("-inf")
    column = tl.arange(0, z.shape[1])[None, :]
    at = label[:, None]
    valid = column < end
    others = tl.where(valid & (column != at), z, none)
    m = larger(none, tl.max(others, 1))  # not NaN, which a maximum passes over but where there is nothing else
    d = others - tl.where(m == none, 0.0, m)[:, None]
    e = tl.exp(d)
    zero = tl.zeros(m.shape, z.dtype)
    x, sq, z_sum, top = zero, zero, zero, tl.full(m.shape, none, z.dtype)
    if EXTRA:
        x = tl.sum(tl.where(e == 0, 0.0, e * d), 1)
        sq = tl.sum(e * e, 1)
        z_sum = tl.sum(tl.where(valid, z, 0.0), 1)
        top = larger(none, tl.max(tl.where(column < at, others, none), 1))
    # One entry at most is not 0, and it is itself.
    own = tl.sum(tl.where(valid & (column == at), z, 0.0), 1)
    own = tl.where((label >= 0) & (label < tl.minimum(end, z.shape[1])), own, none)
    return merged(piece, (m, tl.sum(e, 1), x, sq, z_sum, top, own), EXTRA)


@triton.jit
def load_piece(stats, n, row, mask):
    """Rows of stats [STATS, n]."""
    at = stats + row
    return (
        tl.load(at, mask),
        tl.load(at + n, mask),
        tl.load(at + 2 * n, mask),
        tl.load(at + 3 * n, mask),
        tl.load(at + 4 * n, mask),
        tl.load(at + 5 * n, mask),
        tl.load(at + 6 * n, mask),
    )


@triton.jit
def store_piece(stats, n, row, mask, piece):
    at = stats + row
    m, total, x, sq, z_sum, top, label = piece
    tl.store(at, m, mask)
    tl.store(at + n, total, mask)
    tl.store(at + 2 * n, x, mask)
    tl.store(at + 3 * n, sq, mask)
    tl.store(at + 4 * n, z_sum, mask)
    tl.store(at + 5 * n, top, mask)
    tl.store(at + 6 * n, label, mask)


@triton.jit
def load_row(logps, lse, grad_logps, entropy, grad_entropy, row, mask):
    """Loads what g needs of each row, each [n]: (z_max, log_sum, c, d_entropy, entropy, g of the label).

    c and d_entropy are the gradients that arrive. lse is [n, 2], z_max and log_sum; grad_logps, and grad_entropy with
    entropy, may be None.
    """
    z_max = tl.load(lse + 2 * row, mask, other=0.0)
    log_sum = tl.load(lse + 2 * row + 1, mask, other=0.0)
    logp = tl.load(logps + row, mask, other=0.0)
    c = tl.zeros(logp.shape, logp.dtype)
    if grad_logps is not None:
        c = tl.load(grad_logps + row, mask, other=0.0)
    own = -c * expm1(logp)  # 1 - p: nothing cancels for a confident token
    d_entropy, row_entropy = tl.zeros(logp.shape, logp.dtype), tl.zeros(logp.shape, logp.dtype)
    if grad_entropy is not None:
        d_entropy = tl.load(grad_entropy + row, mask, other=0.0)
        row_entropy = tl.load(entropy + row, mask, other=0.0)
        p = tl.exp(logp)
        own -= tl.where(p > 0, d_entropy * p * (logp + row_entropy), 0.0)
    return z_max, log_sum, c, d_entropy, row_entropy, own


@triton.jit
def grad_tile(z, is_label, row, scale, inv_cap, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr):
    """D loss / d x of a tile: dz/dx (c (onehot - p) - d_entropy p (log p + entropy)); row of `load_row`."""
    z_max, log_sum, c, d_entropy, entropy, own = row
    log_p = z - z_max[:, None] - log_sum[:, None]
    p = tl.exp(log_p)
    f = tl.broadcast_to(c[:, None], z.shape)
    if ENTROPY:  # log p = -inf where p = 0: a large finite number in its place makes that entry 0 and not NaN
        f += d_entropy[:, None] * (tl.where(log_p > FLOOR_LOGP, log_p, FLOOR_LOGP) + entropy[:, None])
    return tl.where(is_label, own[:, None], -p * f) * slope(z, scale, inv_cap, SOFTCAP)


@triton.jit
def token_rows(offsets, row, n, ALIGNED: tl.constexpr):
    """The elements where tokens start, those beyond the last like the last; ``ALIGNED``: all multiples of 16."""
    start = tl.load(offsets + tl.minimum(row, n - 1))
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    return start


@triton.jit
def load_tile(x, row, column, stride, H, EVEN_H: tl.constexpr):
    """x [rows, columns], row in elements; the columns beyond H are 0."""
    at = x + (row + column.to(tl.int64) * stride)
    if EVEN_H:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=column < H, other=0.0)
    return tile


@triton.jit
def logits_tile(
    hidden, h_row, h_stride, weight, w_row, w_stride, bias, v, H,
    DOT: tl.constexpr, BLOCK_H: tl.constexpr, EVEN_H: tl.constexpr,
):  # fmt: skip
    """hidden weight^T + bias [n, width] in fp32: rows of both begin at elements h_row [n] and w_row [width].

    fp32 operands are multiplied as such ("ieee"): a product of TF32 would leave three digits of a logit.
    """
    acc = tl.zeros((h_row.shape[0], w_row.shape[0]), tl.float32)
    for k0 in range(0, H, BLOCK_H):
        k = k0 + tl.arange(0, BLOCK_H)
        h = load_tile(hidden, h_row[:, None], k[None, :], h_stride, H, EVEN_H).to(DOT)
        w = load_tile(weight, w_row[None, :], k[:, None], w_stride, H, EVEN_H).to(DOT)
        acc = tl.dot(h, w, acc, input_precision="ieee")
    if bias is not None:
        acc += tl.load(bias + v)[None, :]
    return acc
