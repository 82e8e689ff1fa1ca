"""What fairseq imports of a ``--user-dir``. A program of your own imports it by name."""

from . import checkpoints, sharpness_aware

__all__ = ["checkpoints", "sharpness_aware"]
