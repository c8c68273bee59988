"""KV states to a context: in their places, turned, and in a form that transformers takes for a cache."""

from __future__ import annotations

import gc
import weakref

import architectures
import pytest
import torch

from rag_blockcache.assembler import Context
from rag_blockcache.encoder import encode_blocks
from rag_blockcache.generator import Computed, prefill
from rag_blockcache.kv_states import Buffers, KVStates, Placement
from rag_blockcache.model import Model


@pytest.fixture(scope="module")
def model(tiny_model, tiny_tokenizer):
    return Model(tiny_model, tiny_tokenizer)


def states_of(model, num_tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (model.num_layers, model.num_kv_heads, num_tokens, model.head_dim)
    return KVStates(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))


@pytest.mark.parametrize("name", ["llama", "llama-dynamic", "llama-yarn", "phi3-longrope"])
def test_angles_that_are_kept_are_those_of_each_prompt(name, tiny_tokenizer):
    kept = Model(architectures.accepted(name), tiny_tokenizer)
    bound = kept.max_length if name == "llama-dynamic" else 128  # where the frequencies of two of them change
    for length in (100, bound, bound + 1, 300, 2000, 100):
        if kept.regime(length) is None:
            continue  # nothing is placed in such a prompt
        fresh = architectures.accepted(name)
        rotary = Model(fresh, tiny_tokenizer).layers[0].rotary
        expected = rotary.angles(torch.arange(90), total_length=length)
        found = kept.angles(kept.layers[0], 90, length).at(0, 90)
        assert torch.equal(found.cos, expected.cos), length
        assert torch.equal(found.sin, expected.sin), length
    again = [kept.angles(kept.layers[0], reach, 100) for reach in (90, 100)]
    assert again[0] is again[1]


def test_blocks_stand_in_their_slots_and_leave_the_others_alone(model):
    context = Context(model, [20], room=4)
    for layer in context.layers:
        layer.keys.fill_(7.0)
        layer.values.fill_(7.0)
    one, other = states_of(model, 5), states_of(model, 3, seed=1)
    before = one.keys.clone()
    context.place(0, [Placement(one, 2), Placement(other, 10)], 20)
    for index, layer in enumerate(context.layers):
        assert layer.keys.shape[-2] == 24
        assert torch.equal(layer.values[0, :, 2:7], one.values[index])
        assert torch.equal(layer.values[0, :, 10:13], other.values[index])
        untouched = [0, 1, *range(7, 10), *range(13, 24)]
        assert (layer.values[0, :, untouched] == 7).all()
        assert (layer.keys[0, :, untouched] == 7).all()
    assert torch.equal(one.keys, before), "what is stored must not be turned"


def test_keys_are_turned_to_their_positions_in_the_row_not_in_the_batch(model):
    states = states_of(model, 4)
    alone = Context(model, [10])
    alone.place(0, [Placement(states, 3)], 10)
    batch = Context(model, [17, 10], scratch=1)
    batch.place(1, [Placement(states, 3)], 10)
    assert batch.starts == [1, 8]
    for one, many in zip(alone.layers, batch.layers, strict=True):
        assert torch.equal(one.keys[0, :, 3:7], many.keys[1, :, 11:15])


def test_one_block_may_stand_in_several_places(model):
    states = states_of(model, 4)
    context = Context(model, [12])
    context.place(0, [Placement(states, 0), Placement(states, 8)], 12)
    for index, layer in enumerate(context.layers):
        torch.testing.assert_close(layer.keys[0, :, 0], states.keys[index, :, 0])
        assert not torch.allclose(layer.keys[0, :, 8], states.keys[index, :, 0])
        assert torch.equal(layer.values[0, :, 8:12], layer.values[0, :, 0:4])


def test_layers_with_angles_of_their_own_are_turned_by_them(tiny_tokenizer):
    model = Model(architectures.accepted("smollm3"), tiny_tokenizer)
    states = states_of(model, 4)
    context = Context(model, [9])
    context.place(0, [Placement(states, 5)], 9)
    for index, (layer, kept) in enumerate(zip(model.layers, context.layers, strict=True)):
        is_unturned = torch.equal(kept.keys[0, :, 5:9], states.keys[index])
        assert is_unturned == (layer.rotary is None)


