"""Sharpness (Equation 2 of the paper) and adaptive sharpness (Equation 4) of a loss at given weights."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from .normalization import operator_of
from .perturbation import Displacement, Perturbation, validate

#: A loss without arguments, at the weights as they are: a tensor, or the terms of a mean one after another,
#: each a pair of a tensor, the summed loss of a batch, and the number of things summed over.
Loss = Callable[[], "Tensor | Iterable[tuple[Tensor, float]]"]


@dataclass(frozen=True)
class Region:
    """The maximization region ||T^-1 epsilon||_p <= rho, with the options of
    :class:`~fairseq_asam.Perturbation`. ``normalization="none"`` makes sharpness of adaptive sharpness.

    Raises:
        ValueError: a value out of its range.
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
    """What :func:`measure` found in *region*.

    Attributes:
        value: the largest finite L(w + epsilon) - L(w) seen, in the unit of the loss; ``inf`` if no loss
            seen was finite.
        loss: L(w).
        non_finite: how many of the points seen had a loss, or a gradient to ascend, that is not finite.
        epsilon: by name, the displacement from w at which *value* was seen; ``None`` unless asked for.
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
    """Return max L(w + epsilon) - L(w) over each of *regions*, where w is what *weights* are now.

    A whole data set is measured batch by batch::

        def loss():
            for inputs, targets in batches:
                yield cross_entropy(model(inputs), targets, reduction="sum"), len(targets)

        adaptive, plain = measure(loss, model, [Region(0.5), Region(0.05, normalization="none")])

    With one step, epsilon is that of training: the maximum of the linearized loss. With more, it is found by
    projected steepest ascent in T^-1 epsilon, with T fixed at w, whose region is a ball (p = 2) or a cube
    (p = inf). The first ascent starts from w, and so with the epsilon of training, the others from uniformly
    random points of the region; a step that does not raise the loss is taken back and made smaller. The
    largest loss seen counts.

    The loss must be a function of the weights alone: the same batches in each call, no dropout. A module is
    in evaluation mode meanwhile; give ``model.named_parameters()`` to leave its mode alone. Weights,
    gradients and mode are afterwards what they were, also after an exception. The weights that the loss does
    not depend on are no part of the region.

    Args:
        loss: see :data:`Loss`. It is called once with and *len(regions)* times without a gradient if
            *steps* is 1, and else at most 1 + len(regions) * restarts * (steps + 1) times with one.
        weights: a module, or pairs of name and parameter as :class:`~fairseq_asam.Perturbation` takes them.
        steps: ascent steps in a region; more than one need p = 2 or p = inf.
        restarts: ascents in a region; more than one need more than one step.
        seed: of the random points.
        keep_epsilon: return epsilon too.

    Raises:
        ValueError: a value out of its range; the loss or its gradient at w is not finite; all that
            :class:`~fairseq_asam.Perturbation` raises.
    """
    validate_ascents(regions, steps, restarts)
    modules = list(weights.modules()) if isinstance(weights, nn.Module) else []
    named = list(weights.named_parameters() if isinstance(weights, nn.Module) else weights)
    Perturbation(named, 0.0)  # refuses what cannot be perturbed
    parameters: dict[Tensor, str] = {}
    for name, parameter in named:
        if parameter.requires_grad and parameter.numel():
            parameters.setdefault(parameter, name)  # a shared one comes twice

    with _as_it_was(modules, parameters):
        for module in modules:
            module.training = False
        at_w = evaluate(loss, parameters)
        parameters = {p: name for p, name in parameters.items() if p.grad is not None}
        gradients = _gradients(parameters)
        if not (math.isfinite(at_w) and _are_finite(gradients)):
            raise ValueError(f"the loss at w is {at_w} or its gradient is not finite: there is no ascent")
        measured = []
        for region in regions:
            search = _Search(loss, parameters, at_w, keep_epsilon)
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
    """Check that :func:`measure` can search *regions* so.

    Raises:
        ValueError: it cannot.
    """
    if steps < 1 or restarts < 1:
        raise ValueError(f"steps is {steps} and restarts is {restarts}, but both must be at least 1")
    if steps == 1 and restarts > 1:
        raise ValueError(f"restarts is {restarts}, but one ascent step has one start: ask for more steps")
    for region in regions:
        if steps > 1 and region.p not in (2.0, math.inf):
            raise ValueError(f"p is {region.p}, but more than one ascent step needs p = 2 or p = inf")


class _Search:
    """The points of a region that were seen, and the best of them."""

    def __init__(self, loss: Loss, parameters: dict[Tensor, str], at_w: float, keep_epsilon: bool):
        self.loss, self.parameters, self.at_w = loss, parameters, at_w
        self.w = [parameter.detach().clone() for parameter in parameters] if keep_epsilon else []
        self.epsilon = [torch.zeros_like(w) for w in self.w]
        self.best = -math.inf
        self.seen = self.non_finite = 0

    @property
    def value(self) -> float:
        return math.inf if self.seen == self.non_finite else self.best - self.at_w

    def see(self, displacement: Displacement, with_gradient: bool) -> float:
        """Return the loss where *displacement* leads; NaN if it or its gradient is not finite."""
        with displacement:
            loss = evaluate(self.loss, self.parameters if with_gradient else ())
            if math.isfinite(loss) and loss > self.best:
                self.best = loss
                self.epsilon = [p.detach() - w for p, w in zip(self.parameters, self.w)]
        self.seen += 1
        if math.isfinite(loss) and (not with_gradient or _are_finite(_gradients(self.parameters))):
            return loss
        self.non_finite += 1
        return math.nan

    def one_step(self, region: Region) -> None:
        """See the point that a step of training would see. Expects the gradients at w in ``.grad``."""
        named = [(name, parameter) for parameter, name in self.parameters.items()]
        self.see(Perturbation(named, **asdict(region)), with_gradient=False)

    @torch.no_grad()
    def projected_ascent(
        self, region: Region, gradients: list[Tensor], steps: int, restarts: int, seed: int
    ) -> None:
        """See the points of *restarts* ascents, the first of which begins at w, where *gradients* are."""
        ball = _Ball(self.parameters, region)
        generator = torch.Generator().manual_seed(seed)
        self.best = self.at_w
        for restart in range(restarts):
            if restart == 0:
                here, loss_here, direction = ball.centre(), self.at_w, ball.steepest(gradients)
            else:
                here = ball.random_point(generator)
                loss_here = self.see(Displaced(self.parameters, ball.epsilon(here)), with_gradient=True)
                if math.isnan(loss_here):
                    continue
                direction = ball.steepest(_gradients(self.parameters))
            length = region.rho
            for _ in range(steps):
                there = ball.project(torch._foreach_add(here, direction, alpha=length))
                loss_there = self.see(Displaced(self.parameters, ball.epsilon(there)), with_gradient=True)
                if loss_there > loss_here:
                    here, loss_here, direction = there, loss_there, ball.steepest(_gradients(self.parameters))
                    length = min(2 * length, 2 * region.rho)
                else:
                    length /= 4


class Displaced(Displacement):
    """The weights moved by a given epsilon."""

    def __init__(self, weights: Iterable[Tensor], epsilon: list[Tensor]):
        super().__init__()
        self.weights, self.epsilon = list(weights), epsilon

    @torch.no_grad()
    def _move(self) -> None:
        self._remember_places(self.weights)
        self._save(self.weights, [torch.empty_like(weight) for weight in self.weights])
        torch._foreach_add_(self.weights, self.epsilon)


class _Ball:
    """A region in the coordinates T^-1 epsilon: a ball (p = 2) or a cube (p = inf), with T fixed at w."""

    def __init__(self, parameters: dict[Tensor, str], region: Region):
        self.rho, self.p = region.rho, region.p
        self.weights = [parameter.detach() for parameter in parameters]
        self.diagonals: list[Tensor] = []
        for weight, name in zip(self.weights, parameters.values()):
            operator = operator_of(name, weight, region.normalization, region.normalize_bias)
            one = torch.ones((), dtype=weight.dtype, device=weight.device)
            self.diagonals += operator.diagonal([weight], region.eta) or [one]

    def centre(self) -> list[Tensor]:
        return [torch.zeros_like(weight) for weight in self.weights]

    def random_point(self, generator: torch.Generator) -> list[Tensor]:
        """A point of the uniform distribution over the ball."""
        if math.isinf(self.p):
            return [
                (2 * torch.rand(w.shape, generator=generator, dtype=w.dtype) - 1).to(w.device) * self.rho
                for w in self.weights
            ]
        point = [torch.randn(w.shape, generator=generator, dtype=w.dtype).to(w.device) for w in self.weights]
        dimensions = sum(weight.numel() for weight in self.weights)
        radius = self.rho * torch.rand((), generator=generator).item() ** (1 / dimensions)
        return torch._foreach_mul(point, radius / _norm(point))

    def steepest(self, gradients: list[Tensor]) -> list[Tensor]:
        """The direction of length 1 in which the loss rises most, from its gradient with respect to w."""
        normalized = torch._foreach_mul(gradients, self.diagonals)
        if math.isinf(self.p):
            return torch._foreach_sign(normalized)
        norm = _norm(normalized)
        return torch._foreach_mul(normalized, 1 / norm if norm > 0 else 0.0)

    def project(self, point: list[Tensor]) -> list[Tensor]:
        if math.isinf(self.p):
            return [coordinates.clamp(-self.rho, self.rho) for coordinates in point]
        norm = _norm(point)
        return torch._foreach_mul(point, self.rho / norm) if norm > self.rho else point

    def epsilon(self, point: list[Tensor]) -> list[Tensor]:
        return torch._foreach_mul(point, self.diagonals)


def evaluate(loss: Loss, gradient_of: Iterable[Tensor] = ()) -> float:
    """Return the mean loss. A positive multiple of its gradient is then in ``.grad`` of *gradient_of*.

    Raises:
        ValueError: the loss has no terms.
    """
    parameters = list(gradient_of)
    for parameter in parameters:
        parameter.grad = None
    total = count = 0.0
    with torch.set_grad_enabled(bool(parameters)):
        terms = loss()
        for term, number in [(terms, 1)] if isinstance(terms, Tensor) else terms:
            if parameters:
                term.backward(inputs=parameters)
            total += term.item()
            count += number
    if not count > 0:
        raise ValueError("the loss is a mean over nothing: give it at least one batch")
    return total / count


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def _are_finite(tensors: list[Tensor]) -> bool:
    return all(math.isfinite(norm) for norm in torch._foreach_norm(tensors, math.inf))


def _norm(tensors: list[Tensor]) -> float:
    """The l2 norm of all *tensors* together."""
    return math.hypot(*(norm.item() for norm in torch._foreach_norm(tensors)))


@contextlib.contextmanager
def _as_it_was(modules: Iterable[nn.Module], parameters: Iterable[Tensor]) -> Iterator[None]:
    """Put back the modes and gradients of now."""
    modes = [(module, module.training) for module in modules]
    gradients = [(parameter, parameter.grad) for parameter in parameters]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, gradient in gradients:
            parameter.grad = gradient
