#!/usr/bin/env bash
# On a machine with a GPU: is it right, how fast is it, and where does the time go; under ten minutes, no network.
# Needs a CUDA torch, pytest, and nvcc unless .gpu/site has a build for this Python (`make gpu-site`); `make gpu-wheels`
# brings the peers. Steps come in the order of their value, and after each one all there is lies in OUT.
#
#   OUT=folder       for the results (default: bench/results)
#   BUDGET=seconds   in all (default 570)
#   STEPS="a b"      only these, again even if they were done; default: all of them that are not done
#   REHEARSE=1       a rehearsal of this script on the CPU: tiny sizes, the CUDA kernels emulated, nothing built
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results}
BUDGET=${BUDGET:-570}
ORDER="info smoke ratios gemm steps profile tests-cuda tests-gpu peers triton tests-triton memcheck racecheck bench"
rehearse=${REHEARSE:+--rehearse}
began=$SECONDS
state=$PWD/build/gpu${REHEARSE:+-rehearsal}
report=$state/report.txt
mkdir -p "$state" "$OUT"
: > "$report"

for wanted in ${STEPS:-}; do
  case " $ORDER " in *" $wanted "*) ;; *) echo "STEPS: no step $wanted, expected some of $ORDER" >&2; exit 1 ;; esac
  rm -f "$state/$wanted".*
done

say() { echo "== $* ($((SECONDS - began))s)" | tee -a "$report"; }
left() { echo $((BUDGET - (SECONDS - began))); }

# Everything so far, in four flat files.
collect() {
  cp "$report" "$OUT/gpu-report.txt"
  [ -e "$state/profile.txt" ] && cp "$state/profile.txt" "$OUT/gpu-profile.txt"
  "$PYTHON" - "$state" > "$OUT/gpu-results.json" << 'END'
import json, pathlib, sys
machine, records = {}, []
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.json")):
    try:
        part = json.loads(path.read_text())
    except ValueError:  # cut off while it was written
        continue
    machine, records = part["machine"], records + part["records"]
print('{\n "machine": %s,\n "records": [\n  %s\n ]\n}' % (json.dumps(machine), ",\n  ".join(map(json.dumps, records))))
END
  tar -czf "$OUT/gpu-logs.tar.gz" -C "$state" --exclude=site --exclude=peers . 2> /dev/null
}

# step NAME SECONDS LINES COMMAND...: at most so long, of what is left; the last lines of its output are shown
step() {
  local name=$1 limit=$2 lines=$3 status=0 from=$SECONDS
  shift 3
  case " ${STEPS:-$ORDER} " in *" ${name%%.*} "*) ;; *) return ;; esac
  [ -e "$state/$name.done" ] && { say "$name: done before"; return; }
  [ "$(left)" -lt 8 ] && { say "$name: no time left"; return; }
  [ "$limit" -gt "$(left)" ] && limit=$(left)
  timeout -k 5 "$limit" "$@" > "$state/$name.log" 2>&1 || status=$?
  case $status in
    0) touch "$state/$name.done"; say "$name: ok, $((SECONDS - from))s" ;;
    124 | 137) say "$name: CUT OFF after ${limit}s" ;;
    *) say "$name: FAILED, exit $status, $((SECONDS - from))s" ;;
  esac
  # Of a long log the failures too, which are rarely at its end.
  grep -E '^(FAIL|FAILED|ERROR) ' "$state/$name.log" | head -n 40 >> "$report"
  tail -n 120 "$state/$name.log" >> "$report"
  grep -v '^$' "$state/$name.log" | tail -n "$lines" | cut -c 1-170
  collect
}

# ---- The package that is measured ----

