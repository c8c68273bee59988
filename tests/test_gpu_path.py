"""The kernels and graphs of a GPU do what plain torch and transformers do.

Kernels also run on a CPU, interpreted, where Triton is installed and TRITON_INTERPRET=1 is set.
"""

import copy
import importlib.util
import os
import threading
import weakref
from functools import partial

import architectures
import numpy as np
import pytest
import torch
from test_equivalence import PASSAGES, SHORT, distance
from torch import nn

from rag_blockcache import BlockCache, gpu
from rag_blockcache.assembler import Context
from rag_blockcache.evaluation.latency import measure_latency
from rag_blockcache.generator import Computed, prefill
from rag_blockcache.gpu import staging
from rag_blockcache.gpu.network_state import NetworkState
from rag_blockcache.gpu.norms import FusedNorms
from rag_blockcache.gpu.staging import Staging, cut, staged_bytes
from rag_blockcache.kv_states import KVStates, Placement
from rag_blockcache.model import Model
from rag_blockcache.quantization import CODECS
from rag_blockcache.rotary import Angles

# Triton's interpreter makes scalars as NumPy no longer likes to.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")

HAS_TRITON = importlib.util.find_spec("triton") is not None
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
    pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"),
]
interpreted = pytest.mark.skipif(
    not HAS_TRITON or os.environ.get("TRITON_INTERPRET") != "1",
    reason="kernels are interpreted only where triton is installed and TRITON_INTERPRET=1 is set",
)
DEVICES = [pytest.param("cuda", marks=on_gpu), pytest.param("cpu", marks=interpreted)]
# The interpreter of Triton knows no bfloat16.
HALF = {"cuda": torch.bfloat16, "cpu": torch.float16}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# Attention


def attention_in_float64(query, keys, values, slots, scaling):
    """The same attention another way; what stands behind the last slot is not looked at."""
    end, group = int(slots.max()) + 1, query.shape[1] // keys.shape[0]
    query, keys, values = (states.double() for states in (query[0], keys[:, :end], values[:, :end]))
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    seen = torch.arange(end, device=slots.device) <= slots[:, None]
    weights = (query @ keys.transpose(1, 2) * scaling).masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ values).transpose(0, 1)[None]  # (1, num_queries, num_heads, head_dim)


def random_context(num_kv_heads, capacity, length, head_dim, dtype, device):
    """Keys and values with NaN in every slot that holds no token."""
    states = torch.full((2, num_kv_heads, capacity, head_dim), float("nan"), dtype=dtype, device=device)
    states[:, :, :length] = torch.randn(2, num_kv_heads, length, head_dim, dtype=dtype, device=device)
    return states[0], states[1]


