"""What `make cuda-build` runs beside a CUDA torch: the module imports without a GPU, and the ops are registered."""

import torch

import dpofast
from dpofast import _C

assert torch.version.cuda, "not a CUDA torch"
launchers = sorted(name for name in dir(_C) if name.startswith("cuda_"))
assert {"cuda_logprob_fold", "cuda_logprob_grad", "cuda_logprob_finish"} <= set(launchers), launchers
info = _C.build_info()
for op in ("linear_logprob", "linear_logprob_backward", "logprob", "logprob_backward"):
    assert hasattr(torch.ops.dpofast, op), op
out = dpofast.linear_logprob(torch.randn(3, 8), torch.randn(20, 8), torch.arange(3))
assert out.logps.shape == (3,)

# Shapes and dtypes on a device that is not here: fake tensors go through the fake kernels.
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

with FakeTensorMode():
    hidden = torch.empty(4, 8, device="cuda", dtype=torch.bfloat16)
    weight = torch.empty(20, 8, device="cuda", dtype=torch.bfloat16)
    labels = torch.empty(4, device="cuda", dtype=torch.int64)
    results = torch.ops.dpofast.linear_logprob(
        hidden, weight, None, labels, None, -100, 4, [1.0, 1.0, 0.0, 0.0], 0, "cuda", "cached", [64, 4, 640], ""
    )
    assert results[0].device.type == "cuda" and results[0].dtype == torch.float32
    logits = torch.empty(4, 20, device="cuda")
    torch.mm(hidden, weight.T, out_dtype=logits.dtype, out=logits)
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14):  # fake tensors have no rule for it before
        torch.addmm(logits, hidden, weight.T, out_dtype=logits.dtype, out=logits)

# The bodies of the ops on tensors of a device that is not here: nothing may be copied to it or from it, for that waits.
from unittest import mock  # noqa: E402

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from dpofast import _ops  # noqa: E402
from dpofast.backends.base import PAIR_OPTIONS  # noqa: E402


class Copies(TorchDispatchMode):
    """Notes every copy between devices, and every question to one."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if len({x.device.type for x in tensors}) > 1 or "_local_scalar_dense" in str(function):
            self.found.append(str(function))
        return out


def operands(n: int, h: int, v: int) -> tuple:
    made = {"device": "cuda", "dtype": torch.bfloat16}
    return torch.empty(n, h, **made), torch.empty(v, h, **made), None, torch.empty(n, device="cuda", dtype=torch.int64)


def nothing(*_, **__) -> None:
    pass


with (
    FakeTensorMode(allow_non_fake_inputs=True),
    mock.patch("dpofast.backends.cuda.launch", nothing),
    mock.patch.multiple("dpofast.kernels.linear_keep", pack_tokens=nothing, linear_keep=nothing, seal=nothing),
    mock.patch("dpofast.backends.gpu.GpuPasses.accumulate", nothing),
    mock.patch.object(torch.Tensor, "data_ptr", lambda x: 16),
    mock.patch("dpofast.backends.gpu.multiprocessors", lambda device: 132),
    Copies() as copies,
):
    for schedule, sizes in {
        "score": [256, 4, 0], "jacobian": [256, 4, 8 * 64 * 4 + 32], "cached": [256, 4, 8 * 1000 * 2 + 32],
        "mixed": [256, 4, 8 * 512 * 2 + 32], "recompute": [256, 4, 0], "recompute-split": [256, 4, 0],
        "score, fused": [0, 4, 0], "jacobian, fused": [0, 4, 8 * 64 * 4 + 32],
        "cached, fused": [0, 8, 8 * 1000 * 2 + 32], "recompute, fused": [256, 4, 0, 1],
    }.items():  # fmt: skip
        schedule, given = schedule.partition(",")[0], operands(8, 64, 1000)
        how = [1.0, 1.0, 0.0, 0.0], "cuda", schedule, sizes, ""
        *results, cache = _ops._linear_logprob(*given, None, None, 8, how[0], 0, *how[1:])
        if schedule != "score":
            needs = [True, schedule != "jacobian", False]
            saved = [*results[:2], results[2], cache]
            _ops._linear_logprob_backward([results[0], None], [*given, None], saved, needs, None, 8, *how)
    how = "sigmoid", [0.1] * len(PAIR_OPTIONS), "reverse_kl"
    made = {"device": "cuda", "dtype": torch.float32}
    labels, ends = torch.empty(4, 7, device="cuda", dtype=torch.int64), torch.empty(5, device="cuda", dtype=torch.int64)
    for layout, boundaries in ((labels, None), (labels.view(-1), ends)):
        logps = torch.empty(layout.shape, **made)
        rest = torch.empty(4, **made), None, None, None, -100, *how
        loss, sums, _, coefficients = _ops._sequence_dpo(logps, layout, boundaries, *rest, "mean", "cuda")
        incoming = [loss, sums]
        _ops._sequence_dpo_backward(incoming, logps, layout, boundaries, coefficients, -100, "mean")
assert not copies.found, copies.found

print(f"dpofast {dpofast.__version__}, torch {torch.__version__}, {info['cuda_compiler']} for {info['cuda_archs']}:")
print("  ", *launchers)
