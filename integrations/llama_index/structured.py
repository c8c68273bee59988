"""Structured predictions: LlamaIndex's methods for them, by a JSON schema that decoding cannot leave."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, TextBlock
from llama_index.core.instrumentation.events.llm import (
    LLMStructuredPredictEndEvent,
    LLMStructuredPredictInProgressEvent,
    LLMStructuredPredictStartEvent,
)
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.output_parsers import PydanticOutputParser
from llama_index.core.program.utils import process_streaming_objects
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.types import Model, PydanticProgramMode
from llama_index_instrumentation import get_dispatcher
from pydantic import BaseModel

from .responses import chat_piece

_Completed = TypeVar("_Completed")
_Chatted = TypeVar("_Chatted")
_dispatcher = get_dispatcher(__name__)


class SchemaLLM(FunctionCallingLLM):
    """An LLM whose ``response_schema`` option holds: what it predicts validates, whatever its size.

    The model is shown the schema, too. A ``pydantic_program_mode`` other than the default chooses one of
    LlamaIndex's own programs instead.
    """

    def structured_predict(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """Predict an object of a class; see ``LLM.structured_predict``."""
        if self.pydantic_program_mode != PydanticProgramMode.DEFAULT:
            output: Model = super().structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)
            return output
        call = self._schema_call(output_cls, prompt, llm_kwargs, prompt_args)
        return _predicted(output_cls, call.to(self.complete, self.chat))

    async def astructured_predict(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """Predict an object of a class; see ``LLM.astructured_predict``."""
        if self.pydantic_program_mode != PydanticProgramMode.DEFAULT:
            output: Model = await super().astructured_predict(output_cls, prompt, llm_kwargs, **prompt_args)
            return output
        call = self._schema_call(output_cls, prompt, llm_kwargs, prompt_args)
        return _predicted(output_cls, await call.to(self.acomplete, self.achat))

    def stream_structured_predict(
        self,
        output_cls: type[BaseModel],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[BaseModel, None, None]:
        """Predict an object that fills up; see ``LLM.stream_structured_predict``."""
        if self.pydantic_program_mode != PydanticProgramMode.DEFAULT:
            return super().stream_structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)
        call = self._schema_call(output_cls, prompt, llm_kwargs, prompt_args)
        return _objects(output_cls, call.to(self.stream_complete, self.stream_chat))

    async def astream_structured_predict(
        self,
        output_cls: type[BaseModel],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[BaseModel, None]:
        """Predict an object that fills up; see ``LLM.astream_structured_predict``."""
        if self.pydantic_program_mode != PydanticProgramMode.DEFAULT:
            return await super().astream_structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)
        call = self._schema_call(output_cls, prompt, llm_kwargs, prompt_args)
        return _aobjects(output_cls, await call.to(self.astream_complete, self.astream_chat))

    def _schema_call(
        self,
        output_cls: type[BaseModel],
        prompt: BasePromptTemplate,
        llm_kwargs: Mapping[str, Any] | None,
        prompt_args: dict[str, Any],
    ) -> _SchemaCall:
        """Announce a prediction, and return what to ask for it."""
        _dispatcher.event(
            LLMStructuredPredictStartEvent(output_cls=output_cls, template=prompt, template_args=prompt_args)
        )
        shown = PydanticOutputParser(output_cls).get_format_string(escape_json=False)
        options = {**(llm_kwargs or {}), "response_schema": output_cls.model_json_schema()}
        if not self.metadata.is_chat_model:
            text = self._extend_prompt(prompt.format(llm=self, **prompt_args))
            return _SchemaCall(f"{text}\n{shown}", options)
        *others, last = self._extend_messages(prompt.format_messages(llm=self, **prompt_args))
        last = last.model_copy(update={"blocks": [*last.blocks, TextBlock(text=shown)]})
        return _SchemaCall([*others, last], options)


@dataclass(frozen=True)
class _SchemaCall:
    """A prompt that shows a schema, as text or as messages, and the option that enforces it."""

    prompt: str | list[ChatMessage]
    options: dict[str, Any]

    def to(self, complete: Callable[..., _Completed], chat: Callable[..., _Chatted]) -> _Completed | _Chatted:
        """Call that method of an LLM which takes such a prompt."""
        if isinstance(self.prompt, str):
            return complete(self.prompt, formatted=True, **self.options)
        return chat(self.prompt, **self.options)


def _predicted(output_cls: type[Model], response: ChatResponse | CompletionResponse) -> Model:
    text = response.text if isinstance(response, CompletionResponse) else response.message.content
    output = output_cls.model_validate_json(text or "")
    _dispatcher.event(LLMStructuredPredictEndEvent(output=output))
    return output


class _Filling:
    """An object that is filled up by the responses of a stream."""

    def __init__(self, output_cls: type[BaseModel]) -> None:
        self._output_cls = output_cls
        self.output: Any = None

    def fill(self, response: ChatResponse | CompletionResponse) -> Any:
        if isinstance(response, CompletionResponse):  # which older versions of LlamaIndex cannot read
            response = chat_piece(response.text)
        current = None if self.output is None else [self.output]
        self.output = process_streaming_objects(response, self._output_cls, cur_objects=current)
        _dispatcher.event(LLMStructuredPredictInProgressEvent(output=self.output))
        return self.output

    def end(self) -> None:
        _dispatcher.event(LLMStructuredPredictEndEvent(output=self.output))


def _objects(
    output_cls: type[BaseModel], responses: Iterable[ChatResponse | CompletionResponse]
) -> Generator[BaseModel, None, None]:
    filling = _Filling(output_cls)
    for response in responses:
        yield filling.fill(response)
    filling.end()


async def _aobjects(
    output_cls: type[BaseModel], responses: AsyncIterable[ChatResponse | CompletionResponse]
) -> AsyncGenerator[BaseModel, None]:
    filling = _Filling(output_cls)
    async for response in responses:
        yield filling.fill(response)
    filling.end()
