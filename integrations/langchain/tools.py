"""Tools, the choice among them and response formats, as the engine takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool

from rag_blockcache.errors import InvalidInputError

_SYNONYMS = {None: "auto", False: "none", "any": "required", True: "required"}
_WORDS = {"auto", "none", "required"}


def function_tools(tools: Sequence[Any] | None, *, strict: bool | None = None) -> list[dict[str, Any]]:
    """Return tools of any kind that LangChain knows as functions with a JSON schema.

    Raises:
        InvalidInputError: If one is a tool that a provider runs on its servers.
    """
    converted = [convert_to_openai_tool(tool, strict=strict) for tool in tools or ()]
    for tool in converted:
        if tool.get("type") != "function" or "function" not in tool:
            raise InvalidInputError(
                f"a tool of type {tool.get('type')!r} runs on a provider's servers; pass a function instead"
            )
    return converted


def choice_of_tool(choice: Any, tools: Sequence[Mapping[str, Any]]) -> str:
    """Return ``auto``, ``none``, ``required`` or the name of a tool, whichever way it was written.

    Args:
        choice: None, a boolean, ``auto``, ``none``, ``any``, ``required``, the name of a tool, or a
            dictionary that names one as OpenAI or Anthropic do.
        tools: As ``function_tools`` returns them.

    Raises:
        InvalidInputError: If no tool has that name.
    """
    names = [tool["function"]["name"] for tool in tools]
    if isinstance(choice, Mapping):
        choice = choice.get("function", choice).get("name") or choice.get("type")
    if choice in names:
        return str(choice)
    word = _SYNONYMS.get(choice, choice)
    if word not in _WORDS:
        raise InvalidInputError(
            f"tool_choice is {choice!r}; use the name of a tool ({', '.join(names) or 'none was given'}), "
            "'auto', 'any' or 'none'"
        )
    if word == "required" and not names:
        raise InvalidInputError(f"tool_choice is {choice!r}, but there are no tools; pass some to bind_tools")
    return str(word)


def response_schema(response_format: Any) -> dict[str, Any] | None:
    """Return the JSON schema that a response format asks for; None for plain text.

    Args:
        response_format: ``{"type": "json_schema", "json_schema": {"schema": ...}}``, ``{"type":
            "json_object"}``, ``{"type": "text"}``, or a class or JSON schema itself.
    """
    if response_format is None or isinstance(response_format, type):
        return None if response_format is None else convert_to_json_schema(response_format)
    kind = response_format.get("type")
    if kind == "json_schema":
        return dict(response_format["json_schema"]["schema"])
    if kind in ("text", "json_object"):
        return None if kind == "text" else {"type": "object"}
    return dict(response_format)
