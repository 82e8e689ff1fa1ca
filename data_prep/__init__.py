"""Preparation of the German-English corpora: the help of LibreOffice, a generated one, and IWSLT'14."""


class PreparationError(Exception):
    """What keeps a corpus from being prepared, in one sentence for the user."""
