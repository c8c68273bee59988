"""What retrievers found for the request in progress, told by LangChain's callbacks.

A model sees messages, not the documents in them. What a retriever of the same run returned goes to the engine
as hints, so that passages nobody prefilled are learned at their true boundaries. Hints never add text to a
prompt, and everything works without them: passages that were prefilled are found by their text.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any
from uuid import UUID
from weakref import WeakKeyDictionary

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.runnables.config import ensure_config

_lock = threading.Lock()
_is_registered = False
# Outside any chain, a retriever and a model share nothing but the task or thread that calls them.
_last_found: WeakKeyDictionary[Any, list[str]] = WeakKeyDictionary()


class RetrievalObserver(BaseCallbackHandler):
    """Notes what retrievers return within one run.

    Attributes:
        texts: What they returned so far.
        caller: The task or thread that began the run.
    """

    ignore_agent = ignore_chain = ignore_chat_model = ignore_custom_event = ignore_llm = ignore_retry = True

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.caller = _caller()

    def on_retriever_end(
        self, documents: Sequence[Document], *, run_id: UUID, parent_run_id: UUID | None = None, **_: Any
    ) -> None:
        """Note the texts of documents, also as they stand in a list that was put into a prompt as it is."""
        for text in (document.page_content for document in documents):
            self.texts += dict.fromkeys([text, repr(text)[1:-1]])
        if parent_run_id is None:
            _last_found[self.caller] = self.texts


class _OnePerRun(BaseCallbackHandler):
    """Stands in the variable that LangChain looks for a handler in: there, but false.

    LangChain then makes an observer for every run that inherits none, so that a run and all runs within it
    share one, runs beside it do not, and it goes when they end.
    """

    ignore_agent = ignore_chain = ignore_chat_model = ignore_custom_event = ignore_llm = True
    ignore_retriever = ignore_retry = True

    def __bool__(self) -> bool:
        return False


def observe_retrievers() -> None:
    """Have every run of this process observed from now on, unless LangChain has no means for that."""
    global _is_registered
    with _lock:
        if _is_registered:
            return
        _is_registered = True
        try:
            from langchain_core.tracers.context import register_configure_hook
        except ImportError:  # not part of what LangChain documents
            return
        stateless = _OnePerRun()  # so that all contexts may share it
        variable: ContextVar[Any] = ContextVar("rag_blockcache_observer", default=stateless)
        register_configure_hook(variable, inheritable=True, handle_class=RetrievalObserver)


def found_texts(run_manager: Any) -> list[str]:
    """Return what was retrieved in the run that a model call belongs to, or last by its task or thread.

    Args:
        run_manager: Of the call; None where LangChain hands none over, as when it streams.
    """
    holder = run_manager or ensure_config().get("callbacks")
    observers = [each for each in getattr(holder, "handlers", ()) if isinstance(each, RetrievalObserver)]
    callers = [each.caller for each in observers] or [_caller()]
    texts = [text for each in observers for text in each.texts]
    return texts + [text for caller in callers for text in _last_found.get(caller, ())]


def _caller() -> Any:
    try:
        return asyncio.current_task() or threading.current_thread()
    except RuntimeError:  # no event loop in this thread
        return threading.current_thread()
