"""LlamaIndex: an LLM, a vector store and a prompt helper that take the place of others in existing code."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rag_blockcache.errors import MissingDependencyError

if TYPE_CHECKING:
    from .llm import BlockCacheLLM
    from .prompt_helper import BlockPromptHelper
    from .vector_store import BlockCacheVectorStore

_HOMES = {
    "BlockCacheLLM": "llm",
    "BlockCacheVectorStore": "vector_store",
    "BlockPromptHelper": "prompt_helper",
}

__all__ = ["BlockCacheLLM", "BlockCacheVectorStore", "BlockPromptHelper"]

try:
    importlib.import_module("llama_index.core")
except ModuleNotFoundError as error:
    raise MissingDependencyError(
        "llama-index-core is not installed, which this integration is for; install it with "
        "`pip install 'rag_blockcache[llama-index]'`"
    ) from error


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
