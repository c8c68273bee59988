"""Long texts into passages of a bounded number of the model's own tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from semantic_text_splitter import MarkdownSplitter, TextSplitter

from rag_blockcache.errors import InvalidInputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MIN_TOKENS = 8  # one character can be four tokens or five, and no cut goes through a character


class PassageSplitter:
    """Cuts texts where they cut best: at headings, paragraphs, sentences, words, in this order.

    Args:
        tokenizer: The model's, which counts; special tokens are not counted.
        max_tokens: A passage has no more; at least 8.
        overlap_tokens: How much of a passage the next one may repeat, at most.

    Raises:
        InvalidInputError: If ``max_tokens`` is too small, or ``overlap_tokens`` is not below it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, overlap_tokens: int = 0
    ) -> None:
        if max_tokens < _MIN_TOKENS:
            raise InvalidInputError(
                f"max_tokens is {max_tokens}; a passage needs room for {_MIN_TOKENS} or more"
            )
        if not 0 <= overlap_tokens < max_tokens:
            raise InvalidInputError(
                f"overlap_tokens is {overlap_tokens}; it must be from 0 to below max_tokens, {max_tokens}"
            )
        self.max_tokens = max_tokens
        self.overlap_tokens = overlap_tokens
        self._plain = _made(TextSplitter, tokenizer, max_tokens, overlap_tokens)
        self._markdown = _made(MarkdownSplitter, tokenizer, max_tokens, overlap_tokens)

    def __str__(self) -> str:
        return f"passages of up to {self.max_tokens} tokens, {self.overlap_tokens} of them repeated"

    def split(self, text: str, *, is_markdown: bool = False) -> list[str]:
        """Cut a text into pieces, in order, without white space around them; none of white space only."""
        pieces = (self._markdown if is_markdown else self._plain).chunks(text)
        return [piece for piece in pieces if piece.strip()]


def _made(kind: Any, tokenizer: PreTrainedTokenizerBase, max_tokens: int, overlap_tokens: int) -> Any:
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        counting = Tokenizer.from_str(backend.to_str())  # a copy: the model's keeps its settings
        counting.no_truncation()
        return kind.from_huggingface_tokenizer(counting, max_tokens, overlap_tokens)

    def num_tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    return kind.from_callback(num_tokens, max_tokens, overlap_tokens)
