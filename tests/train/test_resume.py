"""A training that was interrupted ends as one that was not, to the bit; see `killed.py` for a hundred kills."""

from __future__ import annotations

import collections
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("rich")

from train import killed, tiny_run

from dpofast.train import checkpoint, engine
from dpofast.train.config import from_dict
from dpofast.train.run import train

pytestmark = pytest.mark.usefixtures("quick")
Usage = collections.namedtuple("Usage", "total used free")
WAYS = {
    "full": {},
    "LoRA with dropout": {"lora_rank": 2, "lora_dropout": 0.3},
    "bf16, prompt shared": {"precision": "bf16", "share_prompt": True},
}


@pytest.fixture(scope="module", params=WAYS)
def whole(request, tmp_path_factory):
    """A folder with a run that nobody interrupts, its options and what it leaves."""
    folder = tmp_path_factory.mktemp("whole")
    others = WAYS[request.param]
    train(from_dict(tiny_run.options(folder, **others), "test"))
    return folder, others, killed.result(folder / "run")


def interrupted(folder, out, **others):
    return from_dict(tiny_run.options(folder, **others) | {"out": str(folder / out), "resume": True}, "test")


def signalling(monkeypatch, number, method, at):
    """Let the ``at``-th call of a method of `Training` begin with a signal to this process."""
    calls, real = [], getattr(engine.Training, method)

    def noted(self, *args):
        calls.append(None)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return real(self, *args)

    monkeypatch.setattr(engine.Training, method, noted)


@pytest.mark.parametrize(
    ("number", "method", "at", "saved"),
    [(signal.SIGINT, "step", 3, 3), (signal.SIGTERM, "step", 4, 4), (signal.SIGTERM, "_held_out", 2, 4)],
)
def test_a_signal_saves_and_leaves_and_the_rest_is_as_if_it_had_not_come(whole, monkeypatch, number, method, at, saved):
    folder, others, wanted = whole
    run = interrupted(folder, f"signal{number}{method}", **others)
    with monkeypatch.context() as patch:
        signalling(patch, number, method, at)
        outcome = train(run)
    assert (outcome.step, outcome.signal) == (saved, number)
    assert checkpoint.steps(Path(run.out) / "checkpoints")[0] == saved
    assert train(run).signal is None
    killed.expect_same(killed.result(Path(run.out)), wanted)
    assert signal.getsignal(number) is not None


def test_kills_at_random_moments_change_nothing(tmp_path):
    killed.kill_often(tmp_path, 5, seed=3)


def test_a_disk_that_fills_up_takes_nothing_with_it(whole, monkeypatch):
    folder, others, wanted = whole
    run = interrupted(folder, "disk", **others)
    real, calls = torch.save, []

    def full(value, path):
        calls.append(path)
        if len(calls) == 3:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(value, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(checkpoint.NoRoom, match="no checkpoint of step 4"):
            train(run)
    root = Path(run.out) / "checkpoints"
    assert sorted(path.name for path in root.iterdir()) == ["step-00000000", "step-00000002"]  # the best, the last
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 1 << 20))
        with pytest.raises(checkpoint.NoRoom, match="nothing was written"):
            train(run)
    train(run)
    killed.expect_same(killed.result(Path(run.out)), wanted)


