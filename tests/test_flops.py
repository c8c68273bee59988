"""FLOPs by formula, against a counter that watches every matrix product."""

import architectures
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rag_blockcache.assembler import Context
from rag_blockcache.encoder import encode_blocks
from rag_blockcache.evaluation.flops import forward_flops
from rag_blockcache.generator import Computed, prefill
from rag_blockcache.kv_states import Placement
from rag_blockcache.model import Model

NUM_TOKENS, NUM_FINAL = 60, 7
NAMES = [
    "llama", "llama-multi-query", "llama-wide-heads", "qwen3", "phi3", "phi", "gemma2", "gemma3", "glm",
    "cohere", "olmo2", "granite", "smollm3", "gpt-neox", "mistral-window",
]  # fmt: skip


def model_of(name, tokenizer):
    network = architectures.accepted(name)
    network.set_attn_implementation("eager")  # the counter sees the products of eager attention, not of SDPA
    return Model(network, tokenizer)


@torch.inference_mode()
def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def scores_of(model, num_queries, num_keys):
    """What eager attention computes: every query with every key, seen or not."""
    return 4 * model.config.num_attention_heads * model.head_dim * model.num_layers * num_queries * num_keys


@pytest.mark.parametrize("name", NAMES)
def test_full_prefill_takes_what_the_counter_sees_but_for_masked_scores(name, tiny_tokenizer):
    model = model_of(name, tiny_tokenizer)
    token_ids = torch.arange(NUM_TOKENS)[None]
    seen = counted(lambda: model.network(input_ids=token_ids, logits_to_keep=1, use_cache=True))

    flops = forward_flops(model, range(NUM_TOKENS))

    unmasked = flops.total - flops.attention + scores_of(model, NUM_TOKENS, NUM_TOKENS)
    assert unmasked == pytest.approx(seen, rel=1e-3)
    assert flops.attention < 0.52 * scores_of(model, NUM_TOKENS, NUM_TOKENS)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_the_final_block_takes_what_the_counter_sees_but_for_masked_scores(name, tiny_tokenizer):
    model = model_of(name, tiny_tokenizer)
    token_ids = torch.arange(NUM_TOKENS)
    [[(_, states)]] = encode_blocks(model, [token_ids[:-NUM_FINAL].tolist()])
    context = Context(model, [NUM_TOKENS])
    context.place(0, [Placement(states, 0)], NUM_TOKENS)
    computed = Computed(torch.arange(NUM_TOKENS - NUM_FINAL, NUM_TOKENS), token_ids[-NUM_FINAL:])
    seen = counted(lambda: prefill(model, context, [computed]))

    flops = forward_flops(model, range(NUM_TOKENS - NUM_FINAL, NUM_TOKENS))

    unmasked = flops.total - flops.attention + scores_of(model, NUM_FINAL, NUM_TOKENS)
    assert unmasked == pytest.approx(seen, rel=1e-3)


def test_attention_is_the_number_of_visible_pairs(tiny_model, tiny_tokenizer):
    model = Model(tiny_model, tiny_tokenizer)
    each = 4 * 64  # scores and values of all heads, hidden size 64
    assert forward_flops(model, range(10)).attention == each * 3 * 55
    assert forward_flops(model, [8, 9]).attention == each * 3 * (9 + 10)


def test_a_window_bounds_what_a_token_sees(tiny_tokenizer):
    model = Model(architectures.accepted("mistral-window"), tiny_tokenizer)
    assert forward_flops(model, [100]).attention == 4 * 64 * 3 * 24


def test_parts_of_a_prompt_add_up_to_the_whole(tiny_model, tiny_tokenizer):
    model = Model(tiny_model, tiny_tokenizer)
    whole = forward_flops(model, range(50))
    first, last = forward_flops(model, range(30), num_logits=0), forward_flops(model, range(30, 50))
    assert first.total + last.total == whole.total


def test_only_the_experts_that_a_token_is_routed_to_count(tiny_tokenizer):
    few, many = (
        Model(
            architectures.build("Mixtral", {"num_local_experts": n, "num_experts_per_tok": 2}), tiny_tokenizer
        )
        for n in (2, 8)
    )
    gate = 3 * 2 * (8 - 2) * 64  # each layer's router has a row an expert
    assert forward_flops(many, [0]).linear - forward_flops(few, [0]).linear == gate
