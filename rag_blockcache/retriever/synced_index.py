"""The FAISS index of a passage table, kept in step with it, and trained once there is enough in it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rag_blockcache.retriever.embedder import Vectors
from rag_blockcache.retriever.passage_table import PassageTable
from rag_blockcache.retriever.training import (
    flat_template,
    num_to_sample,
    num_to_train,
    trained_template,
)
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
        self._is_stand_in = False  # compares everything, where another kind is to be trained
        self._has_told = False

    def current(self) -> VectorIndex | None:
        """Return the index of what is committed, None while nothing was added; within a transaction."""
        generation = self._table.setting("generation")
        if generation != self._generation:
            if self._is_stand_in and self._table.setting("template") is not None:
                self._index = None  # somebody has trained the one that was asked for
            self._index = self._index or self._opened()
            if self._index is not None:
                self._index.match(self._table.vector_ids(), self.read)
            self._generation = generation
        return self._index

    def read(self, vector_ids: Ids) -> Iterator[tuple[Ids, Vectors]]:
        """Read stored vectors by id, in chunks."""
        return self._table.embeddings(vector_ids, self._table.setting("dimension"))

    def save(self) -> None:
        """Save the index, unless it is saved already; one process at a time. Train it first if it is time.

        Raises:
            InvalidInputError: If FAISS cannot train it.
            OutOfSpaceError: If the disk is full.
            StoreError: If the file cannot be written.
        """
        self._train()
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

    def _train(self) -> None:
        """Train on vectors from all of the table; others may read and write meanwhile."""
        with self._table.transaction():
            sample = None if self._table.setting("template") else self._sample()
        if sample is None:
            return
        factory = self._table.setting("index_factory")
        logger.info("%s is trained on %d vectors", factory, len(sample))
        template = trained_template(factory, sample)
        with self._table.transaction(writes=True):
            if self._table.setting("template") is None:  # else another process was faster
                generation = self._table.setting("generation") + 1  # so that all take notice
                self._table.record(
                    template=template, generation=generation, saved_file="", saved_generation=-1
                )

    def _sample(self) -> Vectors | None:
        """Return vectors to train on, of all ages; None if there are too few."""
        dimension, factory = self._table.setting("dimension"), self._table.setting("index_factory")
        vector_ids = self._table.vector_ids()
        if dimension is None or len(vector_ids) < num_to_train(factory, dimension):
            return None
        num_sampled = min(num_to_sample(factory, dimension), len(vector_ids))
        chosen = np.random.default_rng(0).choice(vector_ids, num_sampled, replace=False)
        sample = np.concatenate([vectors for _, vectors in self.read(np.sort(chosen))])
        return sample if len(sample) >= num_to_train(factory, dimension) else None

    def _opened(self) -> VectorIndex | None:
        dimension, template = self._table.setting("dimension"), self._table.setting("template")
        if dimension is None:
            return None
        self._is_stand_in = template is None
        if template is None:
            self._tell(dimension)
            template = flat_template(dimension)
        index, name = VectorIndex(template), self._table.setting("saved_file")
        if name and not index.load(self._directory / name):
            logger.warning("%s is gone or was changed; made again", self._directory / name)
        return index

    def _tell(self, dimension: int) -> None:
        factory = self._table.setting("index_factory")
        if not self._has_told:
            logger.info(
                "%s is trained when there are %d vectors; until then every search compares all, now %d",
                factory,
                num_to_train(factory, dimension),
                len(self._table),
            )
        self._has_told = True
