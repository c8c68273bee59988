"""Passages that users name, put and removed a call at a time, in the order of commits of the indexing job.

1. **manifest**: the passages are recorded under their names, not embedded, their blocks pending.
2. **store**: what their names stood for before is forgotten, as far as no other passage needs it.
3. **retriever**: passages and vectors are committed.
4. **manifest**: the passages are embedded. Blocks that only their former texts needed are dropped.
5. **store**, then **manifest**: blocks are encoded, stored, and recorded as done.

Whoever dies between 1 and 4 leaves passages that are recorded and not embedded. ``settle`` takes of them what
the retriever has: the new, the old, which is recorded again, or nothing, and then they were never there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.index_records import PassageRecord
from rag_blockcache.jobs.index_change import Addition, IndexChange
from rag_blockcache.jobs.index_report import JobTally
from rag_blockcache.jobs.indexing import named_passage
from rag_blockcache.jobs.prefilling import Prefilling
from rag_blockcache.jobs.progress import JobProgress, ProgressCallback
from rag_blockcache.jobs.removal import OtherForms, Removal
from rag_blockcache.manifest import Manifest
from rag_blockcache.manifest_tables import own_id
from rag_blockcache.passages import Passage

if TYPE_CHECKING:
    from rag_blockcache.answers import PrefillProgress
    from rag_blockcache.block_cache import BlockCache
    from rag_blockcache.retriever import Retriever

logger = logging.getLogger(__name__)

_GROUP = 512  # passages that are committed together


class NamedPassages:
    """Keeps manifest, retriever and store of one index in step while passages come and go.

    Args:
        cache: Names, encodes and forgets blocks.
        retriever: Has the passages.
        manifest: The record, in the same directory as both.
        other_forms: In which texts a passage may be shown beside its own. They are known to the cache as
            long as the passage is there, and encoded when they are first met.
    """

    def __init__(
        self, cache: BlockCache, retriever: Retriever, manifest: Manifest, other_forms: OtherForms
    ) -> None:
        self._cache, self._retriever, self._manifest = cache, retriever, manifest
        self._other_forms = other_forms
        self._removal = Removal(cache=cache, retriever=retriever, manifest=manifest, other_forms=other_forms)

    def put(self, addition: Addition, progress: ProgressCallback | None) -> IndexChange:
        """Index passages, each in place of what had its name; encode nothing.

        Raises:
            InvalidInputError: If the model or the index cannot take one of them. Nothing is changed.
        """
        records = dict(zip(addition.passages, self._records(addition.passages), strict=True))
        num_total, change = len(records), IndexChange()
        for group in addition.groups(_GROUP):
            num_dropped = self._commit(group, [records[passage] for passage in group.passages])
            change += IndexChange(num_added_passages=len(group.passages), num_dropped_blocks=num_dropped)
            if progress is not None:
                progress(JobProgress("embed", change.num_added_passages, num_total))
        return change

    def _records(self, passages: Iterable[Passage]) -> list[tuple[PassageRecord, str]]:
        return [self._record(passage) for passage in passages]

    def _record(self, passage: Passage) -> tuple[PassageRecord, str]:
        """Name the block of a passage; return what goes on record, and the passage's content id."""
        try:
            passage.passage_id.encode()
            record, named = named_passage(self._cache, passage)
        except ValueError as error:  # half a character in the id, or what the job would refuse
            raise InvalidInputError(f"passage {passage.passage_id!r} cannot be added: {error}") from error
        return replace(record, passage_id=passage.passage_id), named.passage_id

    def _commit(self, group: Addition, records: Sequence[tuple[PassageRecord, str]]) -> int:
        """Do steps 1 to 4, and return how many blocks were dropped."""
        names = [passage.passage_id for passage in group.passages]
        before = self._retriever.get(names)
        with ExitStack() as undo:
            undo.callback(self.drop_unused)  # after settling
            undo.callback(self.settle, names)
            released = self._manifest.put_passages(records)
            self._removal.forget(before)
            self._retriever.add(group.passages, embeddings=group.embeddings, source_ids=group.source_ids)
            self._finish(group.passages)
            undo.pop_all()
        return self._removal.drop_unused()[1] if released.blocks else 0

    def _finish(self, passages: Sequence[Passage]) -> None:
        self._cache.register(form for passage in passages for form in self._other_forms(passage))
        self._manifest.mark_embedded(passage.passage_id for passage in passages)

    def prefill(self, passages: Sequence[Passage], progress: ProgressCallback | None) -> IndexChange:
        """Encode the blocks of passages that were put, and record which are stored now.

        Nothing is evicted for it; what the disk budget has no room for stays pending.
        """

        def tell(done: PrefillProgress) -> None:
            if progress is not None:
                counts = {"num_tokens": done.num_tokens, "num_bytes": done.num_bytes}
                progress(
                    JobProgress("prefill", done.num_done, done.num_total, **counts, seconds=done.seconds)
                )

        report = self._cache.prefill(passages, progress=tell, evict=False)
        names = [self._cache.block(passage).block_id for passage in passages]
        self._manifest.mark_done(name for name in names if self._cache.store.keeps(name))
        return IndexChange(
            num_encoded_blocks=report.num_encoded,
            num_skipped_blocks=report.num_skipped,
            num_not_stored_blocks=report.num_not_stored,
            num_tokens=report.num_tokens,
            num_bytes=report.num_bytes,
        )

    def prefill_pending(self, progress: ProgressCallback | None) -> IndexChange:
        """Encode all blocks that are pending, those of jobs over files too."""
        tally = JobTally(progress)
        encoding = Prefilling(
            cache=self._cache, manifest=self._manifest, retriever=self._retriever, tally=tally
        )
        encoding.run(only_chosen=False, shard=None, num_total=self._manifest.num_pending()[0])
        for failure in tally.failures:
            logger.warning("%s: %s", failure.source, failure.reason)
        return IndexChange(**tally.counts)

    def remove(self, passage_ids: Sequence[str]) -> IndexChange:
        """Remove passages, whoever holds them; pass over those that are not there."""
        self._manifest.remove_passages(passage_ids)
        return self.drop_unused()

    def remove_source(self, source_id: str) -> IndexChange:
        """Remove a document and what only it holds: the passages put in its name, or by a job over files."""
        own = [own_id(name) for name in self._retriever.from_source(source_id)]
        self._manifest.remove_documents([source_id, *own])
        return self.drop_unused()

    def remove_all(self) -> IndexChange:
        """Remove everything."""
        self._manifest.start_scan()
        self._manifest.remove_documents(self._manifest.gone())
        return self.drop_unused()

    def drop_unused(self) -> IndexChange:
        """Drop what no document holds or needs, of this call or of one that was interrupted."""
        num_passages, num_blocks = self._removal.drop_unused()
        return IndexChange(num_removed_passages=num_passages, num_dropped_blocks=num_blocks)

    def settle(self, passage_ids: Iterable[str]) -> None:
        """Bring the record of passages in line with the retriever; see the head of the module.

        A passage whose vector was lost is left as it is, not embedded, until it is put again.
        """
        remaining = iter(passage_ids)
        while names := list(islice(remaining, _GROUP)):
            found = self._retriever.get(names)
            whole = self._retriever.vectors(names)
            kept = [passage for passage in found if passage.passage_id in whole]
            self._manifest.put_passages(self._records(kept))
            self._finish(kept)
            absent = set(names).difference(passage.passage_id for passage in found)
            self._manifest.remove_passages(sorted(absent))
