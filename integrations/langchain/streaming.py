"""Streams of the engine as chunks of LangChain, which the callbacks of a run are told of."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from typing import TypeVar

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.outputs import ChatGenerationChunk, GenerationChunk

from rag_blockcache import Answer
from rag_blockcache.answers import AnswerStream
from rag_blockcache.async_answers import AsyncAnswerStream

_Chunk = TypeVar("_Chunk", ChatGenerationChunk, GenerationChunk)


def streamed(
    stream: AnswerStream,
    run_manager: CallbackManagerForLLMRun | None,
    piece: Callable[[str], _Chunk],
    last: Callable[[Answer], _Chunk],
) -> Iterator[_Chunk]:
    """Yield a chunk for each piece of text, and one with what is known at the end.

    Args:
        stream: Closed when nobody reads on.
        run_manager: Told of each piece.
        piece: Makes a chunk of new text.
        last: Makes the last chunk.
    """
    with stream:
        for text in stream:
            chunk = piece(text)
            if run_manager:
                run_manager.on_llm_new_token(text, chunk=chunk)
            yield chunk
    assert stream.answer is not None  # it was read to the end
    yield last(stream.answer)


async def astreamed(
    stream: AsyncAnswerStream,
    run_manager: AsyncCallbackManagerForLLMRun | None,
    piece: Callable[[str], _Chunk],
    last: Callable[[Answer], _Chunk],
) -> AsyncIterator[_Chunk]:
    """Yield what ``streamed`` yields."""
    async with aclosing(stream):
        async for text in stream:
            chunk = piece(text)
            if run_manager:
                await run_manager.on_llm_new_token(text, chunk=chunk)
            yield chunk
    assert stream.answer is not None
    yield last(stream.answer)
