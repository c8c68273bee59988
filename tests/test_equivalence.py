"""The promise of the library: reused blocks give the logits of one block-masked prefill.

The reference reaches the answer another way: one forward pass of the bare model over the whole prompt, with
the block mask and the true positions, and no cache at all.
"""

from __future__ import annotations

import architectures
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rag_blockcache import BlockCache, Passage, block_cache
from rag_blockcache.kv_states import Placement
from rag_blockcache.passage_format import PassageFormat

PASSAGES = [
    "Ada wrote the note on the engine, and signed it A. A. L.",
    "The mill has a thousand columns of figure wheels.",
    "b",
    "In 1843 the translation was printed in Taylor's Scientific Memoirs with notes longer than the text.",
    "Charles built a part of the difference engine before the money ran out; it still works.",
]
QUESTION = "Who wrote the note, and where was it printed?"
FLOAT32 = 1e-4  # relative, on the logits
# Short, so that the last token reaches the passages through the small windows of the tiny models.
SHORT = PassageFormat("short", "Read this.\n", "{title}: {text}\n", "{text}\n", "{question}")


def masks(network, lengths, windows):
    """Return the block mask of a prompt whose last segment sees all, for each kind of layer."""
    total = sum(lengths)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(total)
    seen = (owner[:, None] == owner) | (owner == len(lengths) - 1)[:, None]
    seen &= place[:, None] >= place
    found = {}
    for layer_type, window in windows.items():
        mask = seen if window is None else seen & (place[:, None] - place < window)
        if network.config._attn_implementation == "eager":
            lowest = torch.finfo(network.dtype).min
            found[layer_type] = torch.zeros(total, total, dtype=network.dtype).masked_fill(~mask, lowest)[
                None, None
            ]
        else:
            found[layer_type] = mask[None, None]
    return found if len(found) > 1 else next(iter(found.values()))


