"""Calibration: the cheapest policy within a loss is chosen, kept, and used; questions come from the index."""

from __future__ import annotations

import json
from contextlib import closing
from types import SimpleNamespace

import pytest
import qa_data
import test_cli_commands
from test_cli_commands import error_of, index, run, run_json
from test_policy_record import given_up

from rag_blockcache import BlockCache, Passage
from rag_blockcache.errors import InvalidInputError
from rag_blockcache.evaluation.answer_run import AnswerRun
from rag_blockcache.evaluation.arms import parse_arm
from rag_blockcache.evaluation.bootstrap import FEWEST
from rag_blockcache.evaluation.calibration import MeasuredPolicy, choose_cheapest
from rag_blockcache.evaluation.qa_files import read_examples
from rag_blockcache.evaluation.question_writing import question_in, write_questions
from rag_blockcache.policy_record import FILE_NAME, read_records
from rag_blockcache.retriever import Retriever

corpus, made, models = test_cli_commands.corpus, test_cli_commands.made, test_cli_commands.models
embedder_path = test_cli_commands.embedder_path

# Choosing


def measured(policy, fidelity, low, cost):
    return MeasuredPolicy(policy, fidelity, low, fidelity, recomputed=cost, ttft_seconds=cost)


FULL = measured("full", 1.0, 1.0, 1.0)


def chosen(*policies, max_loss=0.05):
    return choose_cheapest([*policies, FULL], max_loss=max_loss, num_questions=40)


def test_the_cheapest_policy_within_the_loss_is_chosen():
    found = chosen(
        measured("block", 0.80, 0.78, 0.1),
        measured("link-4", 0.97, 0.96, 0.2),
        measured("link-16", 0.99, 0.98, 0.3),
    )
    assert (found.policy, found.dearer, found.fidelity, found.fidelity_low) == (
        "link-4",
        ("link-16", "full"),
        0.97,
        0.96,
    )
    assert (found.num_questions, found.max_loss) == (40, 0.05)


def test_a_policy_whose_interval_reaches_beyond_the_loss_is_not_chosen():
    assert chosen(measured("link-4", 0.99, 0.94, 0.2)).policy == "full"
    assert chosen(measured("link-4", 0.99, 0.94, 0.2), max_loss=0.07).policy == "link-4"


def test_what_costs_more_and_gives_less_is_no_step_up():
    found = chosen(
        measured("block", 0.97, 0.96, 0.1),
        measured("link-4", 0.96, 0.96, 0.2),
        measured("link-16", 0.98, 0.97, 0.3),
    )
    assert (found.policy, found.dearer) == ("block", ("link-16", "full"))


def test_where_nothing_else_is_within_the_loss_full_attention_is_chosen():
    assert (chosen().policy, chosen().dearer) == ("full", ())


def test_full_attention_is_chosen_where_it_is_the_soonest():
    found = choose_cheapest([FULL, measured("block", 1.0, 1.0, 2.0)], max_loss=0.05, num_questions=40)
    assert (found.policy, found.dearer) == ("full", ())


def test_time_comes_before_tokens_and_tokens_decide_where_no_time_was_taken():
    quick = MeasuredPolicy("a", 1, 1, 1, recomputed=0.3, ttft_seconds=0.1)
    frugal = MeasuredPolicy("b", 1, 1, 1, recomputed=0.1, ttft_seconds=0.2)
    assert min([frugal, quick], key=lambda each: each.cost) is quick
    untimed = [MeasuredPolicy(each.policy, 1, 1, 1, each.recomputed, None) for each in (quick, frugal)]
    assert min(untimed, key=lambda each: each.cost).policy == "b"


def test_too_few_questions_choose_nothing_however_alike_they_came_out():
    with pytest.raises(InvalidInputError, match="5 questions cannot show"):
        choose_cheapest([measured("block", 1.0, 1.0, 0.1), FULL], max_loss=0.5, num_questions=FEWEST - 1)


def test_ways_behind_a_policy_add_up():
    arm = parse_arm("link-4/conditioned/int8")
    assert (arm.policy, arm.options) == ("link-4", {"blocks_see": "preamble", "codec": "int8"})
    assert arm.moves_keys
    assert not parse_arm("block/unmoved/int4").moves_keys


# Questions


