"""Blocks from the host to a GPU, some at a time: the next are on the bus while these are placed."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from rag_blockcache.gpu import Moved
from rag_blockcache.kv_states import BlockStates

logger = logging.getLogger(__name__)

_STAGE_BYTES = 2**26
_NUM_STAGES = 3  # one is filled, one is on the bus, one is placed
_ALIGNMENT = 256  # of tensors in a stage


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
    with (
        torch.cuda.device(device),
        staging_of(device).brought([Moved(each, 0, 0) for each in blocks]) as groups,
    ):
        try:
            for group in groups:
                for brought in group:
                    found.append(brought.states.mapped(torch.clone))
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
    def brought(self, moved: Sequence[Moved]) -> Iterator[Iterator[list[Moved]]]:
        """Bring blocks from the host, in groups that can be used by what is submitted before the next one.

        Args:
            moved: Blocks on the host.
        """
        with self._lock, closing(self._groups(moved)) as groups:
            yield groups

    def _groups(self, moved: Sequence[Moved]) -> Generator[list[Moved], None, None]:
        for number, group in enumerate(cut(moved, self._stage_bytes)):
            stage = self._stages[number % _NUM_STAGES]
            try:
                yield stage.bring(group)
            finally:
                stage.used.record()


def cut(moved: Sequence[Moved], limit_bytes: int) -> Iterator[list[Moved]]:
    """Cut blocks into runs that fit a limit; a block larger than that is a run of its own."""
    group: list[Moved] = []
    num_bytes = 0
    for each in moved:
        size = staged_bytes(each)
        if group and num_bytes + size > limit_bytes:
            yield group
            group, num_bytes = [], 0
        group.append(each)
        num_bytes += size
    if group:
        yield group


def staged_bytes(moved: Moved) -> int:
    """Return what a block takes in a stage."""
    return sum(_aligned(tensor.nbytes) for tensor in moved.states.tensors().values())


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

    def bring(self, group: Sequence[Moved]) -> list[Moved]:
        """Copy blocks to the device; what is submitted from now on finds them there."""
        self.used.synchronize()
        num_bytes = sum(map(staged_bytes, group))
        if self._there.nbytes < num_bytes:
            self._there = torch.empty(num_bytes, dtype=torch.uint8, device=self._there.device)
            # It may be memory that was in use until now by what is under way on the usual stream.
            self._stream.wait_stream(torch.cuda.current_stream(self._there.device))
        direct = all(
            _can_be_copied_from(tensor) for each in group for tensor in each.states.tensors().values()
        )
        with torch.cuda.stream(self._stream):
            brought = self._one_by_one(group) if direct else self._at_once(group, num_bytes)
        torch.cuda.current_stream(self._there.device).wait_stream(self._stream)
        return brought

    def _one_by_one(self, group: Sequence[Moved]) -> list[Moved]:
        place = _Places(self._there)
        brought = []
        for each in group:
            states = each.states.mapped(lambda tensor: place.of(tensor).copy_(tensor, non_blocking=True))
            brought.append(replace(each, states=states))
        return brought

    def _at_once(self, group: Sequence[Moved], num_bytes: int) -> list[Moved]:
        """Gather blocks in memory that the device can copy from, and copy them together."""
        if self._here.nbytes < num_bytes:
            self._here = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        here, there = _Places(self._here), _Places(self._there)
        for each in group:
            for tensor in each.states.tensors().values():
                here.of(tensor).copy_(tensor)
        self._there[:num_bytes].copy_(self._here[:num_bytes], non_blocking=True)
        return [replace(each, states=each.states.mapped(there.of)) for each in group]


class _Places:
    """Hands out places in a buffer, one behind the other."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer, self._next = buffer, 0

    def of(self, tensor: Tensor) -> Tensor:
        """Return a place for a tensor, shaped as it is."""
        start = self._next
        self._next += _aligned(tensor.nbytes)
        return self._buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def _can_be_copied_from(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.is_pinned()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
