"""Random models of known sizes, made on the device: as fast as real ones, with nothing to download."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.loading import load_model
from rag_blockcache.model import Model

_WINDOW = 32768
_SHAPES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama-3-8b": (
        LlamaConfig,
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
    "llama-3.2-1b": (
        LlamaConfig,
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
    "qwen3-0.6b": (
        Qwen3Config,
        {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
    "smollm2-135m": (
        LlamaConfig,
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        },
    ),
}
SHAPES = tuple(_SHAPES)


def shape_config(shape: str) -> PretrainedConfig:
    """Return the configuration of a known model, with a window of 32,768 tokens.

    Args:
        shape: One of ``SHAPES``.

    Raises:
        InvalidInputError: If it is none of them.
    """
    if shape not in _SHAPES:
        raise InvalidInputError(f"shape {shape!r} is unknown; use one of {', '.join(SHAPES)}")
    kind, sizes = _SHAPES[shape]
    return kind.from_dict({"max_position_embeddings": _WINDOW, **sizes})


def random_model(
    config: PretrainedConfig,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = torch.bfloat16,
) -> Model:
    """Make a model with random weights, directly where it will run.

    Its tokenizer knows nothing: prompts are given as token ids.

    Args:
        config: Configuration of a causal language model, see ``shape_config``.
        device: None takes a GPU if there is one.
        dtype: What it computes in.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    torch.manual_seed(0)
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    backend = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")  # type: ignore[no-untyped-call]
    return Model(network.eval(), tokenizer)


def open_model(
    name: str | None, shape: str | None, *, device: str | None = None, dtype: str | None = None
) -> Model:
    """Load a model by name, or make a random one of a known shape; give one of the two.

    Args:
        name: Hub id or folder.
        shape: One of ``SHAPES``.
        device: None takes a GPU if there is one.
        dtype: None keeps that of the model's files, and takes bfloat16 for a shape.

    Raises:
        InvalidInputError: If neither or both are given, or the shape is unknown.
        ModelNotFoundError: If there is no such model.
    """
    if (name is None) == (shape is None):
        raise InvalidInputError(f"name a model, or one of the shapes {', '.join(SHAPES)}, not both")
    if shape is None:
        return load_model(str(name), device=device, dtype=dtype)
    return random_model(shape_config(shape), device=device, dtype=dtype or torch.bfloat16)
