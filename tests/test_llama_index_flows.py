"""Every stock flow of LlamaIndex, unchanged: all passages that it retrieves are reused.

What the LLM saw is read from LlamaIndex's own events. ``num_passages`` counts, by plain search, how often
texts of retrieved nodes stand in the prompts; ``num_reused`` is what the engine says it found in its store.
``python tests/test_llama_index_flows.py`` writes what it measures for the table of the documentation.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_index.core", reason="llama-index-core is not installed")

from llama_index.core import Document
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.chat_engine import (
    CondensePlusContextChatEngine,
    CondenseQuestionChatEngine,
    ContextChatEngine,
)
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.node_parser import SentenceWindowNodeParser
from llama_index.core.postprocessor import LongContextReorder, MetadataReplacementPostProcessor
from llama_index.core.query_engine import CitationQueryEngine
from llama_index.core.schema import MetadataMode, TextNode
from llama_index.core.tools import RetrieverTool, ToolMetadata
from llama_index_pipelines import Seen, Setup, own_settings, recorded, stories, tiny_llm
from pydantic import BaseModel, Field
from rag_blockcache.integrations.llama_index import BlockCacheLLM

pytestmark = [
    pytest.mark.usefixtures(own_settings.__name__),
    pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecationWarning"),  # raised by LlamaIndex
]

COMMITTED = Path(__file__).parent.parent / "docs/integrations/flows-llama_index.json"
QUESTIONS = ["When was the lighthouse built?", "What does the ferry do in winter?"]
DIARY = (
    "On Monday the keeper wound the clockwork of the lens four times. On Tuesday a sled came over the ice "
    "with the post and with medicine. On Wednesday the oldest pupil oiled the wheels of the locomotive. On "
    "Thursday it snowed so much that nobody left the tower until the evening."
)


def diary() -> list[TextNode]:
    parser = SentenceWindowNodeParser.from_defaults(
        sentence_splitter=lambda text: [f"{part.strip('. ')}. " for part in text.split(". ")], window_size=1
    )
    return parser.get_nodes_from_documents([Document(text=DIARY)])


def shown(nodes: list[TextNode]) -> list[str]:
    return [node.get_content(MetadataMode.LLM) for node in nodes]


def bare(nodes: list[TextNode]) -> list[str]:
    return [node.text for node in nodes]


def windows(nodes: list[TextNode]) -> list[str]:
    return [node.metadata["window"].strip() for node in nodes]


def memory() -> ChatMemoryBuffer:
    return ChatMemoryBuffer.from_defaults(token_limit=12_000)  # the default one leaves its database open


class RememberingAgent:
    """A ``FunctionAgent`` with a tool that retrieves, and the memory of what was said."""

    def __init__(self, setup: Setup, streaming: bool) -> None:
        class Query(BaseModel):
            input: str = Field(max_length=12)  # a model of random weights would never end a longer one

        about = ToolMetadata(name="island", description="Knows the island.", fn_schema=Query)
        self.memory = memory()
        self.agent = FunctionAgent(
            llm=setup.llm,
            tools=[RetrieverTool(setup.retriever, about)],
            initial_tool_choice="island",
            streaming=streaming,
        )

    async def run(self, question: str) -> None:
        await self.agent.run(question, memory=self.memory)


@dataclass
class Flow:
    """A stock pipeline.

    Attributes:
        make: Makes an engine, streaming or not.
        variants: Those that LlamaIndex has of it.
        nodes: What is indexed.
        texts: How the passages of nodes stand in prompts.
        max_new_tokens: Of each answer.
    """

    make: Callable[[Setup, bool], Any]
    variants: tuple[str, ...] = ("sync", "async", "streaming", "async streaming", "second turn")
    nodes: Callable[[], list[TextNode]] = stories
    texts: Callable[[list[TextNode]], list[str]] = shown
    max_new_tokens: int = 6

    def setup(self, **options: Any) -> Setup:
        return Setup(tiny_llm(max_new_tokens=self.max_new_tokens, **options), self.nodes())


def query_flow(**options: Any) -> Callable[[Setup, bool], Any]:
    return lambda setup, streaming: setup.query_engine(streaming=streaming, **options)


NOT_STREAMING = ("sync", "async", "second turn")  # LlamaIndex refuses to stream these
FLOWS = {
    "compact": Flow(query_flow(response_mode="compact")),
    "refine": Flow(query_flow(response_mode="refine")),
    "tree_summarize": Flow(query_flow(response_mode="tree_summarize")),
    "simple_summarize": Flow(query_flow(response_mode="simple_summarize")),
    "accumulate": Flow(query_flow(response_mode="accumulate"), NOT_STREAMING),
    "compact_accumulate": Flow(query_flow(response_mode="compact_accumulate"), NOT_STREAMING),
    "ContextChatEngine": Flow(
        lambda setup, _: ContextChatEngine.from_defaults(setup.retriever, llm=setup.llm, memory=memory())
    ),
    "CondensePlusContextChatEngine": Flow(
        lambda setup, _: CondensePlusContextChatEngine.from_defaults(
            setup.retriever, llm=setup.llm, memory=memory()
        )
    ),
    "CondenseQuestionChatEngine": Flow(
        lambda setup, streaming: CondenseQuestionChatEngine.from_defaults(
            setup.query_engine(streaming=streaming), llm=setup.llm, memory=memory()
        )
    ),
    "LongContextReorder": Flow(
        lambda setup, streaming: setup.query_engine(
            streaming=streaming, node_postprocessors=[LongContextReorder()]
        )
    ),
    "SentenceWindow + MetadataReplacement": Flow(
        lambda setup, streaming: setup.query_engine(
            streaming=streaming, node_postprocessors=[MetadataReplacementPostProcessor("window")]
        ),
        nodes=diary,
        texts=windows,
    ),
    "CitationQueryEngine": Flow(
        lambda setup, streaming: CitationQueryEngine.from_args(
            setup.index, llm=setup.llm, retriever=setup.retriever, streaming=streaming
        ),
        texts=bare,
    ),
    "FunctionAgent + RetrieverTool": Flow(
        RememberingAgent, ("async", "async streaming", "second turn"), max_new_tokens=140
    ),
}
ROWS = [(name, variant) for name, flow in FLOWS.items() for variant in flow.variants]


def ask(engine: Any, question: str, streaming: bool) -> None:
    if isinstance(engine, BaseQueryEngine):
        str(engine.query(question))  # reads a stream to its end
    elif streaming:
        list(engine.stream_chat(question).response_gen)
    else:
        engine.chat(question)


async def aask(engine: Any, question: str, streaming: bool) -> None:
    if isinstance(engine, RememberingAgent):
        await engine.run(question)
    elif isinstance(engine, BaseQueryEngine):
        response = await engine.aquery(question)
        if streaming:
            await response.get_response()
    elif streaming:
        response = await engine.astream_chat(question)
        assert [piece async for piece in response.async_response_gen()]
    else:
        await engine.achat(question)


def run(flow: Flow, setup: Setup, variant: str) -> list[Seen]:
    """Run a variant of a flow, and return the calls of the LLM in its last turn."""
    streaming = "streaming" in variant
    questions = QUESTIONS if variant == "second turn" else QUESTIONS[-1:]

    async def converse() -> None:
        engine = flow.make(setup, streaming)
        for question in questions:
            calls.clear()
            await aask(engine, question, streaming)

    with recorded() as calls:
        if "async" in variant or flow.make is RememberingAgent:
            asyncio.run(converse())
            return list(calls)
        engine = flow.make(setup, streaming)
        for question in questions:
            calls.clear()
            ask(engine, question, streaming)
        return list(calls)


def occurrences(texts: list[str], prompt: str) -> list[str]:
    """Return each text where it stands in a prompt, longer ones before those that they begin with."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.findall("|".join(re.escape(text) for text in longest_first), prompt)


