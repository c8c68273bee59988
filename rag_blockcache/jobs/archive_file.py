"""An archive: a tar file of an index, its description first and the checksums of all files last."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from rag_blockcache.errors import OutOfSpaceError, StoreError

DESCRIPTION = "archive.json"
CHECKSUMS = "checksums.json"
FORMAT = "rag_blockcache index"
FORMAT_VERSION = 1
PARTS = ("manifest.sqlite", "index", "blocks")  # nothing else belongs to an index

_CHUNK_BYTES = 1 << 20
_MAX_JSON_BYTES = 1 << 30


class CheckedReader(io.RawIOBase):
    """A file whose checksum is known once it has been read to its end."""

    def __init__(self, source: IO[bytes]) -> None:
        super().__init__()
        self._source = source
        self._digest = hashlib.blake2b(digest_size=16)

    def read(self, size: int = -1) -> bytes:
        """Read on, and digest what was read."""
        content = self._source.read(size)
        self._digest.update(content)
        return content

    @property
    def checksum(self) -> str:
        """BLAKE2b of all that was read, 32 hexadecimal digits."""
        return self._digest.hexdigest()


def add_file(tar: tarfile.TarFile, name: str, path: Path) -> tuple[int, str]:
    """Add a file as it is now; return its size and checksum. What is appended meanwhile is left out."""
    with open(path, "rb") as source:
        member = _member(name, os.fstat(source.fileno()).st_size)
        reader = CheckedReader(source)
        tar.addfile(member, reader)
    return member.size, reader.checksum


def add_json(tar: tarfile.TarFile, name: str, content: Any) -> None:
    """Add a value as a JSON file."""
    encoded = json.dumps(content).encode()
    tar.addfile(_member(name, len(encoded)), io.BytesIO(encoded))


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o600
    return member


def read_json(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Any:
    """Read a value from a JSON file.

    Raises:
        StoreError: If it is none.
    """
    if not member.isreg() or member.size > _MAX_JSON_BYTES:
        raise StoreError(f"{member.name!r} in the archive is not a description; export it again")
    try:
        return json.loads(_content(tar, member).read())
    except ValueError as error:
        raise StoreError(f"{member.name} in the archive cannot be read ({error}); export it again") from error


def extract(tar: tarfile.TarFile, member: tarfile.TarInfo, directory: Path) -> str:
    """Write one member below ``directory`` and return its checksum; the path must be free.

    Raises:
        StoreError: If it is not a plain file of an index: a link, a device, a path that leads elsewhere.
    """
    target = directory / safe_path(member)
    if target.exists():
        raise StoreError(f"the archive holds {member.name!r} twice; export it again")
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    reader = CheckedReader(_content(tar, member))
    with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        while chunk := reader.read(_CHUNK_BYTES):
            file.write(chunk)
    return reader.checksum


def safe_path(member: tarfile.TarInfo) -> PurePosixPath:
    """Return the relative path of a member that may be written.

    Raises:
        StoreError: If the member is not a plain file of an index.
    """
    path = PurePosixPath(member.name)
    is_inside = not path.is_absolute() and ".." not in path.parts and "\\" not in member.name
    if not (member.isreg() and is_inside and path.parts and path.parts[0] in PARTS):
        raise StoreError(
            f"the archive holds {member.name!r}, which is not a file of an index; nothing was imported, "
            "use an archive made by the export command"
        )
    return path


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = tar.extractfile(member)
    assert content is not None  # regular files have content
    return content


@contextmanager
def reported(archive: Path) -> Iterator[None]:
    """Turn what reading and writing archives raises into errors that say what to do.

    Raises:
        OutOfSpaceError: If the disk is full.
        StoreError: If the archive is damaged, cut short, or cannot be opened.
    """
    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise StoreError(f"{archive} is damaged or no archive ({error}); copy or export it again") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfSpaceError(f"no space left for {archive}; free some and try again") from error
        raise StoreError(f"{archive} cannot be used ({error}); check the path and its rights") from error


def members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members that are left."""
    while (member := tar.next()) is not None:
        yield member
        forget_members(tar)


def forget_members(tar: tarfile.TarFile) -> None:
    """Let go of what tarfile remembers of each member, so that memory stays flat."""
    tar.members.clear()  # type: ignore[attr-defined]  # not in the stubs
