"""A tokenizer's chat template, rendered around placeholders; a plain stand-in where there is none."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rag_blockcache.chat_messages import (
    arrangements,
    fitted,
    uses_tools,
    with_calls_apart,
    with_calls_as_text,
    with_content,
    with_short_ids,
    with_tools_shown,
)
from rag_blockcache.errors import InvalidInputError
from rag_blockcache.passages import Excerpt, Passage
from rag_blockcache.request import Message
from rag_blockcache.tool_calls import HERMES, CallForm
from rag_blockcache.tool_support import ToolSupport, find_tool_support

# A template is a program: what it was not written for may fail anywhere in it.
_REFUSALS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class Marks:
    """Placeholders in one rendering that no text can hold by chance or intent, and what each stands for."""

    def __init__(self) -> None:
        self._nonce = secrets.token_hex(8)
        self.texts: list[str | Passage | Excerpt] = []

    def add(self, text: str | Passage | Excerpt) -> str:
        """Return a placeholder for a text."""
        self.texts.append(text)
        return f"MARK{self._nonce}N{len(self.texts) - 1}E"

    def split(self, rendered: str) -> list[str]:
        """Return what a template wrote at even places, and the index of a text at odd ones."""
        return re.split(rf"MARK{self._nonce}N(\d+)E", rendered)


@dataclass(frozen=True)
class DocumentShape:
    """What a chat template writes for one of its ``documents``.

    Attributes:
        written: From its title or text, whichever is first, to the other, with marks for both.
        title: The mark of the title.
        text: The mark of the text.
        escapes: How both are written: as they are, or as in JSON strings (of ASCII characters only).
        between: From one document to the next.
    """

    written: str
    title: str
    text: str
    escapes: Literal["", "json", "ascii"]
    between: str

    def fill(self, title: str, text: str) -> str:
        """Put a title and a text into their places."""
        marks = f"{self.title}|{self.text}"
        return re.sub(marks, lambda mark: title if mark[0] == self.title else text, self.written)

    def render(self, passage: Passage) -> str:
        """Return the text of one passage as the model reads it."""
        return self.fill(self._escape(passage.title), self._escape(passage.text))

    def _escape(self, text: str) -> str:
        return json.dumps(text, ensure_ascii=self.escapes == "ascii")[1:-1] if self.escapes else text


class ChatTemplate:
    """Renders messages as a tokenizer's template has them.

    What the template has no place for is shown all the same: a message of the system, tools, their calls and
    results, neighbours of one role.

    Args:
        tokenizer: Without a template, messages stand one below the other, and an answer is asked for.

    Attributes:
        is_plain: Whether there is no template.
        strips_messages: Whether the template strips white space around messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.is_plain = tokenizer.chat_template is None
        self.strips_messages = not self.is_plain and self._strips_messages()
        self._tool_supports: dict[bool, ToolSupport] = {}

    @property
    def call_form(self) -> CallForm:
        """How a model writes calls of tools that were shown to it."""
        return HERMES if self.is_plain else self._tool_support(with_tools=True).call_form

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] = (), **options: Any
    ) -> str:
        """Render a chat, and what begins the answer to it.

        The template has its way where it takes the chat. Where it does not, messages of the system become
        part of the user's, neighbours of one role become one message, and calls of tools are written as
        Hermes and Qwen models do.

        Args:
            messages: Each with a role, and content that is a string or None.
            tools: Shown to the model.
            options: Handed to the template.

        Raises:
            InvalidInputError: If the template refuses the messages, or leaves out what one of them says.
        """
        if not all(isinstance(message.get("role"), str) for message in messages):
            raise InvalidInputError('a message has no role; write {"role": "user", "content": ...}')
        if self.is_plain:
            return self._render_plainly(with_tools_shown(with_calls_as_text(messages), tools))
        refusals = []
        for chat, shown in self._versions(messages, tools):
            for arranged in arrangements(chat):
                try:
                    rendered = self._apply(arranged, tools=shown or None, **options)
                    self._check_shown(chat, rendered)
                    return rendered
                except InvalidInputError as error:
                    refusals.append(error)
        raise refusals[0]

    def _versions(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[Sequence[Message], list[Mapping[str, Any]]]]:
        """Return ways to show tools and their calls, with the tools that the template is to show."""
        if not tools and not uses_tools(messages):
            yield with_content(messages), []
            return
        support = self._tool_support(with_tools=bool(tools))
        native = list(tools) if support.has_tools else []
        described = messages if native else with_tools_shown(messages, tools)
        if support.has_calls:
            numbered = with_short_ids(described)
            for chat in (described, numbered, with_calls_apart(numbered)):
                yield fitted(chat, takes_json=support.takes_json), native
        yield with_calls_as_text(described), native

    def _tool_support(self, *, with_tools: bool) -> ToolSupport:
        if with_tools not in self._tool_supports:
            self._tool_supports[with_tools] = find_tool_support(self._apply, with_tools=with_tools)
        return self._tool_supports[with_tools]

    @staticmethod
    def _check_shown(messages: Sequence[Message], rendered: str) -> None:
        for number, message in enumerate(messages, start=1):
            if (message.get("content") or "").strip() not in rendered:
                raise InvalidInputError(
                    f"the chat template leaves out what message {number} says, of role {message['role']!r}; "
                    "use another role or another template"
                )

    def shape_of_documents(self) -> DocumentShape:
        """Find out what the template writes for one document.

        Raises:
            InvalidInputError: If there is no template, or it does not show documents.
        """
        if self.is_plain:
            raise InvalidInputError(
                "passage format 'template' needs a chat template, and this tokenizer has none"
            )
        marks = Marks()
        titles, texts = ([marks.add("") for _ in range(2)] for _ in range(2))
        rendered = self._render_documents(titles, texts)
        if not all(text in rendered for text in texts):
            raise InvalidInputError(
                "this chat template does not show documents; use passage format 'paper' or 'plain' instead"
            )
        (start, end), (next_start, _) = (
            _span(rendered, marks_of_one) for marks_of_one in zip(titles, texts, strict=True)
        )
        quoted = self._render_documents([""], ['"é'])
        escapes: Literal["", "json", "ascii"] = "ascii" if '\\"\\u00e9' in quoted else ""
        escapes = "json" if '\\"é' in quoted else escapes
        written, between = rendered[start:end], rendered[end:next_start]
        return DocumentShape(written, titles[0], texts[0], escapes, between)

    def _render_documents(self, titles: Sequence[str], texts: Sequence[str]) -> str:
        documents = [{"title": title, "text": text} for title, text in zip(titles, texts, strict=True)]
        return self.render([{"role": "user", "content": "?"}], documents=documents)

    def _apply(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **options: Any
    ) -> str:
        try:
            return self._tokenizer.apply_chat_template(  # type: ignore[return-value]
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **options,
            )
        except _REFUSALS as error:
            raise InvalidInputError(f"the chat template refuses these messages: {error}") from error

    def _render_plainly(self, messages: Sequence[Message]) -> str:
        bos, first = self._tokenizer.bos_token_id, self._tokenizer("x").input_ids[:1]
        start = str(self._tokenizer.bos_token) if bos is not None and first == [bos] else ""
        return start + "\n\n".join(message.get("content") or "" for message in messages) + "\nAnswer:"

    def _strips_messages(self) -> bool:
        spaced = f" {Marks().add('')} "
        try:
            return spaced not in self._apply([{"role": "user", "content": spaced}])
        except InvalidInputError:
            return False


def _span(rendered: str, marks: Iterable[str]) -> tuple[int, int]:
    """Return from where to where the marks of one document reach; a template may leave some out."""
    places = [(rendered.find(mark), len(mark)) for mark in marks if mark in rendered]
    (start, _), (last, length) = min(places), max(places)
    return start, last + length