@torch.inference_mode()
def block_masked_prefill(network, segments, windows):
    """Return the last logits of one pass over the whole prompt."""
    segments = [segment for segment in segments if segment]
    token_ids = torch.tensor([token for segment in segments for token in segment])[None]
    positions = torch.arange(token_ids.shape[1])[None]
    mask = masks(network, [len(segment) for segment in segments], windows)
    output = network(input_ids=token_ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return output.logits[0, -1].float()


@torch.inference_mode()
def full_prefill(network, segments):
    """Return the last logits of the bare model over the same tokens, with its own causal mask."""
    token_ids = torch.tensor([token for segment in segments for token in segment])[None]
    return network(input_ids=token_ids, use_cache=False).logits[0, -1].float()


def distance(one, other):
    return float((one - other).norm() / other.norm())


def windows_of(network):
    """Read windows from the configuration, as its authors document it, not through the library."""
    config = network.config
    types = getattr(config, "layer_types", None) or [
        "sliding_attention" if getattr(config, "sliding_window", None) else ""
    ]
    return {kind: config.sliding_window if kind == "sliding_attention" else None for kind in types}


@torch.inference_mode()
def prefill_behind_stand_ins(network, stand_ins, segments, windows):
    """Return the last logits of one pass in which each passage has stand-ins of its own before it.

    Stand-ins lie at the positions before their passage, those of other segments or not, and only their
    passage sees them. A rotary model reads distances alone, so all positions are moved behind the longest.
    """
    preamble, *passages, question = segments
    runs = [(0, "preamble", preamble)]  # first position, what it is, tokens
    place = len(preamble)
    for index, passage in enumerate(passages):
        runs += [
            (place - len(stand_ins), f"stand-ins {index}", stand_ins),
            (place, f"passage {index}", passage),
        ]
        place += len(passage)
    runs.append((place, "question", question))
    token_ids = torch.tensor([token for _, _, tokens in runs for token in tokens])[None]
    positions = torch.cat([torch.arange(start, start + len(tokens)) for start, _, tokens in runs])
    owners = [what for _, what, tokens in runs for _ in tokens]

    def sees(one, other):
        if one == "question":
            return not other.startswith("stand-ins")
        return one == other or one.replace("passage", "stand-ins") == other

    kinds = {pair: sees(*pair) for pair in {(one, other) for one in set(owners) for other in set(owners)}}
    seen = torch.tensor([[kinds[one, other] for other in owners] for one in owners])
    behind = positions[:, None] - positions
    found = {}
    for layer_type, window in windows.items():
        mask = seen & (behind >= 0) & (behind < (window or len(owners) + len(stand_ins)))
        if network.config._attn_implementation == "eager":
            lowest = torch.finfo(network.dtype).min
            mask = torch.zeros(mask.shape, dtype=network.dtype).masked_fill(~mask, lowest)
        found[layer_type] = mask[None, None]
    output = network(
        input_ids=token_ids,
        attention_mask=found if len(found) > 1 else next(iter(found.values())),
        position_ids=(positions + len(stand_ins))[None],
        use_cache=False,
    )
    return output.logits[0, -1].float()


def cache_of(network, tokenizer, **options):
    """Open a cache of the paper's blocks, if ``options`` say nothing else."""
    options = {"blocks_see": "themselves", **options}
    return BlockCache(network, None, tokenizer=tokenizer, passage_format=SHORT, **options)


@pytest.mark.parametrize("name", architectures.ACCEPTED)
def test_reused_blocks_give_the_logits_of_one_block_masked_prefill(name, tiny_tokenizer):
    network = architectures.accepted(name)
    cache = cache_of(network, tiny_tokenizer)
    segments = cache.segments("Who?", PASSAGES[:3])

    first = cache.first_logits("Who?", PASSAGES[:3], policy="block")  # encodes
    again = cache.first_logits("Who?", PASSAGES[:3], policy="block")  # reuses

    reference = block_masked_prefill(network, segments, windows_of(network))
    assert distance(first, reference) < FLOAT32
    assert distance(again, reference) < FLOAT32
    assert distance(reference, full_prefill(network, segments)) > 100 * FLOAT32, (
        "the block mask must matter here"
    )


@pytest.mark.parametrize("name", architectures.ACCEPTED)
def test_policy_full_gives_the_logits_of_the_bare_model(name, tiny_tokenizer):
    network = architectures.accepted(name)
    cache = cache_of(network, tiny_tokenizer)
    logits = cache.first_logits("Who?", PASSAGES[:2], policy="full")
    assert distance(logits, full_prefill(network, cache.segments("Who?", PASSAGES[:2]))) < FLOAT32


@pytest.mark.parametrize("name", architectures.ACCEPTED)
def test_repairing_every_token_gives_full_attention(name, tiny_tokenizer):
    network = architectures.accepted(name)
    cache = cache_of(network, tiny_tokenizer, preamble="")
    repaired = cache.first_logits("Who?", PASSAGES[:3], policy="link-1000")
    assert distance(repaired, cache.first_logits("Who?", PASSAGES[:3], policy="full")) < FLOAT32


@pytest.mark.parametrize("name", ["llama", "llama-yarn", "gemma3", "cohere2", "glm", "phi3-partial", "olmo2"])
def test_bfloat16_is_no_further_from_the_truth_than_the_models_own_pass(name, tiny_tokenizer):
    exact = architectures.accepted(name, torch.float32)
    rounded = architectures.accepted(name, torch.bfloat16)
    exact.load_state_dict(rounded.state_dict())  # the same weights, computed in float32
    cache = cache_of(rounded, tiny_tokenizer)
    ours, own = [], []
    for question in ("Who?", "Where was it printed?", "What still works?", QUESTION):
        segments = cache.segments(question, PASSAGES)
        truth = block_masked_prefill(exact, segments, windows_of(exact))
        own.append(distance(block_masked_prefill(rounded, segments, windows_of(rounded)), truth))
        ours.append(distance(cache.first_logits(question, PASSAGES, policy="block"), truth))
    assert sum(ours) <= 1.25 * sum(own), (ours, own)


@pytest.mark.parametrize(
    "passages",
    [
        [],
        PASSAGES[:1],
        PASSAGES[::-1],
        [PASSAGES[0], PASSAGES[1], PASSAGES[0], PASSAGES[0]],
        [PASSAGES[2]] * 7,
    ],
    ids=["none", "one", "reversed", "repeated", "seven-equal"],
)
def test_order_number_and_repetition_of_passages_make_no_difference(passages, tiny_model, tiny_cache):
    logits = tiny_cache.first_logits(QUESTION, passages, policy="block")
    reference = block_masked_prefill(
        tiny_model, tiny_cache.segments(QUESTION, passages), windows_of(tiny_model)
    )
    assert distance(logits, reference) < FLOAT32


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(min_size=1, max_size=40).filter(str.strip), max_size=6),
    question=st.text(min_size=1, max_size=30),
)
def test_any_text_is_served_exactly(texts, question, tiny_model, tiny_cache):
    if not question.strip():
        question = "?"
    logits = tiny_cache.first_logits(question, texts, policy="block")
    reference = block_masked_prefill(tiny_model, tiny_cache.segments(question, texts), windows_of(tiny_model))
    assert distance(logits, reference) < FLOAT32


