"""The mathematics of sharpness-aware training. Imports torch and nothing else."""

from .normalization import NORMALIZATIONS
from .optimizer import SharpnessAware
from .perturbation import Perturbation
from .selection import SELECTIONS, selected_parameters

__all__ = ["NORMALIZATIONS", "SELECTIONS", "Perturbation", "SharpnessAware", "selected_parameters"]
