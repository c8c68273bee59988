"""What a model wrote, parted into text and calls of tools: at once, or as it comes."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rag_blockcache.tool_calls import READERS, Found, ToolCall, Unfinished, read_bare, schemas_of

_BARE = re.compile(r"[\s;,]*(?P<opener>[{\[])")
_BETWEEN = re.compile(r"[\s;,]*")


def parse_tool_calls(
    text: str, tools: Sequence[Mapping[str, Any]], *, special_tokens: Collection[str] = ()
) -> tuple[str, list[ToolCall]]:
    """Part what a model wrote into text and calls.

    Args:
        text: Decoded with special tokens, because some models mark calls by them.
        tools: Those the model knows. Where a call is marked by nothing but JSON, only calls of these count.
        special_tokens: Left out of the text that is returned; give all that the tokenizer has.

    Returns:
        What is left of the text, without white space around calls, and the calls. What is malformed is text.

    Example:
        >>> written = 'Wait. <tool_call>{"name": "look_up", "arguments": {"word": "mill"}}</tool_call></s>'
        >>> text, calls = parse_tool_calls(written, [], special_tokens=["</s>"])
        >>> text, calls[0].name, calls[0].arguments
        ('Wait.', 'look_up', {'word': 'mill'})
    """
    reader = ToolCallReader(tools, special_tokens=special_tokens)
    return reader.read(text) + reader.close(), reader.calls


def text_without_calls(
    pieces: Iterable[str], tools: Sequence[Mapping[str, Any]], *, special_tokens: Collection[str] = ()
) -> Iterator[str]:
    """Pass pieces of text on, but hold back what may begin a call; put together, as ``parse_tool_calls``."""
    reader = ToolCallReader(tools, special_tokens=special_tokens)
    for piece in pieces:
        if text := reader.read(piece):
            yield text
    if text := reader.close():
        yield text


class ToolCallReader:
    """Reads pieces of text as they come; see ``parse_tool_calls``.

    Attributes:
        calls: Found so far.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]], *, special_tokens: Collection[str] = ()) -> None:
        self._tools = schemas_of(tools)
        self._special = {token for token in special_tokens if token}
        self._marks = sorted(self._special | set(READERS), key=len, reverse=True)
        self._opener = re.compile(f"(?P<opener>{'|'.join(map(re.escape, self._marks))})")
        self.calls: list[ToolCall] = []
        self._rest = ""  # not decided yet
        self._space = ""  # shown as soon as text comes behind it
        self._has_text = self._is_behind_call = False

    def read(self, piece: str) -> str:
        """Take a piece, and return the text that is certain now."""
        self._rest += piece
        return self._read(is_all=False)

    def close(self) -> str:
        """Return the text that was held back, now that no more comes."""
        shown = self._read(is_all=True)
        return shown if self._is_behind_call else shown + self._space

    def _read(self, is_all: bool) -> str:
        shown = ""
        while opener := self._next_opener():
            shown += self._take(opener.start())
            start, end = opener.start("opener") - opener.start(), opener.end() - opener.start()
            try:
                found = self._found(opener["opener"], self._rest[start:])
            except Unfinished as unfinished:
                if not is_all:
                    return shown
                found = unfinished.otherwise
            if found is not None:
                self._take_calls(found, start)
            elif opener["opener"] in self._special:
                self._rest = self._rest[end:]
            else:
                shown += self._take(end)
        return shown + self._take(len(self._rest) - (0 if is_all else self._num_held()))

    def _next_opener(self) -> re.Match[str] | None:
        """Return where a call may begin; one with nothing around it, only behind nothing but calls."""
        marked = self._opener.search(self._rest)
        bare = None if self._has_text else _BARE.match(self._rest)
        return marked if bare is None or (marked and marked.start() == bare.start("opener")) else bare

    def _found(self, opener: str, text: str) -> Found | None:
        if opener in READERS:
            return READERS[opener](text, self._tools)
        if opener in self._special:
            return None
        if any(mark.startswith(text) for mark in self._marks):
            raise Unfinished
        return read_bare(text, self._tools)

    def _take(self, length: int) -> str:
        """Take text off the rest; white space at its end waits until it is known not to precede a call."""
        text, self._rest = self._rest[:length], self._rest[length:]
        text = text.lstrip() if self._is_behind_call else text
        if not text.strip():
            self._space += text
            return ""
        shown, self._space = self._space + text.rstrip(), text[len(text.rstrip()) :]
        self._has_text, self._is_behind_call = True, False
        return shown

    def _take_calls(self, found: Found, start: int) -> None:
        calls, length = found
        self.calls += calls
        self._rest = self._rest[start + length :]
        self._space = (self._space or "\n") if self._has_text else ""
        self._is_behind_call = True

    def _num_held(self) -> int:
        """Return how many characters at the end may be the beginning of something else than text."""
        rest = self._rest
        if not self._has_text and _BETWEEN.fullmatch(rest):
            return len(rest)
        longest = min(len(self._marks[0]) - 1, len(rest))
        lengths = (
            n for n in range(longest, 0, -1) if any(mark.startswith(rest[-n:]) for mark in self._marks)
        )
        return next(lengths, 0)
