"""Triton kernel of ``staging``: many tensors of the host to the device in one launch.

The device reads memory of the host where it lies. To ask for the copy of a small tensor takes the host longer
than the copy takes the bus.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]


@triton.jit
def copy_kernel(table, block_words: tl.constexpr):
    """Copy one tensor, together with the programs beside this one.

    A row of the table is an address to read, an address to write and a number of bytes, as 64-bit integers;
    the addresses are multiples of 16.
    """
    row = table + 3 * tl.program_id(1)
    source, target, num_bytes = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    num_words = num_bytes // 16 * 4
    words_in = tl.multiple_of(source.to(tl.pointer_type(tl.int32)), 16)
    words_out = tl.multiple_of(target.to(tl.pointer_type(tl.int32)), 16)
    step = tl.num_programs(0) * block_words
    for first in range(tl.program_id(0) * block_words, num_words, step):
        places = first + tl.arange(0, block_words)
        inside = places < tl.multiple_of(num_words, 4)
        tl.store(words_out + places, tl.load(words_in + places, mask=inside), mask=inside)
    if tl.program_id(0) == 0:
        rest = 4 * num_words + tl.arange(0, 16)
        inside = rest < num_bytes
        bytes_in, bytes_out = source.to(tl.pointer_type(tl.int8)), target.to(tl.pointer_type(tl.int8))
        tl.store(bytes_out + rest, tl.load(bytes_in + rest, mask=inside), mask=inside)