def slots_over(keys, values, slots):
    from rag_blockcache.gpu.attention import Slots

    words = [keys.stride(0), 0, 0, keys.data_ptr(), values.data_ptr()]  # the first layer is somewhere else
    return Slots(torch.tensor(words, device=keys.device), slots)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "half"])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize(
    ("group", "num_queries", "length"),
    [(3, 1, 1), (4, 1, 203), (4, 5, 64), (1, 17, 300), (4, 50, 1023), (2, 200, 5000), (4, 50, 33000)],
)
def test_attention_from_slots_is_that_of_float64(device, half, head_dim, group, num_queries, length):
    from rag_blockcache.gpu.attention import attend

    if device == "cpu" and num_queries * length > 6000:
        pytest.skip("takes minutes where kernels are interpreted")
    dtype = HALF[device] if half else torch.float32
    keys, values = random_context(2, length + 9, length, head_dim, dtype, device)
    query = torch.randn(1, num_queries, 2 * group, head_dim, dtype=dtype, device=device).transpose(1, 2)
    slots = torch.arange(length - num_queries, length, device=device)
    found = attend(query, slots_over(keys, values, slots), 1, num_kv_heads=2, scaling=0.2)
    expected = attention_in_float64(query, keys, values, slots, 0.2)
    assert relative(found, expected) < (8e-3 if half else 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_computed_slots_may_stand_anywhere_and_those_below_zero_are_nobody(device):
    from rag_blockcache.gpu.attention import attend, write_states

    keys, values = random_context(2, 300, 280, 64, torch.float32, device)
    slots = torch.tensor([-1, -1, 0, 7, 100, 101, 279], device=device)
    before = keys.clone()
    new = torch.randn(2, 1, 7, 2, 64, device=device).transpose(2, 3)  # not contiguous, as layers give them
    at = slots_over(keys, values, slots)
    write_states(new[0], new[1], at, 1)
    assert torch.equal(keys[:, slots[2:]], new[0, 0, :, 2:])
    assert torch.equal(values[:, slots[2:]], new[1, 0, :, 2:])
    untouched = [slot for slot in range(280) if slot not in slots.tolist()]
    assert torch.equal(keys[:, untouched], before[:, untouched])
    query = torch.randn(1, 6, 7, 64, device=device)
    found = attend(query, at, 1, num_kv_heads=2, scaling=0.1)
    assert torch.isfinite(found).all()
    expected = attention_in_float64(query[:, :, 2:], keys, values, slots[2:], 0.1)
    assert relative(found[:, 2:], expected) < 1e-5


# Placing


def random_angles(num_tokens, num_pairs, device):
    turns = torch.rand(num_tokens, num_pairs, device=device) * 6
    return Angles(turns.cos() * 1.1, turns.sin() * 1.1) if num_pairs else None  # stretched, as under YaRN


def random_block(codec, num_tokens, head_dim, dtype):
    states = torch.randn(2, 3, 2, num_tokens, head_dim).to(dtype)
    return CODECS[codec].pack(KVStates(states[0], states[1]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "half"])
@pytest.mark.parametrize(
    ("head_dim", "num_pairs", "interleaved"),
    [(64, 32, False), (128, 64, False), (128, 16, False), (64, 32, True), (96, 12, True), (64, 0, False)],
)
def test_placed_blocks_are_those_that_torch_places(device, codec, half, head_dim, num_pairs, interleaved):
    dtype = HALF[device] if half else torch.float32
    found = [torch.full((3, 2, 2, 400, head_dim), float("nan"), dtype=dtype, device=device) for _ in range(2)]
    expected = [states.cpu().clone() for states in found]
    angles = random_angles(400, num_pairs, device)
    moved, slot = [], 5
    for num_tokens, kept in [(1, 1), (50, 50), (130, 70), (33, 33), (128, 128)]:
        states = random_block(codec, num_tokens, head_dim, dtype).prefix(kept)
        moved.append(Placement(states.mapped(lambda each: each.to(device)), slot + 7))
        turned = None if angles is None else angles.to(torch.device("cpu")).at(slot + 7, slot + 7 + kept)
        row = [each[:, 1, :, slot : slot + kept] for each in expected]
        states.place(*row, turned, interleaved=interleaved)
        slot += kept + 3
    from rag_blockcache.gpu.placing import place

    place(moved, found[0][:, 1], found[1][:, 1], angles, first_slot=-7, interleaved=interleaved)
    for one, other in zip(found, expected, strict=True):
        tolerance = 1e-2 if half else 1e-5
        torch.testing.assert_close(one.cpu(), other, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES[:1])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("is_pinned", [False, True])
def test_blocks_of_the_host_are_placed_through_a_ring_of_buffers(device, codec, is_pinned, monkeypatch):
    from rag_blockcache.gpu import placing

    ring = Staging(torch.device("cuda"), stage_bytes=2**20)
    monkeypatch.setattr(placing, "staging_of", lambda device: ring)
    blocks = [random_block(codec, 100, 128, torch.bfloat16) for _ in range(60)]
    angles = random_angles(6000, 64, device)
    found, expected = (
        [torch.zeros((3, 2, 6000, 128), dtype=torch.bfloat16, device=device) for _ in range(2)]
        for _ in range(2)
    )
    held = [each.mapped(torch.Tensor.pin_memory) if is_pinned else each for each in blocks]
    held[7] = held[7].mapped(torch.Tensor.cuda)  # one is there already
    moved = [Placement(each, 100 * i) for i, each in enumerate(held)]
    there = [Placement(each.mapped(torch.Tensor.cuda), 100 * i) for i, each in enumerate(blocks)]
    placing.place(there, expected[0], expected[1], angles, first_slot=0, interleaved=False)
    for _ in range(3):
        placing.place(moved, found[0], found[1], angles, first_slot=0, interleaved=False)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        for states in found:
            states.zero_()


@pytest.mark.parametrize("device", DEVICES[:1])
def test_blocks_that_the_device_reads_stay_until_it_has_read_them(device, monkeypatch):
    from rag_blockcache.gpu import placing

    ring = Staging(torch.device("cuda"), stage_bytes=2**20)
    monkeypatch.setattr(placing, "staging_of", lambda device: ring)
    blocks = [random_block("none", 100, 128, torch.float32).mapped(torch.Tensor.pin_memory) for _ in range(4)]
    keys, values = (torch.zeros((3, 2, 100, 128), device=device) for _ in range(2))
    alive = weakref.ref(blocks[0])
    placing.place([Placement(blocks.pop(0), 0)], keys, values, None, first_slot=0, interleaved=False)
    assert alive() is not None
    while blocks:  # once around the ring
        placing.place([Placement(blocks.pop(), 0)] * 3, keys, values, None, first_slot=0, interleaved=False)
    assert alive() is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("large_bytes", [0, 10_000, 2**30])
def test_what_is_read_from_the_host_is_what_lies_there(device, codec, large_bytes, monkeypatch):
    from rag_blockcache.gpu.descriptions import HEADER, addresses, describe, rows_of

    monkeypatch.setattr(staging, "_LARGE_BYTES", large_bytes)
    blocks = [random_block(codec, n, 128, HALF[device]) for n in (1, 7, 100)]
    if device == "cuda":
        blocks = [each.mapped(torch.Tensor.pin_memory) for each in blocks]
    tensors = [list(each.tensors().values()) for each in blocks]
    stage = object.__new__(staging._Stage)  # without streams, which a CPU does not have
    stage._there = torch.full((2**20,), 77, dtype=torch.uint8, device=device)
    rows = rows_of([describe(each, []) for each in blocks])
    sizes = np.array([[tensor.nbytes for tensor in each] for each in tensors])
    found = stage.read(blocks, rows, sizes)
    at = addresses(found) - stage._there.data_ptr()
    assert not (at % 16).any()
    for row, starts in zip(tensors, at.tolist(), strict=True):
        for tensor, start in zip(row, starts, strict=True):
            place = stage._there[start : start + tensor.nbytes + 1].cpu()
            assert torch.equal(place[:-1], tensor.reshape(-1).view(torch.uint8))
            assert place[-1] == 77 or tensor.nbytes % 256 == 0  # and no more than that
    assert np.array_equal(addresses(rows), [[tensor.data_ptr() for tensor in each] for each in tensors])
    addresses(rows)[:] = addresses(found)  # all else is as it was
    assert np.array_equal(rows, found)
    assert rows.shape[1] == HEADER + 3 * len(tensors[0])


def test_blocks_are_cut_into_runs_that_fit_a_buffer():
    sizes = [staged_bytes(random_block("none", n, 64, torch.float32)) for n in (10, 20, 5, 400, 1, 1)]
    limit = sizes[0] + sizes[1]
    groups = [sizes[chosen] for chosen in cut(sizes, limit)]
    assert [size for group in groups for size in group] == sizes
    assert [len(group) for group in groups] == [2, 1, 1, 2]
    assert all(sum(group) <= limit for group in groups if len(group) > 1)
    assert list(cut([], limit)) == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("codec", CODECS)
def test_tensors_of_the_host_are_copied_in_one_launch(device, codec):
    from rag_blockcache.gpu.staging import copy_tensors

    blocks = [random_block(codec, n, 128, HALF[device]) for n in (1, 7, 100, 333)]
    sources = [tensor for block in blocks for tensor in block.tensors().values()]
    if device == "cuda":
        sources = [tensor.pin_memory() for tensor in sources]
    # Behind each of them stands more, which must stay as it is.
    targets = [torch.full((each.nbytes + 16,), 77, dtype=torch.uint8, device=device) for each in sources]
    columns = [[each.data_ptr() for each in sources], [each.data_ptr() for each in targets]]
    columns.append([each.nbytes for each in sources])
    copy_tensors(*(np.array(column, np.int64) for column in columns), torch.device(device))
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(target[:-16].cpu(), source.reshape(-1).view(torch.uint8))
        assert (target[-16:] == 77).all()


@pytest.mark.parametrize("device", DEVICES[:1])
def test_what_a_gpu_cannot_read_in_one_piece_is_not_read(device):
    from rag_blockcache.gpu.descriptions import describe

    block = random_block("none", 100, 128, torch.bfloat16)
    pinned = block.mapped(torch.Tensor.pin_memory)
    assert describe(pinned, []).sizes is not None
    assert describe(block, []).sizes is None  # not page-locked
    assert describe(pinned.prefix(50), []).sizes is None  # not in one piece
    shifted = (
        torch.empty(block.keys.numel() + 1, dtype=torch.bfloat16).pin_memory()[1:].view(block.keys.shape)
    )
    assert describe(KVStates(shifted, pinned.values), []).sizes is None  # not aligned
    assert describe(block.mapped(torch.Tensor.cuda), []).sizes is None  # not on the host


# The tier on the device


@pytest.mark.parametrize("device", DEVICES[:1])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("is_pinned", [False, True])
def test_copies_of_blocks_have_memory_of_their_own(device, codec, is_pinned, monkeypatch):
    ring = Staging(torch.device(device), stage_bytes=2**20)
    monkeypatch.setattr(staging, "staging_of", lambda device: ring)
    blocks = [random_block(codec, 100, 128, torch.bfloat16) for _ in range(60)]
    held = [each.mapped(torch.Tensor.pin_memory) if is_pinned else each for each in blocks]
    copies = staging.copies(held, torch.device("cuda", torch.cuda.current_device()))
    staging.copies(held[::-1], torch.device(device))  # the ring is used again
    assert len(copies) == len(blocks)
    for copy_, block in zip(copies, blocks, strict=True):
        for name, tensor in copy_.tensors().items():
            assert tensor.is_cuda
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
            assert torch.equal(tensor.cpu(), block.tensors()[name])


@pytest.mark.parametrize("device", DEVICES[:1])
def test_where_the_device_has_no_memory_left_fewer_blocks_are_copied(device, monkeypatch, caplog):
    blocks = [random_block("none", 100, 128, torch.bfloat16) for _ in range(6)]
    clone, calls = torch.clone, []

    def clone_some(tensor):
        calls.append(tensor)
        if len(calls) > 5:  # keys and values of two blocks, and the keys of a third
            raise torch.cuda.OutOfMemoryError("out of memory")
        return clone(tensor)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "clone", clone_some)
        copies = staging.copies(blocks, torch.device(device))
    assert len(copies) == 2
    assert "4 of 6 blocks were not copied" in caplog.text
    assert len(staging.copies(blocks, torch.device(device))) == 6


