#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: build, GPU tests, sanitizer, suites on CUDA. Unattended, no network, no virtual
# environment, no make; everything runs with the machine's own Python.
#
#   bash benchmarks/gpu.sh
#
# Environment
#   PYTHON   the interpreter that has a CUDA build of torch          [python3]
#   OUT      where the results go                                    [benchmarks/results/<name of the GPU>]
#   BUDGET   seconds for everything; steps that find none left fail  [560]
#   BUILD    0 takes the native modules that lie in pyfast/ as they are
#   STEPS    the steps to run, of those below                        [all]
#
# Results, each written as its step ends, so that a run cut short leaves what it had:
#   cuda.json    figures of the suites done so far
#   calibration.json  constants of the cost model, as `pyfast calibrate --device cuda` measured them
#   kernels.json  figures of each kernel by itself
#   profile.json  counters of each kernel (Nsight Compute)
#   steps.tsv     step, seconds, exit status
#   machine.txt   GPU, driver, clocks and power at the start
#   clocks.csv    clocks, power and temperature every two seconds
#   log.txt       what every step printed
#
# Exit status: 0 all steps passed, 1 a step failed, 2 there is no GPU (or no torch that sees it).
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
budget=${BUDGET:-560}
SECONDS=0

refuse() {
  echo "gpu.sh: $1" >&2
  exit 2
}

