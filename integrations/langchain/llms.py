"""BlockCacheLLM: a LangChain completion LLM whose prompts reuse what was prefilled."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from functools import partial
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseLLM, LangSmithParams
from langchain_core.outputs import Generation, GenerationChunk, LLMResult

from rag_blockcache import Answer, Text
from rag_blockcache.errors import InvalidInputError

from .batching import aask, ask, atogether, leave_batch, together
from .engine import EngineModel
from .messages import PROVIDER, metadata, passages, usage
from .streaming import astreamed, streamed
from .tools import response_schema


class BlockCacheLLM(EngineModel[str], BaseLLM):
    """An LLM that continues prompts as they are, and reuses the passages in them wherever they stand.

    Passages are found and learned as by ``ChatBlockCache``, and ``documents=`` works alike. Every call also
    takes ``pipeline_kwargs=``, as ``HuggingFacePipeline`` does. Its attributes are in ``EngineModel``.
    """

    model_config = EngineModel.model_config  # not LangChain's, which passes over what it does not know

    @classmethod
    def from_model_id(
        cls,
        model_id: str,
        task: str = "text-generation",
        backend: str = "default",
        device: int | str | None = None,
        device_map: str | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        pipeline_kwargs: Mapping[str, Any] | None = None,
        batch_size: int = 4,
        **kwargs: Any,
    ) -> BlockCacheLLM:
        """Make an LLM from the arguments of ``HuggingFacePipeline.from_model_id``.

        Args:
            model_id: Hub id or local path.
            task: ``text-generation``; there is no other here.
            backend: ``default``, which is PyTorch; there is no other here.
            device: -1 is the CPU, another number that GPU; a name is taken as it is.
            device_map: Instead of ``device``: ``auto``, ``cpu`` or ``cuda``.
            model_kwargs: ``dtype`` or ``torch_dtype``.
            pipeline_kwargs: Options of transformers' ``generate()``, such as ``max_new_tokens``.
            batch_size: As in the class.
            **kwargs: Further attributes of the class, such as ``cache_dir``.

        Raises:
            InvalidInputError: If an argument has a value or a name that does not exist here.
        """
        if task != "text-generation" or backend != "default":
            raise InvalidInputError(
                f"task is {task!r}, backend is {backend!r}; there is 'text-generation' with 'default' only"
            )
        loading = dict(model_kwargs or {})
        dtype = loading.pop("torch_dtype", loading.pop("dtype", None))
        if loading:
            raise InvalidInputError(
                f"model_kwargs have {sorted(loading)}; only 'dtype' is known, or pass a loaded model"
            )
        if isinstance(device, int):
            device = "cpu" if device < 0 else f"cuda:{device}"
        return cls(
            model=model_id,
            device=device if device is not None else device_map,
            dtype=dtype,
            model_kwargs=_generation_options(pipeline_kwargs or {}),
            batch_size=batch_size,
            **kwargs,
        )

    # What LangChain asks of an LLM

    @property
    def _llm_type(self) -> str:
        return PROVIDER

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return self.answer_params()

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop or self.stop_strings(), **kwargs)
        params["ls_provider"] = PROVIDER
        params.setdefault("ls_model_name", self.model_label)
        return params

    # Answers

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        requests, options = self._prepared(prompts, stop, run_manager, kwargs)
        calls = [partial(ask, self.engine, request, options) for request in requests]
        return self._result(together(self.engine, calls, self.batch_size))

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        requests, options = self._prepared(prompts, stop, run_manager, kwargs)
        calls = [partial(aask, self.engine, request, options) for request in requests]
        return self._result(await atogether(self.engine, calls, self.batch_size))

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        leave_batch()
        (request,), options = self._prepared([prompt], stop, run_manager, kwargs)
        stream = self.engine.stream_answer(request, **options)
        return streamed(stream, run_manager, _piece, self._last)

    def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        leave_batch()
        (request,), options = self._prepared([prompt], stop, run_manager, kwargs)
        stream = self.engine.astream_answer(request, **options)
        return astreamed(stream, run_manager, _piece, self._last)

    def _prepared(
        self, prompts: list[str], stop: list[str] | None, run_manager: Any, options: dict[str, Any]
    ) -> tuple[list[Text], dict[str, Any]]:
        """Translate a call: what is asked, and the options of the answers."""
        options = {**options, **_generation_options(options.get("pipeline_kwargs") or {})}
        options.pop("pipeline_kwargs", None)
        shown = {
            "documents": passages(options.pop("documents", None) or ()),
            "hints": self.hints(run_manager),
            "response_schema": response_schema(options.pop("response_format", None)),
            "finds_passages": options.pop("finds_passages", self.finds_passages),
        }
        return [Text(prompt, **shown) for prompt in prompts], self.answer_options(stop, options)

    def _result(self, answers: list[Answer]) -> LLMResult:
        generations = [[Generation(text=each.text, generation_info=self._info(each))] for each in answers]
        return LLMResult(generations=generations, llm_output={"model_name": self.model_label})

    def _last(self, answer: Answer) -> GenerationChunk:
        return GenerationChunk(text="", generation_info=self._info(answer))

    def _info(self, answer: Answer) -> dict[str, Any]:
        """Return what there is to say of an answer beside its text."""
        return {**metadata(answer, self.model_label), "usage_metadata": usage(answer)}


def _piece(text: str) -> GenerationChunk:
    return GenerationChunk(text=text)


def _generation_options(pipeline_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a pipeline's arguments is for ``generate()``."""
    options = dict(pipeline_kwargs)
    if options.pop("return_full_text", False):
        raise InvalidInputError("return_full_text=True is not on offer; put the prompt before the answer")
    return options
