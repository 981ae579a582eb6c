"""What Python and C++ must number alike, they do."""

from __future__ import annotations

import pytest
import torch

from dpofast import contract, native

pytestmark = pytest.mark.skipif(native.C is None, reason="the compiled module is not there")


def test_the_numbers_are_those_of_the_compiled_module():
    compiled = native.C.contract()
    names = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}
    assert compiled["dtypes"] == {names[dtype]: code for dtype, code in contract.DTYPE_CODES.items()}
    assert compiled["outputs"] == {name: contract.flags((name,)) for name in contract.STATISTICS}
    assert compiled["stats"] == {name: row for name, row in vars(contract.Stat).items() if name.isupper()}
    assert compiled["floor_logp"] == contract.FLOOR_LOGP


def test_those_of_triton_are_too():
    device = pytest.importorskip("dpofast.kernels.device")
    assert device.STATS.value == contract.Stat.COUNT and device.FLOOR_LOGP.value == contract.FLOOR_LOGP


def test_a_mask_and_its_names():
    for mask in range(16):
        assert contract.flags(contract.wanted(mask)) == mask
