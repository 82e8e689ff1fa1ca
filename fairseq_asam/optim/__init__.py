"""The fairseq optimizers ``asam``, ``sam`` and their kin; importing this package registers them."""

from .sharpness_aware import (
    OPTIMIZERS,
    SharpnessAwareOptimizer,
    master_weights,
    model_parameters,
    sharpness_aware,
    validate_config,
)

__all__ = [
    "OPTIMIZERS",
    "SharpnessAwareOptimizer",
    "master_weights",
    "model_parameters",
    "sharpness_aware",
    "validate_config",
]
