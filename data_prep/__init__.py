"""Preparation of the German-English corpora: the embedded dictionary corpus and a generated one."""


class PreparationError(Exception):
    """What keeps a corpus from being prepared, in one sentence for the user."""
