"""What an indexing job has done: counts, times, and what could not be done."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from rag_blockcache.jobs.progress import JobProgress, ProgressCallback


@dataclass(frozen=True)
class Failure:
    """One thing that could not be done: the document or passage, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class IndexReport:
    """What a job has done, or with ``is_dry_run`` would have done.

    Attributes:
        num_new_documents: Documents indexed for the first time.
        num_changed_documents: Documents indexed again, or whose indexing had been interrupted.
        num_unchanged_documents: Documents passed over.
        num_gone_documents: Documents removed, since they are not there any more.
        num_failed_documents: Documents that could not be used, in whole (what was indexed of them before
            stays) or in part (the rest is indexed), in this run or before.
        num_added_passages: Passages embedded.
        num_removed_passages: Passages removed, since no document holds them any more.
        num_shared_passages: Passages in the index that more than one document holds.
        num_encoded_blocks: Blocks encoded and stored.
        num_skipped_blocks: Blocks to encode that turned out to be stored already.
        num_dropped_blocks: Blocks deleted, since no passage needs them any more.
        num_not_stored_blocks: Blocks that the disk budget left no room for; they are pending.
        num_pending_blocks: Blocks left to encode, by choice or by another shard.
        num_tokens: Tokens encoded.
        num_bytes: Bytes of KV states written.
        seconds: Time by stage.
        failures: What could not be done, in this run or before.
        is_dry_run: Whether nothing was changed.
    """

    num_new_documents: int
    num_changed_documents: int
    num_unchanged_documents: int
    num_gone_documents: int
    num_failed_documents: int
    num_added_passages: int
    num_removed_passages: int
    num_shared_passages: int
    num_encoded_blocks: int
    num_skipped_blocks: int
    num_dropped_blocks: int
    num_not_stored_blocks: int
    num_pending_blocks: int
    num_tokens: int
    num_bytes: int
    seconds: Mapping[str, float]
    failures: tuple[Failure, ...]
    is_dry_run: bool


class JobTally:
    """Counts and times of a job while it runs, and the one who tells the listener."""

    def __init__(self, listener: ProgressCallback | None) -> None:
        self.counts: Counter[str] = Counter()
        self.failures: dict[Failure, None] = {}  # in order, each once
        self.failed_documents: set[str] = set()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._listener = listener

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time spent inside to a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - started

    def tell(
        self,
        stage: str,
        num_done: int,
        num_total: int | None = None,
        *,
        num_tokens: int = 0,
        num_bytes: int = 0,
        seconds: float | None = None,
    ) -> None:
        """Tell the listener how far a stage has come."""
        if self._listener is not None:
            spent = self.seconds[stage] if seconds is None else seconds
            self._listener(JobProgress(stage, num_done, num_total, num_tokens, num_bytes, spent))

    def fail(self, source: str, reason: str) -> None:
        """Note what could not be done; said twice, it counts once."""
        self.failures[Failure(source, reason)] = None

    def fail_document(self, document_id: str, reason: str) -> None:
        """Note that a document could not be used, or not all of it."""
        self.failed_documents.add(document_id)
        self.fail(document_id, reason)

    def report(self, *, num_shared_passages: int, num_pending_blocks: int, is_dry_run: bool) -> IndexReport:
        """Return the whole count."""
        return IndexReport(
            **{name: self.counts[name] for name in _COUNTED},
            num_failed_documents=len(self.failed_documents),
            num_shared_passages=num_shared_passages,
            num_pending_blocks=num_pending_blocks,
            seconds=dict(self.seconds),
            failures=tuple(self.failures),
            is_dry_run=is_dry_run,
        )


_COUNTED = (
    "num_new_documents",
    "num_changed_documents",
    "num_unchanged_documents",
    "num_gone_documents",
    "num_added_passages",
    "num_removed_passages",
    "num_encoded_blocks",
    "num_skipped_blocks",
    "num_dropped_blocks",
    "num_not_stored_blocks",
    "num_tokens",
    "num_bytes",
)