@pytest.mark.parametrize(
    ("written", "question"),
    [
        ("What is the mill for?", "What is the mill for?"),
        ('Question: "Who built it?" It was Ruth.', "Who built it?"),
        ("Here is a question: Who built it?\nWho burned it down?", "Who built it?"),
        ("Sure!\n\n**Who built the mill?**", "Who built the mill?"),
        ("谁在一七八七年建造了这座磨坊？", "谁在一七八七年建造了这座磨坊？"),  # noqa: RUF001
        ("The text is about a mill.", ""),
        ("Why?", ""),
        ("", ""),
    ],
)
def test_the_first_question_of_what_was_written_is_taken(written, question):
    assert question_in(written) == question


def embed(texts):
    return [[text.count("e"), text.count("l") + 1, len(text)] for text in texts]


@pytest.fixture
def retriever(tmp_path):
    with closing(Retriever(tmp_path / "index", embedder=embed)) as opened:
        opened.add([Passage(text, title=title) for title, text in qa_data.FACTS])
        yield opened


@pytest.fixture
def writer(tiny_cache, monkeypatch):
    """A cache whose model writes a question about the title of each passage, and knows what it was asked."""
    tiny_cache.asked = []

    def answer_batch(requests, *, policy, **options):
        assert policy == "full"
        texts = [request.messages[0]["content"] for request in requests]
        tiny_cache.asked += texts
        titles = [text.splitlines()[0] for text in texts]
        return [
            SimpleNamespace(text="Nothing." if title == "Bell" else f"What of the {title}?")
            for title in titles
        ]

    monkeypatch.setattr(tiny_cache, "answer_batch", answer_batch)
    return tiny_cache


def test_each_question_comes_with_its_passage_among_those_that_are_found_for_it(writer, retriever, tmp_path):
    path = tmp_path / "questions.jsonl"
    assert write_questions(path, writer, retriever, number=4, num_passages=3) == 4
    for example in read_examples(path):
        title = example.question.removeprefix("What of the ").removesuffix("?")
        [own] = [each for each, gold in zip(example.passages, example.is_gold, strict=True) if gold]
        assert own.title == title
        assert len(set(example.passages)) == 3
        found = [result.passage.text for result in retriever.search(example.question, 3)]
        expected = found[::-1] if own.text in found else [own.text, *found[1::-1]]
        assert [passage.text for passage in example.passages] == expected
        assert example.answers == ()


def test_the_same_index_gives_the_same_questions_and_asks_for_none_twice(writer, retriever, tmp_path):
    path = tmp_path / "questions.jsonl"
    write_questions(path, writer, retriever, number=3, num_passages=2)
    before, num_asked = path.read_text(), len(writer.asked)
    write_questions(path, writer, retriever, number=3, num_passages=2)
    assert path.read_text() == before
    asked_before = {text for text in writer.asked[:num_asked] if not text.startswith("Bell")}
    assert asked_before
    assert not asked_before & set(writer.asked[num_asked:]), "only what had no question is asked again"


def test_passages_of_which_nothing_can_be_asked_are_passed_over(writer, retriever, tmp_path):
    retriever.add([Passage("long " * 900, title="Long")])  # does not fit the window
    seen = []
    path = tmp_path / "questions.jsonl"
    number = write_questions(
        path, writer, retriever, number=20, num_passages=2, progress=lambda *counts: seen.append(counts)
    )
    assert number == len(qa_data.FACTS) - 1 == len(path.read_text().splitlines())
    assert seen[-1] == (number, 20)
    assert not any(text.startswith("Long") for text in writer.asked)


def test_an_index_of_which_nothing_can_be_asked_is_an_error(writer, tmp_path):
    with closing(Retriever(tmp_path / "other", embedder=embed)) as retriever:
        retriever.add([Passage("The bell weighs four tonnes.", title="Bell")])
        with pytest.raises(InvalidInputError, match="--data"):
            write_questions(tmp_path / "q.jsonl", writer, retriever, number=2, num_passages=1)
    assert not (tmp_path / "q.jsonl").exists()


# The command


@pytest.fixture
def data(tmp_path):
    rows = qa_data.rows()
    return qa_data.write(
        tmp_path / "village.jsonl", [*rows, {**rows[0], "id": "q5", "question": "Who was Ruth Hale?"}]
    )


@pytest.fixture
def untimed(monkeypatch):
    """Lets the share of tokens computed again decide, so that choices do not depend on this machine."""
    monkeypatch.setattr(AnswerRun, "_time", lambda *_: {})


SHORT = ("--max-new-tokens", 6, "--policies", "block,link-4,link-16")


