"""Documents of LangChain to passages and back."""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.documents import Document

from rag_blockcache import Passage
from rag_blockcache.errors import InvalidInputError


def as_passages(documents: Sequence[Document], ids: Sequence[str | None] | None) -> list[Passage]:
    """Return a passage for each document, named by ``ids`` or else by the documents' own ids, if any.

    Raises:
        InvalidInputError: If there is not an id for each document, or a document has no text.
    """
    if ids is not None and len(ids) != len(documents):
        raise InvalidInputError(f"{len(ids)} ids came for {len(documents)} documents; pass one for each")
    names = [document.id for document in documents] if ids is None else ids
    return [
        Passage(document.page_content, passage_id=name or "", metadata=document.metadata)
        for document, name in zip(documents, names, strict=True)
    ]


def as_document(passage: Passage) -> Document:
    """Return the document that a passage was made of."""
    return Document(id=passage.passage_id, page_content=passage.text, metadata=dict(passage.metadata))