@pytest.mark.parametrize("device", DEVICES[:1])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_blocks_from_disk_are_kept_on_the_device_at_their_second_use(
    device, codec, cuda_graphs, tiny_tokenizer, tmp_path
):
    network = architectures.accepted("llama").to(device)
    options = {"tokenizer": tiny_tokenizer, "passage_format": SHORT, "context_budget_bytes": 0}
    options |= {"codec": codec, "cuda_graphs": cuda_graphs}
    with BlockCache(network, tmp_path, device_budget_bytes=0, **options) as cache:
        cache.prefill(PASSAGES)
        assert cache.store.device is None
        expected = cache.first_logits("Who?", PASSAGES, policy="block")
    with BlockCache(network, tmp_path, **options) as cache:
        names = [cache.block(passage).block_id for passage in PASSAGES]
        assert cache.store.device.size_limit_bytes > 0
        found = [cache.first_logits("Who?", PASSAGES, policy="block")]
        assert not set(names) & set(cache.store.device)
        found += [cache.first_logits("Who?", PASSAGES, policy="block") for _ in range(2)]
        assert set(names) <= set(cache.store.device)
        assert all(states.device == cache.model.device for states in cache.store.get_many(names).values())
        assert all(states.device.type == "cpu" for states in cache.store.memory.values())
        assert cache.store.stats().device.num_hits >= len(names)
        assert all(distance(each, expected) < 1e-4 for each in found)
        cache.forget(PASSAGES)
        assert not set(names) & set(cache.store.device)


