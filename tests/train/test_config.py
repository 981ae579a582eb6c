"""Options of a training: one list of them for the file, the command line and the help."""

from __future__ import annotations

import dataclasses
import json

import pytest

from dpofast.train import command
from dpofast.train.config import FIELDS, Config, from_dict

NEEDED = {"model": "m", "data": ["d.jsonl"]}


def parsed(*argv: str) -> Config:
    return command.arguments(argv)[0]


def test_file_and_command_line_mean_the_same(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        'model = "m"\ndata = "d.jsonl"\nbeta = 1\nloss_type = ["sigmoid", "sft"]\nshare_prompt = true\n'
        "grad_filter = 0.01\nloss_options = {simpo_gamma = 0.3, name = 'x'}\n"
    )
    flags = "--model m --data d.jsonl --beta 1 --loss-type sigmoid sft --share-prompt --grad-filter 0.01".split()
    assert parsed(str(path)) == parsed(*flags, "--loss-options", "simpo_gamma=0.3", "name=x")
    assert parsed(str(path)).beta == 1.0 and isinstance(parsed(str(path)).beta, float)


def test_the_command_line_goes_before_the_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('model = "m"\ndata = ["d.jsonl"]\nbeta = 0.5\nshare_prompt = true\n')
    found = parsed(str(path), "--beta", "0.2", "--no-share-prompt")
    assert (found.beta, found.share_prompt, found.model) == (0.2, False, "m")


@pytest.mark.parametrize(("name", "near"), [("learning_rte", "learning_rate"), ("batch-size", "batch_size")])
def test_an_unknown_key_is_refused_with_the_nearest(name, near):
    with pytest.raises(ValueError, match=rf"{name}: .* did you mean {near}\?"):
        from_dict({**NEEDED, name: 1}, "run.toml")


def test_a_key_like_none_is_refused_with_all_of_them():
    with pytest.raises(ValueError, match="zzzz: .*there are model, data,"):
        from_dict({**NEEDED, "zzzz": 1}, "run.toml")


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("beta", 0.0, ValueError),
        ("beta", "much", TypeError),
        ("batch_size", 0, ValueError),
        ("batch_size", True, TypeError),
        ("batch_size", 2.5, TypeError),
        ("precision", "fp8", ValueError),
        ("warmup", 1.0, ValueError),
        ("adam_betas", [0.9], ValueError),
        ("data", [], ValueError),
        ("data", [1.5, True], TypeError),
        ("model", "", ValueError),
        ("patience", 3, ValueError),
        ("share_prompt", 1, TypeError),
        ("learning_rate", float("nan"), ValueError),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(name, value, kind):
    with pytest.raises(kind, match=f"^{name}: got "):
        from_dict({**NEEDED, name: value}, "run.toml")


def test_the_command_line_refuses_without_a_traceback(capsys):
    with pytest.raises(SystemExit) as left:
        command.main(["--model", "m", "--data", "d", "--beta", "-1"])
    assert left.value.code == 2 and "beta: got -1.0, expected more than 0" in capsys.readouterr().err


def test_a_file_that_is_no_toml_is_named(tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_text("model = \n")
    for name in (path, tmp_path / "none.toml"):
        with pytest.raises(SystemExit):
            command.main([str(name)])
        assert str(name) in capsys.readouterr().err


def test_every_option_has_help_and_a_flag(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, field in FIELDS.items():
        assert f"--{name.replace('_', '-')}" in text
        assert field.metadata["help"] in text


def test_every_default_is_good():
    assert from_dict(NEEDED, "run.toml") == Config(**NEEDED)
    assert json.loads(json.dumps(Config(**NEEDED).as_dict())) == Config(**NEEDED).as_dict()


def test_differences_name_what_changes_parameters_and_nothing_else():
    one = Config(**NEEDED)
    assert dataclasses.replace(one, keep=3, out="x", resume=True, data=["moved.jsonl"]).differences(one.as_dict()) == []
    assert dataclasses.replace(one, beta=0.3).differences(one.as_dict()) == ["beta: was 0.1, is 0.3"]


@pytest.mark.parametrize(("text", "value"), [("", None), ("auto", "auto"), ("0.01", 0.01)])
def test_the_filter_is_what_the_losses_take(text, value):
    assert Config(**NEEDED, grad_filter=text).filter == value


def test_a_filter_of_another_word_is_refused():
    with pytest.raises(ValueError, match="grad_filter: got 'some'"):
        from_dict({**NEEDED, "grad_filter": "some"}, "run.toml")
