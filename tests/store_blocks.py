"""Blocks for the tests of the stores: what stands under an id follows from the id."""

from __future__ import annotations

import zlib

import torch

from rag_blockcache.kv_states import KVStates


def make_block(block_id: str, num_tokens: int = 4, dtype: torch.dtype = torch.float32) -> KVStates:
    generator = torch.Generator().manual_seed(zlib.crc32(block_id.encode()))
    keys, values = torch.randn(2, 2, 3, num_tokens, 8, generator=generator).to(dtype)
    return KVStates(keys, values)  # 2 layers, 3 heads, head_dim 8


def is_same(states: KVStates | None, other: KVStates) -> bool:
    return (
        states is not None
        and states.dtype == other.dtype
        and torch.equal(states.keys, other.keys)
        and torch.equal(states.values, other.values)
    )
