"""What fairseq imports of a ``--user-dir``. A program of your own imports it by name."""

from . import checkpoints, hooks

__all__ = ["checkpoints", "hooks"]
