"""Chat template to segments: preamble, passages, final block, each tokenized on its own.

The template is rendered once around placeholders, then cut at them. What a user wrote (a question, a passage,
a message) is encoded as plain text, so a control token spelled inside it stays text. Passages are encoded
alone, which makes their tokens the same offline and online.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.passages import Passage

Message = Mapping[str, str]
_MARK = re.compile(r"RBCMARK(\d+)X")
_ANCHOR = "\n"  # in front of a text whose tokenizer would add a space before it


@dataclass(frozen=True)
class Segment:
    """A run of prompt tokens that is encoded as one.

    Attributes:
        kind: ``passage`` for a block; ``text`` for everything that is computed or the preamble.
        token_ids: Its tokens.
    """

    kind: Literal["text", "passage"]
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class PassageFormat:
    """How passages and question are put to the model.

    Attributes:
        name: To choose it by.
        instruction: Stands before the passages.
        passage: One passage that has a title; ``{title}`` and ``{text}`` are filled in.
        untitled: One passage that has none.
        question: Stands after the passages; ``{question}`` is filled in.
    """

    name: str
    instruction: str
    passage: str
    untitled: str
    question: str

    def render(self, passage: Passage) -> str:
        """Return the text of one passage as the model reads it."""
        template = self.passage if passage.title else self.untitled
        return template.replace("{title}", passage.title, 1).replace("{text}", passage.text, 1)


# The prompt that the released Block-Attention models were trained with, to the letter (arXiv 2409.15355).
PAPER = PassageFormat(
    name="paper",
    instruction=(
        "You are an intelligent AI assistant. Please answer questions based on the user's instructions. "
        "Below are some reference documents that may help you in answering the user's question.\n\n"
    ),
    passage="- Title: {title}\n{text}\n",
    untitled="- {text}\n",
    question=(
        "\n\nPlease write a high-quality answer for the given question using only the provided search "
        "documents (some of which might be irrelevant).\nQuestion: {question}\n"
    ),
)
PLAIN = PassageFormat(
    name="plain",
    instruction="Answer the question from these passages.\n\n",
    passage="{title}\n{text}\n\n",
    untitled="{text}\n\n",
    question="Question: {question}",
)
# Hands the passages to a chat template that reads ``documents=`` (Granite, Command R); see ``Prompt``.
TEMPLATE = PassageFormat(name="template", instruction="", passage="", untitled="", question="{question}")
FORMATS = {chosen.name: chosen for chosen in (PAPER, PLAIN, TEMPLATE)}


@dataclass
class _Marks:
    """Placeholders in a rendering, and the user's text that each stands for."""

    texts: list[str | Passage] = field(default_factory=list)

    def add(self, text: str | Passage) -> str:
        self.texts.append(text)
        return f"RBCMARK{len(self.texts) - 1}X"


