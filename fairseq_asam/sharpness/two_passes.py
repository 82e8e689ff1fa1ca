"""The two passes of a sharpness-aware update, at w and at w + epsilon (Algorithm 1 of the paper)."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .module_state import ModuleState, Moving
from .perturbation import Perturbation
from .random_state import RandomState
from .shards import is_sharded, reshard
from .variables import Run, Variables

#: A forward and backward pass over a batch. It returns the loss, or a tuple that begins with it.
Evaluate = Callable[..., Any]


class TwoPasses:
    """Makes both passes of an update. Afterwards ``.grad`` holds the gradient at w + epsilon::

        two_passes = TwoPasses(Perturbation(model.named_parameters(), rho=0.5), [model])

        def forward_and_backward(inputs, targets):
            loss = criterion(model(inputs), targets)
            loss.backward()
            return loss

        for inputs, targets in batches:
            loss = two_passes(forward_and_backward, inputs, targets)
            optimizer.step()
            optimizer.zero_grad()

    Algorithm 1 maximizes and then descends one function, L_B. So both passes have the same

    - random numbers, and so the same dropout masks;
    - buffers and frozen weights to start from. Afterwards they are as the pass at w left them: the statistics
      of batch normalization are those of w, and a momentum encoder has moved once.

    Earlier gradients, such as those of earlier micro-batches, are set aside during the update. Then the
    gradient at w + epsilon is added to them. If a pass raises, weights and buffers are what they were at w.

    For one epsilon over several micro-batches (gradient accumulation), call :meth:`at_w` for each and then
    :meth:`at_w_plus_epsilon` once. For one epsilon per micro-batch (m-sharpness), call this object for each.

    Let the function return the loss itself, not a number or a detached tensor: its graph shows weights that
    are hidden from all of these, as in a list.

    Args:
        perturbation: of the weights.
        modules: the modules whose buffers and gradients it saves and restores, with those submodules and
            weights that they have when an update begins. Modules and weights in the variables that the
            function reads count too, as a criterion. By default, every module that runs at w.
        parameters: further parameters that get a gradient.
        fresh_masks: let the pass at w + epsilon draw random numbers of its own.
        buffers_of_both: let both passes change the buffers, as the code of the paper's authors does.

    Attributes:
        sharpness: L(w + epsilon) - L(w) of the last update, a scalar tensor or a float. Losses of several
            micro-batches are added up. ``None`` before the first update.

    Raises:
        ValueError: weights are in shards, and *perturbation* has weights that none of the modules has; or a
            buffer shares memory with a weight of the perturbation.
    """

    _passes: list[_Pass]
    _known: list[Tensor]
    _earlier: list[tuple[Tensor | None, Tensor | None]]
    _before: ModuleState | None
    _perturbed: bool
    _variables: Variables
    _trained: list[Tensor]
    _versions: list[int]
    _with_gradients: list[Tensor]

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
        # Weights of the modules when the last update began, or now.
        self._of_modules: dict[Tensor, None] = dict.fromkeys(
            p for module in self.modules for p in module.parameters()
        )
        self._in_shards = any(map(is_sharded, [*perturbation.parameters, *self._of_modules]))
        self._moving = Moving(perturbation.parameters)
        if self.modules and self._in_shards and not self._of_modules.keys() >= self._moving.perturbed:
            raise ValueError(
                "the perturbation has weights that no module has; a forward pass without a backward leaves "
                "such whole weights: call reshard() on the modules before named_parameters()"
            )
        self._refuse_shared_buffers()
        self._others = list(parameters)
        self._found: list[Tensor] = []  # weights that the graph of a loss has shown
        self._graphs_seen: set[tuple[int, int]] = set()
        self.reset()

    @property
    def parameters(self) -> list[Tensor]:
        """All parameters whose gradients are saved and restored, as they are now."""
        if self._before is not None:
            return self._known
        of_modules = (p for module in self.modules for p in module.parameters())
        return list(dict.fromkeys([*self.perturbation.parameters, *self._others, *of_modules]))

    def __call__(self, evaluate: Evaluate, *arguments: Any, again: Evaluate | None = None) -> Any:
        """Make both passes over one batch, and return what the pass at w returned.

        Arguments and exceptions are those of :meth:`at_w` and :meth:`at_w_plus_epsilon`.

        Raises:
            RuntimeError: besides, :meth:`at_w` was called before and :meth:`at_w_plus_epsilon` was not.
        """
        if self._passes:
            raise RuntimeError(
                "a pass at w has been made whose pass at w + epsilon has not: call at_w_plus_epsilon() for "
                "it, or reset() to drop it"
            )
        at_w = self.at_w(evaluate, *arguments, again=again)
        self.at_w_plus_epsilon()
        return at_w

    def at_w(self, evaluate: Evaluate, *arguments: Any, again: Evaluate | None = None) -> Any:
        """Make the pass at w over a batch, and return what *evaluate* returned.

        Args:
            evaluate: runs forward and backward, and returns the loss or a tuple that begins with it.
            arguments: passed on to it, as the batch. At w + epsilon it gets the same ones. A variable that it
                reads must not change before that pass; :meth:`at_w_plus_epsilon` refuses the changes that it
                can see.
            again: the same at w + epsilon; *evaluate* by default.

        Raises:
            TypeError: *evaluate* returned no loss.
            RuntimeError: weights of the perturbation have been replaced in the modules; the pass added to the
                gradient of a weight that is in neither the perturbation nor the modules nor *parameters*; it
                changed a frozen weight that had not been copied, or an argument or a variable in place; it
                took values out of a list, as pop() does; an optimizer was about to step in it; the function
                reads an iterator, or what was computed from the weights before; or weights have changed
                since an earlier pass at w. All passes at w since the last update are dropped then.
        """
        second = evaluate if again is None else again
        try:
            run = self._variables.begin_run(second, arguments)
            if self._before is None:
                self._before = self._begin()
            self._refuse_changes()
            for module in run.modules:
                self._set_aside_new(self._before.add(module))
            self._set_aside_new(run.weights)
            random_state = None if self.fresh_masks else RandomState()
            nodes = _nodes_made()
            with self._guarded():
                result = evaluate(*arguments)
            loss = loss_of(result)
            self._find_other_weights(result, _nodes_made() - nodes)
            self._before.end_pass_at_w()
            self._refuse_graphs(self._variables.end_run(run, self._before.restores))
            self._versions = self._versions_of_weights()
            self._with_gradients = [w for w in self.perturbation.parameters if w.grad is not None]
            self._passes.append(_Pass(functools.partial(second, *arguments), random_state, loss, run))
        except BaseException:
            self._put_gradients_back()
            if self._before is not None:
                self._before.restore()
            self.reset()
            raise
        return result

    def at_w_plus_epsilon(self) -> list[Any]:
        """Make a pass at w + epsilon for each pass at w since the last call, and return what each returned.

        Raises:
            TypeError: a pass returned no loss.
            RuntimeError: no pass at w was made, or none gave a weight of the perturbation a gradient; such a
                weight has been frozen since; a variable or an argument of a pass has changed since; or a pass
                changed a weight that the passes at w did not change and that nothing restores.
        """
        if not self._passes:
            raise RuntimeError("there was no pass at w since the last update: call at_w() first")
        before, modules = self._before, self._before.modules
        after = ModuleState()
        try:
            if not self.buffers_of_both:
                after = before.now()
            reshard(modules)
            self._refuse_changed_variables()
            self._refuse_changes()
            self._refuse_other_weights()
            with self.perturbation:
                self._put_gradients_back()
                self._perturbed = True
                if not self.buffers_of_both:
                    before.restore()
                results = [each.repeat() for each in self._passes]
                before.end_passes_at_w_plus_epsilon()
            self.sharpness = sum(map(loss_of, results)) - sum(each.loss for each in self._passes)
        except BaseException:
            if not self._perturbed:
                self._put_gradients_back()
            raise
        finally:
            reshard(modules)
            try:
                after.restore()
            finally:
                self._moving.keep(before.weights)
                self.reset()
        return results

    def one_pass(self, evaluate: Evaluate, *arguments: Any) -> Any:
        """Make the only pass of a batch, at w + epsilon, and return what *evaluate* returned.

        This is for a perturbation whose direction needs no pass at w. The gradient is added to the
        earlier ones, and the buffers are those that the pass leaves.

        Raises:
            TypeError: *evaluate* returned no loss.
            RuntimeError: the direction is the gradient at w; weights are in shards and there are no modules;
                weights of the perturbation have been replaced in the modules; or the pass changed perturbed
                weights, and the change would be lost.
        """
        if self.perturbation.direction.needs_pass_at_w:
            raise RuntimeError(
                "the perturbation's direction is the gradient at w, which needs a pass at w: call this "
                "object itself, or give Perturbation another direction"
            )
        if self._in_shards and not self.modules:
            raise RuntimeError(
                "an earlier forward pass may have left whole weights of w beside the shards, and the pass "
                "would use them: give TwoPasses the model among the modules"
            )
        self._reshard_modules()
        self._refuse_replaced_weights({p: None for module in self.modules for p in module.parameters()})
        try:
            with self.perturbation:
                versions = self.perturbation.versions()
                result = evaluate(*arguments)
                if self.perturbation.versions() != versions:
                    raise RuntimeError(
                        "the pass at w + epsilon changed weights, as data-dependent initialization does, and "
                        "the change is lost when they go back to w: run the model once before the update"
                    )
        finally:
            self._reshard_modules()
        loss_of(result)
        return result

    def nan_after_overflow(self, loss: Tensor) -> Tensor:
        """Return *loss*, but NaN in the pass at w + epsilon if the gradient at w is not finite.

        There is no epsilon then, and a NaN in the gradient makes trainers and gradient scalers skip the
        update. Call it before ``backward()``.
        """
        return loss * (1.0 + 0.0 * self.perturbation.norm).to(loss) if self._perturbed else loss

    def reset(self) -> None:
        """Forget the passes at w whose pass at w + epsilon has not been made.

        Gradients and buffers stay as these have left them. Clear the gradients before the next update.
        """
        self._passes, self._known, self._earlier, self._before = [], [], [], None
        self._perturbed, self._variables, self._trained, self._versions = False, Variables(), [], []
        self._with_gradients = []
        RandomState.release()

    def _begin(self) -> ModuleState:
        """Set gradients aside, and return the state of the modules, before the first pass of an update."""
        if self._in_shards:
            self._reshard_modules()
        state = ModuleState(self.modules, self._moving)
        self._refuse_replaced_weights(state.weights)
        self._trained = [w for w in self.perturbation.parameters if w.requires_grad and not self._in_shards]
        others = [*self._others, *self._found]
        self._set_aside(dict.fromkeys([*self.perturbation.parameters, *others, *state.weights]))
        return state

    def _refuse_shared_buffers(self) -> None:
        """Raise if a buffer has memory of a perturbed weight: to restore it would undo epsilon."""
        memory = {_memory(w) for w in self._moving.perturbed if w.requires_grad}
        for module in self.modules:
            for name, buffer in module.named_buffers():
                if _memory(buffer) in memory - {0}:
                    raise ValueError(
                        f"the buffer {name} shares memory with a weight of the perturbation, and it can be "
                        "neither restored nor left: make it a clone(), or read the weight instead"
                    )

    def _set_aside(self, weights: Iterable[Tensor]) -> None:
        """Remember the gradients of *weights* from before the update, and start without."""
        weights = list(weights)
        gradients = [weight.grad for weight in weights]
        self._known += weights
        # The pass at w may write into the same buffer, as DistributedDataParallel does.
        self._earlier += [(g, g.clone() if _is_in_buffer(g) else None) for g in gradients]
        for weight, gradient in zip(weights, gradients):
            if gradient is not None:
                weight.grad = None

    def _set_aside_new(self, weights: list[Tensor]) -> None:
        if weights:
            known = set(self._known)
            self._set_aside(weight for weight in dict.fromkeys(weights) if weight not in known)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Refuse an optimizer that steps within the block; without modules, find those that run."""
        guard, before = register_optimizer_step_pre_hook(self._refuse_to_step), self._before
        try:
            with contextlib.nullcontext() if self.modules else before.adding_what_runs(self._set_aside_new):
                yield
        finally:
            guard.remove()

    def _refuse_to_step(self, optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        known = set(self._known)
        if any(weight in known for group in optimizer.param_groups for weight in group["params"]):
            raise RuntimeError(
                f"{type(optimizer).__name__} would step within a pass, but an update has two: let it step "
                "after both, not in the function or in backward()"
            )

    def _refuse_replaced_weights(self, weights: dict[Tensor, None]) -> None:
        """Raise if modules have other weights in the place of some that are to be perturbed."""
        if [*map(id, weights)] == [*map(id, self._of_modules)]:
            return
        perturbed = self._moving.perturbed
        gone = [w for w in self._of_modules if w.requires_grad and w in perturbed and w not in weights]
        new = {w for w in weights if w.requires_grad and w not in perturbed and w not in self._of_modules}
        if gone and new:
            named = (pair for module in self.modules for pair in module.named_parameters())
            raise RuntimeError(_OTHER_WEIGHTS.format(f"{', '.join(n for n, w in named if w in new)} are new"))
        self._of_modules = weights

    def _find_other_weights(self, result: Any, nodes: int) -> None:
        """Find weights outside of perturbation and modules that got a gradient, or raise if it is too late.

        Only the graph of the loss shows them, and walking it takes as long as some layers. So each kind of
        graph is walked once. Graphs with as many *nodes* and gradients of the same weights are of one kind.
        """
        loss = result[0] if isinstance(result, tuple) else result
        kind = nodes, hash(tuple(id(weight) for weight in self._known if weight.grad is not None))
        if self._in_shards or kind in self._graphs_seen or getattr(loss, "grad_fn", None) is None:
            return
        known, found = set(map(id, self._known)), []
        for leaf in _leaves(loss.grad_fn):
            # What only the graph holds was made in this pass.
            if id(leaf) not in known and leaf.grad is not None and sys.getrefcount(leaf) > _references():
                self._refuse_other_weights(got_one=True)
                if leaf.grad._version or leaf.grad.requires_grad:
                    raise RuntimeError(
                        f"a weight of shape {tuple(leaf.shape)} is in neither the perturbation nor the "
                        "modules, and the pass at w may have added to an earlier gradient of it: give "
                        "TwoPasses its module among the modules, or the weight among the parameters "
                        "(SharpnessAware: give it to the base optimizer), or freeze it"
                    )
                found.append(leaf)  # with a gradient that this pass has made, as nothing was added to it
        if found:
            self._found = found
            self._known += found
            self._earlier += [(None, None)] * len(found)
        else:
            self._graphs_seen.add(kind)

    def _refuse_other_weights(self, got_one: bool = False) -> None:
        """Raise if no perturbed weight has got a gradient, but another one has; *got_one*: one has."""
        if any(weight.grad is not None for weight in self.perturbation.parameters):
            return
        if got_one or any(weight.grad is not None for weight in self._known):
            raise RuntimeError(_OTHER_WEIGHTS.format("none of the perturbation's got a gradient, others did"))

    def _refuse_graphs(self, graphs: list[Tensor]) -> None:
        """Raise if one of *graphs*, made before a pass, begins at perturbed weights: it stays that of w."""
        perturbed = self._moving.perturbed
        for tensor in graphs:
            if any(leaf in perturbed for leaf in _leaves(tensor.grad_fn)):
                raise RuntimeError(
                    f"the function reads a tensor of shape {tuple(tensor.shape)} that was computed from the "
                    "weights before the pass, and at w + epsilon it would still be that of w: compute it in "
                    "the function, or detach() it"
                )

    def _refuse_changed_variables(self) -> None:
        """Raise if a function would read other variables than in its pass at w."""
        self._variables.look()
        if self._variables.changed:
            names = ", ".join(sorted(self._variables.changed))
            raise RuntimeError(
                f"{names} changed between a pass at w and its pass at w + epsilon, so the two would be over "
                "different batches: let the function take what changes as arguments, and pass them on, as in "
                "at_w(function, inputs, targets)"
            )

    def _refuse_changes(self) -> None:
        """Raise if weights have changed since the last pass at w, or their gradients have been cleared."""
        if self._passes and self._versions_of_weights() != self._versions:
            raise RuntimeError(
                "weights have changed since a pass at w, as by an optimizer's step, and its gradient is not "
                "theirs: make at_w_plus_epsilon() before the step, or call reset() to drop the pass at w"
            )
        if any(weight.grad is None for weight in self._with_gradients):
            raise RuntimeError(
                "gradients of a pass at w have been cleared since, and epsilon is made of them: clear "
                "gradients before the first at_w() of an update or after at_w_plus_epsilon(), or call "
                "reset() to drop the pass at w"
            )
        if not all(weight.requires_grad for weight in self._with_gradients):
            raise RuntimeError(
                "weights that got a gradient in a pass at w have been frozen since, as by a switch of "
                "adapters, and epsilon would leave them out: let weights require a gradient until the update "
                "has ended"
            )

    def _versions_of_weights(self) -> list[int]:
        return [weight._version for weight in self._trained]

    def _reshard_modules(self) -> None:
        reshard(part for module in self.modules for part in module.modules())

    @torch.no_grad()
    def _put_gradients_back(self) -> None:
        for weight, (gradient, values) in zip(self._known, self._earlier):
            if values is not None:
                gradient.copy_(values)
            weight.grad = gradient


_OTHER_WEIGHTS = (
    "the weights of the model are not those of the perturbation ({}): after weights have been replaced, make "
    "Perturbation and TwoPasses, or SharpnessAware, anew"
)


class _Pass(NamedTuple):
    """A pass to make at w + epsilon, with the random state, the loss and the run of its pass at w."""

    evaluate: Callable[[], Any]
    random_state: RandomState | None
    loss: Tensor | float
    run: Run

    def repeat(self) -> Any:
        """Make the pass, with the random numbers of the one at w."""
        if self.random_state is not None:
            self.random_state.restore()
        self.run.restore_arguments()
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


def _is_in_buffer(gradient: Tensor | None) -> bool:
    """Return whether *gradient* is part of a larger buffer, as with gradient_as_bucket_view=True."""
    if type(gradient) is not Tensor or gradient.layout != torch.strided:
        return False
    return gradient.untyped_storage().nbytes() > gradient.nbytes


def _memory(tensor: Tensor) -> int:
    """Return where the storage of *tensor* begins; 0 if it has none of its own."""
    if type(tensor) not in (Tensor, nn.Parameter) or is_lazy(tensor) or tensor.layout != torch.strided:
        return 0
    return tensor.untyped_storage().data_ptr()


def _nodes_made() -> int:
    """Return how many nodes of autograd graphs this thread has made."""
    return torch.autograd._get_sequence_nr()


def _leaves(root: torch.autograd.graph.Node) -> Iterator[Tensor]:
    """Yield the leaves of the graph that begins at *root*."""
    seen, waiting = {root}, [root]
    while waiting:
        node = waiting.pop()
        if type(node).__name__ == "AccumulateGrad":
            yield node.variable  # type: ignore[attr-defined]
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


@functools.lru_cache
def _references() -> int:
    """Return the number of Python's references to a leaf that only its graph holds.

    A function that made a leaf leaves it so.
    """
    for leaf in _leaves(torch.zeros((), requires_grad=True).exp().grad_fn):
        return sys.getrefcount(leaf)
    raise AssertionError
