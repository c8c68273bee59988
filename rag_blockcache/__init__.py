"""Answers over retrieved passages with the first token early: passages are prefilled once.

Modules in reading order: ``passages`` (texts and their tokens), ``request`` (what can be asked), ``prompt``
(requests to segments), with ``passage_format``, ``chat_template``, ``plain_text``; ``kv_states``, ``rotary``
(what is stored, and how it moves); ``layers``, ``model`` and ``loading`` (what we need to know of a model of
transformers); ``conditioning`` and ``encoder`` (what a block sees, and blocks to KV states); ``store`` and
``device_tier`` (device, memory and disk); ``assembler`` (KV states to a context); ``matcher`` (known
passages in any prompt); ``reuse``, ``plan`` and ``planner`` (which slots are computed again); ``generator``
(context to tokens) and ``response`` (tokens to text, JSON and calls of tools); ``block_source``,
``prefiller`` and ``block_cache`` (the public face), ``shared_cache`` (one for many). Beside them:
``retriever``, ``manifest``, ``jobs`` and ``prefilled_index`` (documents to a prefilled index),
``evaluation``, ``finetuning``, ``cli``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rag_blockcache.answers import Answer
    from rag_blockcache.block_cache import BlockCache
    from rag_blockcache.passages import Passage
    from rag_blockcache.prefilled_index import PrefilledIndex
    from rag_blockcache.request import Chat, Question, Text
    from rag_blockcache.shared_cache import SharedCache
    from rag_blockcache.tool_calls import ToolCall

_HOMES = {
    "Answer": "rag_blockcache.answers",
    "BlockCache": "rag_blockcache.block_cache",
    "Chat": "rag_blockcache.request",
    "Passage": "rag_blockcache.passages",
    "PrefilledIndex": "rag_blockcache.prefilled_index",
    "Question": "rag_blockcache.request",
    "SharedCache": "rag_blockcache.shared_cache",
    "Text": "rag_blockcache.request",
    "ToolCall": "rag_blockcache.tool_calls",
}

__all__ = [
    "Answer",
    "BlockCache",
    "Chat",
    "Passage",
    "PrefilledIndex",
    "Question",
    "SharedCache",
    "Text",
    "ToolCall",
]  # the documentation describes exactly these, beside the modules


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that importing the package stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
