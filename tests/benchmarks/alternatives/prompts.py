"""The same passages asked again and again, in another order each time, in prompts of an exact length."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from rag_blockcache import BlockCache
from rag_blockcache.errors import InvalidInputError
from rag_blockcache.evaluation.token_prompts import token_run

QUESTION = "What is said about how a name is bound to an object?"


@dataclass(frozen=True)
class Request:
    """A question over passages, and its tokens.

    Attributes:
        passages: Texts, in the order of the prompt.
        segments: Tokens of the preamble, of each passage, and of the final block.
    """

    passages: tuple[str, ...]
    segments: tuple[tuple[int, ...], ...]

    @property
    def token_ids(self) -> list[int]:
        """Tokens of the whole prompt."""
        return [token for segment in self.segments for token in segment]

    @classmethod
    def of(cls, cache: BlockCache, passages: list[str]) -> Request:
        """Ask about passages, with the prompt that the library makes."""
        segments = tuple(map(tuple, cache.segments(QUESTION, passages)))
        assert len(segments) == len(passages) + 2, "a preamble, the passages, a final block"
        return cls(tuple(passages), segments)


def fitting_passages(cache: BlockCache, text: str, num_tokens: int, passage_tokens: int) -> list[str]:
    """Cut passages from a text that fill a prompt of exactly ``num_tokens``.

    All have about ``passage_tokens`` tokens but the last, which takes what is left: half to one and a half of
    that.

    Raises:
        InvalidInputError: If there is no room for a passage.
    """
    run = token_run(cache.model, num_tokens + 2 * passage_tokens, text)
    preamble, _, final_block = cache.segments(QUESTION, ["?"])
    room, passages = num_tokens - len(preamble) - len(final_block), []
    while room >= 1.5 * passage_tokens:
        passages.append(cache.model.text(run[:passage_tokens]))
        room -= len(cache.block(passages[-1]).token_ids)
        run = run[passage_tokens:]
    for size in range(room, passage_tokens // 3, -1):  # its mark takes some
        last = cache.model.text(run[:size])
        if len(cache.block(last).token_ids) == room:
            return [*passages, last]
    raise InvalidInputError(
        f"no passage of about {passage_tokens} tokens fills the {room} that are left of {num_tokens}; take "
        "longer prompts, or passages of another length"
    )


def shuffled(cache: BlockCache, passages: list[str]) -> Iterator[Request]:
    """Yield requests over the same passages without end, none in the order of the one before."""
    order, chance = list(passages), random.Random(0)
    while True:
        before = list(order)
        while order == before and len(passages) > 1:
            chance.shuffle(order)
        yield Request.of(cache, order)
