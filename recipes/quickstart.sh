#!/usr/bin/env bash
# From a fresh clone to a table: Adam, Adam+SAM and Adam+ASAM on German-English translation, with the same model,
# seed, order of the data and number of epochs.
#
#   recipes/quickstart.sh
#
# Takes at most 15 minutes on 2 cores after the installation. Run again, it does only what is missing; stopped at
# any point, it goes on there. Everything it makes is in .venv, data/embedded and runs/quickstart.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

recipes/environment.sh recipes
export PATH="$PWD/.venv/bin:$PATH"
# More threads hardly speed up so small a model, and slow it down where another program shares the processor.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

data=data/embedded
out=runs/quickstart
runs=("$out/adam" "$out/sam" "$out/asam")

python -m data_prep.embedded "$data"
for optimizer in adam sam asam; do
    python -m recipes.translation.train quickstart "$optimizer" "$out/$optimizer" --data "$data"
    python -m recipes.translation.score "$data" "$out/$optimizer"
done

echo
python -m recipes.translation.compare "$out" "${runs[@]}"
python -m recipes.translation.curves "$out/curves.png" "${runs[@]}"
python -m recipes.translation.samples "$out/samples.md" "${runs[@]}"
tee -a "$out/results.md" <<'END'

BLEU says how near the translations of held-out sentences of this small corpus come to one reference each after a few
minutes of training; it cannot be compared with the scores of other test sets, such as the paper's. There is one run
of one seed for each optimizer: a difference is noise unless p is below 0.05, and even then another seed may turn it.
END
echo
echo "In $out: results.json, results.md, curves.png, samples.md."
