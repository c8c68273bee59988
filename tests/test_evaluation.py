"""An evaluation from the command line to its report: whole, killed and resumed, with libraries missing."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import qa_data
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))

import generate_benchmarks

from rag_blockcache.cli import app
from rag_blockcache.errors import InvalidInputError
from rag_blockcache.evaluation import answer_plots
from rag_blockcache.evaluation.answer_evaluation import EvaluationOptions, _batches, evaluate
from rag_blockcache.evaluation.answer_page import write_report
from rag_blockcache.evaluation.answer_run import AnswerRun
from rag_blockcache.evaluation.answer_summary import AnswerReport
from rag_blockcache.evaluation.command import typed_command

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    other = [{**row, "id": f"x{row['id']}", "dataset": "hamlet"} for row in qa_data.rows(2)]
    return [
        qa_data.write(folder / "village.jsonl.gz", qa_data.rows()),
        qa_data.write(folder / "others.jsonl", other),
    ]


@pytest.fixture
def options(tiny_model_path, benchmarks):
    def make(**changes):
        chosen = {
            "model": str(tiny_model_path),
            "data": benchmarks,
            "policies": "block,link-4",
            "max_new_tokens": 8,
            "timed": 2,
            "passage_format": "plain",
            "device": "cpu",
        }
        return EvaluationOptions(**chosen | changes)

    return make


def run(*arguments, **settings):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)], **settings)


def predictions(folder):
    """Return what a person reads, by question and arm, without the times."""
    lines = (Path(folder) / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len({(row["key"], row["arm"]) for row in rows}) == len(rows), "a question was answered twice"
    return {(row["key"], row["arm"]): {**row, "ttft_seconds": None} for row in rows}


def test_the_table_has_each_arm_on_each_benchmark_and_their_average(options):
    report = evaluate(options())
    arms = ["full", "no-passages", "block", "link-4"]
    assert [(row["dataset"], row["arm"]) for row in report.rows] == [
        (dataset, arm) for dataset in ("village", "hamlet", "average") for arm in arms
    ]
    by_name = {(row["dataset"], row["arm"]): row for row in report.rows}
    for dataset in ("village", "hamlet", "average"):
        assert by_name[dataset, "full"]["fidelity"] == 1.0
        assert by_name[dataset, "no-passages"]["fidelity"] == 0.0
        assert by_name[dataset, "full"]["recomputed"] == 1.0
        assert by_name[dataset, "block"]["recomputed"] == 0.0
        assert 0 < by_name[dataset, "link-4"]["recomputed"] < 1
        assert by_name[dataset, "block"]["fidelity"] < 1
    for measure in ("fidelity", "agreement", "accuracy", "recomputed"):
        parts = [by_name[dataset, "link-4"][measure] for dataset in ("village", "hamlet")]
        assert by_name["average", "link-4"][measure] == pytest.approx(sum(parts) / 2)
    assert by_name["village", "block"]["num_questions"] == 5


def test_fidelity_is_the_share_of_divergence_that_passages_take_away(options, tmp_path):
    report = evaluate(options(report=str(tmp_path)))
    found = [row for row in predictions(tmp_path).values() if row["dataset"] == "village"]
    sums = {
        arm: sum(row["divergence"] for row in found if row["arm"] == arm) for arm in ("block", "no-passages")
    }
    [row] = [row for row in report.rows if (row["dataset"], row["arm"]) == ("village", "block")]
    assert row["fidelity"] == pytest.approx(1 - sums["block"] / sums["no-passages"])
    assert row["fidelity_low"] <= row["fidelity"] <= row["fidelity_high"]


def test_a_finished_evaluation_is_read_back_without_asking_the_model(options, tmp_path, monkeypatch):
    first = evaluate(options(report=str(tmp_path)))
    monkeypatch.setattr("rag_blockcache.evaluation.answer_run.AnswerRun.measure", None)
    again = evaluate(options(report=str(tmp_path)))
    assert again.rows == first.rows
    assert again.comparisons == first.comparisons


def test_an_arm_added_later_gives_what_it_gives_at_once(options, tmp_path):
    evaluate(options(report=str(tmp_path / "two"), policies="block"))
    evaluate(options(report=str(tmp_path / "two"), policies="block,link-4"))
    evaluate(options(report=str(tmp_path / "one"), policies="block,link-4"))
    one, two = predictions(tmp_path / "one"), predictions(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, row in one.items():
        assert row["token_ids"] == two[name]["token_ids"]
        assert row["divergence"] == pytest.approx(two[name]["divergence"], rel=1e-4, abs=1e-7)


def test_a_killed_evaluation_goes_on_and_ends_as_if_nothing_had_happened(options, tmp_path):
    given = options(report=str(tmp_path / "killed"), batch_size=1, timed=0)
    command = [
        sys.executable, "-m", "rag_blockcache.evaluation", "--model", given.model, "--data", *given.data,
        "--policies", given.policies, "--max_new_tokens", "8", "--timed", "0", "--batch_size", "1",
        "--passage_format", "plain", "--device", "cpu", "--report", given.report,
    ]  # fmt: skip
    path = tmp_path / "killed" / "predictions.jsonl"
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        while process.poll() is None and not (path.is_file() and path.read_bytes().count(b"\n") >= 4):
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    done = path.read_bytes()
    assert 4 <= done.count(b"\n") < 40
    path.write_bytes(done + b'{"key": "a line that was never finish')
    evaluate(given)
    assert path.read_bytes().startswith(done)
    evaluate(options(report=str(tmp_path / "whole"), batch_size=1, timed=0))
    assert predictions(tmp_path / "killed") == predictions(tmp_path / "whole")


def test_raising_the_limit_asks_only_new_questions_whatever_prompts_they_need(options, tmp_path):
    few = options(report=str(tmp_path), num_passages="1,5", limit=2, timed=0)
    before = evaluate(few)
    done = (tmp_path / "predictions.jsonl").read_bytes()
    report = evaluate(dataclasses.replace(few, limit=4))
    assert {row["num_questions"] for row in report.rows if row["dataset"] == "village"} == {4}
    assert (tmp_path / "predictions.jsonl").read_bytes().startswith(done)
    assert len(predictions(tmp_path)) == 2 * done.count(b"\n")
    assert evaluate(few).rows == before.rows


def test_policies_that_are_added_later_are_timed_on_the_questions_of_the_others(options, tmp_path):
    def timed(arm):
        lines = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return {row["key"] for row in rows if row["arm"] == arm and row["ttft_seconds"] is not None}

    evaluate(options(report=str(tmp_path), policies="block", limit=2, timed=3))
    first = timed("block")
    evaluate(options(report=str(tmp_path), policies="block", timed=3))
    assert timed("full") == timed("block") == first
    evaluate(options(report=str(tmp_path), policies="block,link-4", timed=3))
    assert timed("link-4") == timed("full") == first
    assert len(first) == 3
    evaluate(options(report=str(tmp_path), policies="block,link-4", num_passages="2", timed=5))
    assert len(timed("link-4")) == len(timed("full")) == 3 + 5, "of other prompts none was timed"


def test_a_batch_asks_nothing_that_one_of_its_questions_has_on_record(options, tmp_path, monkeypatch):
    evaluate(options(report=str(tmp_path), policies="block", limit=2, timed=0))
    asked = []
    inner = AnswerRun.measure

    def observed(self, examples):
        asked.append([[arm.name for arm in self.missing(example)] for example in examples])
        inner(self, examples)

    monkeypatch.setattr(AnswerRun, "measure", observed)
    evaluate(options(report=str(tmp_path), policies="block,link-4", timed=0))
    new, whole = ["link-4"], ["full", "no-passages", "block", "link-4"]
    assert asked == [[new] * 4, [whole] * 6]


def test_another_model_in_the_same_directory_is_an_error(options, tmp_path):
    evaluate(options(report=str(tmp_path), timed=0, limit=1))
    with pytest.raises(InvalidInputError, match="max_new_tokens 8"):
        evaluate(options(report=str(tmp_path), timed=0, limit=1, max_new_tokens=9))
    with pytest.raises(InvalidInputError, match="made with another model, adapter or dtype; use"):
        evaluate(options(report=str(tmp_path), timed=0, limit=1, dtype="bfloat16"))


def test_prompts_beyond_the_window_are_left_out_and_counted(options, tmp_path, tiny_model_path):
    long = qa_data.rows()[0]
    long = {**long, "id": "long", "passages": [{**each, "text": "word " * 200} for each in long["passages"]]}
    path = qa_data.write(tmp_path / "village.jsonl", [*qa_data.rows(), long])
    report = evaluate(options(data=[path], timed=0))
    assert report.num_skipped == 1
    assert {row["num_questions"] for row in report.rows} == {5}
    with pytest.raises(InvalidInputError, match="no question fits the context window of the model, 2048"):
        evaluate(options(data=[qa_data.write(tmp_path / "long.jsonl", [long])]))


def test_numbers_of_passages_and_places_of_gold_are_told_apart(options, benchmarks):
    report = evaluate(
        options(data=benchmarks[:1], num_passages="1,2", orders="gold-first, gold-last", timed=0)
    )
    by_number = {(row["num_passages"], row["arm"]): row for row in report.by_num_passages}
    assert {number for number, _ in by_number} == {1, 2}
    assert by_number[1, "link-4"]["num_questions"] == 10  # each question in two orders
    assert 0 < by_number[2, "block"]["fidelity"] < 1
    by_place = {(row["gold_position"], row["arm"]): row["num_questions"] for row in report.by_gold_position}
    assert by_place == {(place, arm): 5 for place in (1, 2) for arm in report.arms}, (
        "one passage has one place"
    )
    assert {row["variant"] for row in report.by_gold_position} == {"2 passages"}
    assert {row["variant"] for row in report.rows} == {
        f"{number}, {order}"
        for number in ("1 passage", "2 passages")
        for order in ("gold-first", "gold-last")
    }


def test_without_gold_answers_fidelity_is_measured_and_accuracy_is_not(options, tmp_path):
    rows = [{"question": row["question"], "passages": row["passages"]} for row in qa_data.rows()]
    report = evaluate(options(data=[qa_data.write(tmp_path / "own.jsonl", rows)], timed=0))
    assert all("accuracy" not in row and "fidelity" in row for row in report.rows)
    assert "accuracy" not in report.to_json()["columns"]


def test_gold_answers_and_a_text_are_scored_on_demand(options, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The mill has a thousand columns of figure wheels.")
    report = evaluate(options(score_gold=True, text=str(text), timed=0))
    assert all(row["gold_perplexity"] > 1 for row in report.rows)
    assert report.text.num_tokens == len(text.read_bytes()) - 1


def test_differences_are_claimed_only_where_the_interval_leaves_zero_out(options):
    report = evaluate(options(timed=0))
    pairs = {(each["arm"], each["than"]) for each in report.comparisons}
    assert len(pairs) == 6  # of four arms
    for each in report.comparisons:
        leaves_zero_out = each["low"] > 0 or each["high"] < 0
        assert each["is_clear"] == (leaves_zero_out and each["num_differing"] >= 6)
        assert each["dataset"] == "average" or not each["is_clear"], "each has five questions"
    [zero] = [
        each
        for each in report.comparisons
        if (each["arm"], each["than"], each["measure"], each["dataset"])
        == ("no-passages", "full", "fidelity", "average")
    ]
    assert (zero["value"], zero["is_clear"]) == (-1.0, True)


def test_the_page_lists_the_differences_that_are_claimed_and_no_others(options, tmp_path):
    report = evaluate(options(timed=0))
    page = write_report(report, "eval", tmp_path).read_text(encoding="utf-8")
    assert page.index("<h2>average") < page.index("<svg") < page.index("<h2>village")
    lists = re.findall(r"<summary>(\d+) differences that these questions show</summary>(.*?)</details>", page)
    claimed = [each for each in report.comparisons if each["is_clear"]]
    assert [int(number) for number, _ in lists] == [len(claimed), 0, 0]
    assert 0 < len(claimed) < len(report.comparisons)
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(<td>.*?)</tr>", lists[0][1])]
    expected = [(each["measure"], each["arm"], each["than"]) for each in claimed]
    assert [tuple(row[:3]) for row in cells] == expected


def test_questions_without_gold_answers_count_for_fidelity_alone(options, tmp_path):
    rows = qa_data.rows()
    rows[1] = {name: value for name, value in rows[1].items() if name != "answers"}
    asked = options(data=[qa_data.write(tmp_path / "own.jsonl", rows)], timed=0, score_gold=True)
    report = evaluate(dataclasses.replace(asked, report=str(tmp_path / "report")))
    found = predictions(tmp_path / "report").values()
    for row in report.rows:
        judged = [each for each in found if each["arm"] == row["arm"] and each["is_correct"] is not None]
        assert len(judged) == 4
        assert row["accuracy"] == sum(each["is_correct"] for each in judged) / 4
        log_likelihood = sum(each["gold_log_likelihood"] for each in judged)
        num_tokens = sum(each["num_gold_tokens"] for each in judged)
        assert row["gold_perplexity"] == pytest.approx(math.exp(-log_likelihood / num_tokens))
        assert "fidelity" in row


def test_the_command_writes_a_report_that_needs_nothing_beside_it(tiny_model_path, benchmarks, tmp_path):
    folder = tmp_path / "report"
    result = run(
        "--data", benchmarks[0], "--data", benchmarks[1], "--model", tiny_model_path,
        "--policies", "block,link-4",
        "--max-new-tokens", 6, "--num-passages", "1,2", "--timed", 2, "--passage-format", "plain",
        "--device", "cpu", "--report", folder, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads((folder / "result.json").read_text())
    drawn = generate_benchmarks.table(found, ["dataset", "arm", "fidelity", "recomputed"])
    assert (
        drawn.count("| no-passages | 0.00 |  |") == 6
    )  # two benchmarks and their average, of two lengths each
    assert (found["model"], found["passage_format"]) == (tiny_model_path.name, "plain")
    assert str(tmp_path) not in result.stdout  # results are committed: no folders of this machine
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert '<meta name="viewport"' in page
    assert not re.search(r'(src|href)="(?!#)', page)
    assert page.count("<figure>") == 7
    for word in ("village", "hamlet", "average", "link-4"):
        assert word in page


def test_without_json_the_command_draws_a_table_and_says_where_the_report_is(
    tiny_model_path, benchmarks, tmp_path
):
    result = run(
        "--data", benchmarks[0], "--model", tiny_model_path, "--max-new-tokens", 4, "--limit", 3,
        "--passage-format", "plain", "--report", tmp_path / "report", "--device", "cpu", "--timed", 0,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "fidelity" in result.stdout
    assert "block/stand-ins" in result.stdout
    assert "3/3 questions" in result.stderr or "3/3" in result.stderr
    assert "index.html" in result.stderr.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "sideways"], "sideways"),
        (["--orders", "upwards"], "gold-first"),
        (["--num-passages", "0"], "num_passages is '0'"),
        (["--join-words", "many"], "join_words is 'many'"),
        (["--limit", "0"], "limit is 0; it must be at least 1"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--data", "no-such-file.jsonl"], "no such file"),
    ],
)
def test_a_mistake_is_told_in_a_sentence_before_the_model_is_loaded(benchmarks, arguments, message):
    result = run("--data", benchmarks[0], "--model", "no-such-model", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")


def test_an_interrupted_run_says_that_the_same_command_goes_on(
    tiny_model_path, benchmarks, tmp_path, monkeypatch
):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(AnswerRun, "measure", interrupt)
    given = ("--data", benchmarks[0], "--model", tiny_model_path, "--device", "cpu")
    kept = run(*given, "--report", tmp_path / "report")
    assert kept.exit_code == 130
    assert "the same command goes on from there" in " ".join(kept.stderr.split())
    assert "goes on" not in run(*given).stderr


def test_the_plain_module_takes_every_option_of_the_command(benchmarks):
    help_of = {
        "command": run("--help", env={"COLUMNS": "200"}).stdout,
        "module": subprocess.run(
            [sys.executable, "-m", "rag_blockcache.evaluation", "--help"],
            capture_output=True, text=True, cwd=ROOT, check=True, env={**os.environ, "COLUMNS": "200"},
        ).stdout,
    }  # fmt: skip
    for each in dataclasses.fields(EvaluationOptions):
        for shown in help_of.values():
            assert f"--{each.name.replace('_', '-')}" in shown
            assert each.metadata["help"].split(";")[0][:60] in " ".join(re.sub("[│\\s]+", " ", shown).split())


def test_the_page_escapes_what_benchmarks_are_called(options, tmp_path):
    rows = [{**row, "dataset": "<script>"} for row in qa_data.rows()]
    report = evaluate(options(data=[qa_data.write(tmp_path / "x.jsonl", rows)], timed=0, limit=2))
    page = write_report(report, "rag-blockcache eval <b>", tmp_path / "report").read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "eval &lt;b&gt;" in page


def test_plots_are_the_same_bytes_for_the_same_numbers(options):
    report = evaluate(options(timed=1))
    first = answer_plots.plots(report)
    assert set(first) == {
        "fidelity-by-recomputed",
        "accuracy-by-recomputed",
        "fidelity-by-ttft_seconds",
        "accuracy-by-ttft_seconds",
        "accuracy-by-gold_position",
        "accuracy-by-num_passages",
        "fidelity-by-num_passages",
    }
    assert answer_plots.plots(report) == first
    read = json.loads(json.dumps(report.to_json()))
    names = {each.name for each in dataclasses.fields(report)} - {"environment"}
    again = AnswerReport(environment=None, **{name: read[name] for name in names})
    assert answer_plots.plots(again) == first, "the documentation draws them from result.json"


def test_it_runs_without_the_libraries_of_the_command_line_and_of_the_index(
    tiny_model_path, benchmarks, tmp_path
):
    script = (
        "import runpy, sys\n"
        "index = ['faiss', 'sentence_transformers', 'semantic_text_splitter']\n"
        "for name in ['typer', 'matplotlib', 'datasets', *index]:\n"
        "    sys.modules[name] = None\n"
        "runpy.run_module('rag_blockcache.evaluation', run_name='__main__')\n"
    )
    arguments = [
        "--model",
        str(tiny_model_path),
        "--data",
        benchmarks[0],
        "--limit",
        "2",
        "--max_new_tokens",
        "4",
    ]
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments, "--passage-format", "plain", "--report", str(tmp_path)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "TQDM_DISABLE": "1"}, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert [row["arm"] for row in json.loads(result.stdout)["rows"]] == [
        "full",
        "no-passages",
        "block",
        "block/stand-ins",
        "auto",
    ]
    assert "2/2 questions" in result.stderr
    assert "the report has no plots: plots need matplotlib" in result.stderr
    assert "<svg" not in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_batches_are_bounded_by_questions_and_by_padded_tokens():
    pending = [(str(number), length) for number, length in enumerate([10, 10, 10, 90, 10, 10, 200])]
    assert [len(batch) for batch in _batches(pending, 3, None)] == [3, 3, 1]
    assert [len(batch) for batch in _batches(pending, 9, 100)] == [3, 1, 2, 1]
    assert [name for batch in _batches(pending, 2, 150) for name in batch] == list("0123456")


@pytest.mark.parametrize(
    ("typed", "quoted"),
    [
        (["/bin/rag-blockcache", "eval", "--report", "/home/ada/x y"], "rag-blockcache eval --report 'x y'"),
        ([str(ROOT / "rag_blockcache/evaluation/__main__.py"), "--limit", "3"],
         "python -m rag_blockcache.evaluation --limit 3"),
        (["/elsewhere/script.py"], "python script.py"),
    ],
)  # fmt: skip
def test_a_result_quotes_the_command_without_folders_of_this_machine(monkeypatch, typed, quoted):
    monkeypatch.setattr(sys, "argv", typed)
    assert typed_command() == quoted


@pytest.mark.real_weights
def test_a_real_model_comes_closer_to_full_attention_the_more_is_computed_again(smollm2_path, benchmarks):
    report = evaluate(
        EvaluationOptions(
            model=str(smollm2_path),
            data=benchmarks[:1],
            policies="block,link-4,link-16",
            num_passages="5",
            max_new_tokens=12,
            timed=0,
            device="cpu",
        )
    )
    rows = {row["arm"]: row for row in report.rows}
    assert 0 < rows["block"]["fidelity"] < rows["link-4"]["fidelity"] < rows["link-16"]["fidelity"] < 1
    assert rows["no-passages"]["accuracy"] < rows["full"]["accuracy"]  # it does read them
