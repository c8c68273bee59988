"""LangChain on reused blocks: a chat model, a completion LLM and a vector store.

Needs the extra ``langchain``. Each class is imported when it is first asked for, so that a chat model does
not bring in what only the vector store needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rag_blockcache.errors import MissingDependencyError

try:
    importlib.import_module("langchain_core")
except ModuleNotFoundError as error:
    raise MissingDependencyError(
        "rag_blockcache.integrations.langchain needs langchain-core, which is not installed; "
        "run `pip install 'rag_blockcache[langchain]'`"
    ) from error

if TYPE_CHECKING:
    from .chat_models import ChatBlockCache
    from .llms import BlockCacheLLM
    from .vectorstores import BlockCacheVectorStore

_HOMES = {
    "BlockCacheLLM": "rag_blockcache.integrations.langchain.llms",
    "BlockCacheVectorStore": "rag_blockcache.integrations.langchain.vectorstores",
    "ChatBlockCache": "rag_blockcache.integrations.langchain.chat_models",
}

__all__ = ["BlockCacheLLM", "BlockCacheVectorStore", "ChatBlockCache"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
