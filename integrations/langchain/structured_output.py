"""Parsers behind ``with_structured_output``: from a message to an object of the user's schema."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

from langchain_core.messages import AIMessage
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.pydantic import is_basemodel_subclass


def tool_parser(schema: Any, tool_name: str) -> Runnable[AIMessage, Any]:
    """Return a parser of the arguments of the first tool call."""
    if _is_model(schema):
        return PydanticToolsParser(tools=[schema], first_tool_only=True)
    return JsonOutputKeyToolsParser(key_name=tool_name, first_tool_only=True)


def text_parser(schema: Any) -> Runnable[AIMessage, Any]:
    """Return a parser of a text that is JSON."""
    return PydanticOutputParser(pydantic_object=schema) if _is_model(schema) else JsonOutputParser()


def parsed(
    model: Runnable[Any, AIMessage], parser: Runnable[AIMessage, Any], *, include_raw: bool
) -> Runnable[Any, Any]:
    """Put a parser behind a model.

    Args:
        model: Asked for the schema already.
        parser: See above.
        include_raw: Return the message, what was parsed and what went wrong instead of raising.
    """
    if not include_raw:
        return model | parser
    assigned = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=model) | assigned.with_fallbacks([failed], exception_key="parsing_error")


def _is_model(schema: Any) -> bool:
    return isinstance(schema, type) and is_basemodel_subclass(schema)
