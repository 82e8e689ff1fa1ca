"""Sharpness-aware training with the Trainer of HuggingFace's transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer

from fairseq_asam.sharpness.late_start import first_ascent
from fairseq_asam.sharpness.optimizer import refuse_sharpness_aware

from .accelerate import AccumulatingTwoPasses, refuse_divided_models
from .settings import Settings


class SharpnessAwareTrainer(Trainer):
    """HuggingFace's Trainer, sharpness-aware::

        trainer = SharpnessAwareTrainer(model, args, train_dataset=data, rho=0.05, normalization="none")
        trainer.train()

    For a Trainer of another kind, name both: ``class MyTrainer(SharpnessAwareTrainer, OtherTrainer)``.

    An update makes its passes at w + epsilon with its last micro-batch. Clipping, the step and the hooks
    follow once. The logs have ``sharpness`` beside ``loss``: the mean of L(w + epsilon) - L(w) over the
    updates since the last log, in the unit of ``loss``, which is L(w). Updates of one pass have no sharpness,
    and their ``loss`` is L(w + epsilon).

    Args:
        *args, **kwargs: of the Trainer, and by name the options of
            :class:`~fairseq_asam.integrations.settings.Settings`, of which ``rho`` is required. Random
            directions are seeded by ``args.seed``.

    Raises:
        TypeError: ``rho`` is missing.
        ValueError: a value is not allowed; the Trainer is to use DeepSpeed or FSDP1; its optimizer is
            sharpness-aware already, steps within ``backward()``, or keeps no moments for *direction* or
            *normalization*. In training: it ends before ``ascent_from``.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        options = {field.name: kwargs.pop(field.name) for field in fields(Settings) if field.name in kwargs}
        if "rho" not in options:
            raise TypeError(f"{type(self).__name__} needs rho, the radius of the maximization region")
        self.sharpness_aware = Settings(**options)
        self._two_passes: AccumulatingTwoPasses | None = None
        self._sharpness: Tensor | None = None  # sum and number since the last log
        super().__init__(*args, **kwargs)
        refuse_divided_models(self.accelerator)
        self._refuse_optimizer()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._two_passes = self._sharpness = None
        return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        step, settings = super().training_step, self.sharpness_aware
        first = first_ascent(settings.ascent_from, self.state.max_steps)
        if settings.rho == 0.0 or self.state.global_step < first:
            return step(model, inputs, num_items_in_batch)
        if self._two_passes is None or self._two_passes.model is not model:
            perturbation = settings.perturbation(
                model, self.optimizer, seed=self.args.seed, number=lambda: self.state.global_step
            )
            self._two_passes = AccumulatingTwoPasses(
                self.accelerator, model, perturbation, settings.ascent_scope
            )
        divisor = getattr(self, "current_gradient_accumulation_steps", None)
        loss = self._two_passes(self._divided_step, step, divisor, model, inputs, num_items_in_batch)
        self._add_sharpness(self._two_passes)
        return loss

    def _divided_step(self, step: Callable[..., Tensor], divisor: int | None, *arguments: Any) -> Tensor:
        """Make a step whose loss is divided by *divisor*, in both passes.

        It changes within an update if an epoch of unknown length ends in it.
        """
        self.current_gradient_accumulation_steps = divisor
        return step(*arguments)

    def _add_sharpness(self, two_passes: AccumulatingTwoPasses) -> None:
        is_last = self.accelerator.sync_gradients
        if two_passes.sharpness is None or not (is_last or two_passes.ascent_scope == "micro-batch"):
            return
        sharpness = torch.as_tensor(two_passes.sharpness)
        finite = sharpness.isfinite()
        seen = torch.stack([sharpness.where(finite, 0.0), (finite & is_last).to(sharpness)])
        self._sharpness = seen if self._sharpness is None else self._sharpness + seen

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        # Only the Trainer's own logs of training have both. It makes them on every process.
        if self._sharpness is not None and "loss" in logs and "learning_rate" in logs:
            total, number = self.accelerator.reduce(self._sharpness, "sum").tolist()
            logs["sharpness"] = total / number if number else math.nan
            self._sharpness = None
        super().log(logs, *args, **kwargs)

    def _refuse_optimizer(self) -> None:
        if "lomo" in self.args.optim or "layerwise" in self.args.optim:
            raise ValueError(
                f"optim is {self.args.optim.value}, which steps within backward(), of which an update has "
                "two: use another, such as adamw_torch"
            )
        if self.optimizer is not None:
            refuse_sharpness_aware(self.optimizer)
            return self.sharpness_aware.refuse_without_moments(self.optimizer)
        kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
            self.args, self.model
        )
        refuse_sharpness_aware(kind)
        if not {"params", "model", "optimizer_dict"} & options.keys():  # these name weights of the model
            self.sharpness_aware.refuse_without_moments(kind([nn.Parameter(torch.zeros(2, 2))], **options))


class SharpnessAwareSeq2SeqTrainer(SharpnessAwareTrainer, Seq2SeqTrainer):
    """HuggingFace's Seq2SeqTrainer, sharpness-aware: see :class:`SharpnessAwareTrainer`."""
