"""Sequences split over several ranks equal sequences in one process (ranks_sequence.py says how)."""

from __future__ import annotations

import pytest
import ranks
import ranks_sequence


@pytest.fixture(scope="module", params=(2, 4))
def passed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    return ranks.torchrun("ranks_sequence.py", request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", ranks_sequence.CASES)
def test_sequence_parallel(passed, case):
    assert case in passed
