"""The perturbation epsilon(w): the ascent step of SAM and ASAM, and the way back."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from .normalization import NORMALIZATIONS, diagonal, operator_of

aten = torch.ops.aten
NO_REDUCTION = 0

# Elements that go through the arithmetic together. On a CPU a block and its temporaries should stay in
# the cache; on an accelerator the number of launches counts, and the bound is on temporary memory.
_CPU_BLOCK = 2**19
_ACCELERATOR_BLOCK = 2**24
_PAGE = 4096  # bytes
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


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
        self._masters = dict(masters or {})
        # Kept between steps: on a CPU, new memory for every step costs more than all of the arithmetic.
        self._copies: dict[Tensor, Tensor] = {}
        self._forms: list[tuple] = []
        self._blocks: list[_Block] = []
        self._limits: dict[Tensor, int | None] = {}
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
        blocks = self._blocks_with_gradients()
        # Powers other than squares soon leave the range of float32: take them in units of the largest.
        unit = None if q in (1.0, 2.0) else self._norm_of(blocks, math.inf)
        self.norm = self._norm_of(blocks, q, unit)
        inverse = 1.0 / self.norm
        usable = torch.isfinite(self.norm) & torch.isfinite(inverse)
        on_cpu = self.norm.device.type == "cpu"  # elsewhere, to look at a value would stall the device
        if self.rho == 0.0 or (on_cpu and not usable):
            return
        inverse = torch.where(usable, inverse, 0.0)
        # Backwards, and forwards in _restore: a CPU has in its cache what it touched last.
        for block, gradients in reversed(blocks):
            if block.scratch is not None and on_cpu:
                squares = block.squared_diagonal()
                self._save(block.weights, block.copies)
                block.add(squares, gradients[0], self.rho * inverse.item())
                continue
            diagonals = self._diagonals(block)
            normalized = block.normalized(gradients, diagonals)
            epsilon = torch._foreach_mul(normalized, inverse.to(block.weights[0].device))
            if not on_cpu:  # where the norm is not finite, 0 * inf and 0 * nan; but 0 times their bits is 0
                bits = [e.view(_BITS[e.dtype]) for e in epsilon]
                torch._foreach_mul_(bits, usable.to(bits[0]))
            if q == 1.0:
                torch._foreach_sign_(epsilon)
            elif q != 2.0:
                powers = torch._foreach_pow(torch._foreach_abs(epsilon), q - 1.0)
                epsilon = torch._foreach_mul(powers, torch._foreach_sign(epsilon))
            if diagonals is not None:
                torch._foreach_mul_(epsilon, diagonals)
            self._save(block.weights, block.copies)
            if block.masters:
                torch._foreach_mul_(epsilon, self.rho)
                torch._foreach_copy_(block.weights, torch._foreach_add(block.masters, epsilon))
            else:
                torch._foreach_add_(block.weights, epsilon, alpha=self.rho)

    def _norm_of(
        self, blocks: list[tuple[_Block, list[Tensor]]], order: float, unit: Tensor | None = None
    ) -> Tensor:
        """||T g||_order over all *blocks* and their gradients; with *unit*, computed in multiples of it."""
        norms: list[Tensor] = []
        squares: list[tuple[Tensor, float]] = []
        for block, gradients in blocks:
            if block.scratch is not None:
                squares.append(block.squared_norm(gradients[0]))
                continue
            normalized = block.normalized(gradients, self._diagonals(block))
            if unit is not None:
                divisor = torch.where(unit > 0, unit, 1.0).to(normalized[0].device)
                normalized = torch._foreach_div(normalized, divisor)
            norms += torch._foreach_norm(normalized, order)
        if squares:
            values, factors = zip(*squares)
            norms.append(torch.stack(values).mul_(torch.tensor(factors)).sum().sqrt_())
        norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0]) for n in norms]), order)
        return norm if unit is None else norm * unit

    def _diagonals(self, block: _Block) -> list[Tensor] | None:
        """The diagonal of T for each weight, in at least float32; ``None`` where T = 1."""
        if block.operator == "none":
            return None
        weights = [weight.to(block.working_dtype) for weight in block.masters or block.weights]
        return diagonal(weights, block.operator, self.eta)

    def _copy_of(self, parameter: Tensor) -> Tensor:
        """Memory for a copy of *parameter*, new if that has changed its form since the last step."""
        copy = self._copies.get(parameter)
        form = (parameter.shape, parameter.stride(), parameter.dtype, parameter.device)
        if copy is None or (copy.shape, copy.stride(), copy.dtype, copy.device) != form:
            copy = self._copies[parameter] = _memory_for(parameter)
        return copy

    def _blocks_with_gradients(self) -> list[tuple[_Block, list[Tensor]]]:
        """The weights that have a gradient in blocks, each with its gradients. The blocks of the last step
        serve again unless a tensor has another place or form; the gradients are new, and not kept."""
        present = [w for w in self._parameters if w.grad is not None and w.numel() > 0]
        forms: list[tuple] = [(self.eta, self.p)]
        forms += [
            (id(w), w.data_ptr(), w.shape, w.stride(), w.dtype, w.device, w.grad.stride(), w.grad.dtype)
            for w in present
        ]
        forms += [(m.data_ptr(), m.stride()) for m in map(self._masters.get, present) if m is not None]
        if forms != self._forms:
            self._forms = []
            self._plan(present)
            self._forms = forms
        pieces = [piece for w in present for piece in _pieces(w.grad, self._limits[w])]
        return [(block, [pieces[number] for number in block.numbers]) for block in self._blocks]

    def _plan(self, parameters: list[Tensor]) -> None:
        """Cut *parameters* into pieces, and put these into blocks."""
        self._limits, self._blocks = {}, []
        open_blocks: dict[tuple, _Block] = {}
        shared: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        numbers = itertools.count()
        for parameter in parameters:
            _, operator = self._parameters[parameter]
            masters = [self._masters[parameter].detach()] if parameter in self._masters else []
            tensors = [parameter.detach(), self._copy_of(parameter), *masters]
            on_cpu = parameter.device.type == "cpu"
            size = _CPU_BLOCK if on_cpu else _ACCELERATOR_BLOCK
            flat = all(tensor.is_contiguous() for tensor in (*tensors, parameter.grad))
            flat = flat and operator != "filter-wise"
            self._limits[parameter] = size if flat else None
            dtype = parameter.dtype
            fast = flat and on_cpu and self.p == 2.0 and not masters
            fast = fast and dtype == parameter.grad.dtype in (torch.float32, torch.float64)
            if fast and dtype not in shared:
                shared[dtype] = torch.empty(size, dtype=dtype), torch.tensor(-self.eta, dtype=dtype)
            key = (parameter.device, dtype, operator, len(tensors))
            for pieces in zip(*(_pieces(tensor, self._limits[parameter]) for tensor in tensors)):
                block = open_blocks.get(key)
                # a CPU gains nothing from many tensors in one call
                if block is None or on_cpu or block.size + pieces[0].numel() > size:
                    block = open_blocks[key] = _Block(operator, dtype)
                    self._blocks.append(block)
                block.append(next(numbers), *pieces)
                if fast:
                    scratch, block.minus_eta = shared[dtype]
                    block.scratch = scratch[: block.size]


class _Block:
    """Pieces of weights, copies and masters of one device, dtype and normalization operator, with the numbers
    of these pieces among all.

    A block on a CPU is one piece. If that is flat and in full precision, and p = 2, it has *scratch*, memory
    that all of them share and that stays in the cache, and takes the fewest passes over memory: T^2 is the
    squared error between |w| and -eta, and 2 T g its gradient, and PyTorch has either in one pass."""

    def __init__(self, operator: str, dtype: torch.dtype):
        self.operator = operator
        self.working_dtype = torch.promote_types(dtype, torch.float32)
        self.numbers: list[int] = []
        self.weights: list[Tensor] = []
        self.copies: list[Tensor] = []
        self.masters: list[Tensor] = []
        self.scratch: Tensor | None = None
        self.minus_eta: Tensor | None = None
        self.size = 0

    def append(self, number: int, weight: Tensor, copy: Tensor, *master: Tensor) -> None:
        self.numbers.append(number)
        self.weights.append(weight)
        self.copies.append(copy)
        self.masters += master
        self.size += weight.numel()

    def normalized(self, gradients: list[Tensor], diagonals: list[Tensor] | None) -> list[Tensor]:
        """T g, in at least float32; g itself where *diagonals*, those of T, are ``None``."""
        gradients = [gradient.to(self.working_dtype) for gradient in gradients]
        return gradients if diagonals is None else torch._foreach_mul(gradients, diagonals)

    def squared_norm(self, gradient: Tensor) -> tuple[Tensor, float]:
        """Two factors of ||T g||_2^2, with *scratch*."""
        if self.operator == "none":
            return torch.dot(gradient, gradient), 1.0
        torch.abs(self.weights[0], out=self.scratch)
        aten.mse_loss_backward.grad_input(
            gradient, self.scratch, self.minus_eta, NO_REDUCTION, grad_input=self.scratch
        )
        return torch.dot(self.scratch, self.scratch), 0.25

    def squared_diagonal(self) -> Tensor | None:
        """T^2, in *scratch*; ``None`` where T = 1."""
        if self.operator == "none":
            return None
        torch.abs(self.weights[0], out=self.scratch)
        return aten.mse_loss.out(self.scratch, self.minus_eta, NO_REDUCTION, out=self.scratch)

    def add(self, squares: Tensor | None, gradient: Tensor, scale: float) -> None:
        """Add *scale* T^2 g to the weights."""
        if squares is None:
            self.weights[0].add_(gradient, alpha=scale)
        else:
            self.weights[0].addcmul_(squares, gradient, value=scale)


def _memory_for(weight: Tensor) -> Tensor:
    """Memory for a copy of *weight*."""
    if weight.device.type != "cpu" or not weight.is_contiguous():
        return torch.empty_like(weight, requires_grad=False)
    # A CPU that copies between addresses with the same place in their pages takes them for one another, and
    # waits: begin half a page away from that of the weight.
    itemsize = weight.element_size()
    memory = torch.empty(weight.numel() + _PAGE // itemsize, dtype=weight.dtype)
    start = (weight.data_ptr() + _PAGE // 2 - memory.data_ptr()) % _PAGE // itemsize
    return memory[start : start + weight.numel()].view(weight.shape)


def _pieces(tensor: Tensor, limit: int | None) -> tuple[Tensor, ...]:
    """Flat pieces of *tensor* of at most *limit* elements; without a limit the tensor itself."""
    if limit is None:
        return (tensor,)
    flat = tensor.view(-1)
    return flat.split(limit) if flat.numel() > limit else (flat,)


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
