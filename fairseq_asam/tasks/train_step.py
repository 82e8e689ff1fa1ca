"""The sharpness-aware training step, for any fairseq task.

fairseq's Trainer calls ``task.train_step`` once per micro-batch and then reduces, scales and clips the
gradient that it finds. With an optimizer of :mod:`fairseq_asam.optim`, that gradient is the one at
w + epsilon.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fairseq.logging import metrics
from fairseq.optim import FairseqOptimizer
from fairseq.tasks import FairseqTask
from torch import Tensor
from torch.nn import Module

from fairseq_asam.optim import sharpness_aware_optimizer
from fairseq_asam.sharpness import TwoPasses

from .fraction import extrapolate_, random_part

# Prefix of the logging outputs of the pass at w + epsilon, on their way to reduce_metrics.
PERTURBED = "perturbed_"


class SharpnessAwareTask(FairseqTask):
    """A task whose ``train_step`` makes both passes of an update.

    It goes in front of the class of any fairseq task that is trained with an optimizer of
    :mod:`fairseq_asam.optim`.

    Attributes:
        first_ascent: the number of the first update that makes both passes (``--ascent-from``); ``None``
            before the Trainer has made batches.
        resets_numbers: whether a checkpoint was loaded without its number of updates, or without its place in
            the data, so that updates are not counted from the first epoch on.
        batches: the Trainer's, of the present epoch, in that case.
        seed_of_batches: that of the first epoch, where the Trainer has another seed for each
            (``--update-ordered-indices-seed``).
    """

    first_ascent: int | None = None
    resets_numbers: bool | None = None
    batches: Any = None
    seed_of_batches: int | None = None

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

        The loss and the logging outputs returned are those at w. ``.grad`` accumulates the gradients of the
        passes at w + epsilon. With ``--ascent-scope update``, these passes follow the pass at w of the last
        micro-batch, and that call returns the sample size of all micro-batches. With an
        ``--ascent-direction`` that needs no pass at w, the only pass, and so the loss, is at w + epsilon.
        With ``--ascent-fraction``, logging outputs at w that are sums are extrapolated to the whole batch.
        Means, as of the criteria of text-to-speech, are those of the part.
        """
        asam = sharpness_aware_optimizer(optimizer)
        cfg, update = asam.sharpness_config, asam.update
        update.next_micro_batch()
        step = functools.partial(
            super().train_step,
            model=model,
            criterion=criterion,
            optimizer=optimizer,
            update_num=update_num,
            ignore_grad=ignore_grad,
            **kwargs,
        )
        if not update.ascends:
            return step(sample)
        if not update.two_passes.perturbation.direction.needs_pass_at_w:
            set_num_updates: Any = model.set_num_updates
            set_num_updates(update_num)  # at w, of which some models step a moving average then
            with _no_new_update(model):
                return update.two_passes.one_pass(lambda: step(sample))
        two_passes, is_last = update.two_passes, update.is_at_last
        per_update = cfg.ascent_scope == "update"
        padding = getattr(criterion, "padding_idx", None)
        # Do not ask before the first pass: the criteria of wav2vec know it only then.
        are_sums = functools.partial(self.logging_outputs_can_be_summed, criterion)
        this = _MicroBatch(step, cfg.ascent_fraction, padding, are_sums)

        def again(sample: dict[str, Any]) -> tuple[Tensor, int, dict[str, Any]]:
            # Workers add up their gradients in the last pass, when these are complete.
            alone = _no_sync(model, criterion, apply=per_update and not is_last)
            with _nan_after_overflow(optimizer, two_passes), _no_new_update(model), alone:
                return this.repeat(sample)

        def end_passes_at_w() -> None:
            """Complete the gradient at w in ``.grad``, from which the next pass makes epsilon."""
            if per_update:
                _all_reduce(asam, model, criterion)
            if update.looksam is not None:
                update.looksam.add_gradients_at_w(optimizer)

        def drop_passes_at_w() -> None:
            for earlier in update.waiting:
                earlier.note(earlier.logging_output)
            update.waiting = []
            two_passes.reset()

        if update.has_failed:
            drop_passes_at_w()
        try:
            with _no_sync(model, criterion, apply=not per_update):
                loss = two_passes.at_w(this.run, sample, again=again)[0]
            if per_update:
                update.waiting.append(this)
                if not is_last:
                    return loss, 0, this.logging_output
            end_passes_at_w()
            sample_size = sum(size for _, size, _ in two_passes.at_w_plus_epsilon())
        except RuntimeError:
            # After one of several workers has run out of memory, fairseq goes on with the gradients of the
            # others and with the logging outputs that it has. The others wait for this worker's gradients.
            if is_last and this.logging_output is None:
                for parameter in two_passes.parameters:
                    parameter.grad = None
                end_passes_at_w()
            update.has_failed = True
            drop_passes_at_w()
            raise
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
        else:
            _leave_out_unmeasured()

    def _loss(self, logging_outputs: list[dict[str, Any]], criterion: Module) -> tuple[Any, Any]:
        with metrics.aggregate(new_root=True) as aggregator:
            super().reduce_metrics(logging_outputs, criterion)
        meter = aggregator.get("loss")
        return (None, None) if meter is None else (meter.avg, meter.count)