@pytest.mark.parametrize("device", DEVICES[:1])
def test_what_was_just_encoded_stays_on_the_device_and_is_held_on_the_host(device, tiny_tokenizer):
    network = architectures.accepted("llama").to(device)
    with BlockCache(network, None, tokenizer=tiny_tokenizer, passage_format=SHORT) as cache:
        cache.prefill(PASSAGES)
        assert set(cache.store.device) == set(cache.store.memory)
        assert all(states.device == cache.model.device for states in cache.store.device.values())
        assert all(states.device.type == "cpu" for states in cache.store.memory.values())


@pytest.mark.parametrize("device", DEVICES[:1])
def test_a_full_device_keeps_no_blocks_and_answers(device, tiny_tokenizer, tmp_path, monkeypatch):
    def nothing_left(tensor):
        raise torch.cuda.OutOfMemoryError("out of memory")

    network = architectures.accepted("llama").to(device)
    options = {"tokenizer": tiny_tokenizer, "passage_format": SHORT, "context_budget_bytes": 0}
    with BlockCache(network, tmp_path, **options) as cache:
        cache.prefill(PASSAGES)
        expected = cache.first_logits("Who?", PASSAGES, policy="block")
    with BlockCache(network, tmp_path, **options) as cache:
        cache.first_logits("Who?", PASSAGES, policy="block")
        with monkeypatch.context() as patched:
            patched.setattr(torch, "clone", nothing_left)
            found = cache.first_logits("Who?", PASSAGES, policy="block")
        assert len(cache.store.device) == cache.store.device.size_limit_bytes == 0
        assert distance(found, expected) < 1e-4


# Passes


def model_on(device, dtype, **config):
    sizes = {"max_position_embeddings": 4096, "hidden_size": 64, "num_attention_heads": 4, **config}
    with torch.inference_mode(False):
        network = architectures.build("Llama", {**sizes, "num_key_value_heads": 2, "head_dim": 16})
        return network.to(device=device, dtype=dtype)


@torch.inference_mode()
def assembled(model, num_tokens, num_computed, *, room=0):
    """A context whose first slots were placed, and what is to be computed behind them."""
    num_placed = num_tokens - num_computed
    shape = (model.num_layers, model.num_kv_heads, num_placed, model.head_dim)
    states = KVStates(*(torch.randn(shape, device=model.device, dtype=model.dtype) for _ in range(2)))
    context = Context(model, [num_tokens], room=room)
    context.place(0, [Placement(states, 0)] if num_placed else [], num_tokens)
    positions = torch.arange(num_placed, num_tokens)
    return context, Computed(positions, torch.randint(model.vocab_size, positions.shape))


def with_graphs(network, tokenizer):
    model = Model(network, tokenizer)
    model.cuda_graphs = True
    return model