def test_what_is_chosen_is_recorded_shown_and_used(made, data, untimed, monkeypatch):
    from rag_blockcache.break_even import BreakEven

    monkeypatch.setattr(BreakEven, "pays", lambda *numbers: True)
    before = run_json("ask", made, "Who?", "--max-new-tokens", 2)
    everything = run_json("calibrate", made, "--data", data, *SHORT, "--max-loss", 0)
    assert everything["policy"] == "full"
    assert [each["policy"] for each in everything["measured"]] == ["block", "link-4", "link-16", "full"]
    link = everything["measured"][2]
    found = run_json(
        "calibrate", made, "--data", data, *SHORT, "--max-loss", min(1.0, link["loss_at_most"] + 0.01)
    )
    within = [each["policy"] for each in found["measured"] if each["loss_at_most"] <= found["max_loss"]]
    assert found["policy"] == within[0] != "full"
    assert (found["num_questions"], found["fidelity"]) == (
        6,
        found["measured"][-1 - len(within[1:])]["fidelity"],
    )
    after = run_json("ask", made, "Who?", "--max-new-tokens", 2)
    assert (after["policy"], after["policy_reason"]) == (found["policy"], found["reason"])
    assert before["policy_reason"] != after["policy_reason"]
    assert after["policy_reason"].startswith("calibrated on 6 questions: fidelity ")
    [shown] = run_json("status", made)["policies"]
    assert (shown["policy"], shown["reason"]) == (found["policy"], found["reason"])
    assert found["reason"] in run("status", made).stdout
    assert found["reason"] in run("guard", made).stdout


def test_a_run_that_was_stopped_goes_on_and_one_that_is_done_measures_nothing(
    made,
    data,
    untimed,
    monkeypatch,
):
    inner, batches = AnswerRun.measure, []

    def measure(self, examples):
        if len(batches) == 1:
            raise KeyboardInterrupt
        inner(self, examples[:2])  # as if no more had been done when it was killed
        batches.append(len(examples))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AnswerRun, "measure", measure)
        stopped = run("calibrate", made, "--data", data, *SHORT, exit_code=130)
        assert "the same command goes on" in stopped.stderr
    assert not (made / FILE_NAME).exists()
    asked = []

    def counted(self, examples):
        asked.extend(examples)
        return inner(self, examples)

    monkeypatch.setattr(AnswerRun, "measure", counted)
    first = run_json("calibrate", made, "--data", data, *SHORT)
    assert len(asked) == 4, "two of the six were there"
    again = run_json("calibrate", made, "--data", data, *SHORT, "--max-loss", 0.9)
    assert len(asked) == 4
    assert again["measured"] == first["measured"]


def test_without_data_the_model_asks_about_the_index(made, corpus, untimed, monkeypatch):
    inner = BlockCache.answer_batch

    def questions(self, requests, **options):  # a random model writes none
        found = inner(self, requests, **options)
        if options.get("policy") == "full" and "logits_processor" not in options:
            return [SimpleNamespace(text="What was the engine for?") for _ in found]
        return found

    monkeypatch.setattr(BlockCache, "answer_batch", questions)
    error = error_of("calibrate", made, *SHORT, "--limit", 6)
    assert "3 questions cannot show what a policy loses; give 6 at least" in error
    (corpus / "facts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for _, text in qa_data.FACTS)
    )
    index(corpus, made)
    result = run("calibrate", made, *SHORT, "--limit", 6, "-k", 3)
    assert "ask: 6/6 questions" in result.stderr
    assert "evaluate: 6/6 questions" in result.stderr
    [path] = made.glob("calibration/*/questions.jsonl")
    assert [len(example.passages) for example in read_examples(path)] == [3] * 6
    assert (made / "calibration").stat().st_mode & 0o777 == 0o700
    [record] = read_records(made)
    assert record.calibration.num_questions == 6
    assert f"auto in {made}: {record.calibration.policy} (" in result.stdout


def test_calibrating_anew_begins_anew_with_the_guard(made, data, untimed, tiny_model_path):
    with BlockCache(tiny_model_path, made, guard_rate=1.0, guard_threshold=1e-6) as cache:
        auto = cache.auto_policy
    auto.update(given_up("block"))
    assert run_json("guard", made)["policies"][0]["watched"][0]["is_given_up"]
    run("calibrate", made, "--data", data, *SHORT)
    [record] = read_records(made)
    assert record.watched == ()


