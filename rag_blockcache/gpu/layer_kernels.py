"""Triton kernels of ``fused_layers``: what a decoder layer does beside its attention, for few tokens.

Over few tokens a product reads its weights once and computes little. Products are split along what is summed,
so that all processors read, and leave their parts in float32, ``(num_splits, num_tokens, num_outputs)``; the
kernel that needs the sum adds them up on its way.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from rag_blockcache.gpu.attention_kernels import states_of


@triton.jit
def _sum_of_parts(parts, places, inside, part_size, num_parts: tl.constexpr):
    total = tl.load(parts + places, mask=inside, other=0.0)
    for part in tl.static_range(1, num_parts):
        total += tl.load(parts + part * part_size + places, mask=inside, other=0.0)
    return total


@triton.jit
def _tile(
    start, tokens, num_tokens, first_input, num_inputs, block_inputs: tl.constexpr, is_whole: tl.constexpr
):
    """Load rows of ``block_inputs`` numbers from ``first_input`` on; rows from ``num_tokens`` on are 0."""
    inputs = first_input + tl.arange(0, block_inputs)
    inside = (tokens < num_tokens)[:, None]
    if not is_whole:
        inside = inside & (inputs < num_inputs)[None, :]
    return tl.load(start + tokens[:, None] * num_inputs + inputs[None, :], mask=inside, other=0.0)


@triton.jit
def _weights(
    start,
    block_outputs: tl.constexpr,
    first_input,
    num_inputs,
    block_inputs: tl.constexpr,
    is_whole: tl.constexpr,
):
    outputs, inputs = tl.arange(0, block_outputs), first_input + tl.arange(0, block_inputs)
    places = outputs[:, None] * num_inputs + inputs[None, :]
    if is_whole:
        return tl.load(start + places)
    return tl.load(start + places, mask=(inputs < num_inputs)[None, :], other=0.0)


@triton.jit(do_not_specialize=["num_tokens"])
def linear_kernel(
    states,
    weight,
    second_weight,
    third_weight,
    parts,
    num_tokens,
    stop,
    second_stop,
    num_outputs,
    num_inputs,
    blocks_each,
    block_tokens: tl.constexpr,
    block_outputs: tl.constexpr,
    block_inputs: tl.constexpr,
    is_whole: tl.constexpr,
    precision: tl.constexpr,
):
    """Multiply tokens with one to three weights, whose outputs stand behind one another; one part of it.

    Outputs before ``stop`` are those of ``weight``, those before ``second_stop`` of ``second_weight``.
    """
    first, split = tl.program_id(0) * block_outputs, tl.program_id(1)
    if first < stop:
        start = weight + first.to(tl.int64) * num_inputs
    elif first < second_stop:
        start = second_weight + (first - stop).to(tl.int64) * num_inputs
    else:
        start = third_weight + (first - second_stop).to(tl.int64) * num_inputs
    tokens = tl.arange(0, block_tokens)
    total = tl.zeros([block_tokens, block_outputs], dtype=tl.float32)
    begin = split * blocks_each
    end = tl.minimum(begin + blocks_each, tl.cdiv(num_inputs, block_inputs))
    for block in range(begin, end):
        place = block * block_inputs
        weights = _weights(start, block_outputs, place, num_inputs, block_inputs, is_whole)
        tile = _tile(states, tokens, num_tokens, place, num_inputs, block_inputs, is_whole)
        total = tl.dot(tile, tl.trans(weights), total, input_precision=precision)
    outputs = first + tl.arange(0, block_outputs)
    places = (split * num_tokens + tokens)[:, None] * num_outputs + outputs[None, :]
    tl.store(parts + places, total, mask=(tokens < num_tokens)[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def gated_kernel(
    states,
    gate,
    up,
    output,
    num_tokens,
    num_outputs,
    num_inputs,
    block_tokens: tl.constexpr,
    block_outputs: tl.constexpr,
    block_inputs: tl.constexpr,
    is_whole: tl.constexpr,
    precision: tl.constexpr,
):
    """Multiply tokens with both weights of a gated layer: ``silu(gate) * up``."""
    first = tl.program_id(0) * block_outputs
    skipped = first.to(tl.int64) * num_inputs
    tokens = tl.arange(0, block_tokens)
    gates = tl.zeros([block_tokens, block_outputs], dtype=tl.float32)
    ups = tl.zeros([block_tokens, block_outputs], dtype=tl.float32)
    for block in range(tl.cdiv(num_inputs, block_inputs)):
        place = block * block_inputs
        of_gate = _weights(gate + skipped, block_outputs, place, num_inputs, block_inputs, is_whole)
        of_up = _weights(up + skipped, block_outputs, place, num_inputs, block_inputs, is_whole)
        tile = _tile(states, tokens, num_tokens, place, num_inputs, block_inputs, is_whole)
        gates = tl.dot(tile, tl.trans(of_gate), gates, input_precision=precision)
        ups = tl.dot(tile, tl.trans(of_up), ups, input_precision=precision)
    dtype: tl.constexpr = output.dtype.element_ty
    gates, ups = gates.to(dtype).to(tl.float32), ups.to(dtype).to(tl.float32)  # as two layers round them
    found = gates / (1.0 + tl.exp(-gates)) * ups
    outputs = first + tl.arange(0, block_outputs)
    places = tokens[:, None] * num_outputs + outputs[None, :]
    tl.store(output + places, found.to(dtype), mask=(tokens < num_tokens)[:, None])


@triton.jit
def norm_kernel(
    hidden,
    parts,
    weight,
    hidden_out,
    normed,
    width,
    part_size,
    eps,
    num_parts: tl.constexpr,
    block_width: tl.constexpr,
):
    """Add what a layer gave to one hidden state, and take the RMS norm of the sum."""
    dims = tl.arange(0, block_width)
    inside = dims < width
    places = tl.program_id(0) * width + dims
    dtype: tl.constexpr = hidden.dtype.element_ty
    state = tl.load(hidden + places, mask=inside, other=0.0).to(tl.float32)
    if num_parts > 0:
        given = _sum_of_parts(parts, places, inside, part_size, num_parts).to(dtype).to(tl.float32)
        state = (state + given).to(dtype).to(tl.float32)
        tl.store(hidden_out + places, state.to(dtype), mask=inside)
    spread = tl.rsqrt(tl.sum(state * state, 0) / width + eps)
    weights = tl.load(weight + dims, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + places, (state * spread * weights).to(dtype), mask=inside)


@triton.jit(do_not_specialize=["layer", "num_tokens"])
def turn_kernel(
    parts,
    query_bias,
    key_bias,
    value_bias,
    cos,
    sin,
    query,
    table,
    slots,
    layer,
    num_tokens,
    num_heads,
    num_kv_heads,
    num_parts: tl.constexpr,
    has_bias: tl.constexpr,
    head_dim: tl.constexpr,
    block_half: tl.constexpr,
):
    """Turn query or key of one head of one token to its position; keys and values go into their slot.

    Pairs are (0, half), (1, half + 1), …, and all dimensions are turned.
    """
    token, head = tl.program_id(0), tl.program_id(1)
    half: tl.constexpr = head_dim // 2
    width = (num_heads + 2 * num_kv_heads) * head_dim
    part_size = num_tokens * width
    dims = tl.arange(0, block_half)
    inside = dims < half
    dtype: tl.constexpr = query.dtype.element_ty
    places = token * width + head * head_dim + dims
    first = _sum_of_parts(parts, places, inside, part_size, num_parts)
    second = _sum_of_parts(parts, places + half, inside, part_size, num_parts)
    is_query, is_value = head < num_heads, head >= num_heads + num_kv_heads
    if has_bias:
        if is_query:
            bias = query_bias + head * head_dim
        elif is_value:
            bias = value_bias + (head - num_heads - num_kv_heads) * head_dim
        else:
            bias = key_bias + (head - num_heads) * head_dim
        first += tl.load(bias + dims, mask=inside, other=0.0).to(tl.float32)
        second += tl.load(bias + half + dims, mask=inside, other=0.0).to(tl.float32)
    first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
    if not is_value:
        angles = token * head_dim + dims
        cosines = tl.load(cos + angles, mask=inside, other=0.0).to(tl.float32)
        sines = tl.load(sin + angles, mask=inside, other=0.0).to(tl.float32)
        first, second = first * cosines - second * sines, second * cosines + first * sines
    if is_query:
        out = query + (token * num_heads + head) * head_dim
        tl.store(out + dims, first.to(dtype), mask=inside)
        tl.store(out + half + dims, second.to(dtype), mask=inside)
    else:
        slot = tl.load(slots + token)
        if slot >= 0:
            if is_value:
                into = states_of(table, layer, head - num_heads - num_kv_heads, 1, dtype)
            else:
                into = states_of(table, layer, head - num_heads, 0, dtype)
            tl.store(into + slot * head_dim + dims, first.to(dtype), mask=inside)
            tl.store(into + slot * head_dim + half + dims, second.to(dtype), mask=inside)
