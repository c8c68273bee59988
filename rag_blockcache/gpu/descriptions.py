"""What kernels read of a stored block: where its tensors are, and how they lie."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rag_blockcache.kv_states import BlockStates

HEADER = 4  # words of a row before the tensors, see ``placing_kernels``
_ALIGNMENT = 16  # bytes that the copy kernel reads at once


@dataclass(frozen=True)
class Description:
    """What is known of a block, wherever it goes.

    Attributes:
        form: How it is kept.
        dtype: Of what it stands for.
        device: Where it is.
        row: What ``placing_kernels`` reads of it, int64 in bytes.
        sizes: Bytes of each tensor, int64 in bytes; None unless the block is in memory of the host that a GPU
            can read, each tensor in one piece.
    """

    form: type[BlockStates]
    dtype: torch.dtype
    device: torch.device
    row: bytes
    sizes: bytes | None


# Stored blocks come again and again.
_described: weakref.WeakKeyDictionary[BlockStates, Description] = weakref.WeakKeyDictionary()
known_description = _described.get


def describe(states: BlockStates, copies: list[Tensor]) -> Description:
    """Describe a block, and keep that for as long as the block lives.

    Args:
        states: The block.
        copies: Takes what had to be copied on its device for the kernels, which expect whole rows, one behind
            the other.
    """
    tensors, are_whole = list(states.tensors().items()), True
    of_keys = dict(tensors).get("key_scales")
    words = [states.num_tokens, 0, 0, 0 if of_keys is None else of_keys.shape[2]]
    for _, tensor in tensors:
        layer_stride, head_stride, *within = tensor.stride()
        if within != [tensor.shape[3], 1]:
            are_whole = False
            if tensor.is_cuda:
                tensor = tensor.contiguous()
                copies.append(tensor)
                layer_stride, head_stride = tensor.stride()[:2]
        words += (tensor.data_ptr(), layer_stride, head_stride)
    sizes = None
    if all(_can_be_read(tensor) for _, tensor in tensors):
        sizes = np.array([tensor.nbytes for _, tensor in tensors], np.int64).tobytes()
    row = np.array(words, np.int64).tobytes()
    found = Description(type(states), states.dtype, states.device, row, sizes)
    if are_whole:
        _described[states] = found
    return found


def rows_of(described: Sequence[Description]) -> NDArray[np.int64]:
    """Return a table of blocks of one form, ``(num_blocks, num_words)``; slots and positions are still 0."""
    joined = b"".join([each.row for each in described])
    return np.frombuffer(joined, np.int64).reshape(len(described), -1).copy()


def sizes_of(described: Sequence[Description]) -> NDArray[np.int64]:
    """Return the bytes of each tensor of blocks of one form, ``(num_blocks, num_tensors)``."""
    joined = b"".join([each.sizes or b"" for each in described])
    return np.frombuffer(joined, np.int64).reshape(len(described), -1)


def addresses(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the addresses in a table, to be read and written, ``(num_blocks, num_tensors)``."""
    return rows[:, HEADER::3]


def _can_be_read(tensor: Tensor) -> bool:
    """Return whether a GPU can read a tensor of the host where it is, in one piece."""
    is_one_piece = tensor.device.type == "cpu" and tensor.is_contiguous()
    is_aligned = tensor.data_ptr() % _ALIGNMENT == 0
    return is_one_piece and is_aligned and torch.cuda.is_available() and tensor.is_pinned()
