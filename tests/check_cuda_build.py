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
        hidden, weight, None, labels, None, -100, 4, [1.0, 1.0, 0.0], 0, "cuda", "cached", [64, 4, 640], ""
    )
    assert results[0].device.type == "cuda" and results[0].dtype == torch.float32
    for product in (lambda a, b, out: torch.mm(a, b, out_dtype=out.dtype, out=out),
                    lambda a, b, out: torch.addmm(out, a, b, out_dtype=out.dtype, out=out)):  # fmt: skip
        product(hidden, weight.T, torch.empty(4, 20, device="cuda"))

print(f"dpofast {dpofast.__version__}, torch {torch.__version__}, {info['cuda_compiler']} for {info['cuda_archs']}:")
print("  ", *launchers)
