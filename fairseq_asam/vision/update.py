"""One update of SGD, SAM or ASAM on a batch of images (Algorithm 1 of the paper)."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from fairseq_asam import Perturbation, frozen_batch_norm_statistics
from fairseq_asam.sharpness.random_state import RandomState


class Measured(NamedTuple):
    """What an update saw of its batch, means over this process's images: tensors without dimensions, still
    on the device, for to read one would stall it."""

    loss: Tensor
    accuracy: Tensor
    sharpness: Tensor


class Update:
    """Makes an update with every call, given this process's images (N x C x H x W) and targets, class
    numbers (N) or probabilities (N x classes).

    Args:
        accelerator: spreads the batch over processes and casts to half precision.
        model, optimizer: as the *accelerator* prepared them.
        perturbation: of the model's weights; ``None`` makes plain updates of *optimizer*.
        label_smoothing: of the training loss, at w and at w + epsilon.
        m: take epsilon from each m images on their own (m-sharpness; Foret et al. 2021, Section 4.1), and
            step with the mean of the gradients at the several w + epsilon. It divides N. ``None``: take it
            from the gradient of the whole batch, over all processes.
        statistics_at_w: keep the pass at w + epsilon out of the batch-normalization statistics.

    Both passes of an image draw the same random numbers (dropout, ShakeDrop), since Algorithm 1 maximizes
    and descends one function. An update whose gradient at w is not finite has no epsilon and is made with a
    gradient of NaN: in fp16, the gradient scaler skips it and lowers its scale; otherwise NaN it remains.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        perturbation: Perturbation | None,
        *,
        label_smoothing: float = 0.0,
        m: int | None = None,
        statistics_at_w: bool = True,
    ):
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.perturbation, self.m = perturbation, m
        self.label_smoothing, self.statistics_at_w = label_smoothing, statistics_at_w
        self._parameters = list(model.parameters())

    def __call__(self, images: Tensor, targets: Tensor) -> Measured:
        self.optimizer.zero_grad()
        if self.perturbation is None:
            loss, accuracy = self._pass(images, targets, 1.0)
            measured = Measured(loss, accuracy, torch.zeros_like(loss))
        else:
            m = self.m or len(images)
            groups = list(zip(images.split(m), targets.split(m)))
            seen = [
                self._two_passes(*group, 1.0 / len(groups), is_last=i == len(groups) - 1)
                for i, group in enumerate(groups)
            ]
            measured = Measured(*(torch.stack(values).mean() for values in zip(*seen)))
        self.optimizer.step()
        return measured

    def _two_passes(self, images: Tensor, targets: Tensor, weight: float, is_last: bool) -> Measured:
        """Add the gradient at w + epsilon, times *weight*, to ``.grad``."""
        accumulated = [parameter.grad for parameter in self._parameters]
        self._set_gradients([None] * len(accumulated))
        random_state = RandomState()
        with self._on_this_process(self.m is not None):
            loss, accuracy = self._pass(images, targets, weight)
        statistics = frozen_batch_norm_statistics if self.statistics_at_w else contextlib.nullcontext
        with self.perturbation, statistics(self.model):
            self._set_gradients(accumulated)
            random_state.restore()
            nan_unless_finite = 0.0 * self.perturbation.norm
            with self._on_this_process(not is_last):
                perturbed_loss, _ = self._pass(images, targets, weight + nan_unless_finite)
        return Measured(loss, accuracy, perturbed_loss - loss)

    def _pass(self, images: Tensor, targets: Tensor, weight: float | Tensor) -> tuple[Tensor, Tensor]:
        """Forward and backward; return the mean loss and the accuracy."""
        outputs = self.model(images)
        loss = F.cross_entropy(outputs, targets, label_smoothing=self.label_smoothing)
        self.accelerator.backward(loss * weight)
        classes = targets if targets.dim() == 1 else targets.argmax(1)
        return loss.detach(), (outputs.argmax(1) == classes).to(loss).mean()

    def _on_this_process(self, alone: bool) -> contextlib.AbstractContextManager:
        """Keep gradients from being averaged over processes, if *alone*."""
        return self.accelerator.no_sync(self.model) if alone else contextlib.nullcontext()

    def _set_gradients(self, gradients: list[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients):
            parameter.grad = gradient
