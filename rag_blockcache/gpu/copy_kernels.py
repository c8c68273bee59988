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

    A row of the table is an address to read, an address to write and a number of 32-bit words, as 64-bit
    integers; all of them are multiples of 16 bytes.
    """
    row = table + 3 * tl.program_id(1)
    source = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.int32)), 16)
    target = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.int32)), 16)
    num_words = tl.multiple_of(tl.load(row + 2), 4)
    step = tl.num_programs(0) * block_words
    for first in range(tl.program_id(0) * block_words, num_words, step):
        places = first + tl.arange(0, block_words)
        inside = places < num_words
        tl.store(target + places, tl.load(source + places, mask=inside), mask=inside)
