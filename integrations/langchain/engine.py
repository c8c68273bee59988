"""What the chat model and the LLM have in common: the engine behind them, and options of an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, PrivateAttr

from rag_blockcache import SharedCache

from .observer import found_texts, observe_retrievers

_ENGINE_OPTIONS = (
    "tokenizer",
    "device",
    "dtype",
    "adapter",
    "preamble",
    "passage_format",
    "condition_on_preamble",
    "disk_budget_bytes",
    "memory_budget_bytes",
    "salt",
    "admission",
)
_ALWAYS_GIVEN = {"passage_format", "admission"}  # their defaults here are not those of BlockCache
_SAMPLING = ("temperature", "top_p", "top_k")


class EngineOptions(BaseModel):
    """Options of ``BlockCache``, and of the answers that it gives.

    Attributes:
        model: Hub id, local path, or a loaded causal language model of transformers.
        cache_dir: Where blocks are kept; None keeps them in memory.
        tokenizer: As for ``BlockCache``, like all down to ``admission``.
        device: Where a model loaded by name goes.
        dtype: For a model loaded by name.
        adapter: A PEFT adapter for a model loaded by name.
        preamble: Text before passages that are not in the prompt already.
        passage_format: ``"verbatim"`` is how chains show documents, so that blocks are found in any prompt.
        condition_on_preamble: Let blocks also attend to the preamble.
        disk_budget_bytes: Bound of the blocks on disk.
        memory_budget_bytes: Bound of the blocks in memory.
        salt: Blocks of one salt are invisible under another.
        admission: What becomes of a passage that nobody prefilled: ``"frequency"`` keeps it in memory and
            stores it at its second use.
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
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", protected_namespaces=())

    model: Any = Field(validation_alias=AliasChoices("model", "model_name"))
    cache_dir: str | Path | None = None
    tokenizer: Any = None
    device: Any = None
    dtype: Any = None
    adapter: str | Path | None = None
    preamble: str | None = None
    passage_format: Any = "verbatim"
    condition_on_preamble: bool = False
    disk_budget_bytes: int | None = None
    memory_budget_bytes: int | None = 4 * 2**30
    salt: str = ""
    admission: str = "frequency"
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
            fields = type(self).model_fields
            given = {name: getattr(self, name) for name in _ENGINE_OPTIONS}
            options = {
                name: value
                for name, value in given.items()
                if name in _ALWAYS_GIVEN or value != fields[name].default
            }
            self._engine = SharedCache(self.model, self.cache_dir, **options)
        return self._engine

    @property
    def model_label(self) -> str:
        """Name of the model; of its class, if it was given as an object without a name."""
        return self.engine.model_name or type(self.model).__name__

    def answer_params(self) -> dict[str, Any]:
        """Return what an answer depends on, for traces and as part of the key in LangChain's own cache."""
        names = ("adapter", "dtype", "preamble", "passage_format", "condition_on_preamble", "policy")
        params = {name: getattr(self, name) for name in (*names, "finds_passages")}
        return {"model_name": self.model_label, **params, **self.answer_options(None, {})}

    def hints(self, run_manager: Any, shown: Sequence[str] = ()) -> list[str]:
        """Return texts that may stand in a prompt: those that it says it shows, and what was retrieved."""
        found = found_texts(run_manager) if self.observes_retrievers else []
        return list(dict.fromkeys([*shown, *found]))

    def token_ids(self, text: str) -> list[int]:
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
