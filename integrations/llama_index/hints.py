"""Where one passage ends and the next begins: what LlamaIndex's own instrumentation tells of a request.

An LLM sees a prompt, not the nodes in it. The dispatcher that LlamaIndex traces requests with sees the nodes,
so a span handler notes their texts for as long as the request lasts. They are hints and nothing more:
passages that were prefilled are found by their text without them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import AsyncGenerator, Generator, Iterable, Iterator
from contextlib import aclosing, closing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.response.schema import AsyncStreamingResponse, StreamingResponse
from llama_index.core.instrumentation.span import BaseSpan
from llama_index.core.instrumentation.span_handlers import BaseSpanHandler
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import BaseNode, MetadataMode
from llama_index.core.workflow import Workflow
from llama_index_instrumentation import get_dispatcher

# CitationQueryEngine numbers its sources by their place in one answer; the passage begins behind the number.
_SOURCE_NUMBER = re.compile(r"Source \d+:\n")
_END = object()


@dataclass
class _Scope:
    """Texts that were retrieved for one request, while it lasts."""

    texts: list[str] = field(default_factory=list)
    is_open: bool = True

    def close(self) -> None:
        self.texts, self.is_open = [], False


_scope: ContextVar[_Scope | None] = ContextVar("rag_blockcache_llama_index", default=None)


def current_hints() -> tuple[str, ...]:
    """Return the texts of nodes that were retrieved for the request in progress."""
    scope = _scope.get()
    return tuple(dict.fromkeys(scope.texts)) if scope else ()


def node_texts(node: BaseNode) -> list[str]:
    """Return the texts by which a node may stand in a prompt: with its metadata, and without.

    Args:
        node: As a synthesizer or a tool gets it.
    """
    bare = node.get_content(metadata_mode=MetadataMode.NONE)
    if number := _SOURCE_NUMBER.match(bare):
        return [bare[number.end() :].strip()]
    return [node.get_content(metadata_mode=MetadataMode.LLM).strip(), bare.strip()]


def watch_requests() -> None:
    """Add the span handler to LlamaIndex's root dispatcher, unless it is there."""
    dispatcher = get_dispatcher()
    if not any(isinstance(handler, _RequestWatcher) for handler in dispatcher.span_handlers):
        dispatcher.add_span_handler(_RequestWatcher())


class _RequestSpan(BaseSpan):
    """A request in progress: its scope, and the one that it replaced."""

    scope: Any
    outer: Any


class _RequestWatcher(BaseSpanHandler[_RequestSpan]):
    """Opens a scope for each synthesis and each run of an agent, and fills it with what was retrieved."""

    @classmethod
    def class_name(cls) -> str:
        return "RagBlockCacheRequestWatcher"

    def new_span(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any | None = None,
        parent_span_id: str | None = None,
        tags: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> _RequestSpan | None:
        """Open a scope where a request begins."""
        nodes = bound_args.arguments.get("nodes") if isinstance(instance, BaseSynthesizer) else None
        if nodes is None and not _is_run(instance, id_):
            return None
        scope = _Scope(_texts(nodes or ()))
        span = _RequestSpan(id_=id_, parent_id=parent_span_id, scope=scope, outer=_scope.get())
        _scope.set(scope)
        return span

    def prepare_to_exit_span(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any | None = None,
        result: Any | None = None,
        **kwargs: Any,
    ) -> _RequestSpan | None:
        """Note what a retriever returned; leave the scope where a request ends."""
        scope = _scope.get()
        if isinstance(instance, BaseRetriever) and isinstance(result, list) and scope and scope.is_open:
            scope.texts += _texts(result)
        span = self.open_spans.get(id_)
        if span is not None:
            _scope.set(span.outer)
            _hand_over(span.scope, result)
        return span

    def prepare_to_drop_span(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any | None = None,
        err: BaseException | None = None,
        **kwargs: Any,
    ) -> _RequestSpan | None:
        """Leave the scope of a request that failed."""
        return self.prepare_to_exit_span(id_, bound_args, instance)


def _is_run(instance: Any, span_id: str) -> bool:
    """Say whether a span is that of a whole workflow, such as an agent, and not of one of its steps."""
    return isinstance(instance, Workflow) and span_id.startswith(f"{type(instance).__name__}.run-")


def _texts(nodes: Iterable[Any]) -> list[str]:
    return [text for each in nodes for text in node_texts(each.node)]


def _hand_over(scope: _Scope, result: Any) -> None:
    """Close a scope, or leave it to the stream that a request returned: the LLM is asked when it is read."""
    if isinstance(result, StreamingResponse) and isinstance(result.response_gen, Generator):
        result.response_gen = _stream_within(scope, result.response_gen)
    elif isinstance(result, AsyncStreamingResponse) and isinstance(result.response_gen, AsyncGenerator):
        result.response_gen = _astream_within(scope, result.response_gen)
    else:
        scope.close()


def _stream_within(scope: _Scope, pieces: Generator[Any, None, None]) -> Generator[Any, None, None]:
    try:
        with closing(pieces):
            while True:
                with _within(scope):  # not between pieces, when whoever reads them has the turn
                    piece = next(pieces, _END)
                if piece is _END:
                    return
                yield piece
    finally:
        scope.close()


async def _astream_within(scope: _Scope, pieces: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    try:
        async with aclosing(pieces):
            while True:
                with _within(scope):
                    piece = await anext(pieces, _END)
                if piece is _END:
                    return
                yield piece
    finally:
        scope.close()


@contextmanager
def _within(scope: _Scope) -> Iterator[None]:
    token = _scope.set(scope)
    try:
        yield
    finally:
        _scope.reset(token)
