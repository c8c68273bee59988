"""LangChain's messages and documents as the engine takes them, and its answers as messages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.messages.tool import tool_call, tool_call_chunk

from rag_blockcache import Answer, Passage
from rag_blockcache.errors import InvalidInputError

PROVIDER = "rag_blockcache"

_ROLES: dict[type[BaseMessage], str] = {
    SystemMessage: "system",
    HumanMessage: "user",
    AIMessage: "assistant",
    ToolMessage: "tool",
    FunctionMessage: "tool",
}
# What an assistant's content may hold beside text: its calls stand in ``tool_calls``, its thoughts and what a
# provider's servers did are not part of a conversation.
_NOT_SHOWN = {"tool_call", "tool_use", "function_call", "invalid_tool_call", "server_tool_call"}
_NOT_SHOWN |= {"server_tool_result", "reasoning", "thinking", "redacted_thinking"}


def chat_messages(messages: Iterable[BaseMessage]) -> list[dict[str, Any]]:
    """Return messages as chat templates take them.

    Raises:
        InvalidInputError: If a message has a role or content that no text model can read.
    """
    return [_chat_message(message) for message in messages]


def shown_texts(messages: Iterable[BaseMessage]) -> list[str]:
    """Return texts that the messages say they show: plain-text blocks, and what a retriever tool returned."""
    texts: list[str] = []
    for message in messages:
        artifact = getattr(message, "artifact", None)
        found = artifact if isinstance(artifact, Sequence) else [artifact]
        texts += [each.page_content for each in found if isinstance(each, Document)]
        texts += [_text_of(block) for block in _blocks(message) if block.get("type") == "text-plain"]
    return texts


def passages(documents: Iterable[str | Document | Passage]) -> list[str | Passage]:
    """Return documents as passages; those without text, which show nothing, are left out."""
    return [each if isinstance(each, Passage) else _passage(each) for each in documents if _has_text(each)]


def answer_message(answer: Answer, model_name: str, *, num_calls: int | None = None) -> AIMessage:
    """Return an answer as a message with its tool calls, usage and what reuse did for it.

    Args:
        answer: Of the engine.
        model_name: Of the model.
        num_calls: So many tool calls are kept; None keeps all.
    """
    calls = [
        tool_call(name=each.name, args=each.arguments, id=each.tool_call_id)
        for each in answer.tool_calls[:num_calls]
    ]
    return AIMessage(
        answer.text,
        tool_calls=calls,
        usage_metadata=usage(answer),
        response_metadata=metadata(answer, model_name),
    )


def last_chunk(answer: Answer, model_name: str, *, num_calls: int | None = None) -> AIMessageChunk:
    """Return what ends the stream of an answer whose text was sent before; see ``answer_message``."""
    calls = [
        tool_call_chunk(
            name=each.name,
            args=json.dumps(each.arguments, ensure_ascii=False),
            id=each.tool_call_id,
            index=index,
        )
        for index, each in enumerate(answer.tool_calls[:num_calls])
    ]
    return AIMessageChunk(
        content="",
        tool_call_chunks=calls,
        usage_metadata=usage(answer),
        response_metadata=metadata(answer, model_name),
        chunk_position="last",
    )


def usage(answer: Answer) -> UsageMetadata:
    """Return the numbers of tokens: read from the cache, written to it, and in all."""
    num_output_tokens = len(answer.token_ids)
    return UsageMetadata(
        input_tokens=answer.num_prompt_tokens,
        output_tokens=num_output_tokens,
        total_tokens=answer.num_prompt_tokens + num_output_tokens,
        input_token_details=InputTokenDetails(
            cache_read=answer.num_reused_tokens, cache_creation=answer.num_stored_tokens
        ),
    )


def metadata(answer: Answer, model_name: str) -> dict[str, Any]:
    """Return what else there is to say of an answer."""
    return {
        "model_name": model_name,
        "model_provider": PROVIDER,
        "finish_reason": answer.finish_reason,
        "ttft_seconds": answer.ttft_seconds,
        "num_hits": answer.num_hits,
        "num_misses": answer.num_misses,
        "policy": answer.policy,
        "policy_reason": answer.policy_reason,
    }


def _chat_message(message: BaseMessage) -> dict[str, Any]:
    translated: dict[str, Any] = {"role": _role(message), "content": _content(message)}
    if message.name:
        translated["name"] = message.name
    if isinstance(message, ToolMessage):
        translated["tool_call_id"] = message.tool_call_id
    if isinstance(message, AIMessage) and message.tool_calls:
        translated["tool_calls"] = [
            {
                "type": "function",
                "id": call["id"] or "",
                "function": {"name": call["name"], "arguments": call["args"]},
            }
            for call in message.tool_calls
        ]
    return translated


def _role(message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        return message.role
    for kind, role in _ROLES.items():
        if isinstance(message, kind):
            return role
    raise InvalidInputError(
        f"a {type(message).__name__} cannot be shown to a model; pass system, human, AI and tool messages"
    )


def _content(message: BaseMessage) -> str:
    """Return the text of a message; a plain-text block is a paragraph of its own."""
    if isinstance(message.content, str):
        return message.content
    shown = [block for block in _blocks(message) if not _is_skipped(block, message)]
    paragraphs = []
    for is_document, run in groupby(shown, lambda block: block.get("type") == "text-plain"):
        if is_document:
            paragraphs += [_document(block) for block in run]
        else:
            paragraphs.append("".join(_text_of(block) for block in run))
    return "\n\n".join(paragraphs)


def _blocks(message: BaseMessage) -> list[dict[str, Any]]:
    content = [message.content] if isinstance(message.content, str) else message.content
    return [{"type": "text", "text": block} if isinstance(block, str) else block for block in content]


def _is_skipped(block: Mapping[str, Any], message: BaseMessage) -> bool:
    return isinstance(message, AIMessage) and block.get("type") in _NOT_SHOWN


def _document(block: Mapping[str, Any]) -> str:
    return "\n".join(filter(None, [block.get("title"), block.get("context"), _text_of(block)]))


def _text_of(block: Mapping[str, Any]) -> str:
    text = block.get("text")
    if block.get("type") not in ("text", "text-plain") or not isinstance(text, str):
        raise InvalidInputError(
            f"a content block of type {block.get('type')!r} without text cannot be read by a text model; "
            "leave it out, or put what it says into a block of type 'text' or 'text-plain'"
        )
    return text


def _has_text(document: str | Document | Passage) -> bool:
    if isinstance(document, Document):
        return bool(document.page_content.strip())
    return not isinstance(document, str) or bool(document.strip())


def _passage(document: str | Document) -> Passage:
    if isinstance(document, str):
        return Passage(document)
    if not isinstance(document, Document):
        raise InvalidInputError(
            f"documents hold a {type(document).__name__}; pass LangChain Documents, strings or passages"
        )
    return Passage(document.page_content, passage_id=document.id or "")  # as the vector store prefills it