# Whether a site imports with this Python and has the CUDA kernels.
usable() {
  (cd / && PYTHONPATH=$1 "$PYTHON" -c '
import sys, dpofast
from dpofast import _C
assert dpofast.__file__.startswith(sys.argv[1]), dpofast.__file__
assert hasattr(_C, "cuda_logprob_fold")' "$1") >> "$state/site.log" 2>&1
}

# What a build is made of, apart from Python.
sources() { cat setup.py $(find csrc -type f | LC_ALL=C sort) | sha256sum | cut -d ' ' -f 1; }

site=$state/site
if [ -n "$rehearse" ]; then
  site=$(cd / && "$PYTHON" -c 'import os, dpofast; print(os.path.dirname(os.path.dirname(dpofast.__file__)))') || exit 1
else
  "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "bench/gpu.sh: torch sees no CUDA GPU here: python3 -m dpofast.env_info says more" >&2; exit 1; }
  nvidia-smi --query-gpu=name,driver_version,compute_cap,clocks.max.sm,power.limit --format=csv,noheader | tee -a "$report"
  found=
  for place in "$PWD/.gpu/site" "$site"; do
    [ -d "$place" ] || continue
    if ! usable "$place"; then
      say "site: ${place#"$PWD"/} cannot be used, see site.log"
    elif [ ! -e "$place/sources.sha256" ]; then
      found=$place
      say "site: ${place#"$PWD"/} does not say of which C++ and CUDA sources it is (sources.sha256)"
    elif [ "$(cat "$place/sources.sha256")" = "$(sources)" ]; then
      found=$place
      say "site: ${place#"$PWD"/}"
    else
      say "site: ${place#"$PWD"/} is of other C++ and CUDA sources"
    fi
    [ -n "$found" ] && break
  done
  if [ -n "$found" ]; then
    [ "$found" = "$site" ] || { rm -rf "$site" && cp -r "$found" "$site"; }
  else
    export DPOFAST_BUILD_CUDA=1
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1)
    export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability}
    # torch brings pybind11's headers, should pybind11 itself be missing.
    "$PYTHON" -c 'import pybind11' 2> /dev/null || export PYBIND11_INCLUDE=$(
      "$PYTHON" -c 'import os, torch; print(os.path.join(os.path.dirname(torch.__file__), "include"))')
    rm -rf "$site"
    timeout -k 5 150 "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --no-index --target "$site" . \
      > "$state/build.log" 2>&1
    if ! usable "$site"; then
      say "site: the build FAILED"
      tail -n 40 "$state/build.log" "$state/site.log" | tee -a "$report"
      collect
      exit 1
    fi
    sources > "$site/sources.sha256"
    say "site: built"
  fi
  # Python sources are those of this tree, whatever the build had.
  "$PYTHON" - "$site" << 'END'
import pathlib, shutil, sys
site = pathlib.Path(sys.argv[1])
for tree, to in (("dpofast", "dpofast"), ("kernels", "dpofast/kernels"), ("bench", "dpofast/bench")):
    for path in pathlib.Path(tree).rglob("*.py"):
        target = site / to / path.relative_to(tree)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
END
  usable "$site" || { say "site: unusable with the Python sources of this tree"; cat "$state/site.log"; collect; exit 1; }
fi
# The same package in every step: PYTHONSAFEPATH keeps ./dpofast, which has no kernels and no benchmarks, out of the way.
export PYTHONPATH=$site PYTHONSAFEPATH=1 DPOFAST_SITE=$site

# ---- Steps ----

tests() {
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" 14 "$PYTHON" -c '
import os, sys
import dpofast, pytest
assert dpofast.__file__.startswith(os.environ["DPOFAST_SITE"]), dpofast.__file__
from dpofast import _C
assert sys.argv[1] == "rehearse" or hasattr(_C, "cuda_logprob_fold"), "no CUDA kernels in " + _C.__file__
print("tested:", dpofast.__file__, flush=True)
sys.exit(pytest.main(sys.argv[2:]))' "${rehearse:+rehearse}" -q --maxfail 40 -p no:cacheprovider --color=no --tb=short "$@"
}

