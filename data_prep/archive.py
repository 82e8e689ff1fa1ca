"""The public archive of IWSLT'14 DE-EN: its download, and the files in it that are needed."""

from __future__ import annotations

import gzip
import hashlib
import http
import http.client
import json
import re
import shutil
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from data_prep import PreparationError
from data_prep.segmentation import write_whole

URL = "http://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz"
PATIENCE_SECONDS = 30
BLOCK_BYTES = 1 << 16
GZIP_MAGIC = b"\x1f\x8b"
NAMED_PAIR = re.compile(r"train\.tags\.(\w+-\w+)\.")


def fingerprint(file: Path) -> dict[str, int | str]:
    """Return the size of `file` in bytes and its SHA-256."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(BLOCK_BYTES):
            digest.update(block)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def fetch(url: str, file: Path) -> None:
    """Download `url` to `file`, unless it is there, and go on where a download was cut off before.

    The size and SHA-256 that the file had at first sight are written to `file`.json.

    Raises:
        PreparationError: The download fails, or the file is not what it was at first sight.
    """
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(file.name + ".partial")
        try:
            _download(url, partial)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise PreparationError(
                f"{url}: cannot be downloaded ({reason}); run the same command again to go on, "
                "or get the archive elsewhere and give it after --archive."
            ) from None
        partial.replace(file)
    record = file.with_name(file.name + ".json")
    found = fingerprint(file)
    if not record.exists():
        write_whole(record, [json.dumps(found, indent=2) + "\n"])
    elif json.loads(record.read_text(encoding="utf-8")) != found:
        raise PreparationError(
            f"{file}: isn't what it was at first sight, for its size or SHA-256 differs from {record}; "
            "remove the archive to download it again, or the record too if you trust the archive."
        )


def _download(url: str, partial: Path) -> None:
    """Append to `partial` what is missing of `url`; raise OSError or HTTPException where it cannot."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=PATIENCE_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        if error.headers.get("Content-Range") != f"bytes */{have}":
            partial.unlink()  # more than the server has
            raise
        return
    with response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            have = 0  # the server sends all of it
        length = response.headers["Content-Length"]  # None of an answer in chunks
        total = None if length is None else have + int(length)
        bar = tqdm(desc="downloading", disable=None, total=total, initial=have, unit="B", unit_scale=True)
        with bar, partial.open("ab" if have else "wb") as output:
            while block := response.read(BLOCK_BYTES):
                output.write(block)
                bar.update(len(block))
    if total is not None and partial.stat().st_size != total:
        raise ConnectionError(f"cut off after {partial.stat().st_size} of {total} bytes")
    with partial.open("rb") as content:
        if content.read(len(GZIP_MAGIC)) != GZIP_MAGIC:
            partial.unlink()
            raise ConnectionError("what came is no .tgz archive, but perhaps the page of a login")


def extract(archive: Path, names: Collection[str], pair: str, folder: Path) -> None:
    """Write some files of a .tgz archive to a folder.

    Args:
        archive: The archive.
        names: The files wanted.
        pair: The folder of the archive that they are in, like "de-en".
        folder: Where to write them.

    Raises:
        PreparationError: The archive cannot be read, is damaged, holds links, devices or paths that leave
            the folder, or lacks one of the files.
    """
    missing, others = set(names), set()
    record = archive.with_name(archive.name + ".json")
    again = f"get it again from {URL}"
    if record.exists():
        again = f"remove it and {record}, to download it again"
    try:
        with gzip.open(archive) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as members:
                for member in members:
                    path = PurePosixPath(member.name)
                    if path.is_absolute() or ".." in path.parts:
                        raise PreparationError(
                            f"{archive}: the path {member.name!r} in it leaves its folder; "
                            f"get the archive from {URL}."
                        )
                    if not (member.isfile() or member.isdir()):
                        raise PreparationError(
                            f"{archive}: {member.name!r} in it is a link or a device, where only files and "
                            f"folders are allowed; get the archive from {URL}."
                        )
                    if path.parent == PurePosixPath(pair) and path.name in missing and member.isfile():
                        with (folder / path.name).open("wb") as output:
                            shutil.copyfileobj(members.extractfile(member), output)
                        missing.remove(path.name)
                    others.update(NAMED_PAIR.findall(member.name))
            while stream.read(BLOCK_BYTES):  # to the checksum, at the end
                pass
    except (EOFError, gzip.BadGzipFile, tarfile.TarError, zlib.error) as error:
        raise PreparationError(
            f"{archive}: damaged or truncated, or no .tgz archive ({error}); {again}."
        ) from None
    if missing and others and pair not in others:
        raise PreparationError(
            f"{archive}: holds the language pair {', '.join(sorted(others))}, not {pair}; "
            f"get the archive from {URL}."
        )
    if missing:
        raise PreparationError(
            f"{archive}: lacks {', '.join(f'{pair}/{name}' for name in sorted(missing))}; "
            f"get the archive from {URL}."
        )
