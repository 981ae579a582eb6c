"""Sequences split over several ranks equal sequences in one process (sequence.py says how)."""

from __future__ import annotations

import pytest
from ranks import launch, sequence


@pytest.fixture(scope="module", params=(2, 4))
def passed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    return launch.torchrun("sequence.py", request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", sequence.CASES)
def test_sequence_parallel(passed, case):
    assert case in passed
