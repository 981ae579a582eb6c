"""What the regression suite stores and compares with; that it runs is seen where pytest-benchmark is."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numerics
import pytest

from dpofast.bench import measure
from dpofast.bench import test_regression as regression


class Benchmark(SimpleNamespace):
    """The part of pytest-benchmark's fixture that the suite uses."""

    def pedantic(self, work, rounds, warmup_rounds):
        work()


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(regression, "BASELINE", tmp_path / "baseline.json")
    monkeypatch.setattr(regression, "SHAPE", (16, 8, 100))
    monkeypatch.delenv(regression.RENEW, raising=False)

    def run(ratio: float, case: str = "trained") -> None:
        turns = measure.Turns(ratio, 0.01, ratio, 1.0, ratio, ratio)
        monkeypatch.setattr(regression, "in_turns", lambda work, base, *_, **__: (work(), base(), turns)[-1])
        with numerics.threads(1):
            regression.test_ratio_to_the_bare_products(case, "fp32", Benchmark(extra_info={}))

    return run


def test_without_a_stored_ratio_the_message_says_how_to_store_one(run):
    with pytest.raises(pytest.skip.Exception, match=r"no ratio of trained, fp32 is stored for cpu:\w+: .*=1 stores"):
        run(1.0)


@pytest.mark.parametrize("case", regression.CASES)
def test_a_renewed_ratio_is_what_is_compared_with(run, case, monkeypatch):
    monkeypatch.setenv(regression.RENEW, "1")
    run(0.5, case)
    monkeypatch.delenv(regression.RENEW)
    (kept,) = json.loads(regression.BASELINE.read_text()).values()
    assert kept["ratios"] == {f"{case}, fp32": 0.5} and kept["machine"]["date"]
    run(0.5 * regression.TOLERANCE, case)
    with pytest.raises(AssertionError, match=f"{case}, fp32: 0.660 of the products' time, stored 0.500"):
        run(0.66, case)
