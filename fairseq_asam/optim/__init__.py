"""The fairseq optimizers ``asam``, ``sam`` and their variants. Importing this package registers them."""

from .optimizers import SHARPNESS_AWARE, sharpness_aware_optimizer
from .options import validate_config

__all__ = ["SHARPNESS_AWARE", "sharpness_aware_optimizer", "validate_config"]
