"""What a FAISS index must learn from vectors before it can be filled, and how many that takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import faiss
import numpy as np

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.retriever.embedder import Vectors

_PER_CENTROID = 39  # FAISS's own advice; below it, it warns
_SAMPLED_PER_CENTROID = 64  # more makes training longer and cells hardly better
_PER_DIMENSION = 10  # for principal components
_LEAST = 256  # for kinds that only learn the range of numbers
_OPQ_CENTROIDS = 256  # in each part of a vector, whatever the code that follows
_UNFIT = (faiss.IndexNSG, faiss.IndexNNDescent, faiss.IndexIDMap)  # refuse to grow, or to be given ids


def untrained_index(index_factory: str, dimension: int) -> Any:
    """Build the FAISS index that a factory string describes, for inner products.

    Raises:
        InvalidInputError: If FAISS cannot build it for vectors of this dimension, or it cannot be
            filled step by step.
    """
    try:
        index = faiss.index_factory(dimension, index_factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise InvalidInputError(
            f"FAISS cannot make index_factory {index_factory!r} for cosines of {dimension} dimensions "
            f"({reason_of(error)}); try 'Flat', 'HNSW32' or 'IVF256,Flat'"
        ) from error
    if any(isinstance(part, _UNFIT) for part in _parts(index)):
        raise InvalidInputError(
            f"index_factory {index_factory!r} cannot be filled step by step under ids of its owner; "
            "try 'Flat', 'HNSW32' or 'IVF256,Flat'"
        )
    return index


def num_to_train(index_factory: str, dimension: int) -> int:
    """Return how many vectors an index should be trained on at least; 0 if it needs no training."""
    index = untrained_index(index_factory, dimension)
    if index.is_trained:
        return 0
    return max((num_vectors for part in _parts(index) for num_vectors in _needs(part)), default=_LEAST)


def num_to_sample(index_factory: str, dimension: int) -> int:
    """Return how many vectors an index is trained on, where there are so many."""
    return num_to_train(index_factory, dimension) * _SAMPLED_PER_CENTROID // _PER_CENTROID


def flat_template(dimension: int) -> bytes:
    """Return an empty index that compares everything, as bytes."""
    return _serialized(faiss.IndexIDMap2(faiss.IndexFlatIP(dimension)))


def untrained_template(index_factory: str, dimension: int) -> bytes | None:
    """Return an empty index of a kind that needs no training, as bytes; None of a kind that does.

    Raises:
        InvalidInputError: If FAISS cannot make or fill it.
    """
    index = faiss.IndexIDMap2(untrained_index(index_factory, dimension))
    return _fillable(index, index_factory) if index.is_trained else None


def trained_template(index_factory: str, sample: Vectors) -> bytes:
    """Train an index on a sample, and return it empty, as bytes: every index is filled from it.

    Raises:
        InvalidInputError: If FAISS cannot train or fill it.
    """
    index = faiss.IndexIDMap2(untrained_index(index_factory, sample.shape[1]))
    try:
        index.train(sample)
    except RuntimeError as error:
        raise InvalidInputError(
            f"index_factory {index_factory!r} cannot be trained on {len(sample)} vectors "
            f"({reason_of(error)}); index into another directory with 'Flat' or 'HNSW32'"
        ) from error
    return _fillable(index, index_factory)


def reason_of(error: BaseException) -> str:
    """Return the last part of a FAISS message: what went wrong, without where in its source."""
    return str(error).strip().rpartition("Error: ")[2].partition("\n")[0]


def _fillable(index: Any, index_factory: str) -> bytes:
    template = _serialized(index)
    vectors = np.eye(2, index.d, dtype=np.float32)
    try:
        for number, vector in enumerate(vectors):
            index.add_with_ids(vector[None], np.array([number]))
    except RuntimeError as error:
        raise InvalidInputError(
            f"index_factory {index_factory!r} cannot be filled step by step ({reason_of(error)}); "
            "try 'Flat', 'HNSW32' or 'IVF256,Flat'"
        ) from error
    return template


def _serialized(index: Any) -> bytes:
    template: bytes = faiss.serialize_index(index).tobytes()
    return template


def _parts(index: Any) -> Iterator[Any]:
    """Yield an index and those inside it, each as the kind that it is."""
    part = faiss.downcast_index(index)
    yield part
    for name in ("index", "base_index", "storage"):
        inner = getattr(part, name, None)
        if isinstance(inner, faiss.Index):
            yield from _parts(inner)


def _needs(part: Any) -> Iterator[int]:
    """Yield how many vectors each of the things that a part learns takes."""
    if isinstance(part, faiss.IndexIVF):
        yield _PER_CENTROID * part.nlist
    if hasattr(part, "pq"):
        yield _PER_CENTROID * part.pq.ksub
    if hasattr(part, "aq"):
        yield _PER_CENTROID << int(faiss.vector_to_array(part.aq.nbits).max())
    if isinstance(part, faiss.IndexPreTransform):
        chain: Any = part.chain
        for place in range(chain.size()):
            transform = faiss.downcast_VectorTransform(chain.at(place))
            is_optimised = isinstance(transform, faiss.OPQMatrix)
            yield _PER_CENTROID * _OPQ_CENTROIDS if is_optimised else _PER_DIMENSION * transform.d_in
