"""The options that the integrations share."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from fairseq_asam import DIRECTIONS, NORMALIZATIONS, Perturbation, SharpnessAware
from fairseq_asam.sharpness.late_start import validate_start
from fairseq_asam.sharpness.moments import ADAM, second_moments
from fairseq_asam.sharpness.perturbation import validate

#: What has an epsilon of its own: an update, or each of the micro-batches that it accumulates.
SCOPES = ("update", "micro-batch")


@dataclass(frozen=True)
class Settings:
    """The options of a sharpness-aware update.

    Attributes:
        rho: radius of the maximization region, >= 0. 0: plain updates, bit for bit.
        eta, p, normalize_bias: of :class:`~fairseq_asam.Perturbation`.
        normalization: a key of :data:`~fairseq_asam.NORMALIZATIONS`, or ``adam``; ``none`` is SAM.
        direction: what epsilon is made of, a key of :data:`~fairseq_asam.DIRECTIONS`. An update is one pass
            with ``momentum`` and ``random``.
        ascent_from: plain updates before; below 1 the share of all updates that are plain, from 1 on their
            number (arXiv 2410.10373).
        ascent_scope: ``update``: one epsilon for an update, from the mean gradient over its micro-batches
            and processes. ``micro-batch``: each micro-batch of each process has its own (m-sharpness).

    Raises:
        ValueError: a value is not allowed.
    """

    rho: float
    eta: float = 0.01
    p: float = 2.0
    normalization: str = "element-wise"
    normalize_bias: bool = False
    direction: str = "gradient"
    ascent_from: float = 0.0
    ascent_scope: str = "update"

    def __post_init__(self):
        validate(rho=self.rho, eta=self.eta, p=self.p)
        validate_start(self.ascent_from)
        for name, allowed in (
            ("normalization", [*NORMALIZATIONS, ADAM]),
            ("direction", DIRECTIONS),
            ("ascent_scope", SCOPES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but it must be one of {', '.join(allowed)}"
                )
        if self.ascent_scope != "update" and not DIRECTIONS[self.direction].needs_pass_at_w:
            raise ValueError(
                f"ascent_scope is {self.ascent_scope!r}, but direction {self.direction!r} makes one epsilon "
                "for the update: choose ascent_scope='update', or direction='gradient'"
            )

    def perturbation(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, number: Callable[[], int]
    ) -> Perturbation:
        """Return the perturbation of the weights of *model*.

        Args:
            model: has the weights.
            optimizer: steps them, and keeps the moments that some options need.
            seed: of random directions.
            number: returns the number of the update.

        Raises:
            ValueError: *optimizer* cannot be made sharpness-aware with these options.
        """
        options = {name: getattr(self, name) for name in ("eta", "p", "normalization", "normalize_bias")}
        direction = DIRECTIONS[self.direction](optimizer, seed=seed, number=number)
        # SharpnessAware knows which base optimizers will do.
        perturbation = SharpnessAware(
            optimizer, model.named_parameters(), self.rho, direction=direction, **options
        ).perturbation
        perturbation.maximize = any(group.get("maximize") for group in optimizer.param_groups)
        return perturbation

    def refuse_without_moments(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise ValueError if *optimizer* keeps no moments that the options need.

        A new optimizer keeps nothing yet. So one like it steps a weight that nobody else has.
        """
        if not (DIRECTIONS[self.direction].needs_optimizer or self.normalization == ADAM):
            return
        group = optimizer.param_groups[0]
        weight = nn.Parameter(torch.zeros(2, 2, device=group["params"][0].device))
        weight.grad = torch.zeros_like(weight)
        probe = copy.copy(optimizer)
        probe.state, probe.param_groups = defaultdict(dict), [{**group, "params": [weight]}]
        probe.step()
        if DIRECTIONS[self.direction].needs_optimizer:
            DIRECTIONS[self.direction](probe)
        if self.normalization == ADAM:
            second_moments(probe)
