"""KV states on disk, by block id."""

from __future__ import annotations

import logging
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from rag_blockcache.errors import CorruptBlockError, InvalidInputError, OutOfSpaceError, StoreError
from rag_blockcache.kv_states import BlockStates
from rag_blockcache.store.batches import NewBlock, Room, new_blocks, next_batch
from rag_blockcache.store.block_directory import locked, open_directory
from rag_blockcache.store.block_file import read_block, request_file, stored_bytes, write_block
from rag_blockcache.store.block_index import BlockIndex
from rag_blockcache.store.block_store import BlockStore
from rag_blockcache.store.disk_errors import translated_errors
from rag_blockcache.store.raw_disk import ForeignEntryError, StoredFile
from rag_blockcache.store.stats import StoreStats
from rag_blockcache.workers import Workers

logger = logging.getLogger(__name__)


class DiskStore(BlockStore):
    """KV states on disk, by block id: a mapping with a budget that threads and processes may share.

    Each block is one safetensors file, read as a memory map; an SQLite index says which. Nothing in the
    directory is ever run, whoever wrote it. A block is checked when it is read, its size and header
    always, its checksum the first time in this process. What is worth least is evicted first (see
    ``eviction.priority``), so a block that was there a moment ago may be a miss.

    Reading takes no lock; uses are counted in memory and join the index with the next ``put``, ``flush``
    or ``close``.

    Args:
        directory: Created if missing, readable by its owner only. Not on a network file system.
        size_limit_bytes: Budget for all files, recorded in the directory for whoever opens it next; None
            keeps what is on record, which at first is no limit. A block larger than what the pinned ones
            leave free is not kept.

    Raises:
        StoreError: If the directory holds something else or another format version, or cannot be used.
        InvalidInputError: If the budget is negative.

    Example:
        >>> import tempfile, torch
        >>> from rag_blockcache.kv_states import KVStates
        >>> from rag_blockcache.store import DiskStore
        >>> with DiskStore(tempfile.mkdtemp()) as store:
        ...     store["a"] = KVStates(torch.zeros(2, 1, 3, 4), torch.ones(2, 1, 3, 4))
        ...     store["a"].num_tokens, "b" in store
        (3, False)
    """

    def __init__(self, directory: Path | str, *, size_limit_bytes: int | None = None) -> None:
        if size_limit_bytes is not None and size_limit_bytes < 0:
            raise InvalidInputError(
                f"size_limit_bytes is {size_limit_bytes}; pass the bytes that blocks may take"
            )
        self.directory = open_directory(directory)
        self._index = BlockIndex(self.directory)
        self.size_limit_bytes = self._index.budget(size_limit_bytes)
        self._checked: set[str] = set()  # names of files whose checksum was right
        self._uses: Counter[str] = Counter()
        self._num_hits = self._num_misses = self._num_evictions = 0
        self._lock = threading.Lock()
        self._repair(wait=False)

    def __getitem__(self, block_id: str) -> BlockStates:
        try:
            states = self._load(block_id)
        except (KeyError, CorruptBlockError):
            with self._lock:
                self._num_misses += 1
            raise
        with self._lock:
            self._num_hits += 1
            self._uses[block_id] += 1
        return states

    def __delitem__(self, block_id: str) -> None:
        if not self._index.remove(block_id):
            raise KeyError(block_id)

    def __contains__(self, block_id: object) -> bool:
        return block_id in self._index

    def __iter__(self) -> Iterator[str]:
        return iter(self._index.block_ids())

    def __len__(self) -> int:
        return len(self._index)

    def clear(self) -> None:
        """Delete all blocks. Tensors handed out stay valid."""
        self._index.remove_all()

    def put_many(
        self, blocks: Mapping[str, BlockStates] | Iterable[tuple[str, BlockStates]], cost_seconds: float = 0.0
    ) -> list[str]:
        """Store several blocks in one transaction, or in several if they exceed the budget together.

        See ``BlockStore.put_many``.
        """
        new = new_blocks(blocks, cost_seconds)
        kept = {block.block_id for block in new if self._index.is_readable(block.block_id)}
        rest = [block for block in new if block.block_id not in kept]
        self.flush()  # eviction should know of all uses
        while rest:
            batch, rest = next_batch(rest, self._room())
            if batch:
                self._write(batch)
                kept.update(block.block_id for block in batch)
        left_out = [block.block_id for block in new if block.block_id not in kept]
        if left_out:
            reason = f"the disk budget leaves {self._room()} bytes beside what is pinned"
            logger.warning(
                "%d of %d blocks, %s first, were not stored: %s", len(left_out), len(new), left_out[0], reason
            )
        return [block.block_id for block in new if block.block_id in kept]

    def get_many(self, block_ids: Iterable[str]) -> dict[str, BlockStates]:
        """Return those of the blocks that are there and whole, in the order asked for.

        A damaged block is logged, dropped and left out. Files that this process reads for the first time are
        all requested from the disk before the first of them is needed, and checked side by side.
        """
        wanted = list(dict.fromkeys(block_ids))
        found = self._load_many(wanted, request_all=False)
        with self._lock:
            self._num_hits += len(found)
            self._num_misses += len(wanted) - len(found)
            self._uses.update(found.keys())  # a Counter would add the values of a mapping
        return found

    def preload(self, block_ids: Iterable[str]) -> dict[str, BlockStates]:
        """Return what ``get_many`` does and count no use; all files are requested from the disk."""
        return self._load_many(dict.fromkeys(block_ids), request_all=True)

    def count_uses(self, block_ids: Iterable[str]) -> None:
        """Count a use of blocks that were served from elsewhere, so that they are not evicted as idle."""
        with self._lock:
            self._uses.update(list(block_ids))  # a Counter would add the values of a mapping

    def use_counts(self, block_ids: Iterable[str] | None = None) -> dict[str, int]:
        """Return how often blocks were asked for since they were stored, by any process.

        Counts go with their blocks: one that was evicted or deleted and comes back begins at 0. Other
        processes' uses are known once those have flushed.

        Args:
            block_ids: Which blocks; None for all. Those that are not stored are left out.
        """
        wanted = None if block_ids is None else list(block_ids)
        with self._lock:
            recent = dict(self._uses)
        counts = self._index.use_counts(wanted)
        return {block_id: count + recent.get(block_id, 0) for block_id, count in counts.items()}

    def pin(self, block_ids: Iterable[str]) -> None:
        """Keep these blocks from eviction, by any process, now or when they arrive, until unpinned."""
        self._index.pin(block_ids)

    def unpin(self, block_ids: Iterable[str]) -> None:
        """Let eviction take these blocks again; ids that are not pinned are passed over."""
        self._index.unpin(block_ids)

    @property
    def size_bytes(self) -> int:
        """Size of all block files, in bytes."""
        return self._index.num_bytes

    def room(self, *, evicting: bool) -> Room:
        """Return what the budget leaves for new blocks, as of now.

        Args:
            evicting: Whether all blocks that are not pinned may go for them; otherwise all stay.
        """
        if self.size_limit_bytes is None:
            return Room(None)
        return Room(self._room() if evicting else self.size_limit_bytes - self.size_bytes)

    def stats(self) -> StoreStats:
        """Return what is stored, and the hits, misses and evictions of this process."""
        return StoreStats(
            num_blocks=len(self),
            num_bytes=self.size_bytes,
            size_limit_bytes=self.size_limit_bytes,
            num_pinned=self._index.num_pinned,
            num_hits=self._num_hits,
            num_misses=self._num_misses,
            num_evictions=self._num_evictions,
        )

    def verify(self, block_id: str) -> None:
        """Compare the checksum of a block again, and leave it as it is.

        Raises:
            KeyError: If the block is not stored.
            CorruptBlockError: If it is damaged; delete it and encode its passage again.
        """
        name = self._name_of(block_id)
        if name is None:
            raise KeyError(block_id)
        self._read(block_id, name, check=True)

    def repair(self) -> list[str]:
        """Delete what killed processes left behind, once nobody is writing; opening does so where it can.

        Returns:
            Ids of blocks whose file is gone; they are misses from now on.
        """
        return self._repair(wait=True)

    def flush(self) -> None:
        """Bring the uses counted in this process into the index, where eviction looks them up."""
        with self._lock:
            uses, self._uses = self._uses, Counter()
        self._index.count_uses(uses)

    def close(self) -> None:
        """Flush, and close the connection of this thread; the store opens it again when it is used."""
        try:
            self.flush()
        except OutOfSpaceError as error:
            logger.warning("uses of blocks were not recorded: %s", error)
        finally:
            self._index.close()

    def _name_of(self, block_id: str) -> str | None:
        """Return the file name of a block, or None; an entry that is not ours is dropped."""
        try:
            return self._index.name_of(block_id)
        except ForeignEntryError as error:
            self._drop(block_id, None, error)
            raise CorruptBlockError(
                f"block {block_id} in {self.directory} was not written by this library ({error}); it has "
                "been dropped unread, encode its passage again"
            ) from error

    def _load(self, block_id: str) -> BlockStates:
        name = self._name_of(block_id)
        if name is None:
            raise KeyError(block_id)
        return self._kept(block_id, name, self._reading(block_id, name))

    def _load_many(self, block_ids: Iterable[str], *, request_all: bool) -> dict[str, BlockStates]:
        """Return those of the blocks that are there and whole; the index is asked by this thread alone."""
        names = {}
        for block_id in block_ids:
            with suppress(CorruptBlockError):
                name = self._name_of(block_id)
                if name is not None:
                    names[block_id] = name
        new = [block_id for block_id, name in names.items() if name not in self._checked]
        for block_id in names if request_all else new:
            request_file(self._index.path(names[block_id]))
        reads = {block_id: self._reading(block_id, name) for block_id, name in names.items()}
        found = {}
        with Workers() as workers:
            reads |= zip(new, workers.begin([reads[block_id] for block_id in new]), strict=True)
            for block_id, name in names.items():
                with suppress(KeyError, CorruptBlockError):
                    found[block_id] = self._kept(block_id, name, reads[block_id])
        return found

    def _reading(self, block_id: str, name: str) -> Callable[[], BlockStates]:
        """Return what reads a block, and checks all of it the first time."""
        return partial(self._read, block_id, name, check=name not in self._checked)

    def _kept(self, block_id: str, name: str, read: Callable[[], BlockStates]) -> BlockStates:
        """Return what was read of a block if it is whole; otherwise drop it."""
        try:
            states = read()
        except CorruptBlockError as error:
            self._drop(block_id, name, error)
            raise
        self._checked.add(name)
        return states

    def _read(self, block_id: str, name: str, *, check: bool) -> BlockStates:
        with translated_errors(self.directory):
            try:
                return read_block(self._index.path(name), block_id, check=check)
            except FileNotFoundError:  # evicted since the index was asked
                raise KeyError(block_id) from None

    def _drop(self, block_id: str, name: str | None, error: Exception) -> None:
        """Delete a damaged block; where that fails, on a full disk say, it stays unreadable."""
        logger.warning("block %s is dropped from %s: %s", block_id, self.directory, error)
        try:
            self._index.remove(block_id, name=name)
        except StoreError as failure:
            logger.warning("block %s could not be dropped: %s", block_id, failure)

    def _room(self) -> int:
        """Return how many bytes blocks that are not pinned may take."""
        if self.size_limit_bytes is None:
            return sys.maxsize
        return self.size_limit_bytes - self._index.pinned_bytes

    def _write(self, batch: list[NewBlock]) -> None:
        """Write a batch of blocks and enter them, all or none; evict before, so that the budget holds."""
        directory = self.directory
        with translated_errors(directory), locked(directory, exclusive=False), ExitStack() as undo:
            self._evict(sum(stored_bytes(block.states) for block in batch))
            files, writes = [], []
            for block in batch:
                name = self._index.new_name()
                undo.callback(self._index.disk.remove, name)
                writes.append(partial(write_block, self._index.path(name), block.block_id, block.states))
                files.append(StoredFile(block.block_id, name, stored_bytes(block.states), block.cost_seconds))
            with Workers() as workers:  # which have ended before anything is undone
                for written in workers.begin(writes):
                    written()
            self._index.insert(files)
            undo.pop_all()
            self._evict(0)  # others may have written meanwhile

    def _evict(self, incoming_bytes: int) -> None:
        if self.size_limit_bytes is not None:
            evicted = self._index.evict(self.size_limit_bytes - incoming_bytes)
            with self._lock:
                self._num_evictions += len(evicted)

    def _repair(self, *, wait: bool) -> list[str]:
        with locked(self.directory, exclusive=True, wait=wait) as alone:
            if not alone:
                return []
            lost, num_orphans = self._index.reconcile()
        if lost or num_orphans:
            logger.warning(
                "%s: %d blocks have lost their file, %d files without block were deleted",
                self.directory,
                len(lost),
                num_orphans,
            )
        return lost
