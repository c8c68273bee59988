"""KV states: the keys and values that a model keeps of a run of tokens."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class KVStates:
    """Keys and values of a run of tokens, for all layers.

    Keys are position-free: they stand as they were before rotary encoding, so that one copy
    serves every position. ``assembler`` turns them to where they are needed.

    Attributes:
        keys: ``(num_layers, num_kv_heads, num_tokens, head_dim)``, in the model's dtype.
        values: Same shape and dtype.
    """

    keys: Tensor
    values: Tensor

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the run."""
        return self.keys.shape[-2]

    @property
    def num_bytes(self) -> int:
        """Size of the keys and values, in bytes."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def dtype(self) -> torch.dtype:
        """Data type of keys and values."""
        return self.keys.dtype

    def prefix(self, num_tokens: int) -> KVStates:
        """Return the states of the first tokens, as views: what a causal model keeps of a cut passage."""
        if num_tokens == self.num_tokens:
            return self
        return KVStates(self.keys[:, :, :num_tokens], self.values[:, :, :num_tokens])


class Buffers:
    """Memory for keys and values that is used again: the next prompt is about as long as the last.

    Memory that a process has never touched costs several times the copy into it, most of all on virtual
    machines. On a GPU torch keeps its own, so nothing is kept here.
    """

    def __init__(self, size_limit_bytes: int = 2**30) -> None:
        self._size_limit_bytes = size_limit_bytes
        self._spare: list[Tensor] = []
        self._lock = threading.Lock()

    def take(self, num_bytes: int, device: torch.device) -> Tensor:
        """Return at least ``num_bytes`` bytes, uninitialised, as a flat tensor of ``uint8``."""
        with self._lock:
            for index, buffer in enumerate(self._spare):
                if num_bytes <= buffer.nbytes <= 4 * num_bytes and device.type == "cpu":
                    return self._spare.pop(index)
        return empty((num_bytes,), torch.uint8, device)

    def give(self, buffers: Sequence[Tensor]) -> None:
        """Keep buffers that nobody uses any more, the newest first, as far as the limit allows."""
        with self._lock:
            spare = [buffer for buffer in (*buffers, *self._spare) if buffer.device.type == "cpu"]
            self._spare, num_bytes = [], 0
            for buffer in spare:
                if num_bytes + buffer.nbytes <= self._size_limit_bytes:
                    num_bytes += buffer.nbytes
                    self._spare.append(buffer)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate room for keys or values, without writing to it.

    On a CPU it comes from NumPy, which asks the system for huge pages: with small ones, touching a large
    buffer for the first time takes several times as long as the copy into it.
    """
    if device.type != "cpu":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.empty(num_bytes, dtype=np.uint8)).view(dtype).view(tuple(shape))
