"""Anchors: one 48-byte window of every known text, by whose hash the text is found inside a prompt.

A hash narrows down where to look and decides nothing: whoever finds an anchor compares the text itself.
Chance or forged collisions therefore cost time, never a wrong match.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

WINDOW_BYTES = 48

Hashes = NDArray[np.int64]  # signed, as SQLite keeps them

_WORD_BYTES = 8
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)
_REGION = 24  # windows; of any 48 windows in a row, all those over one byte, some region is a part
_STRIDE = 10 * _REGION  # windows hashed at a time while an anchor is looked for
_MAX_RECENT = 8192
_MASKS = np.left_shift(1, np.arange(8)).astype(np.uint8)


def window_hashes(data: bytes) -> Hashes:
    """Hash every window of ``WINDOW_BYTES`` bytes.

    A window is read as six words. Each is added after the ones before it were mixed, so that all bytes
    reach all bits, which a polynomial modulo 2**64 denies to its low bits.

    Args:
        data: UTF-8 text; windows begin at every byte, inside characters too.

    Returns:
        One hash per window, ``(len(data) - 47,)``; empty if ``data`` is shorter than a window.
    """
    num_windows = len(data) - WINDOW_BYTES + 1
    if num_windows < 1:
        return np.empty(0, np.int64)
    words = np.empty(len(data) - _WORD_BYTES + 1, np.uint64)  # the word that begins at each byte
    for first in range(_WORD_BYTES):
        turn = words[first::_WORD_BYTES]
        turn[:] = np.frombuffer(data, "<u8", count=len(turn), offset=first)
    hashes = words[:num_windows].copy()
    for offset in range(_WORD_BYTES, WINDOW_BYTES, _WORD_BYTES):
        _mix(hashes)
        hashes += words[offset : offset + num_windows]
    _mix(hashes)
    hashes ^= hashes >> _HALF
    return hashes.view(np.int64)


def _mix(hashes: NDArray[np.uint64]) -> None:
    """Spread every bit over the word, in place and reversibly."""
    hashes ^= hashes >> _HALF
    hashes *= _MULTIPLIER


def candidate_anchors(text: bytes) -> Iterator[tuple[int, int]]:
    """Propose anchors for a text, the earliest first, as offset in bytes and hash.

    An early anchor finds a text that is cut at its end; but the first bytes are often a header that many
    texts share. So there is one proposal in every 24 windows, the smallest hash among them; whoever knows the
    other texts takes the first proposal that is free. Last come the windows at both ends, so that texts that
    differ in any one byte differ in a proposal.

    Args:
        text: At least ``WINDOW_BYTES`` long; from a shorter one comes nothing.
    """
    last = len(text) - WINDOW_BYTES
    for start in range(0, last + 1, _STRIDE):
        hashes = window_hashes(text[start : start + _STRIDE + WINDOW_BYTES - 1])
        for first in range(0, len(hashes), _REGION):
            offset = first + int(hashes[first : first + _REGION].argmin())
            yield start + offset, int(hashes[offset])
    for offset in {0, last} if last >= 0 else ():
        yield offset, int(window_hashes(text[offset : offset + WINDOW_BYTES])[0])


@dataclass(frozen=True)
class SortedHashes:
    """Hashes in order, and a coarse picture of them that rules out most others.

    Attributes:
        hashes: Sorted.
        bits: A bit for each value that the highest bits of a hash can have, set where ``hashes`` has one:
            at least eight times as many as hashes, few enough for a processor's cache.
    """

    hashes: Hashes = field(default_factory=lambda: np.empty(0, np.int64))
    bits: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(1, np.uint8))

    def with_added(self, hashes: Hashes) -> SortedHashes:
        """Return these hashes and more; arrays are copied, never changed."""
        fresh = np.sort(hashes)
        merged = np.insert(self.hashes, self.hashes.searchsorted(fresh), fresh)
        if len(merged) <= len(self.bits):
            return SortedHashes(merged, _with_set(self.bits, fresh))
        return SortedHashes(merged, _with_set(np.zeros(1 << len(merged).bit_length(), np.uint8), merged))

    def positions(self, hashes: Hashes) -> NDArray[np.intp]:
        """Return where in ``hashes`` there is one of these, ascending."""
        places, masks = _places(self.bits, hashes)
        possible = np.flatnonzero(self.bits[places] & masks)
        asked = hashes[possible]
        found = self.hashes.searchsorted(asked)
        return np.asarray(possible[self.hashes[np.minimum(found, len(self.hashes) - 1)] == asked])


@dataclass(frozen=True)
class AnchorSet:
    """Hashes of anchors, about 9 bytes each, to be asked for all windows of a prompt at once.

    It never changes, so readers need no lock: adding gives a new set, which shares the large arrays with the
    old one until 8,192 anchors have come together.

    Attributes:
        base: All but the latest.
        recent: The latest, at most 8,192.
    """

    base: SortedHashes = field(default_factory=SortedHashes)
    recent: SortedHashes = field(default_factory=SortedHashes)

    def __len__(self) -> int:
        return len(self.base.hashes) + len(self.recent.hashes)

    @property
    def num_bytes(self) -> int:
        """Memory that the arrays take."""
        return sum(part.hashes.nbytes + part.bits.nbytes for part in (self.base, self.recent))

    def with_added(self, hashes: Hashes) -> AnchorSet:
        """Return a set with more anchors; the cost is that of the recent ones, now and then of all."""
        if len(self.recent.hashes) + len(hashes) <= _MAX_RECENT:
            return AnchorSet(self.base, self.recent.with_added(hashes))
        return AnchorSet(self.base.with_added(np.concatenate([self.recent.hashes, hashes])))

    def positions(self, hashes: Hashes) -> NDArray[np.intp]:
        """Return where in ``hashes`` anchors stand, ascending."""
        return np.union1d(self.base.positions(hashes), self.recent.positions(hashes))


def _places(bits: NDArray[np.uint8], hashes: Hashes) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Return which byte of ``bits``, and which bit of it, stands for each hash."""
    num_low = 64 - (len(bits).bit_length() - 1 + 3)  # as many bits of a hash as do not count
    places = (hashes.view(np.uint64) >> np.uint64(num_low)).view(np.int64)
    return places >> 3, _MASKS[places & 7]


def _with_set(bits: NDArray[np.uint8], hashes: Hashes) -> NDArray[np.uint8]:
    bits = bits.copy()
    np.bitwise_or.at(bits, *_places(bits, hashes))
    return bits
