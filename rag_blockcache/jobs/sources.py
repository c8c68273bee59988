"""Passages that outlive the document they were taken from name another document that holds them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from rag_blockcache.manifest import Manifest
from rag_blockcache.manifest_tables import OWN
from rag_blockcache.passages import Passage

if TYPE_CHECKING:
    from rag_blockcache.retriever import Retriever

_PLACES = ("source", "index", "page")  # metadata that says where in which document a passage stands


def name_other_sources(
    retriever: Retriever, manifest: Manifest, remaining: Mapping[str, Collection[str]]
) -> None:
    """Prepare documents to lose passages: those that others hold too will be said to come from there.

    It is done before the documents lose them, so that dying in between leaves nothing wrong: the
    other source is a true one already.

    Args:
        retriever: Has the passages.
        manifest: Has the documents as they were.
        remaining: For each document that changes, the passages that it will hold; none if it goes.
    """
    moved = []
    for document_id, kept in remaining.items():
        lost = sorted(set(manifest.passages_of(document_id)) - set(kept))
        for passage in retriever.get(lost):
            if passage.metadata.get("source") == document_id:
                holders = _holders(manifest, passage.passage_id, remaining)
                moved += [_said_to_come_from(passage, holder) for holder in holders[:1]]
    if moved:
        retriever.add(moved)


def _holders(manifest: Manifest, passage_id: str, remaining: Mapping[str, Collection[str]]) -> list[str]:
    """Return the documents that will hold a passage once ``remaining`` is on record.

    A passage that stands for itself says where it comes from; that is left alone.
    """
    found = manifest.documents_of(passage_id)
    before = {name for name in found if not name.startswith(OWN)} - remaining.keys()
    return sorted(before | {name for name, kept in remaining.items() if passage_id in kept})


def _said_to_come_from(passage: Passage, document_id: str) -> Passage:
    elsewhere = {key: value for key, value in passage.metadata.items() if key not in _PLACES}
    return replace(passage, metadata={"source": document_id, **elsewhere})
