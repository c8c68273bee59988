"""The tables of flows come from what was measured, and a page that fell behind is found."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = "# Flows\n\n<!-- flows: flows-x -->\n<!-- end flows -->\n\nText after.\n"
ROWS = [
    {"flow": "compact", "variant": "sync", "num_passages": 3, "num_reused": 3},
    {"flow": "compact", "variant": "async", "num_passages": 3, "num_reused": 2},
    {"flow": "agent", "variant": "async", "num_passages": 6, "num_reused": 6},
]


@pytest.fixture
def generator():
    path = ROOT / "docs/generate_flow_matrix.py"
    spec = importlib.util.spec_from_file_location("generate_flow_matrix", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def page(generator, monkeypatch, tmp_path):
    monkeypatch.setattr(generator, "FOLDER", tmp_path)
    (tmp_path / "flows-x.json").write_text(json.dumps(ROWS))
    (tmp_path / "x.md").write_text(PAGE)
    return tmp_path / "x.md"


def test_flows_are_rows_and_variants_columns(generator, page):
    assert generator.main([]) == 0
    text = page.read_text()
    assert "| flow | sync | async |" in text
    assert "| compact | 3 of 3 | 2 of 3 |" in text
    assert "| agent | - | 6 of 6 |" in text
    assert text.endswith("<!-- end flows -->\n\nText after.\n")


def test_a_page_that_fell_behind_is_named(generator, page, capsys):
    assert generator.main(["--check"]) == 1
    assert "x.md" in capsys.readouterr().err
    assert page.read_text() == PAGE  # a check writes nothing
    generator.main([])
    assert generator.main(["--check"]) == 0


def test_an_unknown_argument_is_refused(generator, capsys):
    assert generator.main(["--chek"]) == 2
    assert "--check" in capsys.readouterr().err


def test_the_committed_pages_are_up_to_date(generator):
    assert generator.main(["--check"]) == 0
