"""The order of records: all of them in each epoch, another each time, and the same after a stop anywhere."""

from __future__ import annotations

import itertools
import json

import pytest

from dpofast import data

N = 23


@pytest.fixture
def records(tmp_path) -> data.Records:
    path = tmp_path / "x.jsonl"
    rows = ({"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(N))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data.read(path)


def epochs(order: data.Shuffle, count: int) -> list[list[str]]:
    return [[record.prompt for record in order] for _ in range(count)]


def test_an_epoch_has_every_record_once_in_an_order_of_its_own(records):
    first, second = epochs(data.shuffle(records, seed=3), 2)
    assert sorted(first) == sorted(second) == sorted(record.prompt for record in records)
    assert first != second and first != [record.prompt for record in records]
    assert epochs(data.shuffle(records, seed=3), 2) == [first, second]
    assert epochs(data.shuffle(records, seed=4), 1) != [first]


def flat(lists: list[list[str]]) -> list[str]:
    return list(itertools.chain.from_iterable(lists))


@pytest.mark.parametrize("stop", range(2 * N + 1))
def test_a_stop_anywhere_gives_the_same_order(records, stop):
    whole = flat(epochs(data.shuffle(records, seed=3), 3))
    order = data.shuffle(records, seed=3)
    endless = itertools.chain.from_iterable(itertools.repeat(order))
    before = [record.prompt for record in itertools.islice(endless, stop)]
    resumed = data.shuffle(records, seed=3)
    resumed.load_state_dict(json.loads(json.dumps(order.state_dict())))
    assert before == whole[:stop]
    assert flat(epochs(resumed, 3))[: 3 * N - stop] == whole[stop:]


def test_a_state_of_another_seed_or_of_other_data_is_refused(records):
    order = data.shuffle(records, seed=3)
    with pytest.raises(ValueError, match="state: got seed 3, expected 4"):
        data.shuffle(records, seed=4).load_state_dict(order.state_dict())
    with pytest.raises(ValueError, match="state: got records 23, expected 2"):
        data.shuffle("ab", seed=3).load_state_dict(order.state_dict())


def test_what_cannot_be_shuffled_says_so():
    with pytest.raises(TypeError, match="which can be read in its order alone"):
        data.shuffle(data.read(iter([{}])))
    with pytest.raises(ValueError, match="seed: got int -1, expected an int >= 0"):
        data.shuffle("ab", seed=-1)
    assert list(data.shuffle("")) == []
