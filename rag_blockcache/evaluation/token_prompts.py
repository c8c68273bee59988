"""Prompts of an exact number of tokens: passages cut from a run of tokens, and a final block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.model import Model
from rag_blockcache.prompt import Segment


@dataclass(frozen=True)
class TokenPrompt:
    """A prompt as token ids.

    Attributes:
        passages: Tokens of each passage.
        final_block: Tokens after the passages.
    """

    passages: tuple[tuple[int, ...], ...]
    final_block: tuple[int, ...]

    @property
    def token_ids(self) -> list[int]:
        """All tokens, in order."""
        return [token for passage in (*self.passages, self.final_block) for token in passage]

    @property
    def num_tokens(self) -> int:
        """Length of the prompt."""
        return sum(map(len, self.passages)) + len(self.final_block)

    def segments(self) -> list[Segment]:
        """Return the prompt as the engine takes it."""
        return [*(Segment("passage", ids) for ids in self.passages), Segment("text", self.final_block)]


def token_run(model: Model, num_tokens: int, text: str | None = None) -> list[int]:
    """Return a run of tokens: of a text, or random ones.

    Raises:
        InvalidInputError: If the text is too short.
    """
    if text is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(model.vocab_size, (num_tokens,), generator=generator).tolist()
    token_ids = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:num_tokens]
    if len(token_ids) < num_tokens:
        raise InvalidInputError(
            f"the text has {len(token_ids):,} tokens, {num_tokens:,} are needed; give a longer one, or none"
        )
    return list(token_ids)


def cut_prompt(run: Sequence[int], num_tokens: int, *, final_tokens: int, passage_tokens: int) -> TokenPrompt:
    """Cut a prompt of exactly ``num_tokens`` from the start of a run; its final block is the run's end.

    Args:
        run: At least ``num_tokens`` tokens.
        num_tokens: Length of the prompt; that of the final block gives a prompt without passages.
        final_tokens: Length of the final block.
        passage_tokens: Length of a passage; the last one takes what is left, half to one and a half of it.

    Raises:
        InvalidInputError: If the prompt has no room for a passage of half that length.
    """
    room = num_tokens - final_tokens
    if 0 < num_tokens == final_tokens <= len(run):
        return TokenPrompt((), tuple(run[len(run) - final_tokens :]))
    if final_tokens < 1 or passage_tokens < 2 or room < passage_tokens // 2 or num_tokens > len(run):
        raise InvalidInputError(
            f"a prompt of {num_tokens} tokens with a final block of {final_tokens} cannot hold a passage of "
            f"about {passage_tokens} tokens; take longer prompts or shorter passages"
        )
    num_passages = max(1, round(room / passage_tokens))
    cuts = [*range(0, num_passages * passage_tokens, passage_tokens), room]
    passages = tuple(tuple(run[start:stop]) for start, stop in pairwise(cuts))
    return TokenPrompt(passages, tuple(run[len(run) - final_tokens :]))


def mixed_passages(run: Sequence[int], shortest: int, longest: int) -> list[list[int]]:
    """Cut a run into passages of mixed lengths, evenly spread between two bounds; nothing is left over."""
    generator = torch.Generator().manual_seed(0)
    passages, start = [], 0
    while start < len(run):
        length = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
        passages.append(list(run[start : start + length]))
        start += length
    return passages
