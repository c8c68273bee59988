"""This library, asked as a user asks it: text in, rendered, tokenized, planned, looked up, one token out."""

from __future__ import annotations

from dataclasses import replace

from alternatives.prompts import QUESTION, Request
from alternatives.way import FirstToken, Way
from rag_blockcache import BlockCache


class ThisLibrary(Way):
    """Answers from blocks that were prefilled.

    Args:
        cache: Keeps them.
        policy: How they are reused.
        stands_for: See ``Way``.
        loss: See ``Way``.
    """

    def __init__(
        self, cache: BlockCache, policy: str, *, stands_for: str = "block", loss: float = 0.0
    ) -> None:
        self._cache, self._policy = cache, policy
        self.stands_for, self.loss = stands_for, loss

    def prepare(self, request: Request) -> None:
        """Encode the passages; the preamble comes with the first request."""
        self._cache.prefill(request.passages)

    def first_token(self, request: Request) -> FirstToken:
        answer = self._cache.generate(
            QUESTION, request.passages, policy=self._policy, max_new_tokens=1, do_sample=False
        )
        assert answer.num_misses == 0, "all blocks must be stored before anything is timed"
        assert answer.policy == self._policy
        return FirstToken(answer.token_ids[0], num_reused=answer.num_reused_tokens)

    def with_logits(self, request: Request) -> FirstToken:
        logits = self._cache.first_logits(QUESTION, request.passages, policy=self._policy)
        return replace(self.first_token(request), logits=logits)

    def close(self) -> None:
        self._cache.close()
