"""The sharpness-aware training step, for any fairseq task.

fairseq's Trainer calls ``task.train_step`` once per micro-batch and then reduces, scales and clips the
gradient that it finds. With an optimizer of :mod:`fairseq_asam.optim`, that gradient is the one at
w + epsilon. With any other optimizer nothing changes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
from argparse import Namespace
from typing import Any

import numpy as np
import torch
from fairseq import tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import metrics
from fairseq.optim import FairseqOptimizer
from fairseq.tasks import FairseqTask
from fairseq.trainer import Trainer
from torch.nn import Module

from fairseq_asam.optim import OPTIMIZERS, sharpness_aware, validate_config

# Prefix of the logging outputs of the pass at w + epsilon, on their way to reduce_metrics.
PERTURBED = "perturbed_"


class SharpnessAwareTask:
    """What a task's class gets in front of it while an optimizer of :mod:`fairseq_asam.optim` trains it."""

    def begin_update(self, num_micro_batches: int) -> None:
        """Called before the first of *num_micro_batches* calls to :meth:`train_step`."""
        self._num_micro_batches = num_micro_batches
        self._passes: list[_Pass] = []

    def train_step(
        self,
        sample: dict[str, Any],
        model: Module,
        criterion: Module,
        optimizer: FairseqOptimizer,
        update_num: int,
        ignore_grad: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, int, dict[str, Any]]:
        """Make the passes at w and w + epsilon; see :meth:`fairseq.tasks.FairseqTask.train_step`.

        The loss, the sample size and the logging outputs returned are those at w; ``.grad`` holds what
        the passes at w + epsilon have accumulated. With ``--ascent-scope update`` these follow the pass
        at w of the update's last micro-batch.
        """
        asam = sharpness_aware(optimizer)
        step = functools.partial(
            super().train_step, sample, model, criterion, optimizer, update_num, ignore_grad, **kwargs
        )
        this = _Pass(step, RandomState() if not asam.sharpness_config.fresh_masks else None)
        if asam.sharpness_config.ascent_scope == "micro-batch":
            parameters = list(asam.params)
            accumulated = [p.grad for p in parameters]
            for p in parameters:
                p.grad = None
            with _no_sync(model, criterion):
                loss, sample_size, this.logging_output = step()
            with asam.perturbation(model, criterion):
                for p, gradient in zip(parameters, accumulated):
                    p.grad = gradient
                this.repeat()
        else:
            loss, sample_size, this.logging_output = step()
            self._passes.append(this)
            if len(self._passes) < self._num_micro_batches:
                return loss, sample_size, this.logging_output
            asam.all_reduce_grads(model)
            asam.all_reduce_grads(criterion)
            passes, self._passes = self._passes, []
            with asam.perturbation(model, criterion):
                for p in asam.params:
                    p.grad = None
                with _no_sync(model, criterion):
                    for earlier in passes[:-1]:
                        earlier.repeat()
                this.repeat()
        asam.ascended = True
        return loss, sample_size, this.logging_output

    def reduce_metrics(self, logging_outputs: list[dict[str, Any]], criterion: Module) -> None:
        """Log ``sharpness``, L(w + epsilon) - L(w) in the unit of the ``loss`` column, beside the rest."""
        at_w, perturbed = [], []
        for log in logging_outputs:
            at_w.append({k: v for k, v in log.items() if not k.startswith(PERTURBED)})
            perturbed.append({k[len(PERTURBED) :]: v for k, v in log.items() if k.startswith(PERTURBED)})
        super().reduce_metrics(at_w, criterion)
        if any(perturbed):
            (loss, weight), (perturbed_loss, _) = (self._loss(logs, criterion) for logs in (at_w, perturbed))
            if loss is not None:
                metrics.log_scalar("sharpness", perturbed_loss - loss, weight, priority=15, round=4)

    def _loss(self, logging_outputs: list[dict[str, Any]], criterion: Module) -> tuple[Any, Any]:
        with metrics.aggregate(new_root=True) as aggregator:
            super().reduce_metrics(logging_outputs, criterion)
        meter = aggregator.get("loss")
        return (None, None) if meter is None else (meter.avg, meter.count)


