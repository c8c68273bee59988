"""Predictions survive whatever ends a run, and are never mixed with those of another."""

import dataclasses
import json

import pytest

from rag_blockcache.errors import InvalidInputError, StoreError
from rag_blockcache.evaluation.predictions import Prediction, PredictionLog

SETTINGS = {"model": "abc", "max_new_tokens": 8}


def prediction(key="k", arm="block", **changes):
    made = Prediction(
        key=key,
        example_id="q0",
        dataset="village",
        variant="",
        arm=arm,
        question="Who?\r\nNow",
        gold=("Hale", "ö"),
        answer="Ruth\n\u2028 Hale",
        token_ids=(3, 4),
        is_correct=True,
        is_exact=False,
        f1=0.5,
        num_passages=3,
        gold_position=None,
        num_prompt_tokens=90,
        num_passage_tokens=60,
        num_recomputed_tokens=0,
        num_answer_tokens=2,
        divergence=0.1 + 0.2,
        num_same_tokens=1,
        answer_log_likelihood=-1.5,
        first_divergence=1e-9,
        first_is_same=True,
        num_gold_tokens=None,
        gold_log_likelihood=None,
        ttft_seconds=0.25,
    )
    return dataclasses.replace(made, **changes)


def test_predictions_come_back_as_they_were(tmp_path):
    log = PredictionLog(tmp_path, SETTINGS)
    log.add([prediction(), prediction(arm="full")])
    log.add([prediction(key="other")])
    reopened = PredictionLog(tmp_path, SETTINGS)
    assert reopened.get("k", "block") == prediction()
    assert reopened.get("k", "full") == prediction(arm="full")
    assert reopened.get("other", "block") == prediction(key="other")
    assert reopened.get("other", "full") is None


def test_each_prediction_is_a_line_that_people_can_read(tmp_path):
    PredictionLog(tmp_path, SETTINGS).add([prediction(), prediction(key="other")])
    lines = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").split("\n")
    assert len(lines) == 3
    assert json.loads(lines[0])["gold"] == ["Hale", "ö"]
    assert "ö" in lines[0]


def test_a_line_cut_off_anywhere_is_dropped_and_the_next_one_starts_on_its_own(tmp_path):
    PredictionLog(tmp_path, SETTINGS).add([prediction(), prediction(key="torn")])
    path = tmp_path / "predictions.jsonl"
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for length in (first, first + 1, len(whole) // 2 + 40, len(whole) - 1):
        path.write_bytes(whole[:length])
        log = PredictionLog(tmp_path, SETTINGS)
        assert log.get("k", "block") == prediction()
        assert log.get("torn", "block") is None
        log.add([prediction(key="torn")])
        assert path.read_bytes() == whole


def test_a_damaged_line_before_the_last_is_an_error_that_names_it(tmp_path):
    PredictionLog(tmp_path, SETTINGS).add([prediction(), prediction(key="other")])
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(b'{"key": 1}\n' + path.read_bytes())
    with pytest.raises(StoreError, match=r"line 1 of .* is no prediction"):
        PredictionLog(tmp_path, SETTINGS)


def test_other_settings_are_an_error_that_names_them(tmp_path):
    PredictionLog(tmp_path, SETTINGS)
    with pytest.raises(InvalidInputError, match=r"max_new_tokens 8 \(now 9\)"):
        PredictionLog(tmp_path, {**SETTINGS, "max_new_tokens": 9})
    with pytest.raises(InvalidInputError, match="another preamble"):
        PredictionLog(tmp_path, {**SETTINGS, "preamble": "x"})
    PredictionLog(tmp_path, SETTINGS)


@pytest.mark.parametrize("content", ["", "{", "[1]", "3"])
def test_damaged_settings_are_an_error_that_names_the_file(content, tmp_path):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(StoreError, match=r"run\.json is damaged"):
        PredictionLog(tmp_path, SETTINGS)


def test_without_a_directory_predictions_are_kept_in_memory():
    log = PredictionLog(None, SETTINGS)
    log.add([prediction()])
    assert log.get("k", "block") == prediction()
