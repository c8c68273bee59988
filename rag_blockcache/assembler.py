"""KV states to one preallocated context: rotate and place in one pass, in a form that transformers accepts.

A context is a run of token slots. A slot is *placed* (its keys and values come from a stored block, moved to
its position) or *computed* (a forward pass writes them). Computed slots may stand anywhere.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from rag_blockcache.gpu import place_blocks
from rag_blockcache.kv_states import Placement
from rag_blockcache.layers import Layer
from rag_blockcache.model import Model
from rag_blockcache.rotary import Angles

_CHUNK_BYTES = 2**22  # of float32, see ``_chunks``


@dataclass(frozen=True)
class _Run:
    """Consecutive layers that share a device and a rotary encoding, so that one operation moves them all."""

    start: int
    stop: int
    layer: Layer
    keys: Tensor  # (num_layers of the run, batch, num_kv_heads, num_slots, head_dim)
    values: Tensor


@dataclass
class _Cursor:
    """Where a pass writes, and what it sees; known to a context and to its layers.

    Were it in the context itself, layers would have to know the context, and neither would be freed before
    the next run of the cyclic collector.
    """

    slots: Tensor | slice = field(default_factory=lambda: slice(0, 0))
    end: int = 0

    @property
    def start(self) -> int:
        """Number of slots that the pass finds filled before the first one it writes."""
        return self.slots.start if isinstance(self.slots, slice) else self.end


class Context(Cache):
    """Preallocated keys and values of a batch of prompts, usable as a cache of transformers.

    Rows end at the same slot: a shorter prompt begins later, at ``starts[row]``, and no token stands before.

    Args:
        model: The model that will attend to it.
        lengths: Tokens of each prompt.
        room: Slots kept free behind the prompts, for the answer; more are made when they run out.
        scratch: Slots in front of all prompts, for computed tokens that only fill up a shorter row.
    """

    def __init__(self, model: Model, lengths: Sequence[int], *, room: int = 0, scratch: int = 0) -> None:
        self.length = scratch + max(lengths)  # slots in use; all rows end here
        self.starts = [self.length - length for length in lengths]
        self._cursor = _Cursor()
        self._angles = model.angles
        self._has_own_kernels = model.cuda_graphs
        self._runs, memory = _allocate(model, len(lengths), self.length + room)
        weakref.finalize(self, model.buffers.give, memory)
        for run in self._runs:
            for row, start in enumerate(self.starts):
                if start:  # hidden by masks, but no mask hides a NaN
                    run.keys[:, row, :, :start] = 0
                    run.values[:, row, :, :start] = 0
        self._context_layers = [
            _ContextLayer(self._cursor, run.keys[i], run.values[i])
            for run in self._runs
            for i in range(run.stop - run.start)
        ]
        super().__init__(layers=list(self._context_layers))

    @torch.inference_mode()
    def place(self, row: int, placements: Iterable[Placement], total_length: int) -> None:
        """Write stored blocks into one row, their keys turned to their positions, in one pass.

        Args:
            row: Which prompt.
            placements: Blocks and offsets, within the prompt.
            total_length: Tokens of the prompt, by which some rotary variants choose their frequencies.
        """
        placements = list(placements)
        if not placements:
            return
        reach = max(placed.offset + placed.states.num_tokens for placed in placements)
        for run in self._runs:
            angles = self._angles(run.layer, reach, total_length)
            if not self._has_own_kernels or not _place_at_once(
                run, row, self.starts[row], placements, angles
            ):
                for placed in placements:
                    _place(run, row, self.starts[row], placed, angles)

    @property
    def num_bytes(self) -> int:
        """Size of keys and values, those of slots without a token included."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._context_layers)

    @torch.inference_mode()
    def continued(self, model: Model, num_slots: int, length: int, *, room: int = 0) -> Context:
        """Return a context of one prompt whose first slots are those of this one, which is used up.

        Args:
            model: The model.
            num_slots: How many of them.
            length: Tokens of the prompt; the slots from ``num_slots`` on are to be filled.
            room: As for a new context.
        """
        run = self._runs[0]
        is_whole = self._context_layers[0].keys.data_ptr() == run.keys.data_ptr()  # it has not grown
        if is_whole and length + room <= run.keys.shape[-2]:
            self.length = length
            return self
        context = Context(model, [length], room=room)
        for mine, its in zip(self._context_layers, context._context_layers, strict=True):
            its.keys[:, :, :num_slots] = mine.keys[:, :, :num_slots]
            its.values[:, :, :num_slots] = mine.values[:, :, :num_slots]
        return context

    def begin(self, slots: Tensor | slice, end: int) -> None:
        """Say where the next pass writes.

        Args:
            slots: A slice of slots for all rows alike, or the slots of each row, ``(batch, num_queries)``.
            end: The pass attends to slots before this one.
        """
        self._cursor.slots, self._cursor.end = slots, end
        capacity = self._context_layers[0].keys.shape[-2]
        if end > capacity:
            for layer in self._context_layers:
                layer.grow(max(end, capacity + capacity // 2))

    def states_of_layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of one layer, each ``(batch, num_kv_heads, num_slots, head_dim)``."""
        layer = self._context_layers[index]
        return layer.keys, layer.values

    def visible(self, end: int, device: torch.device) -> Tensor:
        """Return whether each slot before ``end`` holds a token of its row, ``(batch, end)``."""
        return torch.arange(end, device=device) >= torch.tensor(self.starts, device=device)[:, None]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of slots that the next pass finds filled before the first one it writes."""
        return self._cursor.start

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the number of slots that a pass attends to, and the first of them."""
        return self._cursor.end, 0

    def crop(self, max_length: int) -> None:
        """Forget the last slots, as assisted decoding asks for when it takes back rejected tokens.

        Args:
            max_length: As a negative number, how many to forget; 0 for none. Otherwise, how many to keep.
        """
        self.length = self.length + max_length if max_length <= 0 else min(self.length, max_length)
        self._cursor.slots = slice(self.length, self.length)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, as beam search asks for."""
        self.starts = [start for start in self.starts for _ in range(repeats)]
        for layer in self._context_layers:
            layer.keys = layer.keys.repeat_interleave(repeats, dim=0)
            layer.values = layer.values.repeat_interleave(repeats, dim=0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows, as beam search asks for."""
        self.starts = [self.starts[i] for i in beam_idx.tolist()]
        for layer in self._context_layers:
            rows = beam_idx.to(layer.keys.device)
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]


class _ContextLayer(CacheLayerMixin):
    """One layer of a context: writes at the slots that the context says, returns the run up to its end."""

    is_sliding = False  # all slots are kept; windows are a matter of the mask
    is_croppable = True
    keys: Tensor
    values: Tensor

    def __init__(self, cursor: _Cursor, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cursor = cursor
        self.keys, self.values = keys, values  # (batch, num_kv_heads, num_slots, head_dim)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: allocated from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write computed states into their slots."""
        slots, end = self._cursor.slots, self._cursor.end
        if isinstance(slots, slice):
            self.keys[:, :, slots] = key_states
            self.values[:, :, slots] = value_states
        else:
            rows = torch.arange(len(slots), device=self.keys.device)[:, None]
            slots = slots.to(self.keys.device)
            self.keys[rows, :, slots] = key_states.transpose(1, 2)
            self.values[rows, :, slots] = value_states.transpose(1, 2)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def grow(self, num_slots: int) -> None:
        """Make room for ``num_slots`` slots."""
        more = num_slots - self.keys.shape[-2]
        self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, more))
        self.values = torch.nn.functional.pad(self.values, (0, 0, 0, more))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of slots that a pass attends to, and the first of them."""
        return self._cursor.end, 0

    def get_seq_length(self) -> int:
        """Return the number of filled slots."""
        return self._cursor.start

    def get_max_length(self) -> int:
        """Return -1: a context grows."""
        return -1


def _allocate(model: Model, num_rows: int, num_slots: int) -> tuple[list[_Run], list[Tensor]]:
    """Return room for all layers, and the memory that it lies in."""
    runs: list[_Run] = []
    memory: list[Tensor] = []
    for (device, _), group in groupby(model.layers, key=lambda layer: (layer.device, layer.rotary)):
        members = list(group)
        shape = (len(members), num_rows, model.num_kv_heads, num_slots, model.head_dim)
        num_bytes = math.prod(shape) * model.dtype.itemsize
        pair = [model.buffers.take(num_bytes, device) for _ in range(2)]
        keys, values = (buffer[:num_bytes].view(model.dtype).view(shape) for buffer in pair)
        start = runs[-1].stop if runs else 0
        runs.append(_Run(start, start + len(members), members[0], keys, values))
        memory += pair
    return runs, memory


def _place_at_once(
    run: _Run, row: int, start: int, placements: Sequence[Placement], angles: Angles | None
) -> bool:
    """Place all blocks together, where that is possible; see ``gpu.place_blocks``."""
    if not run.keys.is_cuda:
        return False
    rotary, layers = run.layer.rotary, slice(run.start, run.stop)
    if run.stop - run.start != placements[0].states.shape[0]:
        placements = [
            Placement(placed.states.mapped(lambda tensor: tensor[layers]), placed.offset)
            for placed in placements
        ]
    return place_blocks(
        placements,
        run.keys[:, row],
        run.values[:, row],
        angles,
        first_slot=start,
        interleaved=rotary is not None and rotary.interleaved,
    )


def _place(run: _Run, row: int, start: int, placed: Placement, angles: Angles | None) -> None:
    num_tokens, rotary = placed.states.num_tokens, run.layer.rotary
    slots = slice(start + placed.offset, start + placed.offset + num_tokens)
    turned = None if angles is None else angles.at(placed.offset, placed.offset + num_tokens)
    for layers in _chunks(run, num_tokens):
        stored = slice(run.start + layers.start, run.start + layers.stop)
        placed.states.of_layers(stored, run.keys.device).place(
            run.keys[layers, row, :, slots],
            run.values[layers, row, :, slots],
            turned,
            interleaved=rotary is not None and rotary.interleaved,
        )


def _chunks(run: _Run, num_tokens: int) -> Iterator[slice]:
    """Cut the layers of a run into parts that one operation handles at a time.

    On a CPU, what stands between operations, in float32, would otherwise leave the cache.
    """
    num_layers = run.stop - run.start
    _, _, num_kv_heads, _, head_dim = run.keys.shape
    each = num_layers
    if run.keys.device.type == "cpu":
        each = max(1, _CHUNK_BYTES // max(1, 4 * num_kv_heads * num_tokens * head_dim))
    for first in range(0, num_layers, each):
        yield slice(first, min(first + each, num_layers))
