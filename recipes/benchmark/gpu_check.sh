#!/usr/bin/env bash
# Checks on one NVIDIA GPU what cannot be checked without: a line with PASSED or the reason for each.
#
#   recipes/benchmark/gpu_check.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if ! nvidia-smi -L >/dev/null 2>&1; then
    echo "gpu_check.sh: no NVIDIA GPU was found (nvidia-smi): run this on a machine that has one." >&2
    exit 1
fi
recipes/environment.sh test
.venv/bin/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit(
    f"gpu_check.sh: torch {torch.__version__} finds no GPU: install a CUDA build of it into .venv.")'
exec .venv/bin/python -m pytest tests/tasks/test_gpu.py tests/vision/test_gpu.py -m gpu -v -rA "$@"
