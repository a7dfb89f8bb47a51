#!/usr/bin/env bash
# Measures the accelerator of this machine in at most 12 minutes, without a network:
#     experiments/benchmarks/device.sh [--tiny] [--out=DIR] [--stages=...]
# PYTHON chooses the interpreter. See `experiments/benchmarks/device/__main__.py`.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m experiments.benchmarks.device "$@"
