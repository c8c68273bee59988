"""A tokenizer's chat template, rendered around placeholders; a plain stand-in where there is none."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.passages import Excerpt, Passage
from rag_blockcache.request import Message


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
    """

    written: str
    title: str
    text: str
    escapes: Literal["", "json", "ascii"]

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

    def render(self, messages: Sequence[Message], **options: Any) -> str:
        """Render messages; a system prompt that has no place goes in front of the first other message.

        Raises:
            InvalidInputError: If the template refuses the messages.
        """
        if self.is_plain:
            return self._render_plainly(messages)
        first, *rest = messages
        has_system = first["role"] == "system"
        try:
            rendered = self._apply(messages, **options)
            if not has_system or first["content"] in rendered:
                return rendered
        except TemplateError as error:
            if not has_system:
                raise InvalidInputError(f"the chat template refuses these messages: {error}") from error
        content = f"{first['content']}\n\n{rest[0].get('content') or ''}"
        return self.render([{**rest[0], "content": content}, *rest[1:]], **options)

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
        places = [(rendered.find(mark), len(mark)) for mark in (titles[0], texts[0]) if mark in rendered]
        start, (last, length) = min(places)[0], max(places)
        quoted = self._render_documents([""], ['"é'])
        escapes: Literal["", "json", "ascii"] = "ascii" if '\\"\\u00e9' in quoted else ""
        escapes = "json" if '\\"é' in quoted else escapes
        return DocumentShape(rendered[start : last + length], titles[0], texts[0], escapes)

    def _render_documents(self, titles: Sequence[str], texts: Sequence[str]) -> str:
        documents = [{"title": title, "text": text} for title, text in zip(titles, texts, strict=True)]
        return self.render([{"role": "user", "content": "?"}], documents=documents)

    def _apply(self, messages: Sequence[Message], **options: Any) -> str:
        return self._tokenizer.apply_chat_template(  # type: ignore[return-value]
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True, **options
        )

    def _render_plainly(self, messages: Sequence[Message]) -> str:
        bos, first = self._tokenizer.bos_token_id, self._tokenizer("x").input_ids[:1]
        start = str(self._tokenizer.bos_token) if bos is not None and first == [bos] else ""
        return start + "\n\n".join(message.get("content") or "" for message in messages) + "\nAnswer:"

    def _strips_messages(self) -> bool:
        spaced = f" {Marks().add('')} "
        try:
            return spaced not in self._apply([{"role": "user", "content": spaced}])
        except TemplateError:
            return False
