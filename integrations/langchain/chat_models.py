"""ChatBlockCache: a LangChain chat model whose prompts reuse what was prefilled."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, TypeVar
from uuid import UUID

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun, Callbacks
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput, ModelProfile
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from pydantic import SecretStr

from rag_blockcache import Answer, Chat

from .batch_inputs import merged
from .batching import aask, ask, atogether, leave_batch, together
from .engine import EngineModel
from .messages import PROVIDER, answer_message, chat_messages, last_chunk, passages, shown_texts
from .streaming import astreamed, streamed
from .structured_output import structured
from .tools import choice_of_tool, function_tools, response_schema

_Result = TypeVar("_Result")


class ChatBlockCache(EngineModel[AIMessage], BaseChatModel):
    """A chat model in which passages of the prompt are reused wherever they stand.

    Passages are found by their text. What retrievers of the same chain returned, artifacts of tool messages
    and blocks of type ``text-plain`` tell where others begin and end, which are then learned. Every call also
    takes ``documents=``: passages that the model must read, shown to it unless the messages hold them.

    Construction loads nothing. All models with equal options share one engine.

    Attributes:
        streaming: Let ``invoke`` stream to the callbacks.
        api_key: Taken, like the next two, so that code written for a hosted model runs; nothing leaves this
            machine, so there is nothing to unlock, to wait for or to repeat.
        timeout: See ``api_key``.
        max_retries: See ``api_key``.

    The other attributes are those of ``EngineModel``.
    """

    model_config = EngineModel.model_config  # not LangChain's, which passes over what it does not know

    streaming: bool = False
    api_key: SecretStr | None = None
    timeout: float | None = None
    max_retries: int | None = None

    # What LangChain asks of a model

    @property
    def _llm_type(self) -> str:
        return f"{PROVIDER}-chat"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return self.answer_params()

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop or self.stop_strings(), **kwargs)
        params["ls_provider"] = PROVIDER
        params.setdefault("ls_model_name", self.model_label)
        return params

    def _resolve_model_profile(self) -> ModelProfile:
        return ModelProfile(
            text_inputs=True,
            image_inputs=False,
            audio_inputs=False,
            video_inputs=False,
            pdf_inputs=False,
            text_outputs=True,
            tool_calling=True,
            tool_choice=True,
            structured_output=True,
        )

    # Answers

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        request, options = self._prepared(messages, stop, run_manager, kwargs)
        return self._result(ask(self.engine, request, options), kwargs)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        request, options = self._prepared(messages, stop, run_manager, kwargs)
        return self._result(await aask(self.engine, request, options), kwargs)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        leave_batch()
        request, options = self._prepared(messages, stop, run_manager, kwargs)
        stream = self.engine.stream_answer(request, **options)
        return streamed(stream, run_manager, _piece, partial(self._last, options=kwargs))

    def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        leave_batch()
        request, options = self._prepared(messages, stop, run_manager, kwargs)
        stream = self.engine.astream_answer(request, **options)
        return astreamed(stream, run_manager, _piece, partial(self._last, options=kwargs))

    def _prepared(
        self, messages: list[BaseMessage], stop: list[str] | None, run_manager: Any, options: dict[str, Any]
    ) -> tuple[Chat, dict[str, Any]]:
        """Translate a call: what is asked, and the options of the answer."""
        options = dict(options)
        for obeyed_elsewhere in ("stream", "parallel_tool_calls"):
            options.pop(obeyed_elsewhere, None)
        tools = function_tools(options.pop("tools", None))
        request = Chat(
            messages=chat_messages(messages),
            documents=passages(options.pop("documents", None) or ()),
            hints=self.hints(run_manager, shown_texts(messages)),
            tools=tools,
            tool_choice=choice_of_tool(options.pop("tool_choice", None), tools),
            response_schema=response_schema(options.pop("response_format", None)),
            finds_passages=options.pop("finds_passages", self.finds_passages),
        )
        return request, self.answer_options(stop, options)

    def _result(self, answer: Answer, options: dict[str, Any]) -> ChatResult:
        message = answer_message(answer, self.model_label, num_calls=_num_calls(options))
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _last(self, answer: Answer, options: dict[str, Any]) -> ChatGenerationChunk:
        message = last_chunk(answer, self.model_label, num_calls=_num_calls(options))
        return ChatGenerationChunk(message=message)

    # Batches

    def generate(
        self,
        messages: list[list[BaseMessage]],
        stop: list[str] | None = None,
        callbacks: Callbacks = None,
        *,
        run_id: UUID | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """Answer several lists of messages together."""
        stock = super().generate
        if len(messages) < 2:
            return stock(messages, stop, callbacks, run_id=run_id, **kwargs)
        calls = _one_by_one(stock, messages, stop, callbacks, run_id, kwargs)
        results = together(self.engine, calls, self.batch_size)
        return merged(results, self._combine_llm_outputs([each.llm_output for each in results]))

    async def agenerate(
        self,
        messages: list[list[BaseMessage]],
        stop: list[str] | None = None,
        callbacks: Callbacks = None,
        *,
        run_id: UUID | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """Answer several lists of messages together, without keeping the event loop."""
        stock = super().agenerate
        if len(messages) < 2:
            return await stock(messages, stop, callbacks, run_id=run_id, **kwargs)
        calls = _one_by_one(stock, messages, stop, callbacks, run_id, kwargs)
        results = await atogether(self.engine, calls, self.batch_size)
        return merged(results, self._combine_llm_outputs([each.llm_output for each in results]))

    # Tools and structured output

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: Any = None,
        strict: bool | None = None,
        parallel_tool_calls: bool = True,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Let the model call tools.

        Args:
            tools: Of any kind that LangChain knows.
            tool_choice: None or ``auto`` lets the model choose; ``any``, ``required`` or True makes it call
                one; the name of a tool, or OpenAI's or Anthropic's dictionary with it, makes it call that;
                ``none`` or False lets it call none.
            strict: Make all parameters required, as OpenAI's strict mode does. Calls that are forced follow
                the schema in any case.
            parallel_tool_calls: Keep all calls of an answer; otherwise the first.
            **kwargs: Bound as well.

        Raises:
            InvalidInputError: If a tool or the choice cannot be used.
        """
        functions = function_tools(tools, strict=strict)
        chosen = choice_of_tool(tool_choice, functions)
        if not parallel_tool_calls:
            kwargs["parallel_tool_calls"] = False
        return self.bind(tools=functions, tool_choice=chosen, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        include_raw: bool = False,
        method: Literal["json_schema", "function_calling", "json_mode"] = "json_schema",
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Have answers follow a schema, which decoding is constrained to.

        Args:
            schema: A Pydantic class gives its instances; a ``TypedDict``, a JSON schema or a function gives
                dictionaries. ``json_mode`` works without one, too.
            include_raw: Return a dictionary with ``raw``, ``parsed`` and ``parsing_error`` instead.
            method: ``json_schema`` constrains the answer, ``function_calling`` a call that is forced.
                ``json_mode`` constrains the answer as well; here it is no weaker than ``json_schema``.
            strict: Make all properties required, as OpenAI's strict mode does.
            **kwargs: Bound as well, such as ``tools``.

        Raises:
            InvalidInputError: If there is no such method, or it needs a schema.
        """
        return structured(self, schema, method, strict=strict, include_raw=include_raw, **kwargs)


def _piece(text: str) -> ChatGenerationChunk:
    return ChatGenerationChunk(message=AIMessageChunk(content=text))


def _one_by_one(
    generate: Callable[..., _Result],
    messages: list[list[BaseMessage]],
    stop: list[str] | None,
    callbacks: Callbacks,
    run_id: UUID | None,
    options: dict[str, Any],
) -> list[Callable[[], _Result]]:
    """Return a call for each list of messages; a run has one id, which the first takes."""
    ids = [run_id, *[None] * (len(messages) - 1)]
    return [
        partial(generate, [each], stop, callbacks, run_id=own, **options)
        for each, own in zip(messages, ids, strict=True)
    ]


def _num_calls(options: dict[str, Any]) -> int | None:
    """Return how many tool calls of an answer are wanted; None for all."""
    return None if options.get("parallel_tool_calls", True) else 1