def ordinary(model, context, computed, num_logits=1):
    model.cuda_graphs = False
    try:
        return prefill(model, context, [computed], num_logits=num_logits)
    finally:
        model.cuda_graphs = True


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_logits", [1, 3])
@pytest.mark.parametrize("places", [range(50, 60), [3, 17, 40, *range(50, 60)]], ids=["tail", "anywhere"])
@torch.inference_mode()
def test_a_pass_from_slots_gives_the_logits_and_the_states_of_an_ordinary_one(
    device, num_logits, places, tiny_tokenizer
):
    from rag_blockcache.gpu.passes import Passes

    model = with_graphs(model_on(device, torch.float32), tiny_tokenizer)
    context, _ = assembled(model, 60, 10)
    positions = torch.tensor(list(places))
    computed = Computed(positions, torch.randint(model.vocab_size, positions.shape))
    expected = ordinary(model, context, computed, num_logits)
    states = [[each.clone() for each in context.states_of_layer(i)] for i in range(model.num_layers)]
    for layer in range(model.num_layers):
        for each in context.states_of_layer(layer):
            each[:, :, positions] = float("nan")  # all of them must be written again
    found = Passes(model).run(model, context, computed.token_ids, positions, num_logits)
    assert found is not None
    assert relative(found, expected) < 1e-4
    for layer in range(model.num_layers):
        for one, other in zip(context.states_of_layer(layer), states[layer], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_what_fills_up_a_pass_changes_nothing(device, tiny_tokenizer):
    from rag_blockcache.gpu import passes

    model = with_graphs(model_on(device, torch.float32), tiny_tokenizer)
    context, computed = assembled(model, 60, 10)
    expected = ordinary(model, context, computed)
    before = [each.clone() for i in range(model.num_layers) for each in context.states_of_layer(i)]
    ways = passes.Passes(model)
    inputs = passes._Inputs(16, model.num_layers, model.device)
    inputs.fill(context, computed.token_ids, computed.positions)
    with model.inference(), passes._using_slots(model):
        found = passes._forward(model, inputs, 1)
    assert ways._is_usable
    assert relative(found, expected) < 1e-4
    after = [each for i in range(model.num_layers) for each in context.states_of_layer(i)]
    for one, other in zip(after, before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_a_pass_is_filled_up_to_the_next_graph():
    from rag_blockcache.gpu.passes import bucket_of

    assert [bucket_of(n) for n in (1, 2, 16, 17, 50, 64, 256, 257)] == [1, 16, 16, 32, 64, 64, 256, None]


def test_a_cpu_goes_the_ordinary_way(tiny_model, tiny_tokenizer):
    model = with_graphs(tiny_model, tiny_tokenizer)
    context, computed = assembled(model, 20, 5)
    assert gpu.run_pass(model, context, computed.token_ids, computed.positions, 1) is None
    keys, values = context.states_of_layer(0)
    block = KVStates(torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16))
    assert not gpu.place_blocks([Placement(block, 0)], keys, values, None, first_slot=0, interleaved=False)


def graph_sizes(model):
    from rag_blockcache.gpu.passes import passes_of

    return set(passes_of(model)._graphs)


@pytest.mark.parametrize("device", DEVICES[:1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_one_graph_serves_contexts_of_every_length_in_turn(device, dtype, tiny_tokenizer):
    model = with_graphs(model_on(device, dtype), tiny_tokenizer)
    network = copy.deepcopy(model.network).float()
    with torch.inference_mode(False):
        wide = Model(network, tiny_tokenizer)
    requests = [
        assembled(model, length, num_computed, room=room)
        for length, num_computed, room in [
            (50, 50, 0),
            (700, 33, 7),
            (4000, 64, 90),
            (65, 40, 0),
            (2049, 50, 1),
        ]
    ]
    exact = []
    for context, computed in requests:
        same = Context(wide, [context.length])
        for layer in range(model.num_layers):
            for one, other in zip(same.states_of_layer(layer), context.states_of_layer(layer), strict=True):
                one.copy_(other[:, :, : context.length])
        exact.append(prefill(wide, same, [computed]))
    expected = [ordinary(model, *request) for request in requests]
    prefill(model, requests[0][0], [requests[0][1]])  # seen once
    first = []
    for _ in range(3):
        found = [prefill(model, context, [computed]) for context, computed in requests]
        first = first or found
        for one, other, true, same in zip(found, expected, exact, first, strict=True):
            assert relative(one, true) < (1e-4 if dtype == torch.float32 else 1.5 * relative(other, true))
            assert relative(one, same) < (1e-6 if dtype == torch.float32 else 1e-3)
    assert graph_sizes(model) == {64}


@pytest.mark.parametrize("device", DEVICES[:1])
@torch.inference_mode()
def test_logits_of_a_graph_stay_when_it_runs_again(device, tiny_tokenizer):
    model = with_graphs(model_on(device, torch.float32), tiny_tokenizer)
    (one, first), (other, second) = assembled(model, 100, 20), assembled(model, 300, 20)
    for _ in range(3):
        prefill(model, one, [first])
    kept = prefill(model, one, [first])
    before = kept.clone()
    prefill(model, other, [second])
    assert torch.equal(kept, before)


@pytest.mark.parametrize("device", DEVICES[:1])
def test_decoding_runs_as_a_graph(device, tiny_tokenizer):
    cache = BlockCache(
        model_on(device, torch.float32),
        None,
        tokenizer=tiny_tokenizer,
        passage_format=SHORT,
        cuda_graphs=True,
    )
    for _ in range(2):
        cache.generate("Who?", PASSAGES[:3], policy="block", max_new_tokens=8, do_sample=False)
    assert 1 in graph_sizes(cache.model)


@pytest.mark.parametrize("device", DEVICES[:1])
def test_threads_that_answer_at_once_get_the_answers_they_get_alone(device, tiny_tokenizer):
    cache = BlockCache(
        model_on(device, torch.float32),
        None,
        tokenizer=tiny_tokenizer,
        passage_format=SHORT,
        cuda_graphs=True,
    )
    requests = [("Who?", PASSAGES[:3]), ("Where was it printed, and when?", PASSAGES[1:])]

    def answer(index):
        question, passages = requests[index]
        return cache.generate(
            question, passages, policy="block", max_new_tokens=24, do_sample=False
        ).token_ids

    alone = [answer(0), answer(1)]
    found = {0: [], 1: []}

    def ask(index):
        for _ in range(4):
            found[index].append(answer(index))

    threads = [threading.Thread(target=ask, args=(index,)) for index in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: [alone[0]] * 4, 1: [alone[1]] * 4}


def change_in_place(network):
    network.lm_head.weight.data.neg_()


def replace_weights(network):
    network.lm_head.weight = nn.Parameter(-network.lm_head.weight.detach())


def replace_data(network):
    network.lm_head.weight.data = -network.lm_head.weight.data


def replace_module(network):
    linear = nn.Linear(*network.lm_head.weight.shape[::-1], bias=False)
    linear.weight.data.copy_(-network.lm_head.weight.data)
    network.lm_head = linear.to(network.device)


def add_hook(network):
    network.lm_head.register_forward_hook(lambda module, inputs, output: -output)


CHANGES = [change_in_place, replace_weights, replace_data, replace_module, add_hook]


@pytest.mark.parametrize("device", DEVICES[:1])
@pytest.mark.parametrize("change", CHANGES)
@torch.inference_mode()
def test_a_captured_model_that_changes_gives_the_logits_of_what_it_is_now(device, change, tiny_tokenizer):
    model = with_graphs(model_on(device, torch.float32), tiny_tokenizer)
    context, computed = assembled(model, 200, 20)
    before = [prefill(model, context, [computed]) for _ in range(3)][-1]
    assert graph_sizes(model) == {32}
    with torch.inference_mode(False), torch.no_grad():
        change(model.network)
    for _ in range(4):
        assert relative(prefill(model, context, [computed]), -before) < 1e-4


@pytest.mark.parametrize("device", DEVICES[:1])
@torch.inference_mode()
def test_a_captured_adapter_that_is_switched_off_is_off(device, tiny_tokenizer):
    peft = pytest.importorskip("peft")
    with torch.inference_mode(False):
        network = model_on(device, torch.float32)
        config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
        adapted = peft.inject_adapter_in_model(config, network)
        model = with_graphs(adapted, tiny_tokenizer)
    context, computed = assembled(model, 200, 20)
    on = [prefill(model, context, [computed]) for _ in range(3)][-1]
    layers = [module for module in adapted.modules() if hasattr(module, "merged_adapters")]
    for layer in layers:
        layer.enable_adapters(False)
    off = [prefill(model, context, [computed]) for _ in range(4)]
    expected = ordinary(model, context, computed)
    assert relative(expected, on) > 1e-3
    assert max(relative(each, expected) for each in off) < 1e-4


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_network_is_noticed_unless_it_is_in_place(change):
    network = architectures.build("Llama", {})
    state = NetworkState(network)
    assert state.is_current()
    change(network)
    assert state.is_current() == (change is change_in_place)
    assert NetworkState(network).is_current()


def test_an_adapter_that_is_switched_is_noticed():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    network = peft.inject_adapter_in_model(config, architectures.build("Llama", {}))
    state = NetworkState(network)
    assert state.is_current()
    layers = [module for module in network.modules() if hasattr(module, "merged_adapters")]
    layers[-1].enable_adapters(False)
    assert not state.is_current()
    layers[-1].enable_adapters(True)
    assert state.is_current()
    layers[0].merge()
    assert not state.is_current()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", DEVICES[0]])
@pytest.mark.parametrize("name", architectures.ACCEPTED)
@torch.no_grad()
def test_fused_norms_give_the_logits_of_a_models_own(device, name, dtype):
    network, tokens = architectures.accepted(name).to(device), torch.arange(40, device=device)[None] % 30
    for module in network.modules():
        if "Norm" in type(module).__name__:
            for parameter in module.parameters():
                parameter.uniform_(0.5, 2.0).copy_(parameter.bfloat16())
    exact = copy.deepcopy(network).bfloat16().float()(tokens).logits
    network = network.to(dtype)
    norms, expected = FusedNorms(network), network(tokens).logits
    with norms.used():
        found = network(tokens).logits
    if dtype == torch.float32:
        assert relative(found, expected) < 1e-5
    else:  # in so small a type rounding differs, and is no worse
        assert relative(found, exact) < 1.5 * relative(expected, exact)
    assert torch.equal(network(tokens).logits, expected)  # nothing is left behind
    shown = [type(module).__name__ for module, _ in norms.found]
    if name == "llama":
        assert len(shown) == 2 * network.config.num_hidden_layers + 1


# Fused layers

FUSED = {
    "llama", "llama-multi-head", "llama-multi-query", "llama-wide-heads", "llama-linear", "llama-yarn",
    "llama-llama3", "mistral", "qwen2",
}  # fmt: skip


@torch.inference_mode()
def ways_through(network, device, dtype, tokenizer, num_tokens=16, num_computed=10):
    """A pass behind random blocks, its inputs, and the fused layers that may run it."""
    from rag_blockcache.gpu import passes
    from rag_blockcache.gpu.fused_layers import fused_layers_of

    with torch.inference_mode(False):
        model = with_graphs(network.to(device=device, dtype=dtype), tokenizer)
    context, computed = assembled(model, 60, num_computed)
    inputs = passes._Inputs(num_tokens, model.num_layers, model.device)
    inputs.fill(context, computed.token_ids, computed.positions)
    inputs.context = context  # whose addresses they hold
    passes.Passes(model)  # registers attention
    layers = fused_layers_of(
        network, FusedNorms(network).eps, num_kv_heads=model.num_kv_heads, head_dim=model.head_dim
    )
    return model, context, inputs, layers


def agree(model, inputs, layers):
    from rag_blockcache.gpu import passes

    with torch.inference_mode(), model.inference(), passes._using_slots(model):
        return layers.agrees(
            partial(passes._forward, model, inputs, 1),
            partial(passes._run_layer, inputs),
            inputs.token_ids,
            inputs.positions,
            inputs.at,
        )


def best_way(model, inputs, layers):
    from rag_blockcache.gpu import passes

    with torch.inference_mode(), model.inference(), passes._using_slots(model):
        return passes._best_way(model, inputs, layers)


def states_of(context):
    return torch.stack([torch.cat(pair) for pair in map(context.states_of_layer, range(len(context.layers)))])


@torch.inference_mode()
def in_float32(model, states, inputs):
    """States after the same pass, by the same model in float32."""
    from rag_blockcache.gpu import passes

    with torch.inference_mode(False):
        wide = with_graphs(copy.deepcopy(model.network).float(), model.tokenizer)
    context, where = (
        Context(wide, [60]),
        passes._Inputs(inputs.token_ids.shape[1], model.num_layers, model.device),
    )
    for layer in range(model.num_layers):
        for mine, its in zip(context.states_of_layer(layer), states[layer].split(1), strict=True):
            mine.copy_(its)
    where._device.copy_(inputs._device)
    where.at.table.copy_(torch.tensor(passes._addresses(context, model.num_layers)))
    best_way(wide, where, None)
    return states_of(context)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "half"])
@pytest.mark.parametrize("num_tokens", [1, 16, 64])
@pytest.mark.parametrize("name", sorted(FUSED))
def test_fused_layers_give_the_logits_and_the_states_of_a_models_own(
    device, half, num_tokens, name, tiny_tokenizer
):
    if device == "cpu" and num_tokens == 64 and name != "llama":
        pytest.skip("takes minutes where kernels are interpreted")
    dtype = HALF[device] if half else torch.float32
    # The rounding of few numbers is a throw of dice: one token is asked several times.
    errors = [
        errors_of_both_ways(name, device, dtype, num_tokens, tiny_tokenizer)
        for _ in range(6 if half and num_tokens == 1 else 1)
    ]
    found, expected = (sum(error * error for error in column) for column in zip(*errors, strict=True))
    if half:  # rounding differs, and is no worse
        assert found < 1.25**2 * expected


def errors_of_both_ways(name, device, dtype, num_tokens, tiny_tokenizer):
    """How far from float32 the states are that fused layers write, and those that the model's own write."""
    network, num_computed = architectures.accepted(name), min(num_tokens, 11)
    for module in network.modules():
        if "Norm" in type(module).__name__:
            module.weight.data.uniform_(0.5, 2.0)
        elif getattr(module, "bias", None) is not None:
            module.bias.data.normal_()
    model, context, inputs, layers = ways_through(
        network, device, dtype, tiny_tokenizer, num_tokens, num_computed
    )
    if dtype == torch.float32 or name != "qwen2":  # biases as large as these, rounded, may be too far apart
        assert agree(model, inputs, layers)
    placed = states_of(context)
    first, _ = best_way(model, inputs, None)
    expected, states = first.clone(), states_of(context)
    with torch.inference_mode():
        for layer in range(model.num_layers):
            for each in context.states_of_layer(layer):
                each[:, :, 60 - num_computed : 60] = float("nan")  # all of them must be written again
        found = layers.forward(inputs.token_ids, inputs.positions, inputs.at)
    assert found.shape == expected.shape
    if dtype == torch.float32:
        assert relative(found, expected) < 1e-5
        assert relative(states_of(context), states) < 1e-5
    exact = in_float32(model, placed, inputs)
    return relative(states_of(context), exact), relative(states, exact)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", sorted(architectures.ACCEPTED))
def test_only_layers_as_llama_has_them_are_fused(device, name, tiny_tokenizer):
    network = architectures.accepted(name)
    if not gpu_fits(network, tiny_tokenizer):
        pytest.skip("attention of its own kind")
    model, _, inputs, layers = ways_through(network, device, torch.float32, tiny_tokenizer)
    _, forward = best_way(model, inputs, layers)
    assert (getattr(forward.func, "__name__", "") == "forward") == (name in FUSED)


def gpu_fits(network, tokenizer):
    from rag_blockcache.gpu.passes import Passes

    return Passes(Model(network, tokenizer))._is_usable


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("multiplier", ["residual_multiplier", "embedding_multiplier", "logits_scaling"])
def test_a_number_that_llama_does_not_have_is_noticed(device, multiplier, tiny_tokenizer):
    plain = {"attention_multiplier": 0.3, "embedding_multiplier": 1.0, "residual_multiplier": 1.0}
    for options, is_same in (({}, True), ({multiplier: 0.9}, False)):
        network = architectures.build("Granite", {**plain, "logits_scaling": 1.0, **options})
        model, _, inputs, layers = ways_through(network, device, torch.float32, tiny_tokenizer)
        assert agree(model, inputs, layers) == is_same
        first, _ = best_way(model, inputs, None)
        expected = first.clone()
        found, forward = best_way(model, inputs, layers)
        assert (forward.func.__name__ == "forward") == is_same
        assert relative(found, expected) < 1e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("change", ["layer", "weights", "activation", "biases"])
def test_a_layer_that_consists_of_something_else_is_left_alone(device, change, tiny_tokenizer):
    network = model_on(device, torch.float32)
    last = network.model.layers[-1]
    if change == "layer":
        last.more = nn.Linear(2, 2)
    elif change == "weights":
        last.mlp.down_proj.weight = nn.Parameter(last.mlp.down_proj.weight.T.contiguous().T)
    elif change == "activation":
        last.mlp.act_fn = nn.GELU()
    else:
        last.self_attn.o_proj.bias = nn.Parameter(torch.zeros(64, device=device))
    assert ways_through(network, device, torch.float32, tiny_tokenizer)[3] is None


@pytest.mark.parametrize("device", DEVICES)
def test_layers_that_are_tried_out_are_whole_to_other_threads(device, tiny_tokenizer):
    network = model_on(device, torch.float32)
    _, _, _, layers = ways_through(network, device, torch.float32, tiny_tokenizer)
    tokens = torch.arange(9, device=device)[None]

    @torch.inference_mode()
    def logits():
        return network(tokens).logits

    expected, elsewhere = logits(), []
    with layers._skipped([]):
        thread = threading.Thread(target=lambda: elsewhere.append(logits()))
        thread.start()
        thread.join()
        here = logits()
    assert torch.equal(elsewhere[0], expected)
    assert not torch.allclose(here, expected)
    assert torch.equal(logits(), expected)


class Centred(nn.Module):
    """What looks like an RMS norm and is none."""

    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(16)), 1e-6

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


