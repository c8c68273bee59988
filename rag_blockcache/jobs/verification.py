"""Whether an index is whole: every block against its checksum, every passage against index and manifest."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rag_blockcache.errors import CorruptBlockError, IndexMismatchError
from rag_blockcache.index_records import PassageState
from rag_blockcache.jobs.index_lock import index_lock
from rag_blockcache.jobs.index_report import Failure, JobTally
from rag_blockcache.jobs.prefilling import Prefilling
from rag_blockcache.jobs.progress import ProgressCallback
from rag_blockcache.manifest import Manifest
from rag_blockcache.passages import Passage

if TYPE_CHECKING:
    from rag_blockcache.block_cache import BlockCache
    from rag_blockcache.retriever import Retriever

logger = logging.getLogger(__name__)

_GROUP = 500


@dataclass(frozen=True)
class VerifyReport:
    """What is wrong with an index; with repair, what was wrong with it.

    Attributes:
        num_passages: Passages checked: that they are in the retriever, and that the text is right.
        num_blocks: Stored blocks whose checksum was compared.
        damaged_blocks: Blocks that are not as they were written.
        missing_blocks: Blocks that are recorded as stored and are not; where there is a disk
            budget they may just have been evicted.
        missing_passages: Passages that documents hold and the retriever does not have.
        changed_passages: Passages whose text, or the block that it makes, is not the recorded one.
        index_problems: What is wrong with the passage index and the manifest, a sentence each.
        num_repaired_blocks: Blocks encoded again.
        num_repaired_passages: Passages embedded again.
        failures: What repair could not do: documents to index again.
        seconds: Time it took.
    """

    num_passages: int
    num_blocks: int
    damaged_blocks: tuple[str, ...]
    missing_blocks: tuple[str, ...]
    missing_passages: tuple[str, ...]
    changed_passages: tuple[str, ...]
    index_problems: tuple[str, ...]
    num_repaired_blocks: int
    num_repaired_passages: int
    failures: tuple[Failure, ...]
    seconds: float

    @property
    def is_sound(self) -> bool:
        """Whether nothing was found."""
        return not (
            self.damaged_blocks
            or self.missing_blocks
            or self.missing_passages
            or self.changed_passages
            or self.index_problems
        )


def verify(
    *,
    cache: BlockCache,
    retriever: Retriever,
    manifest: Manifest,
    repair: bool = False,
    progress: ProgressCallback | None = None,
) -> VerifyReport:
    """Check every block against its checksum, every passage against index and manifest.

    Args:
        cache: The blocks, and the model that encodes them again.
        retriever: The passages.
        manifest: The record.
        repair: Delete damaged blocks and encode them again, embed again what has no vector. What has
            lost its text is noted, and made again by the next ``index_and_prefill``.
        progress: Called after each group of blocks or passages.

    Raises:
        IndexMismatchError: If the blocks were made with another model than the cache has.
        StoreError: If another job that needs the index to itself is at work.
    """
    started = time.perf_counter()
    check_model(cache, manifest)
    with index_lock(manifest.path.parent, exclusive=False):
        checking = _Checking(cache, retriever, manifest, JobTally(progress))
        checking.check_blocks()
        checking.check_passages()
        index_problems = [*manifest.problems(), *retriever.verify()]
        if repair:
            checking.repair_blocks()
            checking.repair_passages(index_problems)
    return VerifyReport(
        num_passages=checking.num_passages,
        num_blocks=checking.num_blocks,
        damaged_blocks=tuple(checking.damaged_blocks),
        missing_blocks=tuple(checking.missing_blocks),
        missing_passages=tuple(checking.missing_passages),
        changed_passages=tuple(checking.changed_passages),
        index_problems=tuple(index_problems),
        num_repaired_blocks=checking.tally.counts["num_encoded_blocks"],
        num_repaired_passages=checking.tally.counts["num_added_passages"],
        failures=tuple(checking.tally.failures),
        seconds=time.perf_counter() - started,
    )


@dataclass
class _Checking:
    cache: BlockCache
    retriever: Retriever
    manifest: Manifest
    tally: JobTally
    num_blocks: int = 0
    num_passages: int = 0
    damaged_blocks: list[str] = field(default_factory=list)
    missing_blocks: dict[str, None] = field(default_factory=dict)
    missing_passages: list[str] = field(default_factory=list)
    changed_passages: list[str] = field(default_factory=list)

    def check_blocks(self) -> None:
        """Compare the checksum of every stored block, whoever stored it."""
        num_total = len(self.cache.store)
        with self.tally.timed("blocks"):
            for block_id in self.cache.store:
                try:
                    self.cache.store.verify(block_id)
                except CorruptBlockError as error:
                    logger.warning("%s", error)
                    self.damaged_blocks.append(block_id)
                except KeyError:
                    continue  # evicted meanwhile
                self.num_blocks += 1
                self.tally.tell("blocks", self.num_blocks, num_total)

    def check_passages(self) -> None:
        """Compare every passage that documents hold with the retriever, and with its block."""
        num_total = self.manifest.counts().num_passages
        with self.tally.timed("passages"):
            for page in self.manifest.passages():
                self._check_page(page)
                self.num_passages += len(page)
                self.tally.tell("passages", self.num_passages, num_total)

    def _check_page(self, page: list[PassageState]) -> None:
        found = {
            passage.passage_id: passage
            for passage in self.retriever.get([state.passage_id for state in page])
        }
        for state in page:
            passage = found.get(state.passage_id)
            if passage is None:
                self.missing_passages.append(state.passage_id)
            elif not self._is_as_recorded(passage, state):
                self.changed_passages.append(state.passage_id)
            if state.is_done and state.block_id not in self.cache.store:
                self.missing_blocks[state.block_id] = None

    def _is_as_recorded(self, passage: Passage, state: PassageState) -> bool:
        is_same_text = passage.content_id == state.content_id
        return is_same_text and self.cache.block(passage).block_id == state.block_id

    def repair_blocks(self) -> None:
        """Delete damaged blocks; encode them and the missing ones again where a passage needs them."""
        for block_id in self.damaged_blocks:
            self.cache.store.pop(block_id, None)
        lost = [*self.damaged_blocks, *self.missing_blocks]
        self.manifest.mark_lost(block_ids=lost)
        self.manifest.choose(lost)
        num_pending, _ = self.manifest.num_pending(only_chosen=True)
        prefilling = Prefilling(
            cache=self.cache, manifest=self.manifest, retriever=self.retriever, tally=self.tally
        )
        prefilling.run(only_chosen=True, shard=None, num_total=num_pending)

    def repair_passages(self, index_problems: list[str]) -> None:
        """Make the vector index again, embed again what lost its vector, note what lost its text."""
        if index_problems:
            self._embed_again(self.retriever.damaged())
            self.retriever.rebuild()
        self.retriever.delete(self.changed_passages)
        self._give_up([*self.missing_passages, *self.changed_passages], "text")

    def _embed_again(self, passage_ids: list[str]) -> None:
        if not self.retriever.can_embed:
            self._give_up(passage_ids, "vector, which did not come from an embedder known here")
            return
        for start in range(0, len(passage_ids), _GROUP):
            group = self.retriever.get(passage_ids[start : start + _GROUP])
            self.retriever.add(group)
            self.tally.counts["num_added_passages"] += len(group)

    def _give_up(self, passage_ids: list[str], what: str) -> None:
        """Note what only the next job, or whoever has added it, can make whole again."""
        self.manifest.mark_lost(passage_ids=passage_ids)
        for passage_id in passage_ids:
            documents = ", ".join(self.manifest.documents_of(passage_id))
            advice = "run index-and-prefill again, or add it again where it was added by name"
            self.tally.fail(documents, f"passage {passage_id} lost its {what}; {advice}")


def check_model(cache: BlockCache, manifest: Manifest) -> None:
    """Refuse a cache whose blocks are others than those on record: of another model, or of another kind.

    Raises:
        IndexMismatchError: Naming both.
    """
    settings = manifest.settings
    if settings is not None and settings.fingerprint != cache.fingerprint:
        raise IndexMismatchError(
            f"the index in {manifest.path.parent} was made with the model {settings.model} (fingerprint "
            f"{settings.fingerprint}) and {settings.conditioning}, not with "
            f"{cache.model.network.name_or_path} ({cache.fingerprint}) and blocks_see={cache.blocks_see!r}; "
            "open it with the former"
        )
