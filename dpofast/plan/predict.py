"""What `plan` says beyond the schedule itself: the schedules considered, their bytes and times, and the floor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from dpofast.plan import cost, cpu, cpu_cost, peers, rates, tiled
from dpofast.plan.cost import DataSheet
from dpofast.plan.rates import Rates
from dpofast.plan.schedule import Request, Schedule
from dpofast.plan.tiled import Candidate, cached_columns, tiled_traits


class Considered(NamedTuple):
    """A schedule that fits the budget: of several that differ in their tiles, the best."""

    schedule: str
    block: int
    token_chunk: int
    products: float
    memory_bytes: int  # of cache and workspace
    bytes_moved: int
    seconds: float | None  # None: nothing is known of the device
    is_chosen: bool


class Prediction(NamedTuple):
    """Of one problem on one device."""

    considered: tuple[Considered, ...]
    floor_seconds: float | None
    machine: peers.Machine | None
    core_flops: float | None = None
    kernel_flops: float | None = None
    otherwise: str | None = None
    kept: float | None = None  # the share of entries, or of tiles, that a filter is assumed to keep

    @property
    def chosen(self) -> Considered:
        return next(c for c in self.considered if c.is_chosen)


def on_cpu(request: Request, chosen: Schedule, isa: str, threads: int, kept: float, with_peers: bool) -> Prediction:
    """For the compiled CPU kernels, at the rates that are measured here and now."""
    here = rates.measured(isa, request.hidden_dtype, request.weight_dtype, threads)
    found: dict[str, Considered] = {}
    for schedule in cpu.candidates(request, isa, threads):
        row = _considered_on_cpu(request, schedule, chosen, isa, here, kept)
        if row.is_chosen or row.schedule not in found:  # there may be several of a name, in other blocks
            found[row.schedule] = row
    floor = (1 + request.n_grads) * request.flops / (here.kernel * threads)
    machine = peers.Cpu(here, rates.mm(request.hidden_dtype, threads)) if with_peers else None
    core, kernel = rates.peak(isa, request.hidden_dtype, request.weight_dtype)
    return Prediction(tuple(found.values()), floor, machine, core, kernel, kept=kept if chosen.filters else None)


def _considered_on_cpu(
    request: Request, s: Schedule, chosen: Schedule, isa: str, here: Rates, kept: float
) -> Considered:
    predicted = cpu_cost.cost(request, s, isa, here, kept)
    products = s.products(request.n_grads)
    if s.filters and cpu_cost.filter_pays(kept):
        products = 1 + kept * request.n_grads
    return Considered(
        s.name, s.block, s.token_chunk, products, s.cache_bytes + s.workspace_bytes,
        int(predicted.bytes), predicted.seconds, s == chosen,
    )  # fmt: skip


def on_tiles(request: Request, chosen: Schedule, backend: str, device: DataSheet) -> Prediction:
    """For schedules over tiles; times by the data sheet, None on a CPU."""
    traits = tiled_traits(backend, request.hidden_dtype, request.weight_dtype)
    best: dict[tuple[str, bool], Candidate] = {}
    for c in tiled.candidates(request, traits, device, every=True):
        kind = c.schedule.name, c.schedule.is_fused
        if kind not in best or c.seconds < best[kind].seconds:
            best[kind] = c
    columns, _ = cached_columns(chosen, request.n_tokens, request.n_vocab, traits.elem)
    taken = Candidate(chosen, sum(cost.seconds(device, chosen, columns, request, traits)))
    best[chosen.name, chosen.is_fused] = taken
    considered = tuple(_considered_on_tiles(request, c, chosen, traits, device) for c in best.values())
    if not device.sms:
        return Prediction(considered, None, None)
    machine = peers.Gpu(device, request.hidden_dtype.itemsize)
    floor = cost.floor_seconds(device, request, traits)
    kept = cost.MATTERS if chosen.filters else None
    return Prediction(considered, floor, machine, otherwise=_otherwise(request, traits, device, taken), kept=kept)


def _considered_on_tiles(
    request: Request, candidate: Candidate, chosen: Schedule, traits: cost.TiledTraits, device: DataSheet
) -> Considered:
    s = candidate.schedule
    columns, _ = cached_columns(s, request.n_tokens, request.n_vocab, traits.elem)
    products = 1 + cost.MATTERS * request.n_grads if s.filters else s.products(request.n_grads)
    return Considered(
        s.name, s.block, s.token_chunk, products, candidate.memory,
        int(cost.traffic(s, columns, request, traits).total), candidate.seconds if device.sms else None, s == chosen,
    )  # fmt: skip


def _otherwise(request: Request, traits: cost.TiledTraits, device: DataSheet, chosen: Candidate) -> str | None:
    """The best schedule of the other kind: fused or over tiles where both exist, else one that keeps or makes again."""
    found = list(tiled.candidates(request, traits, device, every=True))
    of_both = {c.schedule.is_fused for c in found} == {True, False}

    def is_other(schedule: Schedule) -> bool:
        if of_both:
            return schedule.is_fused != chosen.schedule.is_fused
        return schedule.keeps_nothing != chosen.schedule.keeps_nothing

    other = tiled.best_of(c for c in found if is_other(c.schedule))
    if other is None:
        return "nothing of another kind fits the budget" if request.n_grads else None
    s, more = other.schedule, other.seconds / chosen.seconds - 1
    tiles = f"{s.token_chunk} x {s.block or 'all'}"
    why = f"{more:+.0%}" if more > 0 else f"{more:+.0%}, but {other.memory / max(1, chosen.memory) - 1:+.0%} memory"
    return (
        f"{s.name}, {tiles}, {s.products(request.n_grads):.2f} products, {other.memory / (1 << 20):.1f} MiB: "
        f"{other.seconds * 1e3:.1f} ms ({why})"
    )


def lines(considered: tuple[Considered, ...]) -> Iterator[str]:
    """One for each schedule."""
    for c in considered:
        took = "" if c.seconds is None else f", {c.seconds * 1e3:.1f} ms"
        mib = 1 << 20
        yield (
            f"{'*' if c.is_chosen else ' '} {c.schedule}: {c.products:.2f} products, {c.memory_bytes / mib:.1f} MiB, "
            f"moves {c.bytes_moved / mib:.0f} MiB{took}"
        )
