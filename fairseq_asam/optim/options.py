"""The options of the optimizers. Their help is also the table of flags in README.md."""

import math
from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass

from fairseq_asam.sharpness import DIRECTIONS, NORMALIZATIONS, SELECTIONS
from fairseq_asam.sharpness.directions import Direction, meanings
from fairseq_asam.sharpness.late_start import validate_start
from fairseq_asam.sharpness.moments import ADAM
from fairseq_asam.sharpness.perturbation import validate

# No "from __future__ import annotations" here: fairseq's parser needs types, not their names.


_RHO = {"help": "radius of the maximization region (default: the paper's for translation, Section 5.3)"}


@dataclass
class SAMConfig(FairseqDataclass):
    """The options of ``--optimizer sam``, beside those of the base optimizer."""

    rho: float = field(default=0.1, metadata=_RHO)
    p_norm: float = field(
        default=2.0,
        metadata={"help": "norm that bounds the region, 1 < p <= inf (Section 5.2 finds 2 best)"},
    )
    ascent_scope: ChoiceEnum(["update", "micro-batch"]) = field(  # type: ignore[valid-type]
        default="update",
        metadata={
            "help": "what shares one epsilon: the whole update, over all its micro-batches and workers "
            "(Algorithm 1), or each micro-batch of each worker (m-sharpness, Section 5.2)"
        },
    )
    perturbed_weights: ChoiceEnum(list(SELECTIONS)) = field(  # type: ignore[valid-type]
        default="all",
        metadata={
            "help": "weights that epsilon moves (the paper: all; SAM-ON, arXiv 2306.04226: "
            "normalization-layers)"
        },
    )
    fresh_masks: bool = field(
        default=False,
        metadata={
            "help": "draw new dropout masks for the pass at w + epsilon; by default both passes use the same"
        },
    )
    ascent_direction: ChoiceEnum(list(DIRECTIONS)) = field(  # type: ignore[valid-type]
        default="gradient",
        metadata={"help": f"what epsilon is made of; {meanings()}"},
    )
    ascent_from: float = field(
        default=0.0,
        metadata={
            "help": "number of the first sharpness-aware update, or, below 1, the share of all updates "
            "(--max-epoch, --max-update) before it; those before are plain updates of the base optimizer and "
            "cost one pass (late start, arXiv 2410.10373)"
        },
    )
    ascent_fraction: float = field(
        default=1.0,
        metadata={
            "help": "compute epsilon from this share of the sentences of each batch, redrawn every update; "
            "an update costs 1 + this many passes (arXiv 2110.08529)"
        },
    )
    ascent_interval: int = field(
        default=1,
        metadata={
            "help": "make both passes in every N-th update only, and reuse what they found in the others; "
            "an update costs 1 + 1/N passes (LookSAM, arXiv 2203.02714)"
        },
    )
    ascent_reuse: Optional[float] = field(
        default=None,
        metadata={
            "help": "with --ascent-interval, the length of the reused component relative to the gradient "
            "(LookSAM's alpha, 0.7); by default the tangent of the angle between the gradients at w and "
            "w + epsilon when both were last computed, at most 1"
        },
    )


@dataclass
class ASAMConfig(SAMConfig):
    """The options of ``--optimizer asam``, beside those of the base optimizer."""

    rho: float = field(default=0.2, metadata=_RHO)
    eta: float = field(
        default=0.01,
        metadata={"help": "added to the normalization operator for stability (Section 3)"},
    )
    normalization: ChoiceEnum([*NORMALIZATIONS, ADAM]) = field(  # type: ignore[valid-type]
        default="element-wise",
        metadata={
            "help": "normalization operator T_w (Section 3, Equation 5); none is SAM, layer-wise takes the "
            "l2 norm of the whole weight; adam is (sqrt(v_hat) + eps)^(-1/2) of Adam's second moment, for "
            "biases too (arXiv 2502.02407)"
        },
    )
    normalize_bias: bool = field(
        default=False,
        metadata={"help": "normalize biases too (Section 5.2; Figure 4 shows no gain from it)"},
    )


def region(cfg: Any) -> dict[str, Any]:
    """Return the maximization region of *cfg* as arguments of ``Perturbation``, but for Adam's metric.

    ``sam`` has T = 1.
    """
    normalization = "none" if in_adams_metric(cfg) else str(getattr(cfg, "normalization", "none"))
    return {"rho": cfg.rho, "p": cfg.p_norm, "eta": getattr(cfg, "eta", 0.0), "normalization": normalization}


def direction_of(cfg: Any) -> type[Direction]:
    """Return the class of what epsilon is made of."""
    return DIRECTIONS[str(cfg.ascent_direction)]


def in_adams_metric(cfg: Any) -> bool:
    """Return whether T is that of the base optimizer's second moment."""
    return str(getattr(cfg, "normalization", None)) == ADAM


def validate_config(cfg: Any) -> None:
    """Check the values of *cfg*.

    Raises:
        ValueError: an option is out of range, in one sentence.
    """
    validate(**region(cfg))
    validate_start(cfg.ascent_from)
    fraction, interval, reuse = cfg.ascent_fraction, cfg.ascent_interval, cfg.ascent_reuse
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"--ascent-fraction is {fraction}, but it must be greater than 0 and at most 1")
    if interval < 1:
        raise ValueError(f"--ascent-interval is {interval}, but it must be at least 1 (LookSAM: 5)")
    if reuse is not None and not 0.0 <= reuse < math.inf:
        raise ValueError(f"--ascent-reuse is {reuse}, but it must be a finite number >= 0 (LookSAM: 0.7)")
    if not direction_of(cfg).needs_pass_at_w:
        others = {
            "--ascent-scope micro-batch": str(cfg.ascent_scope) == "micro-batch",
            "--fresh-masks": cfg.fresh_masks,
            "--ascent-fraction": fraction < 1.0,
            "--ascent-interval": interval > 1,
        }
        for flag, given in others.items():
            if given:
                raise ValueError(
                    f"{flag} does not go with --ascent-direction {cfg.ascent_direction}, which makes no pass "
                    "at w: use one of them"
                )
    if fraction < 1.0 and interval > 1:
        raise ValueError(
            "--ascent-fraction does not go with --ascent-interval: what LookSAM reuses is the difference of "
            "two gradients of the same sentences; use one of them"
        )
