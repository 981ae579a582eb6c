"""What editors are told of the losses' keywords is what the losses take."""

from __future__ import annotations

import inspect

import pytest

import dpofast
from dpofast import lists, losses, options
from dpofast.functional import dpo_loss, linear_dpo_loss, make_objective
from dpofast.integrations.models import model_dpo_loss
from dpofast.primitive import linear_logprob, logprob
from dpofast.sequence_losses import linear_list_loss, linear_unpaired_loss, list_objective, unpaired_objective

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


@pytest.mark.parametrize("door, objective, table, listed, weight", [
    (linear_list_loss, list_objective, lists.LIST_LOSSES, options.LinearListOptions, "list_weight"),
    (linear_unpaired_loss, unpaired_objective, losses.UNPAIRED_LOSSES, options.LinearUnpairedOptions,
     "sequence_weight"),
])  # fmt: skip
def test_the_losses_of_lists_and_completions_name_every_option_of_their_table(door, objective, table, listed, weight):
    of_table = {name for loss in table.values() for name in loss.options} - {"weight"}
    of_head = keywords(linear_logprob) - {"bias", "ignore_index", "outputs"}
    several = {"loss_weights"} if table is lists.LIST_LOSSES else set()
    wanted = of_table | of_head | several | {weight, "token_weights", "metrics"}
    assert set(listed.__annotations__) == wanted - keywords(door)
    assert wanted <= set(listed.__annotations__) | keywords(door)


@pytest.mark.parametrize("named", [
    (dpofast.LinearDPOLoss, linear_dpo_loss), (dpofast.DPOLoss, dpo_loss), (model_dpo_loss, linear_dpo_loss),
    (dpofast.LinearListLoss, linear_list_loss), (dpofast.LinearUnpairedLoss, linear_unpaired_loss),
], ids=("LinearDPOLoss", "DPOLoss", "model_dpo_loss", "LinearListLoss", "LinearUnpairedLoss"))  # fmt: skip
def test_what_matters_is_in_every_signature_with_the_same_default(named):
    ours, theirs = (inspect.signature(x).parameters for x in named)
    important = (NAMED | {"memory_budget", "backend", "group", "sequence_group"}) & set(theirs)
    assert important <= set(ours)
    assert {name: ours[name].default for name in important} == {name: theirs[name].default for name in important}
