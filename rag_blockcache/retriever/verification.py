"""What can be wrong with an index, and how it is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rag_blockcache.retriever.passage_table import PassageTable
from rag_blockcache.retriever.vector_index import Ids, VectorIndex, is_intact

_OFF = 1e-3  # a stored vector has length one, or nought


def problems(table: PassageTable, index: VectorIndex | None, directory: Path) -> list[str]:
    """Compare passages, vectors and FAISS index, and return a sentence for each thing that is wrong.

    Args:
        table: In a transaction, so that nothing changes meanwhile.
        index: The FAISS index, brought up to the table; None while nothing was added.
        directory: Where it is saved.
    """
    found = table.damage()
    if index is None:
        return found
    readable, spoilt = _stored_vectors(table)
    ids = table.vector_ids()
    found += _told(
        table,
        np.setdiff1d(ids, readable),
        f"has no vector of {table.setting('dimension')} dimensions; add it again",
    )
    found += _told(table, spoilt, "has a vector that is not of length one; add it again")
    found += _told(table, np.setdiff1d(readable, index.ids), "is not in the FAISS index; call rebuild()")
    found += [
        f"id {vector_id} of the FAISS index has no passage; call rebuild()"
        for vector_id in np.setdiff1d(index.ids, ids)
    ]
    saved = table.setting("saved_file")
    if saved and not is_intact(directory / saved):
        found.append(f"{directory / saved} is gone or was changed; no passage is lost, call rebuild()")
    return found


def damaged_passages(table: PassageTable) -> list[str]:
    """Return the ids of the passages whose vector is missing or spoilt; see ``problems``."""
    if table.setting("dimension") is None:
        return []
    readable, spoilt = _stored_vectors(table)
    names = table.names_of_vectors(np.union1d(np.setdiff1d(table.vector_ids(), readable), spoilt))
    return [names[vector_id] for vector_id in sorted(names)]


def _stored_vectors(table: PassageTable) -> tuple[Ids, Ids]:
    """Return the ids of passages whose vectors can be read, and those of vectors that are off."""
    readable, spoilt = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for ids, vectors in table.embeddings(table.vector_ids(), table.setting("dimension")):
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
        is_unit = (np.abs(lengths - 1) < _OFF) | (lengths == 0)  # False where not a number
        readable.append(ids)
        spoilt.append(ids[~is_unit])
    return np.concatenate(readable), np.concatenate(spoilt)


def _told(table: PassageTable, vector_ids: Ids, what: str) -> list[str]:
    names = table.names_of_vectors(vector_ids)
    return [f"passage {names[vector_id]} {what}" for vector_id in sorted(names)]
