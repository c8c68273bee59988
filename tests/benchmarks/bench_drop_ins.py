"""Time to first token through LlamaIndex and LangChain, with 20 passages that were prefilled, and in full.

    python tests/benchmarks/bench_drop_ins.py

What: a question over 20 passages of about 100 tokens of the Python language reference is asked through a
query engine of LlamaIndex (``compact``, streaming), through an LCEL chain of LangChain (streamed) and
through ``BlockCache`` itself, all over one engine that has the passages' blocks in memory. Each way is asked
three times a round: with ``policy="full"``, which looks nothing up and computes the whole prompt with full
attention; with the paper's ``block``; and with ``auto``, the default, on whatever policy that stands for.
``generate()`` of transformers, on a model that it loaded by itself, prefills the prompt of ``BlockCache`` in
the same rounds, so that full prefill here can be compared with what it stands in for. Timed is what the
caller waits for: from the call of the framework to its first piece of text, an answer being one token. All
ways take turns, seven rounds after one to warm up; medians, and ratios to full prefill within a round.
SmolLM2-135M-Instruct in bfloat16, unless options say otherwise.

How it can mislead: the retriever returns fixed passages at once, so embedding the question and searching are
in no number. Blocks come from memory; ``bench_latency.py`` has the disk. The three prompts differ by what
each framework writes around the passages. Full prefill computes something else than ``block``: passages that
see one another; on a model that was not block-fine-tuned answers suffer, and ``auto`` is what a user waits
for who chooses nothing. Models with a server of their own, and those behind ``HuggingFaceLLM`` or
``ChatHuggingFace``, are not measured.

Others: ``--model FOLDER --num-passages 5 --passage-tokens 200 --repeats 3``.
"""

import argparse
import importlib.metadata
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever as LangChainRetriever
from langchain_core.runnables import RunnablePassthrough
from language_reference import reference_text
from llama_index.core.base.base_retriever import BaseRetriever as LlamaIndexRetriever
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index_instrumentation import get_dispatcher
from pydantic import Field
from rag_blockcache.integrations.langchain import ChatBlockCache
from rag_blockcache.integrations.llama_index import BlockCacheLLM
from small_models import smollm2_path
from transformers import AutoModelForCausalLM

from rag_blockcache import BlockCache, Question, SharedCache
from rag_blockcache.evaluation.environment import Environment
from rag_blockcache.evaluation.stopwatch import Spread, in_turn, ratios
from rag_blockcache.evaluation.token_prompts import cut_prompt, token_run

COLUMNS = {
    "way": "through",
    "num_tokens": "prompt tokens",
    "full_seconds": "full prefill",
    "block_seconds": "prefilled, block",
    "block_times_sooner": "block: times sooner",
    "auto_seconds": "prefilled, auto",
    "auto_policy": "auto stands for",
    "auto_times_sooner": "auto: times sooner",
}
POLICIES = ("full", "block", "auto")
QUESTION = "What do these passages say about statements?"


@dataclass(frozen=True)
class FirstToken:
    """An answer of one token: how long it took, and what the engine says of it."""

    seconds: float
    num_tokens: int
    num_reused: int = 0
    num_hits: int = 0
    policy: str = "full"


def timed(start: Callable[[], Iterable[Any]]) -> tuple[float, list[Any]]:
    """Return the seconds from the call to its first piece, and all pieces."""
    begin = time.perf_counter()
    pieces = iter(start())
    first = next(pieces, None)  # a token without text gives none
    return time.perf_counter() - begin, [first, *pieces]


# The ways to ask; each takes an engine that it shares with the others


class OwnWay:
    """Asks ``BlockCache`` itself."""

    def __init__(self, engine: SharedCache, passages: list[str], policy: str) -> None:
        self._engine, self._request, self._policy = engine, Question(QUESTION, passages), policy

    def __call__(self) -> FirstToken:
        options = {"max_new_tokens": 1, "policy": self._policy, "do_sample": False}
        begin = time.perf_counter()
        with self._engine.stream_answer(self._request, **options) as stream:
            next(stream, None)
            seconds = time.perf_counter() - begin
            list(stream)  # for its answer
        answer = stream.answer
        return FirstToken(
            seconds, answer.num_prompt_tokens, answer.num_reused_tokens, answer.num_hits, answer.policy
        )


