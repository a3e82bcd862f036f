#!/usr/bin/env bash
# Everything there is to know about this tree on one GPU, in under ten minutes and with no network:
#
#   benchmarks/gpu_check.sh [--out DIR] [--wheels DIR] [--device cuda|cpu] [stage ...]
#
# python -m benchmarks.gpu_check --help says more. The tree itself is what is checked; nothing is
# installed but the wheels of a folder that is given.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m benchmarks.gpu_check "$@"
