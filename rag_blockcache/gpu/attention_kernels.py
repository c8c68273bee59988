"""Triton kernels of ``attention``: computed states into a context, and attention from its slots.

Where a context lies is read from a table on the device, so that a captured launch serves any context of any
length. A table of addresses holds, as 64-bit integers, the distance between key-value heads in elements and
then, for each layer, the address of its keys and that of its values; slots of one head stand one behind the
other.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]


@triton.jit
def states_of(table, layer, kv_head, which: tl.constexpr, dtype: tl.constexpr):
    """Return the address of the first slot of a head: of its keys (0) or values (1)."""
    base = tl.load(table + 1 + 2 * layer + which).to(tl.pointer_type(dtype))
    # A loaded address is not known to be aligned, and unaligned loads are narrow ones.
    return tl.multiple_of(base, 16) + kv_head * tl.multiple_of(tl.load(table), 16)


@triton.jit(do_not_specialize=["layer", "num_queries"])
def write_kernel(
    keys,
    values,
    key_head_stride,
    key_token_stride,
    value_head_stride,
    value_token_stride,
    table,
    slots,
    layer,
    num_queries,
    head_dim: tl.constexpr,
    block_dim: tl.constexpr,
):
    """Write the states of one token of one head into its slot; a slot below 0 is that of no token."""
    token, kv_head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + token)
    if slot >= 0:
        dims = tl.arange(0, block_dim)
        inside = dims < head_dim
        dtype: tl.constexpr = keys.dtype.element_ty
        key = tl.load(keys + kv_head * key_head_stride + token * key_token_stride + dims, mask=inside)
        value = tl.load(values + kv_head * value_head_stride + token * value_token_stride + dims, mask=inside)
        tl.store(states_of(table, layer, kv_head, 0, dtype) + slot * head_dim + dims, key, mask=inside)
        tl.store(states_of(table, layer, kv_head, 1, dtype) + slot * head_dim + dims, value, mask=inside)


@triton.jit
def _attend_to(
    query, row_slots, keys, values, start, stop, total, highest, output, scale,
    is_masked: tl.constexpr, head_dim: tl.constexpr, block_dim: tl.constexpr, block_slots: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """Go on with a softmax over the slots from ``start`` to before ``stop``.

    ``highest`` is each row's largest product so far, ``total`` its sum of powers of two below that, and
    ``output`` the sum of values with those weights.
    """
    dims = tl.arange(0, block_dim)
    for first in range(start, stop, block_slots):
        slots = first + tl.arange(0, block_slots)
        places = slots[:, None] * head_dim + dims[None, :]
        inside = (slots < stop)[:, None] & (dims < head_dim)[None, :]
        if is_masked or head_dim != block_dim:
            key = tl.load(keys + places, mask=inside, other=0.0)
        else:
            key = tl.load(keys + places)
        products = tl.dot(query, tl.trans(key), input_precision=precision) * scale
        if is_masked:
            seen = (slots[None, :] <= row_slots[:, None]) & (slots < stop)[None, :]
            products = tl.where(seen, products, float("-inf"))
        now = tl.maximum(highest, tl.max(products, 1))
        # A row that has seen nothing yet has no largest product; any finite number keeps it free of NaN.
        level = tl.where(now == float("-inf"), 0.0, now)
        weights = tl.exp2(products - level[:, None])
        shrink = tl.exp2(highest - level)
        total = total * shrink + tl.sum(weights, 1)
        if is_masked or head_dim != block_dim:
            value = tl.load(values + places, mask=inside, other=0.0)
        else:
            value = tl.load(values + places)
        output = output * shrink[:, None]
        output = tl.dot(weights.to(value.dtype), value, output, input_precision=precision)
        highest = now
    return total, highest, output


@triton.jit(do_not_specialize=["layer", "num_queries"])
def attend_kernel(
    query,
    query_head_stride,
    query_token_stride,
    table,
    slots,
    partial_outputs,
    partial_sums,
    scale,
    layer,
    num_queries,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    block_dim: tl.constexpr,
    block_rows: tl.constexpr,
    block_slots: tl.constexpr,
    precision: tl.constexpr,
):
    """Attend from some rows of one key-value head to one split of the slots that they see.

    A row is one query head of one token; those of a token stand together, so that rows ascend as slots do.
    """
    split, kv_head, num_splits = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    dims = tl.arange(0, block_dim)
    tokens, heads = rows // group, kv_head * group + rows % group
    is_row = tokens < num_queries
    row_slots = tl.load(slots + tokens, mask=is_row, other=-1).to(tl.int32)
    inside = is_row[:, None] & (dims < head_dim)[None, :]
    places = heads[:, None] * query_head_stride + tokens[:, None] * query_token_stride + dims[None, :]
    rows_query = tl.load(query + places, mask=inside, other=0.0)

    end = tl.max(row_slots, 0) + 1
    # Slots before this one are seen by all rows, those apart that stand for no token.
    lowest = tl.min(tl.where(row_slots < 0, 2147483647, row_slots), 0)
    each = tl.cdiv(tl.cdiv(end, num_splits), block_slots) * block_slots
    start = split * each
    stop = tl.minimum(start + each, end)
    whole = tl.maximum(tl.minimum(stop, lowest) - start, 0) // block_slots * block_slots

    dtype: tl.constexpr = query.dtype.element_ty
    keys = states_of(table, layer, kv_head, 0, dtype)
    values = states_of(table, layer, kv_head, 1, dtype)
    total = tl.zeros([block_rows], dtype=tl.float32)
    highest = tl.full([block_rows], float("-inf"), dtype=tl.float32)
    output = tl.zeros([block_rows, block_dim], dtype=tl.float32)
    total, highest, output = _attend_to(
        rows_query, row_slots, keys, values, start, start + whole, total, highest, output, scale,
        False, head_dim, block_dim, block_slots, precision,
    )  # fmt: skip
    total, highest, output = _attend_to(
        rows_query, row_slots, keys, values, start + whole, stop, total, highest, output, scale,
        True, head_dim, block_dim, block_slots, precision,
    )  # fmt: skip

    # Splits of one row stand behind one another: (num_queries, num_heads, num_splits, ...).
    num_heads = tl.num_programs(2) * group
    places = (tokens.to(tl.int64) * num_heads + heads) * num_splits + split
    tl.store(partial_outputs + places[:, None] * head_dim + dims[None, :], output, mask=inside)
    tl.store(partial_sums + 2 * places, highest, mask=is_row)
    tl.store(partial_sums + 2 * places + 1, total, mask=is_row)


@triton.jit
def combine_kernel(
    partial_outputs,
    partial_sums,
    output,
    num_splits: tl.constexpr,
    block_splits: tl.constexpr,
    head_dim: tl.constexpr,
    block_dim: tl.constexpr,
):
    """Put the splits of one row together; a row that sees nothing becomes 0."""
    row = tl.program_id(0).to(tl.int64)
    splits, dims = tl.arange(0, block_splits), tl.arange(0, block_dim)
    inside = (splits < num_splits)[:, None] & (dims < head_dim)[None, :]
    places = row * num_splits + splits
    highest = tl.load(partial_sums + 2 * places, mask=splits < num_splits, other=float("-inf"))
    totals = tl.load(partial_sums + 2 * places + 1, mask=splits < num_splits, other=0.0)
    outputs = tl.load(partial_outputs + places[:, None] * head_dim + dims[None, :], mask=inside, other=0.0)
    level = tl.max(highest, 0)
    weights = tl.exp2(highest - tl.where(level == float("-inf"), 0.0, level))
    total = tl.sum(weights * totals, 0)
    whole = tl.sum(outputs * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(output + row * head_dim + dims, whole.to(output.dtype.element_ty), mask=dims < head_dim)
