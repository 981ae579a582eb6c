"""Which backend runs: names, the environment, and the reasons given."""

from __future__ import annotations

import importlib.util
import inspect
import platform
from types import SimpleNamespace

import pytest
import torch

import dpofast
from dpofast import native
from dpofast.backends import cpu, registry
from dpofast.backends.base import Backend, LogitsProblem
from dpofast.contract import STATISTICS

ISAS = native.cpu_isas()


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    monkeypatch.delenv("DPOFAST_BACKEND", raising=False)
    monkeypatch.delenv("DPOFAST_CPU_ISA", raising=False)


def test_the_compiled_module_is_there_and_ends_with_the_scalar_kernels():
    """Everything else tests little without it."""
    assert ISAS and ISAS[-1] == "scalar" and len(set(ISAS)) == len(ISAS)
    order = ("avx512_bf16", "avx512", "avx2", "neon", "scalar")
    assert [isa for isa in order if isa in ISAS] == list(ISAS)


def test_the_instruction_sets_are_those_the_machine_has():
    features = native.C.cpu_features()
    if not features:
        assert ISAS == (("neon", "scalar") if platform.machine() in ("aarch64", "arm64") else ("scalar",))
        return
    avx2 = features["avx2"] and features["fma"]
    avx512 = avx2 and all(features[f"avx512{x}"] for x in ("f", "bw", "dq", "vl"))
    assert ("avx2" in ISAS, "avx512" in ISAS) == (avx2, avx512)
    assert ("avx512_bf16" in ISAS) == (avx512 and features["avx512bf16"])


@pytest.mark.parametrize(
    ("backend", "device", "exact"),
    [
        ("auto", "cpu", f"cpu:{ISAS[0]}"),
        ("auto", "cuda", "triton" if importlib.util.find_spec("triton") else "torch"),
        ("triton", "xpu", "triton"),
        ("cpu", "cpu", f"cpu:{ISAS[0]}"),
        ("cpu:scalar", "cpu", "cpu:scalar"),
        ("torch", "cpu", "torch"),
        ("torch", "cuda", "torch"),
    ],
)
def test_resolve(backend, device, exact):
    if device != "cpu" and torch.version.cuda and hasattr(native.C, "cuda_logprob_fold"):
        exact = "cuda" if backend == "auto" else exact
    assert registry.resolve(backend, device) == exact


@pytest.mark.parametrize("name", ("auto", "cuda", "triton", "torch"))
def test_a_graph_resolves_every_name_of_a_gpu(name, monkeypatch):
    """torch.compile follows the question for a device that is not here, as if its backends were."""
    if name == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("no Triton")
    monkeypatch.setattr(native, "C", SimpleNamespace(cuda_logprob_fold=None))
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def named(x):
        return x + len(registry.resolve(name, "cuda"))

    torch._dynamo.reset()
    compiled = torch.compile(named, fullgraph=True, backend="eager")
    exact = registry.resolve(name, "cuda")
    assert exact == ("cuda" if name == "auto" else name) and compiled(torch.zeros(1)) == len(exact)


@pytest.mark.parametrize(
    ("backend", "device", "message"),
    [
        ("gpu", "cpu", "backend: got 'gpu', expected 'auto', 'cpu', 'cuda'"),
        ("", "cpu", "backend: got ''"),
        ("torch:avx2", "cpu", "backend: got 'torch:avx2'"),
        ("cpu:sse9", "cpu", "backend: asks for the CPU instruction set 'sse9'.*expected one of .*scalar"),
        ("cpu", "cuda", "backend: 'cpu' needs tensors on the CPU, got device 'cuda'"),
        ("cpu:scalar", "meta", "backend: 'cpu:scalar' needs tensors on the CPU"),
    ],
)
def test_what_cannot_run_says_why(backend, device, message):
    with pytest.raises(ValueError, match=message):
        registry.resolve(backend, device)


def test_the_environment_answers_auto_and_nothing_else(monkeypatch):
    monkeypatch.setenv("DPOFAST_BACKEND", "torch")
    assert registry.resolve("auto", "cpu") == "torch"
    assert registry.resolve("cpu", "cpu") == f"cpu:{ISAS[0]}"
    monkeypatch.setenv("DPOFAST_BACKEND", "cpu:scalar")
    assert registry.resolve("auto", "cpu") == "cpu:scalar"
    monkeypatch.setenv("DPOFAST_BACKEND", "auto")
    assert registry.resolve("auto", "cpu") == f"cpu:{ISAS[0]}"
    monkeypatch.setenv("DPOFAST_BACKEND", "")
    assert registry.resolve("auto", "cpu") == f"cpu:{ISAS[0]}"
    monkeypatch.setenv("DPOFAST_BACKEND", "fast")
    with pytest.raises(ValueError, match="backend: got 'fast'"):
        registry.resolve("auto", "cpu")


