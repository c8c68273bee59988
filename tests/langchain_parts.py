"""What tests of the LangChain adapter share: an engine that follows a script, a retriever, documents."""

from __future__ import annotations

from dataclasses import fields

from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnablePassthrough
from rag_blockcache.integrations.langchain import BlockCacheLLM, ChatBlockCache

from rag_blockcache.answers import Answer
from rag_blockcache.errors import InvalidInputError
from rag_blockcache.tool_calls import ToolCall

DOCUMENTS = [
    Document("The lighthouse on the north rock was built in 1854, after three ships were lost.", id="a"),
    Document("The harbour freezes in most winters, so the ferry rests from December to March.", id="b"),
    Document("The island has one school with two rooms; children walk there along the railway.", id="c"),
]
TEXTS = [document.page_content for document in DOCUMENTS]


class FixedRetriever(BaseRetriever):
    """Returns the same documents for every query."""

    documents: list[Document] = DOCUMENTS

    def _get_relevant_documents(self, query, *, run_manager):
        return self.documents


def joined(documents):
    """Format documents as most chains do."""
    return "\n\n".join(document.page_content for document in documents)


def answer(text="", *calls, **numbers):
    """Make an answer; ``calls`` are names of tools with their arguments."""
    zeros = {each.name: 0 for each in fields(Answer) if each.name.startswith("num_")}
    zeros |= {each.name: 0.0 for each in fields(Answer) if each.name.endswith(("_seconds", "_per_second"))}
    return Answer(
        **{
            **zeros,
            "text": text,
            "token_ids": [7] * len(text),
            "finish_reason": "tool_calls" if calls else "stop",
            "policy": "block",
            "tool_calls": tuple(
                ToolCall(name, arguments, f"call{index:05}") for index, (name, arguments) in enumerate(calls)
            ),
            **numbers,
        }
    )


class ScriptedEngine:
    """Gives answers in turn, in place of an engine whose model is too small to choose tools by itself.

    It notes every request with its options, and the size of every batch. Requests whose last message is
    ``bad`` are refused.
    """

    model_name = "scripted"

    def __init__(self, *answers):
        self.answers, self.asked, self.batch_sizes, self.num_closed = list(answers), [], [], 0

    def answer(self, request, **options):
        self._check(request)
        self.asked.append((request, options))
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def answer_batch(self, requests, **options):
        for request in requests:
            self._check(request)
        self.batch_sizes.append(len(requests))
        return [self.answer(request, **options) for request in requests]

    def stream_answer(self, request, **options):
        return ScriptedStream(self, self.answer(request, **options))

    async def aanswer(self, request, **options):
        return self.answer(request, **options)

    def astream_answer(self, request, **options):
        return ScriptedStream(self, self.answer(request, **options))

    def _check(self, request):
        messages = getattr(request, "messages", None)
        if (messages[-1]["content"] if messages else request.prompt) == "bad":
            raise InvalidInputError("this request is bad")


class ScriptedStream:
    """The words of an answer, to be read with or without an event loop."""

    def __init__(self, engine, answer):
        self.answer, self._engine, self._words = answer, engine, iter(answer.text.split(" "))

    def __iter__(self):
        return self._words

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._engine.num_closed += 1

    def __aiter__(self):
        return self

    async def __anext__(self):
        try:
            return next(self._words)
        except StopIteration:
            raise StopAsyncIteration from None

    async def aclose(self):
        self._engine.num_closed += 1


def scripted(model, *answers):
    """Have a chat model or LLM of LangChain answer by a script; return it."""
    model._engine = ScriptedEngine(*answers)
    return model


def engine_options(model, tokenizer, name):
    """Return options that have every passage stored at once, and share no engine with another name."""
    shared = {"model": model, "tokenizer": tokenizer, "salt": name}
    return {**shared, "max_tokens": 12, "policy": "block", "admission": "always"}


def scripted_chat(*answers, **options):
    """Make a chat model that answers by a script, ``yes`` by default."""
    return scripted(ChatBlockCache(model="none", **options), *(answers or (answer("yes"),)))


def scripted_llm(*answers, **options):
    """Make an LLM that answers by a script, ``yes`` by default."""
    return scripted(BlockCacheLLM(model="none", **options), *(answers or (answer("yes"),)))


def last_asked(model):
    """Return the last request to a scripted engine, and its options."""
    return model.engine.asked[-1]


def rag_chain(model, retriever=None):
    """Make the chain that every tutorial begins with."""
    found = {"context": (retriever or FixedRetriever()) | joined, "question": RunnablePassthrough()}
    return found | ChatPromptTemplate.from_template("{context}\n\nQuestion: {question}") | model


async def all_of(stream):
    """Read an asynchronous stream."""
    return [piece async for piece in stream]