class Prompt:
    """Makes prompts for one tokenizer in one format.

    Args:
        tokenizer: The model's; its chat template is applied, if it has one.
        passage_format: Name in ``FORMATS``, or a format of your own.
        preamble: Text before the passages instead of the format's instruction; None keeps that.

    Raises:
        InvalidInputError: If the format is unknown, or asks for a template that reads ``documents`` and
            the tokenizer has none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        passage_format: str | PassageFormat = PAPER,
        preamble: str | None = None,
    ) -> None:
        if isinstance(passage_format, str):
            if passage_format not in FORMATS:
                raise InvalidInputError(
                    f"passage format {passage_format!r} is unknown; use one of {sorted(FORMATS)}"
                )
            passage_format = FORMATS[passage_format]
        self._tokenizer = tokenizer
        self.format = passage_format
        self.preamble = passage_format.instruction if preamble is None else preamble
        self._adds_space = _adds_space(tokenizer)
        self._encode_passage = lru_cache(maxsize=16384)(self._encode_text)
        self._wrapper = self._passage_in_template() if passage_format.name == TEMPLATE.name else None

    def passage_tokens(self, passage: Passage) -> tuple[int, ...]:
        """Return the tokens of a passage, as they stand in every prompt."""
        return self._encode_passage(self._shown(passage))

    def segments(
        self,
        question: str,
        passages: Sequence[Passage],
        *,
        system_prompt: str | None = None,
        chat_history: Sequence[Message] = (),
        tools: Sequence[Any] | None = None,
    ) -> list[Segment]:
        """Cut one prompt into segments, in the order of the prompt.

        Args:
            question: What to answer.
            passages: Blocks, in the order in which the model reads them; may be empty.
            system_prompt: Of the chat template; a template without a place for one gets it in front of the
                first message.
            chat_history: Earlier messages, ``{"role": ..., "content": ...}`` each.
            tools: Handed to the chat template.

        Returns:
            The first segment is the preamble (possibly empty), the last the final block; between them the
            passages, and whatever a template writes between those.

        Raises:
            InvalidInputError: If the question is empty, or the template refuses the messages.
        """
        if not isinstance(question, str) or not question.strip():
            raise InvalidInputError("the question is empty; ask something")
        marks = _Marks()
        rendered = self._render(marks, question, passages, system_prompt, chat_history, tools)
        return self._cut(rendered, marks)

    def text_tokens(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a text that continues a prompt; control tokens in it are text."""
        return self._encode_text(text)

    def _shown(self, passage: Passage) -> str:
        if self._wrapper is None:
            return self.format.render(passage)
        template, escapes = self._wrapper
        title, text = (json.dumps(part)[1:-1] if escapes else part for part in (passage.title, passage.text))
        return _MARK.sub(lambda mark: title if mark[1] == "0" else text, template)

    def _render(
        self,
        marks: _Marks,
        question: str,
        passages: Sequence[Passage],
        system_prompt: str | None,
        chat_history: Sequence[Message],
        tools: Sequence[Any] | None,
    ) -> str:
        head = [{"role": "system", "content": marks.add(system_prompt)}] if system_prompt else []
        history = [{**message, "content": marks.add(_content(message))} for message in chat_history]
        asked = self.format.question.replace("{question}", question, 1)
        shown = "" if self._wrapper is not None else "".join(marks.add(passage) for passage in passages)
        user = (marks.add(self.preamble) if self.preamble else "") + shown + marks.add(asked)
        messages = [*head, *history, {"role": "user", "content": user}]
        if self._tokenizer.chat_template is None:
            return self._render_plainly(messages)
        options: dict[str, Any] = {"tools": list(tools)} if tools else {}
        documents = [{"title": marks.add(""), "text": marks.add(passage)} for passage in passages]
        if self._wrapper is not None:
            options["documents"] = documents
        try:
            rendered = self._apply(messages, **options)
        except TemplateError as error:
            if not head:
                raise InvalidInputError(f"the chat template refuses these messages: {error}") from error
            first = messages[1]
            messages = [{**first, "content": f"{head[0]['content']}\n\n{first['content']}"}, *messages[2:]]
            rendered = self._apply(messages, **options)
        return rendered if self._wrapper is None else self._unwrap(rendered, documents)

    def _unwrap(self, rendered: str, documents: Sequence[Mapping[str, str]]) -> str:
        """Leave only the placeholder of each document: what stands around title and text is in its block."""
        assert self._wrapper is not None
        for document in documents:
            wrapped = (
                self._wrapper[0]
                .replace("RBCMARK0X", document["title"])
                .replace("RBCMARK1X", document["text"])
            )
            rendered = rendered.replace(wrapped, document["text"])
        return rendered

    def _apply(self, messages: list[dict[str, str]], **options: Any) -> str:
        return self._tokenizer.apply_chat_template(  # type: ignore[return-value]
            messages, tokenize=False, add_generation_prompt=True, **options
        )

    def _render_plainly(self, messages: list[dict[str, str]]) -> str:
        """Stand in for the template that a base model does not have."""
        start = self._tokenizer("x").input_ids[0] == self._tokenizer.bos_token_id
        bos = self._tokenizer.bos_token if start and self._tokenizer.bos_token_id is not None else ""
        return bos + "\n\n".join(message["content"] for message in messages) + "\nAnswer:"

    def _cut(self, rendered: str, marks: _Marks) -> list[Segment]:
        segments: list[Segment] = []
        text: list[int] = []
        pieces = _MARK.split(rendered)
        for index, piece in enumerate(pieces):
            if index % 2 == 0:  # written by the template
                text += self._encode(piece, is_start=index == 0, control=True)
                continue
            content = marks.texts[int(piece)]
            if isinstance(content, str):
                text += self._encode(content, is_start=False, control=False)
                continue
            if text or not segments:
                segments.append(Segment("text", tuple(text)))
                text = []
            segments.append(Segment("passage", self.passage_tokens(content)))
        if not segments:  # no passages: the preamble ends where they would stand
            segments.append(Segment("text", ()))
        return [*segments, Segment("text", tuple(text))]

    def _encode_text(self, text: str) -> tuple[int, ...]:
        return tuple(self._encode(text, is_start=False, control=False))

    def _encode(self, text: str, *, is_start: bool, control: bool) -> list[int]:
        if not text:
            return []
        if is_start or not self._adds_space:
            return self._raw(text, control)
        anchor, anchored = self._raw(_ANCHOR, control), self._raw(_ANCHOR + text, control)
        return anchored[len(anchor) :] if anchored[: len(anchor)] == anchor else self._raw(text, control)

    def _raw(self, text: str, control: bool) -> list[int]:
        if control:
            return list(self._tokenizer(text, add_special_tokens=False).input_ids)
        return list(self._tokenizer._encode_without_added_tokens(text))

    def _passage_in_template(self) -> tuple[str, bool]:
        """Return what a template writes for one document, and whether it escapes it as JSON."""
        if self._tokenizer.chat_template is None:
            raise InvalidInputError(
                "passage format 'template' needs a chat template, and this tokenizer has none"
            )
        documents = [{"title": f"RBCMARK{2 * i}X", "text": f"RBCMARK{2 * i + 1}X"} for i in range(2)]
        ask = [{"role": "user", "content": "?"}]
        rendered = self._apply(ask, documents=documents)
        found = re.search(r"(?:RBCMARK0X.*)?RBCMARK1X", rendered, re.DOTALL)
        if found is None or "RBCMARK3X" not in rendered:
            raise InvalidInputError(
                "this chat template does not show documents; use passage format 'paper' or 'plain' instead"
            )
        quoted = self._apply(ask, documents=[{"title": "", "text": '"'}])
        return found[0], '\\"' in quoted


def _content(message: Message) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise InvalidInputError(
            f"a chat message needs its content as a string, got {type(content).__name__}; "
            "join its text parts first"
        )
    return content


def _adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer puts a space before a text, as SentencePiece tokenizers do."""
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False).input_ids[:1])
    return bool(first) and first[0][:1] in ("\u2581", "\u0120")
