"""Random models of known shapes: their sizes are those that the models are known for."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.evaluation.shapes import SHAPES, open_model, random_model, shape_config

# Parameters as published, and bytes of keys and values a token in bfloat16.
KNOWN = {
    "llama-3-8b": (8.03e9, 128 * 1024),
    "llama-3.2-1b": (1.24e9, 32 * 1024),
    "qwen3-0.6b": (0.596e9, 112 * 1024),
    "smollm2-135m": (134.5e6, 22.5 * 1024),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_has_the_size_of_the_model_it_is_named_after(shape):
    num_parameters, kv_bytes = KNOWN[shape]
    config = shape_config(shape)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    assert network.num_parameters() == pytest.approx(num_parameters, rel=0.005)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim == kv_bytes


def test_a_random_model_is_made_in_the_dtype_asked_for():
    config = shape_config("smollm2-135m")
    config.num_hidden_layers, config.vocab_size = 2, 128
    model = random_model(config, device="cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert model.num_layers == 2


def test_either_a_model_or_a_shape_is_named():
    with pytest.raises(InvalidInputError, match="not both"):
        open_model("somewhere", "llama-3-8b")
    with pytest.raises(InvalidInputError, match="llama-3-8b"):
        open_model(None, None)


def test_an_unknown_shape_is_answered_with_the_known_ones():
    with pytest.raises(InvalidInputError, match=r"qwen3-0\.6b"):
        open_model(None, "gpt-5")
