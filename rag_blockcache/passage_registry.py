"""Texts that may stand in a prompt, on disk, and the anchors that find them, in memory."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import sqlite3
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from rag_blockcache.anchors import WINDOW_BYTES, AnchorSet, Hashes, candidate_anchors
from rag_blockcache.database import Database
from rag_blockcache.errors import InvalidInputError, StoreError

FILE_NAME = "texts.sqlite"

_FORMAT_VERSION = 1
_APPLICATION_ID = int.from_bytes(b"RAGt", "big")
_MAX_SHARED = 64  # texts per anchor: bounds what one window of a prompt can cost
_PER_TRANSACTION = 1000
_FAR_BEHIND = 20_000  # rows; from there on reading the index of all anchors beats stepping over texts
# AUTOINCREMENT: a row number never returns, so what is new since a reader's last look has a higher one.
_SCHEMA = """
CREATE TABLE texts (
    row INTEGER PRIMARY KEY AUTOINCREMENT, digest BLOB NOT NULL UNIQUE,
    anchor INTEGER NOT NULL, anchor_offset INTEGER NOT NULL, text BLOB NOT NULL
);
CREATE INDEX texts_of_anchor ON texts (anchor)
"""
_ANCHORS_SINCE = "SELECT anchor FROM texts {how} WHERE row > ?"
_TEXTS_OF_ANCHORS = (
    "SELECT anchor, anchor_offset, digest, text FROM texts WHERE anchor IN (SELECT value FROM json_each(?))"
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnchoredText:
    """A known text, in UTF-8, and where in it its anchor begins, in bytes."""

    text: bytes
    anchor_offset: int


def normalised(text: str) -> bytes:
    """Return what is compared of a text: without white space around it, in UTF-8."""
    return text.strip().encode("utf-8", "surrogatepass")  # JSON may bring halves of surrogate pairs


class PassageRegistry:
    """The texts that a prompt may hold, as a set on disk that threads and processes may share.

    Register what a framework shows to the model: the text of a passage, or its title or metadata and the
    text; one passage may be registered in several forms. White space around a text does not count. Texts
    below 48 bytes are not kept: they are short to compute, and too easily found where they are not meant.

    What is added is known to every reader's next look-up, whichever process added it. Memory is about 9 bytes
    per text; the texts themselves stay on disk.

    Args:
        directory: Where ``texts.sqlite`` is kept; made if missing. None keeps the texts in memory, for this
            process alone.

    Raises:
        StoreError: If the file there is foreign, damaged, or of another format version.

    Example:
        >>> import tempfile
        >>> note = "The analytical engine has no pretensions to originate anything."
        >>> with PassageRegistry(tempfile.mkdtemp()) as registry:
        ...     registry.add([note, "too short"]), note in registry, len(registry)
        (1, True, 1)
    """

    def __init__(self, directory: Path | str | None) -> None:
        path = Path(":memory:" if directory is None else directory)
        if directory is not None:
            try:
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise StoreError(f"no texts can be kept in {directory} ({error}); choose another") from error
            path /= FILE_NAME
        self._writer, self._write_lock = _open(path), threading.RLock()
        self._reader, self._read_lock = self._writer, self._write_lock
        if directory is not None:  # a connection of its own, so that a look-up never waits for who adds
            self._reader, self._read_lock = _open(path), threading.RLock()
        self._anchors = AnchorSet()
        self._seen_version: int | None = None
        self._seen_row = 0

    def add(self, texts: Iterable[str]) -> int:
        """Add texts; those already there, and those below 48 bytes, are passed over.

        A thousand at a time are committed together. Should it fail midway, add all of them again.

        Args:
            texts: As they stand in prompts.

        Returns:
            How many were new.

        Raises:
            InvalidInputError: If a single string came in place of a sequence.
            OutOfSpaceError: If the disk is full.
        """
        encoded = (normalised(text) for text in _sequence(texts))
        long_enough = (text for text in encoded if len(text) >= WINDOW_BYTES)
        num_added = 0
        while batch := list(itertools.islice(long_enough, _PER_TRANSACTION)):
            with self._write_lock, self._writer.transaction() as connection:
                num_added += sum(_insert(connection, text) for text in batch)
            self._note_change()
        return num_added

    def remove(self, texts: Iterable[str]) -> int:
        """Remove texts; unknown ones are passed over.

        However often and by whomever a text was added, it goes; whoever shares texts among passages keeps the
        count, as the manifest of an index does.

        Returns:
            How many were there.
        """
        digests = [(_digest(normalised(text)),) for text in _sequence(texts)]
        with self._write_lock, self._writer.transaction() as connection:
            return connection.executemany("DELETE FROM texts WHERE digest = ?", digests).rowcount

    def _note_change(self) -> None:
        if self._reader is self._writer:  # a connection is not told of its own commits
            self._seen_version = None

    def __contains__(self, text: object) -> bool:
        if not isinstance(text, str):
            return False
        query = "SELECT 1 FROM texts WHERE digest = ?"
        with self._read_lock:
            return self._reader.value(query, _digest(normalised(text))) is not None

    def __len__(self) -> int:
        with self._read_lock:
            return int(self._reader.value("SELECT count(*) FROM texts"))

    @property
    def anchors(self) -> AnchorSet:
        """Anchors of all texts, as of the last commit; some may belong to texts that were removed."""
        with self._read_lock:
            self._refresh()
            return self._anchors

    def texts_of(self, anchors: Iterable[int]) -> dict[int, list[AnchoredText]]:
        """Return the texts that each anchor stands for, none for those of removed texts."""
        found: dict[int, list[AnchoredText]] = {}
        with self._read_lock:
            rows = list(self._reader.read(_TEXTS_OF_ANCHORS, json.dumps(list(anchors))))
        for anchor, offset, digest, text in rows:
            if _digest(text) != digest:
                _log.warning("a text in %s is damaged and not matched; add it again", self._reader.path)
                continue
            found.setdefault(anchor, []).append(AnchoredText(text, offset))
        return found

    def _refresh(self) -> None:
        """Take in what was committed since the last look."""
        version = self._reader.value("PRAGMA data_version")  # changes with commits of other connections
        if version == self._seen_version:
            return
        before, self._anchors = self._anchors, self._anchors.with_added(self._new_anchors())
        has_merged = self._anchors.base is not before.base
        if has_merged and len(self._anchors) > 2 * self._reader.value("SELECT count(*) FROM texts"):
            self._seen_row = 0  # most of them belong to removed texts: start over
            self._anchors = AnchorSet().with_added(self._new_anchors())
        self._seen_version = version

    def _new_anchors(self) -> Hashes:
        """Read the anchors of rows that were not seen yet."""
        with self._reader.snapshot() as connection:
            (last_row,) = connection.execute("SELECT coalesce(max(row), 0) FROM texts").fetchone()
            is_far_behind = last_row - self._seen_row > _FAR_BEHIND
            how = "INDEXED BY texts_of_anchor" if is_far_behind else "NOT INDEXED"
            rows = connection.execute(_ANCHORS_SINCE.format(how=how), (self._seen_row,))
            anchors = np.fromiter((anchor for (anchor,) in rows), np.int64)
        self._seen_row = max(self._seen_row, last_row)
        return anchors

    def close(self) -> None:
        """Close the file."""
        with self._write_lock, self._read_lock:
            self._writer.close()
            self._reader.close()

    def __enter__(self) -> PassageRegistry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open(path: Path) -> Database:
    return Database(
        path,
        application_id=_APPLICATION_ID,
        format_version=_FORMAT_VERSION,
        schema=_SCHEMA,
        shared_by_threads=True,
    )


def _sequence(texts: Iterable[str]) -> Iterable[str]:
    if isinstance(texts, str):
        raise InvalidInputError("texts must be a sequence of strings; wrap a single text in a list")
    return texts


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=16).digest()


def _insert(connection: sqlite3.Connection, text: bytes) -> bool:
    """Insert a text with the best anchor it can have, if it is new and can have one."""
    digest = _digest(text)
    if connection.execute("SELECT 1 FROM texts WHERE digest = ?", (digest,)).fetchone():
        return False
    chosen = _choose_anchor(connection, text)
    if chosen is None:
        _log.debug("a text shares every anchor with %d others and is not kept", _MAX_SHARED)
        return False
    offset, anchor = chosen
    connection.execute(
        "INSERT INTO texts (digest, anchor, anchor_offset, text) VALUES (?, ?, ?, ?)",
        (digest, anchor, offset, text),
    )
    return True


def _choose_anchor(connection: sqlite3.Connection, text: bytes) -> tuple[int, int] | None:
    """Return the first anchor that no other text has, else the one that the fewest share."""
    best, fewest = None, _MAX_SHARED
    for offset, anchor in candidate_anchors(text):
        query = "SELECT count(*) FROM texts WHERE anchor = ?"
        (num_sharing,) = connection.execute(query, (anchor,)).fetchone()
        if num_sharing < fewest:
            best, fewest = (offset, anchor), num_sharing
        if not fewest:
            break
    return best
