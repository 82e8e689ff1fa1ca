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


def _option(default: Any, help: str) -> Any:
    """Return a field whose help ends in its default."""
    text = f"{default:g}" if isinstance(default, (int, float)) else default
    if default is not None and not isinstance(default, bool):
        help += f" (default: {text})"
    return field(default=default, metadata={"help": help})


_RHO = "radius of the maximization region; the paper uses 0.1 for sam and 0.2 for asam (Section 5.3)"


@dataclass
class SAMConfig(FairseqDataclass):
    """The options of ``--optimizer sam``, beside those of the base optimizer."""

    rho: float = _option(0.1, _RHO)
    ascent_direction: ChoiceEnum(list(DIRECTIONS)) = _option(  # type: ignore[valid-type]
        "gradient", f"what epsilon is made of; {meanings()}"
    )
    ascent_from: float = _option(
        0.0,
        "number of the first sharpness-aware update, or, below 1, the share of updates before it (of "
        "--max-epoch or --max-update); these are plain steps of the base optimizer and cost one pass (late "
        "start, arXiv 2410.10373)",
    )
    ascent_fraction: float = _option(
        1.0,
        "compute epsilon from this share of the sentences of each batch, drawn anew in every update; an "
        "update costs 1 + this many passes (arXiv 2110.08529)",
    )
    ascent_interval: int = _option(
        1,
        "make both passes in every N-th update only, and reuse their result in the others; an update costs "
        "1 + 1/N passes (LookSAM, arXiv 2203.02714)",
    )
    ascent_reuse: Optional[float] = _option(
        None,
        "with --ascent-interval: length of the reused component, relative to the gradient (LookSAM's alpha, "
        "0.7); without it the tangent of the angle between both gradients of the last such update, at most 1",
    )
    ascent_scope: ChoiceEnum(["update", "micro-batch"]) = _option(  # type: ignore[valid-type]
        "update",
        "what shares one epsilon: the whole update, with all micro-batches and workers (Algorithm 1), or "
        "each micro-batch of each worker (m-sharpness, Section 5.2)",
    )
    perturbed_weights: ChoiceEnum(list(SELECTIONS)) = _option(  # type: ignore[valid-type]
        "all",
        "weights that epsilon moves; the paper moves all, SAM-ON (arXiv 2306.04226) those of the "
        "normalization layers",
    )
    fresh_masks: bool = _option(
        False,
        "draw new dropout masks for the pass at w + epsilon; without this flag both passes use the same",
    )
    p_norm: float = _option(
        2.0, "order of the norm that bounds the region, 1 < p <= inf; Section 5.2 finds 2 best"
    )


@dataclass
class ASAMConfig(SAMConfig):
    """The options of ``--optimizer asam``, beside those of the base optimizer."""

    rho: float = _option(0.2, _RHO)
    normalization: ChoiceEnum([*NORMALIZATIONS, ADAM]) = _option(  # type: ignore[valid-type]
        "element-wise",
        "normalization operator T_w (Section 3, Equation 5); none is SAM; filter-wise differs from "
        "element-wise in convolutions only; layer-wise takes the l2 norm of the whole weight; adam is "
        "(sqrt(v_hat) + eps)^(-1/2) of Adam's second moment, for biases too (arXiv 2502.02407)",
    )
    eta: float = _option(0.01, "added to the normalization operator for stability (Section 3)")
    normalize_bias: bool = _option(
        False, "normalize biases too (Section 5.2); Figure 4 shows no gain from it"
    )


def region(cfg: Any) -> dict[str, Any]:
    """Return the maximization region of *cfg*, without Adam's metric, as arguments of ``Perturbation``.

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
    if reuse is not None and interval == 1:
        raise ValueError(
            f"--ascent-reuse is {reuse:g}, but nothing is reused without --ascent-interval: add "
            "--ascent-interval 5, or drop --ascent-reuse"
        )
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
