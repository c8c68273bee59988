"""What every store offers: a mapping from block id to KV states, with a few words more than a dict."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, MutableMapping
from contextlib import suppress
from typing import Any, Self

from rag_blockcache.kv_states import BlockStates

_RAISE = object()


class BlockStore(MutableMapping[str, BlockStates]):
    """A mapping from block id to KV states that others may write to and evict from at any time.

    A block id names its content: storing under an id that is there already does nothing. A block that
    was there a moment ago may be a miss; use ``get``, and encode on ``None``.
    """

    def __setitem__(self, block_id: str, states: BlockStates) -> None:
        self.put(block_id, states)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def put(self, block_id: str, states: BlockStates, *, cost_seconds: float = 0.0) -> bool:
        """Store a block, evicting what is worth less until it fits.

        Args:
            block_id: Name of the block. If it is stored already, nothing changes.
            states: Its keys and values, on any device; float32, float16 or bfloat16.
            cost_seconds: Time it took to encode; 0 if unknown.

        Returns:
            Whether the block is stored now; not if it is larger than the budget, or than what pinned
            blocks leave of it. Then nothing has been evicted for it.

        Raises:
            InvalidInputError: If the states cannot be stored.
            OutOfSpaceError: If the disk is full. What was stored before stays usable.
        """
        return bool(self.put_many([(block_id, states)], cost_seconds))

    @abstractmethod
    def put_many(
        self, blocks: Mapping[str, BlockStates] | Iterable[tuple[str, BlockStates]], cost_seconds: float = 0.0
    ) -> list[str]:
        """Store several blocks, on disk in one transaction.

        Args:
            blocks: Block ids and states.
            cost_seconds: Time that encoding all of them took; 0 if unknown.

        Returns:
            Ids of the blocks that were there already or have been stored, in order. If the blocks exceed
            the budget together, the later ones may have evicted the earlier ones.

        Raises:
            InvalidInputError: If some states cannot be stored. Nothing has been stored then.
            OutOfSpaceError: If the disk is full. Nothing of the transaction is stored then; blocks that
                exceed the budget together take several.
        """

    @abstractmethod
    def get_many(self, block_ids: Iterable[str]) -> dict[str, BlockStates]:
        """Return those of the blocks that are there and whole, in the order asked for."""

    def pop(self, block_id: str, /, default: Any = _RAISE) -> Any:
        """Delete a block and return its states, or ``default`` if it is not there."""
        states = self.get(block_id)
        if states is None:
            if default is _RAISE:
                raise KeyError(block_id)
            return default
        with suppress(KeyError):  # somebody else may have deleted it since; the inherited method would fail
            del self[block_id]
        return states

    @abstractmethod
    def pin(self, block_ids: Iterable[str]) -> None:
        """Keep these blocks from eviction, now or when they arrive, until they are unpinned."""

    @abstractmethod
    def unpin(self, block_ids: Iterable[str]) -> None:
        """Let eviction take these blocks again; ids that are not pinned are passed over."""

    @property
    @abstractmethod
    def size_bytes(self) -> int:
        """Size of what is stored, in bytes."""

    @abstractmethod
    def verify(self, block_id: str) -> None:
        """Check a block as thoroughly as the store can, and leave it as it is.

        Raises:
            KeyError: If the block is not stored.
            CorruptBlockError: If it is damaged; delete it and encode its passage again.
        """

    @abstractmethod
    def flush(self) -> None:
        """Make what is only in memory so far, such as uses counted, last."""

    @abstractmethod
    def close(self) -> None:
        """Flush, and let go of what is held open. Tensors handed out stay valid."""
