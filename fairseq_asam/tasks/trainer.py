"""fairseq's Trainer and what it calls: each update, its batches, and the gradients of several workers."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any

from fairseq.distributed import LegacyDistributedDataParallel
from fairseq.trainer import Trainer

from fairseq_asam.optim import SHARPNESS_AWARE, sharpness_aware_optimizer
from fairseq_asam.sharpness.late_start import first_ascent
from fairseq_asam.sharpness.random_state import RandomState

from .start_up import refusals_as_a_sentence
from .train_step import SharpnessAwareTask, with_sharpness_awareness


def count_updates(optimization: Any, batches: int | None) -> float:
    """Return how many updates a training makes; infinity if that is unknown.

    Args:
        optimization: that group of a fairseq configuration.
        batches: of an epoch, on each worker; ``None`` if that is unknown.
    """
    updates: float = math.inf
    if optimization.max_epoch and batches is not None:
        freq = optimization.update_freq  # by epoch; the last number holds for all later ones
        whole = math.floor if getattr(optimization, "skip_remainder_batch", False) else math.ceil
        of_epochs = (freq[min(epoch, len(freq) - 1)] for epoch in range(optimization.max_epoch))
        updates = sum(whole(batches / accumulated) for accumulated in of_epochs)
    return min(updates, optimization.max_update or math.inf)


def _make_task_sharpness_aware(trainer: Trainer) -> None:
    if not isinstance(trainer.task, SharpnessAwareTask):
        trainer.task.__class__ = with_sharpness_awareness(type(trainer.task))


def _set_first_ascent(trainer: Trainer, batches: int | None) -> None:
    """Tell the task when sharpness-aware updates begin, given the *batches* of an epoch."""
    updates = count_updates(trainer.cfg.optimization, batches)
    trainer.task.first_ascent = first_ascent(trainer.cfg.optimizer.ascent_from, updates)


def with_sharpness_aware_task(get_train_iterator):
    """Return the Trainer's ``get_train_iterator``, which makes its task sharpness-aware before the batches.

    It tells the task what depends on the whole training.
    """

    @functools.wraps(get_train_iterator)
    def get_train_iterator_of_sharpness_aware_task(self, *args, **kwargs):
        if self.cfg.optimizer._name not in SHARPNESS_AWARE:
            return get_train_iterator(self, *args, **kwargs)
        _make_task_sharpness_aware(self)
        dataset = self.cfg.dataset
        if dataset.update_ordered_indices_seed:
            self.task.seed_of_batches = self.cfg.common.seed + 1
        batches = get_train_iterator(self, *args, **kwargs)
        if dataset.curriculum:
            # Otherwise fairseq keeps the order of the first epoch for all later ones, unless it resumes.
            batches.reuse_dataloader = False
        with refusals_as_a_sentence():
            # Epochs that take turns with parts of the data have different numbers of batches.
            differ = self.task.has_sharded_data(dataset.train_subset)
            _set_first_ascent(self, None if differ else len(batches))
        return batches

    return get_train_iterator_of_sharpness_aware_task


def with_beginning_of_the_update(train_step):
    """Return the Trainer's ``train_step``, which tells a sharpness-aware optimizer that an update begins."""

    @functools.wraps(train_step)
    def sharpness_aware_train_step(self, samples, raise_oom=False):
        asam = sharpness_aware_optimizer(self.optimizer)
        if asam is not None:
            # Leave out dummy batches, which are empty here, beside others: fairseq divides by the sentences
            # of all batches of a worker, or of none if the last one is a dummy.
            samples = [sample for sample in samples if sample] or samples
            _make_task_sharpness_aware(self)
            with refusals_as_a_sentence():
                if self.task.first_ascent is None:  # the program makes batches without the Trainer
                    _set_first_ascent(self, None)
                asam.begin_update(self, len(samples))
        return train_step(self, samples, raise_oom)

    return sharpness_aware_train_step


def left_after_an_exception(no_sync):
    """Return ``no_sync`` of legacy_ddp, which ends with its block, however the block ends."""

    @functools.wraps(no_sync)
    @contextlib.contextmanager
    def no_sync_until_left(self: LegacyDistributedDataParallel):
        before, self.accumulate_grads = self.accumulate_grads, True
        try:
            yield
        finally:
            self.accumulate_grads = before

    return no_sync_until_left


def under_the_lock_of_random_states(numpy_seed):
    """Return ``numpy_seed``, which waits while a pass saves or restores the state of numpy."""

    @functools.wraps(numpy_seed)
    @contextlib.contextmanager
    def numpy_seed_under_lock(*args, **kwargs):
        with RandomState.lock, numpy_seed(*args, **kwargs):
            yield

    return numpy_seed_under_lock
