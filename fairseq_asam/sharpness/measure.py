"""Sharpness (Equation 2 of the paper) and adaptive sharpness (Equation 4) of a loss at given weights."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from .normalization import operator_of
from .perturbation import Displacement, Perturbation, validate
from .shards import (
    Shards,
    diagonals_over_shards,
    is_sharded,
    local,
    local_gradient,
    norm_over,
    part_of,
    reshard,
    shards_of,
)

#: A function without arguments that returns the loss at the present weights: a tensor, or the terms of a
#: mean. A term is a pair: a tensor, the loss summed over a batch, and the number of things summed.
Loss = Callable[[], "Tensor | Iterable[tuple[Tensor, float]]"]


@dataclass(frozen=True)
class Region:
    """The maximization region ||T^-1 epsilon||_p <= rho.

    The options are those of :class:`~fairseq_asam.Perturbation`. With ``normalization="none"``, adaptive
    sharpness is sharpness.

    Raises:
        ValueError: a value is out of its range.
    """

    rho: float
    eta: float = 0.01
    p: float = 2.0
    normalization: str = "element-wise"
    normalize_bias: bool = False

    def __post_init__(self):
        validate(rho=self.rho, eta=self.eta, p=self.p, normalization=self.normalization)


@dataclass(frozen=True)
class Sharpness:
    """What :func:`measure` found in a region.

    Attributes:
        region: the region.
        value: the largest finite L(w + epsilon) - L(w) seen, in the unit of the loss; ``inf`` if no loss
            seen was finite.
        loss: L(w).
        non_finite: how many of the points seen have a loss, or a gradient to ascend, that is not finite.
        epsilon: the displacement from w at which *value* was seen, by name; ``None`` unless asked for.
    """

    region: Region
    value: float
    loss: float
    non_finite: int
    epsilon: dict[str, Tensor] | None = None


def measure(
    loss: Loss,
    weights: nn.Module | Iterable[tuple[str, Tensor]],
    regions: Sequence[Region],
    steps: int = 1,
    restarts: int = 1,
    seed: int = 0,
    keep_epsilon: bool = False,
) -> list[Sharpness]:
    """Return max L(w + epsilon) - L(w) over each region, where w are the present weights.

    A whole data set is measured batch by batch::

        def loss():
            for inputs, targets in batches:
                yield cross_entropy(model(inputs), targets, reduction="sum"), len(targets)

        adaptive, plain = measure(loss, model, [Region(0.5), Region(0.05, normalization="none")])

    With one step, epsilon is that of training: the maximum of the linearized loss. With more steps, it is
    found by projected steepest ascent in T^-1 epsilon, with T fixed at w; in these coordinates the region is
    a ball (p = 2) or a cube (p = inf). The first ascent starts from w, so that its first step is the epsilon
    of training. The others start from uniformly random points of the region. A step that does not raise the
    loss is undone, and the next one is shorter. The largest loss seen counts.

    The loss must be a function of the weights alone: the same batches in each call, no dropout. A module is
    in evaluation mode meanwhile; give ``model.named_parameters()`` to leave its mode alone. Weights,
    gradients and mode are restored, also after an exception. Weights on which the loss does not depend are
    not moved.

    With weights in shards, give the module. All processes call this together, each with its own batches; the
    loss is the mean over all of them.

    Args:
        loss: see :data:`Loss`. With one step, it is called once with a gradient and *len(regions)* times
            without; with more, at most 1 + len(regions) * restarts * (steps + 1) times, each with a gradient.
        weights: a module, or pairs of name and parameter as :class:`~fairseq_asam.Perturbation` takes them.
        regions: where to look.
        steps: ascent steps in a region; more than one needs p = 2 or p = inf.
        restarts: ascents in a region; more than one needs more than one step.
        seed: of the random points.
        keep_epsilon: return epsilon too.

    Returns:
        The sharpness in each region.

    Raises:
        ValueError: a value is out of its range; the loss or its gradient at w is not finite; all that
            :class:`~fairseq_asam.Perturbation` raises.
    """
    validate_ascents(regions, steps, restarts)
    modules = list(weights.modules()) if isinstance(weights, nn.Module) else []
    reshard(modules)
    named = list(weights.named_parameters() if isinstance(weights, nn.Module) else weights)
    Perturbation(named, 0.0)  # raises if something cannot be perturbed
    parameters: dict[Tensor, str] = {}
    for name, parameter in named:
        if parameter.requires_grad and parameter.numel():
            parameters.setdefault(parameter, name)  # a shared parameter comes twice
    sharded = modules if any(map(is_sharded, parameters)) else []
    if any(map(is_sharded, parameters)) and not modules:
        raise ValueError(
            "weights are in shards, and whole ones may be left over from the last pass: give measure() the "
            "module itself, not its parameters"
        )
    with _as_it_was(modules, parameters):
        for module in modules:
            module.training = False
        at_w = evaluate(loss, parameters, sharded)
        parameters = {p: name for p, name in parameters.items() if p.grad is not None}
        if not parameters:
            raise ValueError(
                "the loss depends on none of the weights: give measure() the model that it is of"
            )
        gradients = _gradients(parameters)
        if not (math.isfinite(at_w) and _are_finite(gradients, parameters)):
            raise ValueError(f"the loss at w is {at_w} or its gradient is not finite: there is no ascent")
        measured = []
        for region in regions:
            search = _Search(loss, parameters, at_w, keep_epsilon, sharded)
            if steps == 1:
                search.one_step(region)
            else:
                search.projected_ascent(region, gradients, steps, restarts, seed)
            if search.non_finite:
                warnings.warn(
                    f"{search.non_finite} of {search.seen} points seen in {region} have a loss or a gradient "
                    "that is not finite; the sharpness is that of the others",
                    stacklevel=2,
                )
            epsilon = dict(zip(parameters.values(), search.epsilon)) if keep_epsilon else None
            measured.append(Sharpness(region, search.value, at_w, search.non_finite, epsilon))
    return measured


def validate_ascents(regions: Iterable[Region], steps: int, restarts: int) -> None:
    """Check the arguments of :func:`measure`.

    Raises:
        ValueError: it cannot search a region with so many steps and restarts.
    """
    if steps < 1 or restarts < 1:
        raise ValueError(f"steps is {steps} and restarts is {restarts}, but both must be at least 1")
    if steps == 1 and restarts > 1:
        raise ValueError(f"restarts is {restarts}, but one ascent step has one start: ask for more steps")
    for region in regions:
        if steps > 1 and region.p not in (2.0, math.inf):
            raise ValueError(f"p is {region.p}, but more than one ascent step needs p = 2 or p = inf")


class _Search:
    """A search for the largest loss in a region: the number of points seen, and the best of them."""

    def __init__(
        self,
        loss: Loss,
        parameters: dict[Tensor, str],
        at_w: float,
        keep_epsilon: bool,
        sharded: Sequence[nn.Module],
    ):
        self.loss, self.parameters, self.at_w, self.sharded = loss, parameters, at_w, sharded
        self.w = [parameter.detach().clone() for parameter in parameters] if keep_epsilon else []
        self.epsilon = [torch.zeros_like(w) for w in self.w]
        self.best = -math.inf
        self.seen = self.non_finite = 0

    @property
    def value(self) -> float:
        return math.inf if self.seen == self.non_finite else self.best - self.at_w

    def see(self, displacement: Displacement, with_gradient: bool = True) -> float:
        """Return the loss after *displacement*; NaN if it or its gradient is not finite."""
        with displacement:
            loss = evaluate(self.loss, self.parameters if with_gradient else (), self.sharded)
            if math.isfinite(loss) and loss > self.best:
                self.best = loss
                self.epsilon = [p.detach() - w for p, w in zip(self.parameters, self.w)]
        self.seen += 1
        gradients = _gradients(self.parameters) if with_gradient else []
        if math.isfinite(loss) and (not with_gradient or _are_finite(gradients, self.parameters)):
            return loss
        self.non_finite += 1
        return math.nan

    def one_step(self, region: Region) -> None:
        """See the w + epsilon of training. The gradients at w must be in ``.grad``."""
        named = [(name, parameter) for parameter, name in self.parameters.items()]
        self.see(Perturbation(named, **asdict(region)), with_gradient=False)

    @torch.no_grad()
    def projected_ascent(
        self, region: Region, gradients: list[Tensor], steps: int, restarts: int, seed: int
    ) -> None:
        """See the points of *restarts* ascents. The first one begins at w, where the loss has *gradients*."""
        ball = _Ball(self.parameters, region)
        generator = torch.Generator().manual_seed(seed)
        self.best = self.at_w
        for restart in range(restarts):
            if restart == 0:
                here, loss_here, direction = ball.centre(), self.at_w, ball.steepest(gradients)
            else:
                here = ball.random_point(generator)
                loss_here = self.see(FixedPerturbation(self.parameters, ball.epsilon(here)))
                if math.isnan(loss_here):
                    continue
                direction = ball.steepest(_gradients(self.parameters))
            length = region.rho
            for _ in range(steps):
                there = ball.project(list(torch._foreach_add(here, direction, alpha=length)))
                loss_there = self.see(FixedPerturbation(self.parameters, ball.epsilon(there)))
                if loss_there > loss_here:
                    here, loss_here, direction = there, loss_there, ball.steepest(_gradients(self.parameters))
                    length = min(2 * length, 2 * region.rho)
                else:
                    length /= 4


class FixedPerturbation(Displacement):
    """Moves the weights by a given epsilon, this process's part of it."""

    def __init__(self, weights: Iterable[Tensor], epsilon: list[Tensor]):
        super().__init__()
        self.weights, self.epsilon = list(weights), epsilon

    @torch.no_grad()
    def _move(self) -> None:
        self._places = [(w, None if is_sharded(w) else w.detach()) for w in self.weights]
        weights = [local(weight) for weight in self.weights]
        self._remember(weights, [weight.clone() for weight in weights])
        torch._foreach_add_(weights, self.epsilon)


