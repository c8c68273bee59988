"""Options of a ``BlockCache`` as fields, for the adapters whose options are fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

from rag_blockcache import SharedCache
from rag_blockcache.guard import THRESHOLD


class CacheOptions(BaseModel):
    """What an adapter passes on to its engine; see ``BlockCache`` for each.

    Two defaults differ from those of ``BlockCache``: passages are shown as frameworks show them, so that
    blocks are found in any prompt, and a passage that nobody prefilled is stored at its second use.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())  # some have a model_name

    cache_dir: str | None = Field(default=None, description="Keeps blocks on disk; None: in memory only.")
    tokenizer: Any = Field(default=None, exclude=True, description="Needed with a loaded model.")
    device: Any = Field(default=None, description="cpu, cuda, auto ...; None takes a GPU if there is one.")
    dtype: Any = Field(default=None, description="Such as bfloat16; None keeps that of the model's files.")
    adapter: str | None = Field(default=None, description="A PEFT adapter to load into the model.")
    preamble: str | None = Field(default=None, description="Text before passages that no prompt holds yet.")
    passage_format: Any = Field(default="verbatim", description="How documents are shown; see BlockCache.")
    blocks_see: str | None = Field(default=None, description="What blocks attend to; see BlockCache.")
    disk_budget_bytes: int | None = Field(default=None, description="Bound of the blocks on disk.")
    memory_budget_bytes: int | None = Field(default=4 * 2**30, description="Bound of the blocks in memory.")
    device_budget_bytes: int | None = Field(default=None, description="Bound of the blocks on the GPU.")
    context_budget_bytes: int = Field(default=2**30, description="Bound of contexts kept of answers.")
    salt: str = Field(default="", description="Blocks of one salt are invisible under another.")
    admission: str = Field(default="frequency", description="Which new passages are kept; see BlockCache.")
    codec: str = Field(default="none", description="How blocks are kept: none (exactly), int8 or int4.")
    guard_rate: float = Field(default=0.0, description="Share of answers compared with full attention.")
    guard_threshold: float = Field(default=THRESHOLD, description="Divergence allowed, in nats a token.")
    cuda_graphs: bool = Field(default=True, description="CUDA graphs for short passes; see BlockCache.")

    @field_validator("cache_dir", "adapter", mode="before")
    @classmethod
    def _as_name(cls, path: Any) -> Any:
        return str(path) if isinstance(path, Path) else path

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Copy the options; a model or tokenizer that came loaded stays the same object, like the engine."""
        known = {} if memo is None else memo
        known |= {id(each): each for each in (getattr(self, "model", None), self.tokenizer)}
        return super().__deepcopy__(known)

    def shared_cache(self, model: Any, **instead: Any) -> SharedCache:
        """Return the engine that all in this process share who have equal options; it loads nothing yet.

        Args:
            model: Name or path of a model, or a loaded one.
            **instead: Options that go before the fields.
        """
        options = {name: getattr(self, name) for name in CacheOptions.model_fields if name != "cache_dir"}
        return SharedCache(model, self.cache_dir, **{**options, **instead})
