"""Pending blocks into the store, in large groups, so that the encoder finds passages of equal length."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

from rag_blockcache.index_records import PendingBlock
from rag_blockcache.jobs.index_report import JobTally
from rag_blockcache.manifest import Manifest, Shard

if TYPE_CHECKING:
    from rag_blockcache.answers import PrefillProgress
    from rag_blockcache.block_cache import BlockCache
    from rag_blockcache.retriever import Retriever

Prefill = Literal["all", "none"] | int

_GROUP = 1024  # passages between two records of what is done


class Prefilling:
    """Encodes pending blocks and records them as done.

    Args:
        cache: Encodes and stores.
        manifest: Says what is pending.
        retriever: Has the passages' texts.
        tally: Counts.
    """

    def __init__(
        self, *, cache: BlockCache, manifest: Manifest, retriever: Retriever, tally: JobTally
    ) -> None:
        self._cache, self._manifest, self._retriever, self._tally = cache, manifest, retriever, tally
        self._num_done = self._num_total = 0
        self._started = time.perf_counter()

    def run(self, *, only_chosen: bool, shard: Shard | None, num_total: int) -> None:
        """Encode everything that is pending, longest first, so that a lack of memory shows at once.

        Nothing is evicted for it, since what an index holds is worth about as much as what is to come:
        where the disk budget is full, the rest stays pending.
        """
        self._num_total, self._started = num_total, time.perf_counter()
        last: PendingBlock | None = None
        with self._tally.timed("prefill"):
            while group := self._manifest.pending(_GROUP, after=last, only_chosen=only_chosen, shard=shard):
                num_stored = self._encode(group)
                last = group[-1]
                if self._tally.counts["num_not_stored_blocks"] and not num_stored:
                    break  # no room for a whole group of them
        if self._tally.counts["num_not_stored_blocks"]:
            self._report_full()

    def _encode(self, group: list[PendingBlock]) -> int:
        """Encode a group, record what is stored now, and return how many blocks that is."""
        passages = {passage.passage_id: passage for passage in self._retriever.get(_passage_ids(group))}
        found = [block for block in group if block.passage_id in passages]
        report = self._cache.prefill(
            [passages[block.passage_id] for block in found], progress=self._tell, evict=False
        )
        stored = [block.block_id for block in found if self._cache.store.keeps(block.block_id)]
        self._manifest.mark_done(stored)
        self._report_missing([block.passage_id for block in group if block.passage_id not in passages])
        self._num_done += len(group)
        counts = self._tally.counts
        counts["num_encoded_blocks"] += report.num_encoded
        counts["num_skipped_blocks"] += report.num_skipped
        counts["num_tokens"] += report.num_tokens
        counts["num_bytes"] += report.num_bytes
        counts["num_not_stored_blocks"] += len(found) - len(stored)
        return len(stored)

    def _report_full(self) -> None:
        """Report the blocks for which the disk budget has no room, and those not tried after them."""
        self._tally.counts["num_not_stored_blocks"] += max(self._num_total - self._num_done, 0)
        disk = self._cache.store.disk
        if disk is None or disk.size_limit_bytes is None:
            place, reason = "blocks", "another process deleted them"
        else:
            place = str(disk.directory)
            reason = f"the disk budget of {disk.size_limit_bytes:,} bytes has no room for them"
        self._tally.fail(
            place,
            f"{self._tally.counts['num_not_stored_blocks']:,} blocks were not stored: {reason}; run the same "
            "command again with a larger budget; until then they are encoded when they are first used",
        )

    def _report_missing(self, passage_ids: list[str]) -> None:
        self._manifest.mark_lost(passage_ids=passage_ids)
        for passage_id in passage_ids:
            self._tally.fail(
                ", ".join(self._manifest.documents_of(passage_id)),
                f"passage {passage_id} is missing from the index; run the same command again",
            )

    def _tell(self, progress: PrefillProgress) -> None:
        self._tally.tell(
            "prefill",
            self._num_done + progress.num_done,
            self._num_total,
            num_tokens=self._tally.counts["num_tokens"] + progress.num_tokens,
            num_bytes=self._tally.counts["num_bytes"] + progress.num_bytes,
            seconds=time.perf_counter() - self._started,
        )


def _passage_ids(group: list[PendingBlock]) -> list[str]:
    return [block.passage_id for block in group]
