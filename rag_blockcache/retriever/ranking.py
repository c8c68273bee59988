"""The k nearest vectors: candidates from the index, scores and order from the stored vectors.

FAISS rounds differently for one query and for many, compresses vectors in some kinds, and cuts
equal scores anywhere. Here candidates are scored again, and equal scores stand in order of id,
so that an answer does not depend on how it was asked for.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rag_blockcache.retriever.embedder import Vectors
from rag_blockcache.retriever.vector_index import Ids, ReadVectors, VectorIndex

_SPARE = 16  # candidates beyond k, among which rounding may have changed the order
_ROUNDING = 1e-5  # scores of FAISS and ours differ by less, where vectors are not compressed
_FEW = 10_000  # a filter that leaves no more is answered by comparing them all


class Hit(NamedTuple):
    """A vector that was found, and its cosine with the query."""

    vector_id: int
    score: float


def nearest(
    index: VectorIndex, read: ReadVectors, queries: Vectors, k: int, allowed: Ids | None
) -> list[list[Hit]]:
    """Return the ``k`` nearest of all vectors, or of those allowed, for each query.

    As many come back as there are, up to ``k``, whatever the kind of index and however narrow
    the filter.

    Args:
        index: Where candidates come from.
        read: Gives the vectors of ids, as they are stored.
        queries: Unit vectors, ``(num_queries, dimension)``.
        k: How many are wanted for each.
        allowed: Ids to choose from; None for all.
    """
    num_candidates = index.num_vectors if allowed is None else len(allowed)
    k = min(k, num_candidates)
    if k == 0 or not len(queries):
        return [[] for _ in queries]
    is_narrow = allowed is not None and len(allowed) <= _FEW and not index.is_exact
    if is_narrow or not index.can_search(allowed):
        return _compared(read, queries, k, index.ids if allowed is None else allowed)
    return _from_index(index, read, queries, k, allowed, min(k + _SPARE, num_candidates))


def _from_index(
    index: VectorIndex, read: ReadVectors, queries: Vectors, k: int, allowed: Ids | None, width: int
) -> list[list[Hit]]:
    num_candidates = index.num_vectors if allowed is None else len(allowed)
    scores, ids = index.search(queries, width, allowed)
    hits = _rescored(read, queries, k, ids)
    is_short = np.array([len(row) < k for row in hits])
    if is_short.any():  # cells were not looked into, or a graph has no path
        everything = index.ids if allowed is None else allowed
        _replace(hits, is_short, _compared(read, queries[is_short], k, everything))
    if index.is_exact and width < num_candidates:  # others may be as near as the last one
        last = np.array([row[-1].score if row else -np.inf for row in hits])
        is_cut = last < scores[:, -1] + _ROUNDING
        if is_cut.any():
            wider = min(4 * width, num_candidates)
            _replace(hits, is_cut, _from_index(index, read, queries[is_cut], k, allowed, wider))
    return hits


def _replace(hits: list[list[Hit]], rows: np.ndarray, better: list[list[Hit]]) -> None:
    for row, answer in zip(np.flatnonzero(rows), better, strict=True):
        hits[row] = answer


def _rescored(read: ReadVectors, queries: Vectors, k: int, candidates: Ids) -> list[list[Hit]]:
    """Score each query's own candidates, ``(num_queries, width)``, -1 for none."""
    chunks = list(read(np.unique(candidates[candidates >= 0])))
    known = np.concatenate([ids for ids, _ in chunks]) if chunks else np.empty(0, np.int64)
    vectors = np.concatenate([vectors for _, vectors in chunks]) if chunks else queries[:0]
    hits = []
    for query, row in zip(queries, candidates, strict=True):
        places = np.flatnonzero(np.isin(known, row))
        hits.append(_best(known[places], _scores(query[None], vectors[places])[0], k))
    return hits


def _compared(read: ReadVectors, queries: Vectors, k: int, candidates: Ids) -> list[list[Hit]]:
    """Score all candidates for all queries, a chunk at a time."""
    hits: list[list[Hit]] = [[] for _ in queries]
    for ids, vectors in read(candidates):
        for row, scores in enumerate(_scores(queries, vectors)):
            best = hits[row] + _best(ids, scores, k)
            hits[row] = sorted(best, key=lambda hit: (-hit.score, hit.vector_id))[:k]
    return hits


def _scores(queries: Vectors, vectors: Vectors) -> Vectors:
    """Cosines, summed in float64 and then rounded, so that the order of the sum leaves no trace."""
    cosines = queries.astype(np.float64) @ vectors.astype(np.float64).T  # (num_queries, num_vectors)
    return np.clip(cosines, -1, 1).astype(np.float32)


def _best(ids: Ids, scores: np.ndarray, k: int) -> list[Hit]:
    order = np.lexsort((ids, -scores))[:k]
    return [Hit(int(ids[place]), float(scores[place])) for place in order]