class LlamaIndexWay:
    """Asks a query engine over fixed nodes."""

    class Retriever(LlamaIndexRetriever):
        def __init__(self, passages: list[str]) -> None:
            super().__init__()
            self._found = [NodeWithScore(node=TextNode(text=text), score=1.0) for text in passages]

        def _retrieve(self, query_bundle: Any) -> list[NodeWithScore]:
            return self._found

    class Answers(BaseEventHandler):
        """Keeps what the LLM says of its answers, which a query engine does not pass on."""

        told: list[dict[str, Any]] = Field(default_factory=list)

        def handle(self, event: Any, **_: Any) -> None:
            if isinstance(event, LLMChatEndEvent):
                self.told.append(event.response.raw)

    def __init__(self, options: dict[str, Any], passages: list[str], policy: str) -> None:
        llm = BlockCacheLLM(
            model_name=options["model"],
            cache_dir=options["cache_dir"],
            context_budget_bytes=options["context_budget_bytes"],
            max_new_tokens=1,
            policy=policy,
            generate_kwargs={"do_sample": False},
        )
        self._query_engine = RetrieverQueryEngine.from_args(self.Retriever(passages), llm=llm, streaming=True)

    def __call__(self) -> FirstToken:
        answers = self.Answers()
        get_dispatcher().event_handlers.append(answers)
        try:
            seconds, _ = timed(lambda: self._query_engine.query(QUESTION).response_gen)
        finally:
            get_dispatcher().event_handlers.remove(answers)
        (told,) = answers.told  # all passages stood in one prompt
        num_reused = told["num_reused_tokens"]
        return FirstToken(
            seconds, num_reused + told["num_computed_tokens"], num_reused, told["num_hits"], told["policy"]
        )


class LangChainWay:
    """Asks a chain over fixed documents."""

    class Retriever(LangChainRetriever):
        documents: list[Document]

        def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
            return self.documents

    def __init__(self, options: dict[str, Any], passages: list[str], policy: str) -> None:
        retriever = self.Retriever(documents=[Document(text) for text in passages])
        prompt = ChatPromptTemplate.from_template("Answer from this:\n\n{context}\n\nQuestion: {question}")
        model = ChatBlockCache(**options, max_tokens=1, policy=policy)
        found = {"context": retriever | self._joined, "question": RunnablePassthrough()}
        self._chain = found | prompt | model

    @staticmethod
    def _joined(documents: list[Document]) -> str:
        return "\n\n".join(document.page_content for document in documents)

    def __call__(self) -> FirstToken:
        seconds, pieces = timed(lambda: self._chain.stream(QUESTION))
        told, usage = pieces[-1].response_metadata, pieces[-1].usage_metadata
        return FirstToken(
            seconds,
            usage["input_tokens"],
            usage["input_token_details"]["cache_read"],
            told["num_hits"],
            told["policy"],
        )


class StockWay:
    """Has transformers generate from the prompt of ``BlockCache``, on a model that it loaded by itself."""

    def __init__(self, model: Path, cache: BlockCache, passages: list[str]) -> None:
        segments = cache.segments(Question(QUESTION, passages))
        self._token_ids = torch.tensor([[token for segment in segments for token in segment]])
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=cache.model.dtype)
        self._model.to(cache.model.device).eval()

    @torch.inference_mode()
    def __call__(self) -> FirstToken:
        token_ids = self._token_ids.to(self._model.device)
        begin = time.perf_counter()
        made = self._model.generate(
            token_ids, attention_mask=torch.ones_like(token_ids), max_new_tokens=1, do_sample=False
        )
        made.tolist()  # waits for the device
        return FirstToken(time.perf_counter() - begin, token_ids.shape[1])