def measure(name: str, variant: str) -> dict[str, Any]:
    """Run a variant of a flow whose passages were prefilled, found by their text alone."""
    flow = FLOWS[name]
    setup = flow.setup(uses_hints=False, salt=f"{name} {variant}")
    texts = flow.texts(setup.nodes)
    setup.llm.engine.get().prefill(texts)
    calls = run(flow, setup, variant)
    found = [text for call in calls for text in occurrences(texts, call.prompt)]
    assert set(found) == set(texts), "a retrieved passage is in no prompt, or was cut"
    num_reused = sum(call.counts["num_hits"] for call in calls)
    return {"flow": name, "variant": variant, "num_passages": len(found), "num_reused": num_reused}


@pytest.mark.parametrize(("name", "variant"), ROWS)
def test_a_flow_reuses_every_passage_that_it_retrieves(name, variant):
    measured = measure(name, variant)
    assert measured["num_reused"] == measured["num_passages"]
    assert measured in json.loads(COMMITTED.read_text())


def test_the_table_of_the_documentation_has_these_flows_and_no_others():
    assert [(row["flow"], row["variant"]) for row in json.loads(COMMITTED.read_text())] == ROWS


@pytest.mark.parametrize(("name", "variant"), ROWS)
def test_a_flow_whose_passages_nobody_prefilled_reuses_them_at_the_next_question(name, variant):
    flow = FLOWS[name]
    setup = flow.setup(salt=f"unknown {name} {variant}")
    texts = flow.texts(setup.nodes)
    first = run(flow, setup, variant)
    found = [text for call in first for text in occurrences(texts, call.prompt)]
    seen = sum(call.counts["num_hits"] + call.counts["num_misses"] for call in first)
    assert seen == len(found)
    again = run(flow, setup, variant)
    found = [text for call in again for text in occurrences(texts, call.prompt)]
    assert sum(call.counts["num_hits"] for call in again) == len(found)


@pytest.mark.real_weights
def test_a_real_model_answers_right_from_reused_passages(smollm2_path, tmp_path):
    real = BlockCacheLLM(model_name=smollm2_path, cache_dir=tmp_path, max_new_tokens=24, policy="block")
    engine = Setup(real, stories()).query_engine()
    with recorded() as calls:
        answers = [str(engine.query("In which year was the lighthouse built?")) for _ in range(2)]
    assert [call.counts["num_hits"] for call in calls] == [0, 3]
    assert all("1854" in answer for answer in answers)
    real.engine.close()


if __name__ == "__main__":
    rows = [measure(name, variant) for name, variant in ROWS]
    COMMITTED.write_text("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]\n")
