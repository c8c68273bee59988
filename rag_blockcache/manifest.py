"""What has been indexed and prefilled: documents, their passages, the passages' blocks.

The manifest is the truth about an index; vectors and blocks follow it. Two claims hold at
every instant, whatever process was killed where:

- a passage marked embedded has its vector saved, a block marked done was stored;
- a passage that no document holds is not marked embedded, and a block that no held passage
  needs is not marked done, so that whoever brings it back does the work again.

Every change is one transaction. What lost its last reference stays on record until
``drop_passages`` and ``drop_blocks`` have seen it deleted.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from rag_blockcache.database import Database
from rag_blockcache.errors import IndexMismatchError, StoreError
from rag_blockcache.index_records import (
    DocumentRecord,
    IndexSettings,
    ManifestCounts,
    PassageRecord,
    PassageState,
    PendingBlock,
    Released,
)
from rag_blockcache.manifest_tables import (
    AMONG,
    APPLICATION_ID,
    FORMAT_VERSION,
    IS_HELD,
    IS_NEEDED,
    OF_SHARD,
    OWN,
    SCHEMA,
    as_json,
    bucket_of,
    count,
    delete_documents,
    delete_holdings,
    insert_document,
    own_document,
    release,
)

FILE_NAME = "manifest.sqlite"

_OWN_CONTENT = (
    f"(SELECT content_hash FROM documents AS own WHERE own.document_id = '{OWN}' || passages.passage_id)"
)
_IS_OWN = f"{_OWN_CONTENT} IS NOT NULL"

_PAGE = 500  # rows in hand at a time where a table may be larger than memory

_COMPARED = {
    # What the fingerprint depends on is named before it.
    "codec": "the codec {0.codec}",
    "conditioning": "{0.conditioning}",
    "fingerprint": "the model {0.model} (fingerprint {0.fingerprint})",
    "embedder": "the embedder {0.embedder}",
    "passage_format": "the passage format {0.passage_format}",
    "splitting": "{0.splitting}",
}

Shard = tuple[int, int]
Change = Literal["new", "changed", "unchanged"]


def is_in_shard(document_id: str, shard: Shard | None) -> bool:
    """Say whether a document belongs to shard ``(i, n)``, ``i`` from 1 to ``n``; alike on every machine."""
    return shard is None or bucket_of(document_id) % shard[1] == shard[0] - 1


class Manifest:
    """The record of one index, in ``directory/manifest.sqlite``.

    One thread per instance; any number of processes per directory.

    Args:
        directory: Directory of the index; made if missing.
        shared_by_threads: The owner makes threads take turns, so that several may use the instance.

    Raises:
        StoreError: If the file there is foreign, damaged, or of another format version.
    """

    def __init__(self, directory: Path | str, *, shared_by_threads: bool = False) -> None:
        self.path = Path(directory) / FILE_NAME
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"no index can be kept in {directory} ({error}); choose another") from error
        self._database = Database(
            self.path,
            application_id=APPLICATION_ID,
            format_version=FORMAT_VERSION,
            schema=SCHEMA,
            shared_by_threads=shared_by_threads,
        )
        self._database.execute("CREATE TEMP TABLE seen (document_id TEXT PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("CREATE TEMP TABLE chosen (block_id TEXT PRIMARY KEY) WITHOUT ROWID")

    @property
    def settings(self) -> IndexSettings | None:
        """What the index was made with; None before the first job."""
        recorded = dict(self._database.read("SELECT name, value FROM settings"))
        return IndexSettings.from_record(recorded) if recorded else None

    def adopt(self, settings: IndexSettings) -> None:
        """Record the settings of the first job; check those of every later one.

        Raises:
            IndexMismatchError: If the index was made with others; the message names both.
        """
        with self._database.transaction() as connection:
            if self.settings is None:
                connection.executemany("INSERT INTO settings VALUES (?, ?)", list(asdict(settings).items()))
        self.check(settings)

    def check(self, settings: IndexSettings) -> None:
        """Refuse settings that do not fit those on record; before the first job, all fit.

        Raises:
            IndexMismatchError: Naming both.
        """
        recorded = self.settings or settings
        for name, what in _COMPARED.items():
            if getattr(recorded, name) != getattr(settings, name):
                before, now = what.format(recorded), what.format(settings)
                raise IndexMismatchError(
                    f"the index in {self.path.parent} was made with {before}, not {now}; "
                    "use the former, or choose another directory"
                )

    def start_scan(self) -> None:
        """Forget which documents were seen."""
        self._database.execute("DELETE FROM seen")

    def see(self, document_id: str) -> None:
        """Note that a document is still there, so that it does not count as gone."""
        self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", document_id)

    def classify(self, document_id: str, content_hash: str) -> Change:
        """Note that a document is there, and say whether its record is out of date.

        Returns:
            ``"unchanged"`` only if the vectors of all of its passages are saved too.
        """
        self.see(document_id)
        recorded = self._database.value(
            "SELECT content_hash FROM documents WHERE document_id = ?", document_id
        )
        if recorded is None:
            return "new"
        return "unchanged" if recorded == content_hash and self._is_embedded(document_id) else "changed"

    def _is_embedded(self, document_id: str) -> bool:
        unembedded = self._database.value(
            "SELECT 1 FROM holdings JOIN passages USING (passage_id) "
            "WHERE document_id = ? AND is_embedded = 0",
            document_id,
        )
        return unembedded is None

    def gone(self, *, shard: Shard | None = None) -> list[str]:
        """Return the documents on record, of one shard or of all, that were not seen since ``start_scan``."""
        index, num_shards = shard or (1, 1)
        query = "SELECT document_id FROM documents WHERE bucket % ? = ? AND document_id NOT IN seen"
        return [document_id for (document_id,) in self._database.read(query, num_shards, index - 1)]

    def replace_documents(self, documents: Sequence[DocumentRecord]) -> Released:
        """Record documents and their passages in place of what was known of them.

        Returns:
            What no document holds any more; it is no longer marked embedded and done.
        """
        with self._database.transaction() as connection:
            before = delete_documents(connection, [document.document_id for document in documents])
            for document in documents:
                insert_document(connection, document)
            return release(connection, before)

    def remove_documents(self, document_ids: Sequence[str]) -> Released:
        """Forget documents.

        Returns:
            What no document holds any more; it is no longer marked embedded and done.
        """
        with self._database.transaction() as connection:
            return release(connection, delete_documents(connection, document_ids))

    def put_passages(self, passages: Iterable[tuple[PassageRecord, str]]) -> Released:
        """Record passages that are named by their users, each in place of what had its name.

        Every one counts as a document, so that jobs over files leave it alone. Its content may change under
        its name, so it is not embedded until it is said to be.

        Args:
            passages: Each with its content id.

        Returns:
            What no document holds any more; it is no longer marked embedded and done.
        """
        documents = [own_document(passage, content_id) for passage, content_id in passages]
        names = as_json(passage.passage_id for document in documents for passage in document.passages)
        with self._database.transaction() as connection:
            before = delete_documents(connection, [document.document_id for document in documents])
            for document in documents:
                insert_document(connection, document)
            connection.execute(f"UPDATE passages SET is_embedded = 0 WHERE passage_id {AMONG}", (names,))
            return release(connection, before)

    def remove_passages(self, passage_ids: Sequence[str]) -> Released:
        """Take passages out of all documents that hold them; those that are not there are passed over.

        Returns:
            What no document holds any more; it is no longer marked embedded and done.
        """
        with self._database.transaction() as connection:
            return release(connection, delete_holdings(connection, passage_ids))

    def unfinished_passages(self) -> list[str]:
        """Return the passages put by name of which nobody has said that they are embedded."""
        query = f"SELECT passage_id FROM passages WHERE is_embedded = 0 AND {_IS_OWN}"
        return [passage_id for (passage_id,) in self._database.read(query)]

    def unembedded(self, passage_ids: Iterable[str]) -> set[str]:
        """Return those of the passages on record whose vectors are not saved."""
        query = f"SELECT passage_id FROM passages WHERE is_embedded = 0 AND passage_id {AMONG}"
        return {passage_id for (passage_id,) in self._database.read(query, as_json(passage_ids))}

    def mark_embedded(self, passage_ids: Iterable[str]) -> None:
        """Note that vectors are saved; passages that no document holds by now stay as they are."""
        with self._database.transaction() as connection:
            statement = f"UPDATE passages SET is_embedded = 1 WHERE passage_id {AMONG} AND {IS_HELD}"
            connection.execute(statement, (as_json(passage_ids),))

    def mark_done(self, block_ids: Iterable[str]) -> None:
        """Note that blocks are stored; blocks that no passage needs by now stay as they are."""
        with self._database.transaction() as connection:
            connection.execute(
                f"UPDATE blocks SET is_done = 1 WHERE block_id {AMONG} AND {IS_NEEDED}",
                (as_json(block_ids),),
            )

    def mark_lost(self, *, passage_ids: Iterable[str] = (), block_ids: Iterable[str] = ()) -> None:
        """Note that vectors or blocks turned out to be missing, so that the next job makes them again."""
        lost_passages, lost_blocks = as_json(passage_ids), as_json(block_ids)
        with self._database.transaction() as connection:
            connection.execute(
                f"UPDATE passages SET is_embedded = 0 WHERE passage_id {AMONG}", (lost_passages,)
            )
            connection.execute(f"UPDATE blocks SET is_done = 0 WHERE block_id {AMONG}", (lost_blocks,))

    def drop_passages(self, delete: Callable[[list[str]], object]) -> int:
        """Have the vectors of passages that no document holds deleted, then forget the passages.

        No other process can bring a passage back meanwhile: the write lock is held. If the
        caller's function fails or the process dies, they are on record still.

        Args:
            delete: Deletes the vectors of these passages, if there, and saves the index.

        Returns:
            How many passages were forgotten.
        """
        return self._drop("passages", "passage_id", f"is_embedded = 0 AND NOT {IS_HELD}", 100 * _PAGE, delete)

    def drop_blocks(self, delete: Callable[[list[str]], object]) -> int:
        """Have blocks that no passage needs deleted, then forget them; see ``drop_passages``."""
        is_unused = (
            "is_done = 0 AND NOT EXISTS (SELECT 1 FROM passages AS p WHERE p.block_id = blocks.block_id)"
        )
        return self._drop("blocks", "block_id", is_unused, _PAGE, delete)

    def _drop(
        self, table: str, column: str, condition: str, page: int, delete: Callable[[list[str]], object]
    ) -> int:
        num_dropped = 0
        while True:
            with self._database.transaction() as connection:
                rows = connection.execute(f"SELECT {column} FROM {table} WHERE {condition} LIMIT {page}")
                ids = [row[0] for row in rows]
                if ids:
                    delete(ids)
                    connection.execute(f"DELETE FROM {table} WHERE {column} {AMONG}", (as_json(ids),))
            num_dropped += len(ids)
            if len(ids) < page:
                return num_dropped

    def choose_hottest(self, count: int, *, usage: Mapping[str, int] | None = None) -> None:
        """Choose blocks for ``pending``: those that were used most, among equals those of most documents.

        Args:
            count: How many to choose.
            usage: How often each block was read, by block id; 0 for those left out.
        """
        uses = usage or {}
        counted = ((uses.get(name, 0), num_documents, name) for name, num_documents in self._references())
        self.choose(name for _, _, name in heapq.nlargest(count, counted))

    def choose(self, block_ids: Iterable[str]) -> None:
        """Choose blocks for ``pending``."""
        self._database.execute("DELETE FROM chosen")
        self._database.execute(
            "INSERT OR IGNORE INTO chosen SELECT value FROM json_each(?)", as_json(block_ids)
        )

    def _references(self) -> Iterator[tuple[str, int]]:
        yield from self._database.read(
            "SELECT block_id, count(DISTINCT document_id) FROM passages JOIN holdings USING (passage_id) "
            "GROUP BY block_id"
        )

    def pending(
        self,
        limit: int,
        *,
        after: PendingBlock | None = None,
        only_chosen: bool = False,
        shard: Shard | None = None,
    ) -> list[PendingBlock]:
        """Return blocks to encode, longest first.

        Args:
            limit: How many at most.
            after: Go on behind this one.
            only_chosen: Only what ``choose_hottest`` chose.
            shard: Only blocks of this shard's documents.
        """
        conditions, arguments = _pending_conditions(only_chosen, shard)
        if after is not None:
            conditions += " AND (num_tokens, block_id) < (?, ?)"
            arguments += (after.num_tokens, after.block_id)
        query = f"""
            SELECT block_id, num_tokens, (
                SELECT min(passage_id) FROM passages WHERE passages.block_id = blocks.block_id AND {IS_HELD}
            ) FROM blocks WHERE {conditions} ORDER BY num_tokens DESC, block_id DESC LIMIT ?"""
        return [PendingBlock(*row) for row in self._database.read(query, *arguments, limit)]

    def num_pending(self, *, only_chosen: bool = False, shard: Shard | None = None) -> tuple[int, int]:
        """Return how many blocks ``pending`` would go through, and how many tokens they have."""
        conditions, arguments = _pending_conditions(only_chosen, shard)
        query = f"SELECT count(*), coalesce(sum(num_tokens), 0) FROM blocks WHERE {conditions}"
        num_blocks, num_tokens = next(self._database.read(query, *arguments))
        return num_blocks, num_tokens

    def passages(self, *, page: int = _PAGE) -> Iterator[list[PassageState]]:
        """Yield all passages that documents hold, a page at a time; the manifest may change between pages."""
        query = f"""
            SELECT passage_id, coalesce({_OWN_CONTENT}, passage_id), block_id, num_tokens,
                count(DISTINCT document_id), is_embedded, is_done
            FROM passages JOIN holdings USING (passage_id) JOIN blocks USING (block_id)
            WHERE passage_id > ? GROUP BY passage_id ORDER BY passage_id LIMIT ?"""
        last = ""
        while rows := list[Any](self._database.read(query, last, page)):
            yield [PassageState(a, b, c, d, e, bool(f), bool(g)) for a, b, c, d, e, f, g in rows]
            last = rows[-1][0]

    def known_passages(self, passage_ids: Iterable[str]) -> set[str]:
        """Return those of the passages that are on record, held or about to be dropped."""
        return self._known("passages", "passage_id", passage_ids)

    def known_blocks(self, block_ids: Iterable[str]) -> set[str]:
        """Return those of the blocks that are on record, needed or about to be dropped."""
        return self._known("blocks", "block_id", block_ids)

    def _known(self, table: str, column: str, ids: Iterable[str]) -> set[str]:
        query = f"SELECT {column} FROM {table} WHERE {column} {AMONG}"
        return {found for (found,) in self._database.read(query, as_json(ids))}

    def needed_blocks(self, block_ids: Iterable[str]) -> set[str]:
        """Return those of the blocks that a passage needs which some document holds."""
        query = f"SELECT block_id FROM blocks WHERE block_id {AMONG} AND {IS_NEEDED}"
        return {found for (found,) in self._database.read(query, as_json(block_ids))}

    def passages_with_blocks(self, block_ids: Iterable[str], *, limit: int) -> list[str]:
        """Return passages that documents hold and that have one of these blocks, so many at most."""
        query = f"SELECT passage_id FROM passages WHERE block_id {AMONG} AND {IS_HELD} LIMIT ?"
        return [passage_id for (passage_id,) in self._database.read(query, as_json(block_ids), limit)]

    def documents_of(self, passage_id: str) -> list[str]:
        """Return the documents that hold a passage, in order of their ids."""
        query = "SELECT DISTINCT document_id FROM holdings WHERE passage_id = ? ORDER BY document_id"
        return [document_id for (document_id,) in self._database.read(query, passage_id)]

    def passages_of(self, document_id: str) -> list[str]:
        """Return the passages of a document in reading order."""
        query = "SELECT passage_id FROM holdings WHERE document_id = ? ORDER BY position"
        return [passage_id for (passage_id,) in self._database.read(query, document_id)]

    def refusals(self) -> Iterator[tuple[str, str]]:
        """Yield document and reason of everything that could not become a passage."""
        yield from self._database.read(
            "SELECT document_id, reason FROM refusals ORDER BY document_id, position"
        )

    def counts(self) -> ManifestCounts:
        """Count documents, passages and blocks, all of them and those with work left."""
        with self._database.snapshot() as connection:
            return count(connection)

    def copy_to(self, directory: Path | str) -> Manifest:
        """Return a copy in another directory, to try things out on."""
        Path(directory).mkdir(mode=0o700, parents=True, exist_ok=True)
        self._database.copy_to(Path(directory) / FILE_NAME)
        return Manifest(directory)

    def problems(self) -> list[str]:
        """Return what SQLite finds wrong with the file; reads all of it."""
        found = [row[0] for row in self._database.read("PRAGMA integrity_check")]
        return [] if found == ["ok"] else found

    def close(self) -> None:
        """Close the file; the manifest cannot be used afterwards."""
        self._database.close()


def _pending_conditions(only_chosen: bool, shard: Shard | None) -> tuple[str, tuple[object, ...]]:
    conditions, arguments = f"is_done = 0 AND {IS_NEEDED}", ()
    if only_chosen:
        conditions += " AND block_id IN chosen"
    if shard is None:
        return conditions, arguments
    return f"{conditions} AND {OF_SHARD}", (shard[1], shard[0] - 1)
