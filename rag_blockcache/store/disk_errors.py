"""Errors of SQLite and of the file system, in the words of the library."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diskcache

from rag_blockcache.errors import OutOfSpaceError, StoreError

_OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def translated_errors(directory: Path | str) -> Iterator[None]:
    """Raise what goes wrong below as an error that says what to do.

    Raises:
        OutOfSpaceError: If the disk, or the user's share of it, is full.
        StoreError: If the database is damaged or locked, or a file cannot be read or written.
    """
    try:
        yield
    except (sqlite3.Error, diskcache.Timeout, OSError) as error:
        if _is_out_of_space(error):
            raise OutOfSpaceError(
                f"the disk of {directory} is full; free some space or lower the disk budget, then run the "
                "same command again: what was stored before is kept"
            ) from error
        if isinstance(error, diskcache.Timeout):
            raise StoreError(
                f"{directory} could not be locked for writing; wait for its other writers to finish, and "
                "check that you may write there"
            ) from error
        raise StoreError(
            f"{directory} cannot be read or written ({error}); check its permissions, or delete it and "
            "prefill again"
        ) from error


def _is_out_of_space(error: BaseException | None) -> bool:
    """Look at an error and those it arose from: a failed rollback hides why it was necessary."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _OUT_OF_SPACE:
            return True
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            return True
        error = error.__context__
    return False
