"""The benchmarks. Each is a module with a ``main``: ``dpofast bench head``, or ``python -m dpofast.bench.head``.

``head``, ``pairs``, ``hardware``, ``step`` and ``prompt`` run on a CPU; ``gpu`` and those whose names begin with it run
on a GPU, and bench/gpu.sh runs all of these. They write records (`dpofast.bench.record`), of which ``report`` makes the
tables.
In a checkout ``python -m`` meets the sources in ./dpofast, which have no benchmarks: ``python -P -m`` does not.
"""

NAMES = (
    "head", "pairs", "hardware", "step", "prompt", "gpu", "gpu_gemm", "gpu_kernels", "gpu_profile", "gpu_smoke",
    "gpu_steps", "report",
)  # fmt: skip
