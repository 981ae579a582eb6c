"""What a filter of gradients can leave out where whole tiles of the softmax are left out, as on a GPU. On a CPU.

Of real hidden states, for several cuts: the union of the vocabulary that so many neighbouring tokens keep, which a
compaction multiplies, and the share of tiles that `dpofast.kernels.linear_skip` multiplies, with the error of that.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from dpofast.bench.measure import error
from dpofast.bench.record import Record
from dpofast.bench.workloads import States
from dpofast.grad_filter import ranked, square_budget, thresholds
from dpofast.plan.cost import FUSED_COLUMNS, RANKING_TOKENS
from dpofast.plan.tiled import SKIP_ROWS

CUTS = (12, 14, 15, 16, 18)  # 2**-12 and so on; that of bfloat16 is 2**-14
ERROR_TOKENS = 256  # d weight in fp32 is hundreds of MB


def shares(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What the label leaves to each of the others, [n, V]; 0 at the label."""
    return (hidden @ weight.T).scatter_(1, labels.unsqueeze(1), -torch.inf).softmax(-1)


def masses(share: Tensor, order: Tensor | None) -> Tensor:
    """[n, tiles] of shares of the vocabulary in an order."""
    share = share if order is None else share[:, order]
    return pad(share, (0, -share.shape[1] % FUSED_COLUMNS)).view(len(share), -1, FUSED_COLUMNS).sum(2)


def tiles(states: States, base: Record) -> Iterator[list[Record]]:
    """Records of suite "tiles"."""
    (hidden, labels), weight = states.completion, states.weight
    step = -(-len(labels) // RANKING_TOKENS)
    orders = {"as the head has it": None, "ranked": ranked(hidden[::step] @ weight.T, labels[::step])}
    largest, in_orders = [], {name: [] for name in orders}
    for h, y in zip(hidden.split(SKIP_ROWS), labels.split(SKIP_ROWS)):
        share = shares(h, weight, y)
        largest.append(share.amax(0))
        for name, order in orders.items():
            in_orders[name].append(masses(share, order))
    largest = torch.stack(largest)
    for exponent in CUTS:
        cut, facts = 2.0**-exponent, base._replace(suite="tiles", case=f"2^-{exponent}")
        yield [facts.of(f"union of {n} tokens", x) for n, x in unions(largest, cut)]
        yield [facts.of(f"tiles, {name}", matters(of, cut)[0]) for name, of in in_orders.items()]
        yield [facts.of("dropped share, mean", matters(in_orders["ranked"], cut)[1])]
        yield [facts.of(*found) for found in errors(states, orders["ranked"], cut)]


def unions(largest: Tensor, cut: float) -> Iterator[tuple[int, float]]:
    """Shares of the vocabulary that any of n neighbouring tokens keeps, from the largest of `SKIP_ROWS` tokens each."""
    chunks = 1
    while chunks <= len(largest):
        whole = largest[: len(largest) // chunks * chunks].view(-1, chunks, largest.shape[1])
        yield chunks * SKIP_ROWS, (whole.amax(1) > cut).double().mean().item()
        chunks *= 2


def matters(of_tiles: list[Tensor], cut: float) -> tuple[float, float]:
    """The share of tiles that matter, and the mean share of a token that is dropped."""
    found, dropped = [], []
    for mass in of_tiles:
        own = mass > thresholds(mass, square_budget(cut, mass.shape[1])).unsqueeze(1)
        found.append(own.any(0))
        dropped.append((mass * ~found[-1]).sum(1))
    return torch.stack(found).double().mean().item(), torch.cat(dropped).mean().item()


def errors(states: States, order: Tensor, cut: float) -> Iterator[tuple[str, float]]:
    """Errors of the gradients of a sum of logps where tiles are left out and their mass is given back."""
    weight, v = states.weight, len(states.weight)
    exact, left_out, rows = torch.zeros_like(weight), torch.zeros_like(weight), []
    places = order.argsort()
    for h, y in zip(*(x[:ERROR_TOKENS].split(SKIP_ROWS) for x in states.completion)):
        share = shares(h, weight, y)
        mass = masses(share, order)
        found = (mass > thresholds(mass, square_budget(cut, mass.shape[1])).unsqueeze(1)).any(0)
        found[places[y] // FUSED_COLUMNS] = True
        drops = ~found.repeat_interleave(FUSED_COLUMNS)[:v][places]
        log_p = (h @ weight.T).log_softmax(-1)
        rest = -torch.expm1(log_p.gather(1, y.unsqueeze(1)))
        off = share * rest * drops
        off -= off.sum(1, keepdim=True) / v
        g = (-share * rest).scatter_(1, y.unsqueeze(1), rest)
        rows.append((off @ weight).norm(dim=1) / (g @ weight).norm(dim=1))
        exact.addmm_(g.T, h)
        left_out.addmm_(off.T, h)
    rows = torch.cat(rows)
    yield "error of d hidden, mean", rows.mean().item()
    yield "error of d hidden, p99", rows.quantile(0.99).item()
    yield "error of d weight", error(exact + left_out, exact.double())