def _leave_out_unmeasured() -> None:
    """Remove the meter of ``sharpness`` if it has measured nothing since it was reset.

    Otherwise fairseq logs None, or null.
    """
    for meters in metrics.get_active_aggregators():
        if "sharpness" in meters and meters["sharpness"].val is None:
            del meters["sharpness"]
            meters.priorities = [entry for entry in meters.priorities if entry[2] != "sharpness"]


def with_sharpness_awareness(task: type[FairseqTask]) -> type[FairseqTask]:
    """Return the class *task* with :class:`SharpnessAwareTask` in front of it.

    The name stays the same, because fairseq saves a task's state under it.
    """
    return type(task.__name__, (SharpnessAwareTask, task), {"__doc__": task.__doc__})


@dataclass
class _MicroBatch:
    """Makes the passes of a micro-batch: over a *fraction* of it at w, over all of it at w + epsilon.

    Attributes:
        step: makes a pass over a batch, and returns loss, sample size and logging output.
        outputs_are_sums: returns whether the logging outputs are sums. It is called after the first pass.
        logging_output: that of the pass at w; ``None`` before.
    """

    step: Callable[[dict[str, Any]], tuple]
    fraction: float
    padding: int | None
    outputs_are_sums: Callable[[], bool]
    logging_output: dict[str, Any] | None = None

    def run(self, sample: dict[str, Any]) -> tuple[Tensor, int, dict[str, Any]]:
        """Make the pass at w."""
        part = random_part(sample, self.fraction, self.padding) if self.fraction < 1.0 else sample
        results = self.step(part)
        _, self.sample_size, self.logging_output = results
        return results

    def repeat(self, sample: dict[str, Any]) -> tuple[Tensor, int, dict[str, Any]]:
        """Make the pass at w + epsilon."""
        results = self.step(sample)
        _, sample_size, perturbed = results
        if self.fraction < 1.0 and self.outputs_are_sums():
            extrapolate_(self.logging_output, perturbed, sample_size / (self.sample_size or 1))
        self.note(perturbed)
        return results

    def note(self, perturbed: dict[str, Any]) -> None:
        """Add the logging outputs at w + epsilon to those at w, which the Trainer already has."""
        outputs = {PERTURBED + k: v for k, v in perturbed.items() if not k.startswith(PERTURBED)}
        self.logging_output.update(outputs)


def _all_reduce(optimizer: FairseqOptimizer, *modules: Module) -> None:
    """Average gradients over workers, if the backward pass does not do so (legacy_ddp)."""
    for module in modules:
        optimizer.all_reduce_grads(module)


@contextlib.contextmanager
def _no_sync(*modules: Module, apply: bool) -> Iterator[None]:
    """Keep gradients on this worker, whatever data-parallel wrapper *modules* have, if *apply* is true."""
    with contextlib.ExitStack() as stack:
        for module in modules if apply else ():
            no_sync: Any = getattr(module, "no_sync", contextlib.nullcontext)
            stack.enter_context(no_sync())
        yield


def _nan_after_overflow(
    optimizer: FairseqOptimizer, two_passes: TwoPasses
) -> contextlib.AbstractContextManager:
    """Make the gradients NaN if those at w are not finite.

    fairseq then skips the update on every worker or ends the run, as with any gradient that is not finite.
    """
    own_backward = optimizer.backward

    def backward(loss: Tensor) -> None:
        own_backward(two_passes.nan_after_overflow(loss))

    return _temporary_attributes(optimizer, backward=backward)


def _no_new_update(model: Module) -> contextlib.AbstractContextManager:
    """Keep *model* from taking the pass at w + epsilon for a new update.

    Some models step a moving average of their weights whenever a task tells them the number of the update.
    """
    return _temporary_attributes(model, set_num_updates=lambda num_updates: None)


@contextlib.contextmanager
def _temporary_attributes(owner: Any, **attributes: Any) -> Iterator[None]:
    """Replace *attributes* of *owner* within the block."""
    own = {name: vars(owner)[name] for name in attributes if name in vars(owner)}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in attributes:
            delattr(owner, name)
        for name, value in own.items():
            setattr(owner, name, value)
