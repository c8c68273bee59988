"""LlamaIndex messages to those of a chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    CitableBlock,
    CitationBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)

from rag_blockcache.errors import InvalidInputError

_ROLES = {
    MessageRole.DEVELOPER: "system",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.FUNCTION: "tool",
}
# Marks and notes that a reply or another provider put there; none of them is text for the model to read.
_SILENT = (CachePoint, CitationBlock, ThinkingBlock)


def template_messages(messages: Iterable[ChatMessage]) -> list[dict[str, Any]]:
    """Return messages as chat templates of transformers take them.

    Raises:
        InvalidInputError: If a message holds what a text model cannot read, an image say.
    """
    return [_template_message(message) for message in messages]


def cited_texts(messages: Iterable[ChatMessage]) -> list[str]:
    """Return the texts of citable blocks: each is a passage, and says so."""
    blocks = (block for message in messages for block in message.blocks if isinstance(block, CitableBlock))
    return [part.text for block in blocks for part in block.content if isinstance(part, TextBlock)]


def _template_message(message: ChatMessage) -> dict[str, Any]:
    texts = [text for block in message.blocks for text in _block_texts(block)]
    calls = _tool_calls(message)
    role = _ROLES.get(message.role, message.role.value)
    shown: dict[str, Any] = {"role": role, "content": "\n".join(texts) if texts or not calls else None}
    if calls:
        shown["tool_calls"] = calls
    for name in ("name", "tool_call_id"):
        if message.additional_kwargs.get(name):
            shown[name] = message.additional_kwargs[name]
    return shown


def _block_texts(block: Any) -> list[str]:
    if isinstance(block, TextBlock):
        return [block.text]
    if isinstance(block, CitableBlock):
        return [block.title, *(text for part in block.content for text in _block_texts(part))]
    if isinstance(block, (*_SILENT, ToolCallBlock)):
        return []
    raise InvalidInputError(
        f"a message holds a block of type {block.block_type!r}, and this model reads text only; "
        "take the block out, or put its text into a TextBlock"
    )


def _tool_calls(message: ChatMessage) -> list[dict[str, Any]]:
    """Return the calls in a message; histories of some providers have them in ``additional_kwargs`` only."""
    blocks = [block for block in message.blocks if isinstance(block, ToolCallBlock)]
    if blocks:
        return [tool_call(block.tool_call_id, block.tool_name, block.tool_kwargs) for block in blocks]
    given = [_as_mapping(call) for call in message.additional_kwargs.get("tool_calls") or ()]
    functions = [(call.get("id"), _as_mapping(call.get("function", call))) for call in given]
    return [tool_call(call_id, each["name"], each.get("arguments", {})) for call_id, each in functions]


def _as_mapping(call: Any) -> Mapping[str, Any]:
    return call if isinstance(call, Mapping) else call.model_dump()


def tool_call(call_id: str | None, name: str, arguments: Mapping[str, Any] | str) -> dict[str, Any]:
    """Return a call of a tool as chat templates take it; one without an id is known by its name."""
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    return {"type": "function", "id": call_id or name, "function": {"name": name, "arguments": arguments}}
