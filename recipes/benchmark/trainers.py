"""fairseq's Trainer in this process, on random sentences: what the benchmarks share."""

from __future__ import annotations

import argparse
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recipes import setups  # before fairseq, to quieten it
from recipes.options import at_least_1

# isort: split
from fairseq import tasks
from fairseq.data import Dictionary, indexed_dataset
from fairseq.logging import metrics
from fairseq.trainer import Trainer

from fairseq_asam.optim import SHARPNESS_AWARE
from fairseq_asam.optim.options import direction_of

LONGEST_SENTENCE = 100  # tokens
BATCHES = 40  # that a corpus makes
# Training as in Section 5.3 of the paper, on sentences in memory.
FLAGS = f"{setups.TRAINING} --task translation --source-lang de --target-lang en --no-save --num-workers 0"


@dataclass(frozen=True)
class Model:
    """A model and the sentences that it is trained on.

    Attributes:
        vocabularies: Sizes of the source and the target dictionary.
        length: The mean number of tokens in a sentence.
        max_tokens: In a batch, by default.
        flags: Those of fairseq-train that describe the model.
        rounds: Of the timing, by default.
    """

    vocabularies: tuple[int, int]
    length: float
    max_tokens: int
    flags: str
    rounds: int = 5


SMALL = """
    --arch transformer --share-decoder-input-output-embed --dropout 0.1
    --encoder-layers 1 --encoder-embed-dim 128 --encoder-ffn-embed-dim 256 --encoder-attention-heads 4
    --decoder-layers 1 --decoder-embed-dim 128 --decoder-ffn-embed-dim 256 --decoder-attention-heads 4
"""
MODELS = {
    # On IWSLT'14, as fairseq prepares it.
    "transformer_iwslt_de_en": Model((8848, 6632), 24.0, 1000, setups.SETUPS["iwslt14"].model),
    "small": Model((4000, 4000), 10.0, 500, SMALL, rounds=30),
}


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Add the options --device and --threads."""
    parser.add_argument(
        "--device", default="cpu", choices=["cpu", "cuda"], help="device to measure on (default: cpu)"
    )
    parser.add_argument(
        "--threads", type=at_least_1, default=1, metavar="N", help="threads of the CPU (default: 1)"
    )


def use_machine(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Use the threads of :func:`add_machine`; end the program with a sentence if there is no such device."""
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    torch.set_num_threads(args.threads)


def machine(device: str, threads: int) -> str:
    """Return the machine in words."""
    return torch.cuda.get_device_name() if device == "cuda" else f"{threads} CPU thread(s)"


def write_corpus(folder: Path, model: Model, max_tokens: int) -> None:
    """Write random sentences as fairseq-preprocess would: about :data:`BATCHES` batches of *max_tokens*."""
    generator = torch.Generator().manual_seed(0)
    count = max(1, int(BATCHES * max_tokens / model.length))
    # Lengths spread about as those of IWSLT'14; a translation is about as long as its source.
    spread = torch.randn(count, generator=generator).mul(0.6).exp() / torch.tensor(0.18).exp()
    for language, size in zip(("de", "en"), model.vocabularies):
        dictionary = Dictionary()
        for number in range(size - len(dictionary)):
            dictionary.add_symbol(str(number))
        dictionary.save(str(folder / f"dict.{language}.txt"))
        prefix = str(folder / f"train.de-en.{language}")
        builder = indexed_dataset.make_builder(f"{prefix}.bin", "mmap", vocab_size=size)
        noise = torch.randn(count, generator=generator).mul(0.1).exp()
        lengths = (model.length * spread * noise).round().clamp(2, LONGEST_SENTENCE).int()
        for length in lengths.tolist():
            words = torch.randint(dictionary.nspecial, size, (length - 1,), generator=generator)
            builder.add_item(torch.cat([words, torch.tensor([dictionary.eos()])]))
        builder.finalize(f"{prefix}.idx")


def configuration(
    parser: argparse.ArgumentParser,
    data: Path,
    model: Model,
    optimizer: str,
    max_tokens: int,
    device: str,
) -> Any:
    """Return the configuration of fairseq-train for *optimizer*, which is what follows --optimizer there.

    A flag that fairseq refuses ends the program as an error of *parser*.
    """
    arguments = [str(data), *shlex.split(f"{FLAGS} {model.flags}"), "--max-tokens", str(max_tokens)]
    arguments += ["--cpu"] if device == "cpu" else []
    arguments += ["--optimizer", *optimizer.split()]  # last, so that its own flags win
    return setups.configuration(
        arguments, lambda message: parser.error(f"'--optimizer {optimizer}': {message}")
    )


def passes(cfg: Any) -> float:
    """Return how many forward and backward passes an update of *cfg* costs, on average."""
    if cfg.optimizer._name not in SHARPNESS_AWARE or not direction_of(cfg.optimizer).needs_pass_at_w:
        return 1.0
    return 1.0 + cfg.optimizer.ascent_fraction / cfg.optimizer.ascent_interval


def trainer_and_batches(cfg: Any) -> tuple[Trainer, list[dict[str, Any]]]:
    """Return a Trainer with fresh weights, and the batches of an epoch, as fairseq-train makes them.

    They are the same for every optimizer.
    """
    torch.manual_seed(cfg.common.seed)
    task = tasks.setup_task(cfg.task)
    trainer = Trainer(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))
    epoch = trainer.get_train_iterator(epoch=1)
    trainer.begin_epoch(1)
    return trainer, list(epoch.next_epoch_itr(shuffle=True))


def update_seconds(trainer: Trainer, batch: dict[str, Any]) -> float:
    """Update *trainer* with *batch* and return how long that took."""
    synchronize(trainer.cuda)
    begin = time.perf_counter()
    with metrics.aggregate("train_inner"):
        trainer.train_step([batch])
    synchronize(trainer.cuda)
    return time.perf_counter() - begin


def synchronize(cuda: bool) -> None:
    """Wait for what the GPU, if there is one, has still to do."""
    if cuda:
        torch.cuda.synchronize()
