"""The two passes of a sharpness-aware update, at w and at w + epsilon (Algorithm 1 of the paper)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from .module_state import ModuleState
from .perturbation import Perturbation
from .random_state import RandomState
from .shards import is_sharded, reshard

#: A forward and backward pass. It returns the loss, or a tuple that begins with it.
Evaluate = Callable[[], Any]


class TwoPasses:
    """Makes both passes of an update. Afterwards ``.grad`` holds the gradient at w + epsilon::

        two_passes = TwoPasses(Perturbation(model.named_parameters(), rho=0.5), [model])

        def forward_and_backward():
            loss = criterion(model(inputs), targets)
            loss.backward()
            return loss

        loss = two_passes(forward_and_backward)
        optimizer.step()
        optimizer.zero_grad()

    Algorithm 1 maximizes and then descends one function, L_B. Hence both passes have the same

    - random numbers, and so the same dropout masks;
    - buffers to start from. Afterwards the buffers are those that the pass at w left, so the statistics of
      batch normalization are those of w.

    Gradients from before, as of earlier micro-batches, are set aside during the update, and the gradient at
    w + epsilon is added to them. If a pass raises, weights and buffers are what they were at w.

    For one epsilon over several micro-batches (gradient accumulation), call :meth:`at_w` for each and then
    :meth:`at_w_plus_epsilon` once. For one epsilon per micro-batch (m-sharpness), call this object for each.

    Args:
        perturbation: of the weights.
        modules: the modules whose buffers and gradients it saves and restores. By default it saves the
            buffers of every module that runs at w, and the gradients of *parameters* and of the weights of
            *perturbation*.
        parameters: further parameters that get a gradient.
        fresh_masks: let the pass at w + epsilon draw random numbers of its own.
        buffers_of_both: let both passes change the buffers, as the code of the paper's authors does.

    Attributes:
        parameters: all parameters whose gradients are saved and restored.
        sharpness: L(w + epsilon) - L(w) of the last update, a scalar tensor or a float. Losses of several
            micro-batches are added up. ``None`` before the first update.

    Raises:
        ValueError: the modules have weights in shards, and *perturbation* has others than these.
    """

    _passes: list[_Pass]
    _earlier: list[Tensor | None]
    _before: ModuleState | None
    _perturbed: bool

    def __init__(
        self,
        perturbation: Perturbation,
        modules: Iterable[nn.Module] = (),
        parameters: Iterable[Tensor] = (),
        fresh_masks: bool = False,
        buffers_of_both: bool = False,
    ):
        self.perturbation, self.modules = perturbation, list(modules)
        self.fresh_masks, self.buffers_of_both = fresh_masks, buffers_of_both
        self.sharpness: Tensor | float | None = None
        self._reshard_modules()
        of_modules = dict.fromkeys(p for module in self.modules for p in module.parameters())
        if any(map(is_sharded, of_modules)) and not of_modules.keys() >= set(perturbation.parameters):
            raise ValueError(
                "the perturbation has weights that are none of the modules', as after a forward pass without "
                "a backward, when some are whole: call reshard() on the modules before named_parameters()"
            )
        self.parameters = list(dict.fromkeys([*perturbation.parameters, *parameters, *of_modules]))
        self.reset()

    def __call__(self, evaluate: Evaluate, again: Evaluate | None = None) -> Any:
        """Make both passes over one batch, and return what the pass at w returned.

        Arguments and exceptions are those of :meth:`at_w` and :meth:`at_w_plus_epsilon`.
        """
        at_w = self.at_w(evaluate, again)
        self.at_w_plus_epsilon()
        return at_w

    def at_w(self, evaluate: Evaluate, again: Evaluate | None = None) -> Any:
        """Make the pass at w over a batch, and return what *evaluate* returned.

        Args:
            evaluate: runs forward and backward, and returns the loss or a tuple that begins with it.
            again: the same at w + epsilon; *evaluate* by default.

        Raises:
            TypeError: *evaluate* returned no loss.
        """
        try:
            if self._before is None:
                self._earlier = [parameter.grad for parameter in self.parameters]
                self._set_gradients([None] * len(self.parameters))
                self._before = ModuleState(self.modules)
            random_state = None if self.fresh_masks else RandomState()
            with contextlib.nullcontext() if self.modules else self._before.adding_what_runs():
                result = evaluate()
            self._passes.append(_Pass(again or evaluate, random_state, loss_of(result)))
        except BaseException:
            self._set_gradients(self._earlier)
            self.reset()
            raise
        return result

    def at_w_plus_epsilon(self) -> list[Any]:
        """Make a pass at w + epsilon for each pass at w since the last call, and return what each returned.

        Raises:
            TypeError: a pass returned no loss.
            RuntimeError: no pass at w was made, or none gave a weight of the perturbation a gradient.
        """
        if not self._passes:
            raise RuntimeError("there was no pass at w since the last update: call at_w() first")
        buffers = ModuleState() if self.buffers_of_both else self._before.now()
        modules = self._before.modules
        reshard(modules)
        try:
            with self.perturbation:
                self._set_gradients(self._earlier)
                self._perturbed = True
                if not self.buffers_of_both:
                    self._before.restore()
                results = [each.repeat() for each in self._passes]
            self.sharpness = sum(map(loss_of, results)) - sum(each.loss for each in self._passes)
        except BaseException:
            if not self._perturbed:
                self._set_gradients(self._earlier)
            raise
        finally:
            reshard(modules)
            buffers.restore()
            self.reset()
        return results

    def only_at_w_plus_epsilon(self, evaluate: Evaluate) -> Any:
        """Make the only pass of a batch, at w + epsilon, and return what *evaluate* returned.

        This is for a perturbation whose direction needs no pass at w. The gradient is added to the
        earlier ones, and the buffers are those that the pass leaves.

        Raises:
            TypeError: *evaluate* returned no loss.
        """
        self._reshard_modules()
        try:
            with self.perturbation:
                result = evaluate()
        finally:
            self._reshard_modules()
        loss_of(result)
        return result

    def marked(self, loss: Tensor) -> Tensor:
        """Return *loss*, but NaN in the pass at w + epsilon if the gradient at w is not finite.

        There is no epsilon then, and a NaN in the gradient makes trainers and gradient scalers skip the
        update. Call it before ``backward()``.
        """
        return loss * (1.0 + 0.0 * self.perturbation.norm).to(loss) if self._perturbed else loss

    def reset(self) -> None:
        """Forget the passes at w whose pass at w + epsilon has not been made."""
        self._passes, self._earlier, self._before = [], [], None
        self._perturbed = False
        RandomState.release()

    def _reshard_modules(self) -> None:
        reshard(part for module in self.modules for part in module.modules())

    def _set_gradients(self, gradients: list[Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters, gradients):
            parameter.grad = gradient


class _Pass(NamedTuple):
    """A pass to make at w + epsilon, with the random state and the loss of its pass at w."""

    evaluate: Evaluate
    random_state: RandomState | None
    loss: Tensor | float

    def repeat(self) -> Any:
        """Make the pass, with the random numbers of the one at w."""
        if self.random_state is not None:
            self.random_state.restore()
        return self.evaluate()


def loss_of(result: Any) -> Tensor | float:
    """Return the loss that a pass returned alone or first in a tuple, or raise TypeError if it did not."""
    loss = result[0] if isinstance(result, tuple) and result else result
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss.detach().reshape(())
    if isinstance(loss, (int, float)) and not isinstance(loss, bool):
        return float(loss)
    raise TypeError(
        f"the pass returned {type(result).__name__}, but it must return the loss, a number or a tensor with "
        "one element: let it end in `return loss`"
    )
