#!/usr/bin/env bash
# Sharpness as a measure (Section 3 of the ASAM paper): Figures 1 and 3, Table 1 and Figure 2, and the sharpness of
# the models of the quickstart.
#
#   recipes/paper/sharpness.sh
#
# Takes 5 minutes on 2 cores after recipes/quickstart.sh, which it runs for what is missing of it. Everything it
# makes is in runs/paper.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

recipes/quickstart.sh
export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

data=data/libreoffice_help/bin
runs=runs/quickstart
out=runs/paper
mkdir -p "$out"
python -m recipes.paper.toy "$out"

# Table 1 and Figure 2 with small networks on scikit-learn's digits; --dataset cifar10 makes them at full size.
python -m recipes.paper.rank_models "$out/rank" --jobs 2

# On the training set, whose maximization regions Equation 4 speaks of; the same 40 batches for each model.
for optimizer in adam sam asam; do
    echo
    python -m fairseq_asam.measuring "$data" --path "$runs/$optimizer/checkpoint_best.pt" \
        --gen-subset train --batches 40 --rho 0.05 0.1 0.2 0.5 1 --json "$out/sharpness-$optimizer.json" |
        tee "$out/sharpness-$optimizer.md"
done
