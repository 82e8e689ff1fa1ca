"""The mathematics of sharpness-aware training. It imports torch and nothing else."""

from .directions import DIRECTIONS, Momentum, Random
from .measure import Region, Sharpness, measure
from .normalization import NORMALIZATIONS
from .optimizer import SharpnessAware
from .perturbation import Perturbation
from .selection import SELECTIONS, selected_parameters
from .two_passes import TwoPasses

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
