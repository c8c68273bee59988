"""Where KV states wait for the next prompt: mappings from block id to KV states, on device, host and disk.

Reading order: ``block_store`` (what every store offers), ``eviction`` (what is worth keeping), ``batches``
(what comes in), ``memory`` and ``device``; then from the bottom up ``block_file`` (one block as a file),
``raw_disk`` and ``block_index`` (which file holds which block), ``block_directory`` (whose it is, and who
writes in it), ``disk_errors`` and ``disk``; and ``tiers``, device before memory before disk.
"""

from __future__ import annotations

from rag_blockcache.store.block_store import BlockStore
from rag_blockcache.store.device import DeviceStore
from rag_blockcache.store.disk import DiskStore
from rag_blockcache.store.memory import MemoryStore
from rag_blockcache.store.stats import StoreStats, TieredStats
from rag_blockcache.store.tiers import TieredStore

__all__ = [
    "BlockStore",
    "DeviceStore",
    "DiskStore",
    "MemoryStore",
    "StoreStats",
    "TieredStats",
    "TieredStore",
]
