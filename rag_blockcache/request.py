"""What can be asked: a question over passages, a chat, or a prompt that somebody else has put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rag_blockcache.passages import Passage

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """A question over passages, which are shown in the passage format of the cache.

    Attributes:
        question: Without a chat template; the tokenizer's is applied.
        passages: Texts to answer from, in the order in which the model reads them; may be empty.
        system_prompt: Goes where the chat template has it.
        chat_history: Earlier messages.
        tools: Handed to the chat template.
    """

    question: str
    passages: Sequence[str | Passage] = ()
    system_prompt: str | None = None
    chat_history: Sequence[Message] = ()
    tools: Sequence[Any] | None = None


@dataclass(frozen=True)
class Chat:
    """Messages, in which known passages are found by their text wherever they stand.

    Attributes:
        messages: As chat templates of transformers take them: ``role`` and ``content`` each, ``tool_calls``
            of an assistant, messages of role ``tool``.
        documents: Passages that the model must read. Those whose text stands in the messages already are
            left there; the others are put before the last message of the user, in the passage format.
        hints: Texts that may stand in the messages, such as those a retriever just returned; never added.
        tools: Functions that the model may call, each as ``{"type": "function", "function": {"name": ...,
            "description": ..., "parameters": <JSON schema>}}``.
        tool_choice: ``"auto"``, ``"none"``, ``"required"`` or the name of the tool that must be called.
        response_schema: JSON schema that the answer follows; None leaves it free.
        finds_passages: Whether to look for passages; otherwise all text is computed as it stands.
    """

    messages: Sequence[Message]
    documents: Sequence[str | Passage] = ()
    hints: Sequence[str] = ()
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str = "auto"
    response_schema: Mapping[str, Any] | None = None
    finds_passages: bool = True


@dataclass(frozen=True)
class Text:
    """A prompt to be continued, without a chat template; known passages are found in it by their text.

    Attributes:
        prompt: Control tokens that are spelled in it count, except inside passages.
        documents: Passages that the model must read; those that are not in the prompt are put before it.
        hints: Texts that may stand in the prompt; never added.
        response_schema: JSON schema that the continuation follows; None leaves it free.
        finds_passages: Whether to look for passages; otherwise all text is computed as it stands.
    """

    prompt: str
    documents: Sequence[str | Passage] = ()
    hints: Sequence[str] = ()
    response_schema: Mapping[str, Any] | None = None
    finds_passages: bool = True


Request = Question | Chat | Text
