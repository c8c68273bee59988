"""Options of transformers' ``generate()``: which can be chosen here, and what holds where none was."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig, GenerationMixin

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.model import Model

_OURS = {"max_new_tokens", "use_cache", "past_key_values", "cache_implementation", "cache_config"}
_OURS |= {"compile_config", "continuous_batching_config", "prefill_chunk_size", "return_dict_in_generate"}
_OURS |= {"output_scores", "output_logits", "output_attentions", "output_hidden_states", "custom_generate"}
# They ask for other passes than one over the prompt and one a token, change the prompt, or run foreign code.
_IMPOSSIBLE = {"guidance_scale", "negative_prompt_ids", "negative_prompt_attention_mask", "token_healing"}
_IMPOSSIBLE |= {"dola_layers", "penalty_alpha", "constraints", "force_words_ids", "num_beam_groups"}
_IMPOSSIBLE |= {"assistant_early_exit", "is_assistant", "use_mtp", "num_return_sequences", "max_length"}
# Set in every call, because a configuration of the model or the user may say otherwise.
FIXED: dict[str, Any] = {
    "cache_implementation": None,
    "return_dict_in_generate": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "num_return_sequences": 1,
    "prefill_chunk_size": None,
}


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse generation options that transformers' ``generate()`` would not know, and those that are ours.

    Raises:
        InvalidInputError: If an option is unknown or cannot be chosen here.
    """
    known = set(GenerationConfig().to_dict())  # type: ignore[no-untyped-call]
    known |= set(inspect.signature(GenerationMixin.generate).parameters)
    known -= {"self", "inputs", "kwargs", "transformers_version", "_from_model_config"}
    for name, value in options.items():
        if name in _OURS or (name in _IMPOSSIBLE and value is not None):
            why = "the engine chooses it" if name in _OURS else "it cannot be combined with reuse"
            raise InvalidInputError(f"generation option {name!r} cannot be set here, {why}; leave it out")
        if name not in known:
            raise InvalidInputError(
                f"generation option {name!r} is unknown; see transformers.GenerationConfig"
            )


def setting(model: Model, options: Mapping[str, Any], name: str) -> Any:
    """Return what ``generate()`` goes by: an option, else that of a given configuration, else the model's."""
    if name in options:
        return options[name]
    given, own = options.get("generation_config"), model.network.generation_config
    values = (getattr(config, name, None) for config in (given, own))
    return next((value for value in values if value is not None), None)


def stop_strings(model: Model, options: Mapping[str, Any]) -> list[str]:
    """Return the stop strings that ``generate()`` goes by, however they were written.

    Raises:
        InvalidInputError: If one of them is empty.
    """
    stops = setting(model, options, "stop_strings") or []
    stops = [stops] if isinstance(stops, str) else list(stops)
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise InvalidInputError(f"stop_strings are {stops!r}; each must be a string that is not empty")
    return stops
