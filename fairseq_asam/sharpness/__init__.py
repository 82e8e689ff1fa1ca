"""The mathematics of sharpness-aware training. Imports torch and nothing else."""

from .batch_norm import frozen_batch_norm_statistics
from .normalization import NORMALIZATIONS
from .optimizer import SharpnessAware
from .perturbation import Perturbation
from .selection import SELECTIONS, selected_parameters

__all__ = [
    "NORMALIZATIONS",
    "SELECTIONS",
    "Perturbation",
    "SharpnessAware",
    "frozen_batch_norm_statistics",
    "selected_parameters",
]
