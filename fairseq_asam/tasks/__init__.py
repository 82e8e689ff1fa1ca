"""What fairseq loads of a ``--user-dir``: imported by it, or by ``import fairseq_asam.tasks`` in a program."""

from . import checkpoints, sharpness_aware

__all__ = ["checkpoints", "sharpness_aware"]
