"""Triton kernel of ``placing``: stored states of many blocks into a context, in one launch.

A row of the table describes a block, as 64-bit integers: its number of tokens, the slot of the first, the
position of the first, the number of groups that its keys were quantized in; then for each tensor of its form
its address and the distances between layers and between heads, in elements.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from rag_blockcache.gpu.descriptions import HEADER

_HEADER = tl.constexpr(HEADER)
EXACT, INT8, INT4 = 0, 1, 2
_INT8, _INT4 = tl.constexpr(INT8), tl.constexpr(INT4)


@triton.jit
def _part(row, index: tl.constexpr, layer, head, dtype: tl.constexpr, is_aligned: tl.constexpr):
    """Return the address of one tensor of a block, at a layer and a head."""
    entry = row + _HEADER + 3 * index
    base = tl.load(entry).to(tl.pointer_type(dtype))
    layer_stride, head_stride = tl.load(entry + 1), tl.load(entry + 2)
    if is_aligned:  # loaded numbers are not known to be, and unaligned loads are narrow ones
        base, layer_stride = tl.multiple_of(base, 16), tl.multiple_of(layer_stride, 16)
        head_stride = tl.multiple_of(head_stride, 16)
    return base + layer * layer_stride + head * head_stride


@triton.jit
def _load_keys(
    row, layer, head, tokens, dims, inside, num_groups,
    form: tl.constexpr, head_dim: tl.constexpr, dtype: tl.constexpr, is_aligned: tl.constexpr,
):  # fmt: skip
    """Return keys of some tokens at some dimensions, dequantized, in float32."""
    places = tokens[:, None] * head_dim + dims[None, :]
    if form == _INT8:
        codes = tl.load(_part(row, 2, layer, head, tl.int8, is_aligned) + places, mask=inside, other=0)
    elif form == _INT4:
        codes = tl.load(_part(row, 5, layer, head, tl.uint8, is_aligned) + places, mask=inside, other=0) & 15
    else:
        codes = tl.load(_part(row, 0, layer, head, dtype, is_aligned) + places, mask=inside, other=0.0)
    wide = codes.to(tl.float32)
    if form != 0:
        groups = tl.minimum(tokens // 64, num_groups - 1)
        of_group = groups[:, None] * head_dim + dims[None, :]
        wide *= tl.load(_part(row, 0, layer, head, dtype, is_aligned) + of_group, mask=inside, other=0.0).to(
            tl.float32
        )
        if form == _INT4:
            offsets = tl.load(
                _part(row, 1, layer, head, dtype, is_aligned) + of_group, mask=inside, other=0.0
            )
            wide += offsets.to(tl.float32)
            is_first = inside & (tokens == 0)[:, None]
            first = tl.load(_part(row, 2, layer, head, dtype, is_aligned) + places, mask=is_first, other=0.0)
            wide = tl.where(is_first, first.to(tl.float32), wide)
    return wide


@triton.jit
def _load_values(
    row, layer, head, tokens, dims, inside,
    form: tl.constexpr, head_dim: tl.constexpr, num_value_groups: tl.constexpr, dtype: tl.constexpr,
    is_aligned: tl.constexpr,
):  # fmt: skip
    """Return values of some tokens at some dimensions, dequantized, in the dtype of the context."""
    places = tokens[:, None] * head_dim + dims[None, :]
    of_group = tokens[:, None] * num_value_groups + tl.minimum(dims // 64, num_value_groups - 1)[None, :]
    if form == _INT8:
        codes = tl.load(_part(row, 3, layer, head, tl.int8, is_aligned) + places, mask=inside, other=0)
        scales = tl.load(_part(row, 1, layer, head, dtype, False) + of_group, mask=inside, other=0.0)
        found = codes.to(tl.float32) * scales.to(tl.float32)
    elif form == _INT4:
        codes = tl.load(_part(row, 5, layer, head, tl.uint8, is_aligned) + places, mask=inside, other=0) >> 4
        scales = tl.load(_part(row, 3, layer, head, dtype, False) + of_group, mask=inside, other=0.0)
        offsets = tl.load(_part(row, 4, layer, head, dtype, False) + of_group, mask=inside, other=0.0)
        found = codes.to(tl.float32) * scales.to(tl.float32) + offsets.to(tl.float32)
    else:
        found = tl.load(_part(row, 1, layer, head, dtype, is_aligned) + places, mask=inside, other=0.0)
    return found.to(dtype)


@triton.jit
def place_kernel(
    table,
    keys,
    values,
    layer_stride,
    head_stride,
    cos,
    sin,
    row_words: tl.constexpr,
    form: tl.constexpr,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_dim: tl.constexpr,
    num_value_groups: tl.constexpr,
    num_pairs: tl.constexpr,
    block_pairs: tl.constexpr,
    is_interleaved: tl.constexpr,
    is_aligned: tl.constexpr,
    block_tokens: tl.constexpr,
):
    """Place some tokens of one layer of one block; the first ``num_pairs`` pairs of keys are turned."""
    row = table + tl.program_id(1) * row_words
    num_tokens = tl.load(row)
    first_token = tl.program_id(0) * block_tokens
    if first_token < num_tokens:
        tokens = first_token + tl.arange(0, block_tokens)
        layer = tl.program_id(2).to(tl.int64)
        num_groups = tl.load(row + 3)
        dtype: tl.constexpr = keys.dtype.element_ty
        is_token = (tokens < num_tokens)[:, None]
        places = (tl.load(row + 1) + tokens)[:, None] * head_dim
        dims = tl.arange(0, block_dim)
        inside = is_token & (dims < head_dim)[None, :]
        still = inside & (dims >= 2 * num_pairs)[None, :]
        pairs = tl.arange(0, block_pairs)
        if is_interleaved:
            first_dims, second_dims = 2 * pairs, 2 * pairs + 1
        else:
            first_dims, second_dims = pairs, pairs + num_pairs
        turned = is_token & (pairs < num_pairs)[None, :]
        angles = (tl.load(row + 2) + tokens)[:, None] * num_pairs + pairs[None, :]
        if num_pairs > 0:  # the angles of all heads are the same
            cosines = tl.load(cos + angles, mask=turned, other=0.0)
            sines = tl.load(sin + angles, mask=turned, other=0.0)
        for index in range(num_heads):
            head = tl.cast(index, tl.int64)
            out = layer * layer_stride + head * head_stride
            whole = _load_values(
                row, layer, head, tokens, dims, inside, form, head_dim, num_value_groups, dtype, is_aligned
            )
            tl.store(values + out + places + dims[None, :], whole, mask=inside)
            if 2 * num_pairs < head_dim:  # what carries no position
                rest = _load_keys(
                    row, layer, head, tokens, dims, still, num_groups, form, head_dim, dtype, is_aligned
                )
                tl.store(keys + out + places + dims[None, :], rest.to(dtype), mask=still)
            if num_pairs > 0:
                first = _load_keys(
                    row, layer, head, tokens, first_dims, turned, num_groups,
                    form, head_dim, dtype, is_aligned,
                )  # fmt: skip
                second = _load_keys(
                    row, layer, head, tokens, second_dims, turned, num_groups,
                    form, head_dim, dtype, is_aligned,
                )  # fmt: skip
                one, other = first * cosines - second * sines, second * cosines + first * sines
                tl.store(keys + out + places + first_dims[None, :], one.to(dtype), mask=turned)
                tl.store(keys + out + places + second_dims[None, :], other.to(dtype), mask=turned)
