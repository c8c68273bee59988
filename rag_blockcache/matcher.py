"""Finds known passages inside any prompt, by their text alone."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rag_blockcache.anchors import WINDOW_BYTES, window_hashes
from rag_blockcache.errors import InvalidInputError
from rag_blockcache.passage_registry import PassageRegistry, normalised

_MAX_CANDIDATES = 100_000  # compared per prompt: bounds the time that a malicious one can take


@dataclass(frozen=True)
class Match:
    """A passage in a prompt.

    Attributes:
        start: Where it begins in the prompt, in characters.
        stop: Where it ends.
        text: The whole passage, without white space around it.
        is_prefix: Whether only the first ``stop - start`` characters of it are there.
    """

    start: int
    stop: int
    text: str
    is_prefix: bool


@dataclass(frozen=True)
class _Span:
    """Bytes of a prompt that hold a text, or the beginning of one."""

    start: int
    stop: int
    text: bytes


class Matcher:
    """Finds the passages of a registry, and those hinted at, in prompts; threads may share it.

    A passage is found wherever its text stands, however often, whatever stands around it. What overlaps is
    settled from left to right: the leftmost match wins, and among those that begin together the longest.
    Passages that are there in part, cut at their end, are matched in what whole ones leave free.

    Args:
        registry: Texts to look for.
        min_prefix_bytes: A passage that is cut counts from this length on, in UTF-8. One whose first bytes
            are a header that others share is found if enough of what follows is left.

    Raises:
        InvalidInputError: If ``min_prefix_bytes`` is shorter than 48.

    Example:
        >>> import tempfile
        >>> note = "The analytical engine has no pretensions to originate anything."
        >>> with PassageRegistry(tempfile.mkdtemp()) as registry:
        ...     _ = registry.add([note])
        ...     [match] = Matcher(registry).find(f"Context: {note} Who wrote that?")
        >>> match.start, match.stop, match.is_prefix
        (9, 72, False)
    """

    def __init__(self, registry: PassageRegistry, *, min_prefix_bytes: int = 192) -> None:
        if min_prefix_bytes < WINDOW_BYTES:
            raise InvalidInputError(
                f"min_prefix_bytes is {min_prefix_bytes}, and nothing below {WINDOW_BYTES} can be found; "
                f"pass {WINDOW_BYTES} or more"
            )
        self._registry = registry
        self._min_prefix_bytes = min_prefix_bytes

    def find(self, prompt: str, hints: Sequence[str] = ()) -> list[Match]:
        """Find passages in a prompt.

        Args:
            prompt: Any text: a rendered prompt, or one message of a chat.
            hints: Texts that are said to be in the prompt, registered or not, such as those a retriever just
                returned; empty for none. One below 48 bytes counts only where it fills whole lines.

        Returns:
            The matches from left to right, none overlapping.

        Raises:
            InvalidInputError: If a single string came in place of a sequence of hints.
        """
        if isinstance(hints, str):
            raise InvalidInputError("hints must be a sequence of strings; wrap a single hint in a list")
        data = prompt.encode("utf-8", "surrogatepass")
        candidates = itertools.chain(self._hinted(data, hints), self._known(data))
        ordered = sorted(
            itertools.islice(candidates, _MAX_CANDIDATES), key=lambda found: (found[0], -len(found[1]))
        )
        whole = list(_whole(data, ordered))
        cut = self._cut(data, ordered, whole)
        return _in_characters(data, sorted([*whole, *cut], key=lambda span: span.start))

    def _known(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield where registered texts may begin, by their anchors; below 0 if one lost its head."""
        hashes = window_hashes(data)
        positions = self._registry.anchors.positions(hashes)
        anchors = hashes[positions].tolist()
        texts = self._registry.texts_of(set(anchors)) if anchors else {}
        for position, anchor in zip(positions.tolist(), anchors, strict=True):
            for known in texts.get(anchor, ()):
                yield position - known.anchor_offset, known.text

    def _hinted(self, data: bytes, hints: Iterable[str]) -> Iterator[tuple[int, bytes]]:
        """Yield where hints, or long beginnings of them, stand."""
        for hint in {normalised(hint) for hint in hints}:
            places = _occurrences(data, hint[: self._min_prefix_bytes]) if hint else ()
            for start in places:
                if len(hint) >= WINDOW_BYTES or _fills_lines(data, start, start + len(hint)):
                    yield start, hint

    def _cut(
        self, data: bytes, candidates: Iterable[tuple[int, bytes]], whole: Sequence[_Span]
    ) -> Iterator[_Span]:
        """Yield beginnings of texts, where whole ones leave room, from left to right, none overlapping."""
        free = 0
        for start, together in itertools.groupby(candidates, key=lambda found: found[0]):
            end = _end_of_gap(data, whole, start)
            if start < free or end - start < self._min_prefix_bytes:
                continue
            room = data[start:end]
            begun = [text for _, text in together if room.startswith(text[: self._min_prefix_bytes])]
            length, text = max(((_common_length(room, text), text) for text in begun), default=(0, b""))
            if length >= self._min_prefix_bytes:
                free = start + length
                yield _Span(start, free, text)


def _occurrences(data: bytes, text: bytes) -> Iterator[int]:
    start = data.find(text)
    while start >= 0:
        yield start
        start = data.find(text, start + 1)


def _fills_lines(data: bytes, start: int, stop: int) -> bool:
    return (not start or data[start - 1] in b"\r\n") and (stop == len(data) or data[stop] in b"\r\n")


def _whole(data: bytes, candidates: Iterable[tuple[int, bytes]]) -> Iterator[_Span]:
    """Yield texts that are there in full, from left to right, none overlapping."""
    free = 0
    for start, text in candidates:
        if start >= free and data.startswith(text, start):
            free = start + len(text)
            yield _Span(start, free, text)


def _common_length(one: bytes, other: bytes) -> int:
    """Return how many bytes, in whole characters, two texts have in common at their start."""
    length = min(len(one), len(other))
    differs = np.frombuffer(one, np.uint8, length) != np.frombuffer(other, np.uint8, length)
    length = int(differs.argmax()) if differs.any() else length
    while length < len(other) and _is_inside_character(other[length]):
        length -= 1
    return length


def _is_inside_character(byte: int) -> bool:
    return byte & 0xC0 == 0x80


def _end_of_gap(data: bytes, spans: Sequence[_Span], start: int) -> int:
    """Return where the free run of bytes that holds ``start`` ends; ``start`` itself if it is taken."""
    place = bisect.bisect_right(spans, start, key=lambda span: span.start)
    if place and spans[place - 1].stop > start:
        return start
    return spans[place].start if place < len(spans) else len(data)


def _in_characters(data: bytes, spans: Sequence[_Span]) -> list[Match]:
    """Turn spans of bytes into matches in characters."""
    is_first_byte = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80
    num_characters = np.concatenate([[0], np.cumsum(is_first_byte)])  # before each byte
    return [
        Match(
            start=int(num_characters[span.start]),
            stop=int(num_characters[span.stop]),
            text=span.text.decode("utf-8", "surrogatepass"),
            is_prefix=span.stop - span.start < len(span.text),
        )
        for span in spans
    ]
