"""KV states: the keys and values that a model keeps of a run of tokens, exact or packed by a codec."""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from rag_blockcache.rotary import Angles, rotate_keys

Shape = tuple[int, ...]


class BlockStates(ABC):
    """KV states of a block in the form in which a codec keeps them: a dataclass of tensors, layers first.

    A form takes exact states in (``pack``) and writes them where a prompt needs them (``place``). Stores keep
    whatever it is and never look inside.

    Attributes:
        codec: Name of the form, on disk and for users.
    """

    codec: ClassVar[str]

    @classmethod
    @abstractmethod
    def pack(cls, states: KVStates) -> BlockStates:
        """Bring exact states into this form."""

    @classmethod
    @abstractmethod
    def layout(cls, shape: Shape, dtype: torch.dtype) -> dict[str, tuple[Shape, torch.dtype]]:
        """Return shape and type of each tensor of a whole block.

        Args:
            shape: Of its keys, ``(num_layers, num_kv_heads, num_tokens, head_dim)``.
            dtype: That of the model.
        """

    @property
    @abstractmethod
    def shape(self) -> Shape:
        """``(num_layers, num_kv_heads, num_tokens, head_dim)``."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Data type of the model that the states come from."""

    @abstractmethod
    def prefix(self, num_tokens: int) -> Self:
        """Return the states of the first tokens, as views: what a causal model keeps of a cut passage."""

    @abstractmethod
    def place(
        self, keys: Tensor, values: Tensor, angles: Angles | None = None, *, interleaved: bool = False
    ) -> None:
        """Write the states into a context.

        Args:
            keys: Where keys go, turned to their positions; of ``shape``.
            values: Where values go; of ``shape``.
            angles: Of the positions, one row a token; None leaves keys as they are.
            interleaved: See ``rotary.pairs``.
        """

    @classmethod
    def num_bytes_of(cls, shape: Shape, dtype: torch.dtype) -> int:
        """Return the size of a whole block in this form, in bytes; see ``layout``."""
        parts = cls.layout(shape, dtype).values()
        return sum(math.prod(part_shape) * part_dtype.itemsize for part_shape, part_dtype in parts)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self.tensors().values())).device

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the run."""
        return self.shape[2]

    @property
    def num_bytes(self) -> int:
        """Size of all tensors, in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, in the order in which they are written to disk."""
        return {name: getattr(self, name) for name in self.names()}

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of all tensors."""
        return [field.name for field in fields(cls)]  # type: ignore[arg-type]  # every form is a dataclass

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return the states with each tensor changed: moved to another device, say."""
        return type(self)(**{name: change(tensor) for name, tensor in self.tensors().items()})

    def of_layers(self, layers: slice, device: torch.device) -> Self:
        """Return the states of some layers, as views where they are on the device already."""
        return self.mapped(lambda tensor: tensor[layers].to(device))

    @property
    def is_sound(self) -> bool:
        """Whether the tensors belong together, as those of a whole block do."""
        if len(self.shape) != 4:
            return False
        layout = self.layout(self.shape, self.dtype)
        return all(
            (tuple(tensor.shape), tensor.dtype) == layout[name] for name, tensor in self.tensors().items()
        )

    def unpack(self) -> KVStates:
        """Return exact states, as near to those that were packed as the codec is."""
        keys, values = (torch.empty(self.shape, dtype=self.dtype, device=self.device) for _ in range(2))
        self.place(keys, values)
        return KVStates(keys, values)


@dataclass(frozen=True, eq=False)
class KVStates(BlockStates):
    """Keys and values of a run of tokens, for all layers, as the model made them.

    Keys are position-free: they stand as they were before rotary encoding, so that one copy
    serves every position. ``assembler`` turns them to where they are needed.

    Attributes:
        keys: ``(num_layers, num_kv_heads, num_tokens, head_dim)``, in the model's dtype.
        values: Same shape and dtype.
    """

    codec = "none"
    keys: Tensor
    values: Tensor

    @classmethod
    def pack(cls, states: KVStates) -> KVStates:
        """Return the states as they are."""
        return states

    @classmethod
    def layout(cls, shape: Shape, dtype: torch.dtype) -> dict[str, tuple[Shape, torch.dtype]]:
        """Return shape and type of keys and values, which are the same."""
        return {"keys": (shape, dtype), "values": (shape, dtype)}

    @property
    def shape(self) -> Shape:
        """``(num_layers, num_kv_heads, num_tokens, head_dim)``."""
        return tuple(self.keys.shape)

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the run."""
        return self.keys.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """Data type of keys and values."""
        return self.keys.dtype

    def prefix(self, num_tokens: int) -> KVStates:
        """Return the states of the first tokens, as views."""
        if num_tokens == self.num_tokens:
            return self
        return KVStates(self.keys[:, :, :num_tokens], self.values[:, :, :num_tokens])

    def place(
        self, keys: Tensor, values: Tensor, angles: Angles | None = None, *, interleaved: bool = False
    ) -> None:
        """Copy values, and turn keys on the way; see ``BlockStates.place``."""
        values.copy_(self.values)
        place_keys(self.keys, keys, angles, interleaved=interleaved)

    def unpack(self) -> KVStates:
        """Return the states as they are."""
        return self


class Placement(NamedTuple):
    """Where the states of a block go: its first token at ``offset`` in the prompt."""

    states: BlockStates
    offset: int


def place_keys(keys: Tensor, out: Tensor, angles: Angles | None, *, interleaved: bool) -> None:
    """Write keys where they go, turned to their positions; without angles as they are."""
    if angles is None:
        out.copy_(keys)
    else:
        rotate_keys(keys, angles, interleaved=interleaved, out=out)


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
