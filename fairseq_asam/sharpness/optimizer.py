"""A torch optimizer that makes any other one sharpness-aware."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .directions import DIRECTIONS, Direction
from .moments import ADAM, adam_diagonals, only_a_part, second_moments
from .perturbation import Perturbation
from .shards import is_sharded, local, reshard
from .two_passes import TwoPasses, loss_of

# Attribute of a gradient that a step leaves behind. It holds the version that the gradient had then.
_LEFT_AT = "_left_by_sharpness_aware_at_version"


class SharpnessAware(torch.optim.Optimizer):
    """Steps *base* with the gradient at w + epsilon (Algorithm 1 of the paper)::

        optimizer = SharpnessAware(torch.optim.Adam(model.parameters()), model, rho=0.5)

        def closure():
            optimizer.zero_grad()
            loss = criterion(model(inputs), targets)
            loss.backward()
            return loss

        loss = optimizer.step(closure)

    :class:`~fairseq_asam.TwoPasses` makes the passes. Parameter groups, state and state dict are those of
    *base*: learning-rate schedulers work on either, and a checkpoint of one loads into the other.

    *base* may be a ``ZeroRedundancyOptimizer``: call its ``consolidate_state_dict()`` before
    :meth:`state_dict`. It may also wrap this one, which then still needs the whole model::

        def optimizer_class(parameters, **defaults):
            return SharpnessAware(torch.optim.Adam(parameters, **defaults), model, rho=0.5)

        optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class, lr=1e-3)

    Args:
        base: the optimizer that makes the step. It must not call the closure itself, as LBFGS does. If it
            maximizes, epsilon goes down the gradient of the objective.
        weights: a module, or pairs of name and parameter as :class:`~fairseq_asam.Perturbation` takes them.
            Give the module if the model is compiled: with pairs, a hook has to find the modules that run.
        rho, **options: of :class:`~fairseq_asam.Perturbation`. ``normalization="adam"`` is also allowed: T =
            (sqrt(v_hat) + eps)^(-1/2) of *base*, a kind of Adam, for biases too (arXiv 2502.02407). The first
            step has no v_hat yet, and epsilon is 0.
        direction: what epsilon is made of, a key of :data:`~fairseq_asam.DIRECTIONS` or an object of
            :mod:`fairseq_asam.sharpness.directions`. ``gradient``: that of the loss at w. ``momentum``: minus
            the first moment of *base* (Momentum-SAM, arXiv 2401.12033). A step then runs the closure once, at
            w + epsilon. The first step has no moment yet and runs it at w. ``random``: a Gaussian vector, new
            in each step, which also runs the closure once. Its seed is 0; ``Random(seed=1)`` has another.

    Attributes:
        base: the base optimizer.
        perturbation: the :class:`~fairseq_asam.Perturbation`.
        ascends: whether steps are sharpness-aware. Set it to ``False`` for plain steps of *base*, which run
            the closure once, as for a late start (arXiv 2410.10373).

    Raises:
        TypeError: *base* is not an optimizer.
        ValueError: *base* cannot make the step, or does not keep the moments of all weights that *direction*
            or ``normalization="adam"`` needs; all that :class:`~fairseq_asam.Perturbation` raises.
    """

    # A torch.amp.GradScaler then sets `found_inf` before it calls step(), which refuses it.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        base: torch.optim.Optimizer,
        weights: nn.Module | Iterable[tuple[str, Tensor]],
        rho: float,
        *,
        direction: str | Direction = "gradient",
        **options: Any,
    ):
        if isinstance(direction, str) and direction not in DIRECTIONS:
            raise ValueError(f"direction is {direction!r}, but it must be one of {', '.join(DIRECTIONS)}")
        if not hasattr(base, "param_groups"):
            raise TypeError(
                f"base is a {type(base).__name__}, but it must be an optimizer: pass one, such as "
                "torch.optim.Adam(model.parameters())"
            )
        refuse_sharpness_aware(base)
        # ZeroRedundancyOptimizer keeps the optimizer of its part of the weights in `optim`.
        if isinstance(getattr(base, "optim", base), torch.optim.LBFGS):
            raise ValueError("LBFGS evaluates the closure at points of its own: use another base optimizer")
        if getattr(base, "_overlap_with_ddp", False):
            raise ValueError(
                f"{type(base).__name__} with overlap_with_ddp=True steps in every backward pass, of which an "
                "update has two: use overlap_with_ddp=False"
            )
        self.base = base
        modules = []
        if isinstance(weights, nn.Module):
            reshard(weights.modules())
            modules, weights = [weights], weights.named_parameters()
        in_adams_metric = options.get("normalization") == ADAM
        if in_adams_metric:
            second_moments(base)  # raises if the base keeps none
            options["normalization"] = "none"
            options["diagonals"] = functools.partial(adam_diagonals, base)
        if isinstance(direction, str):
            direction = DIRECTIONS[direction](base)
        perturbation = Perturbation(weights, rho, direction=direction, **options)
        if in_adams_metric or direction.needs_optimizer:
            trained = {parameter for parameter in perturbation.parameters if parameter.requires_grad}
            if not trained <= set(_parameters(base)):
                raise only_a_part(base)
        self._passes = TwoPasses(perturbation, modules, _parameters(base))
        self.ascends = True
        # Do not call super().__init__(): it would make groups and a state beside those of the base.
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        # torch's own would return only the state and the groups, which are the base's. As there, hooks are
        # left out, and so is the `step` that a scheduler puts here: it steps this object, not the copy.
        return {
            name: value
            for name, value in vars(self).items()
            if name != "step" and not (name.startswith("_optimizer_") and name.endswith("_hooks"))
        }

    def __getattr__(self, name: str) -> Any:
        # A schedule-free base moves its weights in train() and eval(). Others have no such methods.
        if name in ("train", "eval"):
            return getattr(self.base, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    defaults = property(lambda self: getattr(self.base, "defaults", {}))
    param_groups = property(lambda self: self.base.param_groups)
    state = property(lambda self: self.base.state)
    perturbation = property(lambda self: self._passes.perturbation)

    @property
    def rho(self) -> float:
        """The radius of the perturbation. It may change between steps."""
        return self.perturbation.rho

    @rho.setter
    def rho(self, rho: float) -> None:
        self.perturbation.rho = rho

    @property
    def sharpness(self) -> Tensor | float | None:
        """L(w + epsilon) - L(w) of the last step with two passes, of the same type as the closure's loss;
        ``None`` before."""
        return self._passes.sharpness

    # torch declares a closure that returns a float; one that returns a tensor is as common.
    def step(  # type: ignore[override]
        self, closure: Callable[[], Tensor | float] | None = None
    ) -> Tensor | float | None:
        """Step at w with the gradient at w + epsilon.

        If this or the closure raises, no step is made and the weights are w.

        Args:
            closure: clears the gradients, computes the loss, calls ``backward()`` and returns the loss. It
                runs twice, or once for a plain step. If it does not clear the gradients, there must be none
                before the step. Leave it out only if all gradients are 0, because epsilon is 0 then: torch's
                distributed checkpoints make such a step to initialize the state.

        Returns:
            The loss of the first pass: at w, or at w + epsilon if the direction needs no pass at w; ``None``
            without a closure.

        Raises:
            TypeError: there is no closure, or it returned no loss.
            RuntimeError: the closure made no gradient; it neither made nor cleared a gradient that was there
                before; a GradScaler calls the step; *base* is in a ``Join`` context; accelerate accumulates
                gradients.
            ValueError: the base optimizer maximizes with some weights and minimizes with others; or a
                parameter group has a rho, which nothing reads.
        """
        self._refuse_gradient_scaler()
        self._refuse_join()
        _refuse_accumulation()
        self.perturbation.maximize = self._maximizes()
        self._refuse_rho_of_groups()
        parameters = self._passes.parameters
        if closure is None:
            gradients = [p.grad for p in parameters if p.grad is not None]
            if not gradients or any(map(_is_nonzero, gradients)):
                raise TypeError(
                    "step() needs a closure that evaluates the loss and its gradient, since it does so "
                    "twice: call step(closure), use TwoPasses in a loop of your own, or what "
                    "fairseq_asam.integrations has for a Trainer that calls step()"
                )
            self.base.step()
            return None
        two_passes = self.ascends and self.perturbation.direction.needs_pass_at_w
        first = functools.partial(_first, closure, self._parameter_with_foreign_gradient())
        earlier = [parameter.grad for parameter in parameters]
        self.base.zero_grad()
        with torch.enable_grad():
            try:
                if two_passes:
                    loss = self._passes.at_w(first, again=closure)
                elif self.ascends:
                    loss = self._passes.one_pass(first)
                else:
                    loss = first()
                    loss_of(loss)  # raises now, not in the first sharpness-aware step
            except BaseException:
                for parameter, gradient in zip(parameters, earlier):
                    parameter.grad = gradient
                raise
            if two_passes:
                self._passes.at_w_plus_epsilon()
        self.base.step()
        for parameter in parameters:
            if parameter.grad is not None:
                setattr(parameter.grad, _LEFT_AT, local(parameter.grad)._version)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the base's parameters."""
        self.base.zero_grad(set_to_none)

    def _parameter_with_foreign_gradient(self) -> Tensor | None:
        """Return a parameter whose gradient the last step did not leave, or ``None``.

        If there is one, the caller has called ``backward()`` outside of the closure.
        """
        foreign = [
            p
            for p in self._passes.parameters
            if p.grad is not None and getattr(p.grad, _LEFT_AT, None) != local(p.grad)._version
        ]
        return next((p for p in foreign if _is_nonzero(p.grad)), None)

    def _refuse_gradient_scaler(self) -> None:
        if vars(self).pop("found_inf", None) is not None:
            vars(self).pop("grad_scale", None)
            raise RuntimeError(
                "GradScaler.step(optimizer, closure) unscales the gradients before the closure replaces "
                "them: use TwoPasses in a loop of your own, scale the loss there, call scaler.step(base)"
            )

    def _refuse_join(self) -> None:
        if getattr(getattr(self.base, "_join_config", None), "enable", False):
            raise RuntimeError(
                f"in a Join context, {type(self.base).__name__} steps once for each forward pass of another "
                "process, but an update has two: leave the context, and give each process as many batches"
            )

    def _maximizes(self) -> bool:
        maximize = {bool(group.get("maximize")) for group in self.base.param_groups}
        if len(maximize) > 1:
            raise ValueError(
                "some parameter groups have maximize=True and others do not, but one epsilon has one "
                "objective: use an optimizer for each"
            )
        return maximize.pop()

    def _refuse_rho_of_groups(self) -> None:
        if "rho" not in self.defaults and any("rho" in group for group in self.base.param_groups):
            raise ValueError(
                "a parameter group has a rho, but one epsilon of one rho is for all weights: set "
                "optimizer.rho, and delete it from the group"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise NotImplementedError: the perturbation would not know the names of the new parameters."""
        raise NotImplementedError("add the group to the base optimizer and make a new SharpnessAware of it")

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict of the base optimizer. Only hooks of this object change it."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state_dict = self.base.state_dict()
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the base optimizer, saved with or without this wrapper."""
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self.base.load_state_dict(state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)


def refuse_sharpness_aware(optimizer: object) -> None:
    """Raise ValueError if *optimizer*, an optimizer or its class, makes sharpness-aware steps of its own."""
    kind = optimizer if isinstance(optimizer, type) else type(getattr(optimizer, "optimizer", optimizer))
    if issubclass(kind, SharpnessAware) or (hasattr(kind, "first_step") and hasattr(kind, "second_step")):
        raise ValueError(
            f"the optimizer is {kind.__name__}, which is sharpness-aware already: give the base optimizer "
            "instead, such as torch.optim.AdamW"
        )


def _refuse_accumulation() -> None:
    """Raise if accelerate accumulates gradients: it calls step() with the last micro-batch alone."""
    state = sys.modules.get("accelerate.state")
    number = 1 if state is None else state.GradientState().num_steps
    if number > 1:
        raise RuntimeError(
            f"accelerate accumulates gradients over {number} micro-batches, but runs step(closure) for the "
            "last one alone and drops the others: use AccumulatingTwoPasses of "
            "fairseq_asam.integrations.accelerate with the base optimizer, or gradient_accumulation_steps=1"
        )


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _is_nonzero(gradient: Tensor) -> bool:
    norm = gradient.norm()
    return (norm.full_tensor() if is_sharded(norm) else norm).item() != 0


def _first(closure: Callable[[], Any], foreign: Tensor | None) -> Any:
    """Run *closure* at w, and raise if it does not clear the gradient of *foreign*."""
    if foreign is None:
        return closure()
    # Put NaN there: it stays NaN when a gradient is added, and goes when the closure clears it.
    foreign.grad = probe = torch.full_like(foreign, math.nan)
    result = closure()
    if foreign.grad is probe and local(probe).isnan().any():
        raise RuntimeError(
            "there were gradients before step() that its closure neither made nor cleared, and they would be "
            "lost: drop the backward() before step(), clear the gradients in the closure, or accumulate over "
            "micro-batches with TwoPasses"
        )
    return result
