"""Lightning's Trainer with dpofast and with plain PyTorch: every logged number and every parameter, on a tiny model.

What is trained is the example's module, so that the example is what is proven. Steps are taken with SGD, as in
`training.py`; with momentum, so that the optimizer has a state to resume.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("transformers")

import lightning
import lightning_loop
import tiny
import training
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from torch.utils.data import DataLoader

from dpofast import primitive

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """One entry for each call of dpofast's primitive."""
    choose, seen = primitive.chosen, []
    monkeypatch.setattr(primitive, "chosen", lambda *args, **kwargs: seen.append(args) or choose(*args, **kwargs))
    return seen


class Recorder(Logger):
    """Keeps what Lightning logs."""

    name, version = "recorder", 0

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics, step=None) -> None:
        self.entries.append((step, dict(metrics)))

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        pass


class Plain:
    """What `linear_dpo_loss` returns, as far as the module uses it, from logits."""

    def __init__(self, policy, ref, inputs, labels) -> None:
        shifted = labels[:, 1:]
        counts = shifted != -100

        def logps_of(model):
            logits = model(**inputs, use_cache=False).logits[:, :-1]
            logps = logits.log_softmax(-1)
            own = logps.gather(-1, shifted.clamp(min=0)[..., None])[..., 0]
            return logits, logps, (own * counts).sum(-1)

        with torch.no_grad():
            ref_logps = logps_of(ref)[2]
        logits, logps, sums = logps_of(policy)
        self.chosen_logps, self.rejected_logps = sums.chunk(2)
        chosen, rejected = (0.1 * (sums - ref_logps)).chunk(2)
        self.loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
        of_chosen, of_rejected = (logits.mean(-1)[half][counts[half]].mean() for half in self._halves(len(sums)))
        right = (logits.argmax(-1) == shifted)[: len(chosen)][counts[: len(chosen)]]
        self._metrics = {
            "rewards/chosen": chosen.mean(),
            "rewards/rejected": rejected.mean(),
            "rewards/accuracies": (chosen > rejected).float().mean(),
            "rewards/margins": (chosen - rejected).mean(),
            "logps/chosen": self.chosen_logps.mean(),
            "logps/rejected": self.rejected_logps.mean(),
            "logits/chosen": of_chosen,
            "logits/rejected": of_rejected,
            "entropy": -(logps.exp() * logps).sum(-1)[counts].mean(),
            "mean_token_accuracy": right.float().mean(),
        }

    @staticmethod
    def _halves(count: int) -> tuple[slice, slice]:
        return slice(count // 2), slice(count // 2, None)

    def metrics(self) -> dict[str, torch.Tensor]:
        return {name: value.detach() for name, value in self._metrics.items()}


def module_of(plain: bool) -> lightning.LightningModule:
    class PlainModule(lightning_loop.PreferenceModule):
        def preference_loss(self, inputs, labels):
            return Plain(self.model, self.ref_model, inputs, labels)

    policy, ref = tiny.model(), tiny.model()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in ref.parameters():  # a reference of its own, so that no reward is rounding noise
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return (PlainModule if plain else lightning_loop.PreferenceModule)(
        policy, ref, lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.5)
    )


def fit(module, steps: int, ckpt_path=None, **options) -> list[tuple[int, dict[str, float]]]:
    """Batches of 4 pairs, 5 an epoch, and a validation at each epoch's end; returns what was logged."""
    recorder = Recorder()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=recorder,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_progress_bar=False,
        **{"enable_checkpointing": False, **options},
    )
    rows = tiny.pairs(26)
    train, validation = (DataLoader(part, batch_size=4, collate_fn=tiny.collate) for part in (rows[:20], rows[20:]))
    trainer.fit(module, train, validation, ckpt_path=ckpt_path)
    assert trainer.global_step == steps
    return recorder.entries


def assert_same_log(found, wanted) -> None:
    assert len(found) == len(wanted) > 0
    for (step, mine), (wanted_step, theirs) in zip(found, wanted):
        assert step == wanted_step and mine.keys() == theirs.keys()
        for name, value in theirs.items():
            # rewards are beta times a difference of log-probabilities of some tens, in fp32
            assert mine[name] == pytest.approx(value, rel=1e-5, abs=2e-6), (step, name)


def assert_same_parameters(found, wanted, start) -> None:
    found, wanted, start = (dict(module.model.named_parameters()) for module in (found, wanted, start))
    training.assert_same_weights(found, wanted)
    training.assert_trained(wanted, start, least=1e-2)


@pytest.mark.parametrize(("accumulate", "batches"), [(1, 20), (2, 20 + 20 // 2)])
def test_twenty_steps_log_and_learn_what_plain_pytorch_does(accumulate, batches, calls):
    options = {"accumulate_grad_batches": accumulate}
    theirs = module_of(plain=True)
    wanted = fit(theirs, 20, **options)
    assert not calls
    ours = module_of(plain=False)
    found = fit(ours, 20, **options)
    assert calls and len(ours.losses) == len(theirs.losses) >= batches
    assert sum("val/loss" in entry for _, entry in found) >= 4
    assert {"train/rewards/margins", "train/entropy", "train/logits/rejected"} <= set().union(*(e for _, e in found))
    assert_same_log(found, wanted)
    assert_same_parameters(ours, theirs, module_of(plain=True))


def test_accumulating_gradients_is_a_larger_batch(calls):
    """Batches of 2 pairs, 4 a step, against 8 at once; without momentum or validation."""
    trained = []
    for accumulate in (4, 1):
        module = lightning_loop.PreferenceModule(
            tiny.model(), tiny.model(), lambda parameters: torch.optim.SGD(parameters, lr=0.5)
        )
        trainer = lightning.Trainer(
            accelerator="cpu", max_steps=3, accumulate_grad_batches=accumulate, logger=False,
            enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
        )  # fmt: skip
        rows = DataLoader(tiny.pairs(24), batch_size=8 // accumulate, collate_fn=tiny.collate)
        trainer.fit(module, rows)
        assert len(module.losses) == 3 * accumulate
        trained.append(module)
    parts, whole = (dict(module.model.named_parameters()) for module in trained)
    start = dict(tiny.model().named_parameters())
    moved = max((whole[name] - start[name]).abs().max() for name in start)
    assert calls and moved > 1e-2, "training changed nothing, and so the comparison shows nothing"
    for name, parameter in parts.items():
        assert (parameter - whole[name]).abs().max() < 1e-4 * moved, name


def test_ten_steps_saved_and_ten_more_are_twenty(calls, tmp_path):
    straight, theirs = module_of(plain=False), module_of(plain=True)
    wanted, plain = fit(straight, 20), fit(theirs, 20)
    saving = ModelCheckpoint(tmp_path, "half", save_on_train_epoch_end=True)
    first = fit(module_of(plain=False), 10, enable_checkpointing=True, callbacks=[saving])
    resumed = module_of(plain=False)
    second = fit(resumed, 20, ckpt_path=tmp_path / "half.ckpt")
    assert len(resumed.losses) == 10 and calls
    # To the bit. The step that an entry is filed under is Lightning's, which counts one more in a resumed run.
    assert [entry for _, entry in first + second] == [entry for _, entry in wanted]
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, dict(straight.model.named_parameters())[name]), name
    assert_same_log(wanted, plain)
    assert_same_parameters(resumed, theirs, module_of(plain=True))


def test_the_example_runs_on_dpofast_and_learns(calls):
    losses = lightning_loop.main()
    assert len(losses) == 20 and len(calls) == 2 * 20  # policy and reference
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # log 2: the policy is the reference at the start
    assert losses[-1] < losses[0] - 0.05
