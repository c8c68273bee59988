"""From files to rows: what is read, what is drawn, how samples look, how they are packed."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import itertools
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import CHAT_TEMPLATE, byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.finetuning.companions import Companions, SharedPassages
from rag_blockcache.finetuning.examples import ChatExample, QuestionExample, TextExample, read_data
from rag_blockcache.finetuning.order import draws
from rag_blockcache.finetuning.packing import IGNORED, Row, collate, pack
from rag_blockcache.finetuning.recipe import Recipe
from rag_blockcache.finetuning.rows import held_out_rows, training_rows
from rag_blockcache.finetuning.samples import Sample, SampleMaker, choose_passages, closing_tokens
from rag_blockcache.passages import Passage
from rag_blockcache.prompt import Prompt

CLOSING = (4,)  # <|im_end|>
QUESTION = {"question": "Who?", "answers": ["Ada", "A. L."], "passages": ["Ada wrote it."]}


def write(path, *rows):
    lines = [(row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows]
    content = "".join(lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


# Files


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_questions_are_read_with_their_passages(name, tmp_path):
    passages = [
        "Ada wrote it.",
        {"title": "A mill", "text": "It turns.", "is_gold": True},
        {"title": "Nothing", "text": " \n"},
    ]
    path = write(tmp_path / name, {**QUESTION, "passages": passages, "dataset": "own"}, "", QUESTION)
    data = read_data(path)
    first, second = data.examples
    assert first == QuestionExample(
        "Who?", (Passage("Ada wrote it."), Passage("It turns.", title="A mill")), (False, True), "Ada"
    )
    assert second.is_needed == (True,)  # nothing says which passage the answer rests on
    assert (data.name, data.sha256) == (name, hashlib.sha256(path.read_bytes()).hexdigest())
    assert data.passages_sha256 is None


def test_passages_are_looked_up_by_pid_beside_the_file_or_where_it_is_said(tmp_path):
    table = [{"pid": 3, "title": "A mill", "text": "It turns."}, {"pid": 9, "text": "Ada wrote it."}]
    empty = {"pid": 4, "title": "Nothing", "text": ""}
    row = {"question": "Who?", "answers": ["Ada"], "pids": [9, 4, 3], "has_answer": [True, None, False]}
    expected = QuestionExample(
        "Who?", (Passage("Ada wrote it."), Passage("It turns.", title="A mill")), (True, False), "Ada"
    )
    (tmp_path / "beside").mkdir()
    write(tmp_path / "beside" / "passages.jsonl.gz", *table, empty)
    path = write(tmp_path / "beside" / "train.jsonl", row)
    data = read_data(path)
    assert data.examples == [expected]
    table_bytes = (tmp_path / "beside" / "passages.jsonl.gz").read_bytes()
    assert data.passages_sha256 == hashlib.sha256(table_bytes).hexdigest()
    (tmp_path / "apart").mkdir()
    alone = write(tmp_path / "apart" / "train.jsonl", row)
    assert read_data(alone, tmp_path / "beside" / "passages.jsonl.gz").examples == [expected]
    with pytest.raises(InvalidInputError, match="--passages"):
        read_data(alone)


def test_gold_passages_count_more_than_those_that_hold_the_answer(tmp_path):
    flags = [{"is_gold": False, "has_answer": True}, {"is_gold": True, "has_answer": True}]
    passages = [{"text": f"Ada {index}", **each} for index, each in enumerate(flags)]
    [example] = read_data(write(tmp_path / "a.jsonl", {**QUESTION, "passages": passages})).examples
    assert example.is_needed == (False, True)


def test_chats_are_read(tmp_path):
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
    [example] = read_data(write(tmp_path / "a.jsonl", {"messages": messages})).examples
    assert example == ChatExample(({"role": "user", "content": "Hello"},), "Good day")


def test_general_text_is_read_beside_questions(tmp_path):
    rows = [{"text": "The mill is old.", "title": "A mill"}, {**QUESTION, "text": "is passed over"}]
    text, question = read_data(write(tmp_path / "a.jsonl", *rows)).examples
    assert text == TextExample("The mill is old.")
    assert isinstance(question, QuestionExample)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": " "}, "line 2 of a.jsonl cannot be trained on: its text is empty"),
        (
            {**QUESTION, "answers": []},
            "line 2 of a.jsonl cannot be trained on: it has no answer.*--own-answers",
        ),
        ({**QUESTION, "answers": [" "]}, "it has no answer"),
        ({**QUESTION, "question": ""}, "its question is empty"),
        ({"answers": ["Ada"], "passages": []}, "it has no 'question'"),
        ({"question": "Who?", "answers": ["Ada"]}, "it has no 'passages'"),
        ({"messages": [{"role": "user", "content": "Hello"}]}, "must end with the assistant's"),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]}, "it has no 'content'"),
        ("{", "a.jsonl cannot be read at line 2"),
        ("3", "an object is needed, got int"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(row, message, tmp_path):
    with pytest.raises(InvalidInputError, match=message):
        read_data(write(tmp_path / "a.jsonl", QUESTION, row))


def test_a_missing_an_empty_and_a_damaged_file_are_named(tmp_path):
    with pytest.raises(InvalidInputError, match="there is no file"):
        read_data(tmp_path / "none.jsonl")
    with pytest.raises(InvalidInputError, match="holds no examples"):
        read_data(write(tmp_path / "a.jsonl", ""))
    cut = write(tmp_path / "a.jsonl.gz", QUESTION).read_bytes()[:-12]
    (tmp_path / "cut.jsonl.gz").write_bytes(cut)
    with pytest.raises(InvalidInputError, match=r"cut\.jsonl\.gz cannot be read"):
        read_data(tmp_path / "cut.jsonl.gz")


# Order


def take(num, sizes, **options):
    return list(itertools.islice(draws(sizes, **{"balance": 1.0, "seed": 0, **options}), num))


def test_each_example_comes_once_before_any_comes_again():
    seen = [draw.example for draw in take(30, [10])]
    assert [sorted(seen[start : start + 10]) for start in (0, 10, 20)] == [list(range(10))] * 3
    assert seen[:10] != seen[10:20]


def test_equal_seeds_give_equal_orders_and_others_do_not():
    assert take(50, [10, 20], seed=1) == take(50, [10, 20], seed=1)
    assert take(50, [10, 20], seed=1) != take(50, [10, 20], seed=2)


@pytest.mark.parametrize(("balance", "share"), [(1.0, 0.9), (0.5, 0.75), (0.0, 0.5)])
def test_balance_says_how_much_large_files_outweigh_small_ones(balance, share):
    drawn = Counter(draw.file for draw in take(4000, [900, 100], balance=balance))
    assert drawn[0] / 4000 == pytest.approx(share, abs=0.03)


# Samples


def maker_for(tokenizer, **options):
    usual = {"passage_format": "plain", "preamble": None, "min_passages": 1, "max_tokens": 2000}
    return SampleMaker(tokenizer, CLOSING, **{**usual, **options})


def test_a_sample_is_what_serving_would_compute_and_the_answer(tiny_tokenizer):
    example = QuestionExample("Who?", (Passage("Ada."), Passage("It.", title="A")), (True, False), "Ada")
    sample = maker_for(tiny_tokenizer).make(example, "block", None)
    prompt = Prompt(tiny_tokenizer, "plain")
    segments = prompt.segments("Who?", example.passages)
    served = [token for segment in segments for token in segment.token_ids]
    assert sample.token_ids.tolist() == [*served, *prompt.text_tokens("Ada"), *CLOSING]
    assert sample.is_learned.tolist() == [False] * len(served) + [True] * 4
    assert sample.positions.tolist() == list(range(len(sample.token_ids)))
    blocks = [len(list(group)) for number, group in itertools.groupby(sample.block_ids) if number]
    assert blocks == [len(segment.token_ids) for segment in segments if segment.kind == "passage"]
    assert not sample.block_ids[sample.is_learned].any()
    full = maker_for(tiny_tokenizer).make(example, "full", None)
    assert not full.block_ids.any()
    assert np.array_equal(full.token_ids, sample.token_ids)


def test_passages_that_touch_are_blocks_of_their_own(tiny_tokenizer):
    example = QuestionExample("Who?", (Passage("Ada."), Passage("Ada."), Passage("It.")), (True,) * 3, "Ada")
    sample = maker_for(tiny_tokenizer).make(example, "block", None)
    assert len(set(sample.block_ids.tolist()) - {0}) == 3


def test_text_between_passages_is_no_block(tiny_tokenizer):
    example = QuestionExample("Who?", (Passage("Ada."), Passage("It.")), (True,) * 2, "Ada")
    sample = maker_for(tiny_tokenizer, passage_format="verbatim").make(example, "block", None)
    runs = [
        tiny_tokenizer.decode(sample.token_ids[sample.block_ids == number])
        for number in set(sample.block_ids)
    ]
    assert {"Ada.", "It."} < set(runs)


@given(
    needed=st.lists(st.booleans(), min_size=1, max_size=12), fewest=st.integers(1, 12), seed=st.integers(0, 9)
)
def test_what_the_answer_rests_on_is_always_there(needed, fewest, seed):
    chosen = choose_passages(needed, fewest, random.Random(seed))
    assert len(set(chosen)) == len(chosen)
    assert {index for index, each in enumerate(needed) if each} <= set(chosen) <= set(range(len(needed)))
    assert len(chosen) >= min(fewest, len(needed))


def test_number_and_order_of_passages_vary():
    source = random.Random(0)
    seen = [tuple(choose_passages([True, *[False] * 5], 2, source)) for _ in range(200)]
    assert {len(chosen) for chosen in seen} == {2, 3, 4, 5, 6}
    assert {chosen.index(0) for chosen in seen} == set(range(6))


def test_passages_that_nothing_rests_on_go_until_a_sample_fits(tiny_tokenizer):
    passages = tuple(Passage(letter * 100) for letter in "abcd")
    example = QuestionExample("Who?", passages, (False, False, True, False), "c")
    whole = maker_for(tiny_tokenizer).make(example, "block", None)
    shorter = maker_for(tiny_tokenizer, max_tokens=len(whole.token_ids) - 150).make(example, "block", None)
    text = tiny_tokenizer.decode(shorter.token_ids)
    assert ["aaa" in text, "bbb" in text, "ccc" in text, "ddd" in text] == [True, False, True, False]
    assert maker_for(tiny_tokenizer, max_tokens=100).make(example, "block", None) is None


def test_all_of_a_text_but_its_first_token_is_learned_and_a_long_one_is_cut(tiny_tokenizer):
    sample = maker_for(tiny_tokenizer, max_tokens=8).make(TextExample("The mill is old."), "block", None)
    assert tiny_tokenizer.decode(sample.token_ids) == "The mill"
    assert sample.positions.tolist() == list(range(8))
    assert sample.is_learned.tolist() == [False] + [True] * 7
    assert sample.mode == "full"
    assert sample.is_text
    assert not sample.block_ids.any()
    assert maker_for(tiny_tokenizer).make(TextExample("T"), "full", None) is None


def test_text_is_drawn_once_and_measured_once(tmp_path):
    path = write(tmp_path / "text.jsonl", *({"text": f"This is text {number}."} for number in range(8)))
    files = [read_data(examples_file(tmp_path)), read_data(path)]
    recipe = recipe_for(path, steps=3, eval_samples=8)
    rows = training_rows(recipe, files, byte_tokenizer(), CLOSING, 512)
    texts = Counter()
    for row in rows.rows:
        for index in range(row.num_samples):
            chosen = row.sample_ids == index
            if row.is_text[chosen].all():
                texts[byte_tokenizer().decode(row.token_ids[chosen])] += 1
            else:
                assert not row.is_text[chosen].any()
    assert max(texts.values()) - min(texts.values()) <= 2  # each comes once before any comes again
    held_out = held_out_rows(recipe, files[1:], maker_for(byte_tokenizer()))
    assert sum(row.num_samples for row in held_out) == 8


def test_paragraphs_of_a_chat_are_blocks_and_its_last_one_is_the_question(tiny_tokenizer):
    paragraphs = [
        "A first paragraph, as long as a passage in an index would be.",
        "Short.",
        "b" * 60,
        "c" * 70,
    ]
    earlier = [{"role": "user", "content": "d" * 55}, {"role": "assistant", "content": "Yes."}]
    example = ChatExample((*earlier, {"role": "user", "content": "\n\n".join(paragraphs)}), "Done")
    sample = maker_for(tiny_tokenizer).make(example, "block", None)
    blocks = [
        tiny_tokenizer.decode([token for token, _ in group])
        for number, group in itertools.groupby(
            zip(sample.token_ids, sample.block_ids, strict=True), key=lambda pair: pair[1]
        )
        if number
    ]
    assert blocks == ["d" * 55, paragraphs[0], "b" * 60]
    text = tiny_tokenizer.apply_chat_template(
        list(example.messages), tokenize=False, add_generation_prompt=True
    )
    assert tiny_tokenizer.decode(sample.token_ids) == text + "Done<|im_end|>"


def test_an_answer_ends_as_the_template_ends_it_or_as_the_model_stops():
    tokenizer = byte_tokenizer()
    assert closing_tokens(tokenizer, [4]) == (4,)  # <|im_end|>, as the template writes it
    assert closing_tokens(tokenizer, [2]) == (2,)  # </s>, which the template never writes
    assert closing_tokens(byte_tokenizer(None), [2, 4]) == (2,)
    spaced = byte_tokenizer(CHAT_TEMPLATE.replace("<|im_end|>", " <|im_end|>"))
    assert [spaced.decode(token) for token in closing_tokens(spaced, [4])] == [" ", "<|im_end|>"]


# Several questions behind the same passages

SHOWN = (Passage("Ada."), Passage("It.", title="A"), Passage("In May."))
ASKED = [
    QuestionExample("Who?", SHOWN, (True, False, False), "Ada"),
    QuestionExample("What?", (SHOWN[1], Passage("Else.")), (True, False), "It"),
    QuestionExample("When?", SHOWN, (True, False, True), "In May"),  # rests on two
    QuestionExample("Where?", (SHOWN[0], Passage("Paris.")), (False, True), "Paris"),
]


def questions_of(sample, tokenizer):
    """Return what each branch of a sample says, from the question on."""
    branches = range(1, sample.num_questions + 1)
    return [tokenizer.decode(sample.token_ids[sample.branch_ids == branch]) for branch in branches]


def test_questions_are_found_by_the_passages_that_their_answers_rest_on():
    shared = SharedPassages([*ASKED, ChatExample(({"role": "user", "content": "Hello"},), "Good day")])
    assert {each.question for each in shared.answered_by(SHOWN)} == {"Who?", "What?", "When?"}
    assert [each.question for each in shared.answered_by(SHOWN[:2])] == ["Who?", "What?"]
    assert shared.answered_by([Passage("It.")]) == []  # another title is another passage


@pytest.mark.parametrize("mode", ["block", "full"])
def test_each_branch_is_the_prompt_of_its_question_and_its_answer(mode, tiny_tokenizer):
    companions = Companions(SharedPassages(ASKED), 9, random.Random(0))
    maker = maker_for(tiny_tokenizer)
    sample = maker.make(ASKED[0], mode, None, companions)
    assert sample.num_questions == 3
    common, own = (sample.branch_ids == branch for branch in (0, 1))
    assert set(sample.block_ids[common].tolist()) - {0} == ({2, 3, 4} if mode == "block" else set())
    assert not sample.block_ids[~common].any()
    for branch, example in enumerate([ASKED[0], *sorted_as_asked(sample, tiny_tokenizer)], 1):
        own = common | (sample.branch_ids == branch)
        alone = maker.make(dataclasses.replace(example, passages=SHOWN, is_needed=(True,) * 3), mode, None)
        for name in ("token_ids", "positions", "block_ids", "is_learned"):
            assert np.array_equal(getattr(sample, name)[own], getattr(alone, name)), name
        assert alone.positions.tolist() == list(range(own.sum()))


def sorted_as_asked(sample, tokenizer):
    said = questions_of(sample, tokenizer)[1:]
    return [next(each for each in ASKED if each.question in text) for text in said]


def test_questions_that_do_not_fit_are_left_out_before_passages_are(tiny_tokenizer):
    alone = maker_for(tiny_tokenizer).make(ASKED[0], "block", None)
    companions = Companions(SharedPassages(ASKED), 9, random.Random(0))
    maker = maker_for(tiny_tokenizer, max_tokens=len(alone.token_ids) + 5)
    sample = maker.make(ASKED[0], "block", None, companions)
    assert np.array_equal(sample.token_ids, alone.token_ids)


def test_companions_are_others_each_once_and_no_more_than_asked_for():
    shared = SharedPassages([*ASKED, *ASKED])
    many = Companions(shared, 9, random.Random(0)).behind(ASKED[0], SHOWN)
    assert sorted(each.question for each in many) == ["What?", "When?"]
    assert len(Companions(shared, 1, random.Random(0)).behind(ASKED[0], SHOWN)) == 1


def test_rows_ask_several_questions_where_passages_are_shared(tmp_path):
    passages = [{"text": f"Fact {n} is {n * n}.", "is_gold": False} for n in range(4)]
    rows = [
        {
            "question": f"What is fact {n % 4}, {n}?",
            "answer": f"{n % 4} squared, {n}",
            "passages": [{**each, "is_gold": index == n % 4} for index, each in enumerate(passages)],
        }
        for n in range(16)
    ]
    path = write(tmp_path / "train.jsonl", *rows)
    files, tokenizer = [read_data(path)], byte_tokenizer()
    for most, expected in ((1, {1}), (3, {3})):
        recipe = recipe_for(path, max_questions=most, row_tokens=1024, min_passages=4)
        made = training_rows(recipe, files, tokenizer, CLOSING, 1024).rows
        assert {row.num_questions / row.num_samples for row in made} == expected
        for row in made[:3]:
            for sample, branch in {*zip(row.sample_ids.tolist(), row.branch_ids.tolist(), strict=True)}:
                own = (row.sample_ids == sample) & (row.branch_ids == branch)
                answer = tokenizer.decode(row.labels[own & (row.labels != IGNORED)])
                asked = tokenizer.decode(row.token_ids[own])
                assert answer == "" if branch == 0 else answer.split(", ")[1].split("<")[0] + "?" in asked


# Packing


def sample_of(length, mode="full", file=0):
    places, zeros = np.arange(length, dtype=np.int32), np.zeros(length, dtype=np.int32)
    is_answer = places >= length - 2
    return Sample(places + 100, places, zeros, is_answer.astype(np.int32), is_answer, mode, file)


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(3, 40), min_size=1, max_size=60))
def test_packing_loses_nothing_and_fits(lengths):
    rows = list(pack([sample_of(length, file=length) for length in lengths], 40))
    assert sorted(int(file) for row in rows for file in row.files) == sorted(lengths)
    for row in rows:
        assert len(row.token_ids) <= 40
        for index, length in enumerate(row.files):
            assert (row.sample_ids == index).sum() == length


def test_rows_of_mixed_samples_are_nearly_full():
    source = random.Random(0)
    rows = list(pack([sample_of(source.randint(300, 1900)) for _ in range(2000)], 8192))
    assert sum(len(row.token_ids) for row in rows) / (8192 * len(rows)) > 0.95


def test_padding_is_neither_learned_nor_part_of_a_sample():
    batch = collate([Row.of([sample_of(5, "block"), sample_of(4)])], padded_to=12)
    assert {values.shape for values in batch.values()} == {(1, 12)}
    assert batch["sample_ids"][0].tolist() == [0] * 5 + [1] * 4 + [-1] * 3
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]
    assert (
        batch["labels"][0].tolist() == [IGNORED] * 3 + [103, 104] + [IGNORED] * 2 + [102, 103] + [IGNORED] * 3
    )
    assert batch["is_block_mode"][0].tolist() == [1] * 5 + [0] * 7


# Rows


def recipe_for(path, **options):
    usual = {"passage_format": "plain", "steps": 10, "rows_per_step": 2, "row_tokens": 512, "min_passages": 1}
    return Recipe(model="m", out="o", data=[str(path)], **{**usual, **options})


def examples_file(tmp_path, num=30, length=20):
    rows = [
        {"question": f"Which {n}?", "answer": f"n{n}", "passages": [f"{word * length} {n}" for word in "abc"]}
        for n in range(num)
    ]
    return write(tmp_path / "train.jsonl", *rows)


def test_every_example_is_drawn_in_both_modes_with_passages_shuffled_apart(tmp_path):
    path = examples_file(tmp_path)
    rows = training_rows(recipe_for(path), [read_data(path)], byte_tokenizer(), CLOSING, 512)
    assert len(rows.rows) == 20
    assert rows.num_samples == [sum(row.num_samples for row in rows.rows)]
    seen = Counter()
    for row in rows.rows:
        for index in range(row.num_samples):
            chosen = row.sample_ids == index
            answer = byte_tokenizer().decode(row.labels[chosen & (row.labels != IGNORED)])
            seen[answer, int(row.is_block_mode[chosen][0])] += 1
    assert {mode for _, mode in seen} == {0, 1}
    assert abs(sum(n * (1 if mode else -1) for (_, mode), n in seen.items())) <= 3  # but for the last row


def test_examples_that_fit_no_row_are_counted_and_nothing_but_such_is_an_error(tmp_path):
    long = {"question": "Which?", "answer": "x", "passages": ["y" * 600]}
    fitting = [{**long, "passages": ["y"]}] * 3
    path = write(tmp_path / "train.jsonl", long, *fitting)
    rows = training_rows(recipe_for(path), [read_data(path)], byte_tokenizer(), CLOSING, 512)
    assert rows.num_too_long > 0
    path = write(tmp_path / "train.jsonl", long)
    with pytest.raises(InvalidInputError, match="fits 512 tokens; raise row_tokens"):
        training_rows(recipe_for(path), [read_data(path)], byte_tokenizer(), CLOSING, 512)


def test_what_is_held_out_is_measured_as_it_stands_in_both_modes(tmp_path):
    path = examples_file(tmp_path)
    recipe = recipe_for(path, eval_samples=4)
    rows = held_out_rows(recipe, [read_data(path)], maker_for(byte_tokenizer()))
    modes = Counter(
        int(row.is_block_mode[row.sample_ids == index][0]) for row in rows for index in range(row.num_samples)
    )
    assert modes == {0: 4, 1: 4}
    for row in rows:
        assert byte_tokenizer().decode(row.token_ids).count("c" * 20) == row.num_samples


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": ""}, "--model is missing"),
        ({"data": []}, "--data is missing"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"distill": 1.5}, "distill is 1.5; it lies between 0 and 1"),
        ({"match_states": -1.0}, "match_states is -1.0; give 0, or a weight above it"),
        ({"match_states": float("nan")}, "match_states is nan"),
        ({"modes": "both"}, "modes is 'both'; choose one of block\\+full, full, block"),
        ({"lora_rank": -1}, "lora_rank is -1"),
        ({"lora_rank": 0, "distill": 0.5}, "cannot teach"),
        ({"lora_rank": 0, "match_states": 1.0}, "cannot teach"),
        ({"lora_rank": 0, "merge": True}, "no adapter to merge"),
    ],
)
def test_a_recipe_that_cannot_be_cooked_says_why(options, message):
    with pytest.raises(InvalidInputError, match=message):
        Recipe(**{"model": "m", "out": "o", "data": ["d"], **options})


def test_the_shared_data_can_be_read():
    folder = Path(__file__).parents[1] / ".." / "shared" / "data" / "train"
    if not folder.is_dir():
        pytest.skip("the shared training data is not on this machine")
    data = read_data(folder / "musique_train.jsonl.gz")
    assert len(data.examples) == 99
    assert all(1 <= sum(each.is_needed) < len(each.passages) for each in data.examples)
