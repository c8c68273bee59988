"""What training leaves behind is served: the adapter, its record, the merged model, all weights."""

from __future__ import annotations

import copy
import json
import logging
import shutil

import architectures
import pytest
import torch
from conftest import byte_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_finetuning import folder, recipe_in  # noqa: F401 - a fixture

from rag_blockcache import BlockCache, Passage
from rag_blockcache.errors import InvalidInputError, ModelNotFoundError
from rag_blockcache.finetuning import finetune, lora_layers
from rag_blockcache.loading import load_model
from rag_blockcache.training_record import RECORD_FILE, TrainingRecord, weights_fingerprint

QUESTION, PASSAGES = "The mill?", [Passage("It is red.", title="mill"), Passage("It is blue.", title="desk")]


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("adapter") / "run"
    finetune(recipe_in(folder, out, steps=4, merge=True, base_name="tiny/colours"))
    return out


def logits(model, **options):
    with BlockCache(model, None, passage_format="plain", device="cpu", **options) as cache:
        return cache.first_logits(QUESTION, PASSAGES, policy="block")


def test_a_cache_with_the_adapter_chooses_blocks_and_one_without_repairs(run, folder):  # noqa: F811
    for adapter, policy in ((run, "block"), (None, "link-16+query-0.08")):
        with BlockCache(
            folder / "model", None, adapter=adapter, device="cpu", passage_format="plain"
        ) as cache:
            assert cache.model.is_block_fine_tuned == (adapter is not None)
            long = [Passage(f"It is red. {number}" * 30) for number in range(3)]
            answer = cache.generate(QUESTION, long, max_new_tokens=1)
            assert answer.policy == policy


def test_an_adapter_that_saw_stand_ins_is_served_behind_them(folder, tmp_path):  # noqa: F811
    for seen in ("themselves", "stand-ins"):
        finetune(recipe_in(folder, tmp_path / seen, steps=1, blocks_see=seen))
        with BlockCache(folder / "model", None, adapter=tmp_path / seen, device="cpu") as cache:
            assert cache.blocks_see == seen
            assert cache.generate(QUESTION, PASSAGES, max_new_tokens=1).policy == "block"
        record = json.loads((tmp_path / seen / "rag_blockcache.json").read_text())
        assert record["blocks_see"] == seen
    del record["blocks_see"]  # as it was before there was a choice
    (tmp_path / seen / "rag_blockcache.json").write_text(json.dumps(record))
    with BlockCache(folder / "model", None, adapter=tmp_path / seen, device="cpu") as cache:
        assert cache.blocks_see == "themselves"


def test_the_adapter_changes_answers_and_the_names_of_blocks(run, folder):  # noqa: F811
    assert not torch.allclose(logits(folder / "model"), logits(folder / "model", adapter=run), atol=0.1)
    names = set()
    for adapter in (run, None):
        with BlockCache(folder / "model", None, adapter=adapter, device="cpu") as cache:
            names.add(cache.block("It is red.").block_id)
    assert len(names) == 2


def test_the_adapter_gives_what_was_trained(run, folder):  # noqa: F811
    [checkpoint] = (run / "checkpoints").glob("checkpoint-4")
    trained, saved = (load_file(path / "adapter_model.safetensors") for path in (checkpoint, run))
    assert trained.keys() == saved.keys()
    for name, weight in saved.items():
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(weight.float(), trained[name], rtol=0.01, atol=1e-6)


def test_the_merged_model_gives_the_logits_of_base_and_adapter(run, folder):  # noqa: F811
    apart, merged = logits(folder / "model", adapter=run), logits(run / "merged", dtype="float32")
    assert float((apart - merged).norm() / apart.norm()) < 0.02  # merged weights are rounded to bfloat16
    model = load_model(run / "merged", device="cpu")
    assert model.dtype == torch.bfloat16
    assert model.is_block_fine_tuned
    assert model.config.block_fine_tuned  # said by the configuration too, should the record get lost


def test_a_complete_run_can_be_merged_later(folder, tmp_path):  # noqa: F811
    finetune(recipe_in(folder, tmp_path / "run", steps=1))
    assert not (tmp_path / "run" / "merged").exists()
    finetune(recipe_in(folder, tmp_path / "run", steps=1, merge=True))
    assert load_model(tmp_path / "run" / "merged", device="cpu").is_block_fine_tuned


def test_all_weights_can_be_trained(folder, tmp_path):  # noqa: F811
    options = {"lora_rank": 0, "learning_rate": 1e-3, "steps": 3}
    out = tmp_path / "run"
    report = finetune(recipe_in(folder, out, **options))
    assert report.history[-1]["loss"] < report.history[0]["loss"]
    model = load_model(out, device="cpu")
    assert model.is_block_fine_tuned
    assert model.dtype == torch.bfloat16
    base = load_model(folder / "model", device="cpu")
    assert not torch.allclose(model.network.lm_head.weight.float(), base.network.lm_head.weight)
    assert logits(out, dtype="float32").isfinite().all()
    assert "rag_blockcache" not in (out / "config.json").read_text()  # the attention of training


