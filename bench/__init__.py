"""The benchmarks. Each is a module with a ``main``: ``dpofast bench head``, or ``python -m dpofast.bench.head``.

``dpofast bench`` alone is ``dpofast bench all``.

Those whose names begin with ``gpu`` run on a GPU, and bench/gpu.sh runs all of them; the others run on a CPU. They
write records (`dpofast.bench.record`), of which ``report`` makes the tables.
In a checkout ``python -m`` meets the sources in ./dpofast, which have no benchmarks: ``python -P -m`` does not.
"""

NAMES = (
    "all", "head", "filter", "filter_training", "pairs", "hardware", "calls", "step", "prompt", "trainer", "cost",
    "sweep", "data", "gpu", "gpu_gemm", "gpu_kernels", "gpu_profile", "gpu_smoke", "gpu_steps", "report", "page",
    "csv",
)  # fmt: skip
