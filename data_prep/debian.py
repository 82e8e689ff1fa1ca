"""Gets Debian's packages without root, and unpacks them."""

from __future__ import annotations

import io
import lzma
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from data_prep import PreparationError

FETCH_SECONDS = 120
AR_MAGIC = b"!<arch>\n"
AR_HEADER_BYTES = 60


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
        for earlier in folder.glob("*.deb"):  # perhaps of another version
            earlier.unlink()
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


def unpack(package: Path, below: str, folder: Path, name: str) -> None:
    """Write the files of a package that are below a path, without Debian's own programs.

    Args:
        package: A .deb file.
        below: A path from the root of the file system, like "usr/share/doc".
        folder: Stands for that root.
        name: What the package should be, for the messages.

    Raises:
        PreparationError: The file is missing, truncated or no package.
    """
    try:
        content = package.read_bytes()
    except OSError as error:
        raise PreparationError(
            f"{package}: cannot be read ({error.strerror}); name an existing package of {name}."
        ) from None
    try:
        with tarfile.open(fileobj=io.BytesIO(_packed_files(content))) as members:
            for member in members:
                path = PurePosixPath(member.name)
                if member.isfile() and path.is_relative_to(below) and ".." not in path.parts:
                    file = folder / path
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(members.extractfile(member).read())
    except (EOFError, ValueError, lzma.LZMAError, tarfile.TarError, zlib.error):
        raise PreparationError(
            f"{package}: truncated, or no Debian package; get it again with `apt-get download {name}`."
        ) from None


def _packed_files(content: bytes) -> bytes:
    """Return the archive of files in a .deb file, in a form that tarfile reads.

    A .deb file is an archive of the kind that `ar` makes. Its member data.tar.xz (.gz, .zst) has the files.

    Raises:
        ValueError: There is no such member, or not all of it.
    """
    if not content.startswith(AR_MAGIC):
        raise ValueError("no ar archive")
    start = len(AR_MAGIC)
    while header := content[start : start + AR_HEADER_BYTES]:
        name, size = header[:16].decode("ascii").strip(" /"), int(header[48:58])
        start += AR_HEADER_BYTES
        member = content[start : start + size]
        if len(member) < size:
            raise ValueError("truncated")
        if name.startswith("data.tar"):
            return _without_zstd(member) if name.endswith(".zst") else member
        start += size + size % 2  # members begin at even places
    raise ValueError("no data.tar")


def _without_zstd(data: bytes) -> bytes:
    """Return data decompressed from zstd, which Ubuntu's packages have and tarfile reads from Python 3.14."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    try:
        return zstd.decompress(data)
    except zstd.ZstdError as error:
        raise ValueError(str(error)) from None
