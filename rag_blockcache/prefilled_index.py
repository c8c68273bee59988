"""PrefilledIndex: passages that come and go a call at a time, searchable, with their blocks prefilled.

What ``index-and-prefill`` does for files, for callers that have passages, such as frameworks' vector stores.
Both may work on one directory; ``verify``, ``gc`` and ``status`` look after it, whoever filled it.
"""

from __future__ import annotations

import hashlib
import json
import threading
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rag_blockcache.errors import InvalidInputError, StoreError
from rag_blockcache.jobs.bare_passages import BarePassages
from rag_blockcache.jobs.index_change import Addition, IndexChange, IndexWriter
from rag_blockcache.jobs.index_lock import index_lock
from rag_blockcache.jobs.named_passages import NamedPassages
from rag_blockcache.jobs.opening import check_bare, open_manifest
from rag_blockcache.jobs.progress import ProgressCallback
from rag_blockcache.jobs.removal import OtherForms, no_other_forms
from rag_blockcache.passages import Passage, as_passages
from rag_blockcache.retriever import Embedder, Retriever, SearchResult
from rag_blockcache.retriever.embedder import EmbedFunction, unit_vectors
from rag_blockcache.retriever.metadata_filter import Where, as_names
from rag_blockcache.retriever.retriever import sources_of

if TYPE_CHECKING:
    from rag_blockcache.block_cache import BlockCache
    from rag_blockcache.manifest import Manifest
    from rag_blockcache.shared_cache import SharedCache

__all__ = ["IndexChange", "PrefilledIndex"]


class PrefilledIndex:
    """Passages in a directory, searched by similarity, their blocks encoded when they are added.

    An index may be opened without a cache: to search it, or to collect passages first. When it is opened
    with one, those are recorded, and ``prefill`` encodes them; from then on it is changed with that model
    only.

    What a method returned from is on the disk. A process killed at any instant leaves an index that is put
    right before the next change: each passage of the interrupted call is there as before, or as it was to be.
    Threads may share an index: changes take turns, searches do not wait for them.

    Args:
        directory: Of the index; made if missing. The cache must keep its blocks in the same.
        cache: Encodes. A ``SharedCache`` is not loaded before something is changed. None only indexes.
        embedder: As for ``Retriever``; not needed where vectors come ready.
        index_factory: As for ``Retriever``.
        device: Where the embedder runs.
        unfiltered_keys: As for ``Retriever``.
        adapter: Name of the adapter on the model of the cache, for the record.
        other_forms: In which texts a passage may be shown beside its own. They are known to the cache as
            long as the passage is there, and encoded when they are first met in a prompt.

    Raises:
        IndexMismatchError: If the index was made with another embedder or index_factory.
        StoreError: If the directory cannot be used.

    Example:
        >>> import tempfile
        >>> from rag_blockcache import BlockCache
        >>> directory = tempfile.mkdtemp()
        >>> cache = BlockCache(tiny_model, directory, tokenizer=tiny_tokenizer, passage_format="verbatim")
        >>> with PrefilledIndex(directory, cache=cache) as index:
        ...     ids = index.add(["Ada wrote the note.", "Bob read it."], embeddings=[[1, 0], [0, 1]])
        ...     found = index.search([1, 0.1], k=1)
        >>> found[0].passage.text, index.totals.num_encoded_blocks
        ('Ada wrote the note.', 2)
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        cache: BlockCache | SharedCache | None = None,
        embedder: str | EmbedFunction | Embedder | None = None,
        index_factory: str | None = None,
        device: str | None = None,
        unfiltered_keys: Collection[str] = (),
        adapter: Path | str | None = None,
        other_forms: OtherForms = no_other_forms,
    ) -> None:
        self.directory = _made(Path(directory))
        self.totals = IndexChange()  # of all changes since this opening
        self._cache, self._adapter, self._other_forms = cache, str(adapter or ""), other_forms
        self._turn = threading.RLock()  # one change at a time
        self._manifest: Manifest | None = None  # until something is changed with a model
        self._retriever = Retriever(
            self.directory / "index",
            embedder=embedder,
            index_factory=index_factory,
            device=device,
            unfiltered_keys=unfiltered_keys,
        )
        self._resources = ExitStack()
        self._resources.callback(self._retriever.close)
        # Closing saves the vector index. Users of vector stores do not close, so it is done for them.
        self._closing = weakref.finalize(self, self._resources.close)

    # Changing

    def add(
        self,
        passages: Sequence[str | Passage],
        *,
        embeddings: ArrayLike | None = None,
        source_ids: Sequence[str] | None = None,
        prefill: bool = True,
        progress: ProgressCallback | None = None,
    ) -> list[str]:
        """Index passages, each in place of the one that had its ``passage_id``, and encode their blocks.

        The same call after an interruption goes on where it was; what is stored is not encoded again. Blocks
        that the disk budget has no room for stay pending.

        Args:
            passages: Those without a ``passage_id`` get a hash of all that they hold, so that adding the same
                again changes nothing. Of two with one id the last counts.
            embeddings: As for ``Retriever.add``.
            source_ids: For ``delete_source``; as for ``Retriever.add``.
            prefill: Encode now; otherwise ``prefill()`` does it later, or the first answer that needs it.
            progress: Called after each group with how many passages are embedded, then prefilled.

        Returns:
            The id of each passage, in order.

        Raises:
            InvalidInputError: If a passage or vector cannot be used.
            IndexMismatchError: If the index was made with another model, passage format or embedder.
            OutOfSpaceError: If the disk is full. What was committed is usable.
            StoreError: If a job that needs the index to itself is at work.
        """
        addition, names = _addition(passages, embeddings, source_ids)
        if names:
            with self._changing() as writer:
                self.totals += writer.put(addition, progress)
                if prefill:
                    self.totals += writer.prefill(addition.passages, progress)
        return names

    def prefill(self, *, progress: ProgressCallback | None = None) -> IndexChange:
        """Encode all blocks that are pending; those that the disk budget has no room for stay so."""
        with self._changing() as writer:
            change = writer.prefill_pending(progress)
            self.totals += change
        return change

    def delete(self, passage_ids: Sequence[str]) -> int:
        """Delete passages, pass over those that are not there, and return how many were.

        Their texts are forgotten with them, their blocks unless other passages have the same.
        """
        names = as_names(passage_ids)
        with self._changing() as writer:
            return self._count(writer.remove(names))

    def delete_source(self, source_id: str) -> int:
        """Delete the passages that came from this document and no other, and return how many."""
        with self._changing() as writer:
            return self._count(writer.remove_source(source_id))

    def clear(self) -> int:
        """Delete everything, and return how many passages that was."""
        with self._changing() as writer:
            return self._count(writer.remove_all())

    def _count(self, change: IndexChange) -> int:
        self.totals += change
        return change.num_removed_passages

    # Looking

    def search(
        self,
        query: str | ArrayLike,
        k: int = 10,
        *,
        where: Where | None = None,
        among: Sequence[str] | None = None,
    ) -> list[SearchResult]:
        """Find the passages most similar to a question or vector; see ``Retriever.search_many``.

        The cache begins to read their blocks, if it is loaded; see ``BlockCache.prefetch``.
        """
        found = self._retriever.search(query, k, where=where, among=among)
        if self._cache is not None:
            self._cache.prefetch(result.passage for result in found)
        return found

    def find(self, where: Where) -> list[str]:
        """Return the ids of the passages whose metadata meet conditions, oldest first."""
        return self._retriever.find(where)

    def get(self, passage_ids: Sequence[str]) -> list[Passage]:
        """Return the passages of these ids, in this order, without those that are not there."""
        return self._retriever.get(passage_ids)

    def vectors(self, passage_ids: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Return the vectors of passages by passage id, of length one; what is not there is left out."""
        return self._retriever.vectors(passage_ids)

    def __contains__(self, passage_id: object) -> bool:
        return passage_id in self._retriever

    def __iter__(self) -> Iterator[str]:
        return iter(self._retriever)

    def __len__(self) -> int:
        return len(self._retriever)

    # Opening and closing

    def save(self) -> None:
        """Save the vector index, so that the next opening is quick; passages are safe without."""
        self._retriever.save()

    def close(self) -> None:
        """Save, and close the files; the cache stays open."""
        with self._turn:
            self._closing()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _changing(self) -> Iterator[IndexWriter]:
        """Give the turn to change the index, among the threads and jobs that do."""
        with self._turn:
            if not self._closing.alive:
                raise StoreError(f"the index in {self.directory} was closed; open it again")
            writer = self._writer()
            with index_lock(self.directory, exclusive=False):
                yield writer

    def _writer(self) -> IndexWriter:
        if self._cache is None:
            check_bare(self.directory)
            return BarePassages(self._retriever)
        cache = _loaded(self._cache)  # asked for each time: others may have closed it, and it is loaded anew
        if self._manifest is None:
            self._manifest = open_manifest(
                self.directory,
                cache=cache,
                retriever=self._retriever,
                other_forms=self._other_forms,
                adapter=self._adapter,
            )
            self._resources.callback(self._manifest.close)
        return NamedPassages(cache, self._retriever, self._manifest, self._other_forms)


