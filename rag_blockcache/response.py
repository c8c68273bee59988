"""What an answer must look like, and how it is read: free text, a JSON schema, calls of tools."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import LogitsProcessorList

from rag_blockcache.generation_options import setting
from rag_blockcache.model import Model
from rag_blockcache.request import Chat, Question, Request
from rag_blockcache.structured import constraint, joined
from rag_blockcache.text_stream import text_pieces, whole_text
from rag_blockcache.tool_call_reader import parse_tool_calls, text_without_calls
from rag_blockcache.tool_calls import ToolCall


def constrained(model: Model, requests: Sequence[Request], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of ``generate()`` that keep each answer to what its request asks for.

    Raises:
        InvalidInputError: If a schema cannot be followed, or the tool to be called is not among the tools.
        MissingDependencyError: If what follows schemas is not installed.
    """
    eos = setting(model, options, "eos_token_id")
    ends = [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [eos]
    processor = joined([_constraint(model, request, ends) for request in requests])
    if processor is None:
        return dict(options)
    given = options.get("logits_processor") or ()
    return {**options, "logits_processor": LogitsProcessorList([*given, processor])}


def _constraint(model: Model, request: Request, ends: Sequence[int]) -> Any:
    if isinstance(request, Question):
        return None
    if isinstance(request, Chat):
        return constraint(
            model.tokenizer,
            response_schema=request.response_schema,
            tools=request.tools,
            tool_choice=request.tool_choice,
            eos_token_ids=ends,
        )
    return constraint(model.tokenizer, response_schema=request.response_schema, eos_token_ids=ends)


def read_response(
    model: Model, request: Request | None, token_ids: Sequence[int], stop_strings: Sequence[str]
) -> tuple[str, tuple[ToolCall, ...]]:
    """Return the text of an answer, and the calls of tools in it."""
    tools = _callable_tools(request)
    if not tools:
        return whole_text(model, token_ids, stop_strings), ()
    written = whole_text(model, token_ids, stop_strings, special=True)
    text, calls = parse_tool_calls(written, tools, special_tokens=_special_tokens(model))
    return text, tuple(calls)


def response_pieces(
    model: Model, request: Request, tokens: Iterator[int], stop_strings: Sequence[str]
) -> Iterator[str]:
    """Turn a stream of tokens into a stream of text, without the calls of tools."""
    tools = _callable_tools(request)
    if not tools:
        return text_pieces(model, tokens, stop_strings)
    written = text_pieces(model, tokens, stop_strings, special=True)
    return text_without_calls(written, tools, special_tokens=_special_tokens(model))


def _callable_tools(request: Request | None) -> Sequence[Mapping[str, Any]]:
    return request.tools if isinstance(request, Chat) and request.tool_choice != "none" else ()


def _special_tokens(model: Model) -> list[str]:
    """Return all that decoding leaves out as special; ``all_special_tokens`` holds only those with a role."""
    return [token.content for token in model.tokenizer.added_tokens_decoder.values() if token.special]
