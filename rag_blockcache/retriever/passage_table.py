"""Passages and their vectors in one SQLite file: the truth that a FAISS index is made from.

A vector id is given once and stands for one vector for ever: an update deletes the row and
writes another under a new id, and SQLite's AUTOINCREMENT never gives an id twice. Two sets of
ids therefore say all about how an index differs from this table.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rag_blockcache.database import Database
from rag_blockcache.errors import InvalidInputError, StoreError
from rag_blockcache.passages import Passage
from rag_blockcache.retriever.embedder import Vectors

FORMAT_VERSION = 1
_APPLICATION_ID = 0x52424349  # "RBCI", in the file's header: this is one of ours
_CHUNK = 900  # ids in one statement; some builds of SQLite take no more than 999 parameters
_CACHE_KIBIBYTES = 65_536  # SQLite's own two MiB make a large add write its pages twice
_STRAY = "WHERE vector_id NOT IN (SELECT vector_id FROM passages)"
_SCHEMA = """
    CREATE TABLE settings (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
    INSERT INTO settings VALUES ('generation', 0);
    CREATE TABLE passages (
        vector_id INTEGER PRIMARY KEY AUTOINCREMENT, passage_id TEXT NOT NULL UNIQUE,
        metadata TEXT NOT NULL, title TEXT NOT NULL, text TEXT NOT NULL
    );
    CREATE TABLE vectors (vector_id INTEGER PRIMARY KEY, embedding BLOB NOT NULL);
    CREATE TABLE sources (
        source_id TEXT, passage_id TEXT, PRIMARY KEY (source_id, passage_id)
    ) WITHOUT ROWID;
    CREATE INDEX sources_of_passage ON sources (passage_id)
"""


class PassageTable:
    """Passages, the vector of each, which document each came from, and what made them.

    Threads of a process share one connection and take turns; processes share the file.

    Args:
        path: The SQLite file; created when it is not there.

    Raises:
        StoreError: If the file is damaged, another program's, or of another format version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._turn = threading.RLock()
        self._is_closed = False
        self._connection: sqlite3.Connection | None = None  # while a transaction is going on
        self._database = Database(
            path,
            application_id=_APPLICATION_ID,
            format_version=FORMAT_VERSION,
            schema=_SCHEMA,
            shared_by_threads=True,
        )
        self._database.execute(f"PRAGMA cache_size = -{_CACHE_KIBIBYTES}")

    @contextmanager
    def transaction(self, *, writes: bool = False) -> Iterator[sqlite3.Connection]:
        """Give this thread the connection, and one unchanging view of the file, until the end.

        Leaving by an error undoes what was written. Inside another transaction it joins that one.
        """
        with self._turn:
            if self._is_closed:
                raise StoreError(f"{self.path} was closed; open its directory again")
            if self._connection is not None:
                yield self._connection
                return
            begin = self._database.transaction if writes else self._database.snapshot
            try:
                with begin() as self._connection:
                    yield self._connection
            except UnicodeEncodeError as error:
                raise InvalidInputError(
                    f"a text or id holds half a character ({error}); decode it anew, or replace those"
                ) from error
            finally:
                self._connection = None

    def setting(self, name: str) -> Any:
        """Return what is recorded under ``name``: text, a number, bytes, or None."""
        with self.transaction() as connection:
            row = connection.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
        return row[0] if row else None

    def record(self, **settings: str | int | bytes) -> None:
        """Record settings by name, over what was there."""
        with self.transaction(writes=True) as connection:
            connection.executemany("INSERT OR REPLACE INTO settings VALUES (?, ?)", settings.items())

    def put(self, passages: Sequence[Passage], embeddings: Vectors, source_ids: Sequence[str]) -> None:
        """Write named passages, each in place of the one that had its ``passage_id``.

        A passage named by its content may come from several documents; any other belongs to the
        document that wrote it last.
        """
        rows = [(passage.passage_id, _as_json(passage), passage.title, passage.text) for passage in passages]
        last = {row[0]: index for index, row in enumerate(rows)}  # of two with one id the last counts
        kept = list(last.values())
        moved = [(name,) for name, index in last.items() if name != passages[index].content_id]
        with self.transaction(writes=True) as connection:
            self._forget(connection, list(last))
            connection.executemany("DELETE FROM sources WHERE passage_id = ?", moved)
            first = self._next_vector_id(connection)
            connection.executemany(
                "INSERT INTO passages VALUES (?, ?, ?, ?, ?)",
                ((vector_id, *rows[index]) for vector_id, index in enumerate(kept, first)),
            )
            connection.executemany(
                "INSERT INTO vectors VALUES (?, ?)",
                ((vector_id, embeddings[index].tobytes()) for vector_id, index in enumerate(kept, first)),
            )
            connection.executemany(
                "INSERT OR IGNORE INTO sources VALUES (?, ?)",
                ((source, passage.passage_id) for source, passage in zip(source_ids, passages, strict=True)),
            )

    def delete(self, passage_ids: Sequence[str]) -> int:
        """Delete passages by id and return how many there were; others are passed over."""
        with self.transaction(writes=True) as connection:
            num_deleted = self._forget(connection, passage_ids)
            connection.executemany(
                "DELETE FROM sources WHERE passage_id = ?", ((name,) for name in passage_ids)
            )
        return num_deleted

    def delete_source(self, source_id: str) -> int:
        """Delete what only this document brought, and return how many passages that was."""
        with self.transaction(writes=True) as connection:
            rows = connection.execute(
                "SELECT passage_id FROM sources AS mine WHERE source_id = ? AND NOT EXISTS (SELECT 1"
                " FROM sources AS other WHERE other.passage_id = mine.passage_id AND other.source_id <> ?)",
                (source_id, source_id),
            )
            num_deleted = self.delete([row[0] for row in rows])
            connection.execute("DELETE FROM sources WHERE source_id = ?", (source_id,))
        return num_deleted

    def vector_ids(self) -> NDArray[np.int64]:
        """Return the id of every passage's vector, ascending."""
        with self.transaction() as connection:
            rows = connection.execute("SELECT vector_id FROM passages").fetchall()
        return np.sort(np.fromiter((row[0] for row in rows), np.int64, len(rows)))

    def embeddings(
        self, vector_ids: NDArray[np.int64], dimension: int
    ) -> Iterator[tuple[NDArray[np.int64], Vectors]]:
        """Read vectors in chunks, ids ascending; those that are missing or damaged are left out."""
        for start in range(0, len(vector_ids), _CHUNK):
            asked = vector_ids[start : start + _CHUNK].tolist()
            with self.transaction() as connection:
                rows = connection.execute(
                    f"SELECT vector_id, embedding FROM vectors WHERE vector_id IN {_places(asked)}"
                    " AND length(embedding) = ? ORDER BY vector_id",
                    (*asked, 4 * dimension),
                ).fetchall()
            ids = np.fromiter((row[0] for row in rows), np.int64, len(rows))
            yield ids, np.frombuffer(b"".join(row[1] for row in rows), np.float32).reshape(-1, dimension)

    def passages_of_vectors(self, vector_ids: Iterable[int]) -> dict[int, Passage]:
        """Return the passages behind vector ids, by vector id."""
        return {row[0]: _passage(row) for row in self._select("vector_id", list(vector_ids))}

    def passages(self, passage_ids: Iterable[str]) -> dict[str, Passage]:
        """Return the passages that are there, by passage id."""
        return {row[1]: _passage(row) for row in self._select("passage_id", list(passage_ids))}

    def metadata(self, vector_ids: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Return the metadata of passages, by vector id."""
        rows = self._rows("SELECT vector_id, metadata FROM passages WHERE vector_id IN", vector_ids)
        return {vector_id: json.loads(metadata) for vector_id, metadata in rows}

    def named_vectors(self, passage_ids: Sequence[str]) -> NDArray[np.int64]:
        """Return the vector ids of the passages that are there, ascending."""
        rows = self._rows("SELECT vector_id FROM passages WHERE passage_id IN", passage_ids)
        return np.sort(np.array([row[0] for row in rows], np.int64))

    def names_of_vectors(self, vector_ids: Iterable[int]) -> dict[int, str]:
        """Return the passage ids behind vector ids, by vector id."""
        ids = [int(vector_id) for vector_id in vector_ids]
        return dict(self._rows("SELECT vector_id, passage_id FROM passages WHERE vector_id IN", ids))

    def passages_of_source(self, source_id: str) -> list[str]:
        """Return the ids of the passages that came from a document, oldest first."""
        query = (
            "SELECT passage_id FROM sources JOIN passages USING (passage_id) WHERE source_id = ?"
            " ORDER BY vector_id"
        )
        with self.transaction() as connection:
            return [row[0] for row in connection.execute(query, (source_id,))]

    def passage_ids(self) -> list[str]:
        """Return the ids of all passages, oldest first."""
        with self.transaction() as connection:
            rows = connection.execute("SELECT passage_id FROM passages ORDER BY vector_id").fetchall()
        return [row[0] for row in rows]

    def __len__(self) -> int:
        with self.transaction() as connection:
            return int(connection.execute("SELECT count(*) FROM passages").fetchone()[0])

    def damage(self) -> list[str]:
        """Return what is wrong with the file itself, a line for each; empty when it is sound."""
        with self.transaction() as connection:
            rows = connection.execute("PRAGMA integrity_check").fetchall()
            strays = connection.execute(f"SELECT vector_id FROM vectors {_STRAY}").fetchall()
        found = [f"{self.path}: {row[0]}" for row in rows if row[0] != "ok"]
        return found + [f"vector {row[0]} belongs to no passage; call rebuild()" for row in strays]

    def delete_strays(self) -> None:
        """Delete vectors that belong to no passage."""
        with self.transaction(writes=True) as connection:
            connection.execute(f"DELETE FROM vectors {_STRAY}")

    def close(self) -> None:
        """Close the file; nothing else may be called after."""
        with self._turn:
            self._is_closed = True
            self._database.close()

    def _forget(self, connection: sqlite3.Connection, passage_ids: Sequence[str]) -> int:
        """Delete rows and vectors, leave the sources, and let readers know that something changed."""
        num_deleted = 0
        for start in range(0, len(passage_ids), _CHUNK):
            asked = passage_ids[start : start + _CHUNK]
            where = f"WHERE passage_id IN {_places(asked)}"
            connection.execute(
                f"DELETE FROM vectors WHERE vector_id IN (SELECT vector_id FROM passages {where})", asked
            )
            num_deleted += connection.execute(f"DELETE FROM passages {where}", asked).rowcount
        connection.execute("UPDATE settings SET value = value + 1 WHERE name = 'generation'")
        return num_deleted

    def _next_vector_id(self, connection: sqlite3.Connection) -> int:
        row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'passages'").fetchone()
        return 1 + (int(row[0]) if row else 0)

    def _select(self, column: str, ids: Sequence[int | str]) -> list[tuple[Any, ...]]:
        columns = "vector_id, passage_id, metadata, title, text"
        return self._rows(f"SELECT {columns} FROM passages WHERE {column} IN", ids)

    def _rows(self, query: str, ids: Sequence[int | str]) -> list[tuple[Any, ...]]:
        """Return what a query that ends in IN finds, however many ids there are."""
        rows: list[tuple[Any, ...]] = []
        with self.transaction() as connection:
            for start in range(0, len(ids), _CHUNK):
                asked = ids[start : start + _CHUNK]
                rows += connection.execute(f"{query} {_places(asked)}", asked)
        return rows


def _places(values: Sequence[Any]) -> str:
    return f"({','.join('?' * len(values))})"


def _as_json(passage: Passage) -> str:
    try:
        return json.dumps(dict(passage.metadata), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"metadata of passage {passage.passage_id} cannot be stored as JSON ({error}); "
            "use strings, numbers, booleans, lists and dictionaries"
        ) from error


def _passage(row: tuple[Any, ...]) -> Passage:
    _, passage_id, metadata, title, text = row
    return Passage(text, title=title, passage_id=passage_id, metadata=json.loads(metadata))
