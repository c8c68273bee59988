"""Batches of blocks on their way into a store: what each of them cost, and which fit together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rag_blockcache.kv_states import BlockStates
from rag_blockcache.store.block_file import HEADER_BYTES, check_states, stored_bytes

SECONDS_PER_TOKEN = 1e-3  # stands in for an unknown cost; only its ratio to measured costs matters


@dataclass(frozen=True)
class NewBlock:
    """A block that asks to be stored, and the seconds it took to encode, measured or estimated."""

    block_id: str
    states: BlockStates
    cost_seconds: float


class Room:
    """What a budget leaves on disk for blocks that are still to be encoded, handed out one by one.

    Args:
        num_bytes: All of it; None for no limit.
    """

    def __init__(self, num_bytes: int | None) -> None:
        self._num_bytes = num_bytes

    @property
    def is_limited(self) -> bool:
        """Whether there is a budget."""
        return self._num_bytes is not None

    def take(self, num_bytes: int) -> bool:
        """Take room for the file of a block with so many bytes of keys and values, if there is so much."""
        if self._num_bytes is None:
            return True
        is_enough = HEADER_BYTES + num_bytes <= self._num_bytes
        if is_enough:
            self._num_bytes -= HEADER_BYTES + num_bytes
        return is_enough


def new_blocks(
    blocks: Mapping[str, BlockStates] | Iterable[tuple[str, BlockStates]], cost_seconds: float
) -> list[NewBlock]:
    """Share the cost of encoding some blocks among them, by their number of tokens.

    Args:
        blocks: Block ids and states; of two with one id, the first is taken.
        cost_seconds: Time that encoding all of them took; 0 if unknown, then estimated.

    Raises:
        InvalidInputError: If some states cannot be stored (see ``check_states``).
    """
    pairs = list(blocks.items() if isinstance(blocks, Mapping) else blocks)
    for block_id, states in pairs:
        check_states(block_id, states)
    unique = dict(reversed(pairs))
    num_tokens = sum(states.num_tokens for states in unique.values())
    per_token = cost_seconds / num_tokens if cost_seconds > 0 and num_tokens else SECONDS_PER_TOKEN
    return [
        NewBlock(block_id, unique[block_id], per_token * unique[block_id].num_tokens)
        for block_id in dict.fromkeys(block_id for block_id, _ in pairs)
    ]


def next_batch(blocks: list[NewBlock], room_bytes: int) -> tuple[list[NewBlock], list[NewBlock]]:
    """Cut off the blocks that fit into ``room_bytes`` on disk together.

    Returns:
        The batch, which leaves out blocks that would not fit alone, and the rest. Without any rest, the
        batch can be empty.
    """
    batch: list[NewBlock] = []
    taken = 0
    for index, block in enumerate(blocks):
        num_bytes = stored_bytes(block.states)
        if num_bytes > room_bytes:
            continue
        if taken + num_bytes > room_bytes:
            return batch, blocks[index:]
        batch.append(block)
        taken += num_bytes
    return batch, []