class Shifted(Centred):
    """A norm as Gemma has it."""

    def forward(self, x):
        return (1 + self.weight) * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


class Own(Centred):
    """An RMS norm."""

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


def test_what_is_no_rms_norm_is_left_alone_and_so_is_one_that_somebody_stands_in_for():
    own = Own()
    network = nn.Sequential(Centred(), own, Shifted(), nn.LayerNorm(16), nn.Linear(16, 16))
    norms = FusedNorms(network)
    assert [module for module, _ in norms.found] == [own]
    assert FusedNorms(nn.Sequential(nn.RMSNorm(16, eps=1e-5))).found
    own.forward = lambda x: -x  # such as a hook of accelerate
    with norms.used():
        assert torch.equal(own(torch.ones(2, 16)), -torch.ones(2, 16))
    assert torch.equal(own(torch.ones(2, 16)), -torch.ones(2, 16))
    assert not FusedNorms(network).found


def test_hooks_are_noticed_and_a_pass_of_transformers_leaves_none(tiny_model):
    with torch.inference_mode():
        tiny_model(torch.arange(4)[None])
    assert not NetworkState(tiny_model).has_hooks
    network = architectures.build("Llama", {})
    handle = network.model.layers[0].register_forward_pre_hook(lambda module, inputs: None)
    assert NetworkState(network).has_hooks
    handle.remove()
    assert not NetworkState(network).has_hooks


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_that_asks_for_other_attention_goes_the_ordinary_way_and_says_so(
    device, tiny_tokenizer, monkeypatch, caplog
):
    from rag_blockcache.gpu import passes

    model = with_graphs(model_on(device, torch.float32), tiny_tokenizer)
    context, computed = assembled(model, 60, 10)
    ways = passes.Passes(model)
    monkeypatch.setattr(passes, "_PLAIN", {"dropout"})  # so that what every layer asks for is unusual
    with torch.inference_mode():
        assert ways.run(model, context, computed.token_ids, computed.positions, 1) is None
        assert "scaling" in caplog.text
        assert model.config._attn_implementation == "sdpa"
        caplog.clear()
        assert ways.run(model, context, computed.token_ids, computed.positions, 1) is None
    assert not caplog.text  # once is enough


