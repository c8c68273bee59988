"""Which example comes next: an endless order over all files, the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Draw:
    """One turn of one example.

    Attributes:
        file: Index of its file.
        example: Index in the file.
        number: How many draws came before; seeds what is random about the sample.
    """

    file: int
    example: int
    number: int


def draws(sizes: Sequence[int], *, balance: float, seed: int) -> Iterator[Draw]:
    """Draw examples without end; within a file, each comes once before any comes again.

    Args:
        sizes: Number of examples of each file.
        balance: A file is drawn from in proportion to its size to this power. Below 1, small files are
            read through more often, so that what they teach is not drowned.
        seed: Equal seeds give equal orders.
    """
    choice = random.Random(f"{seed} files")
    weights = [size**balance for size in sizes]
    turns = [_shuffled_again(size, random.Random(f"{seed} file {file}")) for file, size in enumerate(sizes)]
    number = 0
    while True:
        [file] = choice.choices(range(len(sizes)), weights)
        yield Draw(file, next(turns[file]), number)
        number += 1


def _shuffled_again(size: int, source: random.Random) -> Iterator[int]:
    while True:
        yield from source.sample(range(size), size)
