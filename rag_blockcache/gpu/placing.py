"""Stored blocks into a context on a GPU: loaded, dequantized, turned and written in one launch.

With a launch for each block, and several for each step, launching would take longer than the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rag_blockcache.gpu.descriptions import HEADER, Description, describe, known_description, rows_of
from rag_blockcache.gpu.placing_kernels import EXACT, INT4, INT8, place_kernel
from rag_blockcache.gpu.staging import staging_of
from rag_blockcache.kv_states import BlockStates, KVStates, Placement
from rag_blockcache.quantization import Int4States, Int8States
from rag_blockcache.rotary import Angles

_FORMS: dict[type[BlockStates], int] = {KVStates: EXACT, Int8States: INT8, Int4States: INT4}
_NARROW = {"value_scales", "value_offsets"}  # the rows of all other tensors are ``head_dim`` long
_TOKENS = 32  # of a program


class _Target(NamedTuple):
    """Where blocks go; see ``gpu.place_blocks``."""

    keys: Tensor
    values: Tensor
    angles: Angles | None
    first_slot: int
    interleaved: bool


def place(
    placements: Sequence[Placement],
    keys: Tensor,
    values: Tensor,
    angles: Angles | None,
    *,
    first_slot: int,
    interleaved: bool,
) -> bool:
    """Write blocks into one row of a context; see ``gpu.place_blocks``."""
    here: dict[type[BlockStates], list[tuple[Placement, Description]]] = {}
    readable: dict[type[BlockStates], list[tuple[Placement, Description]]] = {}
    elsewhere: dict[type[BlockStates], list[Placement]] = {}
    copies: list[Tensor] = []  # to be read by a launch that is still to come
    dtype, device = keys.dtype, keys.device
    for placed in placements:  # hundreds, while the GPU waits
        known = known_description(placed.states)
        if known is None:
            if type(placed.states) not in _FORMS:
                return False
            known = describe(placed.states, copies)
        if known.dtype != dtype:
            return False
        if known.device == device:
            here.setdefault(known.form, []).append((placed, known))
        elif known.sizes is not None:
            readable.setdefault(known.form, []).append((placed, known))
        else:
            elsewhere.setdefault(known.form, []).append(placed)
    to = _Target(keys, values, angles, first_slot, interleaved)
    for pairs in here.values():
        _launch([placed for placed, _ in pairs], rows_of([known for _, known in pairs]), to)
    for pairs in readable.values():
        states, described = [placed.states for placed, _ in pairs], [known for _, known in pairs]
        with staging_of(device).read(states, described) as groups:
            for chosen, rows in groups:
                _launch([placed for placed, _ in pairs[chosen]], rows, to)
    for waiting in elsewhere.values():
        with staging_of(device).brought([placed.states for placed in waiting]) as groups_of_states:
            for chosen, brought in groups_of_states:
                _launch(waiting[chosen], rows_of([describe(each, copies) for each in brought]), to)
    return True


def _launch(placements: Sequence[Placement], rows: NDArray[np.int64], to: _Target) -> None:
    """Place blocks of one form that the device has, all at once.

    Args:
        placements: Where they go.
        rows: Where they are; slots and positions are filled in.
        to: The context.
    """
    keys, angles = to.keys, to.angles
    num_layers, num_kv_heads, _, head_dim = keys.shape
    sample = placements[0].states
    rows[:, 2] = [placed.offset for placed in placements]
    rows[:, 1] = rows[:, 2] + to.first_slot
    words = torch.from_numpy(rows)
    if keys.is_cuda:
        words = words.pin_memory().to(keys.device, non_blocking=True)
    num_pairs = 0 if angles is None else angles.cos.shape[-1]
    nothing = torch.empty(0, dtype=torch.float32, device=keys.device)
    cos, sin = (nothing, nothing) if angles is None else (angles.cos.contiguous(), angles.sin.contiguous())
    place_kernel[(-(-int(rows[:, 0].max()) // _TOKENS), len(rows), num_layers)](
        words,
        keys,
        to.values,
        keys.stride(0),
        keys.stride(1),
        cos,
        sin,
        row_words=rows.shape[1],
        form=_FORMS[type(sample)],
        num_heads=num_kv_heads,
        head_dim=head_dim,
        block_dim=_power_of_two(head_dim),
        num_value_groups=_num_value_groups(sample),
        num_pairs=num_pairs,
        block_pairs=_power_of_two(max(num_pairs, 1)),
        is_interleaved=to.interleaved,
        is_aligned=head_dim % 16 == 0 and _is_aligned(rows, type(sample).names()),
        block_tokens=_TOKENS,
        num_warps=4,
    )


def _is_aligned(rows: NDArray[np.int64], names: Sequence[str]) -> bool:
    """Return whether the rows of all blocks begin at multiples of 16 bytes, and of 16 elements."""
    wide = [index for index, name in enumerate(names) if name not in _NARROW]
    columns = [HEADER + 3 * index + offset for index in wide for offset in range(3)]
    return not (rows[:, columns] & 15).any()


def _num_value_groups(states: BlockStates) -> int:
    scales = states.tensors().get("value_scales")
    return 1 if scales is None else scales.shape[3]


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
