"""``BlockCacheRetriever``: the retriever of a vector store, which takes the number of documents by itself."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.vectorstores import VectorStoreRetriever


class BlockCacheRetriever(VectorStoreRetriever):
    """A retriever over a vector store; ``invoke(question, k=3)`` asks for another number of documents.

    Attributes:
        vectorstore: The store.
        search_type: ``"similarity"``, ``"mmr"`` or ``"similarity_score_threshold"``.
        search_kwargs: Options of every search, such as ``filter``.
        k: Most documents of a search, unless ``search_kwargs`` or the call say otherwise.
    """

    k: int = 4

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        options = {"k": self.k, **self.search_kwargs, **kwargs}
        return super()._get_relevant_documents(query, run_manager=run_manager, **options)

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        options = {"k": self.k, **self.search_kwargs, **kwargs}
        return await super()._aget_relevant_documents(query, run_manager=run_manager, **options)
