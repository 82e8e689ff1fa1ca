"""The sharpness-aware training step, for any fairseq task.

fairseq's Trainer calls ``task.train_step`` once per micro-batch and then reduces, scales and clips the
gradient that it finds. With an optimizer of :mod:`fairseq_asam.optim`, that gradient is the one at
w + epsilon.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from fairseq.logging import metrics
from fairseq.optim import FairseqOptimizer
from fairseq.tasks import FairseqTask
from torch import Tensor
from torch.nn import Module

from fairseq_asam.optim import model_parameters, sharpness_aware_optimizer
from fairseq_asam.sharpness import frozen_batch_norm_statistics
from fairseq_asam.sharpness.random_state import RandomState

from .fraction import extrapolate_, random_part

# Prefix of the logging outputs of the pass at w + epsilon, on their way to reduce_metrics.
PERTURBED = "perturbed_"


class SharpnessAwareTask:
    """What goes in front of a task's class while an optimizer of :mod:`fairseq_asam.optim` trains it."""

    def begin_update(self, num_micro_batches: int) -> None:
        """Called before the first of *num_micro_batches* calls to :meth:`train_step`."""
        self._num_micro_batches = num_micro_batches
        self._calls = 0
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
    ) -> tuple[Tensor, int, dict[str, Any]]:
        """Make the passes at w and w + epsilon; see :meth:`fairseq.tasks.FairseqTask.train_step`.

        The loss and the logging outputs returned are those at w; ``.grad`` holds what the passes at
        w + epsilon have accumulated. With ``--ascent-scope update`` these follow the pass at w of the
        update's last micro-batch, with which the sample size of all of them is returned. With
        ``--ascent-fraction`` the logging outputs at w are extrapolated to the whole batch.
        """
        asam = sharpness_aware_optimizer(optimizer)
        cfg = asam.sharpness_config
        step = functools.partial(
            super().train_step,
            model=model,
            criterion=criterion,
            optimizer=optimizer,
            update_num=update_num,
            ignore_grad=ignore_grad,
            **kwargs,
        )
        if not asam.ascends:
            return step(sample)
        random_state = None if cfg.fresh_masks else RandomState()
        part = sample
        if cfg.ascent_fraction < 1.0:
            part = random_part(sample, cfg.ascent_fraction, getattr(criterion, "padding_idx", None))
        this = _Pass(step, part, sample, random_state)
        perturbation = asam.perturbation(model, criterion, optimizer)
        parameters = model_parameters(optimizer)
        per_update = cfg.ascent_scope == "update"
        self._calls += 1
        is_last = self._calls == self._num_micro_batches
        try:
            if per_update:
                loss = this.run()
                self._passes.append(this)
                if not is_last:
                    return loss, 0, this.logging_output
                _all_reduce(asam, model, criterion)
                accumulated = [None] * len(parameters)
            else:
                accumulated = [parameter.grad for parameter in parameters]
                _set_gradients(parameters, [None] * len(parameters))
                with _no_sync(model, criterion):
                    loss = this.run()
            asam.note_gradient(optimizer)
            with perturbation, _no_new_update(model), frozen_batch_norm_statistics(model):
                smallest = min((p for p in parameters if p.grad is not None and p.numel()), key=Tensor.numel)
                _set_gradients(parameters, accumulated)
                _mark_non_finite(smallest, perturbation.norm)
                sample_size = 0
                with _no_sync(model, criterion):
                    for earlier in self._passes[:-1]:
                        sample_size += earlier.repeat()
                sample_size += this.repeat()
        except RuntimeError:
            # After running out of memory in one worker of several, fairseq goes on with the gradients of
            # the others, which wait for this one, and with the logging outputs that it has.
            if is_last and this.logging_output is None:
                _set_gradients(parameters, [None] * len(parameters))
                if per_update:
                    _all_reduce(asam, model, criterion)
            if is_last and not asam.has_noted_gradient:
                asam.note_gradient(optimizer)
            for earlier in self._passes:
                earlier.note(earlier.logging_output)
            self._passes = []
            asam.ascended = True
            raise
        if is_last:
            self._calls, self._passes = 0, []
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


def with_sharpness_awareness(task: type[FairseqTask]) -> type[FairseqTask]:
    """Return the class *task* with :class:`SharpnessAwareTask` in front of it, under the same name, under
    which fairseq files a task's state in checkpoints."""
    return type(task.__name__, (SharpnessAwareTask, task), {"__doc__": task.__doc__})


class _Pass:
    """Forward and backward of one micro-batch: at w, perhaps of a part of it, and then at w + epsilon."""

    def __init__(
        self,
        step: Callable[[dict[str, Any]], tuple],
        part: dict[str, Any],
        whole: dict[str, Any],
        random_state: RandomState | None,
    ):
        self.step = step
        self.part, self.whole = part, whole
        self.random_state = random_state
        self.logging_output: dict[str, Any] | None = None

    def run(self) -> Tensor:
        """Make the pass at w and return its loss."""
        loss, self.sample_size, self.logging_output = self.step(self.part)
        return loss

    def repeat(self) -> Any:
        """Make the pass at w + epsilon, with the same random numbers unless these are to be fresh, and
        return the sample size."""
        if self.random_state is not None:
            self.random_state.restore()
        _, sample_size, perturbed = self.step(self.whole)
        if self.part is not self.whole:
            extrapolate_(self.logging_output, perturbed, sample_size / (self.sample_size or 1))
        self.note(perturbed)
        return sample_size

    def note(self, perturbed: dict[str, Any]) -> None:
        """Note the logging outputs at w + epsilon beside those at w, which the Trainer has by now."""
        marked = {PERTURBED + k: v for k, v in perturbed.items() if not k.startswith(PERTURBED)}
        self.logging_output.update(marked)


def _set_gradients(parameters: list[Tensor], gradients: list[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient


def _all_reduce(optimizer: FairseqOptimizer, *modules: Module) -> None:
    """Average gradients over workers where that does not happen in the backward pass (legacy_ddp)."""
    for module in modules:
        optimizer.all_reduce_grads(module)


@contextlib.contextmanager
def _no_sync(*modules: Module) -> Iterator[None]:
    """Keep gradients on this worker, whatever data-parallel wrapper the *modules* have."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            if hasattr(module, "no_sync"):
                stack.enter_context(module.no_sync())
        yield


@contextlib.contextmanager
def _no_new_update(model: Module) -> Iterator[None]:
    """Keep the *model* from taking the repeated pass for one of a new update: some models step a moving
    average of their weights whenever a task tells them the number of the update."""
    own = vars(model).get("set_num_updates")
    model.set_num_updates = lambda num_updates: None
    try:
        yield
    finally:
        del model.set_num_updates
        if own is not None:
            model.set_num_updates = own


def _mark_non_finite(parameter: Tensor, norm: Tensor) -> None:
    """Start the gradient of *parameter* with NaN if the *norm* at w is not finite: there is no epsilon then,
    and the update is to be skipped on every worker, or the run to end, as fairseq does with any other
    gradient that is not finite."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    first = parameter.grad[(0,) * parameter.dim()]
    first += torch.where(torch.isfinite(norm), 0.0, torch.nan).to(first)
