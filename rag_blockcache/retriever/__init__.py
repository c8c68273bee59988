"""The FAISS index and the passages behind it.

Two files lie in an index directory. ``passages.sqlite`` is the truth: passages, the vector of each, and the
empty but trained FAISS index that vectors go into, once there are enough to train it; until then they are
all compared. ``vectors-<checksum>.faiss`` is that index filled, saved
so that opening is quick; it can always be made again.

Why nothing can be lost or mixed up: an id names one vector for ever (see ``passage_table``), so the index is
right exactly when its ids are those of the table. Before each search the two sets are compared, if anything
was committed since, by whomever; ids that the table lacks are removed, ids that the index lacks are added. A
process killed at any instant leaves a committed table, the FAISS file that it names, perhaps an old one,
which is brought up to date, and perhaps others that it does not name, which are not read.

Reading order: ``embedder`` (texts to vectors), ``passage_table``, ``training`` and ``vector_index`` (the only
ones that know FAISS), ``synced_index`` (both kept in step), ``identity`` (what made them, on record),
``metadata_filter``, ``ranking`` (the k best, exactly scored), ``verification``, ``retriever``.
"""

from __future__ import annotations

from rag_blockcache.retriever.embedder import Embedder
from rag_blockcache.retriever.retriever import Retriever, SearchResult

__all__ = ["Embedder", "Retriever", "SearchResult"]
