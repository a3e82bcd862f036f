#!/usr/bin/env bash
# What there is to know about this tree on one GPU, with no network, in commands of nine minutes:
#
#   benchmarks/gpu_check.sh [--group kernels|engine|models] [--commit ID] [--out DIR] [stage ...]
#
# python -m benchmarks.gpu_check --help says more. The tree itself is what is checked; nothing is
# installed but the wheels of a folder that is given.
set -euo pipefail
root="$(cd "${BASH_SOURCE[0]%/*}/.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m benchmarks.gpu_check "$@"
