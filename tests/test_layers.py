"""What each layer keeps and how it encodes positions: found, or the model is refused with the reason."""

from __future__ import annotations

import types

import architectures
import pytest
import torch
from torch import nn
from transformers import AutoModel
from transformers.models.llama import modeling_llama

from rag_blockcache import BlockCache, self_check
from rag_blockcache.errors import UnsupportedModelError
from rag_blockcache.layers import find_layers
from rag_blockcache.model import Model
from rag_blockcache.self_check import check_reuse

_REASONS = {
    "mamba": "keeps LinearAttentionLayer",
    "jamba": r"layer 0 of JambaForCausalLM keeps .* instead of plain keys",
    "deepseek-v3": "differ in shape .* multi-head latent attention",
}


@pytest.mark.parametrize("name", architectures.REFUSED)
def test_what_cannot_be_served_exactly_is_refused_with_the_reason(name, tiny_tokenizer):
    family, options, reason = architectures.REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=_REASONS.get(name, reason)):
        BlockCache(architectures.build(family, options), None, tokenizer=tiny_tokenizer)


@pytest.mark.parametrize(
    "name", ["gemma3", "cohere2", "smollm3", "glm", "phi3-partial", "qwen2-window", "mistral"]
)
def test_windows_and_rotary_encodings_are_those_of_the_configuration(name):
    network = architectures.accepted(name)
    config, layers = network.config, find_layers(network)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    assert len(layers) == config.num_hidden_layers
    for index, (layer, kind) in enumerate(zip(layers, kinds, strict=True)):
        is_sliding = kind == "sliding_attention"
        assert layer.window == (config.sliding_window if is_sliding else None)
        no_rope = getattr(config, "no_rope_layers", None)
        has_rotary = bool(no_rope[index]) if no_rope else name != "cohere2" or is_sliding
        assert (layer.rotary is not None) == has_rotary
        if layer.rotary is not None:
            assert layer.rotary.interleaved == (name in ("glm", "cohere2"))
            assert layer.rotary.layer_type == (kind if name == "gemma3" else None)
        assert (layer.num_kv_heads, layer.head_dim) == (2, 16)


def test_stretched_angles_come_back_stretched():
    rotary = find_layers(architectures.accepted("llama-yarn"))[0].rotary
    angles = rotary.angles(torch.tensor([0, 5]), total_length=6)
    factor = angles.cos[0, 0]
    assert factor > 1.0
    torch.testing.assert_close(
        angles.cos.square() + angles.sin.square(), torch.full((2, 8), float(factor) ** 2)
    )


def test_the_length_of_the_prompt_chooses_the_angles_of_longrope():
    rotary = find_layers(architectures.accepted("phi3-longrope"))[0].rotary
    at = torch.tensor([3, 4])
    short, long = (rotary.angles(at, total_length=length) for length in (128, 129))
    assert not torch.allclose(short.cos, long.cos)
    assert torch.equal(rotary.angles(at, total_length=5).cos, short.cos)


class Broken:
    """Llamas of the test's own that encode positions in ways that nobody knows."""

    @staticmethod
    def build(monkeypatch, change):
        monkeypatch.setattr(
            modeling_llama, "apply_rotary_pos_emb", change(modeling_llama.apply_rotary_pos_emb)
        )
        return architectures.build("Llama", {})

    @staticmethod
    def no_positions(apply):
        return lambda q, k, cos, sin, *_, **__: (q, k)

    @staticmethod
    def other_angles(apply):
        return lambda q, k, cos, sin, *_, **__: apply(
            q, k, 2 * cos.square() - 1, 2 * sin * cos
        )  # twice as fast

    @staticmethod
    def added_positions(apply):
        return lambda q, k, cos, sin, *_, **__: (q, k + torch.cat((sin, cos), -1)[:, None, :, : k.shape[-1]])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (Broken.no_positions, "carry no position"),
        (Broken.other_angles, "not known"),
        (Broken.added_positions, "not known"),
    ],
)
def test_positions_that_are_encoded_otherwise_are_refused(change, reason, monkeypatch):
    with pytest.raises(UnsupportedModelError, match=reason):
        find_layers(Broken.build(monkeypatch, change))


