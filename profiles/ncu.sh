#!/usr/bin/env bash
# Nsight Compute over one op: why each of its kernels takes as long as it does.
#
#   profiles/ncu.sh [--dry-run] [--out DIR] OP [--implementation NAME]
#
# Clocks are left as they are found. profiles/README.md says how to read the sections.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3} out=profiles/out dry=

flags=()
while (($#)); do
  case $1 in
    --dry-run) dry=1 ;;
    --out) out=${2:?--out needs a folder}; shift ;;
    *) flags+=("$1") ;;
  esac
  shift
done
[ ${#flags[@]} -gt 0 ] || { echo "which op? python -m profiles.op --help lists them" >&2; exit 2; }

run() {
  printf '+ %s\n' "$(printf '%q ' "$@")"
  [ -n "$dry" ] || "$@"
}

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
