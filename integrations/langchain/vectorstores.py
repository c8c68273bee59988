"""``BlockCacheVectorStore``: a LangChain vector store that prefills what is added to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.runnables.config import run_in_executor
from langchain_core.vectorstores import VectorStore
from langchain_core.vectorstores.utils import maximal_marginal_relevance

from rag_blockcache import Passage, SharedCache
from rag_blockcache.errors import InvalidInputError
from rag_blockcache.prefilled_index import PrefilledIndex
from rag_blockcache.retriever.metadata_filter import Where

from ..cache_options import CacheOptions
from .documents import as_document, as_passages
from .retrievers import BlockCacheRetriever


class BlockCacheVectorStore(VectorStore):
    """Documents in a FAISS index on disk, their KV states computed when they are added.

    A document is prefilled as chains show it: its ``page_content``, without white space around it. A
    ``ChatBlockCache`` with the same ``model`` and ``cache_dir`` shares the engine, and finds these documents
    in its prompts. Deleting documents deletes their KV states, unless another has the same text. So
    LangChain's ``index()`` with a record manager encodes what is new, drops what has gone, and does no more.
    Nothing is pickled; metadata must be what JSON can hold.

    Without ``model`` it only indexes. Documents that were added so are prefilled when the store is opened
    with a model, and ``index.prefill()`` called. An index that ``rag-blockcache index-and-prefill`` has made
    is searched and added to alike, if it was made in the same passage format.

    All of it is on disk when a method returns; closing, and the end of the process, save the FAISS index too,
    so that the next opening is quick.

    Args:
        embedding: Embeds documents and questions.
        cache_dir: Directory of the index and the KV states; made if missing.
        model: Hub id, folder, or a loaded causal language model of transformers; None only indexes.
        index_factory: FAISS factory string, see ``Retriever``.
        prefills: Encode when documents are added; otherwise when they are used, or by ``index.prefill()``.
        **options: Of the engine: ``tokenizer``, ``device``, ``dtype``, ``adapter``, ``preamble``,
            ``passage_format``, ``blocks_see``, ``disk_budget_bytes``, ``memory_budget_bytes``,
            ``device_budget_bytes``, ``salt``, ``admission``, ``guard_rate`` and ``guard_threshold``, as for
            ``ChatBlockCache``.

    Raises:
        ValueError: If there is no such option.

    Attributes:
        index: What does the work: it counts what was encoded, and prefills what is pending.
        engine: The cache of the model, None without.

    Example:
        >>> from langchain_core.embeddings import DeterministicFakeEmbedding
        >>> store = BlockCacheVectorStore.from_texts(
        ...     ["Ada wrote the note.", "Bob read it."],
        ...     DeterministicFakeEmbedding(size=8),
        ...     cache_dir=tmp_path / "kv",
        ...     model=tiny_model,
        ...     tokenizer=tiny_tokenizer,
        ... )
        >>> store.similarity_search("Bob read it.", k=1)[0].page_content
        'Bob read it.'
        >>> store.index.totals.num_encoded_blocks
        2
    """

    def __init__(
        self,
        embedding: Embeddings,
        cache_dir: str | Path,
        *,
        model: Any = None,
        index_factory: str | None = None,
        prefills: bool = True,
        **options: Any,
    ) -> None:
        self._embedding, self._prefills = embedding, prefills
        chosen = CacheOptions(cache_dir=str(cache_dir), **options)
        self.engine: SharedCache | None = None if model is None else chosen.shared_cache(model)
        self.index = PrefilledIndex(
            cache_dir, cache=self.engine, index_factory=index_factory, adapter=chosen.adapter
        )

    @property
    def embeddings(self) -> Embeddings:
        """What embeds documents and questions."""
        return self._embedding

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Open a store, and add texts to it.

        Args:
            texts: To add.
            embedding: As for the constructor.
            metadatas: One for each text.
            ids: One for each text, or None where there is none.
            **kwargs: As for the constructor; ``cache_dir`` is needed.
        """
        store = cls(embedding, **kwargs)
        store.add_texts(texts, metadatas, ids=ids)
        return store

    def close(self) -> None:
        """Save, and close the files; the engine stays."""
        self.index.close()

    # Changing

    def add_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        """Embed, index and prefill documents, each in place of the one that had its id.

        Args:
            documents: Those without an id get a hash of text and metadata, so that adding the same again
                changes nothing.
            **kwargs: ``ids`` in place of the documents' own, ``prefill`` in place of ``prefills``, and
                ``progress`` as for ``PrefilledIndex.add``. ``batch_size``, which ``index()`` passes, changes
                nothing: all documents of a call are worked on together.

        Returns:
            The id of each document, in order.

        Raises:
            InvalidInputError: If a document has no text, or metadata that JSON cannot hold.
        """
        passages, options = self._given(documents, kwargs)
        vectors = self._embedding.embed_documents([passage.text for passage in passages])
        return self.index.add(passages, embeddings=vectors, **options)

    async def aadd_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        """Add documents without keeping the event loop; see ``add_documents``."""
        passages, options = self._given(documents, kwargs)
        vectors = await self._embedding.aembed_documents([passage.text for passage in passages])
        return await run_in_executor(None, self.index.add, passages, embeddings=vectors, **options)

    def _given(
        self, documents: Sequence[Document], kwargs: dict[str, Any]
    ) -> tuple[list[Passage], dict[str, Any]]:
        """Return passages, and what else ``PrefilledIndex.add`` is told."""
        options = {"prefill": self._prefills, **kwargs}
        passages = as_passages(documents, options.pop("ids", None))
        options.pop("batch_size", None)
        _refuse({name: options[name] for name in options if name not in ("prefill", "progress")})
        return passages, options

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool:
        """Delete documents, and their KV states; those that are not there are passed over.

        Args:
            ids: None deletes all.
            **kwargs: None.
        """
        _refuse(kwargs)
        if ids is None:
            self.index.clear()
        else:
            self.index.delete(ids)
        return True

    # Looking

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Return the documents of these ids, in their order, without those that are not there."""
        return [as_document(passage) for passage in self.index.get(ids)]

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """Return the documents most similar to a question.

        Args:
            query: The question.
            k: Most documents.
            **kwargs: ``filter``: conditions on metadata. A mapping from keys to a value, a list of values, or
                a callable on the value; or a callable on the whole metadata.
        """
        return _documents(self.similarity_search_with_score(query, k, **kwargs))

    def similarity_search_with_score(
        self, query: str, k: int = 4, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """Return documents with their cosines, from -1 to 1; see ``similarity_search``."""
        where = _where(kwargs)
        return self._nearest(self._embedding.embed_query(query), k, where)

    def similarity_search_by_vector(
        self, embedding: list[float], k: int = 4, **kwargs: Any
    ) -> list[Document]:
        """Return the documents most similar to a vector; see ``similarity_search``."""
        return _documents(self._nearest(embedding, k, _where(kwargs)))

    def max_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """Return documents that are similar to a question, and not to one another.

        Args:
            query: The question.
            k: Most documents.
            fetch_k: Among how many of the most similar to choose.
            lambda_mult: From 0, which avoids documents alike, to 1, which asks for similarity alone.
            **kwargs: ``filter``, as for ``similarity_search``.
        """
        where = _where(kwargs)
        return self._most_diverse(self._embedding.embed_query(query), k, fetch_k, lambda_mult, where)

    def max_marginal_relevance_search_by_vector(
        self, embedding: list[float], k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """Return documents for a vector; see ``max_marginal_relevance_search``."""
        return self._most_diverse(embedding, k, fetch_k, lambda_mult, _where(kwargs))

    async def asimilarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """Search without keeping the event loop; see ``similarity_search``."""
        return _documents(await self.asimilarity_search_with_score(query, k, **kwargs))

    async def asimilarity_search_with_score(
        self, query: str, k: int = 4, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """Search without keeping the event loop; see ``similarity_search_with_score``."""
        where = _where(kwargs)
        vector = await self._embedding.aembed_query(query)
        return await run_in_executor(None, self._nearest, vector, k, where)

    async def amax_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """Search without keeping the event loop; see ``max_marginal_relevance_search``."""
        where = _where(kwargs)
        vector = await self._embedding.aembed_query(query)
        return await run_in_executor(None, self._most_diverse, vector, k, fetch_k, lambda_mult, where)

    def _nearest(self, vector: list[float], k: int, where: Where | None) -> list[tuple[Document, float]]:
        found = self.index.search(np.asarray(vector), k, where=where)
        return [(as_document(result.passage), result.score) for result in found]

    def _most_diverse(
        self, vector: list[float], k: int, fetch_k: int, lambda_mult: float, where: Where | None
    ) -> list[Document]:
        found = self.index.search(np.asarray(vector), max(k, fetch_k), where=where)
        vectors = self.index.vectors([result.passage.passage_id for result in found])
        kept = [result.passage for result in found if result.passage.passage_id in vectors]
        candidates = [vectors[passage.passage_id].tolist() for passage in kept]
        chosen = maximal_marginal_relevance(np.asarray(vector), candidates, lambda_mult, k)
        return [as_document(kept[place]) for place in chosen]

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        """Take the cosine for the relevance, as other stores do, and 0 where it is below."""
        return lambda cosine: min(max(cosine, 0.0), 1.0)

    def as_retriever(self, **kwargs: Any) -> BlockCacheRetriever:
        """Return a retriever over this store.

        Args:
            **kwargs: ``k``, ``search_type``, ``search_kwargs`` and the like, see ``BlockCacheRetriever``.
        """
        tags = kwargs.pop("tags", None) or self._get_retriever_tags()
        return BlockCacheRetriever(vectorstore=self, tags=tags, **kwargs)


def _documents(found: Iterable[tuple[Document, float]]) -> list[Document]:
    return [document for document, _ in found]


def _where(options: dict[str, Any]) -> Where | None:
    """Return the filter among the options of a search; there are no others."""
    others = dict(options)
    where: Where | None = others.pop("filter", None)
    _refuse(others)
    return where


def _refuse(options: dict[str, Any]) -> None:
    if options:
        raise InvalidInputError(f"the vector store does not know {sorted(options)}; leave them out")