def test_values_that_carry_positions_are_refused(monkeypatch):
    network = architectures.build("Llama", {})
    attention = network.model.layers[-1].self_attn  # the last: its values reach no keys
    original = attention.forward

    def forward(self, hidden_states, position_embeddings, **options):
        bias = position_embeddings[0].mean(-1, keepdim=True)
        self.v_proj.register_forward_hook(lambda m, i, out: out * (1 + bias))
        return original(hidden_states, position_embeddings=position_embeddings, **options)

    monkeypatch.setattr(attention, "forward", types.MethodType(forward, attention))
    with pytest.raises(UnsupportedModelError, match="into its values"):
        find_layers(network)


def test_a_model_that_ignores_what_is_placed_fails_the_self_check(tiny_tokenizer, monkeypatch):
    model = Model(architectures.build("Llama", {}), tiny_tokenizer)
    check_reuse(model)
    attention = model.network.model.layers[1].self_attn
    original = attention.forward

    def forward(self, hidden_states, past_key_values=None, **options):
        del past_key_values
        options["attention_mask"] = None
        return original(hidden_states, past_key_values=None, **options)

    monkeypatch.setattr(attention, "forward", types.MethodType(forward, attention))
    with pytest.raises(UnsupportedModelError, match="other logits over reused states"):
        check_reuse(model)


@pytest.mark.parametrize("wrong", ["what stands before is not seen", "nan"])
def test_a_block_that_is_wrong_behind_another_fails_the_self_check(wrong, tiny_tokenizer, monkeypatch):
    model = Model(architectures.build("Llama", {}), tiny_tokenizer)
    inner = self_check.encode_blocks

    def encode(model, blocks, *, conditioned_on=None):
        if wrong != "nan" or conditioned_on is None:
            return inner(model, blocks)
        [[(index, states)]] = inner(model, blocks, conditioned_on=conditioned_on)
        return [[(index, states.mapped(lambda tensor: tensor * float("nan")))]]

    monkeypatch.setattr(self_check, "encode_blocks", encode)
    with pytest.raises(UnsupportedModelError, match="other logits over reused states"):
        check_reuse(model)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(UnsupportedModelError, match="AutoModelForCausalLM"):
        find_layers(AutoModel.from_config(architectures.build("Llama", {}).config))


def test_another_part_with_angles_of_its_own_is_passed_over(tiny_tokenizer):
    class VisionRotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("inv_freq", torch.ones(4), persistent=False)

        def forward(self, num_patches):
            return num_patches * self.inv_freq

    network = architectures.build("Llama", {})
    network.vision = VisionRotary()
    assert all(layer.rotary.module is network.model.rotary_emb for layer in find_layers(network))


def test_beyond_the_bound_where_attention_depends_on_positions_nothing_is_reused(tiny_tokenizer):
    rope = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1}
    rope |= {"original_max_position_embeddings": 64}
    network = architectures.build(
        "Ministral3", {"head_dim": 16, "sliding_window": None, "rope_parameters": rope}
    )
    model = Model(network, tiny_tokenizer)
    assert (model.regime(64), model.regime(65)) == ("", None)


def test_adapters_and_which_of_them_is_in_use_are_part_of_the_name(tiny_tokenizer):
    class Tuned(nn.Module):  # what PEFT leaves in the place of a layer
        def __init__(self, inner):
            super().__init__()
            self.inner, self.active_adapters, self.disable_adapters, self.merged_adapters = (
                inner,
                ["a"],
                False,
                [],
            )

        def forward(self, *given):
            return self.inner(*given)

    network = architectures.build("Llama", {})
    names = {Model(network, tiny_tokenizer).fingerprint}
    projection = Tuned(network.model.layers[0].self_attn.q_proj)
    network.model.layers[0].self_attn.q_proj = projection
    names.add(Model(network, tiny_tokenizer).fingerprint)
    projection.active_adapters = ["b"]
    names.add(Model(network, tiny_tokenizer).fingerprint)
    projection.disable_adapters = True
    names.add(Model(network, tiny_tokenizer).fingerprint)
    assert len(names) == 4
