"""One SQLite file of ours: how it is recognised, opened, and how its errors are told."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rag_blockcache.errors import OutOfSpaceError, StoreError

_BUSY_SECONDS = 120.0  # another shard may hold the write lock while it saves a large index


class Database:
    """A connection to an SQLite file that carries an application id and a format version.

    Writes go through ``transaction``, reads through ``read``; both turn what SQLite raises
    into errors that name the file. Every commit reaches the disk before it returns. One
    thread per connection, unless ``shared_by_threads`` says that its owner makes threads take
    turns; any number of processes.
    """

    def __init__(
        self,
        path: Path,
        *,
        application_id: int,
        format_version: int,
        schema: str,
        shared_by_threads: bool = False,
    ) -> None:
        self.path = path
        self._identity = (application_id, format_version)
        with self.reported():
            self._connection = sqlite3.connect(
                path,
                timeout=_BUSY_SECONDS,
                isolation_level=None,
                check_same_thread=not shared_by_threads,
            )
        try:
            with self.reported():
                self._open(schema)
        except BaseException:
            self._connection.close()
            raise

    def _open(self, schema: str) -> None:
        if self._is_empty():
            self._connection.execute("PRAGMA journal_mode = WAL")
            with self.transaction():
                if self._is_empty():  # another process may have been first
                    self._create(schema)
        self._check_identity()
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.execute("PRAGMA foreign_keys = ON")

    def _is_empty(self) -> bool:
        (num_tables,) = self._connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        return bool(num_tables == 0)

    def _create(self, schema: str) -> None:
        for statement in filter(str.strip, schema.split(";")):
            self._connection.execute(statement)
        application_id, format_version = self._identity
        self._connection.execute(f"PRAGMA application_id = {application_id}")
        self._connection.execute(f"PRAGMA user_version = {format_version}")

    def _check_identity(self) -> None:
        (application_id,) = self._connection.execute("PRAGMA application_id").fetchone()
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if application_id != self._identity[0]:
            raise StoreError(f"{self.path} is a database of another program; choose another directory")
        if version > self._identity[1]:
            raise StoreError(
                f"{self.path} has format version {version}, this rag_blockcache reads up to "
                f"{self._identity[1]}; install a newer rag_blockcache, or index into another directory"
            )
        if version < self._identity[1]:
            raise StoreError(
                f"{self.path} has the old format version {version}, this rag_blockcache needs "
                f"{self._identity[1]}; index into another directory, then delete this one"
            )

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Turn what SQLite raises inside into errors that say what to do.

        Raises:
            OutOfSpaceError: If the disk is full.
            StoreError: If the file is damaged, not a database, not writable, or held by another
                process for longer than two minutes.
        """
        try:
            yield
        except sqlite3.OperationalError as error:
            raise self._operational(error) from error
        except sqlite3.DatabaseError as error:
            raise StoreError(
                f"{self.path} is damaged or not a database of rag_blockcache ({error}); "
                "delete its directory and run index-and-prefill again, or choose another one"
            ) from error

    def _operational(self, error: sqlite3.OperationalError) -> StoreError:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            return OutOfSpaceError(
                f"no space left on the disk for {self.path}; free some and run the same command again, "
                "what was committed is kept"
            )
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return StoreError(f"{self.path} is in use by another process; wait for it and try again")
        return StoreError(f"{self.path} cannot be used ({error}); check that it exists and can be written")

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Commit what happens inside as a whole, or nothing of it; hold the write lock meanwhile."""
        with self._between("BEGIN IMMEDIATE"):
            yield self._connection

    @contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """Let all queries inside see the file as it is at the first one; keep nobody from writing."""
        with self._between("BEGIN"):
            yield self._connection

    @contextmanager
    def _between(self, begin: str) -> Iterator[None]:
        with self.reported():
            self._connection.execute(begin)
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # SQLite itself rolls back on a full disk
                    self._connection.execute("ROLLBACK")
                raise

    def execute(self, statement: str, *arguments: object) -> None:
        """Run one statement that leaves the file itself alone, such as one on a temporary table."""
        with self.reported():
            self._connection.execute(statement, arguments)

    def read(self, query: str, *arguments: object) -> Iterator[Any]:
        """Yield the rows that a query finds."""
        with self.reported():
            yield from self._connection.execute(query, arguments)

    def value(self, query: str, *arguments: object) -> Any:
        """Return the first column of the first row, or None."""
        row = next(self.read(query, *arguments), None)
        return None if row is None else row[0]

    def copy_to(self, path: Path) -> None:
        """Write a copy of the file as of the last commit, whoever is writing to it."""
        with self.reported():
            copy = sqlite3.connect(path)
            try:
                self._connection.backup(copy)
            finally:
                copy.close()

    def close(self) -> None:
        """Close the connection; SQLite folds the write-ahead log into the file."""
        self._connection.close()
