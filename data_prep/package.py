"""Gets the dictionary: from Debian's package trans-de-en, without root, or from a local file."""

from __future__ import annotations

import gzip
import subprocess
import tempfile
from pathlib import Path

from data_prep import PreparationError

PACKAGE = "trans-de-en"
INSIDE = "usr/share/trans/de-en"
INSTALLED = Path("/", INSIDE)
FETCH_SECONDS = 120


class Unavailable(Exception):
    """The package is neither installed nor to be had here; the message says why."""


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
        return dictionary_from(_downloaded(Path(folder)))


def _downloaded(folder: Path) -> Path:
    """Downloads the package into `folder`, at need with package lists of our own in there."""
    for part in ("lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True)
    patience = ["-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20"]
    private = ["-o", f"Dir::State::Lists={folder}/lists", "-o", f"Dir::Cache={folder}/cache"]
    attempts = [
        [["apt-get", *patience, "download", PACKAGE]],
        [["apt-get", *patience, *private, "update"], ["apt-get", *patience, *private, "download", PACKAGE]],
    ]
    reason = "apt-get brought nothing"
    for commands in attempts:
        try:
            for command in commands:
                subprocess.run(
                    command, cwd=folder, check=True, capture_output=True, text=True, timeout=FETCH_SECONDS
                )
        except FileNotFoundError:
            raise Unavailable("there is no apt-get here") from None
        except subprocess.TimeoutExpired:
            reason = f"apt-get took longer than {FETCH_SECONDS} s"
        except subprocess.CalledProcessError as error:
            reason = "apt-get: " + (error.stderr.strip().rpartition("\n")[2] or "no message")
        packages = list(folder.glob("*.deb"))
        if packages:
            return packages[0]
    raise Unavailable(reason)


def _unpacked(package: Path) -> str:
    with package.open("rb"), tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(["dpkg-deb", "-x", package, folder], check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise PreparationError(
                f"{package}: unpacking needs dpkg-deb, which isn't here; unpack it elsewhere and give its "
                f"file {INSIDE} after --package."
            ) from None
        except subprocess.CalledProcessError:
            raise PreparationError(
                f"{package}: truncated, or no Debian package; get it again with `apt-get download {PACKAGE}`."
            ) from None
        dictionary = Path(folder, INSIDE)
        if not dictionary.is_file():
            raise PreparationError(
                f"{package}: holds no {INSIDE}; get the right one with `apt-get download {PACKAGE}`."
            )
        return dictionary.read_text(encoding="utf-8")
