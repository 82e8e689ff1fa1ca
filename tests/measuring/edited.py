"""Changed copies of prepared data."""

import shutil
from pathlib import Path


def edited(source: str, folder: Path, edit) -> str:
    """Copy *source* to *folder*, call *edit* with it and return its path."""
    shutil.copytree(source, folder)
    edit(folder)
    return str(folder)
