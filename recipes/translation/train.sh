#!/usr/bin/env bash
# Trains a Transformer as section 5.3 of the ASAM paper does, or goes on where an earlier call was stopped.
#
#   recipes/translation/train.sh DATA RUN OPTIMIZER [fairseq-train flags]
#
# DATA is a corpus folder of data_prep, OPTIMIZER adam, sam or asam. RUN gets the log (train.log) and the
# checkpoints of the last and the best epoch (the lowest validation loss), with `--keep-last-epochs N` those of the
# last N as well. Flags after OPTIMIZER win over those below. A finished run is left alone.
#
# fairseq-train takes all GPUs that CUDA_VISIBLE_DEVICES shows. LAUNCHER, if set, is a command that starts it, for
# example 'torchrun --nproc_per_node 4 --no-python'.
set -euo pipefail

fail() {
    echo "train.sh: $1" >&2
    exit 1
}

(($# >= 3)) || fail "usage: recipes/translation/train.sh DATA RUN OPTIMIZER [fairseq-train flags]"
data=$1 run=$2 optimizer=$3
shift 3
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
[[ ! -d $root/.venv ]] || PATH=$root/.venv/bin:$PATH

[[ $optimizer =~ ^(adam|sam|asam)$ ]] || fail "unknown optimizer '$optimizer': choose adam, sam or asam."
compgen -G "$data/bin/dict.*.txt" >/dev/null ||
    fail "'$data' holds no corpus: prepare one, for example with 'python -m data_prep.embedded data/embedded'."

mkdir -p "$run"
exec 9>"$run/lock"
if ! flock --nonblock 9; then
    echo "train.sh: another process trains in '$run'; waiting for its end." >&2
    flock 9
fi

command="$optimizer, data $(cat "$data"/bin/*.idx | cksum), $*"
if [[ -e $run/checkpoint_last.pt && $(cat "$run/command" 2>/dev/null) != "$command" ]]; then
    fail "'$run' holds a run with other data, optimizer or flags (see $run/command): choose another folder or remove it."
fi
echo "$command" >"$run/command"
if grep -qsF '| done training in' "$run/train.log"; then
    echo "train.sh: '$run' is trained already." >&2
    exit
fi
[[ " $* " == *" --keep-last-epochs "* ]] || set -- --no-epoch-checkpoints "$@"
# Some fairseq versions leave out the last batch, in training and in validation, if its size isn't a multiple of
# --required-batch-size-multiple (default 8).
# shellcheck disable=SC2086
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec python -m recipes.translation.progress "$run/train.log" ${LAUNCHER:-} fairseq-train "$data/bin" \
    --user-dir "$root/fairseq_asam" --optimizer "$optimizer" \
    --adam-betas '(0.9, 0.98)' --weight-decay 1e-4 --clip-norm 0 \
    --lr 5e-4 --lr-scheduler inverse_sqrt --warmup-updates 4000 \
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1 \
    --arch transformer_iwslt_de_en --dropout 0.3 --share-decoder-input-output-embed \
    --max-tokens 4096 --required-batch-size-multiple 1 --max-epoch 50 --seed 1 \
    --save-dir "$run" --log-format json --log-interval 50 "$@"
