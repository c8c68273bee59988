"""int8 and int4 codecs of KV states: about a half and a quarter of the bytes, dequantized while placed.

Some channels of keys are far from zero in every token, so the tokens of one channel share a scale. Values
have no such channels; there the channels of one token do. They share it in groups of 64, of which the last
takes what is left over, so that fewer than 128 are one group. A change to any of this is a new
``FORMAT_VERSION`` in ``model``.

Source:
    KIVI, section 3, https://arxiv.org/abs/2402.02750; what was measured here: docs/decisions/0014
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.kv_states import BlockStates, KVStates, Shape, place_keys
from rag_blockcache.rotary import Angles

_GROUP = 64


@dataclass(frozen=True, eq=False)
class Int8States(BlockStates):
    """Keys and values as 8-bit integers: each is its code times the scale of its group.

    Attributes:
        key_scales: ``(num_layers, num_kv_heads, num_groups, head_dim)``, in the model's dtype.
        value_scales: ``(num_layers, num_kv_heads, num_tokens, num_groups)``, in the model's dtype.
        key_codes: ``(num_layers, num_kv_heads, num_tokens, head_dim)``, int8, from -127 to 127.
        value_codes: Same shape and dtype.
    """

    codec = "int8"
    key_scales: Tensor
    value_scales: Tensor
    key_codes: Tensor
    value_codes: Tensor

    @classmethod
    def pack(cls, states: KVStates) -> Int8States:
        """Quantize states."""
        key_scales, key_codes = _quantize_int8(states.keys, dim=2)
        value_scales, value_codes = _quantize_int8(states.values, dim=3)
        return cls(key_scales, value_scales, key_codes, value_codes)

    @classmethod
    def layout(cls, shape: Shape, dtype: torch.dtype) -> dict[str, tuple[Shape, torch.dtype]]:
        """Return shape and type of each tensor; see ``BlockStates.layout``."""
        *heads, num_tokens, head_dim = shape
        return {
            "key_scales": ((*heads, _num_groups(num_tokens), head_dim), dtype),
            "value_scales": ((*heads, num_tokens, _num_groups(head_dim)), dtype),
            "key_codes": (shape, torch.int8),
            "value_codes": (shape, torch.int8),
        }

    @property
    def shape(self) -> Shape:
        """``(num_layers, num_kv_heads, num_tokens, head_dim)``."""
        return tuple(self.key_codes.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the model, and of the scales."""
        return self.key_scales.dtype

    def prefix(self, num_tokens: int) -> Int8States:
        """Return the states of the first tokens, as views; the groups of keys stay as they were."""
        if num_tokens == self.num_tokens:
            return self
        return replace(
            self,
            value_scales=self.value_scales[:, :, :num_tokens],
            key_codes=self.key_codes[:, :, :num_tokens],
            value_codes=self.value_codes[:, :, :num_tokens],
        )

    def place(
        self, keys: Tensor, values: Tensor, angles: Angles | None = None, *, interleaved: bool = False
    ) -> None:
        """Dequantize, turn and write; see ``BlockStates.place``."""
        wide = self.key_codes.float()
        for group, tokens in _groups(self.shape[2], self.key_scales.shape[2]):
            wide[:, :, tokens].mul_(self.key_scales[:, :, group].float())
        place_keys(wide, keys, angles, interleaved=interleaved)
        wide = self.value_codes.float()
        for group, channels in _groups(self.shape[3], self.value_scales.shape[3]):
            wide[..., channels].mul_(self.value_scales[..., group].float())
        values.copy_(wide)


