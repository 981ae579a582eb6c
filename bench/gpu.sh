#!/usr/bin/env bash
# The day there is a GPU: builds, tests, compute-sanitizer and benchmark, under ten minutes, and the results in
# bench/results/. Needs nvcc, a CUDA torch, Triton and setuptools; no network. What is done is skipped when it is run again;
# what is cut off leaves the results it has. BUDGET: seconds in all (default 570).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-570}
began=$SECONDS
state=build/gpu
mkdir -p "$state" bench/results
report=bench/results/gpu-report.txt

say() { echo "== $* (${SECONDS}s)" | tee -a "$report"; }
left() { echo $((BUDGET - (SECONDS - began))); }

# step NAME SECONDS COMMAND...: at most so long; done only once
step() {
  local name=$1 limit=$2
  shift 2
  [ -e "$state/$name.done" ] && { say "$name: done before"; return; }
  [ "$(left)" -lt 10 ] && { say "$name: no time left"; return; }
  [ "$limit" -gt "$(left)" ] && limit=$(left)
  say "$name: $*"
  if timeout -k 5 "$limit" "$@" > "$state/$name.log" 2>&1; then
    touch "$state/$name.done"
    say "$name: ok"
  else
    say "$name: FAILED or cut off (exit $?), see the end of its output"
  fi
  tail -n 15 "$state/$name.log" | tee -a "$report"
}

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
  { echo "bench/gpu.sh: torch sees no CUDA GPU here: python3 -m dpofast.env_info says more" >&2; exit 1; }
nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv | tee "$report"
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1)
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability} DPOFAST_BUILD_CUDA=1
# torch brings pybind11's headers, should pybind11 itself be missing.
"$PYTHON" -c 'import pybind11' 2> /dev/null ||
  export PYBIND11_INCLUDE=$("$PYTHON" -c 'import os, torch; print(os.path.join(os.path.dirname(torch.__file__), "include"))')

site=$PWD/$state/site
step build 150 "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --no-index --upgrade --target "$site" .
export PYTHONPATH=$site
(cd "$state" && "$PYTHON" -m dpofast.env_info) | tee -a "$report"

# A first measurement early, whatever happens after it.
step bench-first 60 "$PYTHON" bench/gpu.py --only qwen3 --no-peers --rounds 7 --out "$state/first.json"
step tests-gpu 60 "$PYTHON" -m pytest -q -x tests/test_gpu.py
step tests-numeric 150 "$PYTHON" -m pytest -q --maxfail 20 tests/test_primitive.py tests/test_logprob.py -k "gpu"
step bench 240 "$PYTHON" bench/gpu.py --seconds 180
for tool in memcheck racecheck initcheck synccheck; do
  step "sanitizer-$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" bench/gpu_kernels.py
done
say "finished"
