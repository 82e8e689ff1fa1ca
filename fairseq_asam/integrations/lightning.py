"""Sharpness-aware training with Lightning's Trainer and automatic optimization."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor
from torchmetrics import Metric

from fairseq_asam import TwoPasses
from fairseq_asam.sharpness.late_start import first_ascent
from fairseq_asam.sharpness.optimizer import refuse_sharpness_aware

from .settings import Settings


class SharpnessAwareCallback(Callback):
    """Makes automatic optimization sharpness-aware::

        trainer = lightning.Trainer(callbacks=[SharpnessAwareCallback(rho=0.05, normalization="none")])

    The module and its optimizer stay as they are. The pass at w is the one that counts: what
    ``training_step`` returns and logs is of it, and torchmetrics see each batch once. The passes at
    w + epsilon come with the last micro-batch of the update, and their logs go nowhere. The hooks of the
    backward pass see the gradient at w + epsilon; clipping and the step follow. The value ``sharpness``,
    L(w + epsilon) - L(w), is logged for each update of two passes.

    An update whose losses are all ``None`` is skipped. What else ``training_step`` changes outside of the
    module, such as a file, it changes in both passes.

    Args:
        rho, **options: see :class:`~fairseq_asam.integrations.settings.Settings`. Random directions are
            seeded as ``lightning.seed_everything`` was.

    Raises:
        ValueError: a value is not allowed. When ``fit`` begins: the module optimizes manually; the strategy
            is DeepSpeed's or FSDP1's; the optimizer is sharpness-aware already, or keeps no moments for the
            direction or the normalization; training ends before ``ascent_from``.
    """

    def __init__(self, rho: float, **options: Any):
        self.settings = Settings(rho, **options)
        self._two_passes: TwoPasses | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(pl_module).__name__} has automatic_optimization=False, so that no callback can make "
                "its passes: make them in training_step with TwoPasses, or set it to True"
            )
        if isinstance(trainer.strategy, (DeepSpeedStrategy, FSDPStrategy)):
            raise ValueError(
                f"the strategy is {type(trainer.strategy).__name__}, which keeps gradients or weights to "
                "itself: use ddp, or ModelParallelStrategy (FSDP2)"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        refuse_sharpness_aware(optimizer)
        self.settings.refuse_without_moments(optimizer)
        self._first_ascent = first_ascent(self.settings.ascent_from, trainer.estimated_stepping_batches)
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        perturbation = self.settings.perturbation(
            pl_module, optimizer, seed, number=lambda: trainer.global_step
        )
        self._two_passes = TwoPasses(perturbation, [pl_module])
        self._sharpness: Tensor | float | None = None
        # Lightning makes a closure for each batch: training_step, zero_grad and backward.
        loop = trainer.fit_loop.epoch_loop.automatic_optimization
        loop._make_closure = functools.partial(self._make_closure, trainer, loop._make_closure)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._sharpness is not None and not trainer.fit_loop._should_accumulate():
            pl_module.log("sharpness", self._sharpness)
            self._sharpness = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        vars(trainer.fit_loop.epoch_loop.automatic_optimization).pop("_make_closure", None)
        self._two_passes = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def _make_closure(self, trainer: Trainer, make: Callable[..., Closure], *arguments: Any) -> Closure:
        closure = make(*arguments)
        # StochasticWeightAveraging makes passes without backward, for the statistics of batch normalization.
        is_plain = closure._backward_fn is None or trainer.global_step < self._first_ascent
        if self.settings.rho > 0.0 and not is_plain:
            closure.closure = torch.enable_grad()(functools.partial(self._run, trainer, closure))
        return closure

    def _run(self, trainer: Trainer, closure: Closure) -> ClosureResult:
        """Make the passes that a micro-batch needs, and return what the first one gave."""
        two_passes, is_last = self._two_passes, not trainer.fit_loop._should_accumulate()
        if closure._zero_grad_fn is not None:
            closure._zero_grad_fn()  # before TwoPasses sets earlier gradients aside
            two_passes.reset()
        if not two_passes.perturbation.direction.needs_pass_at_w:
            return two_passes.one_pass(_pass, closure._step_fn, closure._backward_fn)[1]
        of_each = self.settings.ascent_scope == "micro-batch"
        earlier = [(parameter, parameter.grad) for parameter in two_passes.parameters]
        _, result = two_passes.at_w(
            functools.partial(_at_w, trainer, of_each),
            closure,
            *closure._step_fn.args,  # the batch, which training_step may change, so that both passes get it
            again=functools.partial(_at_w_plus_epsilon, trainer, two_passes, not is_last),
        )
        if is_last or of_each:
            if any(parameter.grad is not None for parameter in two_passes.perturbation.parameters):
                two_passes.at_w_plus_epsilon()
                self._sharpness = two_passes.sharpness + (self._sharpness or 0.0)
            else:  # training_step returned no loss
                for parameter, gradient in earlier:
                    parameter.grad = gradient
                two_passes.reset()
        return result


def _pass(
    step: Callable[[], ClosureResult], backward: Callable[[Tensor], None]
) -> tuple[Tensor | float, ClosureResult]:
    """Run ``training_step`` and *backward*, unless it returned ``None``, and return its loss and result."""
    result = step()
    if result.closure_loss is None:
        return 0.0, result
    backward(result.closure_loss)
    return result.closure_loss, result


def _at_w(
    trainer: Trainer, alone: bool, closure: Closure, *batch: Any
) -> tuple[Tensor | float, ClosureResult]:
    """Make the pass at w, without the hooks of the backward pass; *alone*: of this process only."""

    def backward(loss: Tensor) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        loss = loss if scaler is None else scaler.scale(loss)
        trainer.precision_plugin.backward(loss, trainer.lightning_module, trainer.optimizers[0])

    with _block_parallel_sync_behavior(trainer.strategy, alone):
        return _pass(closure._step_fn, backward)


def _at_w_plus_epsilon(
    trainer: Trainer, two_passes: TwoPasses, alone: bool, closure: Closure, *batch: Any
) -> tuple[Tensor | float, ClosureResult]:
    """Make a pass at w + epsilon, with the hooks of the backward pass. ``training_step`` counts nothing."""

    def step() -> ClosureResult:
        with _silent(trainer.lightning_module):
            return closure._step_fn()

    def backward(loss: Tensor) -> None:
        closure._backward_fn(two_passes.nan_after_overflow(loss))

    with _uncounted(trainer.lightning_module), _block_parallel_sync_behavior(trainer.strategy, alone):
        return _pass(step, backward)


@contextlib.contextmanager
def _silent(module: LightningModule) -> Iterator[None]:
    """Within the block, ``self.log`` does nothing."""
    loggers = [part for part in module.modules() if isinstance(part, LightningModule)]
    for logger in loggers:
        logger.log = lambda *arguments, **options: None
    try:
        yield
    finally:
        for logger in loggers:
            del logger.log


@contextlib.contextmanager
def _uncounted(module: LightningModule) -> Iterator[None]:
    """Metrics are after the block what they were before."""
    metrics = [(part, _state_of(part)) for part in module.modules() if isinstance(part, Metric)]
    try:
        yield
    finally:
        for metric, state in metrics:
            _restore(metric, state)


def _state_of(metric: Metric) -> dict[str, tuple[Any, Any]]:
    """Return the attributes that *metric* may change, each with a copy of its values."""
    kinds = (Tensor, list, int, float, type(None))
    return {
        name: (value, value.clone() if isinstance(value, Tensor) else copy.copy(value))
        for name, value in vars(metric).items()
        if isinstance(value, kinds)
    }


@torch.no_grad()
def _restore(metric: Metric, state: dict[str, tuple[Any, Any]]) -> None:
    """Restore the attributes: the same tensors and lists, which metrics of a collection share."""
    for name, (value, values) in state.items():
        if isinstance(value, Tensor):
            value.copy_(values)
        elif isinstance(value, list):
            value[:] = values
        setattr(metric, name, value)
