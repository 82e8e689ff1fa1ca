"""Sharpness-aware training (SAM and ASAM) for fairseq and for plain PyTorch.

Kwon et al., "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep
Neural Networks", ICML 2021. Equation, section and table numbers in this package are the paper's.

Importing this package needs torch alone. fairseq finds the rest through ``--user-dir fairseq_asam``.
"""

from .sharpness import (
    DIRECTIONS,
    NORMALIZATIONS,
    SELECTIONS,
    Momentum,
    Perturbation,
    Random,
    Region,
    Sharpness,
    SharpnessAware,
    TwoPasses,
    measure,
    selected_parameters,
)

__all__ = [
    "DIRECTIONS",
    "NORMALIZATIONS",
    "SELECTIONS",
    "Momentum",
    "Perturbation",
    "Random",
    "Region",
    "Sharpness",
    "SharpnessAware",
    "TwoPasses",
    "measure",
    "selected_parameters",
]
