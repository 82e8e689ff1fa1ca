"""The fairseq optimizers ``asam`` and ``sam``; importing this package registers them."""

from .sharpness_aware import OPTIMIZERS, SharpnessAwareOptimizer, sharpness_aware, validate_config

__all__ = ["OPTIMIZERS", "SharpnessAwareOptimizer", "sharpness_aware", "validate_config"]
