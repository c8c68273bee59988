"""Values as people type them: sizes, shards, how much to prefill."""

from __future__ import annotations

import re
from typing import Literal

import typer

_UNIT_BYTES: dict[str, int] = {
    "": 1,
    "B": 1,
    **{prefix + end: int(1000**power) for power, prefix in enumerate("KMGTP", 1) for end in ("", "B")},
    **{prefix + "IB": int(1024**power) for power, prefix in enumerate("KMGTP", 1)},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*")
_SHARD = re.compile(r"(\d+)/(\d+)")


def parse_size(text: str) -> int:
    """Read a number of bytes: ``20GB`` and ``20G`` are 20e9, ``20GiB`` is 20 * 2**30, ``1024`` is 1,024.

    Raises:
        typer.BadParameter: If it is no size, or less than one byte.
    """
    match = _SIZE.fullmatch(text)
    unit_bytes = _UNIT_BYTES.get(match[2].upper()) if match else None
    if match is None or unit_bytes is None:
        raise typer.BadParameter(
            f"{text!r} is no size; write a number and a unit, such as 20GB, 512MB or 1.5TiB"
        )
    num_bytes = round(float(match[1]) * unit_bytes)
    if num_bytes < 1:
        raise typer.BadParameter(f"{text!r} is less than one byte; give a larger size, or none")
    return num_bytes


def parse_prefill(text: str) -> Literal["all", "none"] | int:
    """Read how many passages to prefill: ``all``, ``none`` or a number.

    Raises:
        typer.BadParameter: If it is none of these.
    """
    word = text.strip().lower()
    if word == "all":
        return "all"
    if word == "none":
        return "none"
    if word.isdecimal() and int(word) > 0:
        return int(word)
    raise typer.BadParameter(f"{text!r} is not understood; write all, none, or a number of passages from 1")


def parse_shard(text: str) -> tuple[int, int]:
    """Read ``i/n``, this worker's number (from 1) and the number of workers.

    Raises:
        typer.BadParameter: If it is not of that form, or ``i`` is not in 1 to ``n``.
    """
    match = _SHARD.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is no shard; write i/n, such as 1/4 for the first of four")
    shard, num_shards = int(match[1]), int(match[2])
    if not 1 <= shard <= num_shards:
        raise typer.BadParameter(f"{text!r} names no shard; i runs from 1 to n, so write 1/{num_shards}, say")
    return shard, num_shards


def parse_lengths(text: str) -> tuple[int, ...]:
    """Read lengths in tokens, separated by commas: ``512,1024,8000``.

    Raises:
        typer.BadParameter: If one of them is no number from 1.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise typer.BadParameter(f"{text!r} are no lengths; write numbers with commas, such as 512,2048,8000")
    return tuple(int(word) for word in words)
