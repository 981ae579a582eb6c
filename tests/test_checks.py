"""Arguments are checked once, and every error of one begins with its name."""

from __future__ import annotations

import ast
import inspect
import pkgutil
from pathlib import Path

import pytest
import torch

import dpofast
from dpofast import checks

HIDDEN, WEIGHT, LABELS = torch.randn(4, 3, 8), torch.randn(20, 8), torch.randint(20, (4, 3))
LOGITS, LOGPS = torch.randn(4, 3, 20), torch.randn(4, 3)
PACKED = {"cu_seqlens": torch.tensor([0, 3, 6, 9, 12])}
DOORS = {
    "linear_logprob": lambda: dpofast.linear_logprob(HIDDEN, WEIGHT, LABELS),
    "logprob": lambda: dpofast.logprob(LOGITS, LABELS),
    "linear_dpo_loss": lambda: dpofast.linear_dpo_loss(
        HIDDEN, WEIGHT, LABELS, ref_hidden=HIDDEN, ref_weight=WEIGHT, use_weighting=True, ld_alpha=0.5, metrics=True
    ),
    "linear_dpo_loss, packed": lambda: dpofast.linear_dpo_loss(
        HIDDEN.view(12, 8), WEIGHT, LABELS.view(12), ref_hidden=HIDDEN.view(12, 8), ref_weight=WEIGHT, **PACKED
    ),
    "dpo_loss": lambda: dpofast.dpo_loss(LOGITS, LABELS, ref_logits=LOGITS, loss_type=["sigmoid", "sft"]),
    "sequence_logps": lambda: dpofast.sequence_logps(LOGPS.view(12), LABELS.view(12), ld_alpha=0.5, **PACKED),
    "wpo_weights": lambda: dpofast.wpo_weights(LOGPS, LOGPS, LABELS),
}


@pytest.mark.parametrize("door", DOORS)
def test_labels_and_boundaries_are_checked_once(door, monkeypatch):
    """Whatever a loss scores and sums, with a reference and every statistic."""
    seen = []
    for name in ("integers", "boundaries"):
        check = getattr(checks, name)
        monkeypatch.setattr(checks, name, lambda *args, name=name, check=check: (seen.append(name), check(*args))[1])
    DOORS[door]()
    packed = "packed" in door or door == "sequence_logps"
    assert seen == ["integers", "boundaries"] if packed else seen == ["integers"]


def modules() -> list[str]:
    """The package's own, but for the demo's."""
    names = [name for _, name, _ in pkgutil.walk_packages(dpofast.__path__, "dpofast.")]
    return sorted(name for name in names if not name.startswith(("dpofast.demo", "dpofast.kernels", "dpofast.bench")))


def first_words(node: ast.expr) -> str | None:
    """The message of an error as it is written, a value that it shows as ``{}``; None: not written there."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(x.value if isinstance(x, ast.Constant) else "{}" for x in node.values)
    return None


def test_every_error_of_an_argument_begins_with_its_name():
    """``name: got X, expected Y``, or ``name:`` and a sentence."""
    files = [Path(dpofast.__path__[0], *name.split(".")[1:]) for name in modules()]
    files = [f / "__init__.py" if f.is_dir() else f.with_suffix(".py") for f in files]
    found, strange = 0, []
    for file in (f for f in files if f.exists()):
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
                continue
            kind, words = getattr(node.exc.func, "id", ""), first_words(node.exc.args[0])
            if kind in ("ValueError", "TypeError") and words is not None:
                found += 1
                name, colon, _ = words.partition(": ")
                if not colon or " " in name.replace("{}", "x"):
                    strange.append(f"{file.name}:{node.lineno}: {words}")
    assert found > 20 and not strange


def test_there_is_one_check_of_density():
    sources = [inspect.getsource(checks), *(p.read_text() for p in Path(dpofast.__path__[0]).rglob("*.py"))]
    assert sum("is_nested" in source for source in sources[1:]) == 1
