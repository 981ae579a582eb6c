"""`dpofast score` against plain PyTorch: pairs, lists and single answers, of a model and of an adapter."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("rich")

from peft import LoraConfig, get_peft_model
from train import tiny_run

from dpofast import cli
from dpofast.train.score import table

pytestmark = pytest.mark.usefixtures("quick")
ROWS = [
    {"prompt": "w1 w2 ", "chosen": "w3 w4 w5", "rejected": "w6"},
    {"prompt": "w1 ", "chosen": "w7", "rejected": "w8 w9"},
    {"prompt": "w1 w2 w3 ", "chosen": "w3", "rejected": ["w6", "w9 w10"]},
    {"prompt": "w4 ", "answers": ["w3", "w6 w7", "w9 w10", "w11"]},
    {"prompt": "w5 ", "completion": "w6 w7", "label": False},
    {"prompt": "w5 ", "completion": "w6", "label": True},
    {"prompt": "w9 w8 ", "answers": ["w6"]},
]
PARTS = (ROWS[:3], ROWS[3:4] + ROWS[6:], ROWS[4:6])  # a file has one format


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, the same moved a little, an adapter on it, and `ROWS` in three files."""
    folder = tmp_path_factory.mktemp("score")
    tiny_run.write_model(folder / "model")
    torch.manual_seed(1)
    other = tiny.model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    other.save_pretrained(folder / "other")
    tiny.tokenizer().save_pretrained(folder / "other")
    base = tiny.model()
    base.config._name_or_path = base.name_or_path = str(folder / "model")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter")
    tiny.tokenizer().save_pretrained(folder / "adapter")
    for i, rows in enumerate(PARTS):
        (folder / f"rows{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@torch.no_grad()
def truth(model, row) -> list[float]:
    """The log-probs of a row's answers by the model's own logits, each sequence alone, in fp64."""
    ids = tiny.tokenizer()
    answers = row.get("answers") or [row["completion"]] if "chosen" not in row else None
    if answers is None:
        rejected = row["rejected"]
        answers = [row["chosen"], *(rejected if isinstance(rejected, list) else [rejected])]
    found = []
    for answer in answers:
        prompt, rest = (ids(text)["input_ids"] for text in (row["prompt"], answer))
        tokens = torch.tensor([prompt + rest + [ids.eos_token_id]])
        logps = model.double()(tokens).logits[0, :-1].log_softmax(-1)
        found.append(logps.gather(-1, tokens[0, 1:, None])[len(prompt) - 1 :].sum().item())
    return found


def scored(folder, capsys, *flags, model="model") -> list[dict]:
    """The lines of all files, in the order of `ROWS`."""
    lines = []
    for i in range(len(PARTS)):
        assert cli.main(["score", str(folder / model), str(folder / f"rows{i}.jsonl"), *flags]) == 0
        lines += [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [lines[i] for i in (0, 1, 2, 3, 5, 6, 4)]


@pytest.mark.parametrize("flags", [(), ("--share-prompt",), ("--micro-batch", "1")], ids=str)
def test_log_probs_are_those_of_the_models_logits(folder, capsys, flags):
    lines, model = scored(folder, capsys, *flags), tiny.model().eval()
    places = ["0.jsonl:1", "0.jsonl:2", "0.jsonl:3", "1.jsonl:1", "2.jsonl:1", "2.jsonl:2", "1.jsonl:2"]
    assert [line["where"] for line in lines] == [f"{folder}/rows{place}" for place in places]
    for line, row in zip(lines, ROWS, strict=True):
        assert line["logps"] == pytest.approx(truth(model, row), abs=1e-4)
        assert line["lengths"][0] == len(row.get("chosen", row.get("completion", "w3")).split()) + 1
        assert line.get("label") == row.get("label") and "rewards" not in line
        if len(line["logps"]) > 1:
            assert line["logps/correct"] == (max(line["logps"]) == line["logps"][0])


def test_rewards_are_beta_times_the_log_ratios(folder, capsys):
    lines = scored(folder, capsys, "--reference", str(folder / "model"), "--beta", "0.5", model="other")
    from transformers import AutoModelForCausalLM

    other, model = AutoModelForCausalLM.from_pretrained(folder / "other").eval(), tiny.model().eval()
    for line, row in zip(lines, ROWS, strict=True):
        rewards = [0.5 * (a - b) for a, b in zip(truth(other, row), truth(model, row))]
        assert line["rewards"] == pytest.approx(rewards, abs=1e-4)
        assert max(map(abs, rewards)) > 0.01
        if len(rewards) > 1:
            assert line["rewards/correct"] == (rewards[0] > max(rewards[1:]))
    assert lines[0]["margin"] == pytest.approx(lines[0]["rewards"][0] - lines[0]["rewards"][1])
    assert "margin" not in lines[2]


def test_an_adapter_is_scored_with_its_base(folder, capsys):
    plain, adapted = scored(folder, capsys), scored(folder, capsys, model="adapter")
    assert all(abs(a["logps"][0] - b["logps"][0]) > 1e-4 for a, b in zip(plain, adapted))


def test_the_table_is_of_all_lines_and_goes_beside_a_file(folder, capsys, tmp_path):
    out = tmp_path / "scores.jsonl"
    assert cli.main(["score", str(folder / "model"), str(folder / "rows0.jsonl"), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "3 records" in shown and "logps/chosen" in shown and "logps/others" in shown
    assert len(out.read_text().splitlines()) == 3
    lines = scored(folder, capsys)
    rows = {name: (count, mean) for name, count, mean, _ in table(lines)}
    assert rows["logps/chosen"] == (2, pytest.approx((lines[0]["logps"][0] + lines[1]["logps"][0]) / 2))
    assert rows["logps/correct"][0] == 4 and rows["logps/others"][0] == 2 + 3
    assert rows["logps/answer"][0] == rows["logps/good"][0] == rows["logps/bad"][0] == 1


@pytest.mark.parametrize(
    "line", ["{", '{"prompt": "w1", "chosen": "w2", "rejected": 3}', '{"prompt": "", "chosen": "w2", "rejected": "w3"}']
)
def test_a_bad_line_is_named_with_its_number_and_nothing_is_left(folder, capsys, tmp_path, line):
    rows, out = tmp_path / "bad.jsonl", tmp_path / "scores.jsonl"
    rows.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n")
    assert cli.main(["score", str(folder / "model"), str(rows), "--out", str(out)]) == 1
    assert f"dpofast score: data: {rows}:2: " in capsys.readouterr().err
    assert not out.exists()


def test_bad_lines_are_left_out_where_that_is_wanted(folder, capsys, tmp_path):
    rows = tmp_path / "bad.jsonl"
    empty = json.dumps(ROWS[0] | {"prompt": ""})  # which only the tokenizer finds
    rows.write_text("{\n" + json.dumps(ROWS[0]) + "\n" + empty + "\n")
    assert cli.main(["score", str(folder / "model"), str(rows), "--on-error", "skip"]) == 0
    shown = capsys.readouterr()
    assert [json.loads(line)["where"] for line in shown.out.splitlines()] == [f"{rows}:2"]
    assert f"left out {rows}:1: no JSON" in shown.err and f"left out {rows}:3: prompt: got no token" in shown.err
    assert "1 records, 2 left out" in shown.err


@pytest.mark.parametrize("name", ["none", "rows0.jsonl"])
def test_a_folder_without_a_model_is_named(folder, capsys, name):
    assert cli.main(["score", str(folder / name), str(folder / "rows0.jsonl")]) == 1
    assert f"model: got '{folder / name}', expected a folder" in capsys.readouterr().err
