"""Codecs against their description: decoded a number at a time, turned as complex numbers, placed last."""

from __future__ import annotations

import json
import struct

import architectures
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from rag_blockcache import BlockCache, Text
from rag_blockcache.assembler import Context
from rag_blockcache.encoder import encode_blocks
from rag_blockcache.errors import CorruptBlockError, InvalidInputError
from rag_blockcache.kv_states import KVStates, Placement
from rag_blockcache.model import Model
from rag_blockcache.quantization import CODECS, Int4States, Int8States, codec_named
from rag_blockcache.rotary import Angles
from rag_blockcache.store import DiskStore, MemoryStore

PACKED = [Int8States, Int4States]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative; one rounding
SHAPES = {"SmolLM2-135M": (30, 3, 64), "Llama-3-8B": (32, 8, 128), "Qwen2.5-7B": (28, 4, 128)}


def states_of(num_layers, num_heads, num_tokens, head_dim, dtype=torch.float32, seed=0):
    """Make states as models do: some channels of keys far from zero, a first token unlike the others."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_layers, num_heads, num_tokens, head_dim)
    keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
    keys += 8 * torch.randn(head_dim, generator=generator)
    keys[:, :, 0] *= 5
    return KVStates(keys.to(dtype), values.to(dtype))


def decoded(states):
    """Decode as the on-disk format is described, in float64."""
    tensors = {name: tensor.double().numpy() for name, tensor in states.tensors().items()}
    num_tokens, head_dim = states.shape[2:]
    of_token = np.minimum(np.arange(num_tokens) // 64, tensors["key_scales"].shape[2] - 1)
    of_channel = np.minimum(np.arange(head_dim) // 64, tensors["value_scales"].shape[3] - 1)
    key_scales, value_scales = tensors["key_scales"][:, :, of_token], tensors["value_scales"][..., of_channel]
    if states.codec == "int8":
        return tensors["key_codes"] * key_scales, tensors["value_codes"] * value_scales
    keys = tensors["codes"] % 16 * key_scales + tensors["key_offsets"][:, :, of_token]
    keys[:, :, :1] = tensors["first_keys"][:, :, :num_tokens]
    return keys, tensors["codes"] // 16 * value_scales + tensors["value_offsets"][..., of_channel]


def turned(keys, positions, rotary_dim, interleaved):
    """Turn keys as complex numbers, in float64."""
    frequencies = 100.0 ** -(np.arange(rotary_dim // 2) / (rotary_dim // 2))
    first, second = (
        (slice(0, rotary_dim, 2), slice(1, rotary_dim, 2))
        if interleaved
        else (slice(0, rotary_dim // 2), slice(rotary_dim // 2, rotary_dim))
    )
    numbers = (keys[..., first] + 1j * keys[..., second]) * np.exp(1j * positions[:, None] * frequencies)
    keys = keys.copy()
    keys[..., first], keys[..., second] = numbers.real, numbers.imag
    return keys


def angles_at(positions, rotary_dim):
    frequencies = 100.0 ** -(torch.arange(rotary_dim // 2, dtype=torch.float64) / (rotary_dim // 2))
    turns = torch.as_tensor(positions)[:, None] * frequencies
    return Angles(turns.cos().float(), turns.sin().float())


def assert_near(found, expected, dtype):
    """Compare, relative to the largest number: a key is a sum of two, and may be small by chance."""
    tolerance = TOLERANCE[dtype] * max(float(np.abs(expected).max()), 1e-30)
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=0, atol=tolerance)


blocks = st.builds(
    states_of,
    num_layers=st.integers(1, 3),
    num_heads=st.integers(1, 3),
    num_tokens=st.one_of(st.integers(1, 8), st.sampled_from([63, 64, 65, 127, 128, 129, 200])),
    head_dim=st.sampled_from([1, 3, 8, 16, 63, 64, 80, 127, 128, 131]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)


# Placing


@settings(max_examples=100, deadline=None)
@given(form=st.sampled_from(PACKED), states=blocks, offset=st.integers(0, 500), data=st.data())
def test_placing_is_decoding_then_turning_then_copying(form, states, offset, data):
    packed = form.pack(states)
    rotary_dim = 2 * data.draw(st.integers(0, states.shape[3] // 2))  # 0: a layer without positions
    interleaved, num_tokens = data.draw(st.booleans()), states.num_tokens
    before = {name: tensor.clone() for name, tensor in packed.tensors().items()}
    context = torch.full((2, *states.shape[:2], num_tokens + 5, states.shape[3]), 7.0, dtype=states.dtype)
    positions = np.arange(offset, offset + num_tokens)
    packed.place(
        *context[:, :, :, 2 : 2 + num_tokens],
        angles_at(positions, rotary_dim) if rotary_dim else None,
        interleaved=interleaved,
    )
    keys, values = decoded(packed)
    if rotary_dim:
        keys = turned(keys, positions, rotary_dim, interleaved)
    assert_near(context[0, :, :, 2 : 2 + num_tokens], keys, states.dtype)
    assert_near(context[1, :, :, 2 : 2 + num_tokens], values, states.dtype)
    assert (context[:, :, :, :2] == 7).all()
    assert (context[:, :, :, 2 + num_tokens :] == 7).all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in packed.tensors().items())


@settings(max_examples=60, deadline=None)
@given(form=st.sampled_from([KVStates, *PACKED]), states=blocks, data=st.data())
def test_the_beginning_of_a_block_is_placed_as_in_the_whole(form, states, data):
    packed = form.pack(states)
    length = data.draw(st.integers(0, states.num_tokens))
    shorter = data.draw(st.integers(0, length))
    rotary_dim = states.shape[3] // 2 * 2
    angles = angles_at(np.arange(9, 9 + states.num_tokens), rotary_dim) if rotary_dim else None
    whole, part = (torch.full((2, *states.shape), 7.0, dtype=states.dtype) for _ in range(2))
    packed.place(*whole, angles)
    cut = packed.prefix(length).prefix(shorter)
    cut.place(*part[:, :, :, :shorter], angles and angles.at(0, shorter))
    assert cut.num_tokens == shorter
    assert torch.equal(part[:, :, :, :shorter], whole[:, :, :, :shorter])
    assert (part[:, :, :, shorter:] == 7).all()
    # What is known of a block is kept by the object; a whole one must not be another each time.
    assert packed.prefix(states.num_tokens) is packed


# phi3-partial, glm: some dimensions turn; smollm3: some layers do; cohere, glm: pairs are interleaved
@pytest.mark.parametrize(
    "name", ["llama", "llama-wide-heads", "phi3-partial", "glm", "smollm3", "cohere", "gemma3"]
)
@pytest.mark.parametrize("form", PACKED)
def test_every_kind_of_layer_gets_what_decoded_states_would_give(form, name, tiny_tokenizer):
    model = Model(architectures.accepted(name), tiny_tokenizer)
    [[(_, states)]] = encode_blocks(model, [torch.arange(100).tolist()])
    packed = form.pack(states)
    plain = KVStates(*(torch.from_numpy(part).float() for part in decoded(packed)))
    contexts = [Context(model, [130]) for _ in range(2)]
    for context, placed in zip(contexts, (packed, plain), strict=True):
        context.place(0, [Placement(placed, 3), Placement(placed.prefix(20), 110)], 130)
    slots = [*range(3, 103), *range(110, 130)]
    for fused, reference in zip(*(context.layers for context in contexts), strict=True):
        for found, expected in ((fused.keys, reference.keys), (fused.values, reference.values)):
            assert_near(found[:, :, slots], expected[:, :, slots].double().numpy(), torch.float32)


def test_layers_placed_a_few_at_a_time_are_those_placed_at_once(tiny_model, tiny_tokenizer, monkeypatch):
    model = Model(tiny_model, tiny_tokenizer)
    [[(_, states)]] = encode_blocks(model, [torch.arange(40).tolist()])
    contexts = []
    for num_bytes in (1, 2**40):
        monkeypatch.setattr("rag_blockcache.assembler._CHUNK_BYTES", num_bytes)
        contexts.append(Context(model, [40]))
        contexts[-1].place(0, [Placement(Int4States.pack(states), 0)], 40)
    for one, other in zip(*(context.layers for context in contexts), strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


# What is lost


@settings(max_examples=60, deadline=None)
@given(states=blocks)
def test_int8_is_off_by_half_a_step_at_most(states):
    keys, values = decoded(Int8States.pack(states))
    for found, exact, dim in ((keys, states.keys, 2), (values, states.values, 3)):
        for part, original in groups(found, exact, dim):
            step = original.abs().amax(dim, keepdim=True) / 127
            assert ((part - original).abs() <= step * rounded(states.dtype, 127)).all()


@settings(max_examples=60, deadline=None)
@given(states=blocks)
def test_int4_is_off_by_half_a_step_at_most_and_the_first_keys_by_nothing(states):
    keys, values = decoded(Int4States.pack(states))
    assert np.array_equal(keys[:, :, :1], states.keys[:, :, :1].double().numpy())
    for found, exact, dim, first in ((keys, states.keys, 2, 1), (values, states.values, 3, 0)):
        for part, original in groups(found, exact, dim, first):
            step = (original.amax(dim, keepdim=True) - original.amin(dim, keepdim=True)) / 15
            assert ((part - original).abs() <= step * rounded(states.dtype, 15) + 1e-6).all()


def groups(found, exact, dim, first=0):
    """Yield what shares a scale, of decoded and of exact states, leaving out the first."""
    length = exact.shape[dim]
    number = max(1, length // 64)
    ends = [*(64 * (i + 1) for i in range(number - 1)), length]
    for start, end in zip([0, *ends], ends, strict=False):
        start = max(start, first)
        if start < end:
            index = torch.arange(start, end)
            yield torch.from_numpy(found).index_select(dim, index), exact.double().index_select(dim, index)


def rounded(dtype, num_codes):
    """Return half a step, and what rounding the step to a type of the model adds at the largest code."""
    return 0.5 * (1 + torch.finfo(dtype).eps) + num_codes * torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [0.0, -3.0, 1e-7, 60000.0])
def test_states_that_are_all_alike_come_back(form, dtype, number):
    keys = torch.full((1, 2, 70, 5), number, dtype=dtype)
    back = form.pack(KVStates(keys, -keys)).unpack()
    torch.testing.assert_close(back.keys, keys, rtol=TOLERANCE[dtype], atol=1e-5)
    torch.testing.assert_close(back.values, -keys, rtol=TOLERANCE[dtype], atol=1e-5)


def test_nothing_is_divided_by_a_step_of_zero():
    zeros = torch.zeros(1, 2, 70, 5)
    for form in PACKED:
        assert (form.pack(KVStates(zeros, zeros)).key_scales == 1).all()
    assert (Int4States.pack(KVStates(zeros + 3, zeros + 3)).value_scales == 1).all()


def test_a_channel_far_from_zero_keeps_its_differences_in_int4():
    states = states_of(1, 1, 90, 8)
    states.keys[..., 3] = 200 + torch.rand(90)
    back = Int4States.pack(states).unpack()
    assert (back.keys[..., 3] - states.keys[..., 3]).abs().max() < 0.04


def test_what_is_not_packed_is_not_copied():
    states = states_of(1, 1, 3, 8)
    assert KVStates.pack(states) is states.unpack() is states


# Bytes


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize(("form", "share"), [(Int8States, 0.53), (Int4States, 0.30)])
def test_a_file_takes_about_a_half_or_less_than_a_third_of_the_bytes_at_every_length(form, share, model):
    num_layers, num_heads, head_dim = SHAPES[model]
    for num_tokens in range(50, 513):
        shape = (num_layers, num_heads, num_tokens, head_dim)
        packed, exact = (each.num_bytes_of(shape, torch.bfloat16) + 4096 for each in (form, KVStates))
        assert packed <= share * exact, num_tokens


@settings(max_examples=40, deadline=None)
@given(form=st.sampled_from([KVStates, *PACKED]), states=blocks)
def test_the_size_of_a_block_is_known_before_it_is_packed(form, states):
    packed = form.pack(states)
    assert packed.is_sound
    assert packed.num_bytes == form.num_bytes_of(states.shape, states.dtype)
    assert (packed.shape, packed.dtype, packed.num_tokens) == (states.shape, states.dtype, states.shape[2])


# Stores


@settings(max_examples=25, deadline=None)
@given(form=st.sampled_from(PACKED), states=blocks)
def test_packed_blocks_come_back_from_disk_bit_by_bit(form, states, tmp_path_factory):
    packed = form.pack(states)
    with DiskStore(tmp_path_factory.mktemp("store")) as store:
        store["a"] = packed
        found = store["a"]
        assert type(found) is form
        assert store.size_bytes == 4096 + packed.num_bytes
    for name, tensor in packed.tensors().items():
        assert torch.equal(found.tensors()[name], tensor)
        assert found.tensors()[name].dtype == tensor.dtype


def file_of(store):
    [path] = store.directory.glob("*/*.safetensors")
    return path


@pytest.mark.parametrize("form", PACKED)
def test_a_file_says_its_codec_and_any_reader_of_safetensors_reads_it(form, tmp_path):
    with DiskStore(tmp_path / "store") as store:
        store["a"] = form.pack(states_of(2, 3, 5, 7, torch.bfloat16))
        content = file_of(store).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        assert header.pop("__metadata__")["codec"] == form.codec
        assert list(header) == form.names()
        with safe_open(file_of(store), "pt") as file:
            assert set(file.keys()) == set(form.names())


def rewrite(store, metadata=(), **changes):
    """Write the file of the only block anew, with other tensors or metadata, as a forger would."""
    path = file_of(store)
    with safe_open(path, "pt") as file:
        found = file.metadata() | dict(metadata)
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    tensors |= changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, found)


CODES = torch.zeros(2, 3, 70, 8, dtype=torch.uint8)
FORGERIES = {
    "another codec": ({"codec": "int8"}, {}),
    "an unknown codec": ({"codec": "int3"}, {}),
    "the codec of exact states": ({"codec": "none"}, {}),
    "a tensor missing": ({}, {"first_keys": None}),
    "a tensor too many": ({}, {"more": torch.zeros(1)}),
    "codes of another length": ({}, {"codes": CODES[:, :, :69].contiguous()}),
    "codes of another type": ({}, {"codes": CODES.to(torch.int8)}),
    "codes without layers": ({}, {"codes": CODES[0].contiguous()}),
    "scales of another type": ({}, {"value_scales": torch.zeros(2, 3, 70, 1, dtype=torch.float16)}),
    "scales of integers": ({}, {"key_scales": torch.zeros(2, 3, 1, 8, dtype=torch.int64)}),
    "more groups": ({}, {"key_scales": torch.zeros(2, 3, 2, 8)}),
    "other numbers": ({}, {"key_offsets": torch.zeros(2, 3, 1, 8)}),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_packed_block_that_was_altered_is_reported_and_dropped(forgery, tmp_path, caplog):
    metadata, changes = FORGERIES[forgery]
    with DiskStore(tmp_path / "store") as store:
        store["a"] = Int4States.pack(states_of(2, 3, 70, 8))
        rewrite(store, metadata, **changes)
        with pytest.raises(CorruptBlockError, match="block a"):
            store["a"]
        assert "a" not in store
    assert "block a is dropped" in caplog.text


@pytest.mark.parametrize("form", PACKED)
def test_one_wrong_bit_anywhere_is_noticed(form, tmp_path):
    packed = form.pack(states_of(1, 2, 65, 4))
    offset = 4096
    for tensor in packed.tensors().values():
        with DiskStore(tmp_path / "store") as store:
            store["a"] = packed
            content = bytearray(file_of(store).read_bytes())
            content[offset] ^= 1
            file_of(store).write_bytes(content)
            with pytest.raises(CorruptBlockError, match="checksum"):
                store["a"]
        offset += tensor.nbytes
    assert offset == len(content)


def test_a_block_that_was_cut_after_packing_is_not_stored():
    cut = Int8States.pack(states_of(1, 1, 200, 8)).prefix(100)
    with pytest.raises(InvalidInputError, match="block a has key_scales"):
        MemoryStore()["a"] = cut


def test_memory_counts_packed_bytes_and_copies_windows():
    store = MemoryStore()
    packed = Int4States.pack(states_of(2, 3, 70, 8))
    store["a"] = packed
    assert store.size_bytes == packed.num_bytes
    assert store["a"].codes.data_ptr() == packed.codes.data_ptr()
    wide = torch.zeros(8, 3, 70, 8, dtype=torch.uint8)
    store["b"] = packed.mapped(lambda tensor: wide[:2] if tensor.dtype == torch.uint8 else tensor)
    assert store["b"].codes.untyped_storage().nbytes() == packed.codes.nbytes


# BlockCache

PASSAGES = [
    "Ada wrote the note on the engine, and signed it A. A. L. in the year 1843.",
    "Bob read the note.",
]


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_a_cache_keeps_blocks_packed_in_memory_and_on_disk(codec, tiny_model, tiny_tokenizer, tmp_path):
    with BlockCache(tiny_model, tmp_path, tokenizer=tiny_tokenizer, codec=codec) as cache:
        report = cache.prefill(PASSAGES)
        block = cache.block(PASSAGES[0])
        for tier in (cache.store.memory, cache.store.disk):
            assert type(tier[block.block_id]) is CODECS[codec]
        assert report.num_bytes == sum(states.num_bytes for states in cache.store.disk.values())
        answer = cache.generate("Who wrote it?", PASSAGES, policy="block", max_new_tokens=4)
        assert (answer.num_hits, answer.num_misses) == (2, 0)
    with BlockCache(tiny_model, tmp_path, tokenizer=tiny_tokenizer, codec=codec) as cache:
        again = cache.generate("Who wrote it?", PASSAGES, policy="block", max_new_tokens=4)
        assert (again.num_hits, again.token_ids) == (2, answer.token_ids)


@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize("seen", ["themselves", "preamble", "stand-ins"])
def test_an_answer_is_the_same_whether_its_blocks_were_stored(codec, seen, tiny_model, tiny_tokenizer):
    options = {"codec": codec, "blocks_see": seen}
    with BlockCache(tiny_model, None, tokenizer=tiny_tokenizer, **options) as cache:
        missed = cache.first_logits("Who?", PASSAGES, policy="block")
        hit = cache.first_logits("Who?", PASSAGES, policy="block")
    assert torch.equal(missed, hit)


@pytest.mark.parametrize(("codec", "bound"), [("int8", 0.03), ("int4", 0.4)])
def test_logits_over_packed_blocks_are_near_those_over_exact_ones(codec, bound, tiny_model, tiny_tokenizer):
    logits = []
    for chosen in ("none", codec):
        with BlockCache(tiny_model, None, tokenizer=tiny_tokenizer, codec=chosen) as cache:
            logits.append(cache.first_logits("Who wrote it?", PASSAGES, policy="block"))
    exact, packed = logits
    distance = float((packed - exact).norm() / exact.norm())
    assert 0 < distance < bound


def test_a_block_of_another_codec_is_another_block(tiny_model, tiny_tokenizer, tmp_path):
    names = set()
    for codec in CODECS:
        with BlockCache(tiny_model, tmp_path, tokenizer=tiny_tokenizer, codec=codec) as cache:
            names.add(cache.block(PASSAGES[0]).block_id)
            assert cache.prefill(PASSAGES).num_encoded == 2
    assert len(names) == len(CODECS) == 3


def test_the_usual_codec_is_exact(tiny_model, tiny_tokenizer):
    with BlockCache(tiny_model, None, tokenizer=tiny_tokenizer) as cache:
        cache.prefill(PASSAGES)
        assert {type(states) for states in cache.store.values()} == {KVStates}


def test_an_unknown_codec_is_refused_before_the_model_is_loaded(tmp_path):
    with pytest.raises(InvalidInputError, match="codec 'int3' is unknown; use one of none, int8, int4"):
        BlockCache(tmp_path / "no-such-model", None, codec="int3")
    assert codec_named("int8") is Int8States


def test_a_passage_that_is_cut_in_a_prompt_uses_the_beginning_of_its_block(tiny_model, tiny_tokenizer):
    passage = " ".join(f"In chapter {number} the engine is described." for number in range(8))
    options = {"codec": "int4", "passage_format": "verbatim"}
    with BlockCache(tiny_model, None, tokenizer=tiny_tokenizer, **options) as cache:
        cache.prefill([passage])
        answer = cache.answer(Text(f"Note: {passage[:200]}\nWho?"), policy="block", max_new_tokens=2)
    assert answer.num_hits == 1
    assert answer.num_reused_tokens == 200  # a token a byte
