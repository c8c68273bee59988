"""Tables of the manifest, and what happens to them inside one transaction."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Sequence

from rag_blockcache.index_records import DocumentRecord, ManifestCounts, PassageRecord, Released

FORMAT_VERSION = 1
APPLICATION_ID = int.from_bytes(b"RAGm", "big")

SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE documents (
    document_id TEXT PRIMARY KEY, content_hash TEXT NOT NULL, bucket INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE blocks (
    block_id TEXT PRIMARY KEY, num_tokens INTEGER NOT NULL, is_done INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE passages (
    passage_id TEXT PRIMARY KEY, block_id TEXT NOT NULL REFERENCES blocks,
    is_embedded INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE holdings (
    document_id TEXT NOT NULL REFERENCES documents ON DELETE CASCADE, position INTEGER NOT NULL,
    passage_id TEXT NOT NULL REFERENCES passages, PRIMARY KEY (document_id, position)
) WITHOUT ROWID;
CREATE TABLE refusals (
    document_id TEXT NOT NULL REFERENCES documents ON DELETE CASCADE, position INTEGER NOT NULL,
    reason TEXT NOT NULL, PRIMARY KEY (document_id, position)
) WITHOUT ROWID;
CREATE INDEX holdings_of_passage ON holdings (passage_id);
CREATE INDEX passages_of_block ON passages (block_id);
CREATE INDEX passages_not_embedded ON passages (passage_id) WHERE is_embedded = 0;
CREATE INDEX blocks_not_done ON blocks (num_tokens, block_id) WHERE is_done = 0
"""

OWN = "passage:"  # before a passage's name: the document that stands for it alone; no path begins like this
AMONG = "IN (SELECT value FROM json_each(?))"  # takes one argument, however many ids there are
IS_HELD = "EXISTS (SELECT 1 FROM holdings AS h WHERE h.passage_id = passages.passage_id)"
IS_NEEDED = """EXISTS (
    SELECT 1 FROM passages AS p JOIN holdings AS h USING (passage_id) WHERE p.block_id = blocks.block_id
)"""
OF_SHARD = """EXISTS (
    SELECT 1 FROM passages AS p JOIN holdings AS h USING (passage_id) JOIN documents AS d USING (document_id)
    WHERE p.block_id = blocks.block_id AND d.bucket % ? = ?
)"""


def bucket_of(document_id: str) -> int:
    """Hash a document's id to the number that, modulo n, is its shard; alike on every machine."""
    return int.from_bytes(hashlib.blake2b(document_id.encode(), digest_size=4).digest(), "big")


def as_json(ids: Iterable[str]) -> str:
    """Write ids as the argument that ``AMONG`` takes."""
    return json.dumps(list(ids))


def own_id(passage_id: str) -> str:
    """Return the id of the document that stands for a passage alone."""
    return OWN + passage_id


def own_document(passage: PassageRecord, content_id: str) -> DocumentRecord:
    """Make the document that holds a passage which is named by its user, not by its content."""
    return DocumentRecord(own_id(passage.passage_id), content_id, (passage,))


def delete_documents(connection: sqlite3.Connection, document_ids: Iterable[str]) -> Released:
    """Delete documents and what they hold; return the passages that they held, and the blocks of those."""
    ids = (as_json(document_ids),)
    held = _held(connection, f"SELECT passage_id FROM holdings WHERE document_id {AMONG}", ids)
    connection.execute(f"DELETE FROM documents WHERE document_id {AMONG}", ids)
    return held


def delete_holdings(connection: sqlite3.Connection, passage_ids: Sequence[str]) -> Released:
    """Take passages out of every document; return those that were held, and their blocks."""
    ids = (as_json(passage_ids),)
    held = _held(connection, f"SELECT passage_id FROM holdings WHERE passage_id {AMONG}", ids)
    connection.execute(f"DELETE FROM holdings WHERE passage_id {AMONG}", ids)
    delete_documents(connection, map(own_id, passage_ids))
    return held


def _held(connection: sqlite3.Connection, query: str, arguments: tuple[str]) -> Released:
    rows = connection.execute(
        f"SELECT passage_id, block_id FROM passages WHERE passage_id IN ({query})", arguments
    ).fetchall()
    return Released(frozenset(row[0] for row in rows), frozenset(row[1] for row in rows))


def insert_document(connection: sqlite3.Connection, document: DocumentRecord) -> None:
    """Insert a document with its passages; passages and blocks that are known keep their state."""
    name, passages = document.document_id, document.passages
    connection.execute(
        "INSERT INTO documents VALUES (?, ?, ?)", (name, document.content_hash, bucket_of(name))
    )
    connection.executemany(
        "INSERT OR IGNORE INTO blocks (block_id, num_tokens) VALUES (?, ?)",
        [(passage.block_id, passage.num_tokens) for passage in passages],
    )
    connection.executemany(
        "INSERT INTO passages (passage_id, block_id) VALUES (?, ?) "
        "ON CONFLICT (passage_id) DO UPDATE SET block_id = excluded.block_id",
        [(passage.passage_id, passage.block_id) for passage in passages],
    )
    connection.executemany(
        "INSERT INTO holdings VALUES (?, ?, ?)",
        [(name, position, passage.passage_id) for position, passage in enumerate(passages)],
    )
    connection.executemany(
        "INSERT INTO refusals VALUES (?, ?, ?)",
        [(name, position, reason) for position, reason in enumerate(document.refusals)],
    )


def release(connection: sqlite3.Connection, before: Released) -> Released:
    """Find what of passages and blocks nobody holds or needs now, and take back what was claimed of it."""
    passages = connection.execute(
        f"SELECT passage_id FROM passages WHERE passage_id {AMONG} AND NOT {IS_HELD}",
        (as_json(before.passages),),
    )
    released = frozenset(row[0] for row in passages)
    blocks = connection.execute(
        f"SELECT block_id FROM blocks WHERE block_id {AMONG} AND NOT {IS_NEEDED}", (as_json(before.blocks),)
    )
    unneeded = frozenset(row[0] for row in blocks)
    connection.execute(f"UPDATE passages SET is_embedded = 0 WHERE passage_id {AMONG}", (as_json(released),))
    connection.execute(f"UPDATE blocks SET is_done = 0 WHERE block_id {AMONG}", (as_json(unneeded),))
    return Released(released, unneeded)


def count(connection: sqlite3.Connection) -> ManifestCounts:
    """Count what documents hold, see ``Manifest.counts``."""
    (num_documents,) = connection.execute("SELECT count(*) FROM documents").fetchone()
    passages = connection.execute(
        "SELECT count(*), coalesce(sum(num_documents > 1), 0), coalesce(sum(is_embedded = 0), 0) FROM ("
        "SELECT count(DISTINCT document_id) AS num_documents, is_embedded "
        "FROM passages JOIN holdings USING (passage_id) GROUP BY passage_id)"
    ).fetchone()
    blocks = connection.execute(
        "SELECT count(*), coalesce(sum(num_tokens), 0), coalesce(sum(is_done = 0), 0), "
        f"coalesce(sum(num_tokens * (is_done = 0)), 0) FROM blocks WHERE {IS_NEEDED}"
    ).fetchone()
    return ManifestCounts(num_documents, *passages, *blocks)