def test_the_control_is_not_called_block_fine_tuned(folder, tmp_path):  # noqa: F811
    finetune(recipe_in(folder, tmp_path / "run", steps=1, modes="full"))
    model = load_model(folder / "model", adapter=tmp_path / "run", device="cpu")
    assert not model.is_block_fine_tuned
    assert model.training_record.recipe["modes"] == "full"


def test_the_record_says_what_was_trained_on_what(run, folder):  # noqa: F811
    record = TrainingRecord.read(run / RECORD_FILE)
    assert (record.base_model, record.passage_format, record.seed) == ("tiny/colours", "plain", 0)
    assert record.base_fingerprint == weights_fingerprint(load_model(folder / "model", device="cpu").network)
    [file] = record.data
    assert (file["name"], file["num_examples"]) == ("train.jsonl", 200)
    assert file["num_samples"] == record.totals["samples"] > 0
    assert record.recipe["steps"] == record.totals["steps"] == 4
    assert json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny/colours"


def test_weights_are_known_again_in_another_dtype_and_not_after_a_change():
    network = architectures.build("Llama", {}, torch.bfloat16)
    name = weights_fingerprint(network)
    assert weights_fingerprint(network.float()) == name
    with torch.no_grad():
        network.lm_head.weight[0, 0] += 1
    assert weights_fingerprint(network) != name


def test_an_adapter_over_other_weights_is_warned_of(run, tmp_path, caplog):
    other = architectures.build("Llama", {"max_position_embeddings": 2048})
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    other.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="rag_blockcache"):
        load_model(tmp_path, adapter=run, device="cpu")
    assert "other weights of tiny/colours" in caplog.text


def test_an_adapter_over_its_own_base_is_not_warned_of(run, folder, caplog):  # noqa: F811
    with caplog.at_level(logging.WARNING, logger="rag_blockcache"):
        load_model(folder / "model", adapter=run, dtype="bfloat16", device="cpu")
    assert caplog.text == ""


def test_an_adapter_that_does_not_fit_is_an_input_error(run, tmp_path):
    architectures.build("Llama", {"hidden_size": 32, "head_dim": 16}).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InvalidInputError, match="the model it was made for"):
        load_model(tmp_path, adapter=run, device="cpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read"), ("[]", "cannot be read"), ('{"format": 1}', "cannot be read"),
     ('{"format": 9}', "has format 9, this version knows 1")],
)  # fmt: skip
def test_a_record_that_cannot_be_used_is_named(content, message, run, folder, tmp_path):  # noqa: F811
    adapter = shutil.copytree(
        run, tmp_path / "adapter", ignore=shutil.ignore_patterns("merged", "checkpoints")
    )
    (adapter / RECORD_FILE).write_text(content)
    with pytest.raises(ModelNotFoundError, match=message):
        load_model(folder / "model", adapter=adapter, device="cpu")


def test_an_adapter_without_a_record_is_loaded_as_any_other(run, folder, tmp_path):  # noqa: F811
    adapter = shutil.copytree(
        run, tmp_path / "adapter", ignore=shutil.ignore_patterns("merged", "checkpoints")
    )
    (adapter / RECORD_FILE).unlink()
    model = load_model(folder / "model", adapter=adapter, device="cpu")
    assert not model.is_block_fine_tuned
    assert model.training_record is None


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning", "ignore:`lora_bias=True`")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["plain", "dora", "biased"])
def test_fused_layers_compute_what_peft_computes_forwards_and_backwards(kind, dropout):
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        lora_dropout=dropout,
        target_modules="all-linear",
        use_dora=kind == "dora",
        lora_bias=kind == "biased",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    model = get_peft_model(architectures.build("Llama", {}), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    fused = copy.deepcopy(model)
    lora_layers.fuse(fused)
    found = []
    for each in (model, fused):
        torch.manual_seed(1)  # of dropout
        loss = each(input_ids=torch.arange(2, 30)[None]).logits.log_softmax(-1)[..., 5].sum()
        loss.backward()
        with each.disable_adapter():
            bare = each(input_ids=torch.arange(2, 30)[None]).logits
        found.append((loss, bare, [w.grad for w in each.parameters() if w.grad is not None]))
    (loss, bare, gradients), (fused_loss, fused_bare, fused_gradients) = found
    assert torch.equal(bare, fused_bare)
    assert torch.allclose(loss, fused_loss, rtol=1e-5)
    assert len(gradients) == len(fused_gradients) > 0
    for gradient, other in zip(gradients, fused_gradients, strict=True):
        assert torch.allclose(gradient, other, rtol=1e-3, atol=1e-5)
    if kind == "biased":
        return  # layers without a bias of their own cannot take one in
    merged, fused_merged = (each.merge_and_unload() for each in (model, fused))
    for weight, other in zip(merged.parameters(), fused_merged.parameters(), strict=True):
        assert torch.equal(weight, other)
