"""Arguments as LlamaIndex users write them, to those of the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator
from transformers import EosTokenCriteria

from rag_blockcache import SharedCache
from rag_blockcache.errors import InvalidInputError

from ..cache_options import CacheOptions

_REQUEST = ("documents", "hints", "response_schema", "finds_passages", "tools", "tool_choice")
_ALIASES = {"stop": "stop_strings", "max_tokens": "max_new_tokens"}
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")


class EngineOptions(CacheOptions):
    """A model as LlamaIndex users name it, and options of the engine behind it."""

    model_name: str = Field(default="", description="Hub id or folder of the model.")
    model: Any = Field(default=None, exclude=True, description="A loaded model, used as it is.")
    tokenizer_name: str | None = Field(default=None, description="Hub id or folder, if not the model's own.")

    @field_validator("model_name", "tokenizer_name", mode="before")
    @classmethod
    def _as_model_name(cls, path: Any) -> Any:
        return str(path) if isinstance(path, Path) else path

    def make_engine(self, **instead: Any) -> SharedCache | None:
        """Return the engine of the model, None without a model; see ``shared_cache``."""
        if self.model is None and not self.model_name:
            return None
        model = self.model_name if self.model is None else self.model
        tokenizer = self.tokenizer_name if self.tokenizer is None else self.tokenizer
        return self.shared_cache(model, tokenizer=tokenizer, **instead)


def loading_options(
    device_map: Any, model_kwargs: Mapping[str, Any], tokenizer_kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return ``device`` and ``dtype`` from the arguments that ``HuggingFaceLLM`` has for them.

    Args:
        device_map: Name of a device, or ``"auto"``.
        model_kwargs: May hold ``dtype``, or its older name ``torch_dtype``.
        tokenizer_kwargs: May hold ``max_length``, which changes nothing here: no prompt is cut.

    Raises:
        InvalidInputError: If there is more to loading the model.
    """
    others = dict(model_kwargs)
    dtypes = [others.pop(name) for name in ("dtype", "torch_dtype") if name in others]
    others |= {name: value for name, value in tokenizer_kwargs.items() if name != "max_length"}
    if others or not isinstance(device_map, str | None):
        raise InvalidInputError(
            f"got device_map {device_map!r}, and {sorted(others)} for model and tokenizer; only one device "
            "and a dtype are chosen here, so load the model with transformers, and pass model= and tokenizer="
        )
    return {"device": device_map, "dtype": dtypes[0] if dtypes else None}


def call_options(
    *given: Mapping[str, Any], stopping_ids: Sequence[int] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part the options of one call into those of the request and those of ``answer()``.

    Args:
        *given: Options, those of greater weight last. ``stop`` and ``max_tokens`` are other names of
            ``stop_strings`` and ``max_new_tokens``. An option of sampling asks for sampling; a temperature of
            0 or None does not. None otherwise is as if not given. What is unknown stays, for the engine to
            refuse.
        stopping_ids: Tokens that end an answer, beside the model's own.
    """
    options = {
        _ALIASES.get(name, name): value
        for each in given
        for name, value in each.items()
        if value is not None or name == "temperature"
    }
    request = {name: options.pop(name) for name in _REQUEST if name in options}
    if "temperature" in options and not options["temperature"]:
        del options["temperature"]
        options["do_sample"] = False
    if any(name in options for name in _SAMPLING):
        options.setdefault("do_sample", True)
    if stopping_ids:
        criteria = options.get("stopping_criteria", ())
        options["stopping_criteria"] = [*criteria, EosTokenCriteria(list(stopping_ids))]
    return request, options


def tool_name(tool_choice: str | Mapping[str, Any] | None, *, is_required: bool) -> str:
    """Return a choice of tools as the engine takes it, whichever of LlamaIndex's forms it came in."""
    if isinstance(tool_choice, Mapping):
        return str(tool_choice["function"]["name"])
    if tool_choice is None:
        return "required" if is_required else "auto"
    return "required" if tool_choice == "any" else tool_choice
