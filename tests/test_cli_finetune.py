"""``rag-blockcache finetune``: the options of the recipe, progress on stderr, the result on stdout."""

from __future__ import annotations

import dataclasses
import json

import pytest
from test_finetuning import folder  # noqa: F401 - a fixture
from typer.main import get_command
from typer.testing import CliRunner

from rag_blockcache.cli.app import app
from rag_blockcache.finetuning import Recipe

SMALL = (
    "--steps 2 --row-tokens 512 --rows-per-step 1 --log-every 1 --passage-format plain --precision float32"
)


def run(*arguments):
    return CliRunner().invoke(app, ["finetune", *arguments])


def test_every_field_of_the_recipe_is_an_option_with_its_default():
    options = {option.name: option for option in get_command(app).commands["finetune"].params}
    for field in dataclasses.fields(Recipe):
        option = options.pop(field.name)
        assert option.opts == [f"--{field.name.replace('_', '-')}"]
        assert option.help.startswith(field.metadata["help"])
        if field.default is not dataclasses.MISSING:
            assert option.default == field.default
    assert set(options) == {"as_json", "eval_answers"}


@pytest.mark.parametrize("as_json", [False, True])
def test_a_model_is_trained_and_the_result_told(as_json, folder, tmp_path):  # noqa: F811
    given = {"--model": "model", "--data": "train.jsonl", "--eval-data": "dev.jsonl"}
    files = [word for name, file in given.items() for word in (name, str(folder / file))]
    shown = ["--json"] if as_json else []
    result = run(*files, "--out", str(tmp_path / "run"), "--eval-answers", "3", *SMALL.split(), *shown)
    assert result.exit_code == 0, result.output
    assert "step 2 of 2" in result.stderr
    if as_json:
        report = json.loads(result.stdout)
        assert report["record"]["block_fine_tuned"]
        assert report["history"][-1]["step"] == 2
    else:
        assert "eval exact block" in result.stdout
        assert "eval accuracy full" in result.stdout
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_what_is_missing_or_wrong_is_one_sentence(folder, tmp_path):  # noqa: F811
    result = run("--out", str(tmp_path / "run"), "--data", "x.jsonl")
    assert result.exit_code == 2
    assert "--model is missing" in result.stderr
    result = run("--model", "m", "--out", str(tmp_path / "run"), "--data", "x.jsonl", "--modes", "none")
    assert result.exit_code == 2
    assert "modes is 'none'; choose one of block+full, full, block" in result.stderr


def test_answers_during_training_need_questions(folder, tmp_path):  # noqa: F811
    files = ["--model", str(folder / "model"), "--data", str(folder / "train.jsonl")]
    result = run(*files, "--out", str(tmp_path / "run"), "--eval-answers", "3")
    assert result.exit_code == 2
    assert "name them with --eval-data" in result.stderr
