"""Gets the dictionary: from Debian's package trans-de-en, without root, or from a local file."""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path

from data_prep import PreparationError
from data_prep.debian import download, unpack

PACKAGE = "trans-de-en"
INSIDE = "usr/share/trans/de-en"
INSTALLED = Path("/", INSIDE)


def dictionary_from(file: Path) -> list[str]:
    """The lines of the dictionary in `file`: a package (.deb), a gzipped (.gz) or a plain dictionary.

    Raises PreparationError where the file is missing, truncated or something else.
    """
    try:
        if file.suffix == ".deb":
            text = _unpacked(file)
        elif file.suffix == ".gz":
            text = gzip.decompress(file.read_bytes()).decode()
        else:
            text = file.read_text(encoding="utf-8")
    except (EOFError, gzip.BadGzipFile) as error:
        raise PreparationError(f"{file}: damaged or truncated ({error}); get it again.") from None
    except UnicodeDecodeError:
        raise PreparationError(f"{file}: not UTF-8 text; give a .deb, a .gz or a plain dictionary.") from None
    except OSError as error:
        raise PreparationError(
            f"{file}: cannot be read ({error.strerror}); give an existing file after --package, "
            "or leave it out to fetch the package."
        ) from None
    lines = text.splitlines()
    if not any(" :: " in line for line in lines):
        raise PreparationError(f"{file}: no dictionary, for no line reads `German :: English`.")
    return lines


def fetched_dictionary() -> list[str]:
    """The lines of the installed dictionary, or else of the package that apt-get downloads.

    Raises Unavailable where there is no apt-get, no network or no such package.
    """
    if INSTALLED.exists():
        return dictionary_from(INSTALLED)
    with tempfile.TemporaryDirectory() as folder:
        return dictionary_from(*download([PACKAGE], Path(folder)))


def _unpacked(package: Path) -> str:
    with tempfile.TemporaryDirectory() as folder:
        unpack(package, Path(folder), PACKAGE)
        dictionary = Path(folder, INSIDE)
        if not dictionary.is_file():
            raise PreparationError(
                f"{package}: holds no {INSIDE}; get the right one with `apt-get download {PACKAGE}`."
            )
        return dictionary.read_text(encoding="utf-8")
