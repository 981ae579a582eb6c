"""Two trainings of one model, with dpofast and without it: what a trainer is told, and what must come out the same.

Steps are taken with SGD: what is compared is then linear in the gradients. Under Adam, an element whose gradient is
rounding noise takes a step of full size, and of either sign.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from torch import Tensor

TIMINGS = ("runtime", "per_second", "total_flos", "time")


def arguments(path: Any, steps: int, **options: Any) -> dict[str, Any]:
    """Those of Transformers' Trainer and of all trainers made from it."""
    return {
        "output_dir": str(path),
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        **options,
    }


def without_timings(log_history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [
        {name: value for name, value in entry.items() if not any(word in name for word in TIMINGS)}
        for entry in log_history
    ]


def assert_same_numbers(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> None:
    assert len(found) == len(wanted) > 0
    for step, (mine, theirs) in enumerate(zip(found, wanted)):
        assert mine.keys() == theirs.keys()
        # rewards are beta times a difference of log-probabilities of some tens, in fp32
        atol = 2e-6 + 1e-7 * max((abs(value) for name, value in theirs.items() if "logps" in name), default=1.0)
        for name, value in theirs.items():
            if name.endswith("rewards/accuracies") and abs(theirs[name.replace("accuracies", "margins")]) < atol:
                continue  # policy and reference are the same, and which reward is larger is rounding
            assert mine[name] == pytest.approx(value, rel=1e-5, abs=atol), (step, name)


def assert_same_weights(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, weight in found.items():
        error = (weight - wanted[name]).abs().max()
        assert error <= 1e-5 * wanted[name].abs().max(), f"{name}: {error}"


def assert_trained(weights: Mapping[str, Tensor], start: Mapping[str, Tensor], least: float) -> None:
    moved = max(((weights[name] - start[name]).abs().max() / start[name].abs().max()).item() for name in start)
    assert moved > least, "training changed nothing, and so the comparison shows nothing"
