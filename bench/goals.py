"""What is aimed at, for each number that has a goal. Nothing else in bench/ knows a goal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from dpofast.bench.record import Record


class Goal(NamedTuple):
    """A limit that a number should not exceed, or, with ``least``, should reach."""

    limit: float
    text: str  # the limit, as a table says it
    least: bool = False

    def met(self, value: float) -> bool:
        return value >= self.limit if self.least else value <= self.limit


def _most(limit: float, text: str = "", **facts: Any) -> tuple[dict[str, Any], Goal]:
    return facts, Goal(limit, text or str(limit))


def _least(limit: float, text: str = "", **facts: Any) -> tuple[dict[str, Any], Goal]:
    return facts, Goal(limit, text or str(limit), least=True)


_TIME = {"suite": "head", "metric": "time / products"}
_ERROR = {"suite": "head", "metric": "error / plain PyTorch"}
_SMALL = {"suite": "hardware", "metric": "time / plain PyTorch"}
_GPU = {"suite": "gpu", "provider": "dpofast", "metric": "time / schedule's products"}

GOALS = (  # the first whose facts a record has
    _most(0.80, "0.80", **_TIME, backend="cpu:avx2", dtype="fp32", case="4GiB", workload="SmolLM2"),
    _most(0.62, **_TIME, backend="cpu:avx2", dtype="fp32", case="4GiB", workload="Gemma-3"),
    _most(0.85, **_TIME, dtype="fp32", head="trained", case="4GiB"),
    _most(0.92, **_TIME, dtype="bf16", head="trained", case="4GiB"),
    _most(0.92, **_TIME, dtype="bf16", head="frozen"),
    _most(1.25, **_TIME, dtype="bf16", head="trained", case="32MiB"),
    _most(0.2, **_ERROR, dtype="bf16", case="d hidden"),
    _most(1.0, **_ERROR, dtype="fp32"),
    _most(1.0, "budget + 32 MiB", suite="head", metric="peak memory / (budget + 32 MiB)"),
    _least(0.88, suite="hardware", case="micro-kernel", metric="share of the multiply-adds"),
    _least(0.80, "0.80", suite="hardware", case="whole op", metric="share of the multiply-adds"),
    _most(0.3, "0.3 ms more", suite="hardware", metric="time - plain PyTorch", shape=(8, 16, 100)),
    _most(1.5, **_SMALL, shape=(32, 64, 1000)),
    _most(0.9, **_SMALL, shape=(256, 256, 4096)),
    _most(0.9, **_SMALL, shape=(2048, 64, 1000)),
    _most(1.10, "1.10", **_GPU, head="trained", case="g kept"),
    _most(1.10, "1.10", **_GPU, head="frozen"),
    _most(1.15, **_GPU, head="trained", case="small budget"),
    _most(0.4, "0.4 ms", suite="calls", case="score"),
    _most(0.4, "0.4 ms", suite="calls", case="forward"),
    _most(0.4, "0.4 ms", suite="calls", case="forward + backward"),
    _least(0.85, suite="gpu", metric="share of copy bandwidth"),
)


def goal_of(record: Record) -> Goal | None:
    """The goal of a record, if it has one."""
    return next((goal for facts, goal in GOALS if all(getattr(record, k) == v for k, v in facts.items())), None)
