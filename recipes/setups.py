"""The set-ups of the translation experiments: corpus, model, training, epochs and values of rho.

This is the only place that describes them: recipes/translation trains them, recipes/benchmark times their
models.
"""
# ruff: noqa: E402

from __future__ import annotations

import logging
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

logging.basicConfig(level=logging.WARNING)  # fairseq has much to say at every start
warnings.simplefilter("ignore")  # and calls much that others have deprecated
from fairseq import options, tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from fairseq_asam.tasks import trainer  # registers the optimizers, as --user-dir does

#: Section 5.3 of the paper. What it leaves open is fairseq's documented recipe for IWSLT'14.
#: Some fairseq versions drop a last batch that is no multiple of --required-batch-size-multiple (default: 8).
TRAINING = """
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1
    --adam-betas '(0.9, 0.98)' --weight-decay 1e-4 --clip-norm 0
    --lr 5e-4 --lr-scheduler inverse_sqrt --warmup-updates 4000
    --max-tokens 4096 --required-batch-size-multiple 1 --seed 1
"""
BEST_BY_BLEU = """
    --eval-bleu --eval-bleu-args '{"beam": 5, "max_len_a": 1.2, "max_len_b": 10}'
    --best-checkpoint-metric bleu --maximize-best-checkpoint-metric
"""
#: Validation with a beam would take half as long as an epoch of so few pairs.
GREEDY = """--eval-bleu-args '{"beam": 1, "max_len_a": 1.2, "max_len_b": 10}' --max-tokens-valid 4000"""
SMALL_MODEL = """
    --arch transformer --share-all-embeddings
    --encoder-layers 1 --encoder-embed-dim 128 --encoder-ffn-embed-dim 512 --encoder-attention-heads 4
    --decoder-layers 1 --decoder-embed-dim 128 --decoder-ffn-embed-dim 512 --decoder-attention-heads 4
"""
#: A process that loads the data would take time from training where there are few cores.
SMALL_TRAINING = f"{TRAINING} --lr 3e-3 --warmup-updates 300 --max-tokens 500 --num-workers 0"


@dataclass(frozen=True)
class Setup:
    """What an experiment trains, but for the optimizer.

    Attributes:
        corpus: The module of data_prep that makes the corpus, its folder, and its options.
        model: Flags of fairseq-train that describe the model.
        training: Its other flags. A later flag wins over an earlier one. UPDATES stands for the number of
            updates of the run.
        epochs: How many epochs a run has.
        rho: The values to search for each optimizer, by what follows --optimizer of fairseq-train. Without an
            entry of its own, a form such as "asam --ascent-from 0.75" has the values of its first word.
    """

    corpus: str
    model: str
    training: str
    epochs: int
    rho: dict[str, tuple[float, ...]]

    def folder(self, data: Path | None) -> Path:
        """Return *data*, by default the corpus' own folder.

        Raises:
            SystemExit: There is no corpus.
        """
        module, own, *options = self.corpus.split()
        folder = data or Path(own)
        if not any(folder.glob("bin/dict.*.txt")):
            command = " ".join(["python -m", f"data_prep.{module}", str(folder), *options])
            sys.exit(f"'{folder}' holds no corpus: make it with '{command}'.")
        return folder

    def flags(self, others: Sequence[str] = ()) -> list[str]:
        """Return the flags of fairseq-train, each once; UPDATES stays as it is.

        Args:
            others: Further flags. They win over those of the set-up.
        """
        own = shlex.split(f"{self.model} {self.training} --max-epoch {self.epochs}")
        values: dict[str, list[str]] = {}
        for word in (*own, *others):
            if re.match("--?[a-z]", word):
                flag = word.partition("=")[0]
                values.pop(flag, None)  # so that the command has flags in the order in which they were given
                values[flag] = [word]
            else:
                values[flag].append(word)
        return [word for words in values.values() for word in words]


