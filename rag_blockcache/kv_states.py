"""KV states: the keys and values that a model keeps of a run of tokens."""

from __future__ import annotations

import math
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
        return KVStates(self.keys[:, :, :num_tokens], self.values[:, :, :num_tokens])


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate room for keys or values, without writing to it.

    On a CPU it comes from NumPy, which asks the system for huge pages: with small ones, touching a large
    buffer for the first time takes several times as long as the copy into it.
    """
    if device.type != "cpu":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.empty(num_bytes, dtype=np.uint8)).view(dtype).view(tuple(shape))
