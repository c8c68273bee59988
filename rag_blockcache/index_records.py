"""What the manifest keeps on record of an index: values only, see ``manifest``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

AS_ADDED = "passages as they were added"  # the splitting of those who add passages, as vector stores do


@dataclass(frozen=True)
class IndexSettings:
    """What an index was made with, so that it can be opened again from its directory alone.

    Names and paths of the model may change, with the files they name; a change in the
    fingerprint, the embedder, the passage format or the splitting asks for another index.

    Attributes:
        model: Name or path of the language model.
        fingerprint: Everything that the KV states depend on, see ``BlockCache.fingerprint``.
        embedder: Name or path of the embedding model.
        passage_format: How a passage is shown to the model.
        splitting: Options of the splitter, in words.
        adapter: Name or path of the adapter on the model; empty for none.
        dtype: What the model computes in, ``"bfloat16"`` say; empty for the model's own.
        preamble: Text before the passages, in every prompt; empty for none.
        codec: How blocks are kept, see ``BlockCache``.
        blocks_see: What blocks attend to beside themselves, see ``conditioning``.
    """

    model: str
    fingerprint: str
    embedder: str
    passage_format: str
    splitting: str
    adapter: str = ""
    dtype: str = ""
    preamble: str = ""
    codec: str = "none"
    blocks_see: str = "themselves"

    @classmethod
    def from_record(cls, texts: Mapping[str, Any]) -> IndexSettings:
        """Return settings from their texts on record; what an older index does not say has its default."""
        given: dict[str, Any] = dict(texts)
        if given.pop("condition_on_preamble", False) in (True, "1"):  # its name before there were stand-ins
            given["blocks_see"] = "preamble"
        return cls(**given)

    @property
    def conditioning(self) -> str:
        """What blocks attend to beside themselves, by the options that say so."""
        seen = f"blocks_see={self.blocks_see!r}"
        return f"{seen} and the preamble {self.preamble!r}" if self.blocks_see == "preamble" else seen


@dataclass(frozen=True)
class PassageRecord:
    """One passage of a document: its id, and the block that the model reads in its place.

    The id is the content id, but for passages that were added by a name of their own; see
    ``Manifest.put_passages``.
    """

    passage_id: str
    block_id: str
    num_tokens: int


@dataclass(frozen=True)
class DocumentRecord:
    """One document as it was split.

    Attributes:
        document_id: Where it came from.
        content_hash: Changes when the document does.
        passages: In reading order; a passage may occur twice.
        refusals: Why other parts of it could not become passages.
    """

    document_id: str
    content_hash: str
    passages: tuple[PassageRecord, ...]
    refusals: tuple[str, ...] = ()


@dataclass(frozen=True)
class PassageState:
    """A passage that some document holds, and how far its work has come.

    Attributes:
        passage_id: Its name.
        content_id: What its content hashed to when it was recorded; of most passages this is their name.
        block_id: Name of its KV states.
        num_tokens: Length of its block.
        num_documents: How many documents hold it; at least one.
        is_embedded: Its vector is saved.
        is_done: Its block was encoded and stored.
    """

    passage_id: str
    content_id: str
    block_id: str
    num_tokens: int
    num_documents: int
    is_embedded: bool
    is_done: bool


@dataclass(frozen=True)
class PendingBlock:
    """A block to encode, and a passage that it is the block of."""

    block_id: str
    num_tokens: int
    passage_id: str


@dataclass(frozen=True)
class Released:
    """What lost its last reference: ids of passages and of blocks."""

    passages: frozenset[str] = frozenset()
    blocks: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ManifestCounts:
    """How much there is, and how much is left to do; only what some document holds counts."""

    num_documents: int
    num_passages: int
    num_shared_passages: int
    num_pending_passages: int
    num_blocks: int
    num_tokens: int
    num_pending_blocks: int
    num_pending_tokens: int