def test_the_guard_of_a_directory_is_shown_and_reset(made, data, untimed, tiny_model_path):
    assert "stands for the default" in run("guard", made).stdout
    with BlockCache(tiny_model_path, made) as cache:
        cache.auto_policy.update(given_up(cache.auto_policy.current[0].name))
        [seen] = cache.auto_policy.record.watched
    assert f"the guard gave up {seen.name}: 0.200 nats" in run("status", made).stdout
    [shown] = run_json("guard", made)["policies"]
    assert shown["watched"][0]["divergence"] == pytest.approx(0.2)
    assert run_json("guard", made, "--reset")["reset"] == [seen.name]
    assert run_json("guard", made)["policies"][0]["watched"] == []
    assert "no policy had been given up" in run("guard", made, "--reset").stderr


@pytest.mark.parametrize("options", [{}, {"codec": "int8", "blocks_see": "preamble"}])
def test_a_cache_without_an_index_is_calibrated_on_given_questions(
    options, tiny_model_path, data, untimed, tmp_path
):
    directory = tmp_path / "cache"
    with BlockCache(tiny_model_path, directory, passage_format="plain", **options) as cache:
        fingerprint, default = cache.model.fingerprint, cache.guard.policy
    flags = ("--codec", "int8", "--blocks-see", "preamble") if options else ()
    given = ("--model", tiny_model_path, "--data", data, "--passage-format", "plain", *flags)
    found = run_json("calibrate", directory, *given, *SHORT, "--max-loss", 0)
    assert [each["policy"] for each in found["measured"]][-1] == "full"
    assert read_records(directory)[0].fingerprint == fingerprint
    with BlockCache(tiny_model_path, directory, passage_format="plain", **options) as cache:
        assert cache.guard.policy == "full"
    for other in ({"passage_format": "paper"}, {"preamble": "Read."}, {"codec": "int4"}):
        with BlockCache(
            tiny_model_path, directory, **{"passage_format": "plain", **options, **other}
        ) as cache:
            assert cache.guard.policy == default, "it was calibrated for another prompt, or other blocks"


def test_blocks_are_measured_as_the_index_keeps_them(corpus, models, data, untimed, tmp_path, monkeypatch):
    index(corpus, tmp_path / "packed", *models, "--codec", "int4")
    arms = []
    inner = AnswerRun.__init__

    def observed(self, engines, given, *arguments, **options):
        arms.extend(arm.name for arm in given)
        inner(self, engines, given, *arguments, **options)

    monkeypatch.setattr(AnswerRun, "__init__", observed)
    found = run_json("calibrate", tmp_path / "packed", "--data", data, *SHORT)
    assert arms == [
        "full",
        "no-passages",
        *(f"{name}/stand-ins/int4" for name in ("block", "link-4", "link-16")),
    ]
    assert {each["policy"] for each in found["measured"]} == {"full", "block", "link-4", "link-16"}


def test_mistakes_are_told_before_any_work(made, data, tmp_path, monkeypatch):
    monkeypatch.setattr(BlockCache, "__init__", None)
    assert "give questions with --data" in error_of("calibrate", tmp_path)
    assert "--model" in error_of("calibrate", tmp_path, "--data", data)
    assert "leave out --preamble and --dtype" in error_of(
        "calibrate", made, "--data", data, "--dtype", "float32", "--preamble", "Read."
    )
    assert "'linked-4' is unknown" in error_of("calibrate", made, "--policies", "linked-4")
    assert "chooses what 'auto' stands for" in error_of("calibrate", made, "--policies", "block,auto")
    assert "no such file" in error_of("calibrate", made, "--data", tmp_path / "gone.jsonl")
    few = qa_data.write(tmp_path / "few.jsonl", qa_data.rows())
    assert "5 questions cannot show" in error_of("calibrate", made, "--data", few)
    for wrong in (("--max-loss", 2), ("--max-loss", "nan"), ("--limit", FEWEST - 1)):
        run("calibrate", made, "--data", data, *wrong, exit_code=2)
    assert "no directory" in error_of("guard", tmp_path / "gone")
    assert not (made / "calibration").exists()
    assert not (made / FILE_NAME).exists()


@pytest.mark.real_weights
def test_a_real_model_asks_about_its_passages(smollm2_path, tmp_path):
    with (
        BlockCache(smollm2_path, None) as cache,
        closing(Retriever(tmp_path / "index", embedder=embed)) as retriever,
    ):
        retriever.add([Passage(text, title=title) for title, text in qa_data.FACTS])
        assert write_questions(tmp_path / "q.jsonl", cache, retriever, number=4, num_passages=3) == 4
    examples = read_examples(tmp_path / "q.jsonl")
    about = [
        any(
            gold and passage.title.lower() in each.question.lower()
            for passage, gold in zip(each.passages, each.is_gold, strict=True)
        )
        for each in examples
    ]
    assert sum(about) >= 2, [each.question for each in examples]
