"""The command line: what it hands on, what it prints, and what it says when a package is missing."""

import dataclasses
import json
import sys
import types

import pytest

import dpofast
from dpofast import bench
from dpofast.cli import main

SHAPE = ["-N", "4096", "-H", "576", "-V", "49152"]


@dataclasses.dataclass
class RecordedPlan:
    """Stands for a plan and keeps how it was asked for."""

    args: tuple
    kwargs: dict

    def __str__(self):
        return "a table"


@pytest.fixture
def recorded(monkeypatch):
    plans = []

    def plan(*args, **kwargs):
        plans.append(RecordedPlan(args, kwargs))
        return plans[-1]

    monkeypatch.setattr(dpofast, "plan", plan)
    return plans


def test_plan_hands_on_shapes_and_defaults(recorded, capsys):
    assert main(["plan", *SHAPE]) == 0
    assert recorded[0].args == (4096, 576, 49152)
    assert recorded[0].kwargs == {
        "dtype": "bf16",
        "train_head": True,
        "train_hidden": True,
        "memory_budget": None,
        "backend": "auto",
        "device": None,
        "longest_pair": None,
        "grad_filter": None,
        "kept": 0.01,
        "with_peers": False,
        "positions": None,
    }
    assert capsys.readouterr().out == "a table\n"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--frozen-head"], {"train_head": False, "train_hidden": True}),
        (["--score"], {"train_head": False, "train_hidden": False}),
        (["--memory-budget", "512MiB"], {"memory_budget": "512MiB"}),
        (["--longest-pair", "300"], {"longest_pair": 300}),
        (["--grad-filter", "auto"], {"grad_filter": "auto"}),
        (["--grad-filter", "1e-4", "--kept", "0.03"], {"grad_filter": 1e-4, "kept": 0.03}),
        (["--peers", "--positions", "5000"], {"with_peers": True, "positions": 5000}),
        (["--device", "h100"], {"device": "h100", "backend": "auto"}),
        (["--dtype", "fp32", "--backend", "cpu"], {"dtype": "fp32", "backend": "cpu"}),
    ],
)
def test_plan_hands_on_each_flag(recorded, flags, expected):
    assert main(["plan", *SHAPE, *flags]) == 0
    assert {name: recorded[0].kwargs[name] for name in expected} == expected


def test_real_plan_prints_a_table_and_json(capsys):
    assert main(["plan", *SHAPE]) == 0
    assert capsys.readouterr().out.strip() == str(dpofast.plan(4096, 576, 49152)).strip()
    assert main(["plan", *SHAPE, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["considered"][0]["schedule"]
    assert main(["plan", *SHAPE, "--peers", "--json"]) == 0
    assert {"name", "products", "seconds"} <= json.loads(capsys.readouterr().out)["peers"][0].keys()


def test_memory_budget_is_bytes_or_a_size(capsys):
    for budget in ("536870912", "512MiB"):
        assert main(["plan", *SHAPE, "--memory-budget", budget, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["memory_budget"] == 512 << 20


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--dtype", "int8"),
        ("--backend", "abacus"),
        ("--memory-budget", "a lot"),
        ("--tokens", "-1"),
        ("--grad-filter", "most"),
        ("--kept", "1.5"),
        ("--positions", "-2"),
    ],
)
def test_plan_refuses_nonsense_with_a_message_and_no_traceback(flag, value, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["plan", *SHAPE, flag, value])
    assert exit_info.value.code == 2
    assert value in capsys.readouterr().err


def test_env_prints_each_section_and_json(capsys):
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert main(["env", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert all(section in text.splitlines() for section in info)
    assert info["versions"]["dpofast"] == dpofast.__version__


def test_demo_gets_every_argument_even_help(monkeypatch):
    received = []
    demo = types.SimpleNamespace(main=received.append)
    monkeypatch.setitem(sys.modules, "dpofast.demo", demo)
    assert main(["demo", "--steps", "3", "--help", "-x"]) == 0
    assert received == [["--steps", "3", "--help", "-x"]]


def test_a_benchmark_gets_its_arguments_and_others_are_refused(monkeypatch, capsys):
    received = []
    monkeypatch.setattr("dpofast.bench.report.main", lambda: received.append(list(sys.argv)))
    monkeypatch.setattr(sys, "argv", ["dpofast"])
    assert main(["bench", "report", "--check", "--help"]) == 0
    assert received == [["dpofast bench report", "--check", "--help"]]
    with pytest.raises(SystemExit):
        main(["bench", "nothing"])
    assert "usage: dpofast bench" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["--seconds", "200"]])
def test_no_benchmark_named_means_all_of_them(argv, monkeypatch, capsys):
    received = []
    monkeypatch.setattr("dpofast.bench.all.main", lambda: received.append(list(sys.argv)))
    monkeypatch.setattr(sys, "argv", ["dpofast"])
    assert main(["bench", *argv]) == 0
    assert received == [["dpofast bench all", *argv]]
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    assert "gpu_gemm" in capsys.readouterr().out


@pytest.mark.parametrize("name", bench.NAMES)
def test_every_benchmark_says_what_it_does(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dpofast"])
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", name, "--help"])
    assert exit_info.value.code == 0 and f"usage: dpofast bench {name}" in capsys.readouterr().out


def test_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, capsys):
    def demo_main(argv):
        raise ModuleNotFoundError("No module named 'no_such_package.part'", name="no_such_package.part")

    monkeypatch.setitem(sys.modules, "dpofast.demo", types.SimpleNamespace(main=demo_main))
    assert main(["demo"]) == 1
    assert "pip install no_such_package\n" in capsys.readouterr().err


def test_our_own_broken_import_keeps_its_traceback(monkeypatch):
    def demo_main(argv):
        raise ModuleNotFoundError("No module named 'dpofast.nonsense'", name="dpofast.nonsense")

    monkeypatch.setitem(sys.modules, "dpofast.demo", types.SimpleNamespace(main=demo_main))
    with pytest.raises(ModuleNotFoundError, match=r"dpofast\.nonsense"):
        main(["demo"])


@pytest.mark.parametrize("argv", [[], ["no-such-command"], ["plan"]])
def test_usage_errors_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 2
    assert "usage: dpofast" in capsys.readouterr().err
