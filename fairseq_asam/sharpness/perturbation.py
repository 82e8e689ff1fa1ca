"""The perturbation epsilon(w): the ascent step of SAM and ASAM, and the way back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from .blocks import Ascent, Block, Blocks
from .normalization import NORMALIZATIONS, operator_of


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
            torch._foreach_copy_(self._moved[::-1], self._saved[: len(self._moved)][::-1])
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
        masters = dict(masters or {})
        self._names: dict[Tensor, str] = {}
        operators: dict[Tensor, str] = {}
        for name, parameter in _pairs(named_parameters):
            if not parameter.is_leaf:
                raise ValueError(f"{name} is not a leaf tensor: pass parameters, which get gradients")
            if not parameter.is_floating_point():
                raise ValueError(f"{name} has dtype {parameter.dtype}: pass real floating-point weights")
            if parameter.requires_grad:
                operator = operator_of(name, parameter, normalization, normalize_bias)
                operators.setdefault(parameter, operator)
                self._names.setdefault(parameter, name)
        if not operators:
            raise ValueError("there is no parameter to perturb: none was given that requires a gradient")
        if any(
            parameter.dtype in (torch.float16, torch.bfloat16) and parameter not in masters
            for parameter in operators
        ):
            warnings.warn(
                "half-precision weights absorb most of epsilon, which is far below their resolution: give "
                "their float32 master weights as masters",
                stacklevel=2,
            )
        self._blocks = Blocks(operators, masters)

    def _move(self) -> None:
        if all(parameter.grad is None for parameter in self._names):
            raise RuntimeError("no parameter has a gradient: call backward() at w before entering the block")
        for parameter, name in self._names.items():
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                raise ValueError(
                    f"the gradient of {name} is sparse, which sharpness-aware training does not support: "
                    "use a dense gradient (for nn.Embedding, sparse=False)"
                )
        self._perturb()

    @torch.no_grad()
    def _perturb(self) -> None:
        q = 1.0 if math.isinf(self.p) else self.p / (self.p - 1.0)
        blocks = self._blocks.with_gradients(self.eta, self.p)
        # Powers other than squares soon leave the range of float32: take them in units of the largest.
        unit = None if q in (1.0, 2.0) else _norm(blocks, math.inf)
        self.norm = _norm(blocks, q, unit)
        inverse = 1.0 / self.norm
        usable = torch.isfinite(self.norm) & torch.isfinite(inverse)
        on_cpu = self.norm.device.type == "cpu"  # elsewhere, to look at a value would stall the device
        if self.rho == 0.0 or (on_cpu and not usable):
            return
        ascent = Ascent(self.rho, q, torch.where(usable, inverse, 0.0), usable)
        # Backwards, and forwards in _restore: a CPU has in its cache what it touched last.
        for block, gradients in reversed(blocks):
            self._save(block.weights, block.copies)
            block.move(gradients, ascent)


def _norm(blocks: list[tuple[Block, list[Tensor]]], order: float, unit: Tensor | None = None) -> Tensor:
    """||T g||_order over all *blocks* and their gradients; with *unit*, computed in multiples of it."""
    norms = [norm for block, gradients in blocks for norm in block.norms(gradients, order, unit)]
    norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0]) for n in norms]), order)
    return norm if unit is None else norm * unit


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