def test_blocks_read_back_from_disk_are_the_same_to_the_bit(tiny_model, tiny_tokenizer, tmp_path):
    with BlockCache(tiny_model, tmp_path, tokenizer=tiny_tokenizer) as cache:
        before = cache.first_logits(QUESTION, PASSAGES, policy="block")
    with BlockCache(tiny_model, tmp_path, tokenizer=tiny_tokenizer) as cache:
        assert torch.equal(cache.first_logits(QUESTION, PASSAGES, policy="block"), before)


@pytest.mark.parametrize("num_passages", [0, 2])
def test_longrope_blocks_are_encoded_anew_beyond_the_original_window(num_passages, tiny_tokenizer):
    network = architectures.accepted("phi3-longrope")
    cache = cache_of(network, tiny_tokenizer)
    long_question = "Where? " * 25  # past the original 128 positions, a byte each
    passages = PASSAGES[:num_passages]
    cache.prefill(passages)
    segments = cache.segments(long_question, passages)
    assert sum(map(len, segments)) > 128
    logits = cache.first_logits(long_question, passages, policy="block")
    assert distance(logits, block_masked_prefill(network, segments, windows_of(network))) < FLOAT32


def test_longrope_blocks_behind_stand_ins_are_encoded_anew_beyond_the_original_window(
    monkeypatch, tiny_tokenizer
):
    monkeypatch.setattr(block_cache, "STAND_INS", (Passage("Sam left.", title="S"),))
    network = architectures.accepted("phi3-longrope")
    cache = cache_of(network, tiny_tokenizer, blocks_see="stand-ins")
    long_question = "Where? " * 25  # past the original 128 positions, a byte each
    cache.prefill(PASSAGES[:2])
    segments = cache.segments(long_question, PASSAGES[:2])
    logits = cache.first_logits(long_question, PASSAGES[:2], policy="block")
    stand_ins = list(cache.prompt.run_of_passages(block_cache.STAND_INS))
    reference = prefill_behind_stand_ins(network, stand_ins, segments, windows_of(network))
    assert distance(logits, reference) < FLOAT32


def test_dynamic_ntk_beyond_the_original_window_is_prefilled_in_full(tiny_tokenizer):
    network = architectures.accepted("llama-dynamic")
    cache = cache_of(network, tiny_tokenizer)
    # The window of this model is the original one, so nothing longer is served at all.
    assert cache.model.regime(cache.model.max_length) == ""
    assert cache.model.regime(cache.model.max_length + 1) is None


def test_blocks_conditioned_on_the_preamble_continue_it(tiny_model, tiny_tokenizer):
    cache = cache_of(tiny_model, tiny_tokenizer, blocks_see="preamble")
    segments = cache.segments(QUESTION, PASSAGES[:1])
    # With one passage, preamble + passage + question is plain causal attention.
    logits = cache.first_logits(QUESTION, PASSAGES[:1], policy="block")
    assert distance(logits, full_prefill(tiny_model, segments)) < FLOAT32


def test_conditioned_blocks_equal_prefilling_preamble_and_passage_together(tiny_model, tiny_tokenizer):
    cache = cache_of(tiny_model, tiny_tokenizer, blocks_see="preamble")
    one = cache.first_logits(QUESTION, PASSAGES, policy="block")
    other = cache_of(tiny_model, tiny_tokenizer).first_logits(QUESTION, PASSAGES, policy="block")
    assert distance(one, other) > 100 * FLOAT32, "conditioning must matter"
    preamble, *_ = cache.segments(QUESTION, PASSAGES)
    named, plain = (c.block(PASSAGES[0]).block_id for c in (cache, cache_of(tiny_model, tiny_tokenizer)))
    assert named != plain
    assert preamble


