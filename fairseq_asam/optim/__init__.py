"""The fairseq optimizers ``asam`` and ``sam``; importing this package registers them."""

from .sharpness_aware import SharpnessAwareOptimizer, sharpness_aware

__all__ = ["SharpnessAwareOptimizer", "sharpness_aware"]