class _Pass:
    """The pass of one micro-batch, to be repeated at w + epsilon with the same random numbers."""

    def __init__(self, step, random_state: RandomState | None):
        self.step = step
        self.random_state = random_state
        self.logging_output: dict[str, Any] = {}

    def repeat(self) -> None:
        """Repeat the pass and note its logging outputs beside those of the first."""
        if self.random_state is not None:
            self.random_state.restore()
        _, _, logging_output = self.step()
        self.logging_output.update({PERTURBED + k: v for k, v in logging_output.items()})


class RandomState:
    """The state of every random number generator that a forward pass may use, as it is when made."""

    def __init__(self):
        self.torch, self.numpy, self.python = torch.get_rng_state(), np.random.get_state(), random.getstate()
        self.cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def restore(self) -> None:
        torch.set_rng_state(self.torch)
        np.random.set_state(self.numpy)
        random.setstate(self.python)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


@contextlib.contextmanager
def _no_sync(*modules: Module):
    """Keep gradients on this worker, whatever data-parallel wrapper the *modules* have."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            if hasattr(module, "no_sync"):
                stack.enter_context(module.no_sync())
        yield


def check_configuration(cfg: Any) -> None:
    """Raise ValueError, in one sentence, if *cfg*, a whole fairseq configuration, asks a sharpness-aware
    optimizer for something that it cannot do, or has no data."""
    validate_config(cfg.optimizer)
    for path in utils.split_paths(getattr(cfg.task, "data", None) or ""):
        if not os.path.exists(path):
            raise ValueError(f"there is no data in {path}: name a directory that fairseq-preprocess wrote")
    refusals = {
        "--fp16": cfg.common.fp16,
        "--bf16": cfg.common.bf16,
        "--amp": cfg.common.amp,
        "--tpu": cfg.common.tpu,
        "--model-parallel-size": cfg.common.model_parallel_size > 1,
        "--use-bmuf": cfg.optimization.use_bmuf,
        "--pipeline-model-parallel": cfg.distributed_training.pipeline_model_parallel,
        "--zero-sharding": cfg.distributed_training.zero_sharding != "none",
        "--ddp-backend slowmo": cfg.distributed_training.ddp_backend == "slowmo",
        "--ddp-backend fully_sharded": cfg.distributed_training.ddp_backend == "fully_sharded",
    }
    for flag, given in refusals.items():
        if given:
            raise ValueError(f"--optimizer {cfg.optimizer._name} does not support {flag}: train without it")


def _checked_setup_task(setup_task):
    @functools.wraps(setup_task)
    def checked(cfg, **kwargs):
        whole = convert_namespace_to_omegaconf(cfg) if isinstance(cfg, Namespace) else cfg._get_root()
        if getattr(whole.get("optimizer"), "_name", None) in OPTIMIZERS:
            try:
                check_configuration(whole)
            except ValueError as error:
                raise SystemExit(f"fairseq_asam: {error}") from None
        return setup_task(cfg, **kwargs)

    return checked


def _sharpness_aware_train_step(train_step):
    @functools.wraps(train_step)
    def sharpness_aware_train_step(self, samples, raise_oom=False):
        asam = sharpness_aware(self.optimizer)
        if asam is not None:
            if not isinstance(self.task, SharpnessAwareTask):
                self.task.__class__ = _with_sharpness_awareness(type(self.task))
            asam.ascended = False
            self.task.begin_update(len(samples))
        return train_step(self, samples, raise_oom)

    return sharpness_aware_train_step


def _with_sharpness_awareness(task: type[FairseqTask]) -> type[FairseqTask]:
    # The name stays: fairseq files a task's state in checkpoints under it.
    return type(task.__name__, (SharpnessAwareTask, task), {"__doc__": task.__doc__})


# The tasks of fairseq are too many, and too many of them name their own class, for a registry of
# subclasses to reach them all. The Trainer meets every one.
tasks.setup_task = _checked_setup_task(tasks.setup_task)
Trainer.train_step = _sharpness_aware_train_step(Trainer.train_step)
