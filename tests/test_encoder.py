"""Blocks to KV states: batched, padded, conditioned, and always the states of the block alone."""

from __future__ import annotations

import architectures
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_blockcache.assembler import Context
from rag_blockcache.encoder import _batches, batch_size_tokens, encode_blocks
from rag_blockcache.generator import Computed, prefill
from rag_blockcache.kv_states import Placement
from rag_blockcache.model import Model


@pytest.fixture(scope="module")
def model(tiny_model, tiny_tokenizer):
    return Model(tiny_model, tiny_tokenizer)


def blocks_of(lengths):
    return [[(7 * i + 3 * j) % 200 + 5 for j in range(length)] for i, length in enumerate(lengths)]


def encoded(model, blocks, **options):
    return {index: states for batch in encode_blocks(model, blocks, **options) for index, states in batch}


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3-longrope", "smollm3", "mixtral"])
def test_a_block_in_a_batch_has_the_states_of_the_block_alone(name, tiny_tokenizer):
    model = Model(architectures.accepted(name), tiny_tokenizer)
    blocks = blocks_of([5, 1, 30, 17, 30])
    together = encoded(model, blocks, batch_tokens=1000)
    for index, block in enumerate(blocks):
        [[(_, alone)]] = encode_blocks(model, [block])
        assert together[index].keys.shape == (model.num_layers, 2, len(block), model.head_dim)
        torch.testing.assert_close(together[index].keys, alone.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together[index].values, alone.values, rtol=1e-4, atol=1e-4)


def test_keys_are_stored_as_they_were_before_rotary_encoding(model):
    [block] = blocks_of([9])
    [[(_, states)]] = encode_blocks(model, [block])
    seen = {}
    hooks = [
        layer.self_attn.k_proj.register_forward_hook(lambda m, i, out, n=n: seen.__setitem__(n, out))
        for n, layer in enumerate(model.network.model.layers)
    ]
    with torch.inference_mode():
        model.network(torch.tensor([block]))
    for hook in hooks:
        hook.remove()
    for n, keys in seen.items():
        before = keys[0].view(len(block), 2, -1).transpose(0, 1)
        torch.testing.assert_close(states.keys[n], before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_conditions", [1, 9, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_conditioned_block_continues_what_it_is_conditioned_on(num_conditions, dtype, tiny_tokenizer):
    model = Model(architectures.accepted("llama", dtype), tiny_tokenizer)
    before, block = blocks_of([num_conditions, 9])  # of one length, once: angles of both must not be mixed up
    [[(_, conditions)]] = encode_blocks(model, [before])
    [[(_, states)]] = encode_blocks(model, [block], conditioned_on=conditions)
    [[(_, whole)]] = encode_blocks(model, [before + block])
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(states.keys, whole.keys[:, :, num_conditions:], **tolerance)
    torch.testing.assert_close(states.values, whole.values[:, :, num_conditions:], **tolerance)


def test_a_prefix_of_a_block_is_the_block_of_the_prefix(model):
    [block] = blocks_of([12])
    [[(_, states)]] = encode_blocks(model, [block])
    [[(_, shorter)]] = encode_blocks(model, [block[:7]])
    torch.testing.assert_close(states.prefix(7).keys, shorter.keys, rtol=1e-4, atol=1e-5)


@settings(max_examples=80, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=30), batch_tokens=st.integers(1, 120))
def test_batches_hold_every_block_once_and_stay_within_their_size(lengths, batch_tokens):
    batches = list(_batches(lengths, batch_tokens))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= batch_tokens
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_no_blocks_need_no_pass(model):
    assert list(encode_blocks(model, [])) == []


def test_batches_come_one_by_one(model):
    batches = encode_blocks(model, blocks_of([8, 8, 8]), batch_tokens=8)
    assert [index for index, _ in next(batches)] == [0]
    assert not torch.is_inference_mode_enabled()
    assert len(list(batches)) == 2


def test_a_batch_has_a_size_without_being_told(model):
    assert batch_size_tokens(model) >= 512


def test_states_hold_no_more_memory_than_they_are_long(model):
    for _, states in next(encode_blocks(model, blocks_of([30, 3]), batch_tokens=60)):
        assert states.keys.untyped_storage().nbytes() <= states.keys.nbytes * 2
        assert states.keys.is_contiguous()


def test_encoded_blocks_are_placed_anywhere_as_the_model_would_have_them(model):
    first, second = blocks_of([6, 9])
    [[(_, a)]] = encode_blocks(model, [first])
    [[(_, b)]] = encode_blocks(model, [second], conditioned_on=a)
    context = Context(model, [16])
    context.place(0, [Placement(a, 0), Placement(b, 6)], 16)
    logits = prefill(model, context, [Computed(torch.tensor([15]), torch.tensor([77]))])
    with torch.inference_mode():
        expected = model.network(torch.tensor([[*first, *second, 77]])).logits[0, -1]
    torch.testing.assert_close(logits[0, -1], expected, rtol=1e-4, atol=1e-4)
