"""Attention as products of bfloat16 matrices, on a CPU that multiplies these itself.

The fused kernel that torch has for such a CPU multiplies in float32, at half the speed. Products of whole
matrices are made in bfloat16 by the library that makes those of linear layers.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from torch import Tensor

_MOST_PRODUCTS = 2**21  # in one matrix: 4 MiB, which stay near the cores
_LEAST_PRODUCTS = 2**17  # below it, the calls take longer than the fused kernel
# Likewise; and many small products wait for one another where other programs want the cores.
_LEAST_SLOTS = 1024

_scratch = threading.local()


@functools.cache
def is_fast_here() -> bool:
    """Tell whether this CPU multiplies bfloat16 itself; with tiles (AMX) torch's own kernel does so too."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older ones have none
    return bool(found.get("avx512_bf16")) and not found.get("amx_bf16")


def takes(query: Tensor, key: Tensor, mask: Tensor) -> bool:
    """Tell whether ``attend`` is the way for a pass: in bfloat16, not a small one, and not to be trained."""
    num_rows, num_slots = query.shape[1] // key.shape[1] * query.shape[2], key.shape[2]
    is_large = num_rows * num_slots >= _LEAST_PRODUCTS and num_slots >= _LEAST_SLOTS
    is_plain = mask.dtype == torch.bool and not torch.is_grad_enabled()
    return is_large and is_plain and query.dtype == torch.bfloat16 and is_fast_here()


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """Attend as SDPA does, where query heads of a group share keys and values.

    Args:
        query: ``(batch, num_heads, num_queries, head_dim)``, bfloat16.
        key: ``(batch, num_kv_heads, num_slots, head_dim)``.
        value: Same shape.
        mask: ``(batch, 1, num_queries, num_slots)``, bool, or 1 for the batch; every query sees a slot.
        scaling: Of products; None for the usual one.

    Returns:
        ``(batch, num_queries, num_heads, head_dim)``.
    """
    batch, num_heads, num_queries, head_dim = query.shape
    scale = head_dim**-0.5 if scaling is None else scaling
    result = query.new_empty(batch, num_queries, num_heads, head_dim)
    masks = mask.expand(batch, -1, -1, -1)[:, 0]
    step = max(_MOST_PRODUCTS // (num_heads // key.shape[1] * key.shape[2]), 1)
    for row in range(batch):
        for first in range(0, num_queries, step):
            queries = slice(first, first + step)
            seen = masks[row, queries]
            slots = run_of_seen(seen)
            result[row, queries] = _attended(
                query[row, :, queries], key[row, :, slots], value[row, :, slots], seen[:, slots], scale
            )
    return result


def run_of_seen(mask: Tensor) -> slice:
    """Return the run of slots outside of which a boolean mask hides everything; at least one slot."""
    seen = mask.flatten(end_dim=-2).any(dim=0).nonzero()
    return slice(int(seen[0]), int(seen[-1]) + 1) if len(seen) else slice(0, 1)


def _attended(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Attend from some queries of one prompt; ``(num_queries, num_heads, head_dim)``."""
    num_heads, num_queries, head_dim = query.shape
    num_groups, num_slots, _ = key.shape
    grouped = query.reshape(num_groups, -1, head_dim)
    result = torch.empty_like(grouped)
    hidden = ~seen
    first = int(hidden.any(dim=0).to(torch.uint8).argmax())  # all slots before it are seen by all
    products = _room(grouped.shape[1] * num_slots).view(grouped.shape[1], num_slots)
    hidden, behind = hidden[:, first:], products.view(-1, num_queries, num_slots)[..., first:]
    for group in range(num_groups):
        torch.mm(grouped[group], key[group].T, out=products)
        behind.masked_fill_(hidden, float("-inf"))
        # Made again, less the largest: rounded to eight bits, what counts most is then rounded least.
        largest = products.amax(dim=-1, keepdim=True).mul_(-scale)
        torch.addmm(largest, grouped[group], key[group].T, alpha=scale, out=products)
        behind.masked_fill_(hidden, float("-inf"))
        products.exp_()
        total = products.sum(dim=-1, keepdim=True, dtype=torch.float32)
        result[group] = products @ value[group] / total
    return result.view(num_heads, num_queries, head_dim).transpose(0, 1)


def _room(size: int) -> Tensor:
    """Return room for so many products, the same each time in a thread; new memory is slow to touch."""
    room: Tensor | None = getattr(_scratch, "room", None)
    if room is None or room.numel() < size:
        room = _scratch.room = torch.empty(max(size, _MOST_PRODUCTS), dtype=torch.bfloat16)
    return room[:size]
