"""One file that carries a prefilled index from one machine to another.

An archive is a tar file: a description, then manifest, passages, vectors and blocks, with the checksums
of what came before after every thousand files. It holds data only; reading it runs no code. Both ways,
the result appears under its name when it is complete, or not at all.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rag_blockcache.errors import IndexMismatchError, InvalidInputError, StoreError
from rag_blockcache.index_records import IndexSettings
from rag_blockcache.jobs.archive_file import reported
from rag_blockcache.jobs.archive_reader import read_index, read_settings
from rag_blockcache.jobs.archive_writer import write_index
from rag_blockcache.jobs.index_lock import index_lock
from rag_blockcache.jobs.progress import ProgressCallback
from rag_blockcache.manifest import FILE_NAME, Manifest


@dataclass(frozen=True)
class ArchiveReport:
    """What an export or import has moved.

    Attributes:
        archive: The archive.
        directory: The index.
        settings: What the index was made with.
        num_files: Files moved.
        num_bytes: Their size, in bytes.
        seconds: Time it took.
    """

    archive: Path
    directory: Path
    settings: IndexSettings
    num_files: int
    num_bytes: int
    seconds: float


def export_index(
    directory: Path | str, archive: Path | str, *, progress: ProgressCallback | None = None
) -> ArchiveReport:
    """Write an index into one file. Queries may go on meanwhile, jobs may not.

    Args:
        directory: The index.
        archive: File to write, which must not exist. A name that ends in ``.gz`` or ``.tgz`` is
            compressed, slowly and by little: KV states look like noise.
        progress: Called after each file.

    Raises:
        StoreError: If there is no index, the archive exists, or a job is at work on the index.
        OutOfSpaceError: If the disk is full; no archive is left behind.
    """
    source, target = Path(directory), Path(archive)
    if not (source / FILE_NAME).is_file():
        raise StoreError(f"{source} holds no index; name the directory that index-and-prefill wrote")
    if target.exists():
        raise StoreError(f"{target} exists already; delete it, or choose another name")
    started = time.perf_counter()
    with reported(target), index_lock(source, exclusive=True), _written(target) as file:
        settings = _settings(source)
        with _open_for_writing(target, file) as tar:
            num_files, num_bytes = write_index(
                tar, source, settings, scratch=target.parent, progress=progress
            )
    return ArchiveReport(target, source, settings, num_files, num_bytes, time.perf_counter() - started)


def import_index(
    archive: Path | str,
    directory: Path | str,
    *,
    fingerprint: str | None = None,
    progress: ProgressCallback | None = None,
) -> ArchiveReport:
    """Unpack an archive into a new index directory, checking every file.

    Args:
        archive: File that ``export_index`` wrote.
        directory: Must not exist, or be empty.
        fingerprint: ``BlockCache.fingerprint`` of the model that the index is to be used with; None
            accepts any.
        progress: Called after each file.

    Raises:
        IndexMismatchError: If the index was made with a model of another fingerprint.
        StoreError: If the archive is damaged or foreign, or the directory is not empty.
        OutOfSpaceError: If the disk is full. In every case, nothing of the import stays behind.
    """
    source, target = Path(archive), Path(os.path.abspath(directory))
    _check_target(target)
    started = time.perf_counter()
    with reported(source), tarfile.open(source, "r|*") as tar, _unpacked(target) as unfinished:
        described = read_settings(tar, source)
        _check_fingerprint(described, fingerprint, source)
        num_files, num_bytes = read_index(tar, unfinished, source, progress=progress)
        settings = _settings(unfinished)
        if settings.fingerprint != described.fingerprint:
            raise StoreError(f"{source} describes another index than it holds; export it again")
    return ArchiveReport(source, target, settings, num_files, num_bytes, time.perf_counter() - started)


def _settings(directory: Path) -> IndexSettings:
    manifest = Manifest(directory)
    try:
        settings = manifest.settings
    finally:
        manifest.close()
    if settings is None:
        raise StoreError(f"nothing has been indexed into {directory} yet; run index-and-prefill first")
    return settings


@contextmanager
def _written(target: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes its name when all went well, and is removed when not."""
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.rename(name, target)
    except BaseException:
        os.unlink(name)
        raise


def _open_for_writing(target: Path, file: IO[bytes]) -> tarfile.TarFile:
    if target.suffix in (".gz", ".tgz"):
        return tarfile.open(fileobj=file, mode="w:gz", compresslevel=1)
    return tarfile.open(fileobj=file, mode="w")


def _check_target(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise StoreError(f"{target} is not an empty directory; import into a new one")
    if not target.parent.is_dir():
        raise InvalidInputError(f"there is no directory {target.parent}; make it first")


@contextmanager
def _unpacked(target: Path) -> Iterator[Path]:
    """Yield a directory beside ``target`` that takes its place in the end, or is removed on an error."""
    _remove_leftovers(target)
    unfinished = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
    with _held(unfinished):
        try:
            yield unfinished
            os.rename(unfinished, target)  # takes the place of an empty directory only
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


def _prefix(target: Path) -> str:
    return f".{target.name}.importing-"


def _remove_leftovers(target: Path) -> None:
    """Remove what killed imports into the same directory left; living ones hold a lock on theirs."""
    for leftover in target.parent.glob(f"{_prefix(target)}*"):
        with suppress(BlockingIOError), _held(leftover):
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _check_fingerprint(settings: IndexSettings, fingerprint: str | None, archive: Path) -> None:
    if fingerprint is not None and fingerprint != settings.fingerprint:
        raise IndexMismatchError(
            f"{archive} was made with the model {settings.model} (fingerprint {settings.fingerprint}), "
            f"yours has the fingerprint {fingerprint}; load the same weights and dtype, or index anew"
        )
