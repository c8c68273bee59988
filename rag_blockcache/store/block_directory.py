"""The directory of a disk store: whose it is, of which format, and who may write in it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rag_blockcache.errors import StoreError
from rag_blockcache.store.block_file import FORMAT_VERSION

_MARKER = "format.json"
_UNFINISHED_MARKER = "format.json.tmp"
_FORMAT = "rag_blockcache blocks"


def open_directory(directory: Path | str) -> Path:
    """Make a directory ready for blocks, or check that it is: ours, and of our format version.

    Args:
        directory: Created with mode 0700 if it is missing; an empty one is taken over. One that holds
            anything else is left as it is.

    Returns:
        The absolute path.

    Raises:
        StoreError: If the directory cannot be used; the message says what to do.
    """
    path = Path(os.path.abspath(Path(directory).expanduser()))
    if os.path.expandvars(path) != str(path):
        raise StoreError(f"{path} contains the name of an environment variable; put blocks somewhere else")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (path / _MARKER).exists():
            with locked(path, exclusive=True):  # processes that open it first at the same time take turns
                _mark(path)
        _check_format(path)
    except OSError as error:
        raise StoreError(
            f"{path} cannot be opened for blocks ({error}); choose a directory you can write to"
        ) from error
    return path


@contextmanager
def locked(directory: Path, *, exclusive: bool, wait: bool = True) -> Iterator[bool]:
    """Hold the directory while files in it have no entry in the index, or while such files are cleaned up.

    Writers share the lock; cleaning needs it alone, and so can tell the files that a killed process left
    behind from those that a live one is about to commit. The lock ends with the process that holds it.

    Args:
        directory: The directory; no file is made for the lock.
        exclusive: Shut out all others.
        wait: If others are in the way, wait for them; otherwise give up at once.

    Yields:
        Whether the lock is held.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        operation = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        try:
            fcntl.flock(descriptor, operation if wait else operation | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough if a fork has a copy
    finally:
        os.close(descriptor)


def _mark(path: Path) -> None:
    """Write the marker into an empty directory, all of it or nothing."""
    entries = set(os.listdir(path)) - {_UNFINISHED_MARKER}
    if _MARKER in entries:
        return
    if entries:
        raise StoreError(
            f"{path} holds other files ({', '.join(sorted(entries)[:3])}) and no {_MARKER}: it is not a "
            "block store; choose an empty or a new directory"
        )
    unfinished = path / _UNFINISHED_MARKER
    unfinished.write_text(json.dumps({"format": _FORMAT, "version": FORMAT_VERSION}) + "\n")
    unfinished.rename(path / _MARKER)


def _check_format(path: Path) -> None:
    try:
        marker = json.loads((path / _MARKER).read_bytes())
    except ValueError:
        marker = None
    if not isinstance(marker, dict) or marker.get("format") != _FORMAT:
        raise StoreError(
            f"{path / _MARKER} is not of a block store; choose another directory, or delete this one"
        )
    if marker.get("version") != FORMAT_VERSION:
        raise StoreError(
            f"{path} holds blocks of format version {marker.get('version')}, this release reads and writes "
            f"{FORMAT_VERSION}; choose another directory, or delete this one and prefill again"
        )
