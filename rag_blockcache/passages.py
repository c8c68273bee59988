"""Passages, the texts that a retriever returns, and blocks, their tokens."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from rag_blockcache.errors import InvalidInputError


@dataclass(frozen=True)
class Passage:
    """A text that the retriever can return.

    Attributes:
        text: What the model reads. Must hold more than white space.
        title: Shown in front of the text where the prompt format has a place for it.
        passage_id: Name of the passage in an index; empty until something names it. Block
            names do not depend on it, only on the tokens.
        metadata: Anything JSON can hold; used by filters, never shown to the model.
    """

    text: str
    title: str = ""
    passage_id: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what no model can read, at the place where it was written."""
        if not isinstance(self.text, str) or not isinstance(self.title, str):
            got = type(self.text if not isinstance(self.text, str) else self.title).__name__
            raise InvalidInputError(
                f"a passage needs text and title as strings, got {got}; decode or convert it"
            )
        if not self.text.strip():
            raise InvalidInputError("a passage has no text; leave it out, or give it some")

    def __hash__(self) -> int:
        return hash((self.text, self.title, self.passage_id))

    @property
    def content_id(self) -> str:
        """Hash of title and text, 32 hexadecimal digits: equal passages share it wherever they stand."""
        content = json.dumps([self.title, self.text], ensure_ascii=True)
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Excerpt:
    """A known passage where it stands in a prompt.

    Attributes:
        shown: What of it is there: all, or its beginning.
        whole: All of it, as its block was encoded.
    """

    shown: str
    whole: str


@dataclass(frozen=True)
class Block:
    """The tokens of one passage, as they stand in every prompt, and the name of their KV states.

    Attributes:
        token_ids: Tokens of the rendered passage, without special tokens around them.
        block_id: See ``block_id``.
    """

    token_ids: tuple[int, ...]
    block_id: str


def block_id(token_ids: Sequence[int], *, fingerprint: str, conditioned_on: Sequence[int] = ()) -> str:
    """Name the KV states of a block by everything that they depend on.

    Args:
        token_ids: Tokens of the block.
        fingerprint: What else the states depend on: weights, adapter, dtype, rotary regime,
            codec, format version, tenant salt (see ``Model.fingerprint``).
        conditioned_on: Tokens that the block attends to beside itself; empty for none.

    Returns:
        32 hexadecimal digits of BLAKE2b. Two blocks with one name are the same.
    """
    # Hundreds of names stand before a first token; tokens as text would take longer than all else at 32K.
    head, pack = _head(fingerprint, tuple(conditioned_on), len(token_ids))
    return hashlib.blake2b(head + pack(*token_ids), digest_size=16).hexdigest()


@lru_cache(maxsize=4096)
def _head(
    fingerprint: str, conditioned_on: tuple[int, ...], num_tokens: int
) -> tuple[bytes, Callable[..., bytes]]:
    """Return what stands before the tokens of a block, and what packs them."""
    sizes = f"[{json.dumps(fingerprint)}, {len(conditioned_on)}, {num_tokens}]".encode()
    seen = struct.pack(f"<{len(conditioned_on)}q", *conditioned_on)
    return sizes + seen, struct.Struct(f"<{num_tokens}q").pack


def as_passages(passages: Iterable[str | Passage]) -> list[Passage]:
    """Accept plain strings wherever passages are asked for.

    Raises:
        InvalidInputError: If one string stands where a sequence of passages belongs, or an
            element is neither a string nor a ``Passage``.
    """
    if isinstance(passages, str | Passage):
        raise InvalidInputError("passages must be a sequence; wrap a single passage in a list")
    found = []
    for index, passage in enumerate(passages):
        if isinstance(passage, str):
            passage = Passage(passage)
        if not isinstance(passage, Passage):
            raise InvalidInputError(
                f"passage {index} is {type(passage).__name__}; pass a string or rag_blockcache.Passage"
            )
        found.append(passage)
    return found
