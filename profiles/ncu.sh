#!/usr/bin/env bash
# Nsight Compute over one op: why each of its kernels takes as long as it does.
#
#   profiles/ncu.sh [--dry-run] [--out DIR] OP [--implementation NAME]
#
# Clocks are left as they are found. profiles/README.md says how to read the sections.
set -euo pipefail
source "$(dirname "$0")/common.sh"

[ ${#flags[@]} -gt 0 ] || { echo "which op? python -m profiles.op --help lists them" >&2; exit 2; }

sections=()
for name in SpeedOfLight MemoryWorkloadAnalysis MemoryWorkloadAnalysis_Tables \
  ComputeWorkloadAnalysis SchedulerStats WarpStateStats Occupancy LaunchStats SourceCounters; do
  sections+=(--section "$name")
done

report="$out/ncu-${flags[0]}"
[ -n "$dry" ] || mkdir -p "$out"
if [ -z "$dry" ] && ! command -v ncu >/dev/null; then
  echo "ncu is not installed: Nsight Compute comes with CUDA's toolkit" >&2
  exit 1
fi
run ncu --target-processes all --profile-from-start off --clock-control none "${sections[@]}" \
  --import-source yes --force-overwrite --export "$report" \
  "$python" -m profiles.op "${flags[@]}" --device cuda
run ncu --import "$report.ncu-rep" --page details --print-details header
