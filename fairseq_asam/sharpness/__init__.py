"""The mathematics of sharpness-aware training. Imports torch and nothing else."""

from .normalization import NORMALIZATIONS
from .optimizer import SharpnessAware
from .perturbation import Perturbation

__all__ = ["NORMALIZATIONS", "Perturbation", "SharpnessAware"]
