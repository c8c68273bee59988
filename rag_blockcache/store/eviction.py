"""What a block is worth keeping for: the one eviction rule, shared by memory and disk."""

from __future__ import annotations


def priority(clock: float, num_uses: int, cost_seconds: float, num_bytes: int) -> float:
    """Rank a block for eviction; the lowest goes first.

    GreedyDual-Size-Frequency: what a byte of the block saves, times how often it was asked for,
    on top of a clock. The clock of a store rises to the priority of whatever it evicts, so that
    blocks which were popular once sink below those that are in use now.

    Args:
        clock: Highest priority evicted so far, when the block was last used.
        num_uses: How often the block was put or asked for.
        cost_seconds: Time to encode the block again.
        num_bytes: Size of the block in the store.

    Returns:
        A number that compares blocks of one store.

    Source:
        Cherkasova, Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy,
        HP Labs HPL-98-69R1, 1998
    """
    return clock + num_uses * cost_seconds / max(num_bytes, 1)
