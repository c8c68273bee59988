"""Attention of few tokens over a long context on a GPU, which reads keys and values once.

The query heads of a group stand as rows over the same keys, and the slots are split among the processors of
the GPU, which one row alone would leave idle.

Source:
    Flash-Decoding, https://pytorch.org/blog/flash-decoding/
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from rag_blockcache.gpu.attention_kernels import attend_kernel, combine_kernel, write_kernel

_LARGE_SHARED_BYTES = 140_000  # of data-center GPUs; others have about 100,000
_PROCESSORS_ELSEWHERE = 4  # stands in where the kernels are interpreted on a CPU


@dataclass(frozen=True)
class Slots:
    """Where computed tokens stand in a context, as the kernels read it: on the device, at fixed addresses.

    Attributes:
        table: Addresses of the context, ``(1 + 2 * num_layers,)``, int64; see ``attention_kernels``.
        slots: Of each computed token, ascending, ``(num_queries,)``, int64; below 0 for one that only fills
            up a pass: it writes nothing, and nobody attends to it.
    """

    table: Tensor
    slots: Tensor


def write_states(keys: Tensor, values: Tensor, at: Slots, layer: int) -> None:
    """Write computed keys and values of one layer into their slots.

    Args:
        keys: ``(1, num_kv_heads, num_queries, head_dim)``; the last dimension is contiguous.
        values: Same shape.
        at: Where.
        layer: Index of the layer.
    """
    _, num_kv_heads, num_queries, head_dim = keys.shape
    keys, values = _with_whole_rows(keys), _with_whole_rows(values)
    write_kernel[(num_queries, num_kv_heads)](
        keys,
        values,
        keys.stride(1),
        keys.stride(2),
        values.stride(1),
        values.stride(2),
        at.table,
        at.slots,
        layer,
        num_queries,
        head_dim=head_dim,
        block_dim=power_of_two(head_dim),
    )


def attend(query: Tensor, at: Slots, layer: int, *, num_kv_heads: int, scaling: float) -> Tensor:
    """Attend from each computed token to all slots of a context up to its own.

    Args:
        query: ``(1, num_heads, num_queries, head_dim)``.
        at: Where the tokens stand; their own states are written already.
        layer: Index of the layer.
        num_kv_heads: Key-value heads of the context.
        scaling: Factor of the products of queries and keys.

    Returns:
        ``(1, num_queries, num_heads, head_dim)``, in the dtype of ``query``; a token without a slot gets
        numbers without a meaning, and never NaN.
    """
    _, num_heads, num_queries, head_dim = query.shape
    query = _with_whole_rows(query)
    group = num_heads // num_kv_heads
    tiles = _tiles(group * num_queries, head_dim, query.dtype, shared_bytes(query.device))
    num_row_blocks = -(-group * num_queries // tiles.rows)
    num_splits = max(1, 2 * num_processors(query.device) // (num_row_blocks * num_kv_heads))
    shape = (num_queries, num_heads, num_splits)
    outputs = torch.empty((*shape, head_dim), dtype=torch.float32, device=query.device)
    sums = torch.empty((*shape, 2), dtype=torch.float32, device=query.device)
    attend_kernel[(num_row_blocks, num_splits, num_kv_heads)](
        query,
        query.stride(1),
        query.stride(2),
        at.table,
        at.slots,
        outputs,
        sums,
        scaling * 1.4426950408889634,  # log2(e): the kernel takes powers of two
        layer,
        num_queries,
        group=group,
        head_dim=head_dim,
        block_dim=power_of_two(head_dim),
        block_rows=tiles.rows,
        block_slots=tiles.slots,
        precision="ieee",  # matters to float32 alone, which is asked for where digits count
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    output = torch.empty((1, num_queries, num_heads, head_dim), dtype=query.dtype, device=query.device)
    combine_kernel[(num_queries * num_heads,)](
        outputs,
        sums,
        output,
        num_splits=num_splits,
        block_splits=power_of_two(num_splits),
        head_dim=head_dim,
        block_dim=power_of_two(head_dim),
        num_warps=1,  # a row is little work, and there are thousands
    )
    return output


@dataclass(frozen=True)
class _Tiles:
    """How much one program of ``attend_kernel`` holds at a time."""

    rows: int
    slots: int
    warps: int
    stages: int


def _tiles(num_rows: int, head_dim: int, dtype: torch.dtype, shared_bytes: int) -> _Tiles:
    """Choose tiles that fit the registers and the shared memory of a processor.

    Few rows are a matter of reading, and want many programs; many rows one of computing, and want large
    tiles.
    """
    if dtype == torch.float32:  # no tensor cores: small tiles, or registers spill
        return _Tiles(rows=16, slots=16, warps=4, stages=2)
    width = power_of_two(head_dim)
    is_small = width > 128 or (width == 128 and shared_bytes < _LARGE_SHARED_BYTES)
    slots, stages = (32, 2) if is_small else (64, 3)
    if num_rows <= 32:
        return _Tiles(rows=16 if num_rows <= 16 else 32, slots=slots, warps=4, stages=stages)
    if num_rows <= 256 or width > 128:  # larger tiles were slower there on an H200, at every length
        return _Tiles(rows=64, slots=slots, warps=4, stages=stages)
    return _Tiles(rows=128, slots=slots, warps=8, stages=stages)


def _with_whole_rows(states: Tensor) -> Tensor:
    return states if states.stride(-1) == 1 else states.contiguous()


def power_of_two(number: int) -> int:
    """Return the least power of two that holds a number, and that a product of matrices can be made of."""
    return max(16, 1 << (number - 1).bit_length())


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Return how much shared memory one program may have."""
    if device.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0))


@functools.cache
def num_processors(device: torch.device) -> int:
    """Return how many programs run at once, at least."""
    if device.type != "cuda":
        return _PROCESSORS_ELSEWHERE
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
