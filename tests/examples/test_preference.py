"""The examples on preferences: each on a tiny model and a few records of its own kind; and what they share."""

from __future__ import annotations

import json
import math
import random

import better_code
import own_failures
import pytest
import results
import torch
import workbench
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import Problem
from results import Figure, Report, mean_and_error, preferred, rewarded
from workbench import Workbench

from dpofast.demo.data import Pair


def bench(path, name: str = "some", *options: str) -> Workbench:
    return Workbench(name, "a test", ["--tiny", "--work", str(path / "work"), "--results", str(path), *options])


def rows_of(count: int, groups: int = 5) -> list[dict]:
    return [
        {"prompt": f"Count to {i}: ", "chosen": f"yes {i}", "rejected": f"no, never {i}", "group": f"g{i % groups}"}
        for i in range(count)
    ]


# What they share


@pytest.mark.parametrize("seed", range(4))
def test_whole_groups_are_held_out_and_nothing_is_lost(seed):
    rows = [{"group": f"g{i}", "i": (i, j)} for i in range(12) for j in range(1 + i % 4)]
    train, held_out = workbench.split(rows, 0.3, seed)
    assert not {row["group"] for row in train} & {row["group"] for row in held_out}
    assert sorted(row["i"] for row in train + held_out) == [row["i"] for row in rows]
    assert 0.3 <= len(held_out) / len(rows) <= 1.25 * 0.3


def test_a_split_that_would_hold_out_nothing_is_refused():
    with pytest.raises(ValueError, match="rows: got 1 groups of 3 rows"):
        workbench.split([{"group": "a"}] * 3, 0.3)


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    workbench.need(True, "a package", "pip install a-package")
    with pytest.raises(SystemExit, match="pip install a-package"):
        workbench.need(None, "a package", "pip install a-package")


def test_the_error_of_a_mean_is_that_of_drawing_whole_groups_again():
    choice = random.Random(0)
    groups, values = [], []
    for g in range(300):
        middle, size = choice.gauss(0, 1), 1 + g % 5
        groups += [f"g{g}"] * size
        values += [middle + choice.gauss(0, 0.3) for _ in range(size)]
    parts = {g: [v for v, h in zip(values, groups) if h == g] for g in groups}
    means = []
    for _ in range(2000):
        drawn = [v for g in choice.choices(list(parts), k=len(parts)) for v in parts[g]]
        means.append(sum(drawn) / len(drawn))
    mean, error = mean_and_error(values, groups)
    assert mean == pytest.approx(sum(values) / len(values))
    assert error == pytest.approx(torch.tensor(means).std().item(), rel=0.06)
    assert error > 1.4 * mean_and_error(values, range(len(values)))[1]  # than if all items were draws of their own


def test_with_a_group_for_each_item_the_error_is_the_usual_one():
    values = [0.0, 1.0, 1.0, 4.0, 2.5]
    expected = torch.tensor(values).std().item() / math.sqrt(5)
    assert mean_and_error(values, range(5))[1] == pytest.approx(expected)
    assert math.isnan(mean_and_error(values, ["a"] * 5)[1])


LINES = [
    {"logps": [-1.0, -2.0, -3.0], "lengths": [1, 4, 2]},
    {"logps": [-2.0, -2.0], "lengths": [2, 1]},
    {"logps": [-5.0, -2.0], "lengths": [1, 1]},
]


def test_a_first_answer_is_preferred_if_it_is_above_all_others_and_a_tie_is_none():
    assert preferred(LINES) == ([1.0, 0.0, 0.0], 1)
    assert preferred(LINES, average=True) == ([0.0, 1.0, 0.0], 0)


def test_rewards_are_what_log_probs_gained():
    after = [
        {"logps": [-1.5, -2.1, -9.0], "lengths": [1, 4, 2]},
        {"logps": [-1.0, -2.0], "lengths": [2, 1]},
        {"logps": [-4.0, -1.0], "lengths": [1, 1]},
    ]
    assert rewarded(LINES, after) == ([0.0, 1.0, 0.0], 1)


def test_a_figures_change_is_of_the_same_items_and_so_surer_than_its_ends():
    groups = range(4)
    figure = Figure("x", [0.0, 10.0, 20.0, 30.0], [1.0, 11.0, 21.0, 32.0], groups, unit="nats")
    assert figure.change[0] == pytest.approx(1.25) and figure.change[1] == pytest.approx(0.25)
    assert figure.ends[0][1] > 6
    assert figure.cells()[-1] == "+1.250 ± 0.250"


