"""Passages without blocks: an index that no model has to do with yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rag_blockcache.jobs.index_change import Addition, IndexChange
from rag_blockcache.jobs.progress import JobProgress, ProgressCallback
from rag_blockcache.passages import Passage

if TYPE_CHECKING:
    from rag_blockcache.retriever import Retriever


class BarePassages:
    """Puts and removes passages in a retriever; there is nothing to prefill.

    Args:
        retriever: Has the passages.
    """

    def __init__(self, retriever: Retriever) -> None:
        self._retriever = retriever

    def put(self, addition: Addition, progress: ProgressCallback | None) -> IndexChange:
        """Index passages, each in place of what had its name."""
        num_passages = len(addition.passages)
        self._retriever.add(addition.passages, embeddings=addition.embeddings, source_ids=addition.source_ids)
        if progress is not None:
            progress(JobProgress("embed", num_passages, num_passages))
        return IndexChange(num_added_passages=num_passages)

    def prefill(self, passages: Sequence[Passage], progress: ProgressCallback | None) -> IndexChange:
        """Change nothing."""
        return IndexChange()

    def prefill_pending(self, progress: ProgressCallback | None) -> IndexChange:
        """Change nothing."""
        return IndexChange()

    def remove(self, passage_ids: Sequence[str]) -> IndexChange:
        """Remove passages; pass over those that are not there."""
        return IndexChange(num_removed_passages=self._retriever.delete(passage_ids))

    def remove_source(self, source_id: str) -> IndexChange:
        """Remove the passages that came from a document."""
        return IndexChange(num_removed_passages=self._retriever.delete_source(source_id))

    def remove_all(self) -> IndexChange:
        """Remove everything."""
        return self.remove(list(self._retriever))
