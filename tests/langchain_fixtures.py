"""Fixtures of the tests of the LangChain models; a module asks for them by ``pytest_plugins``."""

from __future__ import annotations

import pytest
from langchain_parts import engine_options
from rag_blockcache.integrations.langchain import BlockCacheLLM, ChatBlockCache


@pytest.fixture
def options(tiny_model, tiny_tokenizer, request):
    """Options of an engine that no other test shares."""
    return engine_options(tiny_model, tiny_tokenizer, request.node.name)


@pytest.fixture
def chat(options):
    """A chat model over the tiny model."""
    return ChatBlockCache(**options)


@pytest.fixture
def llm(options):
    """An LLM that shares the engine of ``chat``."""
    return BlockCacheLLM(**options)
