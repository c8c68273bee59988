"""``rag-blockcache bench``: options, the JSON of each measurement, and the command that it says made it."""

import json
import sys

import pytest
from typer.testing import CliRunner

from rag_blockcache.cli import app
from rag_blockcache.cli.bench import _command
from rag_blockcache.evaluation import memory


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


FAST = ("--device", "cpu", "--repeats", 1)


def test_latency_prints_one_json_object_and_writes_it_as_well(tiny_model_path, tmp_path):
    out = tmp_path / "latency.json"
    result = run(
        "latency", "--model", tiny_model_path, "--lengths", "130,260", "--final-tokens", 20,
        "--passage-tokens", 40, "--directory", tmp_path / "blocks", "--out", out, "--json", *FAST,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads(out.read_text())
    assert [row["num_tokens"] for row in found["rows"]] == [130, 260]
    assert found["model"] == tiny_model_path.name
    assert str(tmp_path) not in result.stdout  # results are committed: no folders of this machine
    assert "260 tokens: round 1 of 1" in result.stderr


def test_latency_draws_a_table_for_people(tiny_model_path):
    result = run("latency", "--model", tiny_model_path, "--lengths", "300", "--policies", "block", *FAST)
    assert result.exit_code == 0, result.output
    assert "floor" in result.stdout
    assert "ms" in result.stdout


def test_prefill_cuts_passages_from_a_text(tiny_model_path, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The mill has a thousand columns of figure wheels. " * 20)
    result = run("prefill", "--model", tiny_model_path, "--tokens", 600, "--text", text, "--json", *FAST)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["num_tokens"] == 600


def test_memory_passes_its_options_on(monkeypatch):
    asked = {}

    def measure(model, **options):
        asked.update(options, model=model)
        return memory.MemoryMeasure(8000, 16, 1, 10, 100, 120, 90, 30, 90, None, None, {"date": "today"})

    monkeypatch.setattr(memory, "measure_memory", measure)
    result = run("memory", "--shape", "smollm2-135m", "--tokens", 500, "--json")
    assert json.loads(result.stdout)["rows"][0]["kv_multiple"] == 2.0
    assert asked["shape"] == "smollm2-135m"
    assert asked["num_tokens"] == 500


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["latency"], "shapes"),
        (["latency", "--shape", "gpt-5"], "llama-3-8b"),
        (["latency", "--lengths", "many", "--shape", "qwen3-0.6b"], "lengths"),
        (
            ["prefill", "--model", "nowhere", "--text", "no-such-file.txt", "--device", "cpu"],
            "no-such-file.txt",
        ),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(arguments, reason, monkeypatch):
    monkeypatch.setattr("rag_blockcache.evaluation.shapes.load_model", lambda *_, **__: None)
    result = run(*arguments)
    assert result.exit_code == 2
    assert reason in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_the_command_is_told_without_folders_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", [f"{tmp_path}/bin/rag-blockcache", "bench", "latency", "--model", "/a/b/tiny"]
    )
    assert _command() == "rag-blockcache bench latency --model tiny"
    monkeypatch.setattr(sys, "argv", [f"{tmp_path}/tests/bench_latency.py", "--shape", "llama-3-8b"])
    assert _command() == "python tests/bench_latency.py --shape llama-3-8b"
