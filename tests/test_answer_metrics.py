"""Answers are judged after SQuAD normalisation: contained, exact, and by words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_blockcache.evaluation.answer_metrics import contains_answer, exact_match, f1, normalized


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("The  Beatles!", "beatles"),
        ("an apple a day", "apple day"),
        ("U.S.A.", "usa"),
        ("it's — fine", "its — fine"),  # punctuation of ASCII only, as in the script of SQuAD
        ("Theatre", "theatre"),
        ("a\tb\n c", "b c"),
        ("The", ""),
    ],
)
def test_normalisation_drops_case_punctuation_articles_and_space(text, left):
    assert normalized(text) == left


def test_an_answer_counts_wherever_it_stands_in_the_output():
    assert contains_answer("It was Fly Me to the Moon, by Bart Howard.", ["bart howard"])
    assert contains_answer("He was born in 1834.", ["no", "1834"])
    assert not contains_answer("Bart, of the Howard family", ["Bart Howard"])


def test_an_answer_of_which_normalisation_leaves_nothing_never_counts():
    assert not contains_answer("anything at all", ["The", "!"])
    assert not exact_match("a", ["The"])


def test_exact_match_allows_for_nothing_but_normalisation():
    assert exact_match("The Green Oak.", ["green oak"])
    assert not exact_match("the Green Oak inn", ["green oak"])


def test_f1_counts_shared_words_of_the_best_answer():
    # Two of four words of the output are right, out of two: precision 1/2, recall 1.
    assert f1("it is Ruth Hale", ["no", "Ruth Hale"]) == pytest.approx(2 * 0.5 * 1 / 1.5)
    assert f1("hale hale", ["hale"]) == pytest.approx(
        2 * 0.5 * 1 / 1.5
    )  # a word counts as often as it is in both
    assert f1("nothing", ["Ruth Hale"]) == 0.0
    assert f1("anything", []) == 0.0


@given(st.text(), st.text())
def test_the_three_measures_agree_on_what_is_right(text, gold):
    if exact_match(text, [gold]):
        assert contains_answer(text, [gold])
        assert f1(text, [gold]) == 1.0
    assert 0.0 <= f1(text, [gold]) <= 1.0
