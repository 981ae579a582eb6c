"""Every CUDA kernel once or twice on small odd shapes: what compute-sanitizer watches in bench/gpu.sh."""

import argparse
import itertools

import torch

import dpofast
from dpofast.bench.measure import device_for, synchronize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--few", action="store_true", help="two dtypes")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, the kernels emulated")
    args = parser.parse_args()
    device = device_for(args.rehearse)
    dtypes = (torch.bfloat16, torch.float32, *(() if args.few else (torch.float16, torch.float64)))
    shapes = ((3, 8, 901), (20, 24, 201)) if args.rehearse else ((3, 8, 9001), (130, 24, 801))

    for dtype, (n, h, v), softcap in itertools.product(dtypes, shapes, (None, 4.0)):
        hidden = torch.randn(n, h, device=device, dtype=dtype, requires_grad=True)
        weight = torch.randn(v, h, device=device, dtype=dtype, requires_grad=True)
        bias = torch.randn(v, device=device, dtype=dtype, requires_grad=True)
        labels = torch.randint(v, (n,), device=device)
        labels[0] = -100
        for budget in ("1GiB", "2MiB"):
            out = dpofast.linear_logprob(
                hidden, weight, labels, bias=bias, softcap=softcap, memory_budget=budget, backend="cuda",
                outputs=("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
            )  # fmt: skip
            (out.logps.sum() + out.entropy.sum()).backward()
            out = dpofast.linear_logprob(hidden, weight.detach(), labels, softcap=softcap, backend="cuda")
            out.logps.sum().backward()
        logits = torch.randn(n, v + 3, device=device, dtype=dtype)[:, 1:-2].requires_grad_()  # rows off any alignment
        dpofast.logprob(logits, labels, softcap=softcap, backend="cuda").logps.sum().backward()
    synchronize(device)
    print("every kernel ran")


if __name__ == "__main__":
    main()
