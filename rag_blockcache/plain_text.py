"""Text to tokens, such that nothing a user wrote becomes a control token or depends on what stands before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

_ANCHORS = ("\n", "=", "x\n")  # in front of a text whose tokenizer would add a space before it


class TextEncoder:
    """Encodes pieces of a prompt with one tokenizer.

    Args:
        tokenizer: Its added tokens, special or not, are control tokens, unless they are white space.

    Attributes:
        control: Ids of the control tokens, by how they are spelled.
        start: The token that the tokenizer puts before every prompt, as it is spelled; empty for none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_encoder
        self.control = {
            token: index for token, index in added.items() if token.replace("\u2581", " ").strip()
        }
        self._control_ids = frozenset(self.control.values())
        self.start = self._start()
        self._adds_space = self._is_space_added()

    def text(self, text: str, *, is_start: bool = False) -> list[int]:
        """Encode what a user wrote; a control token spelled in it stays text.

        Args:
            text: Any text.
            is_start: Whether a prompt starts here; anywhere else no space is put before it.
        """
        token_ids = self._placed(text, self._standard, is_start)
        if self._control_ids.isdisjoint(token_ids):
            return token_ids
        return self._spelled_out(text, is_start)

    def template(self, text: str, *, is_start: bool = False) -> list[int]:
        """Encode what a chat template wrote, control tokens included."""
        return self._placed(text, self._standard, is_start)

    def _spelled_out(self, text: str, is_start: bool) -> list[int]:
        token_ids = self._placed(text, self._without_added_tokens, is_start)
        if self._control_ids.isdisjoint(token_ids) or len(text) < 2:
            return token_ids
        middle = len(text) // 2  # a vocabulary that spells a control token as a word: cut until it cannot
        return self._spelled_out(text[:middle], is_start) + self._spelled_out(text[middle:], False)

    def _placed(self, text: str, encode: Callable[[str], list[int]], is_start: bool) -> list[int]:
        if not text:
            return []
        if self._adds_space and not is_start:
            for anchor in _ANCHORS:
                alone, anchored = encode(anchor), encode(anchor + text)
                if anchored[: len(alone)] == alone:
                    return anchored[len(alone) :]
        return encode(text)

    def _standard(self, text: str) -> list[int]:
        encoded = self._tokenizer(text, add_special_tokens=False, split_special_tokens=False, verbose=False)
        return list(encoded.input_ids)

    def _without_added_tokens(self, text: str) -> list[int]:
        backend: Any = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return list(self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        words = [text]
        if backend.pre_tokenizer is not None:
            words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in backend.model.tokenize(word)]

    def _start(self) -> str:
        bos, first = self._tokenizer.bos_token_id, self._tokenizer("x").input_ids[:1]
        return str(self._tokenizer.bos_token) if bos is not None and first == [bos] else ""

    def _is_space_added(self) -> bool:
        """Return whether the tokenizer puts a space before a text, as SentencePiece tokenizers do."""
        first = self._tokenizer.convert_ids_to_tokens(self._standard("a")[:1])
        return bool(first) and first[0][:1] in ("\u2581", "\u0120")
