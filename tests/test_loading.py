"""Models by name, and models in the user's hands."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rag_blockcache.errors import InvalidInputError, MissingDependencyError, ModelNotFoundError
from rag_blockcache.loading import load_model


@pytest.fixture
def folder(tiny_model_path, tmp_path):
    return shutil.copytree(tiny_model_path, tmp_path / "model")


def test_a_folder_is_loaded_with_its_tokenizer(tiny_model_path, tiny_model):
    for name in (tiny_model_path, str(tiny_model_path)):
        model = load_model(name, device="cpu")
        assert model.dtype == torch.float32
        assert torch.equal(model.network.lm_head.weight, tiny_model.lm_head.weight)
        assert len(model.tokenizer) == 261


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_dtype_is_obeyed(dtype, tiny_model_path):
    assert load_model(tiny_model_path, dtype=dtype, device="cpu").dtype == torch.bfloat16


def test_a_loaded_model_is_used_as_it_is(tiny_model, tiny_tokenizer):
    model = load_model(tiny_model, tokenizer=tiny_tokenizer)
    assert model.network is tiny_model
    assert model.tokenizer is tiny_tokenizer


def test_a_loaded_model_may_come_with_a_tokenizer_by_name(tiny_model, tiny_model_path):
    assert len(load_model(tiny_model, tokenizer=tiny_model_path).tokenizer) == 261


def test_a_loaded_model_needs_a_tokenizer_and_takes_no_options(tiny_model, tiny_tokenizer):
    with pytest.raises(InvalidInputError, match="needs its tokenizer"):
        load_model(tiny_model)
    for options in ({"device": "cpu"}, {"dtype": "float32"}, {"adapter": "a"}):
        with pytest.raises(InvalidInputError, match="loaded by name"):
            load_model(tiny_model, tokenizer=tiny_tokenizer, **options)


@pytest.mark.parametrize("model", [None, 3, torch.nn.Linear(1, 1)])
def test_what_is_no_model_is_refused(model, tiny_tokenizer):
    with pytest.raises(InvalidInputError, match="pass a hub id, a folder"):
        load_model(model, tokenizer=tiny_tokenizer)


def test_an_unknown_dtype_or_device_is_an_input_error(tiny_model_path):
    with pytest.raises(InvalidInputError, match="dtype 'float31' is unknown"):
        load_model(tiny_model_path, dtype="float31")
    with pytest.raises(InvalidInputError, match="try device='cpu'"):
        load_model(tiny_model_path, device="nowhere")


def test_a_folder_without_a_model_says_what_it_needs(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"a folder with config\.json and weights"):
        load_model(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\x10\0\0\0\0\0\0\0nothing of use here"])
def test_damaged_weights_are_said_to_be_unreadable(content, folder):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelNotFoundError, match="cannot load model"):
        load_model(folder)


def test_weights_that_lack_some_are_not_filled_up_with_random_numbers(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelNotFoundError, match=r"lack 1 weights, model\.layers\.1\.self_attn\.k_proj\.weight"
    ):
        load_model(folder, device="cpu")


def test_a_folder_without_a_tokenizer_asks_for_one(folder, tiny_tokenizer):
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(ModelNotFoundError, match="pass tokenizer="):
        load_model(folder, device="cpu")
    assert load_model(folder, tokenizer=tiny_tokenizer, device="cpu").tokenizer is tiny_tokenizer


def test_an_unknown_kind_of_model_is_said_to_be_unloadable(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no-such-model"}))
    with pytest.raises(ModelNotFoundError, match="cannot load model"):
        load_model(folder)


def test_an_adapter_that_cannot_be_loaded_is_named(folder):
    with pytest.raises((ModelNotFoundError, MissingDependencyError), match=f"adapter {folder / 'none'}"):
        load_model(folder, adapter=folder / "none", device="cpu")
