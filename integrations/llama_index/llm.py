"""``BlockCacheLLM``: a LlamaIndex LLM that reuses the passages it finds in any prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
)
from llama_index.core.constants import DEFAULT_NUM_OUTPUTS
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.prompts import BasePromptTemplate, PromptTemplate
from llama_index.core.tools import BaseTool
from pydantic import ConfigDict, Field, PrivateAttr, field_validator

from rag_blockcache import SharedCache
from rag_blockcache.errors import InvalidInputError

from .hints import watch_requests
from .options import EngineOptions, loading_options, tool_name
from .prompt_helper import ModelTokenizer, use_in_settings
from .requests import as_text, chat_call, completion_call
from .responses import (
    astreamed,
    chat_piece,
    completion_piece,
    completion_response,
    streamed,
    tool_selections,
)
from .structured import SchemaLLM


class BlockCacheLLM(EngineOptions, SchemaLLM):
    """A model of transformers that prefills a passage once, and reuses it in every prompt it stands in.

    It takes the place and the arguments of ``HuggingFaceLLM``: retrievers, query engines, chat engines and
    agents stay as they are. Passages are found by their text. The model is loaded at the first question, and
    LLMs with equal arguments share it.

    A call takes ``documents``, ``hints``, ``response_schema``, ``finds_passages`` and ``policy`` beside the
    options of transformers' ``generate()``; ``stop`` and ``max_tokens`` are understood, too.

    Example:
        >>> llm = BlockCacheLLM(model=tiny_model, tokenizer=tiny_tokenizer, max_new_tokens=4)
        >>> response = llm.chat([ChatMessage("Who wrote it?")], documents=["Ada wrote the note."])
        >>> response.additional_kwargs["num_misses"]
        1
    """

    model_config = ConfigDict(extra="forbid")

    context_window: int | None = Field(default=None, gt=0, description="If smaller than the model's.")
    max_new_tokens: int = Field(default=DEFAULT_NUM_OUTPUTS, gt=0, description="Most tokens of an answer.")
    generate_kwargs: dict[str, Any] = Field(default_factory=dict, description="Options of every call.")
    stopping_ids: list[int] = Field(default_factory=list, description="Tokens that end an answer, too.")
    is_chat_model: bool | None = Field(default=None, description="None: if there is a chat template.")
    is_function_calling_model: bool | None = Field(default=None, description="None: if a chat model.")
    device_map: Any = Field(default=None, description="HuggingFaceLLM's name of device.")
    model_kwargs: dict[str, Any] = Field(default_factory=dict, description="May hold dtype.")
    tokenizer_kwargs: dict[str, Any] = Field(default_factory=dict, description="May hold max_length.")
    tokenizer_outputs_to_remove: list[str] = Field(
        default_factory=list, description="Of no effect: the model gets token ids and nothing else."
    )
    policy: str = Field(default="auto", description="How blocks are reused; see BlockCache.answer.")
    sets_settings: bool = Field(
        default=True, description="Set Settings.tokenizer, and Settings.prompt_helper if there is none yet."
    )
    uses_hints: bool = Field(
        default=True, description="Learn from LlamaIndex's instrumentation which nodes are in a prompt."
    )

    _engine: SharedCache = PrivateAttr()

    @field_validator("query_wrapper_prompt", mode="before")
    @classmethod
    def _as_template(cls, prompt: Any) -> Any:
        return PromptTemplate(prompt) if isinstance(prompt, str) else prompt

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        loading = loading_options(self.device_map, self.model_kwargs, self.tokenizer_kwargs)
        engine = self.make_engine(
            **{name: value for name, value in loading.items() if getattr(self, name) is None}
        )
        if engine is None:
            raise InvalidInputError("no model is named; pass model_name=, or model= with tokenizer=")
        self._engine = engine
        if self.uses_hints:
            watch_requests()
        if self.sets_settings:
            use_in_settings(ModelTokenizer(self._engine))

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex serializes it under."""
        return "BlockCacheLLM"

    @property
    def engine(self) -> SharedCache:
        """What it answers with; ``engine.get()`` is the ``BlockCache``, to prefill passages say."""
        return self._engine

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex plans prompts by; known without the weights."""
        window = self._engine.context_window
        is_chat = self._engine.has_chat_template if self.is_chat_model is None else self.is_chat_model
        calls = is_chat if self.is_function_calling_model is None else self.is_function_calling_model
        return LLMMetadata(
            context_window=min(window, self.context_window or window),
            num_output=self.max_new_tokens,
            is_chat_model=is_chat,
            is_function_calling_model=calls,
            model_name=self.model_name or self._engine.model_name,
        )

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer messages."""
        request, options, to_response = chat_call(self, messages, kwargs)
        return to_response(self._engine.answer(request, **options))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Answer messages, piece by piece; the last response has the calls of tools, and the counts."""
        request, options, to_response = chat_call(self, messages, kwargs)
        return streamed(self._engine.stream_answer(request, **options), chat_piece, to_response)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer messages; the event loop goes on meanwhile."""
        request, options, to_response = chat_call(self, messages, kwargs)
        return to_response(await self._engine.aanswer(request, **options))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """Answer messages, piece by piece; the event loop goes on meanwhile."""
        request, options, to_response = chat_call(self, messages, kwargs)
        return astreamed(self._engine.astream_answer(request, **options), chat_piece, to_response)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Continue a prompt, or answer it if it is not formatted and the model is a chat model."""
        request, options = completion_call(self, prompt, formatted, kwargs)
        return completion_response(self._engine.answer(request, **options))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """Complete a prompt, piece by piece; the last response has the counts."""
        request, options = completion_call(self, prompt, formatted, kwargs)
        return streamed(self._engine.stream_answer(request, **options), completion_piece, completion_response)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Complete a prompt; the event loop goes on meanwhile."""
        request, options = completion_call(self, prompt, formatted, kwargs)
        return completion_response(await self._engine.aanswer(request, **options))

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        """Complete a prompt, piece by piece; the event loop goes on meanwhile."""
        request, options = completion_call(self, prompt, formatted, kwargs)
        return astreamed(
            self._engine.astream_answer(request, **options), completion_piece, completion_response
        )

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """Return the calls of tools in a response."""
        calls = tool_selections(response)
        if not calls and error_on_no_tool_call:
            raise ValueError(f"the model called no tool but answered {response.message.content!r}")
        return calls

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: str | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        asked = ChatMessage(user_msg) if isinstance(user_msg, str) else user_msg
        return {
            "messages": [*(chat_history or ()), *([asked] if asked else ())],
            "tools": [tool.metadata.to_openai_tool(skip_length_check=True) for tool in tools],
            "tool_choice": tool_name(tool_choice, is_required=tool_required),
            "parallel_tool_calls": allow_parallel_tool_calls,
            **kwargs,
        }

    def _get_messages(self, prompt: BasePromptTemplate, **prompt_args: Any) -> list[ChatMessage]:
        return super()._get_messages(prompt, **as_text(prompt_args))

    def _get_prompt(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        return super()._get_prompt(prompt, **as_text(prompt_args))