def _made(directory: Path) -> Path:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"no index can be kept in {directory} ({error}); choose another") from error
    return directory


def _loaded(cache: BlockCache | SharedCache) -> BlockCache:
    from rag_blockcache.shared_cache import SharedCache  # loads torch, which an index alone does without

    return cache.get() if isinstance(cache, SharedCache) else cache


def _addition(
    passages: Sequence[str | Passage], embeddings: ArrayLike | None, source_ids: Sequence[str] | None
) -> tuple[Addition, list[str]]:
    """Name passages, and choose those that count; return them, and the names of all."""
    given = as_passages(passages)
    sources = sources_of(given, source_ids)
    named = [_named(passage, source) for passage, source in zip(given, sources, strict=True)]
    vectors = unit_vectors(embeddings, num_vectors=len(named)) if named and embeddings is not None else None
    rows = list({passage.passage_id: row for row, passage in enumerate(named)}.values())
    chosen = Addition(
        [named[row] for row in rows],
        [sources[row] for row in rows],
        None if vectors is None else vectors[rows],
    )
    return chosen, [passage.passage_id for passage in named]


def _named(passage: Passage, source_id: str) -> Passage:
    """Name a passage by all that it holds, so that equal texts of two sources stay two passages."""
    if passage.passage_id:
        return passage
    try:
        held = json.dumps([passage.title, passage.text, source_id, dict(passage.metadata)], sort_keys=True)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"metadata of a passage cannot be stored as JSON ({error}); use strings, numbers, booleans, "
            "lists and dictionaries"
        ) from error
    name = hashlib.blake2b(held.encode(), digest_size=16).hexdigest()
    return replace(passage, passage_id=name)
