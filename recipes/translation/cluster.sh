#!/usr/bin/env bash
# Submits the paper's translation experiment to a Slurm cluster, a job for each combination of values.
#
#   recipes/translation/cluster.sh [--dry-run] DATA OUT [values of fairseq-hydra-train]
#
# For example, three seeds at three values of rho, and the partition to use:
#
#   recipes/translation/cluster.sh data/iwslt14 runs/sweep \
#       common.seed=1,2,3 optimizer.rho=0.1,0.2,0.5 hydra.launcher.partition=gpu
#
# The experiment is config/asam.yaml, the job config/job/slurm.yaml. OUT gets a folder for each job; a job that is
# cut off by its time limit is submitted again and goes on. --dry-run prints the batch script and the jobs and
# submits nothing; it needs no cluster. Needs the extra `cluster`: pip install -e '.[cluster]'.
set -euo pipefail

fail() {
    echo "cluster.sh: $1" >&2
    exit 1
}

dry_run=
if [[ ${1:-} == --dry-run ]]; then
    dry_run=yes
    shift
fi
(($# >= 2)) || fail "usage: recipes/translation/cluster.sh [--dry-run] DATA OUT [values of fairseq-hydra-train]"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
[[ ! -d $root/.venv ]] || PATH=$root/.venv/bin:$PATH
[[ -d $1/bin ]] ||
    fail "'$1' holds no corpus: prepare one, for example with 'python -m data_prep.iwslt14 data/iwslt14'."
data=$(cd "$1" && pwd)
out=$(realpath -m "$2")
shift 2
python -c 'import hydra_plugins.hydra_submitit_launcher' 2>/dev/null ||
    fail "the launcher is missing: install it with pip install -e '.[cluster]'."

submit() {
    fairseq-hydra-train --multirun --config-dir "$root/recipes/translation/config" --config-name asam \
        +job=slurm hydra/launcher=submitit_slurm \
        "common.user_dir=$root/fairseq_asam" "task.data=$data/bin" "$@"
}

if [[ -z $dry_run ]]; then
    command -v sbatch >/dev/null || fail "there is no sbatch here: call it on a Slurm cluster, or with --dry-run."
    submit "$@" "hydra.sweep.dir=$out"
    exit
fi
# An sbatch that keeps the batch script and declines; whatever else the launcher writes goes beside it.
stand_in=$(mktemp -d)
trap 'rm -rf "$stand_in"' EXIT
printf '#!/bin/sh\nfor script; do :; done\ncp "$script" "%s/script"\nexit 1\n' "$stand_in" >"$stand_in/sbatch"
cp "$stand_in/sbatch" "$stand_in/srun"
chmod +x "$stand_in"/s*
PATH=$stand_in:$PATH submit "$@" "hydra.sweep.dir=$stand_in/out" >"$stand_in/output" 2>&1 || true
[[ -e $stand_in/script ]] || {
    cat "$stand_in/output" >&2
    fail "fairseq-hydra-train made no batch script; its output is above."
}
sed "s#$stand_in/out#$out#g" "$stand_in/script"
echo
echo "# The jobs of the array, by number:"
sed -n 's/.*\(#[0-9][0-9]* : \)/\1/p' "$stand_in/output"
