"""The regression suite: small heads on a CPU, as ratios to the bare products in turns, against stored ratios.

    pytest bench --benchmark-only                                 fails where a ratio is well above the stored one
    DPOFAST_RENEW_BASELINE=1 pytest bench --benchmark-only        stores this machine's ratios instead

Needs pytest-benchmark (``pip install dpofast[bench]``). baseline.json beside it has the ratios by instruction set, with
the machine and the date: the bare products are PyTorch's, and so a ratio is good for CPUs of a kind. Renew on an idle
machine, when a change of speed is meant or for an instruction set that has none yet, and commit the file.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import dpofast
from dpofast.bench.filter import FILTERS
from dpofast.bench.measure import DTYPES, in_turns, machine
from dpofast.bench.providers import Products, ours, training_step
from dpofast.bench.record import Record

HAS_PLUGIN = importlib.util.find_spec("pytest_benchmark") is not None
pytestmark = pytest.mark.skipif(not HAS_PLUGIN, reason="needs pytest-benchmark: pip install dpofast[bench]")
BASELINE = Path(__file__).with_name("baseline.json")
RENEW = "DPOFAST_RENEW_BASELINE"
SHAPE = 512, 256, 8192
ROUNDS, WARM = 40, 5
TOLERANCE = 1.3
"""Times the stored ratio. Two runs one after the other on two Zen 4 cores (2026-11-27) were up to 1.18 apart."""
CASES = {"trained": 3, "frozen": 2, "filter": 3, "score": 1}  # and the bare products of its gradients


def work_of(case: str, dtype: str) -> tuple[Callable[[], object], Callable[[], None]]:
    """A head's work and its bare products. A cut of 2**-14 keeps 1 % of the entries, as of a trained model's."""
    n, h, v = SHAPE
    g = torch.Generator().manual_seed(0)
    weight, labels = torch.randn(v, h, generator=g), torch.randint(v, (n,), generator=g)
    hidden = 0.05 * weight[labels] + 0.4 * torch.randn(n, h, generator=g)
    hidden, weight = hidden.to(DTYPES[dtype]), weight.to(DTYPES[dtype])
    products = Products(hidden, weight).first(CASES[case])
    provider = ours(memory_budget="1GiB", grad_filter=FILTERS[dtype][1] if case == "filter" else None)
    if case == "score":
        return lambda: provider(hidden, weight, labels), products
    return training_step(provider, hidden, weight, labels, case != "frozen")[0], products


def stored(baseline: dict, backend: str, name: str) -> float:
    """The ratio to compare with; skips where there is none."""
    ratio = baseline.get(backend, {}).get("ratios", {}).get(name)
    if ratio is None:
        pytest.skip(
            f"no ratio of {name} is stored for {backend}: {BASELINE.name} has {', '.join(baseline) or 'none'}; "
            f"{RENEW}=1 stores this machine's"
        )
    return ratio


def renew(backend: str, name: str, ratio: float) -> None:
    """Store a ratio, and where it was measured."""
    baseline = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    ratios = baseline.get(backend, {}).get("ratios", {}) | {name: round(ratio, 3)}
    baseline[backend] = {"machine": machine(), "ratios": ratios}
    BASELINE.write_text(json.dumps(baseline, indent=1) + "\n")


@pytest.mark.parametrize("dtype", FILTERS)
@pytest.mark.parametrize("case", CASES)
def test_ratio_to_the_bare_products(case: str, dtype: str, benchmark) -> None:
    backend, name = dpofast.plan(8, 8, 8, dtype, backend="cpu").backend, f"{case}, {dtype}"
    baseline = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    before = None if RENEW in os.environ else stored(baseline, backend, name)
    work, products = work_of(case, dtype)
    # Its rounds are for its table; what is compared is measured in turns.
    benchmark.pedantic(work, rounds=5, warmup_rounds=1)
    turns = in_turns(work, products, ROUNDS, warm=WARM)
    benchmark.extra_info["ratio"] = turns.ratio
    if before is None:
        renew(backend, name, turns.ratio)
        return
    facts = Record("regression", shape=SHAPE, dtype=dtype, case=case)
    print(f"{facts.of('time / products', turns.ratio, spread=turns.spread)}, stored {before}")
    assert turns.ratio <= TOLERANCE * before, f"{name}: {turns.ratio:.3f} of the products' time, stored {before:.3f}"