def test_a_table_says_how_many_items_groups_and_ties_there_are(tmp_path):
    report = Report(bench(tmp_path), "A title", "family", notes=["It is a test."])
    report.figures.append(Figure("share", [0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], list("aabb"), 0.5, (1, 0)))
    text = report.write().read_text()
    row = next(line for line in text.splitlines() if line.startswith("| share"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["share", "4", "2", "1, 0", "50.0%", "75.0% ± 25.0%", "100.0% ± 0.0%", "+25.0% ± 25.0%"]
    assert "It is a test." in text and "--tiny" in text and f"torch {torch.__version__}" in text
    assert "<svg" in (tmp_path / "some.svg").read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench")
    at = bench(path)
    train, held_out = at.split(rows_of(24), 0.3)
    return at, train, held_out, at.train(train, learning_rate=1e-2)


def test_what_is_trained_is_what_was_not_held_out(trained):
    at, train, held_out, folder = trained
    scores = [at.score(model, held_out) for model in (at.model, folder)]
    assert scores[0] != scores[1]
    assert [line["group"] for line in scores[0]] == [row["group"] for row in held_out]
    known = [json.loads(line) for line in at.write(train).read_text().splitlines()]
    assert known == train


def test_scores_are_in_the_order_of_the_rows_and_those_of_a_row_alone(trained):
    at, _, held_out, _ = trained
    lists = [{"prompt": "Say ", "answers": ["a", "bb", "c" * 40], "scores": [2, 1, 0], "group": "l"}]
    longest_first = sorted(held_out, key=lambda row: -len(row["prompt"]))
    rows = [longest_first[0], *longest_first[1:], {**held_out[0], "prompt": "Count far beyond that, to 99: "}]
    for some in (rows, lists):
        together = at.score(at.model, some)
        for row, line in zip(some, together, strict=True):
            (alone,) = at.score(at.model, [row])
            assert line["logps"] == pytest.approx(alone["logps"], abs=1e-3)
            assert line["group"] == row["group"] and line["lengths"] == alone["lengths"]


def test_trainings_on_the_same_rows_share_the_references_log_probs(trained):
    at, train, _, _ = trained
    at.train(train, "again", beta=0.3)
    files = sorted(path.name for path in at.folder.glob("*.references"))
    assert files == [at.write(train).with_suffix(".references").name]


def test_a_model_writes_on_from_a_prompt_alone_as_it_does_beside_longer_ones(trained):
    at, *_ = trained
    prompts = ["Hello", "a much longer prompt than that", "x"]
    together = at.continuations(at.model, prompts, tokens=6)
    assert together == [at.continuations(at.model, [prompt], tokens=6)[0] for prompt in prompts]
    assert at.tokenizer.eos_token_id not in {token for ids in together for token in ids}
    sampled = at.continuations(at.model, prompts, tokens=6, temperature=1.0)
    assert sampled != together and sampled == at.continuations(at.model, prompts, tokens=6, temperature=1.0)


def test_pictures_have_the_same_bytes_for_the_same_numbers(tmp_path):
    figures = [Figure("share", [0.0, 1.0], [1.0, 1.0], "ab", 0.5), Figure("lp", None, [-1.0, -2.0], "ab", unit="nats")]
    at = bench(tmp_path)
    found = []
    for name in "pq":
        results.draw(figures, "A title", tmp_path / f"{name}.svg", at.name)
        found.append((tmp_path / f"{name}.svg").read_bytes())
    assert found[0] == found[1]


# Code


PAIRS = [
    ("unused-import", "Pyflakes", "import os\n", "x = 1\n"),
    ("f-string-missing-placeholders", "Pyflakes", 'f"a"\n', '"a"\n'),
    ("is-literal", "Pyflakes", "x = 2\nx is 1\n", "x = 2\nx == 1\n"),
    ("multiple-imports-on-one-line", "pycodestyle", "import os, sys\n", "import os\nimport sys\n"),
    ("lambda-assignment", "pycodestyle", "f = lambda x: x\n", "def f(x):\n    return x\n"),
    ("none-comparison", "pycodestyle", "x = 2\nx == None\n", "x = 2\nx is None\n"),
    ("bare-except", "pycodestyle", "print()\n", "x = 1\n"),  # does not fire, and so is left out
    ("useless-object-inheritance", "pyupgrade", "class A(object):\n    pass\n", "class A:\n    pass\n"),
    ("print", "flake8-print", "print(1)\n", "y = 1\n"),
    ("mutable-argument-default", "flake8-bugbear", "def f(x=[]):\n    x\n", "def f(x=None):\n    x\n"),
]
BODIES = ["return a + b", "return a - b", "return a * b + 1", "return max(a, b)", "return a < b", "return b // a"]


def problem(i: int, body: str) -> Problem:
    prompt = f'def f{i}(a, b):\n    """Number {i}."""\n'
    found: dict = {}
    exec(f"{prompt}    {body}\n", found)
    values = {(a, b): found[f"f{i}"](a, b) for a in (1, 2, 5) for b in (2, 3)}
    return Problem(
        f"p{i}",
        prompt,
        f"    {body}\n",
        f"def check(f):\n    assert all(f(*x) == y for x, y in {values}.items())\n",
        f"f{i}",
    )


def test_code_runs_and_its_figures_are_of_what_was_held_out(monkeypatch, tmp_path):
    pairs = [Pair(rule, family, "Checks something.", chosen, rejected) for rule, family, rejected, chosen in PAIRS]
    monkeypatch.setattr(better_code.ruff_pairs, "documented_pairs", lambda ruff: (pairs, 99))
    monkeypatch.setattr(better_code, "problems", lambda: [problem(i, body) for i, body in enumerate(BODIES)])
    report = better_code.main(["--tiny", "--work", str(tmp_path / "work"), "--results", str(tmp_path)])
    figures = {figure.name: figure for figure in report.figures}
    lint, lists = figures["ruff: clean code preferred"], figures["HumanEval: preferred to all"]
    assert 2 <= len(lint.after) <= 4 and len(lists.after) == 2 and set(lists.groups) < {f"p{i}" for i in range(6)}
    trained = [json.loads(line) for path in report.bench.folder.glob("*.jsonl") for line in path.open()]
    assert "bare-except" not in {row.get("rule") for row in trained}
    held_out = set(lint.groups) | set(lists.groups)
    files = {path: {json.loads(line)["group"] for line in path.open()} for path in report.bench.folder.glob("*.jsonl")}
    assert len(files) == 2 and sorted(map(bool, (groups & held_out for groups in files.values()))) == [False, True]
    assert 1 / 3 <= lists.baseline <= 1 / 2
    assert "HumanEval: preferred to all" in (tmp_path / "code.md").read_text()


def test_a_list_is_as_many_pairs_as_it_has_other_answers():
    lines = [{"logps": [-1.0, -2.0, -0.5], "lengths": [3, 4, 5], "group": "g"}]
    assert better_code.as_pairs(lines) == [
        {"logps": [-1.0, -2.0], "lengths": [3, 4], "group": "g"},
        {"logps": [-1.0, -0.5], "lengths": [3, 5], "group": "g"},
    ]


# Own failures


quick = settings(max_examples=50, deadline=None)


@quick
@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3), min_size=1, max_size=16), st.integers(3, 6))
def test_what_ends_in_a_period_that_comes_three_times_is_a_loop(before, period, times):
    ids = before + period * max(times, -(-own_failures.FEWEST // len(period)))
    found = own_failures.loop_period(ids)
    assert 0 < found <= len(period)
    assert ids[-3 * found :] == ids[-found:] * 3


@quick
@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 1), min_size=1, max_size=20))
def test_a_loop_that_something_else_follows_is_none(before, period):
    assert own_failures.loop_period(before + period * 12 + [99]) == 0


