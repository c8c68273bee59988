"""Calls of tools, and the forms in which models write them.

Each form is read from its first character by a function that returns the calls and where they end, or None if
what stands there is ordinary text. Where that depends on text which has not come yet, it raises
``Unfinished``. More text never changes what was decided.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rag_blockcache.errors import InvalidInputError


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool that a model asks for.

    Attributes:
        name: Of the tool.
        arguments: By name.
        tool_call_id: Nine letters and digits, which every chat template takes.
    """

    name: str
    arguments: dict[str, Any]
    tool_call_id: str


@dataclass(frozen=True)
class CallForm:
    """How a call is written: what stands around the name of a tool and its arguments in JSON.

    Attributes:
        before: In front of the name.
        middle: From the name to the arguments.
        after: Behind the arguments.
    """

    before: str
    middle: str
    after: str

    def write(self, name: str, arguments: Any) -> str:
        """Return a call as a model writes it."""
        return f"{self.before}{name}{self.middle}{json.dumps(arguments, ensure_ascii=False)}{self.after}"


HERMES = CallForm('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>")
Tools = Mapping[str, Mapping[str, Any]]  # name of a tool to the JSON schema of its arguments
Found = tuple[list[ToolCall], int]


class Unfinished(Exception):  # noqa: N818  # nothing is wrong: it says that more text is needed
    """What stands there may still become a call.

    Attributes:
        otherwise: What has been found if no more text comes.
    """

    def __init__(self, otherwise: Found | None = None) -> None:
        super().__init__()
        self.otherwise = otherwise


_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*?)</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_NAMED = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)")
_NAMED_SO_FAR = re.compile(r"\s*([\w.-]+(\[[\w\]\[]*)?)?\s*")
_FENCE = re.compile(r"```\w*\s*")
_STRUCTURE = re.compile(r'"(?:[^"\\]|\\.)*+"|["{}\[\]]', re.DOTALL)
_FIRST_KEYS = [f'{{"{key}"' for key in ("name", "arguments", "parameters", "type", "function", "id")]


def schemas_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the JSON schemas of the arguments of tools, by their names.

    Raises:
        InvalidInputError: If a tool has no name, or two have the same.
    """
    schemas: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        function = tool.get("function", tool)
        name = function.get("name")
        if not isinstance(name, str) or not name or name in schemas:
            raise InvalidInputError(
                f"a tool needs a name of its own, got {name!r}; write it as "
                '{"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}'
            )
        schemas[name] = function.get("parameters") or {}
    return schemas


def read_tagged(text: str, tools: Tools) -> Found | None:
    """Read ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, as Hermes and Qwen models write.

    Instead of JSON there may be ``<function=name><parameter=key>value</parameter></function>``, as
    Qwen3-Coder writes it. The end may be missing.
    """
    start, tag = len("<tool_call>"), "<function="
    body = text[start:].lstrip()
    if tag.startswith(body[: len(tag)]) and body[: len(tag)] != tag:
        raise Unfinished
    found = _read_function(text, start, tools) if body.startswith(tag) else _read_json(text, start)
    return found and _past("</tool_call>", found, text)


def read_python_tag(text: str, tools: Tools) -> Found | None:
    """Read ``<|python_tag|>{"name": ..., "parameters": {...}}``, as Llama 3 writes it."""
    return _read_json(text, len("<|python_tag|>"))


def read_mistral(text: str, tools: Tools) -> Found | None:
    """Read ``[TOOL_CALLS][{"name": ..., "arguments": {...}}]``, or ``[TOOL_CALLS]name[ARGS]{...}``."""
    start = len("[TOOL_CALLS]")
    if text[start:].lstrip()[:1] in ("[", "{"):
        return _read_json(text, start)
    named = _NAMED.match(text, start)
    if named is None:
        if _NAMED_SO_FAR.fullmatch(text, start):
            raise Unfinished
        return None
    end = _end_of_json(text, named.end())
    call = _as_call({"name": named[1], "arguments": text[named.end() : end]})
    return ([call], end) if call else None


def read_fenced(text: str, tools: Tools) -> Found | None:
    """Read a fenced block that holds calls of known tools and nothing else."""
    fence = _FENCE.match(text)
    assert fence is not None
    found = _read_json(text, fence.end(), tools)
    if found is None:
        return None
    closed = _past("```", found, text)
    return closed if closed != found else None


def read_bare(text: str, tools: Tools) -> Found | None:
    """Read an object that calls a known tool, or a list of such, as Llama 3 writes them."""
    return _read_json(text, 0, tools)


READERS: dict[str, Callable[[str, Tools], Found | None]] = {  # by what opens a call
    "<tool_call>": read_tagged,
    "<|python_tag|>": read_python_tag,
    "[TOOL_CALLS]": read_mistral,
    "```": read_fenced,
}


def _read_json(text: str, start: int, tools: Tools | None = None) -> Found | None:
    """Read an object or list of calls; with ``tools``, what could be other JSON must call one of them."""
    start += len(text[start:]) - len(text[start:].lstrip())
    if start == len(text):
        raise Unfinished
    if text[start] not in "[{" or (tools is not None and not _may_be_call(text[start:])):
        return None
    end = _end_of_json(text, start)
    value = _value(text[start:end])
    calls = [_as_call(item, tools) for item in (value if isinstance(value, list) else [value])]
    return ([call for call in calls if call], end) if calls and all(calls) else None


def _may_be_call(text: str) -> bool:
    begun = "".join(text[:64].split()).removeprefix("[")
    return any(key.startswith(begun) or begun.startswith(key) for key in _FIRST_KEYS)


def _end_of_json(text: str, start: int) -> int:
    """Return where brackets are closed again that open at ``start``."""
    depth = 0
    for part in _STRUCTURE.finditer(text, start):
        if part[0] == '"':  # of a string that does not end
            break
        depth += (part[0] in "{[") - (part[0] in "}]")
        if depth == 0:
            return part.end()
    raise Unfinished


def _value(text: str, otherwise: Any = None) -> Any:
    """Return the value of JSON text, or something else if it is malformed or nested too deep."""
    try:
        return json.loads(text, strict=False)  # models write line breaks inside strings
    except (ValueError, RecursionError):
        return otherwise


def _as_call(value: Any, tools: Tools | None = None) -> ToolCall | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    given = [value[key] for key in ("arguments", "parameters") if key in value]
    if tools is not None and (value["name"] not in tools or not given):
        return None
    arguments = given[0] if given else None
    if isinstance(arguments, str):
        arguments = _value(arguments or "null", otherwise=arguments)
    return _call(value["name"], arguments or {}) if isinstance(arguments, dict | None) else None


def _call(name: str, arguments: dict[str, Any]) -> ToolCall:
    return ToolCall(name, arguments, uuid.uuid4().hex[:9])


def _read_function(text: str, start: int, tools: Tools) -> Found:
    function = _FUNCTION.match(text, start)
    if function is None:
        raise Unfinished
    types = tools.get(function[1], {}).get("properties", {})
    arguments = {
        key: written if types.get(key, {}).get("type") == "string" else _value(written, otherwise=written)
        for key, written in _PARAMETER.findall(function[2])
    }
    return [_call(function[1], arguments)], function.end()


def _past(end: str, found: Found, text: str) -> Found:
    """Move past an end; calls count without it too."""
    calls, place = found
    behind = text[place:].lstrip()
    if behind.startswith(end):
        return calls, len(text) - len(behind) + len(end)
    if end.startswith(behind):
        raise Unfinished(found)
    return found
