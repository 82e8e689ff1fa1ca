"""The perturbation epsilon(w): the ascent step of SAM and ASAM, and its exact undoing."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from . import cpu
from .blocks import Blocks, Parts, WithGradients
from .directions import Direction, Gradient
from .kernels import Ascent
from .normalization import NORMALIZATIONS, PRECOMPUTED, NormalizationOperator, operator_of
from .shards import SameWeightsCheck, Shards, local, norm_over, shards_of


class Displacement:
    """Context manager that moves weights on entry and restores them on exit.

    On exit every weight that was moved is bit for bit what it was, in the same storage, whatever happened
    inside the block. A subclass says in :meth:`_move` where the weights go.

    Raises:
        RuntimeError: on entry, the weights are displaced already; inside the block, an optimizer is about to
            step with them.
    """

    def __init__(self):
        self._moved: list[Tensor] = []
        self._saved: list[Tensor] = []
        # Each weight and its storage on entry; None instead of the storage for shards, which keep theirs.
        # The list is None outside of the block.
        self._places: list[tuple[Tensor, Tensor | None]] | None = None
        self._guard: RemovableHandle | None = None

    def __enter__(self) -> Displacement:
        if self._places is not None:
            raise RuntimeError("the weights are perturbed already: leave the block before entering it again")
        try:
            self._places = []
            self._guard = register_optimizer_step_pre_hook(self._refuse_to_step)
            self._move()
            _forget_derived_weights()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._restore()
        except BaseException:  # such as a KeyboardInterrupt half way: restore the rest
            self._restore()
            raise

    def versions(self) -> list[int]:
        """Return the versions of the weights that are displaced now, which what writes into them changes."""
        return [weight._version for weight, _ in self._places or ()]

    def _move(self) -> None:
        """Move the weights.

        First set :attr:`_places`, and call :meth:`_remember` with copies of those that move in place.
        """
        raise NotImplementedError

    def _remember(self, weights: list[Tensor], copies: list[Tensor]) -> None:
        """Restore *weights* from *copies*, which hold them now, on exit."""
        self._saved += copies
        self._moved += weights

    @torch.no_grad()
    def _restore(self) -> None:
        if self._moved:
            torch._foreach_copy_(self._moved[::-1], self._saved[: len(self._moved)][::-1])
        for weight, place in self._places or ():
            if place is None:
                increment_version(weight)
            elif weight.data_ptr() != place.data_ptr():
                # We have put it into other memory, or a forward pass has, as quantization noise does.
                weight.data = place
                increment_version(weight)
        _forget_derived_weights()
        if self._guard is not None:
            self._guard.remove()
        self._moved, self._saved, self._places, self._guard = [], [], None, None

    def _refuse_to_step(self, optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        displaced = {id(weight) for weight, _ in self._places or ()}
        if any(id(p) in displaced for group in optimizer.param_groups for p in group["params"]):
            raise RuntimeError(
                f"{type(optimizer).__name__} would step with weights at w + epsilon, but the block "
                "restores w when it ends, and the step would be lost: call step() after the block"
            )


def _forget_derived_weights() -> None:
    """Forget what torch has computed from the weights at one point, because it is wrong at another."""
    torch.clear_autocast_cache()  # half-precision copies
    parametrize._cache.clear()  # weights within parametrize.cached()


class Perturbation(Displacement):
    """Context manager that moves the weights from w to w + epsilon(w, g) on entry and restores w on exit.

    The gradients g are those in ``.grad`` on entry::

        loss(model, batch).backward()        # gradient of L_B at w
        with perturbation:                   # w -> w + epsilon
            optimizer.zero_grad()
            loss(model, batch).backward()    # gradient of L_B at w + epsilon
        optimizer.step()                     # at w

    For 1/p + 1/q = 1 and the normalization operator T = T_w + eta I (Section 4 of the paper)::

        epsilon = rho * T * sign(g) * |T g|^(q - 1) / ||T g||_q^(q - 1)

    which maximizes the linearized loss over the region ||T^-1 epsilon||_p <= rho. The norm is over all
    parameters together.

    On exit every weight that was moved is bit for bit what it was, in the same storage, whatever happened
    inside the block. Inside, a large weight on a CPU is in other memory, unless it shares its own with
    another weight or is part of a larger buffer. Autograd refuses to run a graph inside the block that saved
    a perturbed weight outside of it, and the other way round. Memory that several parameters share gets the
    sum of their epsilons. A parameter without a gradient on entry is not perturbed. If the gradient is zero
    or its norm is not finite, nothing is perturbed; look at :attr:`norm`.
    :class:`~fairseq_asam.TwoPasses` also gives both passes the same dropout masks and batch-normalization
    statistics.

    Weights may be in shards (``DTensor``, as with ``fully_shard`` and tensor parallelism). Each process
    perturbs its own part, and the norm is over all shards. All processes must enter the block together.

    All options but *masters* are also attributes that may be set between blocks.

    Args:
        named_parameters: pairs of name and parameter, as from ``model.named_parameters()``. The names
            decide what is a bias. A parameter is left alone while it requires no gradient.
        rho: radius of the maximization region, >= 0. The paper: 0.05 to 0.1 for SAM and 0.5 to 1.0 for
            ASAM on images (Section 5.2), 0.1 and 0.2 on translation (Section 5.3).
        eta: added to the normalization operator for stability, >= 0. Unused for ``none`` and biases.
        p: order of the norm that bounds the region, 1 < p <= inf.
        normalization: a key of :data:`~fairseq_asam.NORMALIZATIONS`; ``none`` is SAM.
        normalize_bias: normalize biases like other weights (Section 5.2, Figure 4); otherwise their T is 1.
        masters: the float32 master copy of each half-precision parameter. Epsilon is far below the
            resolution of half precision. Added to the master and rounded once, it survives on average.
            Masters are read and never changed.
        maximize: the objective is to be maximized, so epsilon goes down its gradient.
        direction: what takes the place of the gradients g, such as ``Momentum(optimizer)`` or
            ``Random(seed=1)`` of :mod:`fairseq_asam.sharpness.directions`. These need no pass at w. Without
            any vector, as before the first step with momentum, nothing is perturbed.
        diagonals: returns the diagonal of T for each weight, such as
            :func:`~fairseq_asam.sharpness.moments.adam_diagonals` of the optimizer. On entry, it takes the
            place of *normalization*, for biases too. A weight that it leaves out is not perturbed.

    Attributes:
        parameters: those given, without duplicates and without those that are not real.
        norm: ||T g||_q of the last entry, a scalar tensor on the device of the parameters; ``None`` before
            the first entry.

    Raises:
        ValueError: a value is out of its range; a parameter is not a leaf, is expanded, is complex and
            requires a gradient, or is one of FullyShardedDataParallel (FSDP1); no parameter requires a
            gradient; on entry, a gradient is sparse, or is whole while its weight is in shards.
        TypeError: *named_parameters* are not pairs of name and tensor.
        RuntimeError: on entry, no parameter has a gradient, the weights are perturbed already, or processes
            that share weights have gradients of different ones; inside the block, an optimizer is about to
            step with the weights.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        rho: float,
        eta: float = 0.01,
        p: float = 2.0,
        normalization: str = "element-wise",
        normalize_bias: bool = False,
        masters: Mapping[Tensor, Tensor] | None = None,
        maximize: bool = False,
        direction: Direction | None = None,
        diagonals: Callable[[], Mapping[Tensor, Tensor]] | None = None,
    ):
        super().__init__()
        self.rho, self.eta, self.p = rho, eta, p
        self.normalization, self.normalize_bias = normalization, normalize_bias
        self.maximize, self.diagonals = maximize, diagonals
        self.direction = Gradient() if direction is None else direction
        self.norm: Tensor | None = None
        masters = dict(masters or {})
        self._names: dict[Tensor, str] = {}
        self._not_real: dict[Tensor, str] = {}
        for name, parameter in _pairs(named_parameters):
            if not parameter.is_leaf:
                raise ValueError(f"{name} is not a leaf tensor: pass parameters, which get gradients")
            if parameter.requires_grad and any(
                size > 1 and stride == 0 for size, stride in zip(*_form(parameter))
            ):
                raise ValueError(
                    f"{name} has several numbers in one place of memory, as after expand(), and cannot be "
                    "changed in place: make the parameter of a clone(), and expand it in forward()"
                )
            names = self._names if parameter.is_floating_point() else self._not_real
            names.setdefault(parameter, name)
        self.parameters = list(self._names)
        self._trained()
        if not any(parameter.requires_grad for parameter in self.parameters):
            others = "".join(f"; {name} has dtype {p.dtype}" for p, name in self._not_real.items())
            raise ValueError(
                f"there is no parameter to perturb: none was given that requires a gradient{others}"
            )
        if any(
            parameter.dtype in (torch.float16, torch.bfloat16) and parameter not in masters
            for parameter in self.parameters
            if parameter.requires_grad
        ):
            warnings.warn(
                "half-precision weights absorb most of epsilon, which is far below their resolution: give "
                "their float32 master weights as masters",
                stacklevel=2,
            )
        self._blocks = Blocks(self.parameters, masters)
        self._shards = dict.fromkeys(shards for p in self.parameters if (shards := shards_of(p)) is not None)
        self._same_weights = SameWeightsCheck()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CHECKS:
            validate(**{name: value})
            value = float(value) if name in ("rho", "eta", "p") else value
        super().__setattr__(name, value)

    def _move(self) -> None:
        try:
            gradients = self.direction.vectors(self._trained())
            diagonals = None if self.diagonals is None else self.diagonals()
        except (ValueError, RuntimeError):
            if self._shards:
                # Take part in the sums that other processes wait for, and raise our own error, not theirs.
                with contextlib.suppress(RuntimeError):
                    self._blocks_and_norm({}, None, dual(self.p))
            raise
        if diagonals is not None:
            diagonals = {p: local(diagonals[p]) for p in gradients if p in diagonals}
            gradients = {p: gradients[p] for p in diagonals}
        self._perturb(gradients, diagonals)

    def _trained(self) -> dict[Tensor, str]:
        """Return the parameters that require a gradient, and their names.

        Raises:
            ValueError: one of them cannot be perturbed.
        """
        for parameter, name in self._not_real.items():
            if parameter.requires_grad and parameter.is_complex():
                raise ValueError(
                    f"{name} has dtype {parameter.dtype}, but the paper defines epsilon for real weights: "
                    "train its real and imaginary part as two parameters, or do not pass it"
                )
        trained = self._names
        if not all(parameter.requires_grad for parameter in trained):  # usually all do: make no copy
            trained = {parameter: name for parameter, name in trained.items() if parameter.requires_grad}
        for parameter, name in trained.items():
            # torch has no public sign of FSDP1. test_fsdp1_is_refused_and_told_of_fsdp2 fails if this goes.
            if "_fsdp_flattened" in parameter.__dict__:
                raise ValueError(
                    f"{name} is in shards of FullyShardedDataParallel (FSDP1), which hides the shapes of "
                    "weights: use torch.distributed.fsdp.fully_shard (FSDP2)"
                )
        return trained

    @torch.no_grad()
    def _perturb(self, gradients: Parts, diagonals: Parts | None) -> None:
        q = dual(self.p)
        try:
            blocks = self._blocks_and_norm(gradients, diagonals, q)
            self._places = self._blocks.places
            inverse = self.norm.reciprocal().nan_to_num_(nan=0.0, posinf=0.0)
            is_zero = inverse == 0.0
            may_read = cpu.is_on_cpu(self.norm)  # on other devices, reading a value would stall them
            if self.rho == 0.0 or (may_read and is_zero):
                return
            rho = self.direction.sign(self.maximize) * self.rho
            ascent = Ascent(rho, q, inverse, None if may_read else is_zero)
            # Go backwards here and forwards in _restore: what a CPU touched last is still in its cache.
            for block, of_block in reversed(blocks):
                block.move(of_block, ascent, self._remember)
        finally:
            self._blocks.free()
        for parameter, data in self._blocks.redirected.items():
            parameter.data = data
        # Autograd refuses graphs that saved a weight before an operation in place. Of new memory of a weight,
        # or of an operation on its part in shards, it has to be told.
        in_shards = [weight for weight, place in self._places if place is None] if self._shards else []
        for parameter in (*self._blocks.redirected, *in_shards):
            increment_version(parameter)

    @torch.no_grad()
    def _blocks_and_norm(self, gradients: Parts, diagonals: Parts | None, q: float) -> WithGradients:
        """Return the weights in blocks, each with its gradients, and set :attr:`norm`."""
        settings = self.normalization, self.normalize_bias, self.diagonals is None
        blocks = self._blocks.with_gradients(
            gradients, diagonals, self._operator_of, self.eta, self.p, *settings
        )
        # Powers other than squares soon leave the range of float32. Take them in units of the largest number.
        unit = None if q in (1.0, 2.0) else self._norm(blocks, math.inf)
        self.norm = self._norm(blocks, q, unit)
        return blocks

    def _norm(self, blocks: WithGradients, order: float, unit: Tensor | None = None) -> Tensor:
        """Return ||T g||_order over all *blocks*, computed in multiples of *unit* to keep powers in range."""
        # Each process takes part in every sum, even if none of the weights in such shards has a gradient.
        norms: dict[Shards | None, list[Tensor]] = {shards: [] for shards in self._shards}
        for block, of_block in blocks:
            norms.setdefault(block.shards, []).extend(block.norms(of_block, order, unit))
        if not norms:
            return local(self.parameters[0]).new_zeros(())
        norm = norm_over(None, [self._norm_over_shards(*each, order) for each in norms.items()], order)
        return norm if unit is None else norm * unit

    def _norm_over_shards(self, shards: Shards | None, norms: list[Tensor], order: float) -> Tensor:
        """Return the norm of *norms*, over all processes of *shards* if there are any.

        The sum over processes also shows whether all of them have gradients of the same weights.
        """
        some = local(self.parameters[0])
        if shards is not None and not norms:
            norms = [some.new_zeros((), dtype=torch.promote_types(some.dtype, torch.float32))]
        if shards is None or math.isinf(order):
            return norm_over(shards, norms, order)
        norm = norm_over(None, norms, order)
        names = [self._names[weight] for weight, _ in self._blocks.places]
        fingerprint = self._same_weights.fingerprint(names, norm.device)
        total = torch.cat([norm.double().pow(order).view(1), fingerprint])
        shards.all_reduce(total)
        self._same_weights.check(total[1:], shards.size())
        return total[0].pow(1.0 / order).to(norm)

    def _operator_of(self, parameter: Tensor) -> NormalizationOperator:
        if self.diagonals is not None:
            return PRECOMPUTED
        return operator_of(self._names[parameter], parameter, self.normalization, self.normalize_bias)


