"""The loss of a fairseq checkpoint over a binarized data set."""
# ruff: noqa: E402

from __future__ import annotations

import argparse
import logging
import os
import pickle
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

logging.basicConfig(level=logging.WARNING)  # before a model of fairseq sets DEBUG for all
# fairseq and fairscale call functions that torch will remove.
warnings.filterwarnings("ignore", message=r"`torch\.(jit\.script|cuda\.amp\.custom_)")
from fairseq import checkpoint_utils, tasks, utils
from fairseq.criterions import FairseqCriterion
from fairseq.models import BaseFairseqModel
from fairseq.tasks import TASK_REGISTRY, FairseqTask
from torch import Tensor

import fairseq_asam.tasks  # noqa: F401  lets newer torch load the checkpoints of fairseq

#: Options of training that a loss does not need. fairseq would look for files of embeddings and of BLEU, and
#: torch cannot recompute activations when it takes the gradient of some weights only.
UNNEEDED = {
    **{"encoder_embed_path": None, "decoder_embed_path": None, "eval_bleu": False},
    **{"checkpoint_activations": False, "offload_activations": False},
}


@dataclass(frozen=True)
class Checkpoint:
    """A model in evaluation mode, with the task and the criterion of its training."""

    path: str
    cfg: Any
    task: FairseqTask
    model: BaseFairseqModel
    criterion: FairseqCriterion


def load(path: str, data: str, user_dir: str | None = None, cpu: bool = False) -> Checkpoint:
    """Load the fairseq checkpoint *path*, trained with or without this plugin.

    Args:
        data: folder that ``fairseq-preprocess`` wrote.
        user_dir: folder of a task, model or criterion that fairseq does not have.
        cpu: use the CPU even if there is a GPU.

    Raises:
        ValueError: *path* is no checkpoint, *data* is no data set, or they do not fit together.
    """
    for file, what in ((path, "checkpoint"), (data, "data set")):
        if not os.path.exists(file):
            raise ValueError(f"the {what} '{file}' does not exist")
    if user_dir is not None:
        try:
            utils.import_user_module(argparse.Namespace(user_dir=user_dir))
        except (ImportError, FileNotFoundError) as error:
            raise ValueError(
                f"--user-dir '{user_dir}' cannot be imported ({_first_line(error)}): "
                "name the folder of a plugin"
            ) from error
    try:
        state = checkpoint_utils.load_checkpoint_to_cpu(path, {"data": data, **UNNEEDED})
        cfg = state["cfg"]
    except (pickle.UnpicklingError, RuntimeError, KeyError, EOFError, TypeError, ValueError) as error:
        raise ValueError(f"'{path}' is not a fairseq checkpoint: {_first_line(error)}") from error
    task = _task(cfg, path, data)
    try:
        [model], _ = checkpoint_utils.load_model_ensemble([path], task=task, state=state)
    except RuntimeError as error:
        raise ValueError(
            f"the model of '{path}' does not fit the dictionaries in '{data}', which must be those of its "
            f"training: {_first_line(error)}"
        ) from error
    if getattr(cfg.criterion, "sentence_avg", False):
        cfg.criterion.sentence_avg = False  # so that the loss is that of a token
    criterion = task.build_criterion(cfg.criterion)
    if state.get("criterion"):
        criterion.load_state_dict(state["criterion"])
    if torch.cuda.is_available() and not cpu:
        model, criterion = model.cuda(), criterion.cuda()
    return Checkpoint(path, cfg, task, model.float().eval(), criterion.eval())


