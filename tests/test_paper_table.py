"""The table of the paper is made of answers to the same questions."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import paper_table

ARMS = {run: [arm for each, arm, _ in paper_table.ROWS if each == run] for run, _, _ in paper_table.ROWS}


def runs(is_right):
    """Return 40 answers of each arm to each of two benchmarks."""
    return {
        run: {
            arm: {
                (data, f"{data} {i}"): is_right(run, arm, data, i)
                for data in ("nq", "2wiki")
                for i in range(40)
            }
            for arm in arms
        }
        for run, arms in ARMS.items()
    }


def test_rows_are_averages_over_benchmarks_compared_with_the_control():
    def is_right(run, arm, data, i):
        return i % 4 == 0 if (run, arm) == ("stock", "block") else i % 2 == 0 or data == "nq"

    rows, datasets = paper_table.table(runs(is_right))
    assert datasets == ["2wiki", "nq"]
    by_label = {row["row"]: row for row in rows}
    control = by_label["fine-tuned under full attention, full attention"]
    assert (control["2wiki"], control["nq"], control["average"], control["gain"]) == (
        "50.0",
        "100.0",
        "75.0",
        "",
    )
    blocks = by_label["published model, blocks"]
    assert (blocks["2wiki"], blocks["nq"], blocks["average"], blocks["gain"]) == (
        "25.0",
        "25.0",
        "25.0",
        "-50.0",
    )
    low, high = map(float, blocks["gain_interval"].split(" to "))
    assert -62 < low < -50 < high < -38
    assert by_label["block-fine-tuned, blocks"]["gain_interval"] == "+0.0 to +0.0"


def test_a_question_without_an_answer_is_told():
    answered = runs(lambda *_: True)
    del answered["adapter"]["block"]["nq", "nq 7"]
    with pytest.raises(SystemExit, match="adapter, block: 1 questions have no answer"):
        paper_table.table(answered)


def test_predictions_are_read_by_arm(tmp_path):
    rows = [
        {"arm": arm, "dataset": "nq", "key": "a", "is_correct": arm == "full"} for arm in ("full", "block")
    ]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert paper_table.read([tmp_path]) == {"full": {("nq", "a"): True}, "block": {("nq", "a"): False}}


def test_what_was_not_asked_has_no_row():
    answered = runs(lambda *_: True)
    del answered["stock"], answered["adapter"]["block/unmoved"]
    rows, _ = paper_table.table(answered)
    expected = [
        label
        for run, arm, label in paper_table.ROWS
        if run != "stock" and (run, arm) != ("adapter", "block/unmoved")
    ]
    assert [row["row"] for row in rows] == expected
