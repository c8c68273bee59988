"""What the chat model and the LLM have in common: the engine behind them, options, and batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from langchain_core.language_models import LanguageModelInput
from langchain_core.runnables import RunnableSerializable
from pydantic import AliasChoices, ConfigDict, Field, PrivateAttr

from rag_blockcache import SharedCache

from ..cache_options import CacheOptions
from .batch_inputs import Configs, group_size, single_acalls, single_calls
from .batching import atogether, together
from .observer import found_texts, observe_retrievers

_Output = TypeVar("_Output")
_SAMPLING = ("temperature", "top_p", "top_k")


class EngineModel(RunnableSerializable[LanguageModelInput, _Output], CacheOptions):
    """A model of LangChain that answers by an engine.

    Attributes:
        model: Hub id, local path, or a loaded causal language model of transformers.
        policy: How much of a block is computed again, see ``BlockCache.answer``.
        finds_passages: Whether to look for passages; otherwise all text is computed as it stands.
        observes_retrievers: Whether to learn passages from what retrievers of the same chain return. The
            observer is added to LangChain's callbacks for all of this process.
        max_tokens: Most tokens of an answer.
        temperature: 0 and None take the likeliest token.
        top_p: Sample from the likeliest tokens that have this much probability together.
        top_k: Sample from so many likeliest tokens.
        stop: Strings that end an answer.
        model_kwargs: Further options of transformers' ``generate()``.
        batch_size: So many prompts of a batch are computed together.

    The other attributes are those of ``CacheOptions``.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    model: Any = Field(validation_alias=AliasChoices("model", "model_name"))
    policy: str = "auto"
    finds_passages: bool = True
    observes_retrievers: bool = True
    max_tokens: int = Field(256, validation_alias=AliasChoices("max_tokens", "max_new_tokens"))
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: list[str] | str | None = Field(
        default=None, validation_alias=AliasChoices("stop", "stop_sequences")
    )
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    batch_size: int = Field(default=8, ge=1)

    _engine: SharedCache | None = PrivateAttr(default=None)

    def model_post_init(self, context: Any, /) -> None:
        """Begin to observe retrievers."""
        super().model_post_init(context)
        if self.observes_retrievers:
            observe_retrievers()

    @property
    def engine(self) -> SharedCache:
        """The cache, shared by all in this process that have equal options; loaded when first needed."""
        if self._engine is None:
            self._engine = self.shared_cache(self.model)
        return self._engine

    @property
    def model_label(self) -> str:
        """Name of the model; of its class, if it was given as an object without a name."""
        return self.engine.model_name or type(self.model).__name__

    def answer_params(self) -> dict[str, Any]:
        """Return what an answer depends on, for traces and as part of the key in LangChain's own cache."""
        names = ("adapter", "dtype", "preamble", "passage_format", "blocks_see", "policy")
        params = {name: getattr(self, name) for name in (*names, "finds_passages")}
        return {"model_name": self.model_label, **params, **self.answer_options(None, {})}

    def hints(self, run_manager: Any, shown: Sequence[str] = ()) -> list[str]:
        """Return texts that may stand in a prompt: those that it says it shows, and what was retrieved."""
        found = found_texts(run_manager) if self.observes_retrievers else []
        return list(dict.fromkeys([*shown, *found]))

    def get_token_ids(self, text: str) -> list[int]:
        """Return the token ids of a text, by the model's own tokenizer."""
        return list(self.engine.tokenizer(text, add_special_tokens=False)["input_ids"])

    def stop_strings(self, stop: Sequence[str] | str | None = None) -> list[str] | None:
        """Return the strings that end an answer: those of the call, else those of the constructor."""
        stops = self.stop if stop is None else stop
        return ([stops] if isinstance(stops, str) else list(stops)) if stops else None

    def answer_options(self, stop: Sequence[str] | str | None, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of one answer: those of the call, else those of the constructor.

        Args:
            stop: Of the call; None takes the constructor's.
            options: Of the call, by LangChain's names or those of ``generate()``.
        """
        sampling = {name: getattr(self, name) for name in _SAMPLING}
        merged = {"policy": self.policy, "max_new_tokens": self.max_tokens, **sampling, **self.model_kwargs}
        merged |= options
        if "max_tokens" in merged:
            merged["max_new_tokens"] = merged.pop("max_tokens")
        if stops := self.stop_strings(stop):
            merged["stop_strings"] = stops
        return _with_sampling(merged)

    # Batches

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: Configs = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[_Output]:
        """Answer inputs together, each with its own config; see ``batch_size``."""
        calls = single_calls(self.invoke, inputs, config, kwargs, return_exceptions=return_exceptions)
        return together(self.engine, calls, group_size(self.batch_size, config))

    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: Configs = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[_Output]:
        """Answer inputs together as ``batch`` does, without keeping the event loop."""
        calls = single_acalls(self.ainvoke, inputs, config, kwargs, return_exceptions=return_exceptions)
        return await atogether(self.engine, calls, group_size(self.batch_size, config))


def _with_sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Decide between sampling and the likeliest token, which ``generate()`` wants to be told."""
    chosen = {name: options.pop(name) for name in _SAMPLING if name in options}
    samples = options.get("do_sample")
    if samples is None:
        temperature = chosen.get("temperature")
        samples = any(chosen.values()) if temperature is None else temperature > 0
    if samples:
        options |= {name: value for name, value in chosen.items() if value is not None}
    return {**options, "do_sample": bool(samples)}
