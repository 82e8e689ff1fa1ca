"""The fairseq optimizers ``asam``, ``sam`` and their kin; importing this package registers them."""

from .sharpness_aware import (
    OPTIMIZERS,
    SharpnessAwareOptimizer,
    model_parameters,
    sharpness_aware_optimizer,
    validate_config,
)

__all__ = [
    "OPTIMIZERS",
    "SharpnessAwareOptimizer",
    "model_parameters",
    "sharpness_aware_optimizer",
    "validate_config",
]
