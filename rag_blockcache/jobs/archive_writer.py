"""An index into an archive: databases as of their last commit, other files as they are."""

from __future__ import annotations

import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from rag_blockcache.errors import OutOfSpaceError, StoreError
from rag_blockcache.index_records import IndexSettings
from rag_blockcache.jobs.archive_file import (
    CHECKSUMS,
    DESCRIPTION,
    FORMAT,
    FORMAT_VERSION,
    PARTS,
    add_file,
    add_json,
    forget_members,
)
from rag_blockcache.jobs.progress import JobProgress, ProgressCallback

_FILES_PER_CHECK = 1000  # so that neither side has to remember all checksums
_SQLITE_MAGIC = b"SQLite format 3\0"
_TRANSIENT = ("-wal", "-shm", "-journal", ".tmp", ".lock")  # of a running process; means nothing elsewhere


def write_index(
    tar: tarfile.TarFile,
    directory: Path,
    settings: IndexSettings,
    *,
    scratch: Path,
    progress: ProgressCallback | None = None,
) -> tuple[int, int]:
    """Add an index to an empty archive, the databases first.

    Blocks may be evicted meanwhile: one that a database names and whose file has gone reads as a
    miss later.

    Args:
        tar: The archive.
        directory: The index.
        settings: What it was made with.
        scratch: Where there is room for a copy of the largest database.
        progress: Called after each file.

    Returns:
        The numbers of files and of their bytes.
    """
    add_json(tar, DESCRIPTION, {"format": FORMAT, "version": FORMAT_VERSION, "settings": asdict(settings)})
    paths = sorted(_files(directory), key=lambda path: (not _is_sqlite(path), path))
    checksums: dict[str, str] = {}
    num_bytes, started = 0, time.perf_counter()
    for num_done, path in enumerate(paths, 1):
        with suppress(FileNotFoundError):  # evicted since the files were listed
            name = path.relative_to(directory).as_posix()
            size, checksums[name] = _add(tar, name, path, scratch)
            num_bytes += size
        if len(checksums) == _FILES_PER_CHECK:
            add_json(tar, CHECKSUMS, {"files": checksums, "is_last": False})
            checksums = {}
        if progress is not None:
            seconds = time.perf_counter() - started
            progress(JobProgress("export", num_done, len(paths), num_bytes=num_bytes, seconds=seconds))
        forget_members(tar)
    add_json(tar, CHECKSUMS, {"files": checksums, "is_last": True})
    return len(paths), num_bytes


def _files(source: Path) -> Iterator[Path]:
    for part in PARTS:
        for path in [source / part, *(source / part).rglob("*")]:
            if path.is_file() and not path.is_symlink() and not path.name.endswith(_TRANSIENT):
                yield path


def _is_sqlite(path: Path) -> bool:
    if path.suffix not in (".sqlite", ".db"):
        return False
    with open(path, "rb") as file:
        return file.read(len(_SQLITE_MAGIC)) == _SQLITE_MAGIC


def _add(tar: tarfile.TarFile, name: str, path: Path, scratch: Path) -> tuple[int, str]:
    if not _is_sqlite(path):
        return add_file(tar, name, path)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=scratch) as directory:
        snapshot = Path(directory) / path.name
        _snapshot(path, snapshot)
        return add_file(tar, name, snapshot)


def _snapshot(path: Path, target: Path) -> None:
    """Copy a database as of its last commit, whoever is writing to it."""
    source, copy = sqlite3.connect(path), sqlite3.connect(target)
    try:
        source.backup(copy)
        copy.execute("PRAGMA journal_mode = DELETE")  # one file, without a log beside it
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL:
            raise OutOfSpaceError(f"no space left for a copy of {path}; free some and try again") from error
        raise StoreError(f"{path} cannot be copied ({error}); run verify on the index") from error
    finally:
        copy.close()
        source.close()
