"""The examples in public docstrings run, and every public function of the core has one."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import dpofast

MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(dpofast.__path__, "dpofast.")
    if not name.startswith("dpofast.demo") and not name.endswith("__main__") and name != "dpofast._C"
]
OF_OTHERS = ("axolotl", "llamafactory")  # trainers that have environments of their own


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    if name.rpartition(".")[2] in OF_OTHERS:
        pytest.importorskip(name.rpartition(".")[2])
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("name", [n for n in dpofast.__all__ if callable(getattr(dpofast, n)) and n[0].islower()])
def test_every_public_function_has_an_example(name):
    assert ">>>" in getattr(dpofast, name).__doc__
