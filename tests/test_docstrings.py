"""Every example in a docstring runs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import rag_blockcache

MODULES = [
    module.name
    for module in pkgutil.walk_packages(rag_blockcache.__path__, "rag_blockcache.")
    if not module.ispkg
    if ">>> " in Path(module.module_finder.path, module.name.rpartition(".")[2] + ".py").read_text()
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name, tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"tiny_model": tiny_model, "tiny_tokenizer": tiny_tokenizer, "tmp_path": tmp_path}
    found = doctest.testmod(importlib.import_module(name), extraglobs=names)
    assert found.attempted
    assert not found.failed
