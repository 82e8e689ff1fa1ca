"""The mathematics of sharpness-aware training. Imports torch and nothing else."""

from .batch_norm import frozen_batch_norm_statistics
from .measure import Region, Sharpness, measure
from .normalization import NORMALIZATIONS
from .optimizer import SharpnessAware
from .perturbation import Perturbation
from .selection import SELECTIONS, selected_parameters

__all__ = [
    "NORMALIZATIONS",
    "SELECTIONS",
    "Perturbation",
    "Region",
    "Sharpness",
    "SharpnessAware",
    "frozen_batch_norm_statistics",
    "measure",
    "selected_parameters",
]
