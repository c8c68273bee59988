"""Who may write an index at the moment: any number of jobs, or one that needs it to itself."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rag_blockcache.errors import StoreError

FILE_NAME = "job.lock"


@contextmanager
def index_lock(directory: Path | str, *, exclusive: bool) -> Iterator[None]:
    """Hold an index while a job changes it; the lock ends with the process, however it ends.

    Args:
        directory: Directory of the index.
        exclusive: Keep every other job out; otherwise only those that need the index to themselves.

    Raises:
        StoreError: If a job holds the index in a way that excludes this one, or the file system
            has no locks.
    """
    path = Path(directory) / FILE_NAME
    descriptor = _open(path)
    try:
        _lock(descriptor, path, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path, operation: int) -> None:
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StoreError(
            f"another job is at work on {path.parent}; wait until it ends, then run this command again"
        ) from error
    except OSError as error:
        raise StoreError(f"{path} cannot be locked ({error}); keep the index on a local disk") from error


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StoreError(f"{path} cannot be opened ({error}); choose a directory you can write to") from error