class _Ball:
    """A region in the coordinates T^-1 epsilon, with T fixed at w: a ball (p = 2) or a cube (p = inf).

    A point is a list with this process's part of the coordinates of each weight.
    """

    def __init__(self, parameters: dict[Tensor, str], region: Region):
        self.rho, self.p = region.rho, region.p
        self.parameters = list(parameters)
        self.weights = [local(parameter.detach()) for parameter in parameters]
        operators = {
            weight: operator_of(name, weight, region.normalization, region.normalize_bias)
            for weight, name in parameters.items()
        }
        reduced = diagonals_over_shards(operators, region.eta)
        self.diagonals: list[Tensor] = []
        for parameter, weight in zip(parameters, self.weights):
            if parameter in reduced:
                self.diagonals.append(reduced[parameter])
                continue
            one = torch.ones((), dtype=weight.dtype, device=weight.device)
            self.diagonals += operators[parameter].diagonal([weight], region.eta) or [one]

    def centre(self) -> list[Tensor]:
        """Return the point that stands for w."""
        return [torch.zeros_like(weight) for weight in self.weights]

    def random_point(self, generator: torch.Generator) -> list[Tensor]:
        """Draw a point uniformly from the region."""
        draw = torch.rand if math.isinf(self.p) else torch.randn
        draw = functools.partial(draw, generator=generator, device=generator.device)
        drawn = (draw(p.shape, dtype=p.dtype).to(p.device) for p in self.parameters)
        point = [part_of(whole, p) for whole, p in zip(drawn, self.parameters)]
        if math.isinf(self.p):
            return [(2 * coordinates - 1) * self.rho for coordinates in point]
        dimensions = sum(parameter.numel() for parameter in self.parameters)
        share = torch.rand((), generator=generator, device=generator.device).item()
        radius = self.rho * share ** (1 / dimensions)
        return list(torch._foreach_mul(point, radius / self._norm(point)))

    def steepest(self, gradients: list[Tensor]) -> list[Tensor]:
        """Return the direction of length 1 in which a loss with *gradients* at the weights rises most."""
        normalized = list(torch._foreach_mul(gradients, self.diagonals))
        if math.isinf(self.p):
            return list(torch._foreach_sign(normalized))
        norm = self._norm(normalized)
        return list(torch._foreach_mul(normalized, 1 / norm if norm > 0 else 0.0))

    def project(self, point: list[Tensor]) -> list[Tensor]:
        """Return the nearest point of the region."""
        if math.isinf(self.p):
            return [coordinates.clamp(-self.rho, self.rho) for coordinates in point]
        norm = self._norm(point)
        return list(torch._foreach_mul(point, self.rho / norm)) if norm > self.rho else point

    def epsilon(self, point: list[Tensor]) -> list[Tensor]:
        """Return the displacement of the weights at *point*."""
        return list(torch._foreach_mul(point, self.diagonals))

    def _norm(self, point: list[Tensor]) -> float:
        """Return the l2 norm of all coordinates together."""
        return _norm(point, self.parameters)


