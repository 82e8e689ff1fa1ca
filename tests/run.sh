#!/usr/bin/env bash
# Installs what is missing, then runs the linter, the type checker (Python 3.11 and newer) and the tests.
#
#   tests/run.sh [--slow] [pytest arguments]
#
# --slow runs the tests that take minutes as well.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

marker="not slow and not gpu"
if [[ ${1:-} == --slow ]]; then
    marker="not gpu"
    shift
fi
recipes/environment.sh test
export PATH="$PWD/.venv/bin:$PATH"
ruff check
ruff format --check
[[ ! -x .venv/bin/mypy ]] || mypy
pytest --numprocesses 2 --dist loadgroup -m "$marker" "$@"
