"""Differences are claimed where the questions show them, and places of gold are compared alike."""

from __future__ import annotations

import dataclasses

import pytest

from rag_blockcache.evaluation.answer_summary import summarize
from rag_blockcache.evaluation.arms import parse_arms
from rag_blockcache.evaluation.predictions import Prediction, PredictionLog
from rag_blockcache.evaluation.qa_examples import QaExample
from rag_blockcache.evaluation.variants import without_number, without_order
from rag_blockcache.passages import Passage

ARMS = parse_arms("block")
NOTHING = {each.name: None if "None" in str(each.type) else 1 for each in dataclasses.fields(Prediction)}


def example(number, dataset="village", variant=""):
    return QaExample(f"q{number}", "Who?", ("Ada",), (Passage("Ada."),), (True,), dataset, variant)


def summary(examples, **by_arm):
    """Summarise predictions made up from a function of each arm; fields that are left out do not matter."""
    log = PredictionLog(None, {})
    for each in examples:
        own = {"key": each.key, "example_id": each.example_id, "dataset": each.dataset}
        for arm in ARMS:
            made_up = by_arm[arm.name.replace("-", "_")](each)
            log.add([Prediction(**NOTHING | own | {"variant": each.variant, "arm": arm.name} | made_up)])
    return summarize(examples, ARMS, log, environment=None, max_new_tokens=8, passage_format="plain")


def right(is_right):
    return lambda each: {"is_correct": is_right(int(each.example_id[1:])), "divergence": 1.0}


def difference(report, measure="accuracy", dataset="village"):
    [found] = [
        each
        for each in report.comparisons
        if (each["arm"], each["than"], each["measure"], each["dataset"])
        == ("block", "full", measure, dataset)
    ]
    return found


@pytest.mark.parametrize(
    ("num_lost", "is_clear"), [(0, False), (1, False), (5, False), (6, True), (40, True)]
)
def test_answers_lost_on_a_handful_of_questions_are_no_difference(num_lost, is_clear):
    asked = [example(number) for number in range(100)]
    lost = right(lambda number: number >= num_lost)
    found = difference(summary(asked, full=right(lambda _: True), no_passages=lost, block=lost))
    assert (round(found["value"], 9), found["num_differing"]) == (-num_lost / 100, num_lost)
    assert found["is_clear"] is is_clear
    if num_lost == 5:
        assert found["high"] < 0, "the bootstrap alone would have claimed it"


def test_answers_lost_and_won_in_turn_are_no_difference():
    asked = [example(number) for number in range(60)]
    one, other = right(lambda number: number % 2 == 0), right(lambda number: number % 2 == 1)
    found = difference(summary(asked, full=one, no_passages=one, block=other))
    assert (found["value"], found["num_differing"], found["is_clear"]) == (0.0, 60, False)


def test_an_average_counts_benchmarks_alike_and_their_questions_together():
    asked = [example(number) for number in range(30)] + [example(number, "hamlet") for number in range(4)]
    all_right, none_right = right(lambda _: True), right(lambda _: False)

    def block(each):
        return none_right(each) if each.dataset == "hamlet" else all_right(each)

    report = summary(asked, full=all_right, no_passages=none_right, block=block)
    assert difference(report, dataset="average")["value"] == -0.5
    assert difference(report, dataset="average")["num_differing"] == 4
    assert not difference(report, dataset="average")["is_clear"]
    assert difference(report)["value"] == 0.0


def test_places_of_gold_are_compared_among_prompts_of_one_size():
    variants = ["5 passages", "5 passages, reversed", "10 passages", "joined to 9 words, 5 passages"]
    asked = [example(number, variant=variant) for number in range(4) for variant in variants]

    def placed(each):
        number = int(each.variant.split(" passages")[0].split()[-1])
        return {"is_correct": True, "num_passages": number, "gold_position": 1 + int(each.example_id[1]) % 2}

    report = summary(asked, full=placed, no_passages=placed, block=placed)
    counted = {
        (row["variant"], row["gold_position"]): row["num_questions"]
        for row in report.by_gold_position
        if row["arm"] == "full"
    }
    sizes = {"5 passages": 4, "10 passages": 2, "joined to 9 words, 5 passages": 2}
    assert counted == {(name, place): number for name, number in sizes.items() for place in (1, 2)}
    assert {(row["variant"], row["num_passages"]) for row in report.by_num_passages} == {("", 5), ("", 10)}


@pytest.mark.parametrize(
    ("variant", "order", "number"),
    [
        ("", "", ""),
        ("reversed", "", ""),
        ("1 passage, gold-first", "1 passage", ""),
        ("joined to 50 words, 5 passages, shuffled", "joined to 50 words, 5 passages", "joined to 50 words"),
        ("5 passages, twice", "5 passages, twice", "twice"),
    ],
)
def test_variants_are_pooled_by_what_changes_their_prompts(variant, order, number):
    assert (without_order(variant), without_number(variant)) == (order, number)
