"""The same passages as text, through the public face: what a user waits for, tokenizing included."""

from __future__ import annotations

from rag_blockcache.block_cache import BlockCache
from rag_blockcache.evaluation.requests import FirstToken
from rag_blockcache.evaluation.token_prompts import TokenPrompt
from rag_blockcache.reuse import Policy

_QUESTION = "What do these passages say?"


class TextRequest:
    """A question over passages of text whose blocks are in memory.

    Args:
        cache: Keeps them; without a directory.
        passages: Texts.
        policy: Reuses blocks.

    Attributes:
        num_tokens: Length of the prompt, template included.
    """

    def __init__(self, cache: BlockCache, passages: list[str], policy: Policy) -> None:
        self._cache, self._passages, self._policy = cache, passages, policy
        self.num_tokens = _length(cache, passages)
        cache.prefill(passages)

    @classmethod
    def fitting(cls, cache: BlockCache, prompt: TokenPrompt, policy: Policy) -> TextRequest | None:
        """Take as many passages of a prompt as give one no longer; None if not even one does."""
        texts = [cache.tokenizer.decode(list(token_ids)) for token_ids in prompt.passages]
        room = min(prompt.num_tokens, cache.model.max_length - 1) - _length(cache, [])
        passages: list[str] = []
        for text in filter(str.strip, map(str, texts)):
            room -= len(cache.block(text).token_ids)
            if room < 0:
                break
            passages.append(text)
        return cls(cache, passages, policy) if passages else None

    def first_token(self) -> FirstToken:
        """Ask, and stop at the first token."""
        answer = self._cache.generate(
            _QUESTION, self._passages, max_new_tokens=1, policy=self._policy.name, do_sample=False
        )
        assert answer.num_misses == 0, "all blocks must be in memory"
        return FirstToken(
            None,
            answer.ttft_seconds,
            answer.match_seconds,
            answer.load_seconds,
            answer.assemble_seconds,
            answer.final_block_seconds,
        )


def _length(cache: BlockCache, passages: list[str]) -> int:
    return sum(map(len, cache.segments(_QUESTION, passages)))
