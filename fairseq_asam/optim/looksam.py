"""LookSAM in fairseq (``--ascent-interval``): what is kept between updates, and when it is reused."""

from __future__ import annotations

import math
from typing import Any

import torch
from fairseq.distributed import utils as distributed_utils
from fairseq.optim import FairseqOptimizer
from torch import Tensor

from fairseq_asam.sharpness.looksam import add_component_, orthogonal_component_

from .half_precision import as_model_parameters, model_parameters

# Keys in the optimizer's state of a weight, and so in checkpoints: the component, and the number of updates
# before the one that found it.
COMPONENT, COMPONENT_UPDATE = "ascent_component", "ascent_update"


class LookSAM:
    """Finds a component in updates that make both passes, and adds it to the gradient in the others.

    Args:
        optimizer: the torch optimizer. Its state keeps the component of each weight.
        interval: one of this many updates makes both passes.
        alpha: see :func:`~fairseq_asam.sharpness.looksam.add_component_`.
        sum_over_workers: whether the gradient at w is still to be summed over workers.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, interval: int, alpha: float | None, sum_over_workers: bool
    ):
        self.optimizer, self.interval, self.alpha = optimizer, interval, alpha
        self.sum_over_workers = sum_over_workers
        self._gradients: list[Tensor] | None = None

    def begin(self, num_updates: int) -> bool:
        """Begin the update after *num_updates*, even if the last one has not ended.

        Returns:
            Whether it makes both passes. Every *interval*-th update does, and one that has nothing to reuse.
        """
        self._num_updates, self._gradients = num_updates, None
        return num_updates % self.interval == 0 or not any(map(self._is_reusable, self._weights()))

    def add_gradients_at_w(self, optimizer: FairseqOptimizer) -> None:
        """Add the model's present gradients to those at w. *optimizer* is that of fairseq's Trainer."""
        weights = self._weights()
        if self._gradients is None:
            # The memory of the last component serves again.
            used = [self.optimizer.state.get(w, {}).pop(COMPONENT, None) for w in weights]
            self._gradients = [
                torch.zeros_like(w, requires_grad=False) if buffer is None else buffer.zero_()
                for w, buffer in zip(weights, used)
            ]
        totals = as_model_parameters(optimizer, self._gradients)
        for total, parameter in zip(totals, model_parameters(optimizer)):
            if parameter.grad is not None:
                total += parameter.grad

    @torch.no_grad()
    def find_component(self) -> None:
        """Turn the gradient at w into the component, given the gradient at w + epsilon in ``.grad``."""
        workers = distributed_utils.get_data_parallel_group()
        if self.sum_over_workers and distributed_utils.get_world_size(workers) > 1:
            for gradient in self._gradients:
                distributed_utils.all_reduce(gradient, workers)
        perturbed = [torch.zeros_like(w) if w.grad is None else w.grad for w in self._weights()]
        orthogonal_component_(self._gradients, perturbed)

    @torch.no_grad()
    def add_component(self) -> None:
        """Add the component that an earlier update found to the gradient at w in ``.grad``."""
        weights = [w for w in self._weights() if w.grad is not None and self._is_reusable(w)]
        if weights:
            components = [self.optimizer.state[w][COMPONENT] for w in weights]
            add_component_([w.grad for w in weights], components, self.alpha)

    def store_component(self) -> None:
        """Store the component of this update, if it found one, after the step."""
        for weight, component in zip(self._weights(), self._gradients or ()):
            # Store it after the step and only for stepped weights: Adam takes any non-empty state as
            # initialized and would not create its moments. Layer drop leaves weights out of a step.
            if weight.grad is not None:
                self.optimizer.state[weight].update(
                    {COMPONENT: component, COMPONENT_UPDATE: self._num_updates}
                )

    def _weights(self) -> list[Tensor]:
        return [weight for group in self.optimizer.param_groups for weight in group["params"]]

    def _is_reusable(self, weight: Tensor) -> bool:
        """Return whether *weight* has a component that is younger than the interval.

        An older one is there if the run went on without an interval in between.
        """
        state = self.optimizer.state.get(weight, {})
        age = self._num_updates - state.get(COMPONENT_UPDATE, -math.inf)
        return COMPONENT in state and age < self.interval


def drop_components(state_dict: dict[str, Any]) -> None:
    """Remove the components from the state dict of an optimizer."""
    for state in state_dict["state"].values():
        state.pop(COMPONENT, None)
        state.pop(COMPONENT_UPDATE, None)
