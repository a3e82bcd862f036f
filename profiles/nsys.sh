#!/usr/bin/env bash
# Nsight Systems over a run of decode steps: NVTX ranges of steps, layers and ops above the kernels.
#
#   profiles/nsys.sh [--dry-run] [--out DIR] [flags of python -m profiles.workload]
#
# Where nsys is missing, or leaves no report (it needs kernel facilities that some virtual machines
# lack), the torch profiler gives the same figures: the idle share and the kernels by time.
set -euo pipefail
source "$(dirname "$0")/common.sh"

report="$out/nsys.nsys-rep"
capture() {
  run nsys profile --trace=cuda,nvtx --cuda-graph-trace=node --sample=none --cpuctxsw=none \
    --capture-range=cudaProfilerApi --capture-range-end=stop --force-overwrite=true \
    --output="${report%.nsys-rep}" "$python" -m profiles.workload "${flags[@]}"
}
fall_back() {
  echo "$1: tracing with the torch profiler instead"
  run "$python" -m profiles.torch_trace --out "$out" "${flags[@]}"
}

[ -n "$dry" ] || { mkdir -p "$out" && rm -f "$report"; }
if [ -z "$dry" ] && ! command -v nsys >/dev/null; then
  fall_back "nsys is not installed"
elif ! capture; then
  fall_back "nsys failed"
elif [ -z "$dry" ] && [ ! -s "$report" ]; then
  fall_back "nsys left no report"
else
  run nsys stats --force-export=true --report=cuda_gpu_kern_sum --report=nvtx_pushpop_sum "$report"
  [ -z "$dry" ] || fall_back "where nsys cannot run"
fi