def _form(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return shape and strides, if *tensor* has any by now."""
    return ((), ()) if is_lazy(tensor) or tensor.layout != torch.strided else (tensor.shape, tensor.stride())


def dual(p: float) -> float:
    """Return q of 1/p + 1/q = 1."""
    return 1.0 if math.isinf(p) else p / (p - 1.0)


_CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "rho": (lambda rho: 0.0 <= rho < math.inf, "the radius of a region must be a finite number >= 0"),
    "eta": (lambda eta: 0.0 <= eta < math.inf, "it must be a finite number >= 0 (the paper uses 0.01)"),
    "p": (lambda p: p > 1.0, "it must be greater than 1 (the paper uses 2 and inf)"),
    "normalization": (lambda name: name in NORMALIZATIONS, f"it must be one of {', '.join(NORMALIZATIONS)}"),
    "direction": (
        lambda direction: isinstance(direction, Direction),
        "it must be an object of fairseq_asam.sharpness.directions, such as Momentum(optimizer)",
    ),
}


def validate(**options: Any) -> None:
    """Check options of :class:`Perturbation`, given by name.

    Raises:
        ValueError: one is out of its range.
    """
    for name, value in options.items():
        is_allowed, what_is = _CHECKS[name]
        if not is_allowed(value):
            raise ValueError(f"{name} is {value!r}, but {what_is}")


def _pairs(named_parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for pair in named_parameters:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Tensor)):
            raise TypeError(
                "named_parameters must be pairs of name and tensor: pass model.named_parameters(), "
                "not model.parameters()"
            )
        yield pair
