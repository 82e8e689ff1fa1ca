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
        self._saved: list[tuple[list[Tensor], list[Tensor]]] = []

    def __enter__(self) -> Displacement:
        if self._saved:
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
        self._saved.append((weights, copies))

    @torch.no_grad()
    def _restore(self) -> None:
        for weights, saved in self._saved:
            torch._foreach_copy_(weights, saved)
        self._saved = []


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
            if on_cpu and q == 2.0 and block.weights[0].dtype == block.working_dtype:
                self._add_epsilon(block, self.rho * inverse.item())
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

    def _add_epsilon(self, block: _Block, scale: float) -> None:
        """Add *scale* T^2 g, which is epsilon for p = 2, in the fewest passes over memory."""
        if block.operator == "none":
            torch._foreach_add_(block.weights, block.gradients, alpha=scale)
            return
        if block.scratch is not None:
            squares = [torch.abs(weight, out=out) for weight, out in zip(block.weights, block.scratch)]
            minus_eta = torch.tensor(-self.eta, dtype=block.working_dtype)
            for square in squares:  # (|w| + eta)^2 at once
                torch.ops.aten.mse_loss.out(square, minus_eta, 0, out=square)
        else:
            squares = self._diagonals(block)
            torch._foreach_mul_(squares, squares)
        torch._foreach_addcmul_(block.weights, squares, block.gradients, value=scale)

    def _norm_of(self, blocks: list[_Block], order: float, unit: Tensor | None = None) -> Tensor:
        """||T g||_order over all *blocks*; with *unit*, computed in multiples of it."""
        norms: list[Tensor] = []
        for block in blocks:
            if order == 2.0 and block.scratch is not None and block.weights[0].dtype == block.working_dtype:
                norms += self._l2_norms(block)
                continue
            normalized = block.normalized(self._diagonals(block), overwrite=True)
            if unit is not None:
                divisor = torch.where(unit > 0, unit, 1.0).to(normalized[0].device)
                normalized = torch._foreach_div(normalized, divisor)
            norms += _norms(normalized, order)
        norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0]) for n in norms]), order)
        return norm if unit is None else norm * unit

    def _l2_norms(self, block: _Block) -> list[Tensor]:
        """||T g||_2 of each weight, in the fewest passes over memory."""
        minus_eta = torch.tensor(-self.eta, dtype=block.working_dtype)
        norms: list[Tensor] = []
        for weight, gradient, out in zip(block.weights, block.gradients, block.scratch):
            torch.abs(weight, out=out)
            # 2 (|w| + eta) g at once
            torch.ops.aten.mse_loss_backward.grad_input(gradient, out, minus_eta, 0, grad_input=out)
            norms.append(torch.dot(out.view(-1), out.view(-1)).sqrt_().div_(2.0))
        return norms

    def _diagonals(self, block: _Block) -> list[Tensor] | None:
        """The diagonal of T for each weight, in at least float32; ``None`` where T = 1."""
        if block.operator == "none":
            return None
        weights = [weight.to(block.working_dtype) for weight in block.masters or block.weights]
        return diagonal(weights, block.operator, self.eta, block.scratch)

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
        for parameter, (_, operator) in self._parameters.items():
            if parameter.grad is None or parameter.numel() == 0:
                continue
            tensors = [parameter.detach(), self._copy_of(parameter), parameter.grad]
            if parameter in self._masters:
                tensors.append(self._masters[parameter].detach())
            limit = _CPU_BLOCK if parameter.device.type == "cpu" else _ACCELERATOR_BLOCK
            pieces = [tensors]
            if (
                parameter.numel() > limit
                and operator != "filter-wise"
                and all(tensor.is_contiguous() for tensor in tensors)
            ):
                pieces = zip(*(tensor.view(-1).split(limit) for tensor in tensors))
            key = (parameter.device, parameter.dtype, operator, len(tensors))
            for piece in pieces:
                block = open_blocks.get(key)
                if block is None or block.size + piece[0].numel() > limit:
                    block = open_blocks[key] = _Block(operator)
                    blocks.append(block)
                block.add(*piece)
        _share_scratch(blocks)
        return blocks


class _Block:
    """Pieces of weights, copies, gradients and masters of one device, dtype and normalization operator."""

    def __init__(self, operator: str):
        self.operator = operator
        self.weights: list[Tensor] = []
        self.copies: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self.masters: list[Tensor] = []
        self.scratch: list[Tensor] | None = None
        self.size = 0

    def add(self, weight: Tensor, copy: Tensor, gradient: Tensor, *master: Tensor) -> None:
        self.weights.append(weight)
        self.copies.append(copy)
        self.gradients.append(gradient)
        self.masters += master
        self.size += weight.numel()

    def normalized(self, diagonals: list[Tensor] | None, overwrite: bool = False) -> list[Tensor]:
        """T g, in at least float32; the gradients themselves where *diagonals*, those of T, are ``None``.
        May *overwrite* the diagonals."""
        gradients = [gradient.to(self.working_dtype) for gradient in self.gradients]
        if diagonals is None:
            return gradients
        if overwrite and self.operator == "element-wise":
            torch._foreach_mul_(diagonals, gradients)
            return diagonals
        return torch._foreach_mul(gradients, diagonals)

    @property
    def working_dtype(self) -> torch.dtype:
        return torch.promote_types(self.weights[0].dtype, torch.float32)


def _share_scratch(blocks: list[_Block]) -> None:
    """Give all blocks on a CPU the same memory for the diagonal of T, which then stays in the cache."""
    blocks = [b for b in blocks if b.operator == "element-wise" and b.weights[0].device.type == "cpu"]
    sizes = [block.size * block.working_dtype.itemsize for block in blocks]
    memory = torch.empty(max(sizes, default=0), dtype=torch.uint8)
    for block, size in zip(blocks, sizes):
        pieces = memory[:size].view(block.working_dtype).split([w.numel() for w in block.weights])
        block.scratch = [piece.view(w.shape) for piece, w in zip(pieces, block.weights)]


def _norms(tensors: list[Tensor], order: float) -> list[Tensor]:
    if order == 2.0 and tensors[0].device.type == "cpu":  # the faster way there, and by far with threads
        flat = [tensor.reshape(-1) for tensor in tensors]
        return [torch.dot(t, t).sqrt_() for t in flat]
    return torch._foreach_norm(tensors, order)


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
