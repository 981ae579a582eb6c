"""The reference's log-probs on disk are those of this model and these data, or they are refused."""

from __future__ import annotations

import pytest
import torch

from dpofast.train.references import References, keys_of, model_identity

WHAT = {"reference": "m1", "data": "d1"}
KEYS = [bytes([i]) * 16 for i in range(4)]


def made(path, n=3):
    kept = References(path, WHAT)
    kept.add(KEYS[:n], [-1.5, -2.25, -3.0][:n])
    kept.sync()
    return kept


def test_what_was_added_is_there_in_the_order_asked_for(tmp_path):
    path = tmp_path / "r.bin"
    made(path)
    kept = References(path, WHAT)
    assert kept.has(KEYS[:3]) and not kept.has(KEYS) and len(kept) == 3
    assert kept.of([KEYS[2], KEYS[0], KEYS[2]]).tolist() == [-3.0, -1.5, -3.0]


@pytest.mark.parametrize("cut", [1, 19, 20, 21])
def test_a_part_of_a_record_is_cut_off_and_the_rest_is_kept(tmp_path, cut):
    path = tmp_path / "r.bin"
    made(path)
    path.write_bytes(path.read_bytes()[:-cut])
    kept = References(path, WHAT)
    whole = 2 if cut <= 20 else 1
    assert kept.has(KEYS[:whole]) and len(kept) == whole
    kept.add(KEYS[whole:], [-7.0] * (4 - whole))
    assert References(path, WHAT).of(KEYS[whole:]).tolist() == [-7.0] * (4 - whole)


def test_the_first_of_two_log_probs_of_a_sequence_stays(tmp_path):
    kept = made(tmp_path / "r.bin")
    kept.add(KEYS[:2], [-9.0, -9.0])
    for each in (kept, References(tmp_path / "r.bin", WHAT)):
        assert each.of(KEYS[:2]).tolist() == [-1.5, -2.25]


@pytest.mark.parametrize("name", WHAT)
def test_those_of_another_model_or_data_are_refused_by_name_and_stay(tmp_path, name):
    path = tmp_path / "r.bin"
    made(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"references: .*made with another {name}, .*remove that file"):
        References(path, {**WHAT, name: "other"})
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"{", b"not this\n" + b"x" * 40, b"[]\n", b"7\n"])
def test_another_file_is_refused_and_stays(tmp_path, content):
    path = tmp_path / "r.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="references: "):
        References(path, WHAT)
    assert path.read_bytes() == content


def test_a_sequence_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="does not have every sequence"):
        made(tmp_path / "r.bin").of([KEYS[3]])


def test_a_rank_that_does_not_write_writes_nothing(tmp_path):
    path = tmp_path / "r.bin"
    made(path)
    before = path.read_bytes()
    kept = References(path, WHAT, writes=False)
    kept.add([KEYS[3]], [-1.0])
    assert kept.of([KEYS[3]]).tolist() == [-1.0] and path.read_bytes() == before


def test_a_key_is_of_tokens_and_of_what_counts_wherever_the_padding_is():
    def key(ids, mask, labels):
        return keys_of(*(torch.tensor([x]) for x in (ids, mask, labels)))[0]

    one = key([5, 6, 7], [1, 1, 1], [-100, 6, 7])
    assert (
        one
        == key([5, 6, 7, 0], [1, 1, 1, 0], [-100, 6, 7, -100])
        == key([9, 5, 6, 7], [0, 1, 1, 1], [-100] * 2 + [6, 7])
    )
    others = [key([5, 6, 8], [1, 1, 1], [-100, 6, 8]), key([5, 6, 7], [1, 1, 1], [-100, -100, 7]),
              key([5, 6, 7, 7], [1, 1, 1, 1], [-100, 6, 7, 7])]  # fmt: skip
    assert len({one, *others}) == 4


def test_a_models_identity_is_its_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    before = model_identity(str(tmp_path))
    (tmp_path / "notes").write_text("of no concern")
    assert model_identity(str(tmp_path)) == before
    (tmp_path / "model.safetensors").write_bytes(b"abd")
    assert model_identity(str(tmp_path)) != before
    with pytest.raises(ValueError, match="model: got "):
        model_identity(str(tmp_path / "none"))