def ended_with_files_up_to(size: int, run) -> str:
    """How a run ends in a process whose files the kernel does not let grow beyond so many bytes."""
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            train(run)
            said = "ended"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(send, said.encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(send)
    with os.fdopen(receive) as said:
        return said.read()


@pytest.mark.parametrize("way", ("full", "LoRA with dropout"))
@pytest.mark.parametrize("name", ("model", "trainer.pt"))
def test_writes_that_fail_take_nothing_with_them(tmp_path, monkeypatch, way, name):
    """Not a pretended error: the kernel refuses to write on in the file, after a part of it, as on a full disk."""
    run = interrupted(tmp_path, "run", **WAYS[way])
    train(interrupted(tmp_path, "whole", **WAYS[way]))
    with monkeypatch.context() as patch:
        signalling(patch, signal.SIGINT, "step", 3)
        train(run)
    root = Path(run.out) / "checkpoints"
    file = next(root.joinpath("step-00000003").glob("*.safetensors" if name == "model" else name))
    said = ended_with_files_up_to(file.stat().st_size - 100, run)
    assert said.startswith("NoRoom: ") and "no checkpoint of step 4" in said and "go on with --resume" in said
    assert [path.name for path in root.iterdir() if not path.name.startswith("step-00000000")] == ["step-00000003"]
    train(run)
    killed.expect_same(killed.result(Path(run.out)), killed.result(tmp_path / "whole"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_leads_to_the_same(whole, capsys, monkeypatch):
    folder, others, wanted = whole
    run = interrupted(folder, "damaged", keep=2, **others)
    with monkeypatch.context() as patch:
        signalling(patch, signal.SIGINT, "step", 5)
        train(run)
    path = Path(run.out) / "checkpoints" / "step-00000005" / "trainer.pt"
    path.write_bytes(path.read_bytes()[:-1])
    train(run)
    shown = capsys.readouterr().out
    assert f"{path}: has" in shown and "set aside as step-00000005.damaged" in shown and "after step 4" in shown
    killed.expect_same(killed.result(Path(run.out)), wanted)


def test_a_run_that_has_ended_resumes_to_itself(whole):
    folder, others, wanted = whole
    train(interrupted(folder, "run", **others))
    killed.expect_same(killed.result(folder / "run"), wanted)


# One way of training is enough for what follows


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ended")
    train(from_dict(tiny_run.options(folder), "test"))
    return folder


def test_a_run_is_never_written_over(ended):
    with pytest.raises(ValueError, match="out: .*has a run of 8 steps; pass --resume"):
        train(from_dict(tiny_run.options(ended), "test"))


@pytest.mark.parametrize(("name", "value"), [("beta", 0.2), ("batch_size", 2), ("seed", 1)])
def test_another_option_is_refused_by_name(ended, name, value):
    with pytest.raises(ValueError, match=f"resume: .*{name}: was .*, is {value}"):
        train(interrupted(ended, "run", **{name: value}))


def test_other_data_or_another_model_are_refused_and_what_was_kept_of_the_reference_too(tmp_path):
    run = interrupted(tmp_path, "run", references=str(tmp_path / "kept.bin"))
    train(run)
    before = (tmp_path / "kept.bin").read_bytes()
    data = tmp_path / "train.jsonl"
    data.write_text(data.read_text() + json.dumps({"prompt": "w1", "chosen": "w2", "rejected": "w3"}) + "\n")
    with pytest.raises(ValueError, match="resume: .*data has changed"):
        train(run)
    with pytest.raises(ValueError, match="references: .*made with another data"):
        train(interrupted(tmp_path, "other", references=str(tmp_path / "kept.bin")))
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(ValueError, match="resume: .*model has changed"):
        train(run)
    assert (tmp_path / "kept.bin").read_bytes() == before


def test_tensorboard_shows_each_step_once(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = interrupted(tmp_path, "run", tensorboard=True)
    with monkeypatch.context() as patch:
        signalling(patch, signal.SIGINT, "step", 3)
        train(run)
    train(run)
    shown = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    for name in ("loss", "eval/loss"):
        wanted = [(entry["step"], pytest.approx(entry[name])) for entry in entries if name in entry]
        assert [(each.step, each.value) for each in shown.Scalars(name)] == wanted


def test_references_are_computed_once(ended, monkeypatch):
    kept = str(ended / "run" / "references.bin")
    monkeypatch.setattr(engine.Training, "_reference_logps", None)
    train(interrupted(ended, "again", references=kept))
    killed.expect_same(killed.result(ended / "again"), killed.result(ended / "run"))


def test_a_signal_while_the_reference_is_scored_leaves_what_is_done(ended, monkeypatch):
    run = interrupted(ended, "early")
    with monkeypatch.context() as patch:
        signalling(patch, signal.SIGINT, "_reference_logps", 3)
        assert train(run).signal == signal.SIGINT
    kept = (ended / "early" / "references.bin").read_bytes()
    whole = (ended / "run" / "references.bin").read_bytes()
    assert 0 < len(kept) < len(whole) and whole.startswith(kept)
    train(run)
    killed.expect_same(killed.result(ended / "early"), killed.result(ended / "run"))
