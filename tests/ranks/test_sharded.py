"""Models in the wrappers that people train with, on two ranks: the parameters of one process that has all the pairs.

The cases are in `sharded.py`, and those of DeepSpeed, which is slow to import, in `zero3.py`.
"""

from __future__ import annotations

import pytest
from ranks import launch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("trl", minversion="1.16")

CASES = (
    "data_parallel",
    "data_parallel_that_looks_for_unused_parameters",
    "data_parallel_with_a_static_graph",
    "fsdp2",
    "fsdp2_tied",
    "fsdp2_with_a_sharded_reference",
    "fsdp2_with_adapters_disabled_for_the_reference",
    "an_adapter_on_the_head",
    "fsdp2_checkpointed",
    "a_rank_without_labels",
    "fsdp2_accumulates",
    "fsdp2_scores_without_gradient",
    "the_first_call_draws_the_random_numbers_of_every_other",
    "fsdp2_in_bf16",
    "the_whole_head_is_gone_between_forward_and_backward",
    "what_cannot_work_is_refused",
    "trl_in_data_parallel",
    "trl_in_fsdp2",
)
ZERO3_CASES = (
    "zero3",
    "zero3_tied",
    "zero3_with_a_sharded_reference",
    "zero3_with_adapters_disabled_for_the_reference",
    "zero3_where_a_rank_has_no_label",
    "zero3_accumulating",
    "trl_in_zero3",
    "an_adapter_on_the_head",
    "trl_refuses_a_head_that_is_gone_in_the_backward",
)


@pytest.fixture(scope="module")
def passed(tmp_path_factory) -> set[str]:
    return launch.torchrun("sharded.py", 2, tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def passed_in_zero3(tmp_path_factory) -> set[str]:
    pytest.importorskip("deepspeed")
    return launch.torchrun("zero3.py", 2, tmp_path_factory.mktemp("zero3"))


@pytest.mark.parametrize("case", CASES)
def test_on_two_ranks(case, passed):
    assert case in passed


@pytest.mark.parametrize("case", ZERO3_CASES)
def test_on_two_ranks_in_zero3(case, passed_in_zero3):
    assert case in passed_in_zero3
