"""Lists of answers, ragged and scored: the losses of a plain loop, what is measured, and what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("rich")

from train import killed, tiny_run
from train.test_unpaired import logps
from transformers import AutoModelForCausalLM

from dpofast.lists import list_preference_loss
from dpofast.train import log
from dpofast.train.config import from_dict
from dpofast.train.dry_run import dry_run
from dpofast.train.ranking import ndcg
from dpofast.train.run import train

pytestmark = pytest.mark.usefixtures("quick")
ANSWERS = [["w3 w4", "w40"], ["w5", "w41 w42", "w43"], ["w6 w7 w8", "w44", "w45 w46", "w47"], ["w9", "w48", "w49"]]
SCORES = [[1.0, 0.0], [2.0, 1.0, 1.0], [3.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
ROWS = [
    {"prompt": f"w1{i} w2 ", "answers": answers, "scores": scores, "weight": 0.5 + i}
    for i, (answers, scores) in enumerate(zip(ANSWERS, SCORES))
]


def without(name, rows=ROWS):
    return [{key: value for key, value in row.items() if key != name} for row in rows]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(path)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lists")
    tiny_run.write_model(folder / "model")
    write(folder / "lists.jsonl", ROWS)
    return folder


def options(folder, out="run", rows=None, **others):
    """All lists in each step, so that only their order in it is left to the seed."""
    data = [str(folder / "lists.jsonl")] if rows is None else write(folder / f"{out}.jsonl", rows)
    return {
        "model": str(folder / "model"), "data": data, "eval_data": data, "out": str(folder / out),
        "loss_type": ["lipo_lambda"], "batch_size": 4, "micro_batch": 2, "steps": 4, "warmup": 0.0,
        "learning_rate": 1e-2, "schedule": "constant", "tensorboard": False, "picture": False, **others,
    }  # fmt: skip


def run(folder, out="run", **others):
    train(from_dict(options(folder, out, **others), "the test"))
    return log.read(folder / out / "log.jsonl")


def sums(model, rows):
    """The log-probs of all answers, one list after the other, each sequence alone."""
    return logps(model, [{"prompt": row["prompt"], "completion": x} for row in rows for x in row["answers"]])


WAYS = {
    "softmax_dpo": ({"loss_type": ["softmax_dpo"]}, without("scores")),
    "plackett_luce": ({"loss_type": ["plackett_luce"], "beta": 0.5}, without("scores")),
    "lipo_lambda": ({"loss_type": ["lipo_lambda"]}, ROWS),
    "listnet, and softmax_dpo": ({"loss_type": ["listnet", "softmax_dpo"], "loss_weights": [1.0, 0.5]}, ROWS),
    "a list at a time": ({"loss_type": ["lipo_lambda"], "micro_batch": 1, "share_prompt": True}, ROWS),
}


@pytest.mark.parametrize("name", WAYS)
def test_losses_are_those_of_a_plain_loop(folder, name):
    others, rows = WAYS[name]
    entries = run(folder, name, rows=rows, **others)
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "model") for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-2, weight_decay=0.0)
    weight = torch.tensor([row["weight"] for row in rows])
    options = {name: x for name, x in others.items() if name in ("loss_type", "loss_weights", "beta")}
    if "scores" in rows[0]:
        options["scores"] = torch.tensor([x for scores in SCORES for x in scores])
    with torch.no_grad():
        ref = sums(reference, rows)
    steps = [entry for entry in entries if "loss" in entry]
    assert len(steps) == 4
    for entry in steps:
        mine = sums(policy, rows)
        loss = list_preference_loss(
            mine, [len(row["answers"]) for row in rows], ref_logps=ref, weight=weight, **options
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert entry["loss"] == pytest.approx(loss.item(), abs=2e-4)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.01


def test_plackett_luce_takes_scores_where_a_record_has_them(folder):
    """Of two answers with equal scores neither is better; of those without scores the first is."""
    rows = [{"prompt": "w1 ", "chosen": "w2", "rejected": "w3"}, {"prompt": "w4 ", "chosen": "w5", "rejected": "w6"}]
    equal = {"score_chosen": 1.0, "score_rejected": 1.0}
    for i, more in enumerate(({}, equal)):
        out, given = f"part{i}", [rows[0], rows[1] | more]
        run(folder, out, rows=given, loss_type=["plackett_luce"], steps=1, batch_size=2)
        (entry,) = [entry for entry in log.read(folder / out / "log.jsonl") if "loss" in entry]
        assert entry["loss"] == pytest.approx(math.log(2) / (1 + i), abs=1e-5)


def test_held_out_numbers_are_those_of_the_answers(folder):
    entries = run(folder, "measured")
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / x) for x in ("measured/last", "model"))
    sizes = [len(row["answers"]) for row in ROWS]
    with torch.no_grad():
        logps, ref = sums(policy, ROWS), sums(reference, ROWS)
    rewards, logps = ([x.tolist() for x in y.split(sizes)] for y in (0.1 * (logps - ref), logps))
    last = [entry for entry in entries if "eval/loss" in entry][-1]
    first, others = [x[0] for x in rewards], [sum(x[1:]) / len(x[1:]) for x in rewards]
    mean = {
        "rewards/chosen": sum(first) / 4,
        "rewards/rejected": sum(others) / 4,
        "rewards/margins": (sum(first) - sum(others)) / 4,
        "rewards/accuracies": sum(x[0] > max(x[1:]) for x in rewards) / 4,
        "logps/accuracies": sum(x[0] > max(x[1:]) for x in logps) / 4,
        "rewards/ndcg": sum(map(ndcg, rewards[:3], SCORES)) / 3,  # the fourth has no good answer
        "logps/ndcg": sum(map(ndcg, logps[:3], SCORES)) / 3,
    }
    for name, value in mean.items():
        assert last[f"eval/{name}"] == pytest.approx(value, abs=1e-4), name
    assert last["eval/records"] == 4
    start = next(entry for entry in entries if "eval/loss" in entry)
    assert start["step"] == 0 and start["eval/rewards/accuracies"] == 0  # all rewards are 0: nothing is ahead
    assert "rewards/ndcg" not in run(folder, "ranked", rows=without("scores"), loss_type=["softmax_dpo"])[-1]


def test_kills_change_nothing(folder):
    def config(out):
        return from_dict(options(folder, out, save_every=1, steps=6, resume=True), "the test")

    train(config("whole"))
    for seconds in (0.2, 0.3, 0.4):
        killed.killed(config("killed"), seconds)
    train(config("killed"))
    killed.expect_same(killed.result(folder / "killed"), killed.result(folder / "whole"))


def test_shared_prompts_change_no_loss(folder):
    rows = [row for row in ROWS if len(row["answers"]) == 3] * 2
    rows = [{**row, "prompt": f"w{20 + i} w21 w22 w23 w24 w25 "} for i, row in enumerate(rows)]
    plain, shared = (
        [entry["loss"] for entry in run(folder, f"shared{flag}", rows=rows, share_prompt=flag) if "loss" in entry]
        for flag in (False, True)
    )
    assert shared == pytest.approx(plain, abs=1e-5) and plain[-1] < plain[0]


def test_a_dry_run_takes_lists(folder):
    assert "4 records, 4 steps of 4 in parts of 2" in dry_run(from_dict(options(folder, "dry"), "the test"))


LIST_OF_ONE = [{"prompt": "w1", "answers": ["w2"]}]


@pytest.mark.parametrize(
    ("rows", "others", "message"),
    [
        (without("scores"), {}, r"jsonl:1: got no scores, expected one of each answer, which \['lipo_lambda'\] needs"),
        (LIST_OF_ONE, {"loss_type": ["softmax_dpo"]}, "jsonl:1: got 1 answer, expected two or more"),
        (ROWS, {"share_prompt": True}, "share_prompt: .*jsonl:2 has 3 answers and .*jsonl:1 2, .*micro_batch = 1"),
        (ROWS, {"label_smoothing": 0.1}, "label_smoothing: got 0.1, expected 0"),
        (ROWS, {"loss_type": ["lipo_lambda", "sigmoid"]}, "loss_type: got 'sigmoid'"),
        (ROWS, {"loss_options": {"margin": 1.0}}, "margin: not defined for loss_type='lipo_lambda'"),
        ([{"prompt": "w1", "completion": "w2", "label": True}], {}, "got a label, expected two or more"),
    ],
)
def test_what_does_not_fit_is_refused(folder, rows, others, message):
    with pytest.raises(ValueError, match=message):
        run(folder, f"refused{hash(message)}", rows=rows, **others)


def test_ndcg_is_that_of_the_order():
    def plain(order):
        gains = [2.0**score - 1 for score in order]
        return sum(gain / math.log2(2 + place) for place, gain in enumerate(gains))

    best = plain([2.0, 1.0, 0.0])
    assert ndcg([0.3, 0.2, 0.9], [2.0, 1.0, 0.0]) == pytest.approx(plain([0.0, 2.0, 1.0]) / best)
    assert ndcg([3.0, 2.0, 1.0], [2.0, 1.0, 0.0]) == 1
    tied = (plain([2.0, 1.0, 0.0]) + plain([1.0, 2.0, 0.0])) / 2
    assert ndcg([0.5, 0.5, 0.1], [2.0, 1.0, 0.0]) == pytest.approx(tied / best)
    for scores in ([0.0, 0.0], [1.0, -1.0], [math.nan, math.nan]):
        assert math.isnan(ndcg([1.0, 0.0], scores))


def test_score_has_the_ndcg_of_scored_lists(folder, capsys):
    from dpofast import cli

    flags = ["--reference", str(folder / "model")]
    assert cli.main(["score", str(folder / "model"), str(folder / "lists.jsonl"), *flags]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for line, scores in zip(lines, SCORES, strict=True):
        assert ("logps/ndcg" in line) == (max(scores) > 0)
        if max(scores) > 0:
            assert line["logps/ndcg"] == ndcg(line["logps"], scores)
            assert line["rewards/ndcg"] == pytest.approx(ndcg([0.0] * len(scores), scores))
