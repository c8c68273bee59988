"""Blocks from the host to a GPU, some at a time: the next are on the bus while these are placed."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rag_blockcache.gpu.descriptions import (
    Description,
    addresses,
    describe,
    known_description,
    rows_of,
    sizes_of,
)
from rag_blockcache.kv_states import BlockStates

logger = logging.getLogger(__name__)

_STAGE_BYTES = 2**26
_NUM_STAGES = 3  # one is filled, one is on the bus, one is placed
_ALIGNMENT = 256  # of tensors in a stage
_LARGE_BYTES = 2**20  # of a tensor that is worth a copy of its own, which is a little faster than a kernel's
_PROGRAMS = 2  # that copy a smaller one
_WORDS = 2048  # of 32 bits, that a program copies at once

_Filled = TypeVar("_Filled")
_Size = TypeVar("_Size", int, NDArray[np.int64])


@functools.cache
def staging_of(device: torch.device) -> Staging:
    """Return the staging memory of a device, which is kept for as long as the process lives."""
    return Staging(device)


@torch.inference_mode()  # as the buffers are made within requests
def copies(blocks: Sequence[BlockStates], device: torch.device) -> list[BlockStates]:
    """Copy blocks to a GPU, each into memory of its own.

    Args:
        blocks: Blocks of the host.
        device: The GPU.

    Returns:
        The copies, in order; without the last ones if the device has no memory for them.
    """
    found: list[BlockStates] = []
    described = ((known_description(each) or describe(each, [])) for each in blocks)
    are_readable = all(each.sizes is not None for each in described)
    with torch.cuda.device(device):
        try:
            if are_readable:
                for each in blocks:
                    found.append(each.mapped(lambda tensor: tensor.to(device, non_blocking=True)))
            else:
                with staging_of(device).brought(blocks) as groups:
                    for _, group in groups:
                        for states in group:
                            found.append(states.mapped(torch.clone))
        except torch.cuda.OutOfMemoryError as error:
            logger.warning(
                "%d of %d blocks were not copied to %s: %s",
                len(blocks) - len(found),
                len(blocks),
                device,
                error,
            )
    return found


class Staging:
    """A ring of buffers on the device, each with one beside it on the host that the device can copy from.

    Args:
        device: The GPU.
        stage_bytes: Size of a buffer; a larger block makes it grow.
    """

    def __init__(self, device: torch.device, stage_bytes: int = _STAGE_BYTES) -> None:
        self._stages = [_Stage(device) for _ in range(_NUM_STAGES)]
        self._stage_bytes = stage_bytes
        self._lock = threading.Lock()

    @contextmanager
    def brought(self, blocks: Sequence[BlockStates]) -> Iterator[Iterator[tuple[slice, list[BlockStates]]]]:
        """Bring blocks from the host, in groups that can be used by what is submitted before the next one.

        Args:
            blocks: Blocks on the host.

        Yields:
            Which of the blocks a group is, and these on the device.
        """
        sizes = [staged_bytes(each) for each in blocks]
        with (
            self._lock,
            closing(self._groups(sizes, lambda stage, chosen: stage.bring(blocks[chosen]))) as groups,
        ):
            yield groups

    @contextmanager
    def read(
        self, blocks: Sequence[BlockStates], described: Sequence[Description]
    ) -> Iterator[Iterator[tuple[slice, NDArray[np.int64]]]]:
        """Bring blocks of one form from memory that the device can read, in groups as ``brought`` does.

        Args:
            blocks: The blocks.
            described: What is known of them; they have sizes.

        Yields:
            Which of the blocks a group is, and its table for ``placing_kernels``.
        """
        rows, sizes = rows_of(described), sizes_of(described)

        def fill(stage: _Stage, chosen: slice) -> NDArray[np.int64]:
            return stage.read(blocks[chosen], rows[chosen], sizes[chosen])

        with self._lock, closing(self._groups(_aligned(sizes).sum(1).tolist(), fill)) as groups:
            yield groups

    def _groups(
        self, sizes: Sequence[int], fill: Callable[[_Stage, slice], _Filled]
    ) -> Generator[tuple[slice, _Filled], None, None]:
        for number, chosen in enumerate(cut(sizes, self._stage_bytes)):
            stage = self._stages[number % _NUM_STAGES]
            try:
                with stage.filling(sum(sizes[chosen])):
                    filled = fill(stage, chosen)
                yield chosen, filled
            finally:
                stage.used.record()


def cut(sizes: Sequence[int], limit: int) -> Iterator[slice]:
    """Cut blocks into runs that fit a limit; a block larger than that is a run of its own."""
    start = num_bytes = 0
    for index, size in enumerate(sizes):
        if index > start and num_bytes + size > limit:
            yield slice(start, index)
            start, num_bytes = index, 0
        num_bytes += size
    if sizes:
        yield slice(start, len(sizes))


def staged_bytes(states: BlockStates) -> int:
    """Return what a block takes in a stage."""
    return sum(_aligned(tensor.nbytes) for tensor in states.tensors().values())


class _Stage:
    """One buffer of the ring.

    Attributes:
        used: When the device is done with what was brought last.
    """

    def __init__(self, device: torch.device) -> None:
        self.used = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._there = torch.empty(0, dtype=torch.uint8, device=device)
        self._here = torch.empty(0, dtype=torch.uint8)
        self._read: Sequence[BlockStates] = ()  # nobody else may have their memory until they are copied

    @contextmanager
    def filling(self, num_bytes: int) -> Iterator[None]:
        """Fill it inside this block; what is submitted afterwards finds it filled."""
        self.used.synchronize()
        self._read = ()
        if self._there.nbytes < num_bytes:
            self._there = torch.empty(num_bytes, dtype=torch.uint8, device=self._there.device)
            # It may be memory that was in use until now by what is under way on the usual stream.
            self._stream.wait_stream(torch.cuda.current_stream(self._there.device))
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream(self._there.device).wait_stream(self._stream)

    def bring(self, blocks: Sequence[BlockStates]) -> list[BlockStates]:
        """Gather blocks in memory that the device can copy from, and copy them together."""
        num_bytes = sum(map(staged_bytes, blocks))
        if self._here.nbytes < num_bytes:
            self._here = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        here, there = _Places(self._here), _Places(self._there)
        for each in blocks:
            for tensor in each.tensors().values():
                here.of(tensor).copy_(tensor)
        self._there[:num_bytes].copy_(self._here[:num_bytes], non_blocking=True)
        return [each.mapped(there.of) for each in blocks]

    def read(
        self, blocks: Sequence[BlockStates], rows: NDArray[np.int64], sizes: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Have the device read blocks where they are, and return their table with where it puts them."""
        self._read = blocks
        ends = _aligned(sizes).reshape(-1).cumsum()
        starts = np.concatenate(([0], ends[:-1])).reshape(sizes.shape)
        places, is_small = self._there.data_ptr() + starts, sizes < _LARGE_BYTES
        if is_small.any():
            sources = addresses(rows)[is_small]
            copy_tensors(sources, places[is_small], sizes[is_small], self._there.device)
        for block, column in zip(*np.nonzero(~is_small), strict=True):
            tensor = list(blocks[block].tensors().values())[column]
            place = self._there[starts[block, column] :][: tensor.nbytes]
            place.copy_(tensor.view(-1).view(torch.uint8), non_blocking=True)
        found = rows.copy()
        addresses(found)[:] = places
        return found


class _Places:
    """Hands out places in a buffer, one behind the other."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer, self._next = buffer, 0

    def of(self, tensor: Tensor) -> Tensor:
        """Return a place for a tensor, shaped as it is."""
        start = self._next
        self._next += _aligned(tensor.nbytes)
        return self._buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def copy_tensors(
    sources: NDArray[np.int64], targets: NDArray[np.int64], sizes: NDArray[np.int64], device: torch.device
) -> None:
    """Copy tensors to the device, each in one piece.

    Args:
        sources: Addresses that the device can read, multiples of 16, any shape.
        targets: Addresses on the device, multiples of 16, same shape.
        sizes: In bytes, same shape.
        device: The device.
    """
    from rag_blockcache.gpu.copy_kernels import copy_kernel  # Triton is imported where it is used

    rows = np.stack((sources.reshape(-1), targets.reshape(-1), sizes.reshape(-1)), axis=1)
    table = torch.from_numpy(rows)
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    copy_kernel[(_PROGRAMS, len(rows))](table, block_words=_WORDS, num_warps=4)


def _aligned(num_bytes: _Size) -> _Size:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
