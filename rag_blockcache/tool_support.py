"""What a chat template does with tools, found out by rendering chats that use one."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.request import Message
from rag_blockcache.tool_call_reader import parse_tool_calls
from rag_blockcache.tool_calls import HERMES, CallForm


@dataclass(frozen=True)
class ToolSupport:
    """How a chat template shows tools.

    Attributes:
        has_tools: Whether it shows which tools there are.
        has_calls: Whether it shows calls and their results.
        takes_json: Whether it takes arguments as JSON text, rather than as a mapping.
        call_form: How a model writes calls of the tools that it is shown.
    """

    has_tools: bool
    has_calls: bool
    takes_json: bool = False
    call_form: CallForm = HERMES


def find_tool_support(render: Callable[..., str], *, with_tools: bool) -> ToolSupport:
    """Find out what a template does with tools.

    One whose calls we could not read is not used for tools at all, because a model would answer in its way.

    Args:
        render: Renders messages as the template does, with its options; raises ``InvalidInputError`` where
            the template refuses them.
        with_tools: Whether tools are handed to the template, as some have another one for that case.
    """
    probe = _Probe(render, with_tools)
    has_tools, is_unreadable = probe.shows_tools([]), False
    for takes_json in (False, True):
        use = probe.use(takes_json)
        written = probe.written_call(use)
        if written and probe.is_read(written):
            has_tools = has_tools and probe.shows_tools(use)
            form = probe.call_form(written) if has_tools else None
            return ToolSupport(has_tools, True, takes_json, form or HERMES)
        is_unreadable |= bool(written)
    return ToolSupport(has_tools and not is_unreadable, False)


class _Probe:
    """A chat in which a tool is called, and whose words are known again wherever a template writes them."""

    def __init__(self, render: Callable[..., str], with_tools: bool) -> None:
        self.name, self.other, self.key, self.value, self.result, self.said = (
            f"probe{secrets.token_hex(8)}" for _ in range(6)
        )
        parameters = {"type": "object", "properties": {self.key: {"type": "string"}}, "required": [self.key]}
        self.tools = [
            {
                "type": "function",
                "function": {"name": name, "description": "Tells.", "parameters": parameters},
            }
            for name in (self.name, self.other)
        ]
        self.asked: list[Message] = [{"role": "user", "content": "What?"}]
        self._render = partial(render, tools=self.tools) if with_tools else render

    def shows_tools(self, behind: Sequence[Message]) -> bool:
        try:
            rendered = self._render([*self.asked, *behind])
        except InvalidInputError:
            return False
        return self.name in rendered and self.other in rendered and self.key in rendered

    def use(self, takes_json: bool) -> list[Message]:
        """Return a call of one of the tools, and its result."""
        arguments = f'{{"{self.key}": "{self.value}"}}' if takes_json else {self.key: self.value}
        function = {"name": self.name, "arguments": arguments}
        calls = [{"type": "function", "id": "probe0001", "function": function}]
        return [
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "probe0001", "name": self.name, "content": self.result},
        ]

    def written_call(self, use: Sequence[Message]) -> str:
        """Return the call as the template writes it; empty if the call or its result is lost."""
        try:
            written, rendered = self._written(use[0]), self._render([*self.asked, *use])
        except InvalidInputError:
            return ""
        is_shown = self.name in written and self.value in written and self.result in rendered
        return written if is_shown else ""

    def is_read(self, written: str) -> bool:
        """Return whether the call would be found where a model has written it."""
        _, calls = parse_tool_calls(written, self.tools)
        return [(call.name, call.arguments) for call in calls] == [(self.name, {self.key: self.value})]

    def call_form(self, written: str) -> CallForm | None:
        """Return what stands around name and arguments; None if the arguments are not in JSON."""
        text, _ = parse_tool_calls(written, self.tools)  # in front of the call: the role, an empty thought
        arguments = rf'\{{\s*"{self.key}":\s*"{self.value}"\s*\}}'
        form = rf"\s*{re.escape(text)}\s*(.*?){self.name}(.*?){arguments}(.*)"
        parts = re.fullmatch(form, written, re.DOTALL)
        return None if parts is None else CallForm(*parts.groups())

    def _written(self, message: Message) -> str:
        """Return what the template writes for an answer, without the end of the turn."""
        said: Message = {"role": "assistant", "content": self.said}
        end = self._render([*self.asked, said], add_generation_prompt=False).partition(self.said)[2]
        whole = self._render([*self.asked, message], add_generation_prompt=False)
        start = self._render(self.asked)
        if not whole.startswith(start):
            start = self._render(self.asked, add_generation_prompt=False)
        return whole.removeprefix(start).removesuffix(end)