@pytest.mark.parametrize("name", architectures.ACCEPTED)
def test_blocks_behind_stand_ins_give_the_logits_of_a_pass_that_holds_those(
    name, monkeypatch, tiny_tokenizer
):
    monkeypatch.setattr(block_cache, "STAND_INS", (Passage("Sam left.", title="S"), Passage("It rained.")))
    network = architectures.accepted(name)
    cache = cache_of(network, tiny_tokenizer, blocks_see=None)
    assert cache.blocks_see == "stand-ins"
    segments = cache.segments("Who?", PASSAGES[:3])
    cache.prefill(PASSAGES[:3])
    logits = cache.first_logits("Who?", PASSAGES[:3], policy="block")
    stand_ins = tiny_tokenizer("S: Sam left.\nIt rained.\n", add_special_tokens=False).input_ids
    reference = prefill_behind_stand_ins(network, stand_ins, segments, windows_of(network))
    assert distance(logits, reference) < FLOAT32
    assert distance(block_masked_prefill(network, segments, windows_of(network)), reference) > 100 * FLOAT32


def _logits_with(monkeypatch, cache, change):
    """Return the logits after ``change`` was done to what is placed."""
    from rag_blockcache.plan import Plan

    original = Plan.placements
    monkeypatch.setattr(Plan, "placements", lambda self, states: change(original(self, states)))
    return cache.first_logits(QUESTION, PASSAGES, policy="block")


def _shift_one(placements):
    moved = placements[2]
    return [*placements[:2], Placement(moved.states, moved.offset - 1), *placements[3:]]


def _swap_values(placements):
    from rag_blockcache.kv_states import KVStates

    one, other = placements[2], placements[4]
    n = min(one.states.num_tokens, other.states.num_tokens)
    values = one.states.values.clone()
    values[:, :, :n] = other.states.values[:, :, :n]
    return [*placements[:2], Placement(KVStates(one.states.keys, values), one.offset), *placements[3:]]


@pytest.mark.parametrize("change", [_shift_one, _swap_values])
def test_this_suite_notices_a_wrong_placement(change, monkeypatch, tiny_model, tiny_cache):
    reference = block_masked_prefill(
        tiny_model, tiny_cache.segments(QUESTION, PASSAGES), windows_of(tiny_model)
    )
    assert distance(_logits_with(monkeypatch, tiny_cache, change), reference) > 10 * FLOAT32


def test_this_suite_notices_keys_that_were_not_re_encoded(monkeypatch, tiny_model, tiny_cache):
    from rag_blockcache import kv_states

    reference = block_masked_prefill(
        tiny_model, tiny_cache.segments(QUESTION, PASSAGES), windows_of(tiny_model)
    )

    def unmoved(keys, angles, *, interleaved=False, out):
        return out.copy_(keys)

    monkeypatch.setattr(kv_states, "rotate_keys", unmoved)
    assert distance(tiny_cache.first_logits(QUESTION, PASSAGES, policy="block"), reference) > 10 * FLOAT32


@pytest.mark.real_weights
@pytest.mark.slow
@pytest.mark.parametrize("seen", ["themselves", "stand-ins"])
def test_real_weights_over_real_passages(seen, smollm2_path):
    from pydoc_data import topics

    texts = [text.strip()[:700] for text in list(topics.topics.values())[:8]]
    passages = [Passage(text, title=f"Topic {index}") for index, text in enumerate(texts)]
    cache = BlockCache(smollm2_path, None, dtype="float32", blocks_see=seen)
    network = cache.model.network
    segments = cache.segments("What does the assert statement do?", passages)
    logits = cache.first_logits("What does the assert statement do?", passages, policy="block")
    if seen == "themselves":
        reference = block_masked_prefill(network, segments, windows_of(network))
    else:
        stand_ins = cache.prompt.run_of_passages(block_cache.STAND_INS)
        reference = prefill_behind_stand_ins(network, stand_ins, segments, windows_of(network))
    assert distance(logits, reference) < FLOAT32
