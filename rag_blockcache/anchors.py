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
class AnchorSet:
    """Hashes of anchors, 8 bytes each, to be asked for all windows of a prompt at once.

    It never changes, so readers need no lock: adding gives a new set, which shares the large array with the
    old one until 8,192 anchors have come together.

    Attributes:
        base: All but the latest, sorted.
        recent: The latest, sorted; at most 8,192 in a set that grew by ``with_added``.
    """

    base: Hashes = field(default_factory=lambda: np.empty(0, np.int64))
    recent: Hashes = field(default_factory=lambda: np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self.base) + len(self.recent)

    @property
    def num_bytes(self) -> int:
        """Memory that the arrays take."""
        return self.base.nbytes + self.recent.nbytes

    def with_added(self, hashes: Hashes) -> AnchorSet:
        """Return a set with more anchors; the cost is that of the recent ones, now and then of all."""
        recent = np.sort(np.concatenate([self.recent, hashes]))
        if len(recent) <= _MAX_RECENT:
            return AnchorSet(self.base, recent)
        if not len(self.base):
            return AnchorSet(recent)
        return AnchorSet(np.insert(self.base, self.base.searchsorted(recent), recent))

    def positions(self, hashes: Hashes) -> NDArray[np.intp]:
        """Return where in ``hashes`` anchors stand, ascending."""
        order = hashes.argsort()  # neighbours in order are neighbours in memory: many times faster to look up
        ordered = hashes[order]
        return np.sort(order[_are_in(self.base, ordered) | _are_in(self.recent, ordered)])


def _are_in(known: Hashes, hashes: Hashes) -> NDArray[np.bool_]:
    if not len(known):
        return np.zeros(len(hashes), np.bool_)
    places = known.searchsorted(hashes)
    np.minimum(places, len(known) - 1, out=places)
    return np.asarray(known[places] == hashes)