def evaluate(loss: Loss, gradient_of: Iterable[Tensor] = (), sharded: Sequence[nn.Module] = ()) -> float:
    """Return the mean loss.

    Args:
        loss: see :data:`Loss`.
        gradient_of: parameters whose ``.grad`` is set to a positive multiple of the gradient.
        sharded: modules with weights in shards. With any, the mean is over the terms of all processes.

    Raises:
        TypeError: the loss returned neither a tensor nor pairs.
        ValueError: the loss has no terms.
    """
    parameters = list(gradient_of)
    for parameter in parameters:
        parameter.grad = None
    reshard(sharded)
    total = count = 0.0
    with torch.set_grad_enabled(bool(parameters)):
        terms = loss()
        pairs = [(terms, 1)] if isinstance(terms, Tensor) else terms
        if not isinstance(pairs, Iterable) or (isinstance(pairs, tuple) and isinstance(pairs[0], Tensor)):
            raise TypeError(
                f"the loss returned {type(terms).__name__}, but it must return a tensor, or pairs in a list "
                "or by yield: the loss summed over a batch, and the number of things summed"
            )
        for term, number in pairs:
            if parameters:
                # fully_shard computes with tensors that are not its parameters
                term.backward(inputs=None if sharded else parameters)
            total += term.item()
            count += number
    reshard(sharded)
    if sharded:
        sums = torch.tensor(
            [total, count], dtype=torch.float64, device=local(next(iter(sharded[0].parameters()))).device
        )
        torch.distributed.all_reduce(sums)
        total, count = sums.tolist()
    if not count > 0:
        raise ValueError("the loss is a mean over nothing: give it at least one batch")
    return total / count