@pytest.mark.parametrize("device", DEVICES[:1])
def test_the_latency_bench_shows_the_ways_of_a_gpu_beside_the_others(device, tiny_tokenizer, tmp_path):
    model = with_graphs(model_on(device, torch.bfloat16), tiny_tokenizer)
    report = measure_latency(model, lengths=(50, 600), policies=("block",), repeats=2, directory=tmp_path)
    places = {"without_graphs", "naive", "host_memory", "host_int8", "host_int4", "memory"}
    places |= {"disk", "disk_kept"}
    for row in report.to_json()["rows"]:
        assert {f"{place}_seconds" for place in places} <= set(row)
        assert 0 < row["memory_floor_seconds"] < row["memory_seconds"]
        assert 0 < row["bus_floor_seconds"] < row["host_memory_seconds"]
    assert model.cuda_graphs
    assert any("CUDA graphs" in note and "not" not in note for note in report.notes)


@pytest.mark.parametrize("device", DEVICES[:1])
@pytest.mark.parametrize("name", architectures.ACCEPTED)
def test_every_architecture_answers_alike_with_graphs_and_without(device, name, tiny_tokenizer):
    network = architectures.accepted(name).to(device)
    caches = [
        BlockCache(network, None, tokenizer=tiny_tokenizer, passage_format=SHORT, cuda_graphs=choice)
        for choice in (True, False)
    ]
    for question in ("Who?", "Where was it printed?", "When?"):
        found, expected = (
            cache.generate(question, PASSAGES[:3], policy="block", max_new_tokens=20, do_sample=False)
            for cache in caches
        )
        assert found.token_ids == expected.token_ids
        logits = [cache.first_logits(question, PASSAGES[:3], policy="block") for cache in caches]
        assert distance(*logits) < 1e-4