def test_the_environment_chooses_the_instruction_set(monkeypatch):
    monkeypatch.setenv("DPOFAST_CPU_ISA", "scalar")
    assert registry.resolve("auto", "cpu") == "cpu:scalar"
    assert registry.resolve("cpu", "cpu") == "cpu:scalar"
    assert registry.resolve(f"cpu:{ISAS[0]}", "cpu") == f"cpu:{ISAS[0]}"
    monkeypatch.setenv("DPOFAST_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match="DPOFAST_CPU_ISA: asks for the CPU instruction set 'sse9'"):
        registry.resolve("cpu", "cpu")
    assert registry.resolve("torch", "cpu") == "torch"


def test_the_environment_reaches_the_kernels(monkeypatch):
    """Not only names: the scalar exp and the vector exp differ in some last bit of 5,000."""
    hidden, weight, labels = torch.randn(500, 16), torch.randn(300, 16), torch.arange(500) % 300

    def logps(**kwargs):
        return dpofast.linear_logprob(hidden, weight, labels, **kwargs).logps

    scalar, torchs = logps(backend="cpu:scalar"), logps(backend="torch")
    monkeypatch.setenv("DPOFAST_CPU_ISA", "scalar")
    assert torch.equal(logps(), scalar)
    monkeypatch.setenv("DPOFAST_BACKEND", "torch")
    assert torch.equal(logps(), torchs) and not torch.equal(scalar, torchs)
    if len(ISAS) > 1:
        assert not torch.equal(logps(backend=f"cpu:{ISAS[0]}"), scalar)


def test_without_the_compiled_module_torch_runs_and_cpu_says_why(monkeypatch):
    monkeypatch.setattr(native, "C", None)
    monkeypatch.setattr(native, "_ISAS", ())
    monkeypatch.setattr(native, "why_no_C", "no such file")
    assert native.cpu_isas() == () and registry.resolve("auto", "cpu") == "torch"
    with pytest.raises(ValueError, match="backend: 'cpu' cannot run: no such file.*use backend='torch'"):
        registry.resolve("cpu", "cpu")
    assert [(name, runs) for name, runs, _ in registry.explain()] == [(b, b == "torch") for b in registry.BACKENDS]


def test_a_backend_has_the_methods_that_the_ops_call(backend):
    engine, methods = registry.get(backend), [name for name in vars(Backend) if not name.startswith("_")]
    assert isinstance(engine, Backend) and len(methods) == 7
    for name in methods:
        theirs, ours = (list(inspect.signature(getattr(x, name)).parameters) for x in (type(engine), Backend))
        assert [x.lstrip("_") for x in theirs] == ours, name


def test_explain_has_every_backend_and_the_default_first():
    rows = registry.explain()
    others = registry.BACKENDS[1:]
    assert [name for name, _, _ in rows] == [f"cpu:{ISAS[0]}", *others, *(f"cpu:{isa}" for isa in ISAS[1:])]
    for name, runs, why in rows:
        assert why and runs == (name not in ("cuda", "triton") or torch.cuda.is_available()), (name, why)


def test_explain_says_why_one_cannot_run(monkeypatch):
    monkeypatch.setenv("DPOFAST_CPU_ISA", "sse9")
    name, runs, why = registry.explain()[0]
    assert (name, runs) == ("cpu", False) and "sse9" in why


def test_the_compiled_module_checks_what_it_is_given():
    with pytest.raises(ValueError, match="missing argument n"):
        native.C.cpu_linear_logprob_forward("scalar", {})
    problem = LogitsProblem(torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    args, _alive = cpu._logits_operands(problem)
    args |= {"outputs": 0} | dict.fromkeys(
        ("logps", "lse", *STATISTICS, "grad_logps", "grad_entropy", "grad_logits", "grad_offsets")
    )
    with pytest.raises(ValueError, match="unknown argument colour"):
        native.C.cpu_logits_forward("scalar", args | {"colour": None})
    with pytest.raises(ValueError, match="sizes must be positive"):
        native.C.cpu_logits_forward("scalar", args | {"v": 0})
    with pytest.raises(ValueError, match="'sse9' is not available"):
        native.C.traits("sse9", 0, 0)
    with pytest.raises(ValueError, match="unknown dtype code"):
        native.C.traits("scalar", 0, 4)


@pytest.mark.skipif(not hasattr(native.C, "cuda_logprob_finish"), reason="built without CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a launch on these addresses would be real")
def test_a_launch_that_fails_names_the_kernel_and_its_shape():
    """Without a driver every launch fails, which is what this needs."""
    there = 64
    args = {"stats": there, "labels": there, "n": 3, "v": 7, "dtype": 0, "logps": there, "lse": there, "stream": None}
    args |= dict.fromkeys(("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"))
    with pytest.raises(RuntimeError, match="CUDA kernel logprob_finish on 3 rows of 1, or a kernel before it: "):
        native.C.cuda_logprob_finish(args)
    native.C.cuda_logprob_finish(args | {"n": 0})  # nothing to launch
