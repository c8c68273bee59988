"""``with_structured_output``: a model asked for a schema, and a parser from its messages to objects."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass

from rag_blockcache.errors import InvalidInputError

_METHODS = ("json_schema", "function_calling", "json_mode")


def structured(
    model: BaseChatModel, schema: Any, method: str, *, strict: bool | None, include_raw: bool, **options: Any
) -> Runnable[Any, Any]:
    """Return a model whose answers are objects of a schema.

    Args:
        model: To be asked.
        schema: A class or JSON schema; None for any JSON object.
        method: As for ``with_structured_output``, like all that follows.
        strict: Make all properties required.
        include_raw: Return the message, what was parsed and what went wrong instead of raising.
        **options: Of the model's answers.

    Raises:
        InvalidInputError: If there is no such method, or it needs a schema.
    """
    if method not in _METHODS:
        raise InvalidInputError(f"method is {method!r}; use one of {', '.join(_METHODS)}")
    if schema is None:
        if method != "json_mode":
            raise InvalidInputError(f"method {method!r} needs a schema; pass one, or use 'json_mode'")
        asked = model.bind(response_format={"type": "json_object"}, **options)
        return _parsed(asked, JsonOutputParser(), include_raw)
    tool = convert_to_openai_tool(schema, strict=strict)
    options["ls_structured_output_format"] = {
        "kwargs": {"method": method, "strict": strict},
        "schema": tool,
    }
    if method == "function_calling":
        name = tool["function"]["name"]
        caller = model.bind_tools([schema], tool_choice=name, strict=strict, **options)
        return _parsed(caller, _tool_parser(schema, name), include_raw)
    json_schema = {"schema": convert_to_json_schema(schema, strict=strict)}
    writer = model.bind(response_format={"type": "json_schema", "json_schema": json_schema}, **options)
    return _parsed(writer, _text_parser(schema), include_raw)


def _tool_parser(schema: Any, tool_name: str) -> Runnable[AIMessage, Any]:
    """Return a parser of the arguments of the first tool call."""
    if _is_model(schema):
        return PydanticToolsParser(tools=[schema], first_tool_only=True)
    return JsonOutputKeyToolsParser(key_name=tool_name, first_tool_only=True)


def _text_parser(schema: Any) -> Runnable[AIMessage, Any]:
    """Return a parser of a text that is JSON."""
    return PydanticOutputParser(pydantic_object=schema) if _is_model(schema) else JsonOutputParser()


def _is_model(schema: Any) -> bool:
    return isinstance(schema, type) and is_basemodel_subclass(schema)


def _parsed(
    model: Runnable[Any, AIMessage], parser: Runnable[AIMessage, Any], include_raw: bool
) -> Runnable[Any, Any]:
    """Put a parser behind a model that was asked for the schema."""
    if not include_raw:
        return model | parser
    assigned = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=model) | assigned.with_fallbacks([failed], exception_key="parsing_error")
