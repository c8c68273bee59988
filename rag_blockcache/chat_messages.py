"""Chats rewritten for templates that do not take them as they are; no content is lost, and order is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

from rag_blockcache.request import Message
from rag_blockcache.tool_calls import HERMES

Tools = Sequence[Mapping[str, Any]]

_INTRODUCTION = """\
# Tools

You can use these tools. Each line describes one, with a JSON schema of its arguments:
<tools>
{tools}
</tools>

To use a tool, write its name and its arguments as JSON between these tags, once for every use, and stop:
{call}
What it returns will be shown to you between <tool_response> and </tool_response>. If no tool helps, answer \
without one."""


def arrangements(messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """Return a chat as it is, then as templates take it that have rules for the order of roles."""
    yield messages
    yield merged(messages)
    for keeps_first in (True, False):
        without_system = system_as_user(messages, keeps_first=keeps_first)
        yield without_system
        yield merged(without_system)
    yield [{"role": "user", "content": ""}, *merged(without_system)]


def merged(messages: Sequence[Message]) -> list[Message]:
    """Join neighbours of one role into one message; results of tools stay apart."""
    made: list[Message] = []
    for message in messages:
        if made and made[-1]["role"] == message["role"] != "tool":
            made[-1] = _joined(made[-1], message)
        else:
            made.append(message)
    return made


def system_as_user(messages: Sequence[Message], *, keeps_first: bool) -> list[Message]:
    """Let the user say what the system says, in front of what the user says next.

    Args:
        messages: The chat.
        keeps_first: Whether a message of the system that opens the chat stays one.
    """
    made: list[Message] = []
    is_behind_system = False
    for index, message in enumerate(messages):
        is_system = message["role"] == "system" and not (keeps_first and index == 0)
        said = {**message, "role": "user"} if is_system else message
        if is_behind_system and said["role"] == "user":
            made[-1] = _joined(made[-1], said)
        else:
            made.append(said)
        is_behind_system = is_system
    return made


def _joined(first: Message, second: Message) -> Message:
    contents = [message["content"] for message in (first, second) if message.get("content")]
    calls = [*(first.get("tool_calls") or ()), *(second.get("tool_calls") or ())]
    return {**first, **second, "content": "\n\n".join(contents), **({"tool_calls": calls} if calls else {})}


def with_content(messages: Sequence[Message]) -> list[Message]:
    """Let messages without content say nothing, which templates would write as ``None``."""
    return [{**message, "content": message.get("content") or ""} for message in messages]


# Calls of tools


def uses_tools(messages: Sequence[Message]) -> bool:
    """Return whether tools were called in a chat."""
    return any(message.get("tool_calls") or message["role"] == "tool" for message in messages)


def fitted(messages: Sequence[Message], *, takes_json: bool) -> list[Message]:
    """Write calls as a template takes them.

    Args:
        messages: The chat.
        takes_json: Whether arguments are wanted as JSON text, rather than as a mapping.
    """
    made = []
    for message in with_content(messages):
        calls = [_fitted_call(call, takes_json) for call in message.get("tool_calls") or ()]
        made.append({**message, "tool_calls": calls} if calls else message)
    return made


def _fitted_call(call: Mapping[str, Any], takes_json: bool) -> Mapping[str, Any]:
    function = call.get("function", call)
    if "arguments" not in function:
        return call
    arguments = arguments_of(call)
    written = json.dumps(arguments, ensure_ascii=False) if takes_json else arguments
    made = {**function, "arguments": written}
    return {**call, "function": made} if "function" in call else made


def with_short_ids(messages: Sequence[Message]) -> list[Message]:
    """Give every call an id of nine letters and digits, and every result the id and the name of its call."""
    made: list[Message] = []
    open_calls: list[tuple[Any, str, str]] = []  # id as given, id, name
    num_calls = 0
    for message in messages:
        if calls := message.get("tool_calls"):
            numbered = [(call, f"call{num_calls + i:05}") for i, call in enumerate(calls)]
            num_calls += len(calls)
            open_calls += [(call.get("id"), name, name_of(call)) for call, name in numbered]
            message = {**message, "tool_calls": [{**call, "id": name} for call, name in numbered]}
        elif message["role"] == "tool" and open_calls:
            given = [call for call in open_calls if call[0] == message.get("tool_call_id")]
            answered = (given or open_calls)[0]
            open_calls.remove(answered)
            message = {"name": answered[2], **message, "tool_call_id": answered[1]}
        made.append(message)
    return made


def with_calls_apart(messages: Sequence[Message]) -> list[Message]:
    """Put every call into a message of its own, with its result behind it."""
    made: list[Message] = []
    rest = list(messages)
    while rest:
        message = rest.pop(0)
        calls = message.get("tool_calls")
        if not calls:
            made.append(message)
            continue
        results = list(takewhile(lambda result: result["role"] == "tool", rest))
        del rest[: len(results)]
        if message.get("content"):
            made.append({name: value for name, value in message.items() if name != "tool_calls"})
        for call in calls:
            own = [result for result in results if result.get("tool_call_id") == call.get("id")]
            made += [{**message, "content": None, "tool_calls": [call]}, *own]
            results = [result for result in results if result not in own]
        made += results
    return made


def with_calls_as_text(messages: Sequence[Message]) -> list[Message]:
    """Write calls into what the assistant says, and let the user say the results."""
    made: list[Message] = []
    was_result = False
    for message in messages:
        is_result = message["role"] == "tool"
        said = _result_as_text(message) if is_result else _calls_as_text(message)
        if is_result and was_result:
            made[-1] = {**said, "content": f"{made[-1]['content']}\n{said['content']}"}
        else:
            made.append(said)
        was_result = is_result
    return made


def _result_as_text(message: Message) -> Message:
    content = message.get("content") or ""
    return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}


def _calls_as_text(message: Message) -> Message:
    calls = message.get("tool_calls") or ()
    written = [HERMES.write(name_of(call), arguments_of(call)) for call in calls]
    others = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**others, "content": "\n".join(filter(None, (message.get("content"), *written)))}


def with_tools_shown(messages: Sequence[Message], tools: Tools) -> list[Message]:
    """Describe tools in the first message of the system, which is made if there is none."""
    if not tools:
        return list(messages)
    call = f'{HERMES.before}<name>{HERMES.middle}{{"<argument>": <value>, ...}}{HERMES.after}'
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    shown: Message = {"role": "system", "content": _INTRODUCTION.format(tools=lines, call=call)}
    if messages and messages[0]["role"] == "system":
        return [_joined(messages[0], shown), *messages[1:]]
    return [shown, *messages]


def name_of(call: Mapping[str, Any]) -> str:
    """Return the name of the tool that is called."""
    return str(call.get("function", call).get("name"))


def arguments_of(call: Mapping[str, Any]) -> Any:
    """Return the arguments of a call, read if they were given as JSON text."""
    arguments = call.get("function", call).get("arguments")
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments or {}
    except ValueError:
        return arguments
