"""fairseq_asam as a fairseq plugin: importing this package changes fairseq and registers the optimizers.

fairseq imports the folder ``tasks`` of a ``--user-dir``, which gives this package its name. A program of your
own, or a second ``--user-dir``, imports ``fairseq_asam.tasks``.
"""

from . import checkpoints, hooks

__all__ = ["checkpoints", "hooks"]
