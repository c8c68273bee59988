"""FAISS index of unit vectors under ids of our own: filled, searched under a filter, saved atomically."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import faiss
import numpy as np
import xxhash
from numpy.typing import NDArray

from rag_blockcache.errors import OutOfSpaceError, StoreError
from rag_blockcache.retriever.embedder import Vectors
from rag_blockcache.retriever.training import reason_of

Ids: TypeAlias = NDArray[np.int64]
ReadVectors: TypeAlias = Callable[[Ids], Iterator[tuple[Ids, Vectors]]]  # skips ids that cannot be read

_MIN_PROBES = 8

logger = logging.getLogger(__name__)


class VectorIndex:
    """Unit vectors under ids, and which of them are nearest to others.

    FAISS keeps its own numbering straight after a removal in flat kinds only: ``IndexIDMap2``
    over IVF would answer with other vectors' ids, HNSW refuses. There, removed vectors stay
    and are passed over by every search, until they outnumber the others.

    Args:
        template: An empty index, as ``training`` makes it.
    """

    def __init__(self, template: bytes) -> None:
        self._template = np.frombuffer(template, np.uint8)
        self._removed: Ids = np.empty(0, np.int64)
        try:
            self._index: Any = faiss.deserialize_index(self._template)
        except RuntimeError as error:
            raise StoreError(
                f"the trained index in passages.sqlite is damaged ({reason_of(error)}); restore the "
                "directory from a copy, or index the documents again into another one"
            ) from error

    @property
    def ids(self) -> Ids:
        """Ids of the vectors, ascending."""
        held: Ids = faiss.vector_to_array(self._index.id_map)
        return np.setdiff1d(held, self._removed)

    @property
    def num_vectors(self) -> int:
        """Number of vectors that can be found."""
        return int(self._index.ntotal) - len(self._removed)

    @property
    def is_exact(self) -> bool:
        """Whether every vector is compared, as it is."""
        return isinstance(faiss.downcast_index(self._index.index), faiss.IndexFlat)

    @property
    def _core(self) -> Any:
        """The kind that does the work, below transformations of the vectors."""
        core = faiss.downcast_index(self._index.index)
        while isinstance(core, faiss.IndexPreTransform):
            core = faiss.downcast_index(core.index)
        return core

    def can_search(self, allowed: Ids | None) -> bool:
        """Whether FAISS can search this kind of index under this filter."""
        kinds = (faiss.IndexFlat, faiss.IndexScalarQuantizer, faiss.IndexIVF, faiss.IndexHNSW)
        return (allowed is None and not len(self._removed)) or isinstance(self._core, kinds)

    def match(self, ids: Ids, read: ReadVectors) -> None:
        """Remove and add until exactly these ids are held; ``read`` gives the vectors that lack."""
        self._remove(np.setdiff1d(self.ids, ids))
        if len(self._removed) > len(ids):
            self._index, self._removed = faiss.deserialize_index(self._template), self._removed[:0]
        for found, vectors in read(np.setdiff1d(ids, self.ids)):
            self._index.add_with_ids(vectors, found)

    def _remove(self, ids: Ids) -> None:
        if not len(ids):
            return
        if isinstance(self._core, faiss.IndexFlatCodes):
            self._index.remove_ids(ids)
        else:
            self._removed = np.union1d(self._removed, ids)

    def search(self, queries: Vectors, k: int, allowed: Ids | None) -> tuple[Vectors, Ids]:
        """Find the nearest vectors, among those ``allowed`` where that is given.

        Returns:
            Scores and ids, ``(num_queries, k)``, best first; id -1 where nothing more was found.
        """
        selector: Any = None
        if allowed is not None:
            selector = faiss.IDSelectorBatch(allowed)
        elif len(self._removed):
            removed = faiss.IDSelectorBatch(self._removed)  # the next line only points to it
            selector = faiss.IDSelectorNot(removed)
        found: tuple[Vectors, Ids] = self._index.search(queries, k, params=self._parameters(selector, k))
        return found

    def _parameters(self, selector: Any, k: int) -> Any:
        core = self._core
        parameters: Any = None
        if isinstance(core, faiss.IndexIVF):
            parameters = faiss.SearchParametersIVF()
            probes = max(_MIN_PROBES, core.nlist // 32)
            parameters.nprobe = min(probes, core.nlist) if selector is None else core.nlist
        elif isinstance(core, faiss.IndexHNSW):
            parameters = faiss.SearchParametersHNSW()  # type: ignore[attr-defined, unused-ignore]
            parameters.efSearch = max(64, 2 * k)
        elif selector is not None:
            parameters = faiss.SearchParameters()
        if selector is not None:
            parameters.sel = selector
        return parameters

    def save(self, directory: Path) -> str:
        """Write the index to a file that is named by its content, and return the name.

        Whoever records the name makes the file valid; until then it is not looked at.

        Raises:
            OutOfSpaceError: If the disk is full.
            StoreError: If the file cannot be written.
        """
        temporary = directory / "vectors.tmp"
        try:
            faiss.write_index(self._index, str(temporary))
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            path = directory / f"vectors-{_checksum(temporary)}.faiss"
            temporary.replace(path)
            _sync_directory(directory)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            kind = OutOfSpaceError if "No space left" in str(error) else StoreError
            raise kind(
                f"the FAISS index cannot be written to {directory} ({reason_of(error)}); free some space and "
                "see that the directory may be written to; passages are safe, the index can be made again"
            ) from error
        return path.name

    def load(self, path: Path) -> bool:
        """Read what ``save`` wrote; return False, and stay empty, if it is gone or was changed."""
        if not is_intact(path):
            return False
        try:
            self._index = faiss.read_index(str(path))
        except RuntimeError as error:  # between the two looks at it, another process removed it
            logger.debug("%s: %s", path, error)
            return False
        return True


def is_intact(path: Path) -> bool:
    """Whether a file is there and holds what its name says."""
    try:
        return path.name == f"vectors-{_checksum(path)}.faiss"
    except OSError:
        return False


def remove_other_files(directory: Path, name: str) -> None:
    """Remove saved indexes other than the one on record."""
    for path in directory.glob("vectors-*.faiss"):
        if path.name != name:
            path.unlink(missing_ok=True)


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
