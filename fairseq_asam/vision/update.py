"""One update of SGD, SAM or ASAM on a batch of images (Algorithm 1 of the paper)."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from fairseq_asam import Perturbation, TwoPasses


class Measured(NamedTuple):
    """Means over the images of an update in this process, as tensors on the device; reading one waits for it.

    The sharpness is 0 without a perturbation, and NaN for an update of one pass with one.
    """

    loss: Tensor
    accuracy: Tensor
    sharpness: Tensor


class Update:
    """Makes an update with each call, by the passes of :class:`~fairseq_asam.TwoPasses`.

    A call takes the images (N x C x H x W) and targets of this process. Targets are class numbers (N) or
    probabilities (N x classes). If the gradient at w is not finite, there is no epsilon and the gradient of
    the update is NaN. In fp16 the gradient scaler then skips the update and lowers its scale.

    Args:
        accelerator: spreads the batch over processes and casts to half precision.
        model, optimizer: as *accelerator* prepared them.
        perturbation: moves the weights of *model*. If its direction needs no pass at w, an update makes one
            pass. ``None``: make plain updates of *optimizer*.
        label_smoothing: of the training loss, in both passes.
        m: number of images with an epsilon of their own (m-sharpness; Foret et al. 2021, Section 4.1), which
            divides N. The step uses the mean of the gradients at each w + epsilon. ``None``: one epsilon from
            the gradient of the whole batch, over all processes.
        statistics_at_w: do not update batch-normalization statistics in the pass at w + epsilon.

    Attributes:
        ascends: whether updates are sharpness-aware; plain ones otherwise. It may be set between updates.
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
        self.label_smoothing, self.m = label_smoothing, m
        self._two_passes = None
        if perturbation is not None:
            self._two_passes = TwoPasses(perturbation, [model], buffers_of_both=not statistics_at_w)
        self.ascends = True

    def __call__(self, images: Tensor, targets: Tensor) -> Measured:
        self.optimizer.zero_grad()
        evaluate = functools.partial(self._pass, images, targets)
        if self._two_passes is None:
            loss, accuracy = evaluate()
            measured = Measured(loss, accuracy, torch.zeros_like(loss))
        elif not self.ascends:
            loss, accuracy = evaluate()
            measured = Measured(loss, accuracy, torch.full_like(loss, math.nan))
        elif not self._two_passes.perturbation.direction.needs_pass_at_w:
            loss, accuracy = self._two_passes.one_pass(evaluate)
            measured = Measured(loss, accuracy, torch.full_like(loss, math.nan))
        else:
            m = self.m or len(images)
            groups = list(zip(images.split(m), targets.split(m)))
            seen = [
                self._make_two_passes(*group, 1.0 / len(groups), is_last=i == len(groups) - 1)
                for i, group in enumerate(groups)
            ]
            measured = Measured(*(torch.stack(values).mean() for values in zip(*seen)))
        self.optimizer.step()
        return measured

    def _make_two_passes(self, images: Tensor, targets: Tensor, weight: float, is_last: bool) -> Measured:
        """Add *weight* times the gradient at w + epsilon to ``.grad``."""

        def evaluate(alone: bool) -> tuple[Tensor, Tensor]:
            with self.accelerator.no_sync(self.model) if alone else contextlib.nullcontext():
                return self._pass(images, targets, weight)

        loss, accuracy = self._two_passes(
            functools.partial(evaluate, alone=self.m is not None),
            again=functools.partial(evaluate, alone=not is_last),
        )
        return Measured(loss, accuracy, torch.as_tensor(self._two_passes.sharpness))

    def _pass(self, images: Tensor, targets: Tensor, weight: float = 1.0) -> tuple[Tensor, Tensor]:
        """Run forward and backward, and return the mean loss and the accuracy."""
        outputs = self.model(images)
        loss = F.cross_entropy(outputs, targets, label_smoothing=self.label_smoothing)
        checked = loss if self._two_passes is None else self._two_passes.nan_after_overflow(loss)
        self.accelerator.backward(checked * weight)
        classes = targets if targets.dim() == 1 else targets.argmax(1)
        return loss.detach(), (outputs.argmax(1) == classes).to(loss).mean()
