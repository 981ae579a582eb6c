"""A head in slices on several ranks equals the whole head in one process (vocabulary.py says how)."""

from __future__ import annotations

import pytest
from ranks import launch, vocabulary


@pytest.fixture(scope="module", params=(2, 4))
def passed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    return launch.torchrun("vocabulary.py", request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", vocabulary.CASES)
def test_vocabulary_parallel(passed, case):
    assert case in passed