def test_a_context_grows_when_its_room_is_used_up(model):
    context = Context(model, [6], room=0)
    tokens = torch.arange(6) + 40
    prefill(model, context, [Computed(torch.arange(6), tokens)])
    kept = [layer.keys.clone() for layer in context.layers]
    context.begin(slice(6, 9), 9)
    assert all(layer.keys.shape[-2] >= 9 for layer in context.layers)
    for layer, keys in zip(context.layers, kept, strict=True):
        assert torch.equal(layer.keys[:, :, :6], keys)
    assert context.get_mask_sizes(3, 0) == (9, 0)
    assert context.get_seq_length() == 6


@pytest.mark.parametrize(("asked", "left"), [(0, 10), (-3, 7), (4, 4), (40, 10)])
def test_rejected_tokens_are_taken_back(asked, left, model):
    context = Context(model, [10])
    context.crop(asked)
    assert context.length == context.get_seq_length() == left


def test_beams_repeat_and_reorder_rows_with_their_starts(model):
    context = Context(model, [4, 6], scratch=1)
    for layer in context.layers:
        layer.keys[0], layer.keys[1] = 1.0, 2.0
    context.batch_repeat_interleave(2)
    assert context.starts == [3, 3, 1, 1]
    context.reorder_cache(torch.tensor([2, 0, 3, 1]))
    assert context.starts == [1, 3, 1, 3]
    assert [layer[0, 0, 0].item() for layer in context.layers[0].keys] == [2.0, 1.0, 2.0, 1.0]


def test_slots_before_a_shorter_prompt_are_hidden_and_hold_numbers(model, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **o: empty(*shape, **o).fill_(torch.nan))
    context = Context(model, [3, 7], scratch=1)
    assert context.visible(8, torch.device("cpu")).tolist() == [
        [False] * 5 + [True] * 3,
        [False] + [True] * 7,
    ]
    for layer in context.layers:
        assert layer.keys[0, :, :5].isfinite().all()
        assert layer.values[1, :, :1].isfinite().all()


def test_placing_nothing_does_nothing(model):
    Context(model, [3]).place(0, [], 3)


def test_states_from_the_encoder_need_no_copy_of_the_block(model):
    [[(_, states)]] = encode_blocks(model, [[5, 6, 7]])
    pointer = states.keys.data_ptr()
    context = Context(model, [3])
    context.place(0, [Placement(states, 0)], 3)
    assert states.keys.data_ptr() == pointer


def test_a_context_is_freed_with_its_last_reference(tiny_model, tiny_tokenizer):
    context = Context(Model(tiny_model, tiny_tokenizer), [40])
    gone = weakref.ref(context.layers[0])
    gc.disable()
    try:
        del context
        assert gone() is None, "the cyclic collector would have to free it, hundreds of megabytes later"
    finally:
        gc.enable()


def test_the_memory_of_a_context_is_used_again(tiny_model, tiny_tokenizer):
    model = Model(tiny_model, tiny_tokenizer)
    first = Context(model, [40])
    places = {layer.keys.data_ptr() for layer in first.layers}
    other = Context(model, [40])
    assert not places & {layer.keys.data_ptr() for layer in other.layers}, "both are in use"
    del first
    again = Context(model, [38])
    assert again.layers[0].keys.data_ptr() in places
    assert again.layers[0].keys.shape[-2] == 38


def test_spare_memory_is_bounded_and_not_wasted_on_the_small():
    buffers = Buffers(size_limit_bytes=1000)
    large, small = (torch.empty(size, dtype=torch.uint8) for size in (800, 150))
    buffers.give([large, torch.empty(700, dtype=torch.uint8), small])
    assert buffers.take(100, torch.device("cpu")) is small
    assert buffers.take(600, torch.device("cpu")) is large
    assert buffers.take(600, torch.device("cpu")).nbytes == 600, "the second one was over the limit"
