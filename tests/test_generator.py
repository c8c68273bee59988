"""Decoding is ``generate()`` of transformers: over the same tokens, the same tokens, with all options."""

from __future__ import annotations

import copy

import architectures
import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    TextStreamer,
)

from rag_blockcache import BlockCache
from rag_blockcache.assembler import Context
from rag_blockcache.errors import InvalidInputError
from rag_blockcache.generation_options import check_options, setting, stop_strings
from rag_blockcache.generator import Computed, prefill
from rag_blockcache.model import Model

PASSAGES = ["Ada wrote the note.", "The mill has wheels.", "Ada wrote the note."]


class Favour(LogitsProcessor):
    """Makes one token likelier, by what was generated."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, 65 + input_ids.shape[1] % 7] += 3.0
        return scores


class After(StoppingCriteria):
    """Ends every row after some tokens."""

    def __init__(self, width):
        self.width = width

    def __call__(self, input_ids, scores, **_):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.width)


@pytest.fixture(scope="module")
def cache(tiny_model, tiny_tokenizer):
    return BlockCache(tiny_model, None, tokenizer=tiny_tokenizer)


def prompt_of(cache, question="Who?", passages=PASSAGES):
    return torch.tensor([[token for segment in cache.segments(question, passages) for token in segment]])


def bare(cache, network, seed=0, max_new_tokens=12, **options):
    """Return the new tokens of the bare model."""
    torch.manual_seed(seed)
    prompt = prompt_of(cache)
    options = {"pad_token_id": 0, "max_new_tokens": max_new_tokens, **options}
    sequences = network.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    return sequences[0, prompt.shape[1] :].tolist()


def ours(cache, seed=0, max_new_tokens=12, policy="full", **options):
    torch.manual_seed(seed)
    return cache.generate("Who?", PASSAGES, policy=policy, max_new_tokens=max_new_tokens, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 30},
        {"do_sample": True, "min_p": 0.01, "renormalize_logits": True},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"encoder_repetition_penalty": 1.5},
        {"logits_processor": LogitsProcessorList([Favour()])},
        {"bad_words_ids": [[20], [30, 31]], "suppress_tokens": [40, 41]},
        {"min_new_tokens": 8, "eos_token_id": list(range(3, 200))},
        {"eos_token_id": list(range(3, 200))},
        {"eos_token_id": None},
        {"num_beams": 3},
        {"num_beams": 3, "num_beam_groups": None, "length_penalty": 0.5, "early_stopping": True},
        {"prompt_lookup_num_tokens": 4},
        {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1, "repetition_penalty": 1.2},
        {
            "generation_config": GenerationConfig(
                do_sample=True, temperature=0.9, cache_implementation="static"
            )
        },
        {"prefix_allowed_tokens_fn": lambda row, ids: list(range(60, 90))},
    ],
    ids=lambda options: "-".join(options) or "greedy",
)
def test_policy_full_generates_what_the_bare_model_generates(options, cache, tiny_model):
    theirs = dict(options)
    if "generation_config" in theirs:
        theirs["generation_config"] = GenerationConfig(do_sample=True, temperature=0.9)
    assert ours(cache, **options).token_ids == bare(cache, tiny_model, **theirs)


def test_prompt_lookup_over_reused_blocks_changes_nothing_however_many_tokens_are_accepted(
    cache, monkeypatch
):
    from rag_blockcache import generator

    lengths = []
    forward = generator._forward
    monkeypatch.setattr(
        generator,
        "_forward",
        lambda m, c, ids, *rest: (lengths.append(ids.shape[1]), forward(m, c, ids, *rest))[1],
    )
    # The same token again and again, so that lookup finds candidates and all of them are right.
    again = LogitsProcessorList([_Constant(90)])
    options = {"policy": "block", "max_new_tokens": 20, "logits_processor": again}
    expected = ours(cache, **options)
    steps = len(lengths)
    lengths.clear()
    answer = ours(cache, prompt_lookup_num_tokens=4, **options)
    assert answer.token_ids == expected.token_ids == [90] * 20
    assert len(lengths) < steps, "candidates must have been accepted"
    assert max(lengths[1:]) <= 5, "accepted tokens must not be computed again"


class _Constant(LogitsProcessor):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        scores = torch.full_like(scores, -1e4)
        scores[:, self.token] = 0.0
        return scores


@pytest.mark.parametrize("policy", ["full", "block", "link-3"])
def test_assisted_decoding_and_an_assistant_give_the_greedy_answer(policy, cache):
    greedy = ours(cache, policy=policy, max_new_tokens=16)
    assistant = architectures.build("Llama", {"num_hidden_layers": 1})
    assert (
        ours(cache, policy=policy, max_new_tokens=16, prompt_lookup_num_tokens=3).token_ids
        == greedy.token_ids
    )
    assert (
        ours(cache, policy=policy, max_new_tokens=16, assistant_model=assistant).token_ids == greedy.token_ids
    )


def test_stop_strings_end_where_those_of_transformers_end(cache, tiny_model, tiny_tokenizer):
    options = {"do_sample": True, "prefix_allowed_tokens_fn": lambda row, ids: list(range(5, 99))}  # ASCII
    whole, text = (getattr(ours(cache, **options), part) for part in ("token_ids", "text"))
    stop = text[len(text) // 2 :][:2]
    options["stop_strings"] = [stop, "never"]
    answer = ours(cache, **options)
    theirs = bare(cache, tiny_model, tokenizer=tiny_tokenizer, **options)
    assert answer.token_ids == theirs == whole[: len(theirs)]
    assert answer.finish_reason == "stop"
    assert answer.text == text[: text.index(stop)]


def test_a_special_token_can_be_a_stop_string(cache):
    answer = ours(cache, logits_processor=LogitsProcessorList([_Constant(4)]), stop_strings="<|im_end|>")
    assert answer.token_ids == [4]
    assert (answer.text, answer.finish_reason) == ("", "stop")


def test_stop_strings_of_a_configuration_count(cache):
    text = ours(cache).text
    answer = ours(cache, generation_config=GenerationConfig(stop_strings=text[1]))
    assert answer.text == text[: text.index(text[1])]


def test_criteria_of_the_user_end_an_answer(cache, tiny_model):
    width = prompt_of(cache).shape[1]
    answer = ours(cache, stopping_criteria=[After(width + 5)])
    assert answer.token_ids == bare(cache, tiny_model, max_new_tokens=5)
    assert answer.finish_reason == "stop"


def test_an_end_of_sequence_token_ends_an_answer_and_belongs_to_it(cache):
    tokens = ours(cache).token_ids
    answer = ours(cache, eos_token_id=[tokens[4], 2])
    assert answer.token_ids == tokens[: tokens.index(tokens[4]) + 1]
    assert answer.finish_reason == "stop"
    assert ours(cache, eos_token_id=None).finish_reason == "length"


def test_a_streamer_of_the_user_sees_what_generate_shows_it(cache, tiny_tokenizer, capsys):
    answer = ours(cache, streamer=TextStreamer(tiny_tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == tiny_tokenizer.decode(answer.token_ids) + "\n"


def test_every_name_of_an_option_is_checked(cache):
    with pytest.raises(InvalidInputError, match="'temprature' is unknown"):
        ours(cache, temprature=0.1)
    for name in ("use_cache", "past_key_values", "return_dict_in_generate", "output_scores"):
        with pytest.raises(InvalidInputError, match="the engine chooses it"):
            ours(cache, **{name: True})
    for name in ("num_return_sequences", "guidance_scale", "max_length", "token_healing"):
        with pytest.raises(InvalidInputError, match="cannot be combined"):
            check_options({name: 2})
    for name in ("self", "inputs", "attention_mask", "transformers_version"):
        with pytest.raises(InvalidInputError, match="unknown"):
            check_options({name: 1})
    check_options({"guidance_scale": None, "do_sample": True, "streamer": None})


def test_a_value_that_generate_refuses_is_an_input_error(cache):
    with pytest.raises(InvalidInputError, match="refuses these options"):
        ours(cache, do_sample=True, temperature=-1.0)


@pytest.mark.parametrize("stops", [[""], ["a", ""], [3]])
def test_an_empty_stop_string_is_refused(stops, cache):
    with pytest.raises(InvalidInputError, match="not empty"):
        ours(cache, stop_strings=stops)


def test_a_setting_comes_from_the_call_then_the_configuration_then_the_model(cache):
    model = cache.model
    given = {"generation_config": GenerationConfig(eos_token_id=7)}
    assert setting(model, {}, "eos_token_id") == model.network.generation_config.eos_token_id
    assert setting(model, given, "eos_token_id") == 7
    assert setting(model, {**given, "eos_token_id": 9}, "eos_token_id") == 9
    assert setting(model, {**given, "eos_token_id": None}, "eos_token_id") is None
    assert stop_strings(model, {"stop_strings": "a"}) == ["a"]
    assert stop_strings(model, {}) == []


def test_the_users_model_and_options_stay_as_they_were(tiny_tokenizer):
    network = architectures.accepted("gemma3")
    options = {"generation_config": GenerationConfig(do_sample=True), "bad_words_ids": [[9]]}
    before = _state(network), copy.deepcopy(options["generation_config"].to_dict())
    cache = BlockCache(network, None, tokenizer=tiny_tokenizer)
    cache.generate("Who?", PASSAGES, policy="link-2", max_new_tokens=4, **options)
    cache.generate_batch([("Who?", PASSAGES), ("Where?", [])], policy="block", max_new_tokens=4, num_beams=2)
    assert (_state(network), options["generation_config"].to_dict()) == before
    assert list(options) == ["generation_config", "bad_words_ids"]


def _state(network):
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return (
        network.config.to_dict(),
        network.config._attn_implementation,
        network.generation_config.to_dict(),
        [sum(len(getattr(m, hook)) for hook in hooks) for m in network.modules()],
        [sorted(vars(m)) for m in network.modules()],
        [weight.sum().item() for weight in network.state_dict().values()],
        [m.training for m in network.modules()],
    )


def test_attention_of_another_kind_is_restored(cache, monkeypatch):
    model = cache.model
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    with model.dense_masks():
        assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "flash_attention_2"


def test_computed_slots_may_stand_anywhere(tiny_model, tiny_tokenizer):
    model = Model(tiny_model, tiny_tokenizer)
    tokens = torch.arange(20) + 40
    context = Context(model, [20])
    prefill(model, context, [Computed(torch.arange(20), tokens)])
    expected = [layer.keys.clone() for layer in context.layers]
    for layer in context.layers:  # forget some slots, and compute them again
        layer.keys[:, :, [3, 7, 8, 19]] = 99.0
        layer.values[:, :, [3, 7, 8, 19]] = 99.0
    positions = torch.tensor([3, 7, 8, 19])
    logits = prefill(model, context, [Computed(positions, tokens[positions])])
    for layer, keys in zip(context.layers, expected, strict=True):
        torch.testing.assert_close(layer.keys, keys, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(
            logits[0, -1], tiny_model(tokens[None]).logits[0, -1], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("policy", ["full", "block"])
def test_an_answer_that_crosses_into_the_long_angles_of_longrope_goes_on_right(policy, tiny_tokenizer):
    network = architectures.accepted("phi3-longrope")  # turns by other angles beyond 128 tokens
    cache = BlockCache(network, None, tokenizer=tiny_tokenizer, preamble="", passage_format="plain")
    question = "W" * 90
    prompt = prompt_of(cache, question, ["Ada."])
    assert 110 < prompt.shape[1] < 128
    answer = cache.generate(question, ["Ada."], policy=policy, max_new_tokens=24, eos_token_id=None)
    whole = torch.cat((prompt, torch.tensor([answer.token_ids])), dim=1)
    for length in range(129, whole.shape[1]):  # every token is the bare model's choice over all before it
        with torch.inference_mode():
            logits = network(whole[:, :length], use_cache=False).logits[0, -1]
        assert int(logits.argmax()) == int(whole[0, length])
