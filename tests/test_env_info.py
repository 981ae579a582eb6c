"""The environment report must come out whatever else is broken."""

import json
import os
import subprocess
import sys

import pytest

import dpofast
from dpofast.env_info import env_info, format_env_info

env_info_module = sys.modules["dpofast.env_info"]  # whose name in the package is that of the function

SECTIONS = ["versions", "cpu", "gpu", "backends", "build", "environment"]

CLEAN_ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("DPOFAST_")}

# Loaded at start-up by every Python that has its folder on PYTHONPATH; makes one import fail.
BREAK_AN_IMPORT = """
import sys

class Breaker:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == {module!r}:
            raise {error}

sys.meta_path.insert(0, Breaker)
"""


def report(tmp_path, *, module=None, error=None, environment=(), command=("-m", "dpofast.env_info", "--json")):
    """Run the command with one import broken; return its standard output."""
    if module:
        text = BREAK_AN_IMPORT.format(module=module, error=error)
        (tmp_path / "sitecustomize.py").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env={**CLEAN_ENVIRONMENT, "PYTHONPATH": str(tmp_path), **dict(environment)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "RuntimeWarning" not in done.stderr
    return done.stdout


def test_report_is_json_and_says_what_is_installed(tmp_path):
    info = json.loads(report(tmp_path))
    assert list(info) == SECTIONS
    assert info["versions"]["dpofast"] == dpofast.__version__
    assert info["versions"]["python"] == sys.version.split()[0]
    assert "scalar" in info["cpu"]["instruction sets"]
    assert info["backends"]["auto on cpu"].partition(":")[0] in ("cpu", "torch")
    assert info["build"]["version"] == dpofast.__version__
    failed = {name: value for part in info.values() for name, value in part.items() if "failed" in str(value)}
    assert failed == {}


def test_text_has_every_entry(tmp_path, monkeypatch):
    for name in ("TRITON_INTERPRET", *(name for name in os.environ if name not in CLEAN_ENVIRONMENT)):
        monkeypatch.delenv(name, raising=False)  # the tests' own, which the report does not get
    lines = report(tmp_path, command=("-m", "dpofast.env_info")).splitlines()
    for section, entries in env_info().items():
        assert section in lines
        for name in entries:
            assert any(line.startswith(f"  {name} ") for line in lines)


def test_text_is_one_line_per_entry():
    info = {"versions": {"a": "failed: OSError: two\nlines", "longer": ["x", "y"]}, "gpu": {"none": []}}
    assert format_env_info(info).splitlines() == [
        "versions",
        "  a       failed: OSError: two lines",
        "  longer  x y",
        "gpu",
        "  none  none",
    ]


def test_function_survives_the_import_of_its_package():
    assert dpofast.env_info is env_info


@pytest.mark.parametrize(
    ("module", "error", "section", "entry"),
    [
        ("torch", "ModuleNotFoundError('no torch', name='torch')", "versions", "torch"),
        ("torch", "OSError('libtorch.so: cannot open')", "versions", "torch"),
        ("numpy", "ModuleNotFoundError('no numpy', name='numpy')", "versions", "numpy"),
        ("dpofast._C", "ModuleNotFoundError('no _C', name='dpofast._C')", "build", "dpofast._C"),
        ("dpofast._C", "ImportError('undefined symbol')", "build", "dpofast._C"),
    ],
)
def test_broken_import_is_reported_in_its_place(tmp_path, module, error, section, entry):
    info = json.loads(report(tmp_path, module=module, error=error))
    assert list(info) == SECTIONS
    assert info[section][entry].startswith(f"failed: {error.partition('(')[0]}")
    assert info["versions"]["dpofast"] == dpofast.__version__


@pytest.mark.parametrize("name", ["DPOFAST_CPU_ISA", "DPOFAST_BACKEND"])
def test_bogus_setting_is_shown_and_explained(tmp_path, name):
    info = json.loads(report(tmp_path, environment={name: "bogus"}))
    assert list(info) == SECTIONS
    assert info["environment"][name] == "bogus"
    assert "bogus" in info["backends"]["auto on cpu"]
    assert info["backends"]["torch"].startswith("yes")


def test_what_the_build_left_out_is_repeated_with_its_remedy(tmp_path, monkeypatch):
    notes = {"cuda": {"why": "no nvcc", "remedy": "install it"}, "cuda architectures": {"why": "old", "remedy": "new"}}
    (tmp_path / "notes.json").write_text(json.dumps(notes))
    monkeypatch.setattr(env_info_module, "_NOTES", tmp_path / "notes.json")
    build = env_info()["build"]
    assert build["left out: cuda"] == "no nvcc: install it" and build["left out: cuda architectures"] == "old: new"
    assert build["version"] == dpofast.__version__
    (tmp_path / "notes.json").write_text("{")
    assert env_info()["build"]["left out"].startswith("failed: JSONDecodeError")
    monkeypatch.setattr(env_info_module, "_NOTES", tmp_path / "none.json")
    assert not [name for name in env_info()["build"] if name.startswith("left out")]


@pytest.mark.parametrize(
    ("flags", "has"), [("fpu amx_bf16 amx_tile", True), ("fpu avx512_bf16", False), ("fpu amx_bf16x", False)]
)
def test_amx_is_named_where_pytorch_has_it_and_dpofast_has_not(tmp_path, monkeypatch, flags, has):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: A CPU\nflags\t\t: {flags}\nbugs\t: amx_bf16\n")
    monkeypatch.setattr(env_info_module, "_CPUINFO", tmp_path / "cpuinfo")
    assert (env_info()["cpu"]["amx"] != "no") == has
    lines = str(dpofast.plan(100, 64, 1000, "bf16", backend="cpu")).splitlines()
    assert any(line.startswith("amx ") and "torch.mm" in line for line in lines) == has
    for other in ({"dtype": "fp32", "backend": "cpu"}, {"dtype": "bf16", "backend": "torch"}):
        assert "amx" not in str(dpofast.plan(100, 64, 1000, **other))


def test_missing_torch_is_named_on_first_use(tmp_path):
    program = "import dpofast\ntry: dpofast.linear_logprob\nexcept ImportError as error: print(error)"
    printed = report(tmp_path, module="torch", error="ModuleNotFoundError('no torch')", command=("-c", program))
    assert "torch" in printed
