"""What tests of the LlamaIndex adapter share: a tiny LLM, an index over stories, and a record of calls."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import architectures
import llama_index.core
import pytest
from conftest import byte_tokenizer
from llama_index.core import Settings, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent, LLMCompletionEndEvent
from llama_index.core.schema import TextNode
from llama_index_instrumentation import get_dispatcher
from pydantic import Field
from rag_blockcache.integrations.llama_index import BlockCacheLLM

TINY_MODEL = architectures.build("Llama", {"max_position_embeddings": 16384})
TINY_TOKENIZER = byte_tokenizer()
STORIES = {
    "lighthouse.txt": "The lighthouse on the north rock was built in 1854, after three ships were lost.",
    "ferry.txt": "The ferry rests in winter, when the harbour freezes and mail is carried over the ice.",
    "school.txt": "The school of the island has two rooms, and children walk there along the old railway.",
}


def tiny_llm(**options: Any) -> BlockCacheLLM:
    """Make an LLM over one tiny model; those of another ``salt`` share no blocks."""
    given = {"model": TINY_MODEL, "tokenizer": TINY_TOKENIZER, "max_new_tokens": 16, "policy": "block"}
    return BlockCacheLLM(**given | options)


def stories() -> list[TextNode]:
    return [TextNode(text=text, metadata={"file_name": name}) for name, text in STORIES.items()]


@pytest.fixture
def own_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave LlamaIndex's global settings as they were, and close the event loop that it opens."""
    for name in ("_llm", "_prompt_helper", "_callback_manager"):
        monkeypatch.setattr(Settings, name, getattr(Settings, name))
    monkeypatch.setattr(llama_index.core, "global_tokenizer", llama_index.core.global_tokenizer)
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()


class WordHashes(BaseEmbedding):
    """Embeds a text as counts of its words, hashed: the same everywhere, and alike for texts alike."""

    def _get_text_embedding(self, text: str) -> list[float]:
        vector = [0.01] * 32
        for word in text.lower().split():
            vector[hashlib.blake2b(word.encode()).digest()[0] % 32] += 1.0
        return vector

    _get_query_embedding = _get_text_embedding

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


@dataclass
class Seen:
    """What an LLM was shown and answered, in one call.

    Attributes:
        prompt: All of its text.
        counts: What the response says of it.
    """

    prompt: str
    counts: dict[str, Any]


class Recorder(BaseEventHandler):
    """Notes every call of an LLM."""

    calls: list[Any] = Field(default_factory=list)

    def handle(self, event, **kwargs):
        if isinstance(event, LLMChatEndEvent):
            prompt = "\n".join(message.content or "" for message in event.messages)
            self.calls.append(Seen(prompt, event.response.additional_kwargs))
        elif isinstance(event, LLMCompletionEndEvent):
            self.calls.append(Seen(event.prompt, event.response.additional_kwargs))


@contextmanager
def recorded() -> Iterator[list[Seen]]:
    """Note the calls of all LLMs."""
    recorder = Recorder()
    handlers = get_dispatcher().event_handlers
    handlers.append(recorder)
    try:
        yield recorder.calls
    finally:
        handlers.remove(recorder)


@dataclass
class Setup:
    """An LLM, and an index over nodes all of which are retrieved for any question."""

    llm: BlockCacheLLM
    nodes: list[TextNode]
    index: VectorStoreIndex = field(init=False)

    def __post_init__(self) -> None:
        self.index = VectorStoreIndex(self.nodes, embed_model=WordHashes())

    @property
    def retriever(self) -> Any:
        return self.index.as_retriever(similarity_top_k=len(self.nodes))

    def query_engine(self, **options: Any) -> Any:
        return self.index.as_query_engine(llm=self.llm, similarity_top_k=len(self.nodes), **options)
