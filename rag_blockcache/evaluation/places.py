"""The places that blocks are reused from: memory, and a disk whose files are cached, checked, or neither.

On a GPU, also its own memory before that disk, the host's memory, exact and packed, and other ways from the
same memory to compare with.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from rag_blockcache.device_tier import device_tier
from rag_blockcache.evaluation import page_cache
from rag_blockcache.evaluation.naive import naive_first_token
from rag_blockcache.evaluation.requests import (
    FirstToken,
    block_source,
    make_plan,
    reused_first_token,
    store_blocks,
)
from rag_blockcache.evaluation.token_prompts import TokenPrompt
from rag_blockcache.model import Model
from rag_blockcache.quantization import CODECS
from rag_blockcache.reuse import Policy
from rag_blockcache.store import DiskStore, MemoryStore, TieredStore

# From the same memory with other kernels, so that rounding differs; and from blocks that codecs changed.
OTHERWISE = ("without_graphs", "naive")
PACKED = ("host_int8", "host_int4")
_STILL_CACHED = 0.02  # a disk counts as cold if no more than this share of the files is in the page cache


def scratch_folder(parent: Path | str | None) -> tempfile.TemporaryDirectory[str]:
    """Make a folder for blocks that goes when its ``with`` block ends; None where temporary files go."""
    if parent is not None:
        Path(parent).mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix="rag-blockcache-bench-", dir=parent)


Reader = Callable[[Policy], FirstToken]


class Places:
    """The blocks of one prompt, stored in memory and on disk.

    Args:
        model: Encodes them.
        prompt: The prompt.
        policy: Reuses blocks.
        folder: Empty; takes the blocks.

    Attributes:
        memory: Blocks from memory, on the model's device.
        can_be_cold: Whether the files can be thrown out of the page cache.
        cold_share: Largest share of the files that was left in it when they were read cold; None before.
    """

    def __init__(self, model: Model, prompt: TokenPrompt, policy: Policy, folder: Path) -> None:
        self._folder = folder
        self._model, self._prompt = model, prompt
        self.memory = block_source(model, TieredStore(MemoryStore(), None))
        self._disk = TieredStore(None, DiskStore(self._folder))  # no memory tier: every look-up opens files
        store_blocks(self.memory, prompt, policy, self._disk)
        on_host = {"none": "host_memory", "int8": "host_int8", "int4": "host_int4"}
        self._host = (
            {place: self._copy_to_host(policy, codec) for codec, place in on_host.items()}
            if model.device.type == "cuda"
            else {}
        )
        self._kept = self._keep_on_device()
        self._files = page_cache.block_files(self._folder)
        page_cache.drop(self._files)
        self.can_be_cold = page_cache.cached_share(self._files) <= _STILL_CACHED
        self.cold_share: float | None = None

    def readers(self) -> dict[str, Reader]:
        """Return how to take the request from each place, by the names in ``ReuseLatency``."""
        found: dict[str, Reader] = {"memory": lambda policy: self._read(self.memory.store, policy)}
        if self._model.cuda_graphs:
            found["without_graphs"] = self._read_without_graphs
        if self._model.device.type == "cuda":
            found["naive"] = lambda policy: naive_first_token(self.memory, self._prompt)
        for place, host in self._host.items():
            found[place] = lambda policy, host=host: self._read(host, policy)  # type: ignore[misc]
        if self._kept is not None:
            found["disk_kept"] = lambda policy, kept=self._kept: self._read(kept, policy)  # type: ignore[misc]
        found["disk"] = lambda policy: self._read(self._disk, policy)
        found["disk_first"] = self._read_first
        if self.can_be_cold:
            found["disk_cold"] = self._read_cold
        return found

    def close(self) -> None:
        """Let go of the files."""
        self._disk.close()
        if self._kept is not None:
            self._kept.close()

    def _read(self, store: TieredStore, policy: Policy) -> FirstToken:
        return reused_first_token(block_source(self._model, store), self._prompt, policy)

    def _read_first(self, policy: Policy) -> FirstToken:
        """Read as a new process does, which checks every block."""
        with DiskStore(self._folder) as disk:
            return self._read(TieredStore(None, disk), policy)

    def _read_cold(self, policy: Policy) -> FirstToken:
        with DiskStore(self._folder) as disk:
            page_cache.drop(self._files)
            share = page_cache.cached_share(self._files)
            self.cold_share = max(share, self.cold_share or 0.0)
            return self._read(TieredStore(None, disk), policy)

    def _read_without_graphs(self, policy: Policy) -> FirstToken:
        used, self._model.cuda_graphs = self._model.cuda_graphs, False
        try:
            return self._read(self.memory.store, policy)
        finally:
            self._model.cuda_graphs = used

    def _copy_to_host(self, policy: Policy, codec: str) -> TieredStore:
        host = TieredStore(MemoryStore(), None)
        states = self.memory.load(make_plan(self.memory, self._prompt, policy))
        for name, each in states.items():
            host.put(name, CODECS[codec].pack(each.unpack()).mapped(lambda part: part.cpu().pin_memory()))
        return host

    def _keep_on_device(self) -> TieredStore | None:
        """Open the disk with its blocks on the model's device; None where a model keeps none there."""
        names = list(self.memory.store)
        num_bytes = max(1, self.memory.store.size_bytes)  # 0 would turn it off, for a prompt without passages
        device = device_tier(self._model, num_bytes, context_budget_bytes=0)
        if device is None:
            return None
        memory = MemoryStore()
        kept = TieredStore(memory, DiskStore(self._folder), device)
        kept.prefetch(names)
        kept.get_many(names)
        memory.clear()  # files that are mapped could not be thrown out of the page cache
        return kept
