"""What editors are told of the losses' keywords is what the losses take."""

from __future__ import annotations

import inspect

import pytest

import dpofast
from dpofast import losses, options
from dpofast.functional import dpo_loss, linear_dpo_loss, make_objective
from dpofast.integrations.models import model_dpo_loss
from dpofast.primitive import linear_logprob, logprob

NAMED = {"loss_type", "beta", "label_smoothing", "reduction"}
DOORS = (
    (linear_dpo_loss, linear_logprob, options.LinearLossOptions, {"memory_budget", "backend", "group"}),
    (dpo_loss, logprob, options.LogitsLossOptions, {"backend"}),
)


def keywords(function) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize("door, primitive, listed, named", DOORS)
def test_every_keyword_is_in_the_signature_or_in_the_list_and_in_one_of_them(door, primitive, listed, named):
    own = {*NAMED, *named, "sequence_group", "ignore_index", "cu_seqlens", "ref_logps"}
    assert own <= keywords(door)
    of_pairs = {name for name in losses.OPTIONS if "desirable" not in name} - {"weight"}
    of_head = keywords(primitive) - {"bias", "ignore_index", "outputs"}
    of_sequences = keywords(make_objective)
    assert set(listed.__annotations__) | keywords(door) >= of_pairs | of_head | of_sequences
    inherited = set().union(*(base.__annotations__ for base in (options.PairOptions, options.LossOptions, listed)))
    assert inherited == (of_pairs | of_head | of_sequences) - keywords(door)


@pytest.mark.parametrize("named", [
    (dpofast.LinearDPOLoss, linear_dpo_loss), (dpofast.DPOLoss, dpo_loss), (model_dpo_loss, linear_dpo_loss),
], ids=("LinearDPOLoss", "DPOLoss", "model_dpo_loss"))  # fmt: skip
def test_what_matters_is_in_every_signature_with_the_same_default(named):
    ours, theirs = (inspect.signature(x).parameters for x in named)
    important = NAMED | ({"memory_budget", "backend", "group", "sequence_group"} & set(theirs))
    assert important <= set(ours)
    assert {name: ours[name].default for name in important} == {name: theirs[name].default for name in important}