def test_what_comes_twice_or_is_a_few_tokens_is_no_loop():
    assert own_failures.loop_period(list(range(16)) * 2) == 0
    assert own_failures.loop_period([*range(50), 7, 7, 7, 7]) == 0
    assert own_failures.loop_period([5] * 11) == 0 and own_failures.loop_period([5] * 12) == 1
    assert own_failures.loop_period(list(range(17)) * 3) == 0 and own_failures.loop_period([]) == 0


def test_runs_that_were_there_before_are_counted():
    assert own_failures.repeated([1, 2, 3, 4, 5, 6]) == 0 and own_failures.repeated([1]) == 0
    assert own_failures.repeated([1] * 8) == pytest.approx(4 / 5)


def test_own_failures_runs_and_trains_on_loops_alone(monkeypatch, tmp_path):
    texts = [
        (
            f"family {i % 6}",
            f"Rule {i:2} of {i % 6} is that words of the kind {i * 7} are not to be written, because " * 3,
        )
        for i in range(40)
    ]
    monkeypatch.setattr(own_failures, "texts", lambda: texts)
    report = own_failures.main(["--tiny", "--work", str(tmp_path / "work"), "--results", str(tmp_path)])
    rate, *_, real, _ = report.figures
    assert rate.name == "continuations that end in a loop" and 0 < sum(rate.before) < len(rate.before)
    files = [[json.loads(line) for line in path.open()] for path in report.bench.folder.glob("*.jsonl")]
    (trained,) = (rows for rows in files if "rejected" in rows[0] and not {r["group"] for r in rows} & set(rate.groups))
    encode = report.bench.tokenizer
    for row in trained:
        assert own_failures.loop_period(encode(row["rejected"])["input_ids"])
        assert any(text.startswith(row["prompt"] + row["chosen"]) for _, text in texts)
    assert all(value < 0 for value in real.before)
