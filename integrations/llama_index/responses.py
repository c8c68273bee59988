"""Answers to LlamaIndex responses, with usage, time to first token and what was reused."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing
from dataclasses import asdict
from typing import Any, TypeVar

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    MessageRole,
    TextBlock,
    ToolCallBlock,
)
from llama_index.core.llms.llm import ToolSelection

from rag_blockcache import Answer
from rag_blockcache.answers import AnswerStream
from rag_blockcache.async_answers import AsyncAnswerStream

from .messages import tool_call

Response = TypeVar("Response", ChatResponse, CompletionResponse)


def chat_response(answer: Answer, *, num_calls: int | None = None) -> ChatResponse:
    """Return an answer as a response.

    Args:
        answer: What the engine gave.
        num_calls: How many calls of tools to pass on; None for all.
    """
    calls = answer.tool_calls[:num_calls]
    blocks: list[Any] = [TextBlock(text=answer.text)] if answer.text or not calls else []
    blocks += [
        ToolCallBlock(tool_call_id=call.tool_call_id, tool_name=call.name, tool_kwargs=call.arguments)
        for call in calls
    ]
    # Structured programs of LlamaIndex look for calls here, not in the blocks.
    written = [tool_call(call.tool_call_id, call.name, call.arguments) for call in calls]
    message = ChatMessage(
        role=MessageRole.ASSISTANT,
        blocks=blocks,
        additional_kwargs={"tool_calls": written} if written else {},
    )
    return ChatResponse(message=message, raw=_raw(answer), additional_kwargs=_counts(answer))


def chat_piece(text: str) -> ChatResponse:
    """Return a part of an answer as a response."""
    return ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=text))


def completion_response(answer: Answer) -> CompletionResponse:
    """Return an answer as a completion."""
    return CompletionResponse(text=answer.text, raw=_raw(answer), additional_kwargs=_counts(answer))


def completion_piece(text: str) -> CompletionResponse:
    """Return a part of an answer as a completion."""
    return CompletionResponse(text=text)


def streamed(
    stream: AnswerStream, piece: Callable[[str], Response], whole: Callable[[Answer], Response]
) -> Generator[Response, None, None]:
    """Yield a response for each new piece of text, and a last one with all that is known at the end.

    Args:
        stream: Closed when nobody reads on.
        piece: Makes a response of the text so far.
        whole: Makes the last response.
    """
    text = ""
    with stream:
        for delta in stream:
            text += delta
            yield _with_delta(piece(text), delta)
        assert stream.answer is not None
        yield _with_delta(whole(stream.answer), "")


async def astreamed(
    stream: AsyncAnswerStream, piece: Callable[[str], Response], whole: Callable[[Answer], Response]
) -> AsyncGenerator[Response, None]:
    """Yield what ``streamed`` yields."""
    text = ""
    async with aclosing(stream):
        async for delta in stream:
            text += delta
            yield _with_delta(piece(text), delta)
        assert stream.answer is not None
        yield _with_delta(whole(stream.answer), "")


def tool_selections(response: ChatResponse) -> list[ToolSelection]:
    """Return the calls of tools in a response."""
    return [
        ToolSelection(
            tool_id=block.tool_call_id or block.tool_name,
            tool_name=block.tool_name,
            tool_kwargs=block.tool_kwargs if isinstance(block.tool_kwargs, dict) else {},
        )
        for block in response.message.blocks
        if isinstance(block, ToolCallBlock)
    ]


def _with_delta(response: Response, delta: str) -> Response:
    response.delta = delta
    return response


def _counts(answer: Answer) -> dict[str, Any]:
    """Return usage under the names that LlamaIndex integrations share, and what was reused."""
    num_new_tokens = len(answer.token_ids)
    return {
        "prompt_tokens": answer.num_prompt_tokens,
        "completion_tokens": num_new_tokens,
        "total_tokens": answer.num_prompt_tokens + num_new_tokens,
        "num_reused_tokens": answer.num_reused_tokens,
        "num_hits": answer.num_hits,
        "num_misses": answer.num_misses,
        "ttft_seconds": answer.ttft_seconds,
        "finish_reason": answer.finish_reason,
    }


def _raw(answer: Answer) -> dict[str, Any]:
    """Return all that is known of an answer; ``usage`` is as in OpenAI's API, which token counters read."""
    counts = _counts(answer)
    usage = {name: counts[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    usage["prompt_tokens_details"] = {"cached_tokens": answer.num_reused_tokens}
    return {**asdict(answer), "usage": usage}
