"""Tiny random models, one a row: each architecture and rotary variant that is accepted, and those refused."""

from __future__ import annotations

import torch
import transformers
from transformers import PreTrainedModel

VOCAB_SIZE = 384
SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def _rope(rope_type: str, **more: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **more}}


LONGROPE = {
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 128,
    **_rope(
        "longrope",
        short_factor=[1.0 + 0.05 * i for i in range(8)],
        long_factor=[1.5 + 0.5 * i for i in range(8)],
        original_max_position_embeddings=128,
        factor=4.0,
    ),
}

# name -> (family, options beside SMALL)
ACCEPTED: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("Llama", {}),
    "llama-multi-head": ("Llama", {"num_key_value_heads": 4}),
    "llama-multi-query": ("Llama", {"num_key_value_heads": 1}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("Llama", {"head_dim": 32}),
    "llama-linear": ("Llama", _rope("linear", factor=4.0)),
    "llama-dynamic": ("Llama", _rope("dynamic", factor=2.0)),
    "llama-yarn": ("Llama", _rope("yarn", factor=4.0, original_max_position_embeddings=128)),
    "llama-llama3": (
        "Llama",
        _rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 24}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "phi3": ("Phi3", {}),
    "phi3-partial": ("Phi3", _rope("default", partial_rotary_factor=0.5)),
    "phi3-longrope": ("Phi3", LONGROPE),
    "phi": ("Phi", {"num_key_value_heads": 4}),
    "phi-qk-norm": ("Phi", {"qk_layernorm": True}),
    "stablelm": ("StableLm", {}),
    "stablelm-qk-norm": ("StableLm", {"qk_layernorm": True}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16}),
    "gemma3": (
        "Gemma3Text",
        {"head_dim": 16, "sliding_window": 24, "num_hidden_layers": 7, "query_pre_attn_scalar": 16},
    ),
    "glm": ("Glm", {"head_dim": 16}),
    "cohere": ("Cohere", {}),
    "cohere-qk-norm": ("Cohere", {"use_qk_norm": True}),
    "cohere2": ("Cohere2", {"sliding_window": 24, "num_hidden_layers": 4}),
    "olmo2": ("Olmo2", {}),
    "granite": ("Granite", {"attention_multiplier": 0.3, "logits_scaling": 2.0}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4}),
    "gpt-neox": ("GPTNeoX", {}),
    "falcon": ("Falcon", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "mixtral": ("Mixtral", {"num_local_experts": 2}),
}

REFUSED: dict[str, tuple[str, dict[str, object], str]] = {
    "gpt2": ("GPT2", {"n_layer": 2, "n_head": 4, "n_embd": 64}, "rotary"),
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 4}, "rotary"),
    "falcon-alibi": ("Falcon", {"alibi": True}, "position"),
    "mamba": ("Mamba", {"num_hidden_layers": 2}, "cache"),
    "jamba": (
        "Jamba",
        {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
        "",
    ),
    "deepseek-v3": (
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 32,
        },
        "",
    ),
}


def build(family: str, options: dict[str, object], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build a model of ``family`` with random weights, the same at every call."""
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{family}Config")
    model_class = transformers.AutoModelForCausalLM._model_mapping[config_class]
    config = config_class(**{**SMALL, **options})
    model = model_class(config)
    for weight in model.parameters():  # larger than the usual start, so that attention is far from uniform
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.15)
    return model.to(dtype).eval()


def accepted(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build the accepted architecture of that name."""
    return build(*ACCEPTED[name], dtype=dtype)
