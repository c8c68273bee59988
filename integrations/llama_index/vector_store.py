"""``BlockCacheVectorStore``: a LlamaIndex vector store that prefills what is added to it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core.indices.query.embedding_utils import get_top_k_mmr_embeddings
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
    VectorStoreQueryResult,
)
from pydantic import ConfigDict, Field, PrivateAttr

from rag_blockcache import SharedCache
from rag_blockcache.errors import InvalidInputError
from rag_blockcache.prefilled_index import PrefilledIndex
from rag_blockcache.retriever import SearchResult

from .metadata_filters import Condition, as_condition
from .nodes import NODE_KEY, as_node, as_passage, is_kept_by_index, other_forms, source_of
from .options import EngineOptions

_MMR_PREFETCH_FACTOR = 4  # candidates of which the k most diverse are chosen, as other stores have it


class BlockCacheVectorStore(EngineOptions, BasePydanticVectorStore):
    """Nodes in a FAISS index on disk, their KV states computed when they are added.

    A node is prefilled as LlamaIndex will show it to a model: its text, with the metadata that a model may
    see. A ``BlockCacheLLM`` with the same model and ``cache_dir`` shares the engine, and finds these nodes in
    its prompts. Deleting nodes deletes their KV states, unless another node has the same text. Nodes are kept
    as JSON, never pickled.

    Without ``model_name`` and ``model`` it only indexes. Nodes that were added so are prefilled when the
    store is opened with a model, and ``index.prefill()`` called. An index that ``rag-blockcache
    index-and-prefill`` has made is searched and added to alike, if it was made in the same passage format.

    All of it is on disk when a method returns; closing, ``persist`` and the end of the process save the FAISS
    index too, so that the next opening is quick.

    Example:
        >>> from llama_index.core.schema import TextNode
        >>> store = BlockCacheVectorStore(
        ...     cache_dir=tmp_path / "kv", model=tiny_model, tokenizer=tiny_tokenizer
        ... )
        >>> store.add([TextNode(text="Ada wrote the note.", id_="a", embedding=[1, 0])])
        ['a']
        >>> store.query(VectorStoreQuery(query_embedding=[1, 0], similarity_top_k=1)).similarities
        [1.0]
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    stores_text: bool = True
    is_embedding_query: bool = True
    cache_dir: str = Field(description="Directory of the index and the KV states; made if missing.")
    index_factory: str | None = Field(default=None, description="FAISS index; see Retriever.")
    prefills: bool = Field(default=True, description="Encode when nodes are added, not when they are used.")

    _engine: SharedCache | None = PrivateAttr(default=None)
    _index: PrefilledIndex = PrivateAttr()

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self._engine = self.make_engine()
        self._index = PrefilledIndex(
            self.cache_dir,
            cache=self._engine,
            index_factory=self.index_factory,
            adapter=self.adapter,
            other_forms=other_forms,
            unfiltered_keys=[NODE_KEY],
        )

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex serializes it under."""
        return "BlockCacheVectorStore"

    @classmethod
    def from_persist_dir(cls, persist_dir: str | Path, **fields: Any) -> BlockCacheVectorStore:
        """Open the store in a directory again; the same as naming it as ``cache_dir``."""
        return cls(cache_dir=persist_dir, **fields)

    @property
    def index(self) -> PrefilledIndex:
        """What does the work: it counts what was encoded, and prefills what is pending."""
        return self._index

    @property
    def client(self) -> PrefilledIndex:
        """The index."""
        return self.index

    @property
    def engine(self) -> SharedCache | None:
        """The cache of the model; None without a model."""
        return self._engine

    # Changing

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Index nodes that have their embeddings, each in place of the one that had its id, and prefill them.

        Args:
            nodes: With embeddings.
            **kwargs: ``prefill`` and ``progress``, as for ``PrefilledIndex.add``.
        """
        return self.index.add(
            [as_passage(node) for node in nodes],
            embeddings=[node.get_embedding() for node in nodes],
            source_ids=[source_of(node) for node in nodes],
            **{"prefill": self.prefills, **kwargs},
        )

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Delete the nodes of a document, and their KV states."""
        self.index.delete_source(ref_doc_id, **delete_kwargs)

    def delete_nodes(
        self,
        node_ids: list[str] | None = None,
        filters: MetadataFilters | None = None,
        **delete_kwargs: Any,
    ) -> None:
        """Delete nodes by their ids, or those that meet filters, or those of the ids that do."""
        if node_ids is None and filters is None:
            raise InvalidInputError("neither node_ids nor filters were given; clear() deletes all nodes")
        self.index.delete(self._chosen(node_ids, filters), **delete_kwargs)

    def clear(self) -> None:
        """Delete all nodes, and their KV states."""
        self.index.clear()

    def persist(self, persist_path: str = "", fs: Any = None) -> None:
        """Save the FAISS index where the store lies; all the rest is on disk already.

        Args:
            persist_path: Not used: the store stays in ``cache_dir``.
            fs: Likewise.
        """
        self.index.save()

    def close(self) -> None:
        """Save, and close the files; the engine stays."""
        self.index.close()

    # Looking

    def get_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """Return nodes by their ids, or those that meet filters, or all."""
        return [as_node(passage) for passage in self.index.get(self._chosen(node_ids, filters))]

    def _chosen(self, node_ids: list[str] | None, filters: MetadataFilters | None) -> list[str]:
        if filters is None:
            return list(self.index) if node_ids is None else node_ids
        found = self.index.find(as_condition(filters))
        return found if node_ids is None else [name for name in node_ids if name in set(found)]

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """Find the nodes most similar to an embedding; similarities are cosines.

        Args:
            query: In the modes ``default`` and ``mmr``.
            **kwargs: For ``mmr``: ``mmr_threshold``, and ``mmr_prefetch_k`` or ``mmr_prefetch_factor``, which
                say among how many of the most similar nodes to choose.

        Raises:
            InvalidInputError: If the query is of another mode, or has no embedding.
        """
        if query.query_embedding is None:
            raise InvalidInputError("the query has no embedding; this store searches by embedding only")
        if query.mode == VectorStoreQueryMode.DEFAULT:
            return _result(self._search(query, query.similarity_top_k))
        if query.mode == VectorStoreQueryMode.MMR:
            return self._most_diverse(query, **kwargs)
        raise InvalidInputError(f"the query is of mode {query.mode.value!r}; use 'default' or 'mmr'")

    def _search(self, query: VectorStoreQuery, k: int) -> list[SearchResult]:
        return self.index.search(
            np.asarray(query.query_embedding), k, where=_condition(query), among=self._among(query.node_ids)
        )

    def _among(self, node_ids: list[str] | None) -> list[str] | None:
        """Return the nodes to compare, None for all.

        ``VectorStoreIndex`` sends the ids of all nodes that it has in its own document store along with every
        query. Of a store that keeps texts these are the index nodes and images, or none: no restriction.
        """
        if not node_ids or all(is_kept_by_index(passage) for passage in self.index.get(node_ids)):
            return None
        return node_ids

    def _most_diverse(
        self,
        query: VectorStoreQuery,
        *,
        mmr_threshold: float | None = None,
        mmr_prefetch_k: int | None = None,
        mmr_prefetch_factor: float = _MMR_PREFETCH_FACTOR,
    ) -> VectorStoreQueryResult:
        num_candidates = mmr_prefetch_k or int(query.similarity_top_k * mmr_prefetch_factor)
        found = {result.passage.passage_id: result for result in self._search(query, num_candidates)}
        vectors = self.index.vectors(list(found))
        names = [name for name in found if name in vectors]  # others were deleted a moment ago
        scores, chosen = get_top_k_mmr_embeddings(
            query.query_embedding or [],
            [vectors[name].tolist() for name in names],
            similarity_top_k=query.similarity_top_k,
            embedding_ids=names,
            mmr_threshold=query.mmr_threshold if mmr_threshold is None else mmr_threshold,
        )
        return _result(
            [SearchResult(found[name].passage, score) for name, score in zip(chosen, scores, strict=True)]
        )

    # What LlamaIndex would do on the event loop

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Add without keeping the event loop."""
        return await asyncio.to_thread(self.add, nodes, **kwargs)

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Delete a document without keeping the event loop."""
        await asyncio.to_thread(self.delete, ref_doc_id, **delete_kwargs)

    async def adelete_nodes(
        self,
        node_ids: list[str] | None = None,
        filters: MetadataFilters | None = None,
        **delete_kwargs: Any,
    ) -> None:
        """Delete nodes without keeping the event loop."""
        await asyncio.to_thread(self.delete_nodes, node_ids, filters, **delete_kwargs)

    async def aclear(self) -> None:
        """Delete all without keeping the event loop."""
        await asyncio.to_thread(self.clear)

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """Return nodes without keeping the event loop."""
        return await asyncio.to_thread(self.get_nodes, node_ids, filters)

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """Query without keeping the event loop."""
        return await asyncio.to_thread(self.query, query, **kwargs)


def _condition(query: VectorStoreQuery) -> Condition | None:
    """Return what a query asks of metadata, None for nothing."""
    asked = None if query.filters is None else as_condition(query.filters)
    if not query.doc_ids:
        return asked
    doc_ids = set(query.doc_ids)
    return lambda metadata: metadata.get("ref_doc_id") in doc_ids and (asked is None or asked(metadata))


def _result(found: Sequence[SearchResult]) -> VectorStoreQueryResult:
    return VectorStoreQueryResult(
        nodes=[as_node(result.passage) for result in found],
        similarities=[result.score for result in found],
        ids=[result.passage.passage_id for result in found],
    )
