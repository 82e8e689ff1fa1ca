"""The perturbation epsilon(w): the ascent step of SAM and ASAM, and the way back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from .normalization import NORMALIZATIONS, diagonal, operator_of

# Elements that go through the arithmetic together. On a CPU a block and its temporaries should stay in
# the cache; on an accelerator the number of launches counts, and the bound is on temporary memory.
_CPU_BLOCK = 2**19
_ACCELERATOR_BLOCK = 2**24


class Displacement:
    """Context manager that moves weights, and back on exit: then every weight is bit for bit what it was,
    in the same storage, whatever happened inside the block. A subclass says where to in :meth:`_move`."""

    def __init__(self):
        self._moved: list[Tensor] = []
        self._saved: list[Tensor] = []

    def __enter__(self) -> Displacement:
        if self._moved:
            raise RuntimeError("the weights are perturbed already: leave the block before entering it again")
        try:
            self._move()
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._restore()
        except BaseException:  # a KeyboardInterrupt half way
            self._restore()
            raise

    def _move(self) -> None:
        """Move the weights, each list of them after a call of :meth:`_save`."""
        raise NotImplementedError

    def _save(self, weights: list[Tensor], copies: list[Tensor]) -> None:
        torch._foreach_copy_(copies, weights)
        self._saved += copies
        self._moved += weights

    @torch.no_grad()
    def _restore(self) -> None:
        if self._moved:
            torch._foreach_copy_(self._moved, self._saved[: len(self._moved)])
        self._moved, self._saved = [], []


class Perturbation(Displacement):
    """Context manager that moves the weights from w to w + epsilon(w, g), and back on exit.

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

    On exit every weight is bit for bit what it was, in the same storage, whatever happened inside the
    block. A parameter without a gradient on entry is not perturbed, and a zero gradient perturbs
    nothing. A gradient whose norm is not finite perturbs nothing either; :attr:`norm` tells.

    Args:
        named_parameters: pairs of name and parameter, as from ``model.named_parameters()``. The names
            decide what is a bias. Parameters that do not require a gradient are left alone.
        rho: radius of the maximization region, >= 0. The paper: 0.05 to 0.1 for SAM and 0.5 to 1.0 for
            ASAM on images (Section 5.2), 0.1 and 0.2 on translation (Section 5.3).
        eta: added to the normalization operator for stability, >= 0. Unused for ``none`` and biases.
        p: order of the norm that bounds the region, 1 < p <= inf.
        normalization: one of :data:`~fairseq_asam.NORMALIZATIONS`; ``none`` is SAM.
        normalize_bias: normalize biases like other weights (Section 5.2, Figure 4; default: T = 1).
        masters: the float32 master copy of each half-precision parameter. Epsilon is far below the
            resolution of half precision; added to the master and rounded once, it survives on average.
            Masters are read and never changed.

    Attributes:
        norm: ||T g||_q of the last entry, a tensor without dimensions on the device of the parameters,
            ``None`` before the first entry.

    Raises:
        ValueError: a value out of its range, a parameter that is not a leaf or not real, no parameters;
            on entry, a sparse gradient.
        TypeError: *named_parameters* are not pairs of name and tensor.
        RuntimeError: on entry, no parameter has a gradient, or the weights are perturbed already.
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
    ):
        super().__init__()
        validate(rho=rho, eta=eta, p=p, normalization=normalization)
        self.rho, self.eta, self.p = float(rho), float(eta), float(p)
        self.norm: Tensor | None = None
        self._masters = dict(masters or {})
        # Kept between blocks: on a CPU, new memory for every step costs more than all of the arithmetic.
        self._copies: dict[Tensor, Tensor] = {}
        self._parameters: dict[Tensor, tuple[str, str]] = {}
        for name, parameter in _pairs(named_parameters):
            if not parameter.is_leaf:
                raise ValueError(f"{name} is not a leaf tensor: pass parameters, which get gradients")
            if not parameter.is_floating_point():
                raise ValueError(f"{name} has dtype {parameter.dtype}: pass real floating-point weights")
            if parameter.requires_grad:
                operator = operator_of(name, parameter, normalization, normalize_bias)
                self._parameters.setdefault(parameter, (name, operator))
        if not self._parameters:
            raise ValueError("there is no parameter to perturb: none was given that requires a gradient")
        if any(
            parameter.dtype in (torch.float16, torch.bfloat16) and parameter not in self._masters
            for parameter in self._parameters
        ):
            warnings.warn(
                "half-precision weights absorb most of epsilon, which is far below their resolution: give "
                "their float32 master weights as masters",
                stacklevel=2,
            )

    def _move(self) -> None:
        if all(parameter.grad is None for parameter in self._parameters):
            raise RuntimeError("no parameter has a gradient: call backward() at w before entering the block")
        for parameter, (name, _) in self._parameters.items():
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                raise ValueError(
                    f"the gradient of {name} is sparse, which sharpness-aware training does not support: "
                    "use a dense gradient (for nn.Embedding, sparse=False)"
                )
        self._perturb()

    @torch.no_grad()
    def _perturb(self) -> None:
        q = 1.0 if math.isinf(self.p) else self.p / (self.p - 1.0)
        blocks = self._blocks()
        # Powers other than squares soon leave the range of float32: take them in units of the largest.
        unit = None if q in (1.0, 2.0) else self._norm_of(blocks, math.inf)
        self.norm = self._norm_of(blocks, q, unit)
        inverse = 1.0 / self.norm
        usable = torch.isfinite(self.norm) & torch.isfinite(inverse)
        on_cpu = self.norm.device.type == "cpu"  # elsewhere, to look at a value would stall the device
        if self.rho == 0.0 or (on_cpu and not usable):
            return
        inverse = torch.where(usable, inverse, 0.0)
        for block in blocks:
            self._save(block.weights, block.copies)
            if q == 2.0 and block.scratch is not None:
                block.add_epsilon(self.rho * inverse.item(), self.eta)
                continue
            diagonals = self._diagonals(block)
            epsilon = torch._foreach_mul(block.normalized(diagonals), inverse.to(block.weights[0].device))
            if not on_cpu:  # 0 * inf and 0 * nan, where the norm is not finite
                for e in epsilon:
                    e.nan_to_num_(0.0, 0.0, 0.0)
            if q == 1.0:
                torch._foreach_sign_(epsilon)
            elif q != 2.0:
                powers = torch._foreach_pow(torch._foreach_abs(epsilon), q - 1.0)
                epsilon = [power.copysign_(e) for power, e in zip(powers, epsilon)]
            if diagonals is not None:
                torch._foreach_mul_(epsilon, diagonals)
            if block.masters:
                torch._foreach_mul_(epsilon, self.rho)
                torch._foreach_copy_(block.weights, torch._foreach_add(block.masters, epsilon))
            else:
                torch._foreach_add_(block.weights, epsilon, alpha=self.rho)

    def _norm_of(self, blocks: list[_Block], order: float, unit: Tensor | None = None) -> Tensor:
        """||T g||_order over all *blocks*; with *unit*, computed in multiples of it."""
        norms: list[Tensor] = []
        for block in blocks:
            if order == 2.0 and block.scratch is not None:
                norms.append(block.l2_norm(self.eta))
                continue
            normalized = block.normalized(self._diagonals(block))
            if unit is not None:
                divisor = torch.where(unit > 0, unit, 1.0).to(normalized[0].device)
                normalized = torch._foreach_div(normalized, divisor)
            norms += torch._foreach_norm(normalized, order)
        norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0]) for n in norms]), order)
        return norm if unit is None else norm * unit

    def _diagonals(self, block: _Block) -> list[Tensor] | None:
        """The diagonal of T for each weight, in at least float32; ``None`` where T = 1."""
        if block.operator == "none":
            return None
        weights = [weight.to(block.working_dtype) for weight in block.masters or block.weights]
        return diagonal(weights, block.operator, self.eta)

    def _copy_of(self, parameter: Tensor) -> Tensor:
        """Memory for a copy of *parameter*, new if that has changed its form since the last block."""
        copy = self._copies.get(parameter)
        form = (parameter.shape, parameter.stride(), parameter.dtype, parameter.device)
        if copy is None or (copy.shape, copy.stride(), copy.dtype, copy.device) != form:
            copy = self._copies[parameter] = torch.empty_like(parameter, requires_grad=False)
        return copy

    def _blocks(self) -> list[_Block]:
        blocks: list[_Block] = []
        open_blocks: dict[tuple, _Block] = {}
        scratch: dict[torch.dtype, Tensor] = {}
        for parameter, (_, operator) in self._parameters.items():
            if parameter.grad is None or parameter.numel() == 0:
                continue
            tensors = [parameter.detach(), self._copy_of(parameter), parameter.grad.detach()]
            if parameter in self._masters:
                tensors.append(self._masters[parameter].detach())
            on_cpu = parameter.device.type == "cpu"
            limit = _CPU_BLOCK if on_cpu else _ACCELERATOR_BLOCK
            flat = operator != "filter-wise" and all(tensor.is_contiguous() for tensor in tensors)
            pieces = [[tensor.view(-1) for tensor in tensors] if flat else tensors]
            if flat and parameter.numel() > limit:
                pieces = zip(*(tensor.split(limit) for tensor in pieces[0]))
            key = (parameter.device, parameter.dtype, operator, len(tensors))
            for piece in pieces:
                block = open_blocks.get(key)
                # a CPU gains nothing from many tensors in one call
                if block is None or on_cpu or block.size + piece[0].numel() > limit:
                    block = open_blocks[key] = _Block(operator)
                    blocks.append(block)
                block.add(*piece)
                if on_cpu and flat and len(tensors) == 3 and block.working_dtype == parameter.dtype:
                    if parameter.dtype not in scratch:
                        scratch[parameter.dtype] = torch.empty(limit, dtype=parameter.dtype)
                    block.scratch = scratch[parameter.dtype][: block.size]
        return blocks