def _task(cfg: Any, path: str, data: str) -> FairseqTask:
    name = cfg.task._name
    if name not in TASK_REGISTRY:
        raise ValueError(
            f"'{path}' is of the task '{name}', unknown to fairseq: give its folder as --user-dir"
        )
    found = sorted(file.name for file in Path(data).glob("dict*.txt"))
    languages = [getattr(cfg.task, side, None) for side in ("source_lang", "target_lang")]
    wanted = [f"dict.{language}.txt" for language in languages if language]
    if any(file not in found for file in wanted):
        raise ValueError(
            f"'{path}' translates from {languages[0]} to {languages[1]} and needs {' and '.join(wanted)}, "
            f"but '{data}' has {' and '.join(found) or 'no dictionary'}: give the data set of its training"
        )
    try:
        return tasks.setup_task(cfg.task, from_checkpoint=True)
    except Exception as error:  # each task fails in its own way when data is missing
        missing = getattr(error, "filename", None)
        reason = f"'{os.path.basename(missing)}' is missing" if missing else _first_line(error)
        raise ValueError(
            f"'{path}' is of the task '{name}', which '{data}' is not prepared for: {reason}"
        ) from error


class DatasetLoss:
    """The loss of a checkpoint's criterion over a data set, for :func:`~fairseq_asam.measure`.

    A call yields the loss of each batch, in nats, and its sample size, in most tasks that of target tokens.

    Args:
        max_tokens: size of a batch. ``None``: as in the validation of training.
        batches: number of batches, drawn at random with *seed*. ``None``: all.

    Attributes:
        batches: for each batch, the indices of its sentences.
        words: size of the target dictionary, or 0 if the task has none.
        skipped: number of sentences left out because they are too long for the model.

    Raises:
        ValueError: there is no such split or no sentence in it, or a value is out of its range.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        split: str,
        max_tokens: int | None = None,
        batches: int | None = None,
        seed: int = 1,
    ):
        for what, value in (("size of a batch", max_tokens), ("number of batches", batches)):
            if value is not None and value < 1:
                raise ValueError(f"the {what} is {value}, but it must be at least 1")
        task, self.model, self.criterion = checkpoint.task, checkpoint.model, checkpoint.criterion
        data = checkpoint.cfg.task.data
        try:
            task.load_dataset(split)
        except FileNotFoundError as error:
            raise ValueError(f"'{data}' has no split '{split}' for '{checkpoint.path}': {error}") from error
        self.dataset = task.dataset(split)
        try:
            iterator = task.get_batch_iterator(
                self.dataset,
                max_tokens=max_tokens or checkpoint.cfg.dataset.max_tokens_valid,
                max_sentences=None if max_tokens else checkpoint.cfg.dataset.batch_size_valid,
                max_positions=utils.resolve_max_positions(task.max_positions(), self.model.max_positions()),
                ignore_invalid_inputs=True,
                required_batch_size_multiple=1,  # otherwise fairseq drops a last batch of another size
            )
        except AssertionError as error:
            raise ValueError(f"the size of a batch is {max_tokens} tokens, too few: {error}") from error
        self.batches = [list(batch) for batch in iterator.frozen_batches]
        self.words = len(task.target_dictionary or ())
        self.skipped = len(self.dataset) - sum(map(len, self.batches))
        if not self.batches:
            raise ValueError(f"the split '{split}' of '{data}' has no sentence that fits the model")
        if batches is not None and batches < len(self.batches):
            self.batches = random.Random(seed).sample(self.batches, batches)

    def __call__(self) -> Iterator[tuple[Tensor, float]]:
        for sample in self.samples():
            loss, sample_size, _ = self.criterion(self.model, sample)
            yield loss, float(sample_size)

    def samples(self) -> Iterator[dict[str, Any]]:
        """Yield each batch as the model takes it, on its device."""
        cuda = next(self.model.parameters()).is_cuda
        if getattr(self.dataset, "supports_prefetch", False):  # --dataset-impl cached needs it
            self.dataset.prefetch([i for batch in self.batches for i in batch])
        for batch in self.batches:
            sample = self.dataset.collater([self.dataset[i] for i in batch])
            yield utils.move_to_cuda(sample) if cuda else sample


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if isinstance(error, RuntimeError) and len(lines) > 1 else (lines or [repr(error)])[0]
