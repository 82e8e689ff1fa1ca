"""Gets Debian's packages without root, and unpacks them."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from data_prep import PreparationError

FETCH_SECONDS = 120


class Unavailable(Exception):
    """Packages cannot be had here; the message says why."""


def download(packages: Sequence[str], folder: Path) -> list[Path]:
    """Download packages with apt-get, which checks them against Debian's signatures.

    Args:
        packages: Names of packages.
        folder: Where to put them. It also gets package lists, where the machine's own do not suffice.

    Returns:
        The file of each package.

    Raises:
        Unavailable: There is no apt-get, no network or no such package.
    """
    for part in ("lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True)
    patience = ["-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20"]
    private = ["-o", f"Dir::State::Lists={folder}/lists", "-o", f"Dir::Cache={folder}/cache"]
    attempts = [
        [["apt-get", *patience, "download", *packages]],
        [["apt-get", *patience, *private, "update"], ["apt-get", *patience, *private, "download", *packages]],
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
        files = [file for name in packages for file in folder.glob(f"{name}_*.deb")]
        if len(files) == len(packages):
            return files
    raise Unavailable(reason)


def unpack(package: Path, folder: Path, name: str) -> None:
    """Unpack the files of `package` into `folder`.

    Args:
        package: A .deb file.
        folder: Where the package's files go, as below the root of a file system.
        name: What the package should be, for the messages.

    Raises:
        PreparationError: The file is missing, truncated or no package, or dpkg-deb is missing.
    """
    try:
        package.open("rb").close()
    except OSError as error:
        raise PreparationError(
            f"{package}: cannot be read ({error.strerror}); name an existing package of {name}."
        ) from None
    try:
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise PreparationError(
            f"{package}: dpkg-deb is not here to unpack it; unpack it elsewhere and give that folder."
        ) from None
    except subprocess.CalledProcessError:
        raise PreparationError(
            f"{package}: truncated, or no Debian package; get it again with `apt-get download {name}`."
        ) from None
