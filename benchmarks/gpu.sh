#!/usr/bin/env bash
# Builds, tests, sanitizes and measures on a machine with a GPU, in bounded steps:
#   benchmarks/gpu.sh [STEP...]     STEP: build test triton sanitize bench compile (default: all but
#                                   compile, which needs minutes of its own)
# A step's log, and its JSON, go to $OUT (default: build/gpu), and its last lines to the terminal. No
# step outlives its own limit or the call's ($TOTAL seconds, default 570); one that fails stops only
# those that need it. Wheels in wheels/ (peers to measure against) are installed beside the rest.
# CASES="--family cross_entropy" narrows bench and compile.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-build/gpu}
TOTAL=${TOTAL:-570}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 TRITON_INTERPRET=0 PYTHONPATH=.
failed=()

# step NAME SECONDS COMMAND...
step() {
  local name=$1 limit=$2 left=$((TOTAL - SECONDS - 5)) log="$OUT/$1.log" begun=$SECONDS
  shift 2
  if ((left < 10)); then
    echo "== $name: no time left"
    failed+=("$name")
    return 1
  fi
  timeout -k 5 $((left < limit ? left : limit)) "$@" >"$log" 2>&1
  local status=$?
  echo "== $name: exit $status after $((SECONDS - begun)) s"
  tail -n 12 "$log" | cut -c1-400
  # What comes back has to stay small: the end of a log says most.
  if (($(wc -c <"$log") > 1000000)); then
    tail -c 1000000 "$log" >"$log.end" && mv "$log.end" "$log"
  fi
  ((status == 0)) || failed+=("$name")
  return $status
}

if compgen -G "wheels/*.whl" >/dev/null; then
  $PYTHON -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$OUT/../site" wheels/*.whl && export PYTHONPATH=.:$OUT/../site
fi
parallel=()
if $PYTHON -c "import xdist" 2>/dev/null; then parallel=(-n 6); fi
capability=$($PYTHON -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())") || exit 1
if [[ $capability == 9.0 ]]; then capability=9.0a; fi
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability}

run() {
  case $1 in
    build)
      FASTNN_CUDA=1 step build 300 $PYTHON setup.py -q build_ext --inplace || exit 1
      ;;
    test)
      step test 200 bash -c "$PYTHON -m pytest -q -m 'gpu and not slow' ${parallel[*]} tests;
        first=\$?; $PYTHON -m pytest -q -m 'gpu and slow' tests; exit \$((first + \$?))"
      ;;
    triton)
      step triton 200 $PYTHON -m pytest -q "${parallel[@]}" tests/test_triton_*.py
      ;;
    sanitize)
      # Our kernels only, on small shapes, every tensor in an allocation of its own.
      step sanitize 150 bash -c "status=0; for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool \$tool --error-exitcode 9 \
          --kernel-regex kns=fastnn $PYTHON -m pytest -q -x -m gpu tests/test_cuda_*.py \
          -k '(test_options and everything) or test_all_ignored or (test_views and native)' \
          || status=1; done; exit \$status"
      ;;
    bench | compile)
      local compile=()
      if [[ $1 == compile ]]; then compile=(--compile); fi
      step "$1" 560 $PYTHON -m benchmarks.gpu_cases --out "$OUT/$1.json" "${compile[@]}" \
        --seconds $((TOTAL - SECONDS - 40)) ${CASES:-}
      ;;
    *)
      echo "unknown step $1" >&2
      exit 2
      ;;
  esac
}

for name in ${*:-build test triton sanitize bench}; do run "$name"; done
echo "== ${#failed[@]} failed: ${failed[*]:-none}; logs in $OUT"
((${#failed[@]} == 0))