numeric="tests/test_primitive.py tests/test_logprob.py tests/backends/test_fold.py tests/whole/test_equal_bits.py tests/test_ops.py tests/backends/test_sequence_dpo.py"
alone="never_wait or captured" # a failure of these may leave the process unusable for others
smoked=cuda,torch fused=triton
cuda="cuda:gpu" triton="triton:gpu" n_cuda=8 n_triton=8 n_alone=6
if [ -n "$rehearse" ]; then
  numeric="tests/test_logprob.py" smoked=cuda fused=torch cuda="cuda:emu and strides" triton="torch and strides" n_cuda=0 n_triton=0 n_alone=0
fi

step info 40 30 "$PYTHON" -m dpofast.env_info
step smoke 60 16 "$PYTHON" -m dpofast.bench.gpu_smoke --backends "$smoked" $rehearse
step ratios 90 40 "$PYTHON" -m dpofast.bench.gpu --only 8192,llama-3-8b,qwen3,gemma --backends cuda,torch --rounds 7 \
  --seconds 75 --out "$state/ratios.json" $rehearse
step gemm 55 70 "$PYTHON" -m dpofast.bench.gpu_gemm --seconds 40 --out "$state/gemm.json" $rehearse
step steps 60 40 "$PYTHON" -m dpofast.bench.gpu_steps --seconds 40 --out "$state/steps.json" $rehearse
step profile 60 30 "$PYTHON" -m dpofast.bench.gpu_profile --out "$state/profile.txt" $rehearse
tests tests-cuda 120 -n $n_cuda -k "$cuda" $numeric
tests tests-gpu 90 -n $n_cuda -k "not ($alone)" tests/backends/test_gpu.py tests/backends/test_linear_keep.py
tests tests-gpu.alone 60 -n $n_alone -k "$alone" tests/backends/test_gpu.py

peers=$PYTHONPATH
if compgen -G '.gpu/wheels/*.whl' > /dev/null && [ ! -d "$state/peers" ]; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$state/peers" .gpu/wheels/*.whl > "$state/wheels.log" 2>&1 ||
    say "wheels: not installed, see wheels.log"
fi
[ -d "$state/peers" ] && peers=$PYTHONPATH:$state/peers
step peers 100 34 env PYTHONPATH="$peers" "$PYTHON" -m dpofast.bench.gpu --peers --only 8192,llama-3-8b,qwen3,gemma --rounds 5 \
  --seconds 85 --out "$state/peers.json" $rehearse

step triton 60 20 "$PYTHON" -m dpofast.bench.gpu_smoke --backends "$fused" $rehearse
step triton.ratios 60 20 "$PYTHON" -m dpofast.bench.gpu --only 8192,qwen3 --backends triton --rounds 3 --seconds 50 \
  --out "$state/triton.json" $rehearse
tests tests-triton 150 -n $n_triton -k "$triton" $numeric

# Without PyTorch's caching an access beyond a tensor is one beyond an allocation; cuBLAS is not watched.
sanitize() {
  local tool=$1 watch="compute-sanitizer --tool $1 --error-exitcode 1" filter
  if [ -n "$rehearse" ]; then
    watch=
  else
    filter=$(compute-sanitizer --help 2> /dev/null | grep -o -E -- '--(kernel-regex|filter)\b' | head -1)
    watch+=" ${filter:---kernel-regex} kns=logprob"
  fi
  step "$tool" 75 8 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 CUDA_LAUNCH_BLOCKING=1 $watch \
    "$PYTHON" -m dpofast.bench.gpu_kernels --few $rehearse
}
sanitize memcheck
sanitize racecheck
step bench 120 40 "$PYTHON" -m dpofast.bench.gpu --backends cuda --only zephyr,qwen2.5,long,tulu --seconds 110 \
  --out "$state/bench.json" $rehearse
collect
say "finished"
cp "$report" "$OUT/gpu-report.txt"
