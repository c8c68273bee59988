"""Retriever, the public face: passages in, the most similar ones out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self, TypeGuard

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.passages import Passage, as_passages
from rag_blockcache.retriever.embedder import Embedder, EmbedFunction, Vectors, unit_vectors
from rag_blockcache.retriever.identity import (
    TABLE_FILE,
    check_embedder,
    check_opening,
    check_vectors,
    prepared,
    record_origin,
    recorded_embedder,
)
from rag_blockcache.retriever.metadata_filter import PassageFilter, Where, as_names
from rag_blockcache.retriever.passage_table import PassageTable
from rag_blockcache.retriever.ranking import nearest
from rag_blockcache.retriever.synced_index import SyncedIndex
from rag_blockcache.retriever.training import untrained_index
from rag_blockcache.retriever.verification import damaged_passages, problems


@dataclass(frozen=True)
class SearchResult:
    """A passage that was found.

    Attributes:
        passage: As it was added, with its ``passage_id``.
        score: Cosine of its vector and the query's, from -1 to 1.
    """

    passage: Passage
    score: float


class Retriever:
    """Passages in a directory, searched by similarity.

    What ``add`` and ``delete`` returned from is on the disk and is seen by the next search of
    every process that has the directory open; one writes at a time. Threads may share a
    retriever; searches take turns.

    Args:
        directory: Where the index lies; created when it is not there.
        embedder: Name or local path of a sentence-transformers model, a callable from a list of
            strings to ``(num_texts, dimension)``, or an ``Embedder``. None takes the model that
            is on record. Loaded when a text is embedded first.
        index_factory: FAISS factory string, which decides how a new index is searched. Kinds that
            must be trained, with IVF or PQ say, compare everything until ``save`` finds vectors
            enough (39 for each centroid), and trains. None takes the one on record, ``"Flat"`` for
            a new index, which always compares everything.
        device: Where the embedder runs; None leaves it to sentence-transformers.
        unfiltered_keys: Keys of metadata that no filter asks for. Filters hold all other metadata in memory.

    Raises:
        IndexMismatchError: If the index there was made with another embedder or index_factory.
        StoreError: If the directory holds something else, is damaged, or cannot be written.

    Example:
        >>> import numpy as np, tempfile
        >>> retriever = Retriever(tempfile.mkdtemp(), embedder=lambda texts: [[len(t), 1] for t in texts])
        >>> _ = retriever.add(["short", "very long indeed"])
        >>> [result.passage.text for result in retriever.search("brief", k=1)]
        ['short']
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        embedder: str | EmbedFunction | Embedder | None = None,
        index_factory: str | None = None,
        device: str | None = None,
        unfiltered_keys: Collection[str] = (),
    ) -> None:
        self.directory = Path(directory)
        self._table = PassageTable(prepared(self.directory) / TABLE_FILE)
        self._index = SyncedIndex(self._table, self.directory)
        self._filter = PassageFilter(self._table, unfiltered_keys)
        self._has_written = False
        self._wanted_factory = index_factory
        with ExitStack() as undo:
            undo.callback(self._table.close)
            if embedder is not None and not isinstance(embedder, Embedder):
                embedder = Embedder(embedder, device=device)
            check_opening(self._table, embedder, index_factory)
            self._embedder = embedder or recorded_embedder(self._table, device)
            self._trusted: str | None = None  # the text on record by which the embedder was checked
            if self._embedder is not None and self._embedder.is_callable:
                self._checked_embedder()
            undo.pop_all()

    @property
    def dimension(self) -> int | None:
        """Length of a vector; None while nothing was added."""
        dimension: int | None = self._table.setting("dimension")
        return dimension

    @property
    def embedder_name(self) -> str | None:
        """Name of the embedder; None where only ready vectors were added."""
        name: str | None = self._embedder.name if self._embedder else self._table.setting("embedder")
        return name

    @property
    def can_embed(self) -> bool:
        """Whether there is an embedder, so that texts can be added and asked for without ready vectors."""
        return self._embedder is not None

    @property
    def index_factory(self) -> str:
        """FAISS factory string of the index."""
        return self._table.setting("index_factory") or self._wanted_factory or "Flat"

    def add(
        self,
        passages: Sequence[str | Passage],
        *,
        embeddings: ArrayLike | None = None,
        source_ids: Sequence[str] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Add passages, or replace those whose ``passage_id`` is there, all of them or none.

        Args:
            passages: Those without a ``passage_id`` get their ``content_id``; of two with one id
                the last counts. None of them is changed.
            embeddings: Ready vectors, ``(num_passages, dimension)``, of any length; None embeds
                title and text of each passage.
            source_ids: For ``delete_source``, the document that each came from; None takes
                ``metadata["source"]`` where it is a string.
            progress: Called with the numbers of passages embedded and in all.

        Returns:
            The id of each passage, in order.

        Raises:
            InvalidInputError: If a passage or vector cannot be used, no embedder is known, or
                FAISS cannot make an index by ``index_factory``.
            IndexMismatchError: If vectors have another dimension than those of the index.
            OutOfSpaceError: If the disk is full.
        """
        named = [
            replace(passage, passage_id=passage.passage_id or passage.content_id)
            for passage in as_passages(passages)
        ]
        sources = sources_of(named, source_ids)
        if not named:
            return []
        if embeddings is None:
            vectors = self._embed_passages(named, progress)
        else:
            vectors = unit_vectors(embeddings, num_vectors=len(named))
        with self._table.transaction(writes=True):
            if embeddings is None:
                self._checked_embedder()  # once more: another process may have made the index meanwhile
            record_origin(
                self._table,
                vectors,
                index_factory=self.index_factory,
                embedder=self._embedder,
                probe_text=_embedded_text(named[0]) if embeddings is None else None,
            )
            self._table.put(named, vectors, sources)
        self._has_written = True
        return [passage.passage_id for passage in named]

    def delete(self, passage_ids: Sequence[str]) -> int:
        """Delete passages by id, pass over those that are not there, and return how many were."""
        num_deleted = self._table.delete(as_names(passage_ids))
        self._has_written |= bool(num_deleted)
        return num_deleted

    def delete_source(self, source_id: str) -> int:
        """Delete the passages that came from this document and no other, and return how many."""
        num_deleted = self._table.delete_source(source_id)
        self._has_written |= bool(num_deleted)
        return num_deleted

    def search(
        self,
        query: str | ArrayLike,
        k: int = 10,
        *,
        where: Where | None = None,
        among: Sequence[str] | None = None,
    ) -> list[SearchResult]:
        """Find the passages most similar to a question or vector; see ``search_many``."""
        queries = [query] if isinstance(query, str) else np.asarray(query)[None]
        return self.search_many(queries, k, where=where, among=among)[0]

    def search_many(
        self,
        queries: Sequence[str] | ArrayLike,
        k: int = 10,
        *,
        where: Where | None = None,
        among: Sequence[str] | None = None,
    ) -> list[list[SearchResult]]:
        """Find the passages most similar to each of several questions or vectors.

        Args:
            queries: Questions, or vectors of shape ``(num_queries, dimension)``.
            k: Most results for each; fewer only if fewer passages meet ``where``.
            where: Conditions on metadata: a mapping from keys to a value, a list of values, or
                a callable on the value; or a callable on the whole metadata.
            among: Ids of passages; only these are compared. None compares all.

        Returns:
            Results for each query, best first; of equal scores the passage added first.

        Raises:
            InvalidInputError: If a question is empty, ``k`` is below 1, or no embedder is known.
            IndexMismatchError: If the embedder is not the one that made the index.
        """
        if k < 1:
            raise InvalidInputError(f"k is {k}; ask for at least one passage")
        allowed = self._filter.chosen(where, among)
        vectors = self._embed_queries(queries)
        with self._table.transaction():
            index = self._index.current()
            if index is None or not vectors.size:
                return [[] for _ in vectors]
            check_vectors(self._table, vectors.shape[1])
            hits = nearest(index, self._index.read, vectors, k, allowed())
            found = self._table.passages_of_vectors({hit.vector_id for row in hits for hit in row})
        return [[SearchResult(found[hit.vector_id], hit.score) for hit in row] for row in hits]

    def get(self, passage_ids: Sequence[str]) -> list[Passage]:
        """Return the passages of these ids, in this order, without those that are not there."""
        names = as_names(passage_ids)
        found = self._table.passages(names)
        return [found[name] for name in names if name in found]

    def find(self, where: Where) -> list[str]:
        """Return the ids of the passages that meet conditions as in ``search_many``, oldest first."""
        allowed = self._filter.chosen(where)
        with self._table.transaction():
            names = self._table.names_of_vectors(() if (ids := allowed()) is None else ids)
        return [names[vector_id] for vector_id in sorted(names)]

    def from_source(self, source_id: str) -> list[str]:
        """Return the ids of the passages that came from a document, oldest first."""
        return self._table.passages_of_source(source_id)

    def vectors(self, passage_ids: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Return the vectors of passages by passage id, of length one; what is not there is left out."""
        with self._table.transaction():
            vector_ids = self._table.named_vectors(as_names(passage_ids))
            names = self._table.names_of_vectors(vector_ids)
            chunks = list(self._index.read(vector_ids)) if names else []
        return {
            names[int(vector_id)]: vector
            for vector_ids, vectors in chunks
            for vector_id, vector in zip(vector_ids, vectors, strict=True)
        }

    def __contains__(self, passage_id: object) -> bool:
        return isinstance(passage_id, str) and bool(self._table.passages([passage_id]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._table.passage_ids())

    def __len__(self) -> int:
        return len(self._table)

    def save(self) -> None:
        """Save the FAISS index, so that the next opening is quick; the passages are safe without.

        An index that must be trained is trained first, once there are vectors enough.

        Raises:
            OutOfSpaceError: If the disk is full.
        """
        self._index.save()
        self._has_written = False

    def rebuild(self) -> None:
        """Make the FAISS index anew from the stored vectors, and save it."""
        self._index.forget()
        self.save()

    def verify(self) -> list[str]:
        """Return what is wrong, a sentence for each problem; empty when all is well."""
        with self._table.transaction():
            return problems(self._table, self._index.current(), self.directory)

    def damaged(self) -> list[str]:
        """Return the ids of the passages whose vector is missing or cannot be right; add those again."""
        with self._table.transaction():
            return damaged_passages(self._table)

    def close(self) -> None:
        """Save what this retriever wrote, and close the files; it cannot be used after."""
        try:
            if self._has_written:
                self.save()
        finally:
            self._has_written = False
            self._table.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _checked_embedder(self) -> Embedder:
        if self._embedder is None:
            name = self._table.setting("embedder")
            raise InvalidInputError(
                f"{self.directory} was made with {name or 'ready vectors'}, which cannot be loaded by name; "
                "pass embedder=, or vectors in place of texts"
            )
        probe_text = self._table.setting("probe_text")
        if probe_text is not None and probe_text != self._trusted:
            check_embedder(self._table, self._embedder)
            self._trusted = probe_text
        return self._embedder

    def _embed_passages(
        self, passages: Sequence[Passage], progress: Callable[[int, int], None] | None
    ) -> Vectors:
        embedder = self._checked_embedder()
        texts = [_embedded_text(passage) for passage in passages]
        if self.dimension is None and self.index_factory != "Flat":  # an error now, not after an hour
            dimension = embedder.embed(texts[:1]).shape[1]
            untrained_index(self.index_factory, dimension)
        return embedder.embed(texts, progress=progress)

    def _embed_queries(self, queries: Sequence[str] | ArrayLike) -> Vectors:
        if isinstance(queries, str):
            raise InvalidInputError("queries must be a sequence; use search() for a single one")
        if not _are_texts(queries):
            return unit_vectors(queries, num_vectors=len(np.asarray(queries)))
        if any(not query.strip() for query in queries):
            raise InvalidInputError("a question is empty; ask for something")
        if not queries or self.dimension is None:
            return np.empty((len(queries), 0), np.float32)
        return self._checked_embedder().embed(queries, is_query=True)


def _are_texts(queries: Sequence[str] | ArrayLike) -> TypeGuard[Sequence[str]]:
    return isinstance(queries, Sequence) and all(isinstance(query, str) for query in queries)


def _embedded_text(passage: Passage) -> str:
    return f"{passage.title}\n{passage.text}" if passage.title else passage.text


def sources_of(passages: Sequence[Passage], source_ids: Sequence[str] | None) -> list[str]:
    """Return the document that each passage came from, empty for none; see ``Retriever.add``."""
    if source_ids is None:
        named = [passage.metadata.get("source") for passage in passages]
        return [source if isinstance(source, str) else "" for source in named]
    if isinstance(source_ids, str) or len(source_ids) != len(passages):
        raise InvalidInputError(f"source_ids must name a document for each of the {len(passages)} passages")
    return list(source_ids)
