"""Every CUDA kernel once or twice on small odd shapes: what compute-sanitizer watches in bench/gpu.sh."""

import itertools

import torch

import dpofast

for dtype, (n, h, v), softcap in itertools.product(
    (torch.float32, torch.bfloat16, torch.float16, torch.float64), ((3, 8, 9001), (130, 24, 801)), (None, 4.0)
):
    hidden = torch.randn(n, h, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(v, h, device="cuda", dtype=dtype, requires_grad=True)
    bias = torch.randn(v, device="cuda", dtype=dtype, requires_grad=True)
    labels = torch.randint(v, (n,), device="cuda")
    labels[0] = -100
    for budget in ("1GiB", "2MiB"):
        out = dpofast.linear_logprob(
            hidden, weight, labels, bias=bias, softcap=softcap, memory_budget=budget, backend="cuda",
            outputs=("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
        )  # fmt: skip
        (out.logps.sum() + out.entropy.sum()).backward()
        out = dpofast.linear_logprob(hidden, weight.detach(), labels, softcap=softcap, backend="cuda")
        out.logps.sum().backward()
    logits = torch.randn(n, v + 3, device="cuda", dtype=dtype)[:, 1:-2].requires_grad_()  # rows off any alignment
    dpofast.logprob(logits, labels, softcap=softcap, backend="cuda").logps.sum().backward()
torch.cuda.synchronize()
print("every kernel ran")
