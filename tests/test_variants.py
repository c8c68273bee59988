"""Questions are asked with fewer, more, reordered and repeated passages, the same in every run."""

import dataclasses

import pytest
import qa_data

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.evaluation.answer_metrics import contains_answer
from rag_blockcache.evaluation.qa_examples import read_row
from rag_blockcache.evaluation.variants import ORDERS, POOL, in_order, joined, vary, with_num_passages
from rag_blockcache.passages import Passage


@pytest.fixture
def examples():
    return [read_row(row, dataset="village") for row in qa_data.rows()]


def test_every_order_keeps_the_passages_and_their_marks(examples):
    for example in examples:
        marked = dict(zip(example.passages, example.is_gold, strict=True))
        for order in ORDERS:
            changed = in_order(example, order)
            assert dict(zip(changed.passages, changed.is_gold, strict=True)) == marked
            assert len(changed.passages) == len(marked) * (2 if order == "twice" else 1)
            assert changed.variant == ("" if order == "given" else order)


def test_gold_passages_are_moved_to_the_ends(examples):
    assert {in_order(example, "gold-first").gold_position for example in examples} == {1}
    assert {in_order(example, "gold-last").gold_position for example in examples} == {3}
    assert in_order(examples[0], "reversed").passages == examples[0].passages[::-1]


def test_fewer_passages_keep_the_gold_one_and_the_order(examples):
    for example in examples:
        for number in (1, 2):
            fewer = with_num_passages(example, number, examples)
            places = [example.passages.index(passage) for passage in fewer.passages]
            assert len(places) == number
            assert places == sorted(places)
            assert fewer.gold_position is not None


def test_without_marks_the_passage_that_holds_the_answer_stays():
    row = qa_data.rows()[2]
    unmarked = {**row, "passages": [{**each, "is_gold": None} for each in row["passages"]]}
    [passage] = with_num_passages(read_row(unmarked, dataset="x"), 1, []).passages
    assert "four tonnes" in passage.text


def test_more_passages_come_from_other_questions_and_hold_no_answer(examples):
    more = with_num_passages(examples[0], 5, examples)
    added = set(more.passages) - set(examples[0].passages)
    assert (len(more.passages), len(added)) == (5, 2)
    assert not any(contains_answer(passage.text, examples[0].answers) for passage in added)
    assert sum(map(bool, more.is_gold)) == 1
    assert more.variant == "5 passages"


def test_a_passage_of_another_question_that_holds_the_answer_is_not_added(examples):
    asked = with_num_passages(examples[1], 1, [])
    asked = dataclasses.replace(asked, answers=("Ruth Hale", "two feet"))
    others = [read_row(row, dataset="village") for row in qa_data.rows(6)]  # some of them hold one of these
    more = with_num_passages(asked, 4, others)
    assert not any(contains_answer(each.text, asked.answers) for each in more.passages)
    with pytest.raises(InvalidInputError, match="have 3 without its answer"):
        with_num_passages(asked, 5, others)


def test_a_letter_as_answer_leaves_passages_to_add(examples):
    asked = dataclasses.replace(examples[0], answers=("S",))  # in each of them, and a word of none
    more = with_num_passages(asked, 5, examples)
    assert len(more.passages) == 5


def test_too_few_passages_to_add_are_an_error_that_counts_them(examples):
    with pytest.raises(InvalidInputError, match="q0 needs 37 more passages"):
        with_num_passages(examples[0], 40, examples)


def test_numbers_and_orders_are_combined_and_each_has_a_key_of_its_own(examples):
    varied = vary(examples, num_passages=[1, 3], orders=["given", "twice"])
    assert len({example.key for example in varied}) == 4 * len(examples)
    assert {example.variant for example in varied} == {
        "1 passage",
        "1 passage, twice",
        "3 passages",
        "3 passages, twice",
    }
    assert varied == vary(examples, num_passages=[1, 3], orders=["given", "twice"])


def test_an_unknown_order_is_an_error(examples):
    with pytest.raises(InvalidInputError, match="gold-first"):
        vary(examples, orders=["given", "sideways"])


def test_neighbours_are_joined_until_they_have_enough_words():
    texts = ["one two three", "four", "five six", "seven"]
    passages = [
        {"title": title, "text": text, "is_gold": gold}
        for title, text, gold in zip("AB D", texts, [False, True, False, False], strict=True)
    ]
    example = read_row({"question": "What?", "passages": passages}, dataset="x")
    long = joined(example, 4)
    assert [(each.title, each.text) for each in long.passages] == [
        ("A", "one two three\n\nB\nfour"),
        (" ", "five six\n\nD\nseven"),
    ]
    assert (long.is_gold, long.gold_position, long.variant) == ((True, False), 1, "joined to 4 words")
    assert joined(example, 0) is example
    assert [each.text for each in joined(example, 1).passages] == texts
    [whole] = joined(example, 10_000).passages
    assert all(text in whole.text for text in texts)


def test_what_is_joined_of_passages_without_marks_has_none(examples):
    unmarked = dataclasses.replace(examples[0], is_gold=(None, None, None))
    assert set(joined(unmarked, 15).is_gold) == {None}


def test_more_passages_are_as_long_as_the_joined_ones_of_the_question(examples):
    varied = vary(examples, join_words=[0, 20], num_passages=[3], orders=["given", "reversed"])
    assert [each.variant for each in varied[:4]] == [
        "3 passages",
        "3 passages, reversed",
        "joined to 20 words, 3 passages",
        "joined to 20 words, 3 passages, reversed",
    ]
    long = varied[2]
    assert set(joined(examples[0], 20).passages) < set(long.passages)
    assert min(len(passage.text.split()) for passage in long.passages[:-1]) >= 9
    assert any(passage in joined(examples[1], 20).passages for passage in long.passages)


def test_more_questions_leave_the_prompts_of_the_others_as_they_are(examples):
    many = [
        dataclasses.replace(
            examples[0],
            example_id=f"q{number}",
            passages=tuple(Passage(f"Passage {number} {index}.") for index in range(3)),
        )
        for number in range(2 * POOL)
    ]
    few = vary(many[:POOL], limit=7, num_passages=[12])
    assert len(few) == 7
    assert vary(many, limit=POOL + 3, num_passages=[12])[:7] == few
    later = vary(many, num_passages=[12])[POOL]
    assert not {passage.text.split()[1] for passage in later.passages} & {str(each) for each in range(POOL)}
