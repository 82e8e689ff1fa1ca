"""Preparation of corpora: the help of LibreOffice, IWSLT'14, files of your own, and a generated one."""


class PreparationError(Exception):
    """What keeps a corpus from being prepared, in one sentence for the user."""