command -v "$python" >/dev/null || refuse "no $python here; set PYTHON"
found=$("$python" -c '
import sys
try:
    import torch
except ImportError as error:
    sys.exit(f"torch does not load: {error}")
if torch.version.cuda is None:
    sys.exit(f"torch {torch.__version__} has no CUDA")
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no GPU")
major, minor = torch.cuda.get_device_capability()
slug = "-".join("".join(c if c.isalnum() else " " for c in torch.cuda.get_device_name()).lower().split())
print(f"{major}.{minor} {slug}")
' 2>&1 | tail -n 1; exit "${PIPESTATUS[0]}") || refuse "no GPU: $found"
read -r architecture slug <<<"$found"

out=${OUT:-$root/benchmarks/results/$slug}
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
work=$(mktemp -d)
sampler=""
cleanup() {
  if [[ -n $sampler ]]; then kill "$sampler" 2>/dev/null; fi
  rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 1' INT TERM

rm -f "$out/cuda.json"
: >"$out/log.txt"
printf 'step\tseconds\tstatus\n' >"$out/steps.tsv"

if command -v nvidia-smi >/dev/null; then
  nvidia-smi -q -d CLOCK,POWER,PERFORMANCE >"$out/machine.txt" 2>&1
  nvidia-smi --query-gpu=timestamp,clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu,utilization.gpu \
    --format=csv --loop=2 >"$out/clocks.csv" 2>/dev/null &
  sampler=$!
else
  echo "no nvidia-smi; GPU $slug, compute capability $architecture" >"$out/machine.txt"
fi

failures=0
# step NAME LIMIT COMMAND…   runs the command for at most LIMIT seconds, within what is left of the budget.
step() {
  local name=$1 limit=$2 left=$((budget - SECONDS)) begin=$SECONDS status
  shift 2
  ((left < limit)) && limit=$left
  if [[ -n ${STEPS:-} && " $STEPS " != *" $name "* ]]; then return 0; fi
  echo "== $name" | tee -a "$out/log.txt"
  if ((limit < 5)); then
    echo "no time left" | tee -a "$out/log.txt"
    status=124
  else
    timeout --kill-after=10 "$limit" "$@" </dev/null 2>&1 | tee -a "$out/log.txt"
    status=${PIPESTATUS[0]}
  fi
  printf '%s\t%s\t%s\n' "$name" $((SECONDS - begin)) "$status" >>"$out/steps.tsv"
  if ((status != 0)); then failures=$((failures + 1)); fi
  return "$status"
}

# What follows runs as steps. timeout starts programs, not functions, so it is given a shell that knows these.

build() {
  cd "$root" || return
  if [[ ${BUILD:-1} != 0 ]]; then
    PYFAST_CUDA=1 TORCH_CUDA_ARCH_LIST=$architecture "$python" setup.py -q build_ext --inplace || return
  fi
  # The package as it would be installed: the checkout's files, with triton_kernels inside.
  mkdir -p "$work/site/pyfast" && ln -s "$root"/pyfast/* "$root/triton_kernels" "$work/site/pyfast/"
}

info() {
  "$python" -c 'from pyfast.cli import main; main()' info
}

# Each file with GPU tests in a process of its own, all at once: they spend their time in Triton's compiler.
gpu_tests() {
  set -o pipefail
  local file process status=0 processes=()
  for file in $(grep -l 'mark\.gpu' "$root"/tests/test_*.py); do
    (
      "$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider -q -m gpu "$file" 2>&1 |
        sed "s/^/$(basename "$file" .py): /"
    ) &
    processes+=($!)
  done
  for process in "${processes[@]}"; do wait "$process" || status=1; done
  return "$status"
}

# A suite, with options of its own, into a file of its own.
suite() {
  "$python" -c 'from pyfast.cli import main; main()' bench "$@" --device cuda --json "$work/$1.json"
}

# Adds what a suite wrote to cuda.json, with those before it: no step, for no limit may cut it off.
collect() {
  if [[ ! -s $work/$1.json ]]; then return 0; fi
  "$python" - "$out/cuda.json" "$work/$1.json" <<'PYTHON'
import sys
from pathlib import Path

from pyfast.bench.schema import Report

whole, part = map(Path, sys.argv[1:])
report = Report.from_json(part.read_text())
if whole.exists():
    report = Report.from_json(whole.read_text()).merge(report)
whole.write_text(report.to_json())
PYTHON
}

calibrate() {
  "$python" -c 'from pyfast.cli import main; main()' calibrate --device cuda || return
  cp "$PYFAST_CACHE_DIR/calibration.json" "$out/"
}

kernels() {
  "$python" "$root/benchmarks/kernels_cuda.py" measure "$out/kernels.json"
}

profile() {
  local ncu options
  ncu=$(command -v ncu || echo "${CUDA_HOME:-/usr/local/cuda}/bin/ncu")
  if [[ ! -x $ncu ]]; then
    echo "Nsight Compute is not installed"
    return 0
  fi
  read -ra options < <("$python" "$root/benchmarks/profile_cuda.py" sections)
  "$ncu" --clock-control none --page raw --csv "${options[@]}" \
    "$python" "$root/benchmarks/profile_cuda.py" launch >"$work/raw.csv" || return
  "$python" "$root/benchmarks/profile_cuda.py" read "$work/raw.csv" --json "$out/profile.json"
}

sanitize() {
  local tool
  tool=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
  if [[ ! -x $tool ]]; then
    echo "compute-sanitizer is not installed"
    return 0
  fi
  # Without torch's cache each tensor is an allocation of its own, whose bounds memcheck knows.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool "$1" --error-exitcode 9 "$python" "$root/benchmarks/small_shapes.py"
}

export -f build info calibrate kernels profile gpu_tests suite sanitize
export root python architecture work out
export PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=$work/triton MPLCONFIGDIR=$work PYFAST_CACHE_DIR=$work/cache
export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
shell=(bash -c '"$@"' bash)
cd "$work" || exit 1 # not in the checkout, whose folder triton_kernels would hide other projects' module

if step build 180 "${shell[@]}" build; then
  step info 30 "${shell[@]}" info
  step calibrate 60 "${shell[@]}" calibrate
  step sparse 90 "${shell[@]}" suite sparse
  collect sparse
  step losses 130 "${shell[@]}" suite losses
  collect losses
  step layers 60 "${shell[@]}" suite layers
  collect layers
  step model 170 "${shell[@]}" suite model --model llama-3.2-1b
  collect model
  step kernels 90 "${shell[@]}" kernels
  step tests 150 "${shell[@]}" gpu_tests
  step profile 60 "${shell[@]}" profile
  step memcheck 60 "${shell[@]}" sanitize memcheck
  step racecheck 60 "${shell[@]}" sanitize racecheck
fi

echo
while IFS=$'\t' read -r name seconds status; do
  printf '%-10s %8s %7s\n' "$name" "$seconds" "$status"
done <"$out/steps.tsv"
echo "results: $out ($SECONDS s in all)"
((failures == 0))
