"""Which file holds which block, what that is worth, and what is pinned: diskcache and tables beside it."""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diskcache

from rag_blockcache.store.disk_errors import translated_errors
from rag_blockcache.store.eviction import priority
from rag_blockcache.store.raw_disk import FILE_NAME, ForeignEntryError, RawDisk, StoredFile

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS Usage (block_id TEXT PRIMARY KEY, num_bytes INTEGER, cost_seconds REAL,"
    " num_uses INTEGER, priority REAL)",
    "CREATE INDEX IF NOT EXISTS Usage_priority ON Usage (priority)",
    "CREATE TABLE IF NOT EXISTS Pins (block_id TEXT PRIMARY KEY)",
    "CREATE TABLE IF NOT EXISTS Clock (id INTEGER PRIMARY KEY CHECK (id = 1), value REAL)",
    "CREATE TABLE IF NOT EXISTS Budget (id INTEGER PRIMARY KEY CHECK (id = 1), num_bytes INTEGER)",
)


class BlockIndex(diskcache.Cache):  # type: ignore[misc]
    """The entries of a disk store, in one SQLite database that threads and processes share.

    diskcache maps block ids to files; it neither evicts nor counts here. ``Usage`` holds what eviction
    needs to know of each block, ``Pins`` the ids it passes over, ``Clock`` its clock, ``Budget`` its
    bound. Whatever belongs together is changed in one transaction, and files are deleted only after it.

    Raises:
        StoreError: From every method, if the database is damaged or stays locked for a minute.
        OutOfSpaceError: From every method that writes, if the disk is full.
    """

    def __init__(self, directory: Path) -> None:
        with translated_errors(directory):
            super().__init__(
                str(directory),
                disk=RawDisk,
                eviction_policy="none",  # diskcache's own culling empties a cache of large values
                cull_limit=0,
                size_limit=2**62,
                statistics=0,  # counting in the database would make every read a write
                tag_index=0,
            )
            with self.transact():
                for statement in _SCHEMA:
                    self._sql(statement)

    def __contains__(self, block_id: object) -> bool:
        with translated_errors(self.directory):
            return isinstance(block_id, str) and bool(super().__contains__(block_id))

    def __len__(self) -> int:
        return int(self._rows("SELECT value FROM Settings WHERE key = 'count'")[0][0])

    def new_name(self) -> str:
        """Make up a file name, and the folder it lies in."""
        digits = secrets.token_hex(16)
        (Path(self.directory) / digits[:2]).mkdir(mode=0o700, exist_ok=True)
        return f"{digits[:2]}/{digits[2:]}.safetensors"

    def path(self, name: str) -> Path:
        """Return the path of a file."""
        path: Path = self.disk.path(name)
        return path

    def name_of(self, block_id: str) -> str | None:
        """Return the name of the file that holds a block, or None; takes no lock.

        Raises:
            ForeignEntryError: If the entry is not one of ours.
        """
        with translated_errors(self.directory):
            name: str | None = self.get(block_id)
            return name

    def is_readable(self, block_id: str) -> bool:
        """Tell whether a block has an entry of ours and its file is there."""
        try:
            name = self.name_of(block_id)
        except ForeignEntryError:
            return False
        return name is not None and self.path(name).exists()

    def block_ids(self) -> list[str]:
        """Return all block ids, oldest first."""
        return [row[0] for row in self._rows("SELECT key FROM Cache WHERE raw AND typeof(key) = 'text'")]

    @property
    def num_bytes(self) -> int:
        """Size of all files, in bytes."""
        return int(self._rows("SELECT value FROM Settings WHERE key = 'size'")[0][0])

    def budget(self, num_bytes: int | None) -> int | None:
        """Record a budget for all files; given None, return the one on record, or None."""
        recorded = self._rows("SELECT num_bytes FROM Budget")
        if num_bytes is None:
            return int(recorded[0][0]) if recorded else None
        if recorded != [(num_bytes,)]:
            with self._changing() as sql:
                sql("INSERT OR REPLACE INTO Budget VALUES (1, ?)", (num_bytes,))
        return num_bytes

    @property
    def num_pinned(self) -> int:
        """Number of block ids that eviction passes over."""
        return int(self._rows("SELECT COUNT(*) FROM Pins")[0][0])

    @property
    def pinned_bytes(self) -> int:
        """Size of the files of pinned blocks, in bytes."""
        pinned = "SELECT COALESCE(SUM(num_bytes), 0) FROM Usage JOIN Pins USING (block_id)"
        return int(self._rows(pinned)[0][0])

    def insert(self, files: Iterable[StoredFile]) -> None:
        """Enter files, all or none; the file of a block that has arrived meanwhile is deleted."""
        superfluous = []
        with self._changing() as sql:
            clock = self._clock(sql)
            for file in files:
                if self.is_readable(file.block_id):
                    superfluous.append(file.name)
                    continue
                self.set(file.block_id, file)
                worth = priority(clock, 1, file.cost_seconds, file.num_bytes)
                sql(
                    "INSERT OR REPLACE INTO Usage VALUES (?, ?, ?, 1, ?)",
                    (file.block_id, file.num_bytes, file.cost_seconds, worth),
                )
        self._delete_files(superfluous)

    def remove(self, block_id: str, *, name: str | None = None) -> bool:
        """Delete a block, or only if it is still in the file ``name``; return whether it was there."""
        with self._changing() as sql:
            found = sql("SELECT filename FROM Cache WHERE key = ? AND raw", (block_id,)).fetchall()
            if not found or name not in (None, found[0][0]):
                return False
            self._delete_entries(sql, [block_id])
        self._delete_files(filename for (filename,) in found)
        return True

    def remove_all(self) -> None:
        """Delete all blocks."""
        with self._changing() as sql:
            names = [row[0] for row in sql("SELECT filename FROM Cache").fetchall()]
            sql("DELETE FROM Cache")
            sql("DELETE FROM Usage")
        self._delete_files(names)

    def evict(self, limit_bytes: int) -> list[str]:
        """Delete what is worth least until the files take ``limit_bytes`` or only pinned ones are left.

        Returns:
            Ids of the blocks evicted.
        """
        if self.num_bytes <= limit_bytes:
            return []
        with self._changing() as sql:
            excess, clock = self.num_bytes - limit_bytes, self._clock(sql)
            victims, names = [], []
            for block_id, num_bytes, worth, name in sql(
                "SELECT block_id, num_bytes, priority, filename"
                " FROM Usage JOIN Cache ON key = block_id AND raw"
                " WHERE block_id NOT IN (SELECT block_id FROM Pins)"
                " ORDER BY priority, Usage.rowid"
            ):
                if excess <= 0:
                    break
                victims.append(block_id)
                names.append(name)
                excess, clock = excess - num_bytes, max(clock, worth)
            self._delete_entries(sql, victims)
            sql("INSERT OR REPLACE INTO Clock VALUES (1, ?)", (clock,))
        self._delete_files(names)
        return victims

    def count_uses(self, uses: Mapping[str, int]) -> None:
        """Add uses of blocks to their frequency, and raise their priority accordingly."""
        if not uses:
            return
        with self._changing() as sql:
            clock = self._clock(sql)
            for block_id, added in uses.items():
                for num_bytes, cost_seconds, num_uses in sql(
                    "SELECT num_bytes, cost_seconds, num_uses FROM Usage WHERE block_id = ?", (block_id,)
                ).fetchall():
                    worth = priority(clock, num_uses + added, cost_seconds, num_bytes)
                    sql(
                        "UPDATE Usage SET num_uses = ?, priority = ? WHERE block_id = ?",
                        (num_uses + added, worth, block_id),
                    )

    def use_counts(self, block_ids: Iterable[str] | None) -> dict[str, int]:
        """Return how often blocks were asked for since they were stored: all of them, or those named."""
        query = "SELECT block_id, num_uses - 1 FROM Usage"  # storing counts as one
        arguments: tuple[str, ...] = ()
        if block_ids is not None:
            query += " WHERE block_id IN (SELECT value FROM json_each(?))"
            arguments = (json.dumps(list(block_ids)),)
        return dict(self._rows(query, *arguments))

    def pin(self, block_ids: Iterable[str]) -> None:
        """Make eviction pass over these ids, held or not."""
        with self._changing() as sql:
            for block_id in block_ids:
                sql("INSERT OR IGNORE INTO Pins VALUES (?)", (block_id,))

    def unpin(self, block_ids: Iterable[str]) -> None:
        """Undo ``pin``."""
        with self._changing() as sql:
            for block_id in block_ids:
                sql("DELETE FROM Pins WHERE block_id = ?", (block_id,))

    def reconcile(self) -> tuple[list[str], int]:
        """Delete files without entry and entries without file; nobody may be writing meanwhile.

        Returns:
            Ids of the blocks whose file is gone, and the number of files deleted.
        """
        rows = self._rows("SELECT rowid, filename, key, raw AND mode = 2 AND typeof(key) = 'text' FROM Cache")
        present = set(self._list_files())
        suspects = [row for row in rows if not (row[3] and row[1] in present)]
        lost = []
        if suspects:
            with self._changing() as sql:
                for rowid, name, block_id, _ in suspects:  # unless deleted meanwhile, both entry and file
                    if sql("DELETE FROM Cache WHERE rowid = ? AND filename IS ?", (rowid, name)).rowcount:
                        lost.append(str(block_id))
                sql("DELETE FROM Usage WHERE block_id NOT IN (SELECT key FROM Cache)")
        orphans = present - {row[1] for row in rows}
        self._delete_files(orphans)
        return lost, len(orphans)

    def _list_files(self) -> Iterator[str]:
        """Yield the names of all files that may hold a block; other files are not ours to judge."""
        for folder in os.listdir(self.directory):
            if len(folder) == 2:
                names = (f"{folder}/{file}" for file in os.listdir(Path(self.directory) / folder))
                yield from filter(FILE_NAME.fullmatch, names)

    def _rows(self, query: str, *arguments: object) -> list[Any]:
        with translated_errors(self.directory):
            rows: list[Any] = self._sql(query, arguments).fetchall()
            return rows

    @contextmanager
    def _changing(self) -> Iterator[Callable[..., sqlite3.Cursor]]:
        """Open a transaction that ends with the block; only one process changes the index at a time."""
        with translated_errors(self.directory):
            try:
                with self.transact():
                    yield self._sql
            finally:
                self._con.rollback()  # only where a commit has failed is there anything left to roll back

    def _clock(self, sql: Callable[..., sqlite3.Cursor]) -> float:
        row = sql("SELECT value FROM Clock").fetchone()
        return float(row[0]) if row else 0.0

    def _delete_entries(self, sql: Callable[..., sqlite3.Cursor], block_ids: list[str]) -> None:
        for block_id in block_ids:
            sql("DELETE FROM Cache WHERE key = ? AND raw", (block_id,))
            sql("DELETE FROM Usage WHERE block_id = ?", (block_id,))

    def _delete_files(self, names: Iterable[str | None]) -> None:
        for name in names:
            if name is not None:
                self.disk.remove(name)
