"""LangChain's own standard tests of a chat model.

SmolLM2-135M answers them, so that calls of tools and structured output come from real weights under a real
grammar. It is too small to decide by itself that a tool is needed, and to copy Chinese characters from a
question; those two tests get their answers from a script, and check the translation around them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("langchain_tests", reason="langchain-tests is not installed")

from langchain_core._api import LangChainBetaWarning
from langchain_core.documents import Document
from langchain_core.messages import AIMessage
from langchain_parts import DOCUMENTS, answer, scripted
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from rag_blockcache.integrations.langchain import ChatBlockCache

pytestmark = pytest.mark.filterwarnings(f"ignore::{LangChainBetaWarning.__module__}.LangChainBetaWarning")


class Capabilities:
    """What is switched off, and why; whatever else the tests ask about is on."""

    supports_model_override = False  # the weights are those the model was made with
    supports_json_mode = True

    @property
    def chat_model_class(self) -> type[ChatBlockCache]:
        return ChatBlockCache

    @property
    def supported_usage_metadata_details(self) -> dict[str, list[str]]:
        details = ["cache_read_input", "cache_creation_input"]
        return {"invoke": details, "stream": details}


class TestUnit(Capabilities, ChatModelUnitTests):
    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "none"}  # construction loads nothing


SCRIPTS = {
    "test_agent_loop": [
        answer("", ("get_weather", {"location": "San Francisco, CA"})),
        answer("It is sunny in San Francisco."),
    ],
    "test_unicode_tool_call_integration": [
        answer("", ("unicode_customer", {"customer_name": "你好啊集团", "description": "A company."})),
        answer(
            "", ("unicode_customer", {"customer_name": "こんにちは株式会社", "description": "A company."})
        ),
    ],
}


@pytest.fixture(scope="module")
def engine_options(smollm2_path) -> Iterator[dict[str, Any]]:
    """Options of an engine that stays loaded from test to test."""
    options = {"model": str(smollm2_path), "admission": "always", "policy": "block"}
    engine = ChatBlockCache(**options).engine
    yield options
    engine.close()


@pytest.mark.real_weights
@pytest.mark.slow
class TestIntegration(Capabilities, ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def _engine_options(self, engine_options) -> None:
        self.engine_options = engine_options

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {**self.engine_options, "max_tokens": 24}

    @pytest.fixture
    def model(self, request: pytest.FixtureRequest) -> ChatBlockCache:
        """The model, or what stands in for it where it is too small."""
        name, options = request.node.name, {"max_tokens": 24}
        if any(word in name for word in ("tool", "structured", "json_mode")):
            options["max_tokens"] = 100
        if any(word in name for word in ("structured", "json_mode")):
            options["model_kwargs"] = {"repetition_penalty": 1.1}  # its jokes have no end otherwise
        if "runnables" in name:  # nor has the style of its greetings, whichever way a sum rounds
            options["model_kwargs"] = {"repetition_penalty": 1.3}
        model = ChatBlockCache(**{**self.chat_model_params, **options, **getattr(request, "param", {})})
        script = SCRIPTS.get(request.node.originalname)
        return scripted(model, *script) if script else model

    def _told(self, documents: list[Document], stream: bool) -> AIMessage:
        model = ChatBlockCache(**self.engine_options, max_tokens=4)
        if not stream:
            return model.invoke("When was it built?", documents=documents)
        first, *rest = model.stream("When was it built?", documents=documents)
        return sum(rest, first)

    def invoke_with_cache_creation_input(self, *, stream: bool = False) -> AIMessage:
        """Show documents that were never seen before."""
        told = self._told([Document(f"{each.page_content} ({stream})") for each in DOCUMENTS], stream)
        assert told.usage_metadata["input_token_details"]["cache_creation"] > 0
        return told

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        """Show documents for the second time."""
        self._told(DOCUMENTS, stream)
        told = self._told(DOCUMENTS, stream)
        assert told.usage_metadata["input_token_details"]["cache_read"] > 0
        return told
