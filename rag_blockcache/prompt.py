"""Chat template to segments: preamble, passages, final block, each tokenized on its own.

The template is rendered once around placeholders, then cut at them. What a user wrote (a question, a passage,
a message) is encoded as plain text, so a control token spelled inside it stays text. Passages are encoded
alone, which makes their tokens the same offline and online.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from rag_blockcache.chat_template import ChatTemplate, Marks, Message
from rag_blockcache.errors import InvalidInputError
from rag_blockcache.passage_format import PAPER, TEMPLATE, PassageFormat, format_named
from rag_blockcache.passages import Passage
from rag_blockcache.plain_text import TextEncoder


@dataclass(frozen=True)
class Segment:
    """A run of prompt tokens that is encoded as one.

    Attributes:
        kind: ``passage`` for a block; ``text`` for everything that is computed or the preamble.
        token_ids: Its tokens.
    """

    kind: Literal["text", "passage"]
    token_ids: tuple[int, ...]


class Prompt:
    """Makes prompts for one tokenizer in one format.

    Args:
        tokenizer: The model's; its chat template is applied, if it has one.
        passage_format: Name in ``passage_format.FORMATS``, or a format of your own.
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
        self._encoder = TextEncoder(tokenizer)
        self._template = ChatTemplate(tokenizer)
        self.format = format_named(passage_format)
        self.preamble = self.format.instruction if preamble is None else preamble
        self._encode_passage = lru_cache(maxsize=4096)(lambda shown: tuple(self._encoder.text(shown)))
        self._shape = self._template.shape_of_documents() if self.format == TEMPLATE else None

    def passage_tokens(self, passage: Passage) -> tuple[int, ...]:
        """Return the tokens of a passage, as they stand in every prompt.

        Raises:
            InvalidInputError: If the tokenizer makes no tokens of it.
        """
        shown = self.format.render(passage) if self._shape is None else self._shape.render(passage)
        token_ids = self._encode_passage(shown)
        if not token_ids:
            raise InvalidInputError(f"the tokenizer makes no tokens of passage {shown[:40]!r}; leave it out")
        return token_ids

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
            chat_history: Earlier messages, ``{"role": ..., "content": ...}`` each. Content may be None,
                as in a message that only calls tools.
            tools: Handed to the chat template.

        Returns:
            The first segment is the preamble (possibly empty), the last the final block; between them the
            passages, and whatever a template writes between those.

        Raises:
            InvalidInputError: If the question is empty, the template refuses the messages, or a control
                token stands where a template shows text as it is (tools, roles, tool calls).
        """
        if not isinstance(question, str) or not question.strip():
            raise InvalidInputError("the question is empty; ask something")
        marks = Marks()
        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        messages = [self._marked_message(marks, message) for message in (*system, *chat_history)]
        user = self._user_marks(marks, question, passages if self._shape is None else ())
        messages.append({"role": "user", "content": "".join(user)})
        self._refuse_control(tools)
        options = {"tools": list(tools)} if tools else {}
        if self._shape is None:
            rendered, needed = self._template.render(messages, **options), user
        else:
            rendered, documents = self._render_documents(marks, messages, passages, options)
            needed = user + documents
        if not all(mark in rendered for mark in needed):
            raise InvalidInputError("the chat template leaves out the question or a passage; use another one")
        return self._cut(marks.split(rendered), marks.texts)

    def text_tokens(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a text that continues a prompt; control tokens in it are text."""
        return tuple(self._encoder.text(text))

    def _user_marks(self, marks: Marks, question: str, passages: Sequence[Passage]) -> list[str]:
        """Mark what stands in the message of the user, without the white space that a template strips."""
        preamble, asked = self.preamble, self.format.ask(question)
        if self._template.strips_messages:
            preamble, asked = preamble.lstrip(), asked.rstrip()
            asked = asked if preamble or passages else asked.lstrip()
        contents: list[str | Passage] = [preamble, *passages, asked]
        return [marks.add(content) for content in contents if content]

    def _marked_message(self, marks: Marks, message: Message) -> Message:
        self._refuse_control({name: value for name, value in message.items() if name != "content"})
        content = message.get("content")
        if content is None:
            return message
        if not isinstance(content, str):
            raise InvalidInputError(
                f"a chat message needs its content as a string, got {type(content).__name__}; "
                "join its text parts first"
            )
        return {
            **message,
            "content": marks.add(content.strip() if self._template.strips_messages else content),
        }

    def _refuse_control(self, value: Any) -> None:
        """Refuse control tokens in what a template shows as it is."""
        written = json.dumps(value, ensure_ascii=False, default=str)
        for token in self._encoder.control:
            if token in written:
                raise InvalidInputError(
                    f"{token!r} is a control token of this model, and stands in a tool, a role or a call; "
                    "remove it there"
                )

    def _render_documents(
        self,
        marks: Marks,
        messages: Sequence[Message],
        passages: Sequence[Passage],
        options: Mapping[str, Any],
    ) -> tuple[str, list[str]]:
        """Render passages as documents; return the marks that stand for them, title included."""
        assert self._shape is not None
        documents = [{"title": marks.add(""), "text": marks.add(passage)} for passage in passages]
        rendered = self._template.render(messages, documents=documents, **options)
        for document in documents:  # what stands around title and text is in the block already
            rendered = rendered.replace(
                self._shape.fill(document["title"], document["text"]), document["text"]
            )
        return rendered, [document["text"] for document in documents]

    def _cut(self, pieces: Sequence[str], texts: Sequence[str | Passage]) -> list[Segment]:
        """Encode pieces, written by the template and by users in turn, and part them at passages."""
        segments: list[Segment] = []
        tokens: list[int] = []
        for index, content in enumerate(self._contents(pieces, texts)):
            if isinstance(content, Passage):
                if tokens or not segments:
                    segments.append(Segment("text", tuple(tokens)))
                    tokens = []
                segments.append(Segment("passage", self.passage_tokens(content)))
            elif index % 2 == 0:
                tokens += self._encoder.template(content, is_start=index == 0)
            else:
                # A base model's prompt starts with a text, behind nothing but a token that begins it.
                tokens += self._encoder.text(content, is_start=index == 1 and self._template.is_plain)
        if not segments:  # no passages: the preamble ends where they would stand
            segments.append(Segment("text", ()))
        return [*segments, Segment("text", tuple(tokens))]

    def _contents(self, pieces: Sequence[str], texts: Sequence[str | Passage]) -> list[str | Passage]:
        """Put texts into their places; spaces that a template wrote before them join their first words."""
        contents = [texts[int(piece)] if index % 2 else piece for index, piece in enumerate(pieces)]
        for index in range(1, len(contents), 2):
            before, text = contents[index - 1], contents[index]
            if isinstance(before, str) and isinstance(text, str):
                contents[index - 1] = before.rstrip(" ")
                contents[index] = before[len(before.rstrip(" ")) :] + text
        return contents
