"""fairseq_asam as a fairseq plugin: importing this package changes fairseq and registers the optimizers.

``patches.py`` has what it replaces, and ``checkpoints.py`` the types that torch may load.

fairseq imports the folder ``tasks`` of a ``--user-dir``, which gives this package its name. A program of your
own, or a second ``--user-dir``, imports ``fairseq_asam.tasks``.
"""

from .patches import apply_patches

apply_patches()
