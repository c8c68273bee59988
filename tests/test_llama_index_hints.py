"""Hints reach the LLM of the request that they belong to, and no other."""

from __future__ import annotations

import asyncio
import threading

import pytest

pytest.importorskip("llama_index.core", reason="llama-index-core is not installed")

from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.core.workflow import Event, StartEvent, StopEvent, Workflow, step
from llama_index_instrumentation import get_dispatcher
from llama_index_pipelines import STORIES, Setup, own_settings, recorded, stories, tiny_llm
from rag_blockcache.integrations.llama_index.hints import (
    _RequestWatcher,
    current_hints,
    node_texts,
    watch_requests,
)

from rag_blockcache import SharedCache

pytestmark = pytest.mark.usefixtures(own_settings.__name__)


def node(text: str, **metadata: str) -> NodeWithScore:
    return NodeWithScore(node=TextNode(text=text, metadata=metadata))


def counted(calls) -> list[tuple[int, int]]:
    return [(call.counts["num_hits"], call.counts["num_misses"]) for call in calls]


# What a node may look like in a prompt


def test_a_node_is_known_with_its_metadata_and_without():
    assert node_texts(node(" It burned. ", file="a.txt").node) == ["file: a.txt\n\n It burned.", "It burned."]


def test_the_number_of_a_citation_is_no_part_of_its_passage():
    assert node_texts(node("Source 12:\nIt burned.\n", file="a.txt").node) == ["It burned."]


# As long as a request lasts, and no longer


@pytest.fixture
def hints_of_calls(monkeypatch) -> list[tuple[str, ...]]:
    """Return a list that fills with the hints that requests to an engine have."""
    seen: list[tuple[str, ...]] = []
    for name in ("answer", "stream_answer"):  # the asynchronous methods end in the second
        whole = getattr(SharedCache, name)

        def noted(self, request, whole=whole, **options):
            seen.append(tuple(request.hints))
            return whole(self, request, **options)

        monkeypatch.setattr(SharedCache, name, noted)
    return seen


LIGHTHOUSE, FERRY = (node(text) for text in list(STORIES.values())[:2])


@pytest.mark.parametrize("is_streaming", [False, True])
def test_a_synthesis_gives_its_nodes_to_the_llm_and_leaves_no_hints(hints_of_calls, is_streaming):
    synthesizer = get_response_synthesizer(llm=tiny_llm(), streaming=is_streaming)
    str(synthesizer.synthesize("When?", [LIGHTHOUSE]))
    str(synthesizer.synthesize("When?", [FERRY]))
    assert hints_of_calls == [(LIGHTHOUSE.text,), (FERRY.text,)]
    assert current_hints() == ()


def test_a_stream_has_its_own_hints_however_late_it_is_read(hints_of_calls):
    synthesizer = get_response_synthesizer(llm=tiny_llm(), streaming=True)
    streams = [synthesizer.synthesize("When?", [each]) for each in (LIGHTHOUSE, FERRY)]
    reader = threading.Thread(target=lambda: list(streams[1].response_gen))
    reader.start()
    reader.join()
    list(streams[0].response_gen)  # newer versions of LlamaIndex ask the LLM only now
    assert sorted(hints_of_calls) == sorted([(FERRY.text,), (LIGHTHOUSE.text,)])


def test_whoever_reads_a_stream_gets_no_hints_of_it():
    stream = get_response_synthesizer(llm=tiny_llm(), streaming=True).synthesize("When?", [LIGHTHOUSE])
    assert {current_hints() for _ in stream.response_gen} == {()}


def test_a_stream_that_nobody_reads_on_is_closed_with_its_llm():
    stream = get_response_synthesizer(llm=tiny_llm(max_new_tokens=4000), streaming=True).synthesize(
        "When?", [LIGHTHOUSE]
    )
    next(stream.response_gen)
    stream.response_gen.close()
    with pytest.raises(StopIteration):
        next(stream.response_gen)


def test_queries_at_the_same_time_see_their_own_nodes_only(hints_of_calls):
    llm = tiny_llm()

    async def ask(nodes, is_streaming):
        synthesizer = get_response_synthesizer(llm=llm, streaming=is_streaming)
        response = await synthesizer.asynthesize("When?", nodes)
        if is_streaming:
            await response.get_response()

    async def ask_all():
        asked = [ask([each], is_streaming) for each in (LIGHTHOUSE, FERRY) for is_streaming in (False, True)]
        await asyncio.gather(*asked)
        return current_hints()

    assert asyncio.run(ask_all()) == ()
    assert sorted(hints_of_calls) == [(FERRY.text,)] * 2 + [(LIGHTHOUSE.text,)] * 2


def test_a_request_that_fails_leaves_no_hints():
    synthesizer = get_response_synthesizer(
        llm=tiny_llm(generate_kwargs={"unknown": 1}), response_mode="tree_summarize"
    )
    with pytest.raises(ValueError, match="unknown"):
        synthesizer.synthesize("When?", [LIGHTHOUSE])
    assert current_hints() == ()


def test_what_is_retrieved_outside_of_any_request_is_no_hint():
    setup = Setup(tiny_llm(), stories())
    setup.retriever.retrieve("When?")
    assert current_hints() == ()


class Retrieved(Event):
    nodes: list[NodeWithScore]


class Retrieving(Workflow):
    """A workflow of the user's own, such as an agent is: one step retrieves, another asks the LLM."""

    def __init__(self, setup, seen) -> None:
        super().__init__()
        self.setup, self.seen = setup, seen

    @step
    async def retrieve(self, event: StartEvent) -> Retrieved:
        return Retrieved(nodes=await self.setup.retriever.aretrieve("When?"))

    @step
    async def answer(self, event: Retrieved) -> StopEvent:
        self.seen.append(current_hints())
        return StopEvent()


def test_what_a_run_of_a_workflow_retrieved_is_a_hint_until_its_end():
    seen = []
    setup = Setup(tiny_llm(), stories())

    async def run_twice():
        for _ in range(2):
            await Retrieving(setup, seen).run()
        return current_hints()

    assert asyncio.run(run_twice()) == ()
    assert all(set(STORIES.values()) < set(hints) for hints in seen)
    assert len(seen[0]) == len(seen[1]) == 6  # each with its metadata and without


# The handler itself


def test_one_handler_watches_however_many_llms_there_are():
    for _ in range(3):
        tiny_llm()
        watch_requests()
    watchers = [each for each in get_dispatcher().span_handlers if isinstance(each, _RequestWatcher)]
    assert len(watchers) == 1
    assert watchers[0].open_spans == {}


def test_without_hints_unknown_passages_are_computed_and_known_ones_reused():
    setup = Setup(tiny_llm(salt="no hints", uses_hints=False), stories())
    with recorded() as calls:
        setup.query_engine().query("When?")
        setup.llm.engine.get().prefill([each.get_content("llm") for each in setup.nodes])
        setup.query_engine().query("When?")
    assert counted(calls) == [(0, 0), (3, 0)]


def test_handlers_that_replace_ours_take_nothing_but_the_hints(monkeypatch):
    setup = Setup(tiny_llm(salt="replaced"), stories())
    monkeypatch.setattr(get_dispatcher(), "span_handlers", [])
    setup.llm.engine.get().prefill([each.get_content("llm") for each in setup.nodes])
    with recorded() as calls:
        setup.query_engine().query("When?")
    assert counted(calls) == [(3, 0)]
