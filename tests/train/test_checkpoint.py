"""Checkpoints are whole or not there, whatever ends a process or fills a disk."""

from __future__ import annotations

import collections
import errno
import shutil

import pytest

from dpofast.train import checkpoint, state

Usage = collections.namedtuple("Usage", "total used free")


def fill(text: str = "x" * 1000):
    def write(folder):
        (folder / "a").write_text(text)
        (folder / "deep").mkdir()
        (folder / "deep" / "b").write_text(text)

    return write


@pytest.fixture
def root(tmp_path):
    """A folder with a checkpoint of step 2."""
    checkpoint.write(tmp_path / "checkpoints", 2, fill(), 2000)
    return tmp_path / "checkpoints"


def content(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_what_is_written_is_read_and_nothing_else_is_left(root):
    folder = checkpoint.write(root, 4, fill("y"), 2)
    checkpoint.check(folder)
    assert (folder / "deep" / "b").read_text() == "y"
    assert checkpoint.steps(root) == [4, 2] and len(list(root.iterdir())) == 2
    assert state.newest(root) == (folder, [])


def test_no_room_is_said_before_anything_is_written(root, monkeypatch):
    before = content(root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 100 << 20))
    touched = []
    with pytest.raises(checkpoint.NoRoom, match=r"no checkpoint of step 4.* about 50 MiB where 100 MiB"):
        checkpoint.write(root, 4, touched.append, 50 << 20)
    assert not touched and content(root) == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_write_that_fails_leaves_the_checkpoint_before_it_and_no_half(root, code):
    before = content(root)

    def fails(folder):
        (folder / "a").write_text("half")
        raise OSError(code, "no more")

    with pytest.raises(checkpoint.NoRoom, match="writing stopped: .*no more"):
        checkpoint.write(root, 4, fails, 10)
    assert content(root) == before and checkpoint.steps(root) == [2]
    checkpoint.write(root, 4, fill(), 10)
    assert checkpoint.steps(root) == [4, 2]


def test_one_that_was_not_written_to_its_end_is_named_and_left_out(root):
    def dies(folder):
        (folder / "a").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(root, 4, dies, 10)
    assert checkpoint.steps(root) == [2]
    found, notes = state.newest(root)
    assert found == checkpoint.folder_of(root, 2)
    assert len(notes) == 1 and "step-00000004.unfinished: was not written to its end" in notes[0]
    assert len(list(root.iterdir())) == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "a").unlink(), "a: is missing"),
        (lambda f: (f / "a").write_text("x"), "a: has 1 bytes, 1000 were written"),
        (lambda f: (f / "deep" / "b").write_text("y" + "x" * 999), "b: its content is not what was written"),
        (lambda f: (f / "manifest.json").unlink(), "has no readable manifest.json"),
        (lambda f: (f / "manifest.json").write_text('{"files": {"a"'), "has no readable manifest.json"),
    ],
)
def test_a_damaged_one_is_named_set_aside_and_the_one_before_is_taken(root, damage, message):
    folder = checkpoint.write(root, 4, fill(), 10)
    damage(folder)
    found, (note,) = state.newest(root)
    assert found == checkpoint.folder_of(root, 2)
    assert message in note and "set aside as step-00000004.damaged" in note
    assert checkpoint.steps(root) == [2] and (root / "step-00000004.damaged").is_dir()


def test_where_none_can_be_read_each_is_named_and_nothing_is_touched(root):
    checkpoint.write(root, 4, fill(), 10)
    for step in (2, 4):
        (checkpoint.folder_of(root, step) / "a").unlink()
    before = content(root)
    with pytest.raises(checkpoint.Unreadable, match=r"step-00000004/a: .*step-00000002/a: .*remove .* to begin again"):
        state.newest(root)
    assert content(root) == before


def test_others_are_removed_and_one_half_removed_is_no_checkpoint(root):
    for step in (4, 6):
        checkpoint.write(root, step, fill(), 10)
    checkpoint.remove_but(root, {2, 6})
    assert checkpoint.steps(root) == [6, 2]
    (root / "step-00000004.removed").mkdir()  # a process that was killed while it removed
    assert state.newest(root) == (checkpoint.folder_of(root, 6), [])
    assert not (root / "step-00000004.removed").exists()


def test_a_link_leads_elsewhere_without_a_moment_of_nowhere(root):
    link = root.parent / "last"
    for step in (2, 2):
        state.point(link, checkpoint.folder_of(root, step))
        assert (link / "a").exists()


def test_the_best_is_the_least_and_worse_ones_are_counted():
    position = state.Position()
    assert [position.judge(value) for value in (3.0, 3.0, 4.0, 2.0, float("nan"))] == [True, False, False, True, False]
    assert (position.best, position.worse) == (2.0, 1)
