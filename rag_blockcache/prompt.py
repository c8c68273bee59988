"""Requests to segments: preamble, passages, final block and what stands between, each tokenized on its own.

The chat template is rendered once around placeholders, then cut at them. What a user wrote (a question, a
passage, a message) is encoded as plain text, so a control token spelled inside it stays text. Passages are
encoded alone, which makes their tokens the same offline and online.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, takewhile
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from rag_blockcache.chat_template import ChatTemplate, Marks
from rag_blockcache.errors import InvalidInputError
from rag_blockcache.passage_format import PAPER, TEMPLATE, PassageFormat, format_named
from rag_blockcache.passages import Excerpt, Passage, as_passages
from rag_blockcache.plain_text import TextEncoder
from rag_blockcache.request import Chat, Message, Text

Content = str | Passage | Excerpt
Split = Callable[[str], Sequence[str | Excerpt]]  # parts a text at the known passages in it


@dataclass(frozen=True)
class Segment:
    """A run of prompt tokens that is encoded as one.

    Attributes:
        kind: ``passage`` for a block; ``text`` for everything that is computed or the preamble.
        token_ids: Its tokens.
        whole: Of a passage that is cut at its end, the tokens of all of it, which name its block.
        text: Of a passage, by which it is known again in other prompts.
    """

    kind: Literal["text", "passage"]
    token_ids: tuple[int, ...]
    whole: tuple[int, ...] = ()
    text: str = ""

    @property
    def block_tokens(self) -> tuple[int, ...]:
        """Tokens of the block that the segment is the beginning of."""
        return self.whole or self.token_ids


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

    def run_of_passages(self, passages: Sequence[Passage]) -> tuple[int, ...]:
        """Return the tokens of passages one behind the other, as a prompt of nothing else would begin."""
        if self._shape is None:
            separator = self._encoder.text(self.format.separator)
        else:
            separator = self._encoder.template(self._shape.between)
        runs = ((*self.passage_tokens(passage), *separator) for passage in passages)
        return tuple(chain(self._encoder.template(self._encoder.start, is_start=True), *runs))

    def text_tokens(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a text that continues a prompt; control tokens in it are text."""
        return tuple(self._encoder.text(text))

    def segments(
        self,
        question: str,
        passages: Sequence[Passage],
        *,
        system_prompt: str | None = None,
        chat_history: Sequence[Message] = (),
        tools: Sequence[Any] | None = None,
    ) -> list[Segment]:
        """Cut the prompt of a question into segments, in the order of the prompt.

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
            passages, and whatever stands between those.

        Raises:
            InvalidInputError: If the question is empty, the template refuses the messages, or a control
                token stands where a template shows text as it is (tools, roles, tool calls).
        """
        if not isinstance(question, str) or not question.strip():
            raise InvalidInputError("the question is empty; ask something")
        system: list[Message] = [{"role": "system", "content": system_prompt}] if system_prompt else []
        messages = [self._message(message) for message in (*system, *chat_history)]
        shown, documents = (passages, ()) if self._shape is None else ((), passages)
        user = [self.preamble, *self._separated(shown), self.format.ask(question)]
        messages.append(({"role": "user"}, self._stripped(user)))
        return self._chat_segments(messages, documents, tools)

    def chat_segments(self, chat: Chat, split: Split) -> list[Segment]:
        """Cut the prompt of a chat into segments, parted at known passages; see ``segments``.

        Args:
            chat: Messages; documents that are not in them are put before the last one of the user.
            split: Finds passages in the content of a message.

        Raises:
            InvalidInputError: If there are no messages, or as for ``segments``.
        """
        if not chat.messages:
            raise InvalidInputError("the chat has no messages; add one of the user at least")
        messages = [self._message(message, split) for message in chat.messages]
        texts = [str(message.get("content") or "") for message in chat.messages]
        missing = _missing(chat.documents, texts)
        if missing and self._shape is None:
            of_user = [i for i, message in enumerate(chat.messages) if message.get("role") == "user"]
            place = of_user[-1] if of_user else len(messages) - 1
            message, contents = messages[place]
            contents = [self.preamble, *self._separated(missing), *(contents or ())]
            messages[place] = (message, self._stripped(contents))
        tools = () if chat.tool_choice == "none" else chat.tools
        return self._chat_segments(messages, () if self._shape is None else missing, tools)

    def text_segments(self, text: Text, split: Split) -> list[Segment]:
        """Cut a prompt that is to be continued into segments, parted at known passages; see ``segments``.

        Raises:
            InvalidInputError: If the prompt is empty.
        """
        if not isinstance(text.prompt, str) or not text.prompt.strip():
            raise InvalidInputError("the prompt is empty; write something to be continued")
        contents: list[Content] = [content for content in split(text.prompt) if content]
        if isinstance(contents[-1], Excerpt):  # something must be computed, or there is nothing to go on from
            contents[-1] = contents[-1].shown
        if missing := _missing(text.documents, [text.prompt]):
            contents = [self.preamble, *self._separated(missing), *contents]
        start = self._encoder.start
        if start and not text.prompt.startswith(start):
            contents.insert(0, start)
        starts = (0, 1) if contents[0] == start else (0,)
        return self._parted((content, True, index in starts) for index, content in enumerate(contents))

    # What messages hold

    def _separated(self, passages: Iterable[Passage]) -> list[Content]:
        return [content for passage in passages for content in (passage, self.format.separator)]

    def _stripped(self, contents: Sequence[Content]) -> list[Content]:
        """Take off the white space at both ends that a template strips, and what is empty then."""
        kept = [content for content in contents if content]
        while self._template.strips_messages and kept and isinstance(kept[0], str):
            kept[0] = kept[0].lstrip()
            if kept[0]:
                break
            del kept[0]
        while self._template.strips_messages and kept and isinstance(kept[-1], str):
            kept[-1] = kept[-1].rstrip()
            if kept[-1]:
                break
            del kept[-1]
        return kept

    def _message(self, message: Message, split: Split | None = None) -> tuple[Message, list[Content] | None]:
        """Return a message without its content, and the content in parts; None if it has none."""
        others = {name: value for name, value in message.items() if name != "content"}
        self._refuse_control(others)
        content = message.get("content")
        if content is None:
            return others, None
        if not isinstance(content, str):
            raise InvalidInputError(
                f"a chat message needs its content as a string, got {type(content).__name__}; "
                "join its text parts first"
            )
        return others, self._stripped([content] if split is None else split(content))

    def _refuse_control(self, value: Any) -> None:
        """Refuse control tokens in what a template shows as it is."""
        written = json.dumps(value, ensure_ascii=False, default=str)
        for token in self._encoder.control:
            if token in written:
                raise InvalidInputError(
                    f"{token!r} is a control token of this model, and stands in a tool, a role or a call; "
                    "remove it there"
                )

    # Rendering

    def _chat_segments(
        self,
        messages: Sequence[tuple[Message, list[Content] | None]],
        documents: Sequence[Passage],
        tools: Sequence[Any] | None,
    ) -> list[Segment]:
        """Render messages around marks for their contents, and part what comes out."""
        marks = Marks()
        marked = [
            {**message, "content": None if contents is None else "".join(map(marks.add, contents))}
            for message, contents in messages
        ]
        num_contents, num_last = len(marks.texts), len(messages[-1][1] or ())
        self._refuse_control(tools)
        options = {"tools": list(tools)} if tools else {}
        if documents or self._shape is not None:
            rendered = self._render_documents(marks, marked, documents, options)
        else:
            rendered = self._template.render(marked, **options)
        pieces = marks.split(rendered)
        needed = {index for index, content in enumerate(marks.texts) if isinstance(content, Passage)}
        needed |= set(range(num_contents - num_last, num_contents))  # of the last message: the question
        if not needed <= {int(index) for index in pieces[1::2]}:
            raise InvalidInputError("the chat template leaves out the question or a passage; use another one")
        contents = self._contents(pieces, marks.texts)
        # A base model's prompt starts with a text, behind nothing but a token that begins it.
        starts = (0, 1) if self._template.is_plain else (0,)
        return self._parted(
            (content, index % 2 == 0, index in starts) for index, content in enumerate(contents)
        )

    def _render_documents(
        self,
        marks: Marks,
        messages: Sequence[Message],
        passages: Sequence[Passage],
        options: Mapping[str, Any],
    ) -> str:
        """Render passages as documents, each of them one mark, title included."""
        assert self._shape is not None
        documents = [{"title": marks.add(""), "text": marks.add(passage)} for passage in passages]
        rendered = self._template.render(messages, documents=documents, **options)
        for document in documents:  # what stands around title and text is in the block already
            rendered = rendered.replace(
                self._shape.fill(document["title"], document["text"]), document["text"]
            )
        return rendered

    def _contents(self, pieces: Sequence[str], texts: Sequence[Content]) -> list[Content]:
        """Put texts into their places; spaces that a template wrote before them join their first words."""
        contents = [texts[int(piece)] if index % 2 else piece for index, piece in enumerate(pieces)]
        for index in range(1, len(contents), 2):
            before, text = contents[index - 1], contents[index]
            if isinstance(before, str) and isinstance(text, str):
                contents[index - 1] = before.rstrip(" ")
                contents[index] = before[len(before.rstrip(" ")) :] + text
        return contents

    # Encoding

    def _parted(self, contents: Iterable[tuple[Content, bool, bool]]) -> list[Segment]:
        """Encode contents, and part them at passages.

        Args:
            contents: Each with whether a template wrote it, so that control tokens in it count, and whether
                the prompt starts with it.
        """
        segments: list[Segment] = []
        tokens: list[int] = []
        for content, is_template, is_start in contents:
            if isinstance(content, str):
                encode = self._encoder.template if is_template else self._encoder.text
                tokens += encode(content, is_start=is_start)
                continue
            block, cut_off = self._block(content)
            if block.token_ids:
                if tokens or not segments:
                    segments.append(Segment("text", tuple(tokens)))
                segments.append(block)
                tokens = []
            tokens += cut_off
        if not segments:  # no passages: the preamble ends where they would stand
            segments.append(Segment("text", ()))
        return [*segments, Segment("text", tuple(tokens))]

    def _block(self, content: Passage | Excerpt) -> tuple[Segment, tuple[int, ...]]:
        """Return the segment that a block can fill, and the tokens behind it that are computed.

        A passage that is cut may end within a token of the whole, so the two share their tokens but for the
        last few.
        """
        if isinstance(content, Passage):
            return Segment("passage", self.passage_tokens(content), text=content.text), ()
        whole = self._encode_passage(content.whole)
        if content.shown == content.whole:
            return Segment("passage", whole, text=content.whole), ()
        shown = tuple(self._encoder.text(content.shown))
        pairs = takewhile(lambda pair: pair[0] == pair[1], zip(shown, whole, strict=False))
        num_shared = sum(1 for _ in pairs)
        return Segment("passage", shown[:num_shared], whole, content.whole), shown[num_shared:]


def _missing(documents: Iterable[str | Passage], texts: Sequence[str]) -> list[Passage]:
    """Return those documents that stand in none of the texts."""
    passages = as_passages(documents)
    return [passage for passage in passages if not any(passage.text.strip() in text for text in texts)]
