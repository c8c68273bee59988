"""The benchmark of the drop-ins times the work that it claims, and its result makes a table."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("llama_index.core", reason="llama-index-core is not installed")
pytest.importorskip("langchain_core", reason="langchain-core is not installed")

from llama_index_pipelines import own_settings

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.usefixtures(own_settings.__name__)


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests/benchmarks")
    return importlib.import_module("bench_drop_ins")


def test_every_way_is_measured_under_every_policy(bench, tiny_model_path, monkeypatch, capsys):
    sizes = ["--num-passages", "3", "--passage-tokens", "80", "--repeats", "2"]
    monkeypatch.setattr(sys, "argv", ["bench_drop_ins.py", "--model", str(tiny_model_path), *sizes])
    bench.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    stock, own, *frameworks = result["rows"]
    assert [row["way"] for row in frameworks] == ["LlamaIndex, query engine", "LangChain, LCEL"]
    assert stock["num_tokens"] == own["num_tokens"] > 3 * 70
    assert all(row["full_seconds"] > 0 for row in result["rows"])
    for row in (own, *frameworks):
        assert min(row["block_times_sooner"], row["auto_times_sooner"], row["auto_seconds"]) > 0
        assert row["auto_policy"]
    assert result["command"].endswith(f"--model {tiny_model_path.name} {' '.join(sizes)}")
    assert str(tiny_model_path) not in json.dumps(result)


def test_a_run_that_did_not_reuse_or_that_did_is_not_passed_for_the_other(bench):
    full, block = bench.FirstToken(0.2, 300), bench.FirstToken(0.1, 300, 240, 3, "block")
    runs = {("way", "full"): full, ("way", "block"): block}
    bench.check(runs, {key: [run] for key, run in runs.items()}, 3)
    for changed in (
        {("way", "full"): replace(full, num_reused=1)},
        {("way", "full"): replace(full, policy="block")},
        {("way", "block"): replace(block, num_hits=2)},
    ):
        with pytest.raises(AssertionError, match="way"):
            bench.check(runs, {key: [run] for key, run in (runs | changed).items()}, 3)


def test_the_result_makes_a_table(bench):
    spec = importlib.util.spec_from_file_location("generate_benchmarks", ROOT / "docs/generate_benchmarks.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    found = {
        ("way", "full"): [bench.FirstToken(0.3, 300), bench.FirstToken(0.2, 300), bench.FirstToken(0.1, 300)],
        ("way", "block"): [bench.FirstToken(seconds, 300, 240, 3, "block") for seconds in (0.1, 0.05, 0.1)],
    }
    row = bench.row_of("way", found)
    assert (row["full_seconds"], row["block_seconds"], row["auto_seconds"]) == (0.2, 0.1, None)
    assert row["block_times_sooner"] == pytest.approx(3)  # of 3, 4 and 1: by pairs, not of the medians
    described = {"command": "bench", "hardware": {}, "versions": {}, "columns": bench.COLUMNS, "rows": [row]}
    drawn = generator.table(described)
    assert "| through | prompt tokens | full prefill | prefilled, block |" in drawn
    assert "| way | 300 | 200 ms | 100 ms | 3.00 |  |  |  |" in drawn