SETUPS = {
    "quickstart": Setup(
        corpus="libreoffice_help data/libreoffice_help",
        model=f"{SMALL_MODEL} --dropout 0",
        training=f"{SMALL_TRAINING} --max-tokens 700 --lr 2.5e-3 --lr-scheduler polynomial_decay "
        "--total-num-update UPDATES",
        epochs=3,
        rho={"sam": (0.05, 0.1, 0.2), "asam": (0.05, 0.1, 0.2)},
    ),
    # Few pairs and many epochs, so that Adam overfits.
    "libreoffice_8000": Setup(
        corpus="libreoffice_help data/libreoffice_8000 --training-pairs 8000",
        # With Adam, the validation BLEU is lower with 0.1 and 0.3, and with a vocabulary of 2,000.
        model=f"{SMALL_MODEL} --dropout 0.2",
        training=f"{SMALL_TRAINING} {BEST_BY_BLEU} {GREEDY} --eval-bleu-remove-bpe sentencepiece",
        epochs=30,
        rho={
            "sam": (0.02, 0.05, 0.1, 0.2),
            # A run with rho 1 was ended after 8 epochs, when these had 4 to 5 BLEU more.
            "asam": (0.02, 0.05, 0.1, 0.2, 0.5),
            "asam --normalization adam": (0.002, 0.005, 0.01),
            "sam --ascent-direction momentum": (0.02, 0.05, 0.1, 0.2, 0.5),
        },
    ),
    # The paper's model, and its values of rho, on all pairs of the help, for a GPU. Its warm-up would be
    # longer than the training.
    "libreoffice_large": Setup(
        corpus="libreoffice_help data/libreoffice_help",
        model="--arch transformer_iwslt_de_en --share-all-embeddings --dropout 0.3",
        training=f"{TRAINING} --warmup-updates 500 --fp16 {BEST_BY_BLEU} {GREEDY} --max-tokens-valid 16000 "
        "--eval-bleu-remove-bpe sentencepiece",
        epochs=10,
        rho={"sam": (0.1,), "asam": (0.2,)},
    ),
    # The paper's, but for the number of epochs, which it does not give.
    "iwslt14": Setup(
        corpus="iwslt14 data/iwslt14",
        model="--arch transformer_iwslt_de_en --share-decoder-input-output-embed --dropout 0.3",
        training=f"{TRAINING} {BEST_BY_BLEU} --eval-bleu-detok moses --eval-bleu-remove-bpe",
        epochs=50,
        rho=dict.fromkeys(("sam", "asam"), (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)),
    ),
}
#: Other languages than German, and all of its pairs, for recipes/translation/trial.py.
TRIAL_LANGUAGES = ("fr", "cs", "ru", "es")
SETUPS |= {
    f"libreoffice_8000_{language}": replace(
        SETUPS["libreoffice_8000"],
        corpus=f"libreoffice_help data/libreoffice_8000_{language} --source-language {language} "
        "--training-pairs 8000",
    )
    for language in TRIAL_LANGUAGES
}
SETUPS["libreoffice_35561"] = replace(
    SETUPS["libreoffice_8000"], corpus="libreoffice_help data/libreoffice_help", epochs=15
)
#: The model of libreoffice_large in a quarter of the updates, with a rate to match: it ends within minutes.
#: The trial adds --fp16 on a GPU.
SETUPS["libreoffice_large_16000"] = replace(
    SETUPS["libreoffice_large"],
    training=f"{TRAINING} --lr 1e-3 --warmup-updates 800 --max-tokens 16000 --num-workers 1",
    epochs=40,
)


def configuration(arguments: Sequence[str], fail: Callable[[str], Any]) -> Any:
    """Return the configuration that fairseq-train makes of *arguments*.

    Args:
        arguments: The command line without the program's name.
        fail: Ends the program. It is called with a message if fairseq refuses an argument.
    """
    parser = options.get_training_parser()
    parser.error = fail
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, list(arguments)))


def count_updates(cfg: Any) -> int:
    """Return how many updates fairseq-train makes with *cfg*, from the batches that fairseq makes."""
    task = tasks.setup_task(cfg.task)
    task.load_dataset(cfg.dataset.train_subset)
    batches = task.get_batch_iterator(
        task.dataset(cfg.dataset.train_subset),
        max_tokens=cfg.dataset.max_tokens,
        max_sentences=cfg.dataset.batch_size,
        max_positions=utils.resolve_max_positions(task.max_positions(), cfg.dataset.max_tokens),
        ignore_invalid_inputs=True,
        required_batch_size_multiple=cfg.dataset.required_batch_size_multiple,
        seed=cfg.common.seed,
        num_shards=cfg.distributed_training.distributed_world_size,
    )
    return trainer.count_updates(cfg.optimization, len(batches))
