"""The tables of the documentation come from result files, and a page that fell behind is found."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = "# Numbers\n\n<!-- generated: latency -->\n<!-- end generated -->\n\nText after.\n"
RESULT = {
    "command": "make bench",
    "hardware": {"cpu": "two cores"},
    "versions": {"torch": "2.13.0"},
    "rows": [{"num_tokens": 8000, "ttft_seconds": 0.52, "stored_bytes": 3 * 2**20, "speedup": 52.123}],
}


@pytest.fixture
def generator():
    spec = importlib.util.spec_from_file_location("generate_benchmarks", ROOT / "docs/generate_benchmarks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def project(generator, monkeypatch, tmp_path):
    """A project of one page and one result file; return the page."""
    (tmp_path / "docs/benchmarks").mkdir(parents=True)
    (tmp_path / "docs/benchmarks/latency.json").write_text(json.dumps(RESULT))
    (tmp_path / "page.md").write_text(PAGE)
    monkeypatch.setattr(generator, "ROOT", tmp_path)
    monkeypatch.setattr(generator, "PAGES", ("page.md",))
    return tmp_path / "page.md"


def test_numbers_are_shown_with_their_units(generator, project):
    assert generator.main([]) == 0
    text = project.read_text()
    assert "| num tokens | ttft | stored | speedup |" in text
    assert "| 8,000 | 520 ms | 3.1 MB | 52.1 |" in text
    assert "`make bench` on two cores; torch 2.13.0." in text
    assert text.endswith("<!-- end generated -->\n\nText after.\n")


def test_columns_pick_order_and_name(generator):
    drawn = generator.table(RESULT | {"columns": {"speedup": "sooner", "num_tokens": "tokens"}})
    assert drawn.startswith("| sooner | tokens |\n| ---: | ---: |\n| 52.1 | 8,000 |\n")


def test_a_page_that_fell_behind_is_named(generator, project, capsys):
    assert generator.main(["--check"]) == 1
    assert "page.md" in capsys.readouterr().err
    assert project.read_text() == PAGE  # a check writes nothing
    generator.main([])
    assert generator.main(["--check"]) == 0


def test_what_was_never_measured_says_so(generator, tmp_path):
    assert "Not measured yet" in generator.filled_in(PAGE, tmp_path, tmp_path)


def test_a_page_may_ask_for_some_columns_only(generator, project, tmp_path):
    page = PAGE.replace("generated: latency", "generated: latency num_tokens speedup")
    drawn = generator.filled_in(page, tmp_path / "docs/benchmarks", tmp_path)
    assert "| num tokens | speedup |" in drawn


def test_small_ratios_keep_two_digits(generator):
    drawn = generator.table(RESULT | {"rows": [{"times_floor": 1.0649}]})
    assert "| 1.06 |" in drawn


def test_a_result_with_a_plot_is_drawn_the_same_each_time(generator, project, tmp_path):
    rows = [{"num_tokens": n, "full_seconds": n / 1e3, "memory_seconds": 0.1} for n in (512, 8000)]
    result = RESULT | {
        "model": "tiny",
        "dtype": "float32",
        "rows": rows,
        "columns": {"num_tokens": "prompt tokens"},
        "plot": {
            "x": "num_tokens",
            "y": {"full_seconds": "full prefill", "memory_seconds": "reuse"},
            "y_label": "s",
        },
    }
    (tmp_path / "docs/benchmarks/latency.json").write_text(json.dumps(result))
    project.write_text(PAGE.replace("generated: latency", "generated: latency.svg"))
    drawn = []
    for _ in range(2):
        assert generator.main([]) == 0
        drawn.append((tmp_path / "docs/benchmarks/latency.svg").read_text())
    assert "reuse" in drawn[0]
    assert drawn[0] == drawn[1]
    assert "![latency](docs/benchmarks/latency.svg)" in project.read_text()


def test_a_check_draws_nothing(generator, project, tmp_path):
    generator.main(["--check"])
    assert not list(tmp_path.glob("**/*.svg"))


def test_an_evaluation_of_answers_is_drawn_where_a_page_asks_for_it(generator, project):
    def row(arm, fidelity, recomputed):
        bounds = {f"{name}_{end}": fidelity for name in ("fidelity", "accuracy") for end in ("low", "high")}
        return {
            "dataset": "nq", "variant": "", "arm": arm, "fidelity": fidelity, "accuracy": fidelity,
            "recomputed": recomputed, "recomputed_low": recomputed, "recomputed_high": recomputed, **bounds,
        }  # fmt: skip

    measured = RESULT | {
        "max_new_tokens": 8, "passage_format": "paper", "num_skipped": 0, "arms": ["full", "block"],
        "rows": [row("full", 1.0, 1.0), row("block", 0.6, 0.0)], "comparisons": [], "by_gold_position": [],
        "by_num_passages": [], "text": None,
    }  # fmt: skip
    (project.parent / "docs/benchmarks/answers.json").write_text(json.dumps(measured))
    project.write_text(
        PAGE + "<!-- generated: answers.fidelity-by-recomputed.svg -->\n<!-- end generated -->\n"
    )
    assert generator.main([]) == 0
    assert "![answers fidelity by recomputed](docs/benchmarks/answers.fidelity-by-recomputed.svg)" in (
        project.read_text()
    )
    drawn = project.parent / "docs/benchmarks/answers.fidelity-by-recomputed.svg"
    first = drawn.read_bytes()
    assert b"block" in first
    assert not list(drawn.parent.glob("*accuracy*")), "nobody asked for it"
    drawn.unlink()
    generator.main([])
    assert drawn.read_bytes() == first
