"""Counters of a store, as its owner reads them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StoreStats:
    """What one store holds, and how it has served this process.

    Attributes:
        num_blocks: Blocks held now, whichever process put them there.
        num_bytes: Their size, in bytes.
        size_limit_bytes: Budget; None for no limit.
        num_pinned: Block ids that eviction passes over, held or not.
        num_hits: Look-ups of this process that found a block.
        num_misses: Look-ups of this process that did not, damaged blocks included.
        num_evictions: Blocks that this process evicted to stay within the budget.
    """

    num_blocks: int
    num_bytes: int
    size_limit_bytes: int | None
    num_pinned: int
    num_hits: int
    num_misses: int
    num_evictions: int

    @property
    def hit_ratio(self) -> float:
        """Share of the look-ups that found a block; 0 before the first one."""
        num_lookups = self.num_hits + self.num_misses
        return self.num_hits / num_lookups if num_lookups else 0.0


@dataclass(frozen=True)
class TieredStats:
    """Counters of each tier; None where there is no such tier."""

    device: StoreStats | None
    memory: StoreStats | None
    disk: StoreStats | None
