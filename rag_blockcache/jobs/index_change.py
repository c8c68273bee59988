"""What a change of an index did, and what those who change one have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Protocol

from rag_blockcache.jobs.progress import ProgressCallback
from rag_blockcache.passages import Passage

if TYPE_CHECKING:
    from rag_blockcache.retriever.embedder import Vectors


@dataclass(frozen=True)
class IndexChange:
    """What one call has changed, or several have together.

    Attributes:
        num_added_passages: Passages indexed: new ones, and those put in place of others.
        num_removed_passages: Passages removed.
        num_encoded_blocks: Blocks encoded and stored.
        num_skipped_blocks: Passages whose block was stored already.
        num_not_stored_blocks: Blocks that the disk budget left no room for; they are pending.
        num_dropped_blocks: Blocks deleted, since no passage needs them any more.
        num_tokens: Tokens encoded.
        num_bytes: Bytes of KV states written.
    """

    num_added_passages: int = 0
    num_removed_passages: int = 0
    num_encoded_blocks: int = 0
    num_skipped_blocks: int = 0
    num_not_stored_blocks: int = 0
    num_dropped_blocks: int = 0
    num_tokens: int = 0
    num_bytes: int = 0

    def __add__(self, other: IndexChange) -> IndexChange:
        names = [field.name for field in fields(self)]
        return IndexChange(**{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclass(frozen=True)
class Addition:
    """Passages to index, each with a name of its own.

    Attributes:
        passages: No two have the same ``passage_id``.
        source_ids: The document that each came from; empty for none.
        embeddings: Vectors of length one, ``(num_passages, dimension)``; None to embed the texts.
    """

    passages: Sequence[Passage]
    source_ids: Sequence[str]
    embeddings: Vectors | None

    def groups(self, size: int) -> list[Addition]:
        """Cut it into parts of ``size`` passages."""
        return [self._part(slice(start, start + size)) for start in range(0, len(self.passages), size)]

    def _part(self, rows: slice) -> Addition:
        vectors = None if self.embeddings is None else self.embeddings[rows]
        return Addition(self.passages[rows], self.source_ids[rows], vectors)


class IndexWriter(Protocol):
    """Changes an index; see ``named_passages`` and ``bare_passages``."""

    def put(self, addition: Addition, progress: ProgressCallback | None) -> IndexChange:
        """Index passages, each in place of what had its name; encode nothing."""

    def prefill(self, passages: Sequence[Passage], progress: ProgressCallback | None) -> IndexChange:
        """Encode the blocks of passages that were put."""

    def prefill_pending(self, progress: ProgressCallback | None) -> IndexChange:
        """Encode all blocks that are pending."""

    def remove(self, passage_ids: Sequence[str]) -> IndexChange:
        """Remove passages, whoever holds them; pass over those that are not there."""

    def remove_source(self, source_id: str) -> IndexChange:
        """Remove a document and what only it holds."""

    def remove_all(self) -> IndexChange:
        """Remove everything."""
