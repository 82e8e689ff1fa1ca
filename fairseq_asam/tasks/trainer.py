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


def count_updates(
    optimization: Any, batches: int | None, epoch: int = 1, done: int = 0, before: int = 0
) -> float:
    """Return the number of the last update of a training; infinity if that is unknown.

    Args:
        optimization: that group of a fairseq configuration.
        batches: of an epoch, on each worker; ``None`` if that is unknown.
        epoch: from which on updates are counted.
        done: how many batches of that epoch are done.
        before: the number of the last update before the others.
    """
    updates: float = math.inf
    if optimization.max_epoch and batches is not None:
        freq = optimization.update_freq  # by epoch; the last number holds for all later ones
        whole = math.floor if getattr(optimization, "skip_remainder_batch", False) else math.ceil
        left = [batches - done] + [batches] * (optimization.max_epoch - epoch)
        of_epochs = (freq[min(epoch - 1 + i, len(freq) - 1)] for i in range(len(left)))
        updates = before + sum(whole(each / accumulated) for each, accumulated in zip(left, of_epochs))
    return min(updates, optimization.max_update or math.inf)


def _make_task_sharpness_aware(trainer: Trainer) -> None:
    if not isinstance(trainer.task, SharpnessAwareTask):
        trainer.task.__class__ = with_sharpness_awareness(type(trainer.task))


def _set_first_ascent(trainer: Trainer, batches: int | None, **begin: int) -> None:
    """Tell the task when sharpness-aware updates begin; *batches* and *begin* as in :func:`count_updates`."""
    updates = count_updates(trainer.cfg.optimization, batches, **begin)
    trainer.task.first_ascent = first_ascent(trainer.cfg.optimizer.ascent_from, updates)


def _length(trainer: Trainer, batches: Any) -> int | None:
    """Return the number of *batches* of every epoch; ``None`` if it is unknown."""
    # Epochs that take turns with parts of the data have different numbers of batches.
    if trainer.task.has_sharded_data(trainer.cfg.dataset.train_subset):
        return None
    try:
        return len(batches)
    except NotImplementedError:  # of a stream
        return None


def with_sharpness_aware_task(get_train_iterator):
    """Return the Trainer's ``get_train_iterator``, which makes its task sharpness-aware before the batches.

    It tells the task what depends on the whole training.
    """

    @functools.wraps(get_train_iterator)
    def get_train_iterator_of_sharpness_aware_task(self, epoch, *args, **kwargs):
        if self.cfg.optimizer._name not in SHARPNESS_AWARE:
            return get_train_iterator(self, epoch, *args, **kwargs)
        _make_task_sharpness_aware(self)
        dataset, task = self.cfg.dataset, self.task
        if dataset.update_ordered_indices_seed:
            task.seed_of_batches = self.cfg.common.seed + 1
        batches = get_train_iterator(self, epoch, *args, **kwargs)
        if dataset.curriculum:
            # Otherwise fairseq keeps the order of the first epoch for all later ones, unless it resumes.
            batches.reuse_dataloader = False
        if task.resets_numbers is None:
            number = self.get_num_updates()
            resets_batches = self.cfg.checkpoint.reset_dataloader and number > 0
            task.resets_numbers = resets_batches or (epoch > 1 and number == 0)
        if task.resets_numbers:  # fairseq has not told yet where in the epoch the batches begin
            task.first_ascent, task.batches = None, batches
        else:
            with refusals_as_a_sentence():
                _set_first_ascent(self, _length(self, batches))
        return batches

    return get_train_iterator_of_sharpness_aware_task


def with_beginning_of_the_update(train_step):
    """Return the Trainer's ``train_step``, which tells a sharpness-aware optimizer that an update begins."""

    @functools.wraps(train_step)
    def sharpness_aware_train_step(self, samples, raise_oom=False):
        asam = sharpness_aware_optimizer(self.optimizer)
        if asam is not None:
            _make_task_sharpness_aware(self)
            with refusals_as_a_sentence():
                _set_first_ascent_late(self, len(samples))
                # Leave out dummy batches, which are empty here, beside others: fairseq divides by the
                # sentences of all batches of a worker, or of none if the last one is a dummy.
                samples = [sample for sample in samples if sample] or samples
                asam.begin_update(self, len(samples))
        return train_step(self, samples, raise_oom)

    return sharpness_aware_train_step


def _set_first_ascent_late(trainer: Trainer, taken: int) -> None:
    """Tell the task when sharpness-aware updates begin, if it is not known at the first update of an epoch.

    Args:
        trainer: about to make the update.
        taken: how many batches the update has.
    """
    task = trainer.task
    if task.first_ascent is not None:
        return
    if task.batches is None:  # the program makes batches without the Trainer
        _set_first_ascent(trainer, None)
        return
    done = task.batches.iterations_in_epoch - taken
    begin = {"epoch": task.batches.epoch, "done": done, "before": trainer.get_num_updates()}
    _set_first_ascent(trainer, _length(trainer, task.batches), **begin)


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
