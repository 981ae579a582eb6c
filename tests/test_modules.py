"""The modules: the same numbers as the functions, options checked at construction."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from dpofast.functional import dpo_loss, linear_dpo_loss
from dpofast.modules import DPOLoss, LinearDPOLoss, LinearLogprob
from dpofast.primitive import linear_logprob

B, T, H, V = 2, 3, 4, 7
GENERATOR = torch.Generator().manual_seed(0)
HIDDEN = torch.randn(2 * B, T, H, generator=GENERATOR)
WEIGHT, BIAS = torch.randn(V, H, generator=GENERATOR), torch.randn(V, generator=GENERATOR)
LABELS = torch.randint(V, (2 * B, T), generator=GENERATOR)
REF = torch.randn(2 * B, T, generator=GENERATOR)


def copies(module):
    return module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))


def test_linear_logprob_equals_the_function():
    options = {"outputs": ("entropy",), "temperature": 0.5, "ignore_index": 2}
    expected = linear_logprob(HIDDEN, WEIGHT, LABELS, bias=BIAS, **options)
    for module in copies(LinearLogprob(**options)):
        out = module(HIDDEN, WEIGHT, LABELS, BIAS)
        torch.testing.assert_close(out._asdict(), expected._asdict(), rtol=0, atol=0)


def test_linear_dpo_loss_equals_the_function_and_takes_the_batch_at_the_call():
    options = {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.5, "softcap": 3.0, "metrics": True}
    tensors = {"ref_logps": REF, "bias": BIAS, "token_weights": REF.abs()}
    tensors["margin"] = {"sigmoid": torch.tensor([0.1, 0.2])}
    expected = linear_dpo_loss(HIDDEN, WEIGHT, LABELS, **options, **tensors)
    for module in copies(LinearDPOLoss(**options)):
        out = module(HIDDEN, WEIGHT, LABELS, **tensors)
        torch.testing.assert_close(out._asdict(), expected._asdict(), rtol=0, atol=0)


def test_dpo_loss_equals_the_function():
    logits = HIDDEN @ WEIGHT.T
    tensors = {"ref_logps": REF, "token_weights": REF.abs()}
    expected = dpo_loss(logits, LABELS, **tensors, loss_type="ipo", temperature=2.0)
    for module in copies(DPOLoss(loss_type="ipo", temperature=2.0)):
        torch.testing.assert_close(module(logits, LABELS, **tensors).loss, expected.loss, rtol=0, atol=0)


def test_repr_shows_the_options():
    assert repr(DPOLoss(loss_type="hinge", beta=0.2)) == "DPOLoss(loss_type='hinge', beta=0.2)"
    assert repr(LinearLogprob(temperature=2.0)) == "LinearLogprob(temperature=2.0)"


@pytest.mark.parametrize(
    "make, options, error, message",
    [
        (LinearDPOLoss, {"beta": 0.0}, ValueError, "beta: got 0.0"),
        (
            LinearDPOLoss,
            {"loss_type": "hinge", "label_smoothing": 0.1},
            ValueError,
            "not defined for loss_type='hinge'",
        ),
        (LinearDPOLoss, {"reduction": "none?"}, ValueError, "reduction"),
        (LinearDPOLoss, {"temperatur": 1.0}, TypeError, "temperatur: not an option"),
        (LinearDPOLoss, {"temperature": -1.0}, ValueError, "temperature"),
        (LinearDPOLoss, {"memory_budget": "lots"}, ValueError, "memory_budget"),
        (LinearDPOLoss, {"inplace_grad": True}, TypeError, "inplace_grad"),  # is logprob's
        (LinearDPOLoss, {"margin": torch.zeros(2)}, TypeError, "margin: got a tensor"),
        (
            DPOLoss,
            {"token_weights": torch.ones(4, 3)},
            TypeError,
            "token_weights: got a tensor.*to forward",
        ),
        (DPOLoss, {"token_weights": 0.5}, TypeError, "token_weights: got float"),
        (DPOLoss, {"memory_budget": 1}, TypeError, "memory_budget"),  # is linear_logprob's
        (DPOLoss, {"softcap": 0.0}, ValueError, "softcap"),
        (LinearLogprob, {"beta": 0.1}, TypeError, "beta: not an option"),
        (LinearLogprob, {"outputs": ("entropie",)}, ValueError, "outputs"),
    ],
)
def test_options_are_checked_at_construction(make, options, error, message):
    with pytest.raises(error, match=message):
        make(**options)
