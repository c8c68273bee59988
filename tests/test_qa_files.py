"""Benchmarks are read in every form that they come in, and what cannot be read is named by its record."""

import json
from pathlib import Path

import pytest
import qa_data

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.evaluation.qa_examples import read_row
from rag_blockcache.evaluation.qa_files import read_examples
from rag_blockcache.passages import Passage

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.parametrize("name", ["village.jsonl", "village.jsonl.gz"])
def test_our_schema_is_read_plain_and_compressed(tmp_path, name):
    examples = read_examples(qa_data.write(tmp_path / name, qa_data.rows()))
    assert [example.question for example in examples] == [question for question, *_ in qa_data.ASKED]
    assert examples[1].answers == ("nine",)
    assert examples[1].passages[1] == Passage(
        "The ferry at Coldwater carries nine carts and runs twice a day.", "Ferry"
    )
    assert [example.gold_position for example in examples] == [1, 2, 3, 1, 2]
    assert {example.dataset for example in examples} == {"village"}


def test_a_limit_takes_questions_from_the_start(tmp_path):
    path = qa_data.write(tmp_path / "village.jsonl", qa_data.rows())
    assert [example.example_id for example in read_examples(path, 2)] == ["q0", "q1"]


def test_passages_named_by_pid_come_from_the_table_beside_the_file(tmp_path):
    table = [{"pid": 7, "title": "Mill", "text": "Built in 1787."}, {"pid": 3, "title": "", "text": "Dry."}]
    qa_data.write(tmp_path / "passages.jsonl.gz", table)
    record = {"id": "a", "question": "When?", "answers": ["1787"], "pids": [3, 7], "is_gold": [False, True]}
    [example] = read_examples(qa_data.write(tmp_path / "train.jsonl", [record]))
    assert example.passages == (Passage("Dry."), Passage("Built in 1787.", "Mill"))
    assert example.gold_position == 2


def test_a_pid_that_no_table_has_is_an_error_that_names_it(tmp_path):
    path = qa_data.write(tmp_path / "train.jsonl", [{"question": "When?", "answers": [], "pids": [9]}])
    with pytest.raises(InvalidInputError, match=r"record 1 .*\[9\].*passages\.jsonl"):
        read_examples(path)


def test_files_of_dpr_are_read_as_one_list(tmp_path):
    path = tmp_path / "retrieved.json"
    ctxs = [{"id": "wiki:1", "title": "Mill", "text": "Built in 1787.", "hasanswer": True, "score": "81"}]
    path.write_text(json.dumps([{"question": "When?", "answers": ["1787"], "ctxs": ctxs}]))
    [example] = read_examples(path)
    assert example.passages == (Passage("Built in 1787.", "Mill"),)
    assert example.is_gold == (None,)  # that it holds the answer does not make it the gold passage


CONTEXT = [["Mill", ["Built in 1787.", " By Ruth Hale."]], ["Well", ["It is deep."]], ["Empty", []]]


@pytest.mark.parametrize(
    ("context", "facts"),
    [
        (CONTEXT, [["Well", 0]]),
        (
            {"title": [title for title, _ in CONTEXT], "sentences": [sentences for _, sentences in CONTEXT]},
            {"title": ["Well"], "sent_id": [0]},
        ),
    ],
)
def test_paragraphs_of_sentences_are_read_as_published_and_as_on_the_hub(context, facts):
    row = {
        "_id": "5a",
        "question": "How deep?",
        "answer": "deep",
        "context": context,
        "supporting_facts": facts,
    }
    example = read_row(row, dataset="hotpotqa")
    assert example.passages == (
        Passage("Built in 1787. By Ruth Hale.", "Mill"),
        Passage("It is deep.", "Well"),
    )
    assert example.is_gold == (False, True)
    assert (example.example_id, example.answers) == ("5a", ("deep",))


def test_positives_and_negatives_make_ten_passages_with_one_gold_anywhere():
    places = set()
    for number in range(20):
        row = {
            "query_id": str(number),
            "query": f"Question {number}?",
            "answers": ["x"],
            "positive_passages": [{"docid": "1", "title": "P", "text": "x"}, {"title": "P2", "text": "x"}],
            "negative_passages": [{"title": "N", "text": f"no {each}"} for each in range(30)],
        }
        example = read_row(row, dataset="nq")
        assert (len(example.passages), sum(map(bool, example.is_gold))) == (10, 1)
        assert example == read_row(row, dataset="nq")
        places.add(example.gold_position)
    assert len(places) > 5


def test_an_answer_with_its_other_names_is_read_without_repetitions():
    answer = {"value": "Hale", "aliases": ["Ruth Hale", "Hale"]}
    row = {"question": "Who?", "answer": answer, "passages": [{"text": "By Ruth Hale."}]}
    assert read_row(row, dataset="x").answers == ("Hale", "Ruth Hale")


def test_questions_without_answers_are_read_for_fidelity_alone():
    assert read_row({"question": "Who?", "passages": [{"text": "x"}]}, dataset="x").answers == ()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": ', "record 2 .* is no JSON"),
        ("[1, 2]", "record 2 .* is list"),
        ('{"passages": [{"text": "x"}]}', "record 2 .* no question"),
        ('{"question": "Who?", "documents": []}', "record 2 .* not found among .*documents"),
        ('{"question": "Who?", "passages": []}', "record 2 .* no passages"),
        ('{"question": "Who?", "passages": [{"content": "x"}]}', "record 2 .* no text"),
        ('{"question": "Who?", "answers": [3], "passages": [{"text": "x"}]}', "record 2 .* must be strings"),
    ],
)
def test_what_cannot_be_read_is_named_by_its_record(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(qa_data.rows()[0]) + "\n" + line + "\n")
    with pytest.raises(InvalidInputError, match=message):
        read_examples(path)


def test_an_empty_file_is_an_error(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(InvalidInputError, match="no records"):
        read_examples(tmp_path / "empty.jsonl")


def test_the_key_of_an_example_changes_with_everything_that_an_answer_depends_on():
    row = qa_data.rows()[0]
    key = read_row(row, dataset="x").key
    assert key == read_row(dict(row), dataset="x").key
    reordered = {**row, "passages": row["passages"][::-1]}
    edited = {**row, "passages": [{**each, "text": each["text"] + "!"} for each in row["passages"]]}
    for other in (
        reordered,
        edited,
        {**row, "question": "Why?"},
        {**row, "answers": ["no"]},
        {**row, "dataset": "y"},
    ):
        assert read_row(other, dataset="x").key != key


@pytest.mark.parametrize("name", ["nq", "triviaqa", "hotpotqa", "2wiki"])
def test_the_shared_benchmarks_have_300_questions_with_ten_passages_each(name):
    path = SHARED / "eval" / f"{name}.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"the shared data are not beside this checkout: {path.name}")
    examples = read_examples(path)
    assert len(examples) == 300
    assert {len(example.passages) for example in examples} == {10}
    assert len({example.key for example in examples}) == 300
    assert all(example.answers for example in examples)
    assert all((example.gold_position is None) == (name == "triviaqa") for example in examples)


def test_the_shared_training_files_find_their_passages():
    path = SHARED / "train" / "musique_train.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"the shared data are not beside this checkout: {path.name}")
    examples = read_examples(path, 5)
    assert all(len(example.passages) == 10 and example.gold_position for example in examples)
