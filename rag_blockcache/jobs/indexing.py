"""Documents into an index: what is new or changed is split and embedded, what has gone is removed."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.index_records import DocumentRecord, PassageRecord
from rag_blockcache.jobs.documents import Document, PassageSplitter, split_document
from rag_blockcache.jobs.index_report import JobTally
from rag_blockcache.jobs.removal import Removal, only_counted
from rag_blockcache.jobs.sources import name_other_sources
from rag_blockcache.manifest import Manifest
from rag_blockcache.passages import Passage

if TYPE_CHECKING:
    from rag_blockcache.block_cache import BlockCache
    from rag_blockcache.retriever import Retriever

logger = logging.getLogger(__name__)

_GROUP = 512  # passages that are recorded and embedded together


class Indexing:
    """Brings manifest and retriever up to date with documents, a group at a time.

    Args:
        cache: Names the blocks.
        manifest: Records documents and passages.
        splitter: Cuts documents into passages.
        tally: Counts.
        retriever: Takes the passages; None to change the manifest only, for a dry run.
    """

    def __init__(
        self,
        *,
        cache: BlockCache,
        manifest: Manifest,
        splitter: PassageSplitter,
        tally: JobTally,
        retriever: Retriever | None,
    ) -> None:
        self._cache, self._manifest, self._splitter = cache, manifest, splitter
        self._tally, self._retriever = tally, retriever
        self._documents: list[DocumentRecord] = []
        self._passages: dict[str, Passage] = {}
        self._num_split = self._num_tokens = 0

    def add(self, document: Document) -> None:
        """Split a document, and commit the group that it completes."""
        with self._tally.timed("split"):
            record, passages = self._split(document)
        self._documents.append(record)
        self._passages = passages | self._passages  # of equal ones, the first stands for all
        self._num_split += 1
        self._num_tokens += sum(passage.num_tokens for passage in record.passages)
        self._tally.tell("split", self._num_split, num_tokens=self._num_tokens)
        if max(len(self._passages), len(self._documents)) >= _GROUP:
            self.commit()

    def commit(self) -> None:
        """Record the documents at hand, embed those of their passages that are not, record that."""
        if not self._documents:
            return
        with self._tally.timed("embed"):
            self._before_losing(
                {
                    document.document_id: {passage.passage_id for passage in document.passages}
                    for document in self._documents
                }
            )
            self._manifest.replace_documents(self._documents)
            wanted = self._manifest.unembedded(self._passages)
            if self._retriever is not None and wanted:
                self._retriever.add([passage for name, passage in self._passages.items() if name in wanted])
            self._manifest.mark_embedded(wanted)
        self._tally.counts["num_added_passages"] += len(wanted)
        self._tally.tell("embed", self._tally.counts["num_added_passages"])
        self._documents, self._passages = [], {}

    def remove(self, document_ids: Iterable[str]) -> None:
        """Forget documents that have gone; their passages are dropped by ``drop_unused``."""
        remaining = iter(document_ids)
        while group := list(islice(remaining, _GROUP)):
            self._before_losing(dict.fromkeys(group, ()))
            self._manifest.remove_documents(group)
            self._tally.counts["num_gone_documents"] += len(group)

    def _before_losing(self, remaining: Mapping[str, Collection[str]]) -> None:
        if self._retriever is not None:
            name_other_sources(self._retriever, self._manifest, remaining)

    def drop_unused(self) -> None:
        """Delete the passages that no document holds any more, then the blocks that no passage needs."""
        with self._tally.timed("remove"):
            num_passages, num_blocks = self._drop_unused()
        self._tally.counts["num_removed_passages"] += num_passages
        self._tally.counts["num_dropped_blocks"] += num_blocks

    def _drop_unused(self) -> tuple[int, int]:
        if self._retriever is None:
            return only_counted(self._manifest)
        removal = Removal(cache=self._cache, retriever=self._retriever, manifest=self._manifest)
        return removal.drop_unused()

    def _split(self, document: Document) -> tuple[DocumentRecord, dict[str, Passage]]:
        records, passages = [], {}
        refusals = list(document.extract.refusals)  # of lines; told again when the file is not read again
        for number, passage in enumerate(split_document(document, self._splitter), 1):
            try:
                record, named = named_passage(self._cache, passage)
            except InvalidInputError as error:
                refusals.append(f"passage {number}: {error}")
                continue
            records.append(record)
            passages[record.passage_id] = named
        for reason in refusals[len(document.extract.refusals) :]:
            logger.warning("%s: %s", document.document_id, reason)
        found = DocumentRecord(document.document_id, document.content_hash, tuple(records), tuple(refusals))
        return found, passages


def named_passage(cache: BlockCache, passage: Passage) -> tuple[PassageRecord, Passage]:
    """Give a passage its content id, and find its block.

    Raises:
        InvalidInputError: If the model or the index cannot take it.
    """
    _check_storable(passage)
    block = cache.block(passage)
    num_tokens, window = len(block.token_ids), cache.model.max_length
    if num_tokens >= window:
        raise InvalidInputError(
            f"it has {num_tokens:,} tokens and leaves no room in the model's window of {window:,}; "
            "split it into shorter passages"
        )
    name = passage.content_id
    return PassageRecord(name, block.block_id, num_tokens), replace(passage, passage_id=name)


def _check_storable(passage: Passage) -> None:
    try:
        f"{passage.title}{passage.text}".encode()
        json.dumps(dict(passage.metadata), allow_nan=False).encode()
    except (TypeError, ValueError) as error:  # half a character; not a number; no JSON
        raise InvalidInputError(f"it cannot be stored ({error}); clean its text and metadata") from error
