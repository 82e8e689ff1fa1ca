"""A torch optimizer that makes any other one sharpness-aware."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .perturbation import Perturbation


class SharpnessAware(torch.optim.Optimizer):
    """Steps *base* with the gradient at w + epsilon (Algorithm 1 of the paper)::

        optimizer = SharpnessAware(torch.optim.Adam(model.parameters()), model.named_parameters(), rho=0.5)

        def closure():
            optimizer.zero_grad()
            loss = criterion(model(inputs), targets)
            loss.backward()
            return loss

        loss = optimizer.step(closure)

    Parameter groups, state and state dict are those of *base*: learning-rate schedulers work on
    either, and a checkpoint of one loads into the other.

    Args:
        base: the optimizer that makes the step. It must not call the closure itself (LBFGS does).
        named_parameters, **options: of :class:`~fairseq_asam.Perturbation`.

    Attributes:
        base: the optimizer given.
        perturbation: the :class:`~fairseq_asam.Perturbation`, whose ``rho`` may change between steps.
        sharpness: L(w + epsilon) - L(w) of the last step, a tensor; ``None`` before it.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, Tensor]],
        rho: float,
        **options: Any,
    ):
        if isinstance(base, torch.optim.LBFGS):
            raise ValueError("LBFGS evaluates the closure at points of its own: use another base optimizer")
        self.base = base
        self.perturbation = Perturbation(named_parameters, rho, **options)
        self.sharpness: Tensor | None = None
        # No super().__init__(): it would build groups and a state beside those of the base.
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        # torch's own leaves out all but the state and the groups, which are the base's.
        return dict(vars(self))

    defaults = property(lambda self: self.base.defaults)
    param_groups = property(lambda self: self.base.param_groups)
    state = property(lambda self: self.base.state)

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """Run *closure* (which clears the gradients, computes the loss, calls ``backward()`` and returns
        the loss) at w and at w + epsilon, step at w with the second gradient, and return the loss at w.

        If the closure raises, the weights are w and no step is made.
        """
        if closure is None:
            raise TypeError(
                "step() needs a closure that evaluates the loss and its gradient, since it does so twice; "
                "without one, use Perturbation as a context manager"
            )
        with torch.enable_grad():
            loss = closure()
            with self.perturbation:
                perturbed_loss = closure()
        self.base.step()
        self.sharpness = (perturbed_loss - loss).detach()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the base's parameters."""
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the perturbation would not know the names of the new parameters."""
        raise NotImplementedError("add the group to the base optimizer and make a new SharpnessAware of it")

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict of the base optimizer, whole and unchanged."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the base optimizer, saved with or without this wrapper."""
        self.base.load_state_dict(state_dict)
