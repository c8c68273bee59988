"""Tokens to text, piece by piece: nothing is sent that changes later, and all of it is sent."""

from __future__ import annotations

import architectures
import pytest
from conftest import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_made_here import metaspace

from rag_blockcache.model import Model
from rag_blockcache.text_stream import cut_at_stop, text_pieces, whole_text


@pytest.fixture(scope="module")
def models():
    network = architectures.build("Llama", {"num_hidden_layers": 1})
    return [Model(network, tokenizer) for tokenizer in (byte_tokenizer(), metaspace())]


def tokens_of(model, text):
    return model.tokenizer(text, add_special_tokens=False).input_ids


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(alphabet="ab é日🙂\ufffd\n", max_size=12),
    stops=st.lists(st.text("ab é", min_size=1, max_size=3), max_size=2),
)
def test_pieces_put_together_are_the_text_up_to_a_stop_string(text, stops, models):
    for model in models:
        tokens = tokens_of(model, text)
        pieces = "".join(text_pieces(model, iter(tokens), stops))
        assert pieces == whole_text(model, tokens, stops)
        if not text.endswith("\ufffd"):
            assert pieces == cut_at_stop(model.text(tokens), stops)


@settings(max_examples=60, deadline=None)
@given(tokens=st.lists(st.integers(0, 260), max_size=12), stops=st.sampled_from([[], ["a"], ["ab", "b!"]]))
def test_any_tokens_at_all_give_the_text_of_all_of_them(tokens, stops, models):
    assert "".join(text_pieces(models[0], iter(tokens), stops)) == whole_text(models[0], tokens, stops)


@settings(max_examples=30, deadline=None)
@given(
    words=st.lists(
        st.sampled_from(["ab", " ab", "é", "日本", "🙂", "\n", " a b", "b"]), min_size=20, max_size=60
    ),
    stops=st.sampled_from([[], ["日本b"], ["b ab", "aa"]]),
)
def test_long_answers_are_not_decoded_anew_at_every_token(words, stops, models):
    for model in models:
        tokens = tokens_of(model, "".join(words))
        pieces = "".join(text_pieces(model, iter(tokens), stops))
        assert pieces == whole_text(model, tokens, stops)


def test_the_work_for_a_token_does_not_grow_with_the_answer(models, monkeypatch):
    longest = []
    decode = Model.text
    monkeypatch.setattr(
        Model,
        "text",
        lambda self, token_ids, **how: longest.append(len(token_ids)) or decode(self, token_ids, **how),
    )
    text = "ab é日 " * 200
    assert "".join(text_pieces(models[0], iter(tokens_of(models[0], text)))) == text
    assert max(longest) <= 40


@pytest.mark.parametrize("num_cut", [1, 2])
def test_a_character_that_was_cut_off_at_the_end_takes_no_other_with_it(num_cut, models):
    for (
        model
    ) in models:  # the second one reads bytes together, and gives up on all of them where one is wrong
        tokens = tokens_of(model, "a日本")[:-num_cut]
        assert "".join(text_pieces(model, iter(tokens))) == whole_text(model, tokens) == "a日"


def test_a_character_of_several_tokens_comes_whole(models):
    model = models[0]
    assert list(text_pieces(model, iter(tokens_of(model, "é日a")))) == ["é", "日", "a"]


def test_what_may_begin_a_stop_string_is_held_back_until_it_cannot(models):
    model = models[0]
    assert list(text_pieces(model, iter(tokens_of(model, "xENyEND z")), ["END"])) == ["x", "ENy"]
    assert list(text_pieces(model, iter(tokens_of(model, "xEN")), ["END"])) == ["x", "EN"]


def test_pieces_come_as_soon_as_they_are_certain(models):
    received = []

    def tokens():
        for token in tokens_of(models[0], "abc"):
            yield token
            received.append("".join(pieces_so_far))

    pieces_so_far: list[str] = []
    for piece in text_pieces(models[0], tokens()):
        pieces_so_far.append(piece)
    assert received == ["a", "ab", "abc"]


def test_special_tokens_are_not_text(models):
    model = models[0]
    tokens = [3, *tokens_of(model, "ab"), 4, 2]
    assert "".join(text_pieces(model, iter(tokens))) == "ab"


def test_spaces_before_punctuation_stay(models):
    tokenizer = byte_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    model = Model(models[0].network, tokenizer)
    assert (
        "".join(text_pieces(model, iter(tokens_of(model, "a ."))))
        == model.text(tokens_of(model, "a ."))
        == "a ."
    )


def test_the_first_of_several_stop_strings_cuts():
    assert cut_at_stop("one two three", ["three", "two"]) == "one "
    assert cut_at_stop("one", []) == "one"
