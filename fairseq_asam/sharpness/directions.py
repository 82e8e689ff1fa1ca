"""The directions of ascent: what epsilon is made of. Nothing else in the library knows them.

To add one, write a class and name it in :data:`DIRECTIONS`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .moments import first_moments
from .shards import are_whole, is_sharded, local, local_gradient, part_of

#: Returns what an optimizer keeps for each weight.
Read = Callable[[Any], Mapping[Tensor, Tensor]]


class Direction:
    """What takes the place of the gradient g in the formula of :class:`~fairseq_asam.Perturbation`.

    All directions are made with the same arguments. Each uses those that it needs.

    Args:
        optimizer: the base optimizer.
        of_weights: called with :meth:`kept_by` and *optimizer*, returns what *optimizer* keeps for the
            weights of the perturbation, if it steps others, such as float32 masters. By default it steps the
            same.
        seed: of random numbers.
        number: returns the number of the update, which decides the random numbers together with *seed*. By
            default, each entry into the block of the perturbation counts as an update.

    Attributes:
        meaning: what epsilon is made of, in a few words for help pages.
        needs_pass_at_w: whether g is made of the gradients at w. Otherwise an update makes one pass, at
            w + epsilon.
        needs_optimizer: whether g is made of what the base optimizer keeps of every weight.
        number: the argument; may be set later.

    Raises:
        ValueError: *optimizer* does not keep what the direction needs.
    """

    meaning: ClassVar[str]
    needs_pass_at_w: ClassVar[bool] = False
    needs_optimizer: ClassVar[bool] = False

    def __init__(
        self,
        optimizer: Any = None,
        *,
        of_weights: Callable[[Read, Any], Mapping[Tensor, Tensor]] | None = None,
        seed: int = 0,
        number: Callable[[], int] | None = None,
    ):
        self.optimizer, self.seed = optimizer, seed
        self._of_weights, self.number, self._entries = of_weights, number, 0
        if self.needs_optimizer:
            self.kept()

    def sign(self, maximize: bool) -> float:
        """Return 1 if g is :meth:`vectors`, and -1 if it is minus these.

        Args:
            maximize: whether the objective is to be maximized.
        """
        return 1.0

    def vectors(self, weights: Mapping[Tensor, str]) -> dict[Tensor, Tensor]:
        """Return g without its sign for each of *weights* to be perturbed: of shards, this process's part.

        Args:
            weights: those of the perturbation that require a gradient, and their names.
        """
        raise NotImplementedError

    @staticmethod
    def kept_by(optimizer: Any) -> Mapping[Tensor, Tensor]:
        """Return what g is made of, for each weight that *optimizer* has stepped.

        Raises:
            ValueError: *optimizer* keeps nothing of the kind.
        """
        raise NotImplementedError

    def kept(self) -> Mapping[Tensor, Tensor]:
        """Return what the base optimizer keeps, for the weights of the perturbation that it has stepped.

        Raises:
            ValueError: it keeps nothing of the kind, or none was given.
        """
        if self.optimizer is None:
            name = type(self).__name__
            raise ValueError(f"{name} is made of what the base optimizer keeps: pass it, {name}(optimizer)")
        if self._of_weights is None:
            return self.kept_by(self.optimizer)
        return self._of_weights(self.kept_by, self.optimizer)

    def next_number(self) -> int:
        """Return the number of the update. Call it once for each entry into the block."""
        if self.number is not None:
            return self.number()
        self._entries += 1
        return self._entries - 1


class Gradient(Direction):
    """The gradient at w, from ``.grad``: SAM and ASAM."""

    meaning = "the gradient at w"
    needs_pass_at_w = True

    def sign(self, maximize: bool) -> float:
        return -1.0 if maximize else 1.0

    def vectors(self, weights: Mapping[Tensor, str]) -> dict[Tensor, Tensor]:
        """Return this process's part of the gradient of each of *weights* that has one.

        Raises:
            RuntimeError: none has a gradient.
            ValueError: a gradient is sparse, or is whole while its weight is in shards.
        """
        vectors = {weight: g for weight in weights if (g := weight.grad) is not None}
        # Look at all of them at once, which is quicker: there are hundreds.
        if {g.layout for g in vectors.values()} - {torch.strided}:
            sparse = next(weights[w] for w, g in vectors.items() if g.layout != torch.strided)
            raise ValueError(
                f"the gradient of {sparse} is sparse, which sharpness-aware training does not support: use "
                "a dense gradient (for nn.Embedding, sparse=False)"
            )
        if not are_whole([*vectors, *vectors.values()]):
            vectors = {weight: local_gradient(g, weight, weights[weight]) for weight, g in vectors.items()}
        if not vectors:
            what = "no parameter has a gradient"
            if any(map(is_sharded, weights)):
                what += " (set_requires_gradient_sync(False) leaves shards without)"
            raise RuntimeError(
                f"{what}: call backward() at w before entering the block, or make no update for a batch that "
                "you skip"
            )
        return vectors


class Momentum(Direction):
    """Minus the first moment of the base optimizer: Momentum-SAM (Becker et al., arXiv 2401.12033).

    A weight without a moment, as before its first step, is not perturbed.
    """

    meaning = "minus the base optimizer's first moment (Momentum-SAM, arXiv 2401.12033)"
    needs_optimizer = True
    kept_by = staticmethod(first_moments)

    def sign(self, maximize: bool) -> float:
        return -1.0  # minus the moment is where the optimizer goes, whether it minimizes or maximizes

    def vectors(self, weights: Mapping[Tensor, str]) -> dict[Tensor, Tensor]:
        moments = self.kept()
        return {weight: local(moments[weight]) for weight in weights if weight in moments}


class Random(Direction):
    """A Gaussian vector, drawn anew in each update: the control for directions that know of the loss.

    All weights that require a gradient get one, also those that the loss does not depend on. For the i-th of
    them in update n, both from 0, ``torch.randn`` draws it in float32, on the weight's device, from a
    generator that :func:`seed_of` ``(seed, n, i)`` seeds. Processes with the same kind of device thus draw
    the same, as a resumed run does, and of a weight in shards each takes its part. torch's own generators,
    from which dropout masks come, are left alone.
    """

    meaning = "a Gaussian vector, drawn anew in each update from --seed"

    def vectors(self, weights: Mapping[Tensor, str]) -> dict[Tensor, Tensor]:
        number = self.next_number()
        return {weight: part_of(self._draw(weight, number, i), weight) for i, weight in enumerate(weights)}

    def _draw(self, weight: Tensor, number: int, index: int) -> Tensor:
        device = local(weight).device
        generator = torch.Generator(device).manual_seed(seed_of(self.seed, number, index))
        drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float32, device=device)
        return drawn.to(torch.promote_types(weight.dtype, torch.float32))


#: The directions by name.
DIRECTIONS: Mapping[str, type[Direction]] = {"gradient": Gradient, "momentum": Momentum, "random": Random}


def meanings() -> str:
    """Return what each direction is, for help pages."""
    each = "; ".join(f"{name}: {direction.meaning}" for name, direction in DIRECTIONS.items())
    one_pass = [name for name, direction in DIRECTIONS.items() if not direction.needs_pass_at_w]
    return f"{each}; an update costs one pass with {' or '.join(one_pass)}"


def seed_of(*numbers: int) -> int:
    """Return a seed for *numbers*: the first 64 bits of the SHA-256 of them, joined by spaces.

    A sum is not enough: fairseq seeds dropout masks with the sum of seed and update, and update 2 of a run
    with seed 1 would then draw what update 1 draws with seed 2.
    """
    return int(hashlib.sha256(" ".join(map(str, numbers)).encode()).hexdigest()[:16], 16)
