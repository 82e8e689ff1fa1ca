"""Sharpness-aware updates in a loop of HuggingFace's accelerate."""

from __future__ import annotations

import functools
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from fairseq_asam import Perturbation, TwoPasses
from fairseq_asam.sharpness.two_passes import Evaluate

from .settings import SCOPES


class AccumulatingTwoPasses(TwoPasses):
    """Makes both passes of an update, of one or several micro-batches, within ``accumulate()``::

        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        perturbation = Perturbation(model.named_parameters(), rho=0.5)
        two_passes = AccumulatingTwoPasses(accelerator, model, perturbation)

        def forward_and_backward(inputs, targets):
            loss = criterion(model(inputs), targets)
            accelerator.backward(loss)
            return loss

        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = two_passes(forward_and_backward, inputs, targets)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    There is one epsilon for the update. The passes at w + epsilon are made with the last micro-batch, the
    one after which the optimizer steps. A clipping of gradients belongs before ``optimizer.step()``, under
    ``if accelerator.sync_gradients``.

    A gradient that overflows in either pass makes a gradient scaler skip the update.

    With a direction that needs no pass at w, each micro-batch has its only pass at w + epsilon.

    Args:
        accelerator: spreads batches over processes.
        model: as *accelerator* prepared it.
        perturbation: of the weights of *model*, made after ``prepare``.
        ascent_scope: ``update``, or ``micro-batch``: each micro-batch of each process has an epsilon of its
            own (m-sharpness).
        **options: of :class:`~fairseq_asam.TwoPasses`.

    Attributes:
        sharpness: as in :class:`~fairseq_asam.TwoPasses`: the sum over the micro-batches of this process that
            share an epsilon.

    Raises:
        ValueError: *accelerator* uses DeepSpeed, Megatron-LM or FSDP1; *ascent_scope* is not allowed.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        perturbation: Perturbation,
        ascent_scope: str = "update",
        **options: Any,
    ):
        refuse_divided_models(accelerator)
        if ascent_scope not in SCOPES:
            raise ValueError(f"ascent_scope is {ascent_scope!r}, but it must be one of {', '.join(SCOPES)}")
        super().__init__(perturbation, [model], **options)
        self.accelerator, self.model, self.ascent_scope = accelerator, model, ascent_scope
        self._updates = 0
        if perturbation.direction.number is None:  # entries are micro-batches
            perturbation.direction.number = lambda: self._updates

    def __call__(self, evaluate: Evaluate, *arguments: Any, again: Evaluate | None = None) -> Any:
        """Make what the micro-batch needs, and return what its first pass returned.

        Arguments and exceptions are those of :class:`~fairseq_asam.TwoPasses`.
        """
        again = again or evaluate
        if not self.perturbation.direction.needs_pass_at_w:
            result = self.one_pass(evaluate, *arguments)
            self._updates += self.accelerator.sync_gradients
            return result
        if self.ascent_scope == "micro-batch":
            at_w = functools.partial(self._without_sync, evaluate)
            again = functools.partial(self._with_nan_after_overflow, again)
            return super().__call__(at_w, *arguments, again=again)
        is_last = self.accelerator.sync_gradients
        if is_last:
            again = functools.partial(self._with_nan_after_overflow, again)
        elif not self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
            again = functools.partial(self._without_sync, again)
        result = self.at_w(evaluate, *arguments, again=again)
        if is_last:
            self.at_w_plus_epsilon()
        return result

    def _without_sync(self, evaluate: Evaluate, *arguments: Any) -> Any:
        """Make a pass whose gradient is not summed over processes yet."""
        with self.accelerator.no_sync(self.model):
            return evaluate(*arguments)

    def _with_nan_after_overflow(self, evaluate: Evaluate, *arguments: Any) -> Any:
        """Make a pass in which a gradient scaler finds the gradient at w too, if that is not finite."""
        backward = self.accelerator.backward

        def backward_of_either(loss: Tensor, **options: Any) -> None:
            backward(self.nan_after_overflow(loss), **options)

        self.accelerator.backward = backward_of_either
        try:
            return evaluate(*arguments)
        finally:
            self.accelerator.backward = backward


def refuse_divided_models(accelerator: Accelerator) -> None:
    """Raise ValueError if *accelerator* divides the model in a way that hides weights or gradients."""
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"accelerate is to use {kind.value}, which keeps gradients to itself: use "
            "DistributedDataParallel, or FSDP with fsdp_version 2"
        )
    if kind == DistributedType.FSDP and not getattr(accelerator, "is_fsdp2", False):
        raise ValueError(
            "accelerate is to use FSDP with fsdp_version 1, which hides the shapes of weights: set "
            "fsdp_version to 2"
        )