def _gradients(parameters: dict[Tensor, str]) -> list[Tensor]:
    """Return this process's part of each gradient; zeros where there is none."""
    return [
        torch.zeros_like(local(p.detach())) if p.grad is None else local_gradient(p.grad, p, name)
        for p, name in parameters.items()
    ]


def _are_finite(parts: list[Tensor], parameters: Iterable[Tensor]) -> bool:
    return math.isfinite(_norm(parts, parameters, math.inf))


def _norm(parts: list[Tensor], parameters: Iterable[Tensor], order: float = 2.0) -> float:
    """Return the norm of all tensors together, of which *parts* are sharded like *parameters*."""
    norms: dict[Shards | None, list[Tensor]] = {}
    for parameter, part in zip(parameters, parts):
        norm = torch.linalg.vector_norm(part, order) if part.numel() else part.new_zeros(())
        norms.setdefault(shards_of(parameter), []).append(norm.double())
    joined = (norm_over(shards, each, order).item() for shards, each in norms.items())
    return max(joined) if math.isinf(order) else math.hypot(*joined)


@contextlib.contextmanager
def _as_it_was(modules: Iterable[nn.Module], parameters: Iterable[Tensor]) -> Iterator[None]:
    """Restore modes and gradients after the block."""
    modes = [(module, module.training) for module in modules]
    gradients = [(parameter, parameter.grad) for parameter in parameters]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, gradient in gradients:
            parameter.grad = gradient