class _Block:
    """Pieces of weights, copies, gradients and masters of one device, dtype and normalization operator.

    A block on a CPU is one piece. If that is flat and in full precision, it shares *scratch*, memory that
    stays in the cache, with the others, and knows the fewest passes over memory to epsilon for p = 2."""

    def __init__(self, operator: str):
        self.operator = operator
        self.weights: list[Tensor] = []
        self.copies: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self.masters: list[Tensor] = []
        self.scratch: Tensor | None = None
        self.size = 0

    def add(self, weight: Tensor, copy: Tensor, gradient: Tensor, *master: Tensor) -> None:
        self.weights.append(weight)
        self.copies.append(copy)
        self.gradients.append(gradient)
        self.masters += master
        self.size += weight.numel()

    def normalized(self, diagonals: list[Tensor] | None) -> list[Tensor]:
        """T g, in at least float32; the gradients themselves where *diagonals*, those of T, are ``None``."""
        gradients = [gradient.to(self.working_dtype) for gradient in self.gradients]
        return gradients if diagonals is None else torch._foreach_mul(gradients, diagonals)

    def l2_norm(self, eta: float) -> Tensor:
        """||T g||_2, with *scratch*."""
        (weight,), (gradient,) = self.weights, self.gradients
        if self.operator == "none":
            return torch.dot(gradient, gradient).sqrt_()
        magnitude = torch.abs(weight, out=self.scratch)
        if eta > 1e-6:  # g + |w| g / eta at once, the norm in units of eta
            scaled = torch.addcmul(gradient, magnitude, gradient, value=1.0 / eta, out=self.scratch)
            return torch.dot(scaled, scaled).sqrt_().mul_(eta)
        scaled = magnitude.add_(eta).mul_(gradient)
        return torch.dot(scaled, scaled).sqrt_()

    def add_epsilon(self, scale: float, eta: float) -> None:
        """Add *scale* T^2 g to the weights, with *scratch*."""
        (weight,), (gradient,) = self.weights, self.gradients
        if self.operator == "none":
            weight.add_(gradient, alpha=scale)
            return
        diagonal = torch.abs(weight, out=self.scratch).add_(eta)
        weight.addcmul_(diagonal.mul_(diagonal), gradient, value=scale)

    @property
    def working_dtype(self) -> torch.dtype:
        return torch.promote_types(self.weights[0].dtype, torch.float32)


def validate(rho: float, eta: float, p: float, normalization: str) -> None:
    """Raise ValueError, in one sentence, if a value is out of the range that :class:`Perturbation` states."""
    if not 0.0 <= rho < math.inf:
        raise ValueError(f"rho is {rho}, but the radius of a region must be a finite number >= 0")
    if not 0.0 <= eta < math.inf:
        raise ValueError(f"eta is {eta}, but it must be a finite number >= 0 (the paper uses 0.01)")
    if not p > 1.0:
        raise ValueError(f"p is {p}, but it must be greater than 1 (the paper uses 2 and inf)")
    if normalization not in NORMALIZATIONS:
        choices = ", ".join(NORMALIZATIONS)
        raise ValueError(f"normalization is {normalization!r}, but it must be one of {choices}")


def _pairs(named_parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for pair in named_parameters:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Tensor)):
            raise TypeError(
                "named_parameters must be pairs of name and tensor: pass model.named_parameters(), "
                "not model.parameters()"
            )
        yield pair
