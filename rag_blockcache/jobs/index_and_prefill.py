"""Documents in, a searchable index and prefilled blocks out; again and again, doing only what is left to do.

The order of commits, and why a process may die between any two:

1. **manifest**: documents and their passages are recorded, with the passages not embedded and the blocks
   pending. From here on no vector and no block exists that the manifest does not know of.
2. **retriever**: passages and vectors are committed. Dying before 3 leaves them unclaimed; the document
   counts as changed, is split again, and its passages are added in place of themselves.
3. **manifest**: the passages are embedded. Only now does the document count as unchanged.
4. When all documents are through, those that have gone are forgotten. What no document holds had its claims
   taken back in the same transaction (in 1 or here), so that whoever brings it back does the work again.
   Only then **retriever** and **store** delete it, under the manifest's write lock, and only after that the
   **manifest** forgets it: dying in between deletes it once more.
5. **store**, then **manifest**: pending blocks are encoded, stored, and recorded as done, a group at a time.
   A block that was stored but not recorded is found in the store and skipped.

Removal comes last before the encoding: a passage that moved from one document to another keeps its block, and
space is freed before it is needed. Until then a search may still find passages of the former text.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rag_blockcache.errors import IndexMismatchError, InvalidInputError
from rag_blockcache.index_records import AS_ADDED, IndexSettings
from rag_blockcache.jobs.documents import PassageSplitter
from rag_blockcache.jobs.index_lock import index_lock
from rag_blockcache.jobs.index_report import IndexReport, JobTally
from rag_blockcache.jobs.indexing import Indexing
from rag_blockcache.jobs.prefilling import Prefill, Prefilling
from rag_blockcache.jobs.progress import ProgressCallback
from rag_blockcache.jobs.scan import Scan
from rag_blockcache.manifest import Manifest, Shard

if TYPE_CHECKING:
    from rag_blockcache.block_cache import BlockCache
    from rag_blockcache.retriever import Retriever

logger = logging.getLogger(__name__)


def index_and_prefill(
    paths: Sequence[Path | str],
    *,
    cache: BlockCache,
    retriever: Retriever,
    manifest: Manifest,
    splitter: PassageSplitter,
    settings: IndexSettings | None = None,
    prefill: Prefill = "all",
    usage: Mapping[str, int] | None = None,
    shard: Shard | None = None,
    dry_run: bool = False,
    progress: ProgressCallback | None = None,
) -> IndexReport:
    """Bring an index up to date with documents, and encode the blocks of their passages.

    Only what is new or changed is done; what has gone from below ``paths`` is removed, documents
    from elsewhere stay. Documents are read one at a time, so memory does not grow with the corpus.
    The same call after an interruption, of any kind, goes on where it was.

    Shards may run at once, on one directory (of one machine) or on one each. Two shards of one
    directory that hold a passage in common can both encode it; only one result is kept.

    Args:
        paths: Files and folders, see ``read_documents``.
        cache: Encodes and stores blocks.
        retriever: Holds passages and vectors.
        manifest: The record, in the same directory as both.
        splitter: Cuts documents into passages.
        settings: What to record of the index; None takes it from the other arguments.
        prefill: ``"all"`` blocks, ``"none"``, or so many of the hottest: those that were read most, and
            among equals those whose passages most documents hold.
        usage: How often blocks were read, by block id, for ``prefill``; None takes what the cache's
            disk store knows, see ``DiskStore.use_counts``.
        shard: ``(i, n)``, ``i`` from 1 to ``n``: take every n-th document, by a hash of its id, and
            look for gone ones among the same.
        dry_run: Change nothing; report what would be done.
        progress: Called often, with how far each stage has come. What it raises ends the job like
            an interruption.

    Returns:
        What was done, with everything that could not be.

    Raises:
        InvalidInputError: If there is not one document to be read below ``paths``, or an argument
            cannot be used. Nothing is removed.
        IndexMismatchError: If the index was made with another model, embedder, format or splitting, or by a
            vector store.
        OutOfSpaceError: If the disk is full. What was committed is usable.
        StoreError: If the directory is held by a job that needs it to itself.
    """
    _check(prefill, shard)
    job = _Job(paths, cache, retriever, manifest, splitter, prefill, usage, shard, JobTally(progress))
    check_origin(manifest.settings, manifest.path.parent, num_passages=len(retriever))
    recorded = settings or settings_of(cache, retriever, splitter)
    if dry_run:
        manifest.check(recorded)
        with tempfile.TemporaryDirectory() as directory, closing(manifest.copy_to(directory)) as scratch:
            return replace(job, manifest=scratch, retriever=None).plan()
    with index_lock(manifest.path.parent, exclusive=False):
        manifest.adopt(recorded)
        return job.run()


def check_origin(recorded: IndexSettings | None, directory: Path, *, num_passages: int = 0) -> None:
    """Refuse an index of passages that a vector store added: its documents are not files that a job reads.

    Args:
        recorded: What the index was made with; None if no manifest says so.
        directory: Of the index.
        num_passages: How many passages it holds.

    Raises:
        IndexMismatchError: If it has passages that no job put there.
    """
    if (recorded is None and num_passages) or (recorded is not None and recorded.splitting == AS_ADDED):
        raise IndexMismatchError(
            f"the index in {directory} holds passages that a vector store split, embedded and added; add "
            "documents through that store, or index into another directory"
        )


def settings_of(cache: BlockCache, retriever: Retriever, splitter: PassageSplitter | str) -> IndexSettings:
    """Say what an index made with these would be made with; a splitter may be named in words."""
    return IndexSettings(
        model=str(cache.model.network.name_or_path),
        fingerprint=cache.fingerprint,
        embedder=retriever.embedder_name or "",
        passage_format=cache.prompt.format.name,
        splitting=str(splitter),
        dtype=str(cache.model.dtype).removeprefix("torch."),
        preamble=cache.prompt.preamble,
        codec=cache.codec,
        blocks_see=cache.blocks_see,
    )


@dataclass(frozen=True)
class _Job:
    """The arguments of ``index_and_prefill``; without retriever, only the manifest is changed."""

    paths: Sequence[Path | str]
    cache: BlockCache
    retriever: Retriever | None
    manifest: Manifest
    splitter: PassageSplitter
    prefill: Prefill
    usage: Mapping[str, int] | None
    shard: Shard | None
    tally: JobTally

    def run(self) -> IndexReport:
        """Index, then encode."""
        assert self.retriever is not None
        self._index()
        self.retriever.save()
        num_blocks, _ = self._choose()
        if num_blocks:
            encoding = Prefilling(
                cache=self.cache, manifest=self.manifest, retriever=self.retriever, tally=self.tally
            )
            only_chosen = isinstance(self.prefill, int)
            encoding.run(only_chosen=only_chosen, shard=self.shard, num_total=num_blocks)
        return self._report(num_planned=0, is_dry_run=False)

    def plan(self) -> IndexReport:
        """Change the manifest, which is a copy, and say what there would be to encode."""
        self._index()
        num_blocks, num_tokens = self._choose()
        self.tally.counts["num_encoded_blocks"] = num_blocks
        self.tally.counts["num_tokens"] = num_tokens
        mean = max(1, num_tokens // max(1, num_blocks))  # bytes of a codec are not quite in proportion
        self.tally.counts["num_bytes"] = num_tokens * self.cache.block_bytes(mean) // mean
        return self._report(num_planned=num_blocks, is_dry_run=True)

    def _index(self) -> None:
        scan = Scan(self.paths, manifest=self.manifest, shard=self.shard, tally=self.tally)
        indexing = Indexing(
            cache=self.cache,
            manifest=self.manifest,
            splitter=self.splitter,
            tally=self.tally,
            retriever=self.retriever,
        )
        for document in scan.outdated():
            indexing.add(document)
        indexing.commit()
        indexing.remove(scan.gone())
        indexing.drop_unused()

    def _choose(self) -> tuple[int, int]:
        """Choose what to encode, and return how many blocks and tokens of that are pending."""
        if self.prefill == "none":
            return 0, 0
        if isinstance(self.prefill, int):
            disk = self.cache.store.disk
            known = disk.use_counts() if self.usage is None and disk is not None else self.usage
            self.manifest.choose_hottest(self.prefill, usage=known)
        return self.manifest.num_pending(only_chosen=isinstance(self.prefill, int), shard=self.shard)

    def _report(self, *, num_planned: int, is_dry_run: bool) -> IndexReport:
        for document_id, reason in self.manifest.refusals():
            self.tally.fail_document(document_id, reason)
        counts = self.manifest.counts()
        return self.tally.report(
            num_shared_passages=counts.num_shared_passages,
            num_pending_blocks=counts.num_pending_blocks - num_planned,
            is_dry_run=is_dry_run,
        )


def _check(prefill: Prefill, shard: Shard | None) -> None:
    if prefill not in ("all", "none") and not (isinstance(prefill, int) and prefill > 0):
        raise InvalidInputError(f"prefill is {prefill!r}; pass 'all', 'none', or a number of passages")
    if shard is not None and not 1 <= shard[0] <= shard[1]:
        raise InvalidInputError(f"shard is {shard}; pass (i, n) with i from 1 to n")
