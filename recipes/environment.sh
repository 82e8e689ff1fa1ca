#!/usr/bin/env bash
# Makes .venv in the repository root and installs this project and what it needs into it.
#
#   recipes/environment.sh recipes|test
#
# `test` includes what `recipes` needs. PYTHON names the interpreter (default: python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "environment.sh: $1" >&2
    exit 1
}

extra=${1:-}
[[ $extra == recipes || $extra == test ]] || fail "say what to install: 'recipes' or 'test', not '$extra'."
python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "'$python' was not found: install Python 3.9 or newer, or name it in PYTHON."
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
at_least() { [[ $(printf '%s\n' "$1" "$version" | sort -V | head -n 1) == "$1" ]]; }
at_least 3.9 || fail "'$python' is Python $version, 3.9 or newer is needed: install it, or name it in PYTHON."

installed() { echo "$1, Python $version, setup.py $(cksum <setup.py), $PWD"; }
grep -qxF "$(installed "$extra")" .venv/installed 2>/dev/null && exit

"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "'$python' has no venv module: install it (on Debian: apt install python3-venv)."
"$python" -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h")).close()' 2>/dev/null ||
    fail "'$python' has no header files, and fairseq builds from source: install them (on Debian: apt install python3-dev)."
command -v "${CXX:-c++}" >/dev/null ||
    fail "no C++ compiler '${CXX:-c++}' was found, and fairseq builds from source: install one (on Debian: apt install g++)."

[[ ! -e .venv || -e .venv/made-for ]] || fail "'.venv' is there and is not of this script's making: move it away."
# An environment made by another Python, in another place or only by half is made anew.
made_for="Python $version, $PWD"
if [[ $(cat .venv/made-for 2>/dev/null) != "$made_for" ]]; then
    rm -rf .venv
    mkdir .venv
    touch .venv/made-for
    "$python" -m venv .venv
    echo "$made_for" >.venv/made-for
fi
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

torch=2.14.1 torchvision=0.29.1 numpy=numpy constraint= isolation=--no-build-isolation
if ! at_least 3.11; then
    # fairseq 0.12.2 lacks a source file that its setup.py compiles where it finds torch: keep torch out of its build.
    # transformers 5 wants a newer torch.
    torch=2.3.1 torchvision=0.18.1 numpy='numpy<1.24' constraint='transformers<5' isolation=
    # pip 24.1 and newer refuse the metadata of omegaconf 2.0, which fairseq 0.12.2 requires.
    pip install 'pip<24.1'
fi
# PyPI's torch for Linux carries several GB of CUDA libraries, of no use without an NVIDIA GPU.
if ! nvidia-smi -L >/dev/null 2>&1; then
    pip install --no-deps --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu \
        "torch==$torch" "torchvision==$torchvision"
fi
echo "Installing fairseq and the rest; where pip must build fairseq, that takes a few minutes."
# What fairseq needs to be built. Without it, pip would install torch and its gigabytes a second time, into an
# environment for the build alone.
pip install 'setuptools>=64' wheel cython "$numpy" "torch==$torch"
pip install $isolation --constraint /dev/stdin --editable ".[$extra]" <<<"$constraint"

{
    installed recipes
    [[ $extra != test ]] || installed test
} >.venv/installed
