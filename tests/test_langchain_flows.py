"""Every stock flow of LangChain, unchanged: all passages that it retrieves and shows as they are, are reused.

What the model saw and answered is read from LangChain's own callbacks. ``num_passages`` counts, by plain
search, how often texts of retrieved documents stand in the prompts; ``num_reused`` is what the engine says it
found in its store. ``python tests/test_langchain_flows.py`` writes what it measures for the table of the
documentation.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("langchain_core", reason="langchain-core is not installed")
pytest.importorskip("langchain", reason="langchain is not installed")
pytest.importorskip("langchain_classic", reason="langchain-classic is not installed")

import architectures
from conftest import byte_tokenizer
from langchain.agents import create_agent
from langchain.agents.middleware import dynamic_prompt
from langchain_classic.chains import create_history_aware_retriever, create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder, PromptTemplate
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_core.tools import create_retriever_tool, tool
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_parts import DOCUMENTS, joined
from rag_blockcache.integrations.langchain import BlockCacheLLM, ChatBlockCache

COMMITTED = Path(__file__).parent.parent / "docs/integrations/flows-langchain.json"
QUESTIONS = ["When was the lighthouse built?", "What does the ferry do in winter?"]
TINY_MODEL = architectures.build("Llama", {"max_position_embeddings": 16384})
TINY_TOKENIZER = byte_tokenizer()
# The repr of a list, which a chain shows that does not format its documents, escapes their line breaks.
PARAGRAPHS = [Document(f"Of the island:\n\n{each.page_content}", id=each.id) for each in DOCUMENTS]
CALL = {"name": "island", "args": {"query": "lighthouse"}, "id": "call00001"}


class CallsToolFirst(ChatBlockCache):
    """Calls the tool when it is asked, which random weights would not do by themselves; then it answers."""

    def _generate(self, messages, *arguments, **options):
        if not isinstance(messages[-1], HumanMessage):
            return super()._generate(messages, *arguments, **options)
        return ChatResult(generations=[ChatGeneration(message=AIMessage("", tool_calls=[CALL]))])

    async def _agenerate(self, messages, *arguments, **options):
        if not isinstance(messages[-1], HumanMessage):
            return await super()._agenerate(messages, *arguments, **options)
        return self._generate(messages)

    def _stream(self, messages, *arguments, **options):
        if not isinstance(messages[-1], HumanMessage):
            yield from super()._stream(messages, *arguments, **options)
            return
        chunk = {**CALL, "args": json.dumps(CALL["args"]), "index": 0}
        yield ChatGenerationChunk(message=AIMessageChunk(content="", tool_call_chunks=[chunk]))

    async def _astream(self, messages, *arguments, **options):
        if isinstance(messages[-1], HumanMessage):
            for chunk in self._stream(messages):
                yield chunk
        else:
            async for chunk in super()._astream(messages, *arguments, **options):
                yield chunk


@dataclass
class Seen:
    """What a model was shown and answered, in one call.

    Attributes:
        prompt: All of its text.
        counts: What the answer says of it.
    """

    prompt: str
    counts: dict[str, Any]


class Recorder(BaseCallbackHandler):
    """Notes every call that the engine answers, not those of the script above."""

    def __init__(self):
        self.prompts, self.calls = {}, []

    def on_chat_model_start(self, serialized, messages, *, run_id, **_):
        self.prompts[run_id] = "\n\n".join(text_of(message) for message in messages[0])

    def on_llm_start(self, serialized, prompts, *, run_id, **_):
        self.prompts[run_id] = prompts[0]

    def on_llm_end(self, response, *, run_id, **_):
        generation = response.generations[0][0]
        message = getattr(generation, "message", None)
        counts = message.response_metadata if message else generation.generation_info
        if "num_hits" in counts:
            self.calls.append(Seen(self.prompts[run_id], counts))


def text_of(message):
    if isinstance(message.content, str):
        return message.content
    return "\n\n".join(block["text"] for block in message.content)


@dataclass
class Setup:
    """Models over one engine, and a store all of whose documents are retrieved for any question."""

    options: dict[str, Any]
    documents: list[Document]

    def __post_init__(self) -> None:
        self.store = InMemoryVectorStore.from_documents(self.documents, DeterministicFakeEmbedding(size=8))
        self.retriever = self.store.as_retriever(search_kwargs={"k": len(self.documents)})

    @property
    def chat(self) -> ChatBlockCache:
        return ChatBlockCache(**self.options)

    @property
    def caller(self) -> CallsToolFirst:
        return CallsToolFirst(**self.options)

    @property
    def llm(self) -> BlockCacheLLM:
        return BlockCacheLLM(**self.options)


PROMPT = "Answer from this context:\n\n{context}\n\nQuestion: {question}"


def lcel(setup: Setup) -> Any:
    found = {"context": setup.retriever | joined, "question": RunnablePassthrough()}
    return found | ChatPromptTemplate.from_template(PROMPT) | setup.chat | StrOutputParser()


def lcel_without_format(setup: Setup) -> Any:
    found = {"context": setup.retriever, "question": RunnablePassthrough()}
    return found | ChatPromptTemplate.from_template(PROMPT) | setup.chat | StrOutputParser()


def lcel_with_llm(setup: Setup) -> Any:
    found = {"context": setup.retriever | joined, "question": RunnablePassthrough()}
    return found | PromptTemplate.from_template(PROMPT) | setup.llm


def stuffed(setup: Setup, **options: Any) -> Any:
    prompt = ChatPromptTemplate.from_messages([("system", "Use this:\n\n{context}"), ("human", "{input}")])
    return create_stuff_documents_chain(setup.chat, prompt, **options)


def retrieval_chain(setup: Setup) -> Any:
    return create_retrieval_chain(setup.retriever, stuffed(setup))


def numbered_retrieval_chain(setup: Setup) -> Any:
    shown = PromptTemplate.from_template("Source {source}:\n{page_content}")
    chain = stuffed(setup, document_prompt=shown, document_separator="\n---\n")
    return create_retrieval_chain(setup.retriever, chain)


def conversation_chain(setup: Setup) -> Any:
    rephrase = ChatPromptTemplate.from_messages(
        [MessagesPlaceholder("chat_history"), ("human", "{input}"), ("human", "Ask this without the chat.")]
    )
    answer = ChatPromptTemplate.from_messages(
        [("system", "Use this:\n\n{context}"), MessagesPlaceholder("chat_history"), ("human", "{input}")]
    )
    retriever = create_history_aware_retriever(setup.chat, setup.retriever, rephrase)
    return create_retrieval_chain(retriever, create_stuff_documents_chain(setup.chat, answer))


def bound_documents(setup: Setup) -> Any:
    return setup.chat.bind(documents=setup.documents)


def text_blocks(setup: Setup) -> Any:
    def message(question: str) -> list[HumanMessage]:
        found = [{"type": "text-plain", "text": document.page_content} for document in setup.documents]
        return [HumanMessage([*found, {"type": "text", "text": question}])]

    return RunnableLambda(message) | setup.chat


def agent_with_retriever_tool(response_format: str) -> Callable[[Setup], Any]:
    def make(setup: Setup) -> Any:
        about = "Knows the island."
        found = create_retriever_tool(setup.retriever, "island", about, response_format=response_format)
        return create_agent(setup.caller, [found])

    return make


def agent_with_search_tool(setup: Setup) -> Any:
    @tool
    def island(query: str) -> str:
        """Know the island."""
        return joined(setup.store.similarity_search(query, k=len(setup.documents)))

    return create_agent(setup.caller, [island])


def agent_with_dynamic_prompt(setup: Setup) -> Any:
    @dynamic_prompt
    def with_context(request: Any) -> str:
        found = setup.retriever.invoke(request.messages[-1].text)
        return f"Use this:\n\n{joined(found)}"

    return create_agent(setup.chat, [], middleware=[with_context])


def text_input(question: str) -> Any:
    return question


def chain_input(question: str) -> Any:
    return {"input": question}


def second_turn_input(question: str) -> Any:
    return {"input": question, "chat_history": [HumanMessage(QUESTIONS[0]), AIMessage("In 1854.")]}


def agent_input(question: str) -> Any:
    return {"messages": [HumanMessage(question)]}


VARIANTS = ("invoke", "ainvoke", "stream", "astream", "batch", "abatch", "astream_events")
AGENT_VARIANTS = (*VARIANTS, "second turn")


@dataclass
class Flow:
    """A stock pipeline.

    Attributes:
        make: Makes it.
        asks: Makes its input from a question.
        learns: Whether LangChain tells of the passages, so that those nobody prefilled are learned.
        variants: Ways to run it.
        documents: What there is to retrieve.
        escapes: Whether it shows other texts than those of the documents.
    """

    make: Callable[[Setup], Any]
    asks: Callable[[str], Any] = text_input
    learns: bool = True
    variants: tuple[str, ...] = VARIANTS
    documents: Sequence[Document] = tuple(DOCUMENTS)
    escapes: bool = False

    def shown(self) -> list[str]:
        """Return the texts of the documents as they stand in prompts."""
        texts = [document.page_content for document in self.documents]
        return [repr(text)[1:-1] for text in texts] if self.escapes else texts


FLOWS = {
    "LCEL with format_docs": Flow(lcel),
    "LCEL without format_docs": Flow(lcel_without_format),
    "LCEL without format_docs, line breaks in documents": Flow(
        lcel_without_format, documents=PARAGRAPHS, escapes=True
    ),
    "LCEL with BlockCacheLLM": Flow(lcel_with_llm),
    "create_retrieval_chain": Flow(retrieval_chain, chain_input),
    "create_retrieval_chain, numbered sources": Flow(numbered_retrieval_chain, chain_input),
    "create_history_aware_retriever, second turn": Flow(conversation_chain, second_turn_input),
    "create_agent, retriever tool (content)": Flow(
        agent_with_retriever_tool("content"), agent_input, variants=AGENT_VARIANTS
    ),
    "create_agent, retriever tool (content_and_artifact)": Flow(
        agent_with_retriever_tool("content_and_artifact"), agent_input, variants=AGENT_VARIANTS
    ),
    "create_agent, similarity_search in a tool": Flow(
        agent_with_search_tool, agent_input, learns=False, variants=AGENT_VARIANTS
    ),
    "create_agent, dynamic_prompt": Flow(agent_with_dynamic_prompt, agent_input, variants=AGENT_VARIANTS),
    "documents= bound to the model": Flow(bound_documents),
    "text-plain content blocks": Flow(text_blocks),
}
ROWS = [(name, variant) for name, flow in FLOWS.items() for variant in flow.variants]


def run(flow: Flow, setup: Setup, variant: str) -> list[Seen]:
    """Run a variant of a flow, and return the calls of the model in its last turn."""
    pipeline, recorder = flow.make(setup), Recorder()
    config = {"callbacks": [recorder]}
    inputs = [flow.asks(question) for question in QUESTIONS]
    question = inputs[-1]

    async def all_of(stream: Any) -> None:
        assert [piece async for piece in stream]

    if variant in ("invoke", "batch"):
        getattr(pipeline, variant)(inputs if variant == "batch" else question, config)
    elif variant == "second turn":
        said = pipeline.invoke(inputs[0])["messages"]
        pipeline.invoke({"messages": [*said, *question["messages"]]}, config)
    elif variant == "stream":
        assert list(pipeline.stream(question, config))
    elif variant in ("ainvoke", "abatch"):
        asyncio.run(getattr(pipeline, variant)(inputs if variant == "abatch" else question, config))
    elif variant == "astream":
        asyncio.run(all_of(pipeline.astream(question, config)))
    else:
        asyncio.run(all_of(pipeline.astream_events(question, config, version="v2")))
    return recorder.calls


def occurrences(texts: list[str], calls: list[Seen]) -> int:
    return sum(call.prompt.count(text) for call in calls for text in texts)


def reused(calls: list[Seen]) -> int:
    return sum(call.counts["num_hits"] for call in calls)


def setup_for(name: str, variant: str, **options: Any) -> Setup:
    shared = {"model": TINY_MODEL, "tokenizer": TINY_TOKENIZER, "max_tokens": 8, "policy": "block"}
    sourced = [
        Document(document.page_content, id=document.id, metadata={"source": f"{document.id}.txt"})
        for document in FLOWS[name].documents
    ]
    return Setup({**shared, "salt": f"{name} {variant}", **options}, sourced)


def measure(name: str, variant: str) -> dict[str, Any]:
    """Run a variant of a flow whose passages were prefilled, found by their text alone."""
    setup = setup_for(name, variant, observes_retrievers=False)
    engine = setup.chat.engine  # which lives as long as somebody holds it
    engine.get().prefill(document.page_content for document in setup.documents)
    texts = FLOWS[name].shown()
    calls = run(FLOWS[name], setup, variant)
    if FLOWS[name].make is bound_documents:  # the engine shows them, LangChain's callbacks do not
        num_passages = len(calls) * len(texts)
    else:
        num_passages = occurrences(texts, calls)
    assert num_passages >= len(texts), "a retrieved passage is in no prompt"
    return {"flow": name, "variant": variant, "num_passages": num_passages, "num_reused": reused(calls)}


@pytest.mark.parametrize(("name", "variant"), [row for row in ROWS if not FLOWS[row[0]].escapes])
def test_a_flow_reuses_every_passage_that_it_retrieves(name, variant):
    measured = measure(name, variant)
    assert measured["num_reused"] == measured["num_passages"]
    assert measured in json.loads(COMMITTED.read_text())


@pytest.mark.parametrize(("name", "variant"), [row for row in ROWS if FLOWS[row[0]].escapes])
def test_a_passage_that_a_flow_shows_escaped_is_not_the_one_that_was_prefilled(name, variant):
    measured = measure(name, variant)
    assert measured["num_reused"] == 0
    assert measured in json.loads(COMMITTED.read_text())


def test_the_table_of_the_documentation_has_these_flows_and_no_others():
    assert [(row["flow"], row["variant"]) for row in json.loads(COMMITTED.read_text())] == ROWS


@pytest.mark.parametrize(
    ("name", "variant"), [row for row in ROWS if FLOWS[row[0]].learns and row[1] != "second turn"]
)
def test_a_flow_whose_passages_nobody_prefilled_reuses_them_at_the_next_question(name, variant):
    setup = setup_for(name, f"unknown {variant}", admission="always")
    engine = setup.chat.engine  # which lives as long as somebody holds it
    first = run(FLOWS[name], setup, variant)
    assert sum(call.counts["num_misses"] for call in first) >= len(setup.documents)
    again = run(FLOWS[name], setup, variant)
    assert reused(again) >= len(setup.documents)
    assert not sum(call.counts["num_misses"] for call in again)
    assert engine.is_loaded


def test_documents_that_a_list_shows_escaped_are_learned_as_they_stand_there(monkeypatch):
    documents = [
        Document('The keeper\'s diary:\n\n"On Monday the lens stood still, and on Tuesday I wound it again."')
    ]
    monkeypatch.setitem(FLOWS, "escaped", Flow(lcel_without_format, documents=documents, escapes=True))
    setup = setup_for("escaped", "", admission="always")
    model = setup.chat  # keeps the engine
    model.engine.get().prefill([documents[0].page_content])
    counts = [run(FLOWS["escaped"], setup, "invoke")[0].counts for _ in range(2)]
    assert [(each["num_hits"], each["num_misses"]) for each in counts] == [(0, 1), (1, 0)]


def test_what_stands_before_the_first_escape_is_reused_if_it_is_long(monkeypatch):
    documents = [Document(f"{'The lighthouse is old and white. ' * 8}\n\nIts lamp burned whale oil.")]
    monkeypatch.setitem(FLOWS, "long", Flow(lcel_without_format, documents=documents, escapes=True))
    assert measure("long", "invoke")["num_reused"] == 1


if __name__ == "__main__":
    rows = [measure(name, variant) for name, variant in ROWS]
    COMMITTED.parent.mkdir(parents=True, exist_ok=True)
    COMMITTED.write_text("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]\n")