def passages_of(cache: BlockCache, num_passages: int, passage_tokens: int) -> list[str]:
    """Cut passages from the language reference."""
    num_tokens = num_passages * passage_tokens + 1
    run = token_run(cache.model, num_tokens, reference_text())
    prompt = cut_prompt(run, num_tokens, final_tokens=1, passage_tokens=passage_tokens)
    return [str(cache.tokenizer.decode(list(token_ids))).strip() for token_ids in prompt.passages]


def measure(
    model: Path, folder: Path, *, num_passages: int, passage_tokens: int, repeats: int
) -> dict[str, Any]:
    """Ask in all ways, and return environment and rows."""
    options = {"model": str(model), "cache_dir": str(folder), "context_budget_bytes": 0}
    engine = ChatBlockCache(**options).engine
    cache = engine.get()
    passages = passages_of(cache, num_passages, passage_tokens)
    cache.prefill(passages)
    ways = {
        "BlockCache": partial(OwnWay, engine),
        "LlamaIndex, query engine": partial(LlamaIndexWay, options),
        "LangChain, LCEL": partial(LangChainWay, options),
    }
    runs: dict[Any, Any] = {
        (name, policy): way(passages, policy) for name, way in ways.items() for policy in POLICIES
    }
    stock = "transformers, generate()"
    runs[stock, "full"] = StockWay(model, cache, passages)
    warm_up, found = in_turn(runs, repeats, lambda number: print(f"round {number} of {repeats}", flush=True))
    check(warm_up, found, num_passages)
    rows = [row_of(name, found) for name in (stock, *ways)]
    environment = asdict(Environment.of(cache.model, model.name))
    packages = ("llama-index-core", "langchain-core")
    environment["versions"] |= {name: importlib.metadata.version(name) for name in packages}
    engine.close()
    return {**environment, "num_passages": num_passages, "passage_tokens": passage_tokens, "rows": rows}


def check(warm_up: dict[Any, FirstToken], found: dict[Any, list[FirstToken]], num_passages: int) -> None:
    """Make sure that what was timed is the work that is claimed."""
    for (name, policy), first in warm_up.items():
        for run in (first, *found[name, policy]):
            if policy == "full":
                assert (run.policy, run.num_reused) == ("full", 0), f"{name}: full prefill reused blocks"
            if policy == "block":
                assert run.num_hits == num_passages, f"{name}: {run.num_hits} of {num_passages} reused"


def row_of(name: str, found: dict[Any, list[FirstToken]]) -> dict[str, Any]:
    """Return what one way took under every policy, and its ratios to full prefill, taken within a round."""
    seconds = {policy: [run.seconds for run in found.get((name, policy), ())] for policy in POLICIES}
    row: dict[str, Any] = {"way": name, "num_tokens": found[name, "full"][0].num_tokens}
    for policy in POLICIES:
        row[f"{policy}_seconds"] = median(seconds[policy]) if seconds[policy] else None
        row[f"{policy}_spread"] = asdict(Spread.of(seconds[policy])) if seconds[policy] else None
    for policy in POLICIES[1:]:
        sooner = ratios(seconds["full"], seconds[policy]) if seconds[policy] else None
        row[f"{policy}_times_sooner"] = sooner.median if sooner else None
    policies = dict.fromkeys(run.policy for run in found.get((name, "auto"), ()))
    return row | {"auto_policy": " or ".join(policies) or None}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the time to the first token through frameworks.")
    parser.add_argument("--model", type=Path, help="a folder; SmolLM2-135M-Instruct if left out")
    parser.add_argument("--num-passages", type=int, default=20)
    parser.add_argument("--passage-tokens", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=7)
    options = vars(parser.parse_args())
    model = options.pop("model") or smollm2_path()
    with tempfile.TemporaryDirectory(prefix="rag-blockcache-bench-") as folder:
        result = measure(model, Path(folder), **options)
    for row in result["rows"]:
        print({heading: row[key] for key, heading in COLUMNS.items()}, flush=True)
    typed = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    command = " ".join(["python tests/benchmarks/bench_drop_ins.py", *typed])
    print(json.dumps({"command": command, "repeats": options["repeats"], "columns": COLUMNS, **result}))


if __name__ == "__main__":
    main()
