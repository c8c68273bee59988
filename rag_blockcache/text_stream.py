"""Tokens to text, piece by piece, with stop strings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rag_blockcache.model import Model

_OVERLAP = 16  # tokens that are decoded again with those behind them, so that spaces between them are right


def text_pieces(
    model: Model, tokens: Iterator[int], stop_strings: Sequence[str] = (), *, special: bool = False
) -> Iterator[str]:
    """Turn a stream of tokens into a stream of text, with special tokens on demand.

    A piece is held back while it ends within a character of several tokens, or may begin a stop string; text
    from a stop string on is dropped. Only the last tokens are decoded again for each new one.
    """
    window: list[int] = []
    num_before = num_sent = 0  # characters: in front of the window, and sent
    for token in tokens:
        window.append(token)
        text = model.text(window, special=special)
        unsent = cut_at_stop(text[num_sent - num_before :], stop_strings)
        safe = len(unsent) - _held_back(unsent, stop_strings)
        if safe > 0 and not unsent.endswith("\ufffd"):
            yield unsent[:safe]
            num_sent += safe
        if len(window) >= 2 * _OVERLAP and not text.endswith("\ufffd"):
            rest = model.text(window[-_OVERLAP:], special=special)
            num_left = len(text) - len(rest)
            if text.endswith(rest) and num_before + num_left <= num_sent:
                num_before += num_left
                del window[:-_OVERLAP]
    text = whole_text(model, window, special=special)
    if last := cut_at_stop(text[num_sent - num_before :], stop_strings):
        yield last


def no_pieces(tokens: Iterator[int]) -> Iterator[str]:
    """Let a stream of tokens run to its end without a word."""
    for _ in tokens:
        yield from ()


def whole_text(
    model: Model, token_ids: Sequence[int], stop_strings: Sequence[str] = (), *, special: bool = False
) -> str:
    """Return the text of all tokens, without a last character that was cut off within its tokens."""
    text = model.text(token_ids, special=special)
    for num_tokens in range(len(token_ids), max(len(token_ids) - 5, -1), -1):
        complete = model.text(token_ids[:num_tokens], special=special)
        if not complete.endswith("\ufffd"):
            text = complete
            break
    return cut_at_stop(text, stop_strings)


def cut_at_stop(text: str, stop_strings: Sequence[str]) -> str:
    """Return the text before the first stop string in it."""
    ends = [text.find(stop) for stop in stop_strings if stop in text]
    return text[: min(ends)] if ends else text


def _held_back(text: str, stop_strings: Sequence[str]) -> int:
    """Return how many characters at the end may be the beginning of a stop string."""
    longest = max((len(stop) for stop in stop_strings), default=0)
    return next(
        (
            n
            for n in range(min(longest, len(text)), 0, -1)
            if any(stop.startswith(text[-n:]) for stop in stop_strings)
        ),
        0,
    )
