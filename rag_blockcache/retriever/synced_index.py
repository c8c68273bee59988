"""The FAISS index of a passage table, kept in step with it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from rag_blockcache.retriever.embedder import Vectors
from rag_blockcache.retriever.passage_table import PassageTable
from rag_blockcache.retriever.vector_index import Ids, VectorIndex, remove_other_files

logger = logging.getLogger(__name__)


class SyncedIndex:
    """Gives the index as it follows from what is committed, and saves it.

    Args:
        table: The truth.
        directory: Where the index is saved.
    """

    def __init__(self, table: PassageTable, directory: Path) -> None:
        self._table = table
        self._directory = directory
        self._index: VectorIndex | None = None  # None until it is needed, and while nothing was added
        self._generation = -1  # of the table, when the index was last the same

    def current(self) -> VectorIndex | None:
        """Return the index of what is committed, None while nothing was added; within a transaction."""
        generation = self._table.setting("generation")
        if generation != self._generation:
            self._index = self._index or self._opened()
            if self._index is not None:
                self._index.match(self._table.vector_ids(), self.read)
            self._generation = generation
        return self._index

    def read(self, vector_ids: Ids) -> Iterator[tuple[Ids, Vectors]]:
        """Read stored vectors by id, in chunks."""
        return self._table.embeddings(vector_ids, self._table.setting("dimension"))

    def save(self) -> None:
        """Save the index, unless it is saved already; one process at a time.

        Raises:
            OutOfSpaceError: If the disk is full.
            StoreError: If the file cannot be written.
        """
        with self._table.transaction(writes=True):
            index = self.current()
            if index is None or self._table.setting("saved_generation") == self._generation:
                return
            self._table.record(saved_file=index.save(self._directory), saved_generation=self._generation)
        with self._table.transaction(writes=True):  # now that the new name is committed
            remove_other_files(self._directory, self._table.setting("saved_file"))

    def forget(self) -> None:
        """Drop the index, saved or not, and vectors without a passage: it is made anew when asked for."""
        with self._table.transaction(writes=True):
            self._table.delete_strays()
            self._table.record(saved_file="", saved_generation=-1)
            self._index, self._generation = None, -1

    def _opened(self) -> VectorIndex | None:
        template = self._table.setting("template")
        if template is None:
            return None
        index, name = VectorIndex(template), self._table.setting("saved_file")
        if name and not index.load(self._directory / name):
            logger.warning("%s is gone or was changed; made again", self._directory / name)
        return index