@dataclass(frozen=True, eq=False)
class Int4States(BlockStates):
    """Keys and values as 4-bit integers: each is its code times the scale of its group, plus the offset.

    The keys of the first token stay as they are: all tokens of a block attend to it, and its keys are unlike
    all others, so that they would widen the steps of the whole group.

    Attributes:
        key_scales: ``(num_layers, num_kv_heads, num_groups, head_dim)``, in the model's dtype.
        key_offsets: Same shape and dtype.
        first_keys: ``(num_layers, num_kv_heads, 1, head_dim)``, in the model's dtype.
        value_scales: ``(num_layers, num_kv_heads, num_tokens, num_groups)``, in the model's dtype.
        value_offsets: Same shape and dtype.
        codes: ``(num_layers, num_kv_heads, num_tokens, head_dim)``, uint8. The lower half of a byte is the
            code of a key, the upper half that of the value at the same place.
    """

    codec = "int4"
    key_scales: Tensor
    key_offsets: Tensor
    first_keys: Tensor
    value_scales: Tensor
    value_offsets: Tensor
    codes: Tensor

    @classmethod
    def pack(cls, states: KVStates) -> Int4States:
        """Quantize states."""
        second = min(1, states.num_tokens - 1)  # stands in for the first
        usual = torch.cat((states.keys[:, :, second : second + 1], states.keys[:, :, 1:]), dim=2)
        key_scales, key_offsets, key_codes = _quantize_int4(usual, dim=2)
        value_scales, value_offsets, value_codes = _quantize_int4(states.values, dim=3)
        return cls(
            key_scales,
            key_offsets,
            states.keys[:, :, :1].clone(),
            value_scales,
            value_offsets,
            key_codes | value_codes << 4,
        )

    @classmethod
    def layout(cls, shape: Shape, dtype: torch.dtype) -> dict[str, tuple[Shape, torch.dtype]]:
        """Return shape and type of each tensor; see ``BlockStates.layout``."""
        *heads, num_tokens, head_dim = shape
        of_keys = ((*heads, _num_groups(num_tokens), head_dim), dtype)
        of_values = ((*heads, num_tokens, _num_groups(head_dim)), dtype)
        return {
            "key_scales": of_keys,
            "key_offsets": of_keys,
            "first_keys": ((*heads, 1, head_dim), dtype),
            "value_scales": of_values,
            "value_offsets": of_values,
            "codes": (shape, torch.uint8),
        }

    @property
    def shape(self) -> Shape:
        """``(num_layers, num_kv_heads, num_tokens, head_dim)``."""
        return tuple(self.codes.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the model, of the scales and of the offsets."""
        return self.key_scales.dtype

    def prefix(self, num_tokens: int) -> Int4States:
        """Return the states of the first tokens, as views; the groups of keys stay as they were."""
        if num_tokens == self.num_tokens:
            return self
        return replace(
            self,
            value_scales=self.value_scales[:, :, :num_tokens],
            value_offsets=self.value_offsets[:, :, :num_tokens],
            codes=self.codes[:, :, :num_tokens],
        )

    def place(
        self, keys: Tensor, values: Tensor, angles: Angles | None = None, *, interleaved: bool = False
    ) -> None:
        """Dequantize, turn and write; see ``BlockStates.place``."""
        wide = (self.codes & 15).float()
        for group, tokens in _groups(self.shape[2], self.key_scales.shape[2]):
            offsets, scales = self.key_offsets[:, :, group].float(), self.key_scales[:, :, group].float()
            torch.addcmul(offsets, wide[:, :, tokens], scales, out=wide[:, :, tokens])
        wide[:, :, :1].copy_(self.first_keys)
        place_keys(wide, keys, angles, interleaved=interleaved)
        wide = (self.codes >> 4).float()
        for group, channels in _groups(self.shape[3], self.value_scales.shape[3]):
            # Not ``addcmul``, which is several times slower where two operands have one number a row.
            part = wide[..., channels].mul_(self.value_scales[..., group].float())
            part.add_(self.value_offsets[..., group].float())
        values.copy_(wide)


CODECS: dict[str, type[BlockStates]] = {form.codec: form for form in (KVStates, Int8States, Int4States)}


def codec_named(name: str) -> type[BlockStates]:
    """Return the form in which a codec keeps states.

    Raises:
        InvalidInputError: If there is no such codec.
    """
    if name not in CODECS:
        raise InvalidInputError(f"codec {name!r} is unknown; use one of {', '.join(CODECS)}")
    return CODECS[name]


def _quantize_int8(states: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return scales and codes of states that share a scale along a dimension."""
    scales, codes = [], []
    for part in _split(states, dim):
        wide = part.float()
        scales.append(_scales(wide.abs().amax(dim, keepdim=True) / 127, states.dtype))
        codes.append((wide / scales[-1].float()).round_().clamp_(-127, 127).to(torch.int8))
    return torch.cat(scales, dim), torch.cat(codes, dim)


def _quantize_int4(states: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return scales, offsets and codes of states that share a scale and an offset along a dimension."""
    scales, offsets, codes = [], [], []
    for part in _split(states, dim):
        wide = part.float()
        lowest = wide.amin(dim, keepdim=True)  # ``aminmax`` takes ten times as long as both of them
        scales.append(_scales((wide.amax(dim, keepdim=True) - lowest) / 15, states.dtype))
        offsets.append(lowest.to(states.dtype))
        steps = (wide - lowest).div_(scales[-1].float()).round_().clamp_(0, 15)
        codes.append(steps.to(torch.int8).view(torch.uint8))  # to uint8 at once takes longer
    return torch.cat(scales, dim), torch.cat(offsets, dim), torch.cat(codes, dim)


def _scales(steps: Tensor, dtype: torch.dtype) -> Tensor:
    """Return steps as scales to divide by, none of them smaller: what lies farthest out would be cut off.

    Where there is no step, and the only code is 0, it is 1.
    """
    scales = steps.to(dtype)
    above = torch.nextafter(scales, torch.full_like(scales, float("inf")))
    scales = torch.where(scales.float() < steps, above, scales)
    return scales.masked_fill_(scales == 0, 1)


def _num_groups(length: int) -> int:
    return max(1, length // _GROUP)


def _groups(length: int, num_groups: int) -> Iterator[tuple[slice, slice]]:
    """Yield each group as an index into scales, and as the tokens or channels that share it.

    Args:
        length: Tokens or channels; fewer than there were, where a block was cut.
        num_groups: Of the whole block.
    """
    for group in range(num_groups):
        start = group * _GROUP
        stop = length if group == num_groups - 1 else min(start + _GROUP, length)
        if start < stop:
            yield slice(group, group + 1), slice(start, stop)


def _split(states: Tensor, dim: int) -> list[Tensor]:
    """Cut states into their groups along a dimension."""
    length = states.shape[dim]
    groups = _groups(length, _num_groups(length))
    return [states.narrow(dim, members.start, members.stop - members.start) for _, members in groups]
