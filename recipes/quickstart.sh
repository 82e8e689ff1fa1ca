#!/usr/bin/env bash
# From a fresh clone to a table: Adam, Adam+SAM and Adam+ASAM on German-English translation, with the same model,
# seed, order of the data and number of epochs.
#
#   recipes/quickstart.sh
#
# It takes about a quarter of an hour on 2 cores, and the installation up to 6 minutes more. Started again after a stop,
# it makes what is missing. Everything it makes is in .venv, data/libreoffice_help and runs/quickstart.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

recipes/environment.sh recipes
export PATH="$PWD/.venv/bin:$PATH"
# More threads hardly speed up so small a model, and slow it down where another program shares the processor.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

out=runs/quickstart
runs=("$out/adam" "$out/sam" "$out/asam")

python -m data_prep.libreoffice_help data/libreoffice_help
python -m recipes.translation.quickstart "$out"

echo
python -m recipes.translation.compare "$out" "${runs[@]}"
python -m recipes.translation.curves "$out/curves.png" "${runs[@]}"
python -m recipes.translation.samples "$out/samples.md" "${runs[@]}"
tee -a "$out/results.md" <<'END'

One reference for each sentence of pages that are held out from LibreOffice's help, whose language is uniform: these
scores cannot be compared with those of other test sets, such as the paper's. There is one run of one seed for each
optimizer: a difference is noise unless p is below 0.05, and even then another seed may turn it. The runs share the
machine, so that the times are approximate.
END
echo
echo "In $out: results.json, results.md, curves.png, samples.md."
