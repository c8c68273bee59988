"""Stored blocks into a context on a GPU: loaded, dequantized, turned and written in one launch.

With a launch for each block, and several for each step, launching would take longer than the work.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rag_blockcache.gpu import Moved
from rag_blockcache.gpu.placing_kernels import EXACT, HEADER, INT4, INT8, place_kernel
from rag_blockcache.gpu.staging import staging_of
from rag_blockcache.kv_states import BlockStates, KVStates
from rag_blockcache.quantization import Int4States, Int8States
from rag_blockcache.rotary import Angles

_FORMS: dict[type[BlockStates], int] = {KVStates: EXACT, Int8States: INT8, Int4States: INT4}
_NARROW = {"value_scales", "value_offsets"}  # the rows of all other tensors are ``head_dim`` long
_TOKENS = 32  # of a program


@dataclass(frozen=True)
class _Description:
    """What is known of a block that is on the device, wherever it goes.

    Attributes:
        form: How it is kept.
        dtype: Of what it stands for.
        device: Where it is.
        words: What ``placing_kernels`` reads of it.
    """

    form: type[BlockStates]
    dtype: torch.dtype
    device: torch.device
    words: tuple[int, ...]


def place(
    moved: Sequence[Moved], keys: Tensor, values: Tensor, angles: Angles | None, *, interleaved: bool
) -> bool:
    """Write blocks into one row of a context; see ``gpu.place_blocks``."""
    here: dict[type[BlockStates], list[tuple[Moved, _Description]]] = {}
    there: dict[type[BlockStates], list[Moved]] = {}
    copies: list[Tensor] = []  # to be read by a launch that is still to come
    for each in moved:  # hundreds, while the GPU waits
        known = _described.get(each.states)
        if known is None:
            form = type(each.states)
            if form not in _FORMS or each.states.dtype != keys.dtype:
                return False
            if each.states.device != keys.device:
                there.setdefault(form, []).append(each)
                continue
            known = _describe(each.states, copies)
        elif known.dtype != keys.dtype:
            return False
        elif known.device != keys.device:
            there.setdefault(known.form, []).append(each)
            continue
        here.setdefault(known.form, []).append((each, known))
    for described in here.values():
        _launch(described, keys, values, angles, interleaved)
    for waiting in there.values():
        with staging_of(keys.device).brought(waiting) as groups:
            for group in groups:
                described = [(each, _describe(each.states, copies)) for each in group]
                _launch(described, keys, values, angles, interleaved)
    return True


def _launch(
    described: Sequence[tuple[Moved, _Description]],
    keys: Tensor,
    values: Tensor,
    angles: Angles | None,
    interleaved: bool,
) -> None:
    """Place blocks of one form that are on the device, all at once."""
    num_layers, num_kv_heads, _, head_dim = keys.shape
    form = described[0][1].form
    rows = np.array([known.words for _, known in described], np.int64)
    rows[:, 1] = [each.slot for each, _ in described]
    rows[:, 2] = [each.position for each, _ in described]
    words = torch.from_numpy(rows)
    if keys.is_cuda:
        words = words.pin_memory().to(keys.device, non_blocking=True)
    num_pairs = 0 if angles is None else angles.cos.shape[-1]
    nothing = torch.empty(0, dtype=torch.float32, device=keys.device)
    cos, sin = (nothing, nothing) if angles is None else (angles.cos.contiguous(), angles.sin.contiguous())
    place_kernel[(-(-int(rows[:, 0].max()) // _TOKENS), len(described), num_layers)](
        words,
        keys,
        values,
        keys.stride(0),
        keys.stride(1),
        cos,
        sin,
        row_words=rows.shape[1],
        form=_FORMS[form],
        num_heads=num_kv_heads,
        head_dim=head_dim,
        block_dim=_power_of_two(head_dim),
        num_value_groups=_num_value_groups(described[0][0].states),
        num_pairs=num_pairs,
        block_pairs=_power_of_two(max(num_pairs, 1)),
        is_interleaved=interleaved,
        is_aligned=head_dim % 16 == 0 and _is_aligned(rows, form.names()),
        block_tokens=_TOKENS,
        num_warps=4,
    )


# Stored blocks come again and again.
_described: weakref.WeakKeyDictionary[BlockStates, _Description] = weakref.WeakKeyDictionary()


def _describe(states: BlockStates, copies: list[Tensor]) -> _Description:
    """Describe a block on the device.

    Args:
        states: The block.
        copies: Takes what had to be copied for it.
    """
    tensors, are_whole = states.tensors(), True
    num_groups = tensors["key_scales"].shape[2] if "key_scales" in tensors else 0
    words = [states.num_tokens, 0, 0, num_groups]
    for tensor in tensors.values():
        layer_stride, head_stride, *within = tensor.stride()
        if within != [tensor.shape[3], 1]:  # the kernel expects whole rows, one behind the other
            tensor, are_whole = tensor.contiguous(), False
            copies.append(tensor)
            layer_stride, head_stride = tensor.stride()[:2]
        words += (tensor.data_ptr(), layer_stride, head_stride)
    found = _Description(type(states), states.dtype, states.device, tuple(words))
    if are_whole:
        _described[states] = found
    return found


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
