"""Block fine-tuning computes what serving computes, learns, and goes on where it was killed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys

import architectures
import numpy as np
import pytest
import torch
from conftest import byte_tokenizer
from safetensors.torch import load_file
from torch.nn.attention.flex_attention import flex_attention

from rag_blockcache import BlockCache, block_cache
from rag_blockcache.errors import InvalidInputError
from rag_blockcache.finetuning import finetune, mask, samples
from rag_blockcache.finetuning.companions import Companions, SharedPassages
from rag_blockcache.finetuning.examples import QuestionExample, TextExample
from rag_blockcache.finetuning.held_out import measure
from rag_blockcache.finetuning.mask import Masks
from rag_blockcache.finetuning.network import _compile_layers, choose_attention, layers_of
from rag_blockcache.finetuning.packing import IGNORED, Row, collate, part_of
from rag_blockcache.finetuning.recipe import Recipe
from rag_blockcache.finetuning.samples import Sample, SampleMaker
from rag_blockcache.finetuning.trainer import (
    distance_of_states,
    distance_to,
    kinds_of,
    learned_logits,
    learned_places,
    of_branches,
    recorded_states,
)
from rag_blockcache.passage_format import PassageFormat
from rag_blockcache.passages import Passage

FLOAT32 = 1e-4
# Short, so that the last token reaches the passages through the small windows of the tiny models.
SHORT = PassageFormat("short", "Read.\n", "{title}: {text}\n", "{text}\n", "{question}")
EXAMPLES = [
    QuestionExample(
        "Who?", (Passage("Ada wrote it."), Passage("It is long.", title="A mill")), (True, False), "Ada"
    ),
    QuestionExample("Where?", (Passage("Printed in Paris."),), (True,), "in Paris"),
    QuestionExample(
        "When?", tuple(Passage(text) for text in ("In 1843.", "b", "In May.")), (True,) * 3, "1843"
    ),
]
CLOSING = (4,)  # <|im_end|>


def maker_for(tokenizer, **options):
    return SampleMaker(
        tokenizer,
        CLOSING,
        **{"passage_format": SHORT, "preamble": None, "min_passages": 1, "max_tokens": 2000, **options},
    )


def row_of(tokenizer, modes, examples=EXAMPLES, **options):
    maker = maker_for(tokenizer, **options)
    return Row.of([maker.make(example, mode, None) for example, mode in zip(examples, modes, strict=True)])


@torch.no_grad()
def row_logits(network, row, masks, padded_to=None):
    """Return the logits of each sample's answer tokens in a row."""
    batch = collate([row], padded_to=padded_to)
    logits = learned_logits(network, batch, masks)
    owners = batch["sample_ids"][0, 1:][learned_places(batch)]
    return [logits[owners == owner] for owner in range(row.num_samples)]


def distance(one, other):
    return float((one - other).norm() / other.norm())


@pytest.fixture
def short_stand_ins(monkeypatch):
    """Stand-ins that the small windows of tiny models reach."""
    given = (Passage("It rained.", title="S"),)
    for where in (block_cache, samples):
        monkeypatch.setattr(where, "STAND_INS", given)


NAMES = [
    "llama",
    "llama-multi-query",
    "mistral-window",
    "qwen2-window",
    "gemma2",
    "gemma3",
    "cohere2",
    "glm",
    "granite",
]


@pytest.mark.parametrize("name", [*NAMES, "phi3-partial", "smollm3", "olmo2", "mixtral"])
@pytest.mark.parametrize("padded_to", [None, 1024], ids=["unpadded", "padded"])
@pytest.mark.parametrize("seen", ["themselves", "stand-ins"])
def test_training_computes_the_logits_that_serving_computes(
    name, padded_to, seen, short_stand_ins, tiny_tokenizer
):
    network = architectures.accepted(name)
    cache = BlockCache(network, None, tokenizer=tiny_tokenizer, passage_format=SHORT, blocks_see=seen)
    masks, modes = choose_attention(cache.model, "sdpa"), ("block", "full", "block")
    packed = row_logits(network, row_of(tiny_tokenizer, modes, blocks_see=seen), masks, padded_to)
    for example, mode, logits in zip(EXAMPLES, modes, packed, strict=True):
        asked = (example.question, example.passages)
        assert distance(logits[0], cache.first_logits(*asked, policy=mode)) < FLOAT32
        said = (*cache.prompt.text_tokens(example.answer), *CLOSING)
        scores = logits.log_softmax(-1).gather(1, torch.tensor(said)[:, None])[:, 0]
        torch.testing.assert_close(scores, cache.score(*asked, said, policy=mode), atol=FLOAT32, rtol=FLOAT32)
        alone = row_logits(network, row_of(tiny_tokenizer, (mode,), [example], blocks_see=seen), masks)
        assert distance(logits, alone[0]) < FLOAT32


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", ["sdpa", "flex"])
@pytest.mark.parametrize("mode", ["block", "full"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_questions_behind_the_same_passages_do_not_see_one_another(
    name, mode, kind, monkeypatch, tiny_tokenizer
):
    network = architectures.accepted(name)
    cache = BlockCache(network, None, tokenizer=tiny_tokenizer, passage_format=SHORT, blocks_see="themselves")
    masks = choose_attention(cache.model, "sdpa")
    passages = EXAMPLES[2].passages
    asked = [
        QuestionExample(question, passages, (True,) * 3, answer)
        for question, answer in (("When?", "1843"), ("Why?", "b, of course"), ("Which month?", "May"))
    ]
    alone = [row_logits(network, row_of(tiny_tokenizer, (mode,), [each]), masks)[0] for each in asked]
    companions = Companions(SharedPassages(asked), 9, random.Random(0))
    several = maker_for(tiny_tokenizer).make(asked[0], mode, None, companions)
    assert several.num_questions == 3
    if kind == "flex":
        monkeypatch.setattr(mask, "_compiled", lambda: flex_attention)
        mask.register()
        network.set_attn_implementation(mask.FLEX)
        masks = Masks(masks._windows, "flex")
    row = Row.of([maker_for(tiny_tokenizer).make(EXAMPLES[0], "block", None), several])
    batch = collate([row], padded_to=1024)
    logits = learned_logits(network, batch, masks)
    places = learned_places(batch)
    owners = batch["branch_ids"][0, 1:][places] * batch["sample_ids"][0, 1:][places]
    found = [logits[owners == branch] for branch in (1, 2, 3)]
    assert all(
        any(each.shape == other.shape and distance(each, other) < FLOAT32 for each in found)
        for other in alone
    )
    assert distance(found[0], alone[0]) < FLOAT32


def test_the_two_modes_differ_where_there_are_several_passages(tiny_tokenizer):
    network = architectures.accepted("llama")
    masks = Masks({"full_attention": None}, "boolean")
    block, full = (
        row_logits(network, row_of(tiny_tokenizer, (mode,) * 3), masks) for mode in ("block", "full")
    )
    assert distance(block[2], full[2]) > 100 * FLOAT32


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seen", ["themselves", "stand-ins"])
def test_flex_attention_gives_the_logits_of_a_dense_mask(
    name, seen, short_stand_ins, monkeypatch, tiny_tokenizer
):
    monkeypatch.setattr(mask, "_compiled", lambda: flex_attention)  # the compiled kernel needs a GPU to train
    network = architectures.accepted(name)
    cache = BlockCache(network, None, tokenizer=tiny_tokenizer, passage_format=SHORT, blocks_see="themselves")
    dense = choose_attention(cache.model, "sdpa")
    row = row_of(tiny_tokenizer, ("block", "full", "block"), blocks_see=seen)
    expected = row_logits(network, row, dense)
    mask.register()
    network.set_attn_implementation(mask.FLEX)
    flexible = Masks(dense._windows, "flex")
    for given, wanted in zip(row_logits(network, row, flexible, 512), expected, strict=True):
        assert distance(given, wanted) < FLOAT32


def test_what_is_measured_is_what_serving_would_say(tiny_tokenizer):
    network = architectures.accepted("llama")
    cache = BlockCache(network, None, tokenizer=tiny_tokenizer, passage_format=SHORT, blocks_see="themselves")

    def likeliest(question, mode, passages=EXAMPLES[2].passages):
        return int(cache.first_logits(question, passages, policy=mode).argmax())

    question = next(
        f"No. {n}?" for n in range(99) if likeliest(f"No. {n}?", "block") != likeliest(f"No. {n}?", "full")
    )
    examples = [*EXAMPLES[:2], dataclasses.replace(EXAMPLES[2], question=question)]
    expected, samples = {"eval_exact_block": 1 / 3, "eval_exact_full": 0.0}, []
    for mode in ("block", "full"):
        made = [maker_for(tiny_tokenizer).make(example, mode, None) for example in examples]
        # The answer to the last one is a token, the one that greedy decoding gives over blocks.
        last = made[2]
        kept = slice(int(last.is_learned.argmax()) + 1)
        token_ids = last.token_ids[kept].copy()
        token_ids[-1] = likeliest(question, "block")
        made[2] = Sample(
            token_ids,
            *(each[kept] for each in (last.positions, last.block_ids, last.branch_ids, last.is_learned)),
            mode,
        )
        # That to the first one begins with such a token, and goes on with others.
        begun = likeliest(examples[0].question, mode, examples[0].passages)
        made[0].token_ids[made[0].is_learned.argmax()] = begun
        said = [sample.token_ids[sample.is_learned].tolist() for sample in made]
        scores = [
            cache.score(example.question, example.passages, answer, policy=mode)
            for example, answer in zip(examples, said, strict=True)
        ]
        expected[f"eval_loss_{mode}"] = -float(torch.cat(scores).mean())
        samples += made
    rows = [Row.of(samples[:4]), Row.of(samples[4:])]
    measured = measure(network, rows, choose_attention(cache.model, "sdpa"), torch.device("cpu"), None)
    assert measured == pytest.approx(expected, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_kv_heads", [3, 9])
def test_compiled_flex_attention_gives_logits_and_gradients_of_a_dense_mask(num_kv_heads, tiny_tokenizer):
    shape = {"num_attention_heads": 9, "num_key_value_heads": num_kv_heads, "hidden_size": 288}
    found = []
    for is_flex in (False, True):
        network = architectures.build("Llama", {**shape, "max_position_embeddings": 2048}).cuda()
        mask.register()
        network.set_attn_implementation(mask.FLEX if is_flex else "sdpa")
        for modes in (("block", "full", "block"), ("full", "block", "block")):
            row = collate([row_of(tiny_tokenizer, modes)], padded_to=512 if is_flex else None)
            batch = {key: values.cuda() for key, values in row.items()}
            masks = Masks({"full_attention": None}, "flex" if is_flex else "boolean")
            logits = learned_logits(network, batch, masks)
            logits.log_softmax(-1).square().sum().backward()
            found.append(logits.detach())
        found.append(network.model.layers[0].self_attn.k_proj.weight.grad)
    for dense, flexible in zip(found[:3], found[3:], strict=True):
        assert distance(flexible, dense) < 1e-2  # TF32 in one of the two


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_layers_give_the_logits_and_gradients_of_those_that_are_not(short_stand_ins, tiny_tokenizer):
    shape = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 288}
    row = row_of(tiny_tokenizer, ("block", "full", "block"), blocks_see="stand-ins")
    batch = {key: values.cuda() for key, values in collate([row], padded_to=512).items()}
    masks, found = Masks({"full_attention": None}, "flex"), []
    for is_compiled in (False, True):
        network = architectures.build("Llama", {**shape, "max_position_embeddings": 2048}).cuda()
        mask.register()
        network.set_attn_implementation(mask.FLEX)
        if is_compiled:
            _compile_layers(network, masks)
        logits = learned_logits(network, batch, masks)
        logits.log_softmax(-1).square().sum().backward()
        found += [logits.detach(), network.model.layers[0].self_attn.k_proj.weight.grad]
    for plain, compiled in zip(found[:2], found[2:], strict=True):
        assert distance(compiled, plain) < 1e-2  # TF32


def test_only_answers_are_in_the_loss(tiny_tokenizer):
    row = row_of(tiny_tokenizer, ("block", "full", "block"))
    for index, example in enumerate(EXAMPLES):
        learned = row.labels[(row.sample_ids == index) & (row.labels != IGNORED)]
        assert tiny_tokenizer.decode(learned) == example.answer + "<|im_end|>"
    batch = collate([row])
    tokens = batch["input_ids"][0]
    assert torch.equal(tokens[learned_places(batch) + 1], batch["labels"][batch["labels"] != IGNORED])


@pytest.mark.parametrize("multiple_of", [1, 64])
def test_a_part_of_a_row_gives_the_logits_that_it_gives_in_the_whole(multiple_of, tiny_tokenizer):
    network = architectures.accepted("qwen2-window")
    cache = BlockCache(network, None, tokenizer=tiny_tokenizer, passage_format=SHORT, blocks_see="themselves")
    masks, maker = choose_attention(cache.model, "sdpa"), maker_for(tiny_tokenizer)
    examples = [EXAMPLES[0], TextExample("The mill is old."), EXAMPLES[1], TextExample("So is the wheel.")]
    batch = collate([Row.of([maker.make(example, "block", None) for example in examples])], padded_to=512)
    is_text = kinds_of(batch)["text"]
    part = part_of(batch, batch["is_text"][0].bool(), multiple_of=multiple_of)
    assert part["input_ids"].shape[1] % multiple_of == 0
    with torch.no_grad():
        whole = learned_logits(network, batch, masks)
        assert distance(learned_logits(network, part, masks), whole[is_text]) < FLOAT32


@pytest.mark.parametrize("name", ["llama", "qwen2-window"])
def test_a_teacher_never_sees_stand_ins(name, short_stand_ins, tiny_tokenizer):
    network = architectures.accepted(name)
    cache = BlockCache(network, None, tokenizer=tiny_tokenizer, passage_format=SHORT, blocks_see="stand-ins")
    masks = choose_attention(cache.model, "sdpa")
    expected = row_logits(network, row_of(tiny_tokenizer, ("full",) * 3), masks)
    row = row_of(tiny_tokenizer, ("block",) * 3, blocks_see="stand-ins")
    batch = collate([row])
    part = part_of(batch, batch["block_ids"][0] >= 0)
    assert part["input_ids"].shape[1] == len(row_of(tiny_tokenizer, ("full",) * 3).token_ids)
    with torch.no_grad():
        for given in (batch, part):  # they change nothing where they stand, and may be left out
            assert distance(learned_logits(network, given, masks, full=True), torch.cat(expected)) < FLOAT32
    assert distance(torch.cat(row_logits(network, row, masks)), torch.cat(expected)) > 100 * FLOAT32


def test_stand_ins_end_where_their_block_begins(short_stand_ins, tiny_tokenizer):
    sample = maker_for(tiny_tokenizer, blocks_see="stand-ins").make(EXAMPLES[2], "block", None)
    plain = maker_for(tiny_tokenizer).make(EXAMPLES[2], "block", None)
    is_own = sample.block_ids >= 0
    assert np.array_equal(sample.token_ids[is_own], plain.token_ids)
    assert np.array_equal(sample.positions[is_own], plain.positions)
    assert np.array_equal(sample.block_ids[is_own], plain.block_ids)
    for block in np.unique(sample.block_ids[sample.block_ids > 0]):
        before, own = (sample.positions[sample.block_ids == sign * block] for sign in (-1, 1))
        assert before[-1] == own[0] - 1
    assert not sample.is_learned[~is_own].any()
    for limits, fits in (
        ({"max_tokens": len(plain.token_ids)}, True),
        ({"row_tokens": len(plain.token_ids)}, False),
    ):
        maker = maker_for(
            tiny_tokenizer, blocks_see="stand-ins", **limits
        )  # of a row they take room, of a prompt none
        assert (maker.make(EXAMPLES[2], "block", None) is not None) == fits


def test_positions_begin_again_with_each_sample_and_are_those_of_its_prompt(tiny_tokenizer):
    row = row_of(tiny_tokenizer, ("block", "full", "block"))
    for index in range(3):
        positions = row.positions[row.sample_ids == index]
        assert positions.tolist() == list(range(len(positions)))


def test_distance_to_a_teacher_is_none_to_itself_and_positive_to_others():
    torch.manual_seed(0)
    one, other = torch.randn(2, 5, 7)
    assert distance_to(one, one).abs().max() < 1e-6
    expected = torch.distributions.kl_divergence(
        *(torch.distributions.Categorical(logits=each) for each in (one, other))
    )
    torch.testing.assert_close(distance_to(one, other), expected)


# Whole runs, on a model of three layers that learns to read a colour off a passage

COLOURS = ["red", "green", "blue", "white"]


def write_colours(path, num_examples, seed):
    source = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_examples):
            things = source.sample(["mill", "note", "wheel", "desk"], 3)
            passages = [{"title": thing, "text": f"It is {source.choice(COLOURS)}."} for thing in things]
            asked = source.randrange(3)
            for index, passage in enumerate(passages):
                passage["is_gold"] = index == asked
            answer = passages[asked]["text"].split()[-1].strip(".")
            file.write(
                json.dumps({"question": f"The {things[asked]}?", "answers": [answer], "passages": passages})
                + "\n"
            )
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetuning")
    architectures.build("Llama", {"max_position_embeddings": 2048}).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    write_colours(folder / "train.jsonl", 200, seed=1)
    write_colours(folder / "dev.jsonl", 10, seed=2)
    return folder


def recipe_in(folder, out, **options):
    usual = {
        "model": str(folder / "model"),
        "data": [str(folder / "train.jsonl")],
        "passage_format": "plain",
        "min_passages": 1,
        "steps": 6,
        "row_tokens": 512,
        "rows_per_step": 1,
        "learning_rate": 5e-3,
        "warmup_steps": 1,
        "lora_rank": 4,
        "precision": "float32",
        "log_every": 1,
        "save_every": 2,
        "eval_every": 3,
    }
    return Recipe(out=str(out), **{**usual, **options})


def weights_in(out):
    return load_file(out / "adapter_model.safetensors")


def test_a_run_learns_in_both_modes_and_says_so(folder, tmp_path):
    out = tmp_path / "run"
    recipe = recipe_in(
        folder, out, steps=30, eval_data=[str(folder / "dev.jsonl")], eval_every=15, log_every=10
    )
    lines = []
    report = finetune(recipe, tell=lines.append)
    for mode in ("block", "full"):
        curve = [entry[f"eval_loss_{mode}"] for entry in report.history if f"eval_loss_{mode}" in entry]
        assert len(curve) == 3  # before, in the middle, after
        assert curve[-1] < 0.5 * curve[0]
        trained = [entry[f"loss_{mode}"] for entry in report.history if f"loss_{mode}" in entry]
        assert trained[-1] < 0.5 * trained[0]
    assert any("step 30 of 30" in line for line in lines)
    assert "<svg" in (out / "training.svg").read_text()
    assert json.loads((out / "training.json").read_text())["history"] == list(report.history)
    card = (out / "README.md").read_text()
    assert report.record.data[0]["sha256"][:16] in card
    assert str(folder) not in "".join(path.read_text() for path in out.glob("*.[jmR]*[ndD]"))


def test_a_finished_run_is_not_repeated(folder, tmp_path):
    recipe = recipe_in(folder, tmp_path / "run", steps=2)
    first = finetune(recipe)
    before = (tmp_path / "run" / "adapter_model.safetensors").stat().st_mtime_ns
    assert finetune(recipe) == first
    assert (tmp_path / "run" / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_a_folder_of_another_run_or_of_none_is_refused(folder, tmp_path):
    finetune(recipe_in(folder, tmp_path / "run", steps=1))
    with pytest.raises(InvalidInputError, match=r"other options \(learning_rate, seed\)"):
        finetune(recipe_in(folder, tmp_path / "run", steps=1, seed=3, learning_rate=0.1))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(InvalidInputError, match="not of a training run"):
        finetune(recipe_in(folder, tmp_path / "other"))


_KILLED = """
import os, signal, sys
from rag_blockcache.finetuning import trainer
from rag_blockcache.finetuning import finetune
from rag_blockcache.finetuning.recipe import Recipe

seen = 0
real = trainer.BlockTrainer.compute_loss

def until_killed(self, model, inputs, *args, **options):
    global seen
    seen += 1
    if seen == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, model, inputs, *args, **options)

trainer.BlockTrainer.compute_loss = until_killed
finetune(eval(sys.argv[1]))
"""


@pytest.mark.parametrize("damage", [False, True], ids=["complete-checkpoint", "half-written-checkpoint"])
def test_a_killed_run_goes_on_with_the_same_data_to_the_same_weights(damage, folder, tmp_path):
    options = {"lora_dropout": 0.1}  # random numbers must go on too
    straight = finetune(recipe_in(folder, tmp_path / "straight", **options))
    killed = recipe_in(folder, tmp_path / "killed", **options)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", _KILLED, repr(killed)], env=environment, capture_output=True, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-2000:]
    checkpoints = tmp_path / "killed" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    if damage:  # killed while it was written: its state is missing, and its weights are cut
        (checkpoints / "checkpoint-4" / "trainer_state.json").unlink()
        (checkpoints / "checkpoint-4" / "adapter_model.safetensors").write_bytes(b"cut")
    lines = []
    resumed = finetune(killed, tell=lines.append)
    steps = [line.partition(" of ")[0] for line in lines if line.startswith("step ")]
    assert steps == [f"step {step}" for step in range(3 if damage else 5, 7)]
    for (name, one), other in zip(
        weights_in(tmp_path / "straight").items(), weights_in(tmp_path / "killed").values(), strict=True
    ):
        # Threads may add up in another order, and steps of Adam are large where gradients are small.
        torch.testing.assert_close(
            one, other, rtol=0.02, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    losses = [[entry["loss"] for entry in report.history] for report in (straight, resumed)]
    torch.testing.assert_close(losses[0], losses[1])


def test_the_control_sees_the_same_tokens_under_full_attention_alone(folder, tmp_path):
    from rag_blockcache.finetuning.examples import read_data
    from rag_blockcache.finetuning.rows import training_rows

    found = {}
    for modes in ("block+full", "full"):
        recipe = recipe_in(folder, tmp_path, modes=modes)
        files = [read_data(folder / "train.jsonl")]
        found[modes] = training_rows(recipe, files, byte_tokenizer(), CLOSING, 512).rows
    for mixed, control in zip(found["block+full"], found["full"], strict=True):
        assert np.array_equal(mixed.token_ids, control.token_ids)
        assert np.array_equal(mixed.labels, control.labels)
        assert not control.block_ids.any()
        assert mixed.block_ids.any()
    shares = [row.is_block_mode[row.labels != IGNORED].mean() for row in found["block+full"]]
    assert 0.3 < sum(shares) / len(shares) < 0.7


def test_several_processes_make_the_rows_of_one(folder, tmp_path):
    from rag_blockcache.finetuning.examples import read_data
    from rag_blockcache.finetuning.rows import training_rows

    files = [read_data(folder / "train.jsonl")]
    rows = [
        training_rows(
            recipe_in(folder, tmp_path, workers=workers, steps=20), files, byte_tokenizer(), CLOSING, 512
        ).rows
        for workers in (1, 2)
    ]
    assert len(rows[0]) == len(rows[1]) == 20
    for one, other in zip(*rows, strict=True):
        for field in dataclasses.fields(one):
            assert np.array_equal(getattr(one, field.name), getattr(other, field.name))


@pytest.mark.parametrize("teacher", ["base", "itself"])
def test_distillation_pulls_towards_the_teacher(teacher, folder, tmp_path):
    recipe = recipe_in(
        folder,
        tmp_path / "run",
        distill=1.0,
        teacher=teacher,
        modes="block",
        learning_rate=1e-3,
        rows_per_step=2,
        steps=8,
    )
    report = finetune(recipe)
    losses = [entry["loss"] for entry in report.history]
    assert losses[-1] < losses[0]
    # Gold answers have no part in it: those of a random model stay as unlikely as they were.
    assert report.history[-1]["loss_block"] > 0.8 * report.history[0]["loss_block"]


def test_a_base_teacher_in_full_mode_has_nothing_to_teach_at_first(folder, tmp_path):
    report = finetune(recipe_in(folder, tmp_path / "run", distill=1.0, modes="full", steps=1))
    assert abs(report.history[0]["loss"]) < 1e-5


def test_states_have_no_distance_to_themselves_and_that_of_their_mean_is_one():
    source = torch.Generator().manual_seed(0)
    told = [torch.randn(200, 6, generator=source) * torch.tensor([1, 1, 1, 1, 1, 300]) for _ in range(3)]
    assert distance_of_states(told, told) == 0
    means = [each.mean(0, keepdim=True).expand_as(each) for each in told]
    assert distance_of_states(told, means).item() == pytest.approx(1, rel=1e-5)
    off = [each.clone() for each in told]
    off[1][:, 5] = off[1][:, 5].mean()  # a large dimension in one layer of three weighs what a small one does
    assert distance_of_states(told, off).item() == pytest.approx(1 / 18, rel=1e-5)


def test_matching_states_teaches_blocks_what_full_attention_computes(folder, tmp_path):
    first = tmp_path / "first"
    finetune(recipe_in(folder, first, modes="full", steps=3, learning_rate=1e-2))
    options = {"start_from": str(first), "match_states": 1.0, "teacher": "start"}
    full = finetune(recipe_in(folder, tmp_path / "full", modes="full", steps=1, **options))
    assert abs(full.history[0]["loss_states"]) < 1e-8  # they are those of its teacher
    options |= {"modes": "block", "steps": 12, "rows_per_step": 2, "learning_rate": 1e-3, "distill": 1.0}
    blocks = finetune(recipe_in(folder, tmp_path / "blocks", **options))
    distances = [entry["loss_states"] for entry in blocks.history if "loss_states" in entry]
    assert len(distances) == 12
    assert distances[0] > 1e-4
    assert distances[-1] < 0.7 * distances[0]


@torch.no_grad()
def test_matched_states_are_those_of_questions_and_answers(short_stand_ins, tiny_tokenizer):
    network = architectures.accepted("llama")
    masks = Masks({"full_attention": None}, "boolean")
    layers, found = layers_of(network), []
    for modes in (("full",) * 3, ("block",) * 3):
        examples = [EXAMPLES[0], TextExample("The mill is old."), EXAMPLES[1]]
        batch = collate([row_of(tiny_tokenizer, modes, examples, blocks_see="stand-ins")], padded_to=512)
        with recorded_states(layers) as states:
            learned_logits(network, batch, masks, full=True)
        assert len(states) == len(layers) == network.config.num_hidden_layers
        found.append(of_branches(batch, states))
    learned_logits(network, batch, masks)
    assert len(states) == len(layers)  # nothing is recorded behind the block
    num_tokens = sum(
        len(tiny_tokenizer(f"{example.question}{example.answer}").input_ids) for example in EXAMPLES[:2]
    )
    for full, block in zip(*found, strict=True):  # stand-ins and text are not among them
        assert full.shape == block.shape
        assert full.shape[0] >= num_tokens
        assert distance(block, full) < FLOAT32


def test_training_goes_on_from_an_adapter_which_teaches_unchanged(folder, tmp_path):
    first = tmp_path / "first"
    finetune(recipe_in(folder, first, modes="full", steps=3, learning_rate=1e-2))
    options = {"start_from": str(first), "distill": 1.0, "teacher": "start", "steps": 4, "save_every": 2}
    report = finetune(recipe_in(folder, tmp_path / "again", modes="full", **options))
    assert abs(report.history[0]["loss"]) < 1e-5  # it says what its teacher says
    assert report.record.recipe["start_from"] == "first"
    before, after = weights_in(first), weights_in(tmp_path / "again")
    assert before.keys() == after.keys()
    blocks = finetune(recipe_in(folder, tmp_path / "blocks", modes="block", **options))
    assert blocks.history[0]["loss"] > 1e-3  # over blocks it does not
    assert any(not torch.equal(before[name], weights_in(tmp_path / "blocks")[name]) for name in before)


def test_an_adapter_of_another_training_teaches(folder, tmp_path):
    first, teacher = tmp_path / "first", tmp_path / "teacher"
    finetune(recipe_in(folder, first, modes="full", steps=2))
    finetune(recipe_in(folder, teacher, modes="full", steps=6, learning_rate=1e-2, lora_rank=2, seed=1))
    options = {"start_from": str(first), "distill": 1.0, "modes": "full", "steps": 8}
    by_name = finetune(recipe_in(folder, tmp_path / "name", teacher="start", **options))
    by_path = finetune(recipe_in(folder, tmp_path / "path", teacher=str(first), **options))
    assert [entry.get("loss") for entry in by_name.history] == [
        entry.get("loss") for entry in by_path.history
    ]

    taught = finetune(
        recipe_in(folder, tmp_path / "taught", teacher=str(teacher), learning_rate=1e-2, **options)
    )
    losses = [entry["loss"] for entry in taught.history]
    assert losses[0] > 1e-3
    assert losses[-1] < losses[0]
    assert taught.record.recipe["teacher"] == "teacher"
    run = json.loads((tmp_path / "taught" / "run.json").read_text())
    weights = (teacher / "adapter_model.safetensors").read_bytes()
    assert run["teacher_sha256"] == hashlib.sha256(weights).hexdigest()
    assert sorted(path.name for path in (tmp_path / "taught").iterdir() if path.is_dir()) == ["checkpoints"]


def test_a_run_that_started_from_an_adapter_and_was_killed_gives_the_weights_of_one_that_was_not(
    folder, tmp_path
):
    finetune(recipe_in(folder, tmp_path / "first", modes="full", steps=2))
    options = {"start_from": str(tmp_path / "first"), "distill": 0.5, "teacher": "start", "save_every": 2}
    recipe = recipe_in(folder, tmp_path / "whole", steps=4, **options)
    finetune(recipe)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for path in (tmp_path / "killed").iterdir():
        if path.name not in ("checkpoints", "run.json"):
            path.unlink()
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "checkpoint-4")
    finetune(dataclasses.replace(recipe, out=str(tmp_path / "killed")))
    for name, weight in weights_in(tmp_path / "whole").items():
        assert torch.equal(weight, weights_in(tmp_path / "killed")[name]), name


def test_a_run_knows_the_weights_that_it_started_from(folder, tmp_path, caplog):
    first = tmp_path / "first"
    finetune(recipe_in(folder, first, modes="full", steps=1))
    recipe = recipe_in(folder, tmp_path / "run", steps=2, start_from=str(first))
    finetune(recipe)
    assert "other weights" not in caplog.text
    finetune(recipe)  # is complete
    finetune(recipe_in(folder, tmp_path / "other", modes="full", steps=1, seed=1))
    shutil.copy(tmp_path / "other" / "adapter_model.safetensors", first)
    with pytest.raises(InvalidInputError, match="other options \\(start_from_sha256\\)"):
        finetune(recipe)
    record = json.loads((first / "rag_blockcache.json").read_text())
    (first / "rag_blockcache.json").write_text(json.dumps(record | {"base_fingerprint": "0" * 32}))
    finetune(recipe_in(folder, tmp_path / "again", steps=1, start_from=str(first)))
    assert "the adapter was trained on other weights" in caplog.text


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"teacher": "start", "distill": 0.5}, "nothing to start from"),
        ({"start_from": "nowhere"}, "cannot start from nowhere"),
        ({"start_from": "nowhere", "lora_rank": 0}, "no adapter"),
        ({"teacher": "nowhere", "distill": 0.5}, "no one can teach as nowhere"),
        ({"teacher": "nowhere", "distill": 0.5, "lora_rank": 0}, "'nowhere' cannot teach"),
        ({"teacher": ""}, "teacher is empty"),
    ],
)
def test_an_adapter_that_training_cannot_use_is_an_error(options, problem, folder, tmp_path):
    with pytest.raises(InvalidInputError, match=problem):
        finetune(recipe_in(folder, tmp_path / "run", **options))


def test_steps_of_several_rows_are_averaged_over_all_their_answer_tokens(folder, tmp_path):
    report = finetune(recipe_in(folder, tmp_path / "run", rows_per_step=3, steps=2))
    first = report.history[0]
    parts = [first["loss_block"], first["loss_full"]]
    assert min(parts) <= first["loss"] <= max(parts)


def test_general_text_is_kept_as_the_base_says_it_and_learned_where_there_is_no_base(folder, tmp_path):
    rows = [json.dumps({"text": f"The {word} stands by the {word}."}) for word in ("mill", "desk", "wheel")]
    (folder / "text.jsonl").write_text("\n".join(rows), encoding="utf-8")
    questions, text = (str(folder / f"{name}.jsonl") for name in ("train", "text"))
    usual = {"data": [questions, text], "balance": 0.0, "eval_data": [text], "steps": 20, "eval_every": 5}

    def drift(out, **options):
        report = finetune(recipe_in(folder, tmp_path / out, **{**usual, **options}))
        found = [entry["eval_loss_text"] for entry in report.history if "eval_loss_text" in entry]
        return report, abs(found[-1] - found[0])

    kept, kept_drift = drift("kept")
    _, free_drift = drift("free", data=[questions])
    assert kept_drift < 0.5 * free_drift
    assert kept.history[1]["loss_text"] < 1e-5  # nothing has been learned yet, so nothing was lost
    assert kept.record.totals["text_tokens"] > 0
    assert "general text: loss of a token" in (tmp_path / "kept" / "README.md").read_text()
    learned, _ = drift("learned", lora_rank=0, steps=5)
    assert learned.history[1]["loss_text"] > 1


@pytest.mark.parametrize("taught", [{}, {"match_states": 1.0, "teacher": "base"}], ids=["plain", "states"])
@pytest.mark.parametrize(
    "options",
    [{"precision": "bfloat16"}, {"gradient_checkpointing": True}, {"compile_layers": True}],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch, compiling
def test_other_ways_to_compute_come_close(options, taught, folder, tmp_path):
    usual = finetune(recipe_in(folder, tmp_path / "usual", steps=2, **taught))
    other = finetune(recipe_in(folder, tmp_path / "other", steps=2, **taught, **options))
    for name in ("loss", "loss_states") if taught else ("loss",):
        assert other.history[-2][name] == pytest.approx(usual.history[-2][name], rel=0.02)


def test_an_evaluation_of_the_users_own_serves_the_model_in_training(folder, tmp_path):
    scores = []

    def evaluate(network, step):
        assert network.config._attn_implementation == "sdpa"
        assert not network.training
        cache = BlockCache(
            network, None, tokenizer=byte_tokenizer(), passage_format="plain", blocks_see="themselves"
        )
        score = cache.score("The mill?", [Passage("It is red.", title="mill")], "red", policy="block")
        scores.append(float(score.sum()))
        return {"eval_score": scores[-1]}

    report = finetune(recipe_in(folder, tmp_path / "run"), evaluate=evaluate)
    assert [entry["step"] for entry in report.history if "eval_score" in entry] == [0, 3, 6]
    assert [entry["step"] for entry in report.history if "loss" in entry] == list(range(1, 7))
    assert scores[-1] > scores[0]


def test_the_command_without_the_rest_of_the_command_line(folder, tmp_path):
    options = {"--model": folder / "model", "--out": tmp_path / "run", "--data": folder / "train.jsonl"}
    small = "--steps 1 --row_tokens 512 --rows_per_step 1 --log_every 1 --passage_format plain"
    command = [sys.executable, "-m", "rag_blockcache.finetuning", *small.split()]
    for name, value in options.items():
        command += [name, str(value)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.strip() == str(tmp_path / "run")
    assert "step 1 of 1" in ended.stderr
    wrong = subprocess.run([*command, "--balance", "3"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 1
    assert "balance is 3.0; it lies between 0 and 1" in wrong.stderr


def test_a_missing_library_is_named_with_the_extra_that_brings_it():
    for library in ("peft", "accelerate", "matplotlib"):
        program = (
            f"import sys; sys.modules[{library!r}] = None\n"
            "from rag_blockcache.finetuning import Recipe\n"
            "Recipe(model='m', out='o', data=['d'])\n"
            "from rag_blockcache.finetuning import finetune"
        )
        ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert f"fine-tuning needs {library}" in ended.stderr, ended.stderr[-1000:]
        assert "pip install 'rag_blockcache[finetune]'" in ended.stderr


def test_training_needs_neither_the_command_line_nor_the_index():
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, rag_blockcache.finetuning.__main__; "
            "print({'typer', 'faiss', 'sentence_transformers', 'diskcache'} & set(sys.modules))",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "set()"


def test_a_model_can_learn_from_its_own_answers_and_goes_on_with_those_it_gave(folder, tmp_path):
    path = tmp_path / "questions.jsonl"
    row = {"passages": ["It is red.", "It is blue."]}
    lines = [json.dumps({**row, "question": f"The mill {number}?"}) for number in range(6)]
    path.write_text("\n".join([*lines, json.dumps({**row, "question": "It?", "answer": "red"})]) + "\n")
    with pytest.raises(InvalidInputError, match="--own-answers"):
        finetune(recipe_in(folder, tmp_path / "run", data=[str(path)]))
    recipe = recipe_in(
        folder, tmp_path / "run", data=[str(path)], own_answers=True, distill=1.0, steps=2, row_tokens=1024
    )
    first = []
    report = finetune(recipe, tell=first.append)
    assert "answered 6 of 6 questions" in first
    answers = [json.loads(line) for line in (tmp_path / "run" / "own_answers.jsonl").read_text().splitlines()]
    assert len(answers) == 6
    cache = BlockCache(folder / "model", None, passage_format="plain", device="cpu")
    for number in range(6):
        [said] = [each["answer"] for each in answers if each["question"].endswith(f"/{number}")]
        expected = cache.generate(f"The mill {number}?", row["passages"], policy="full", max_new_tokens=128)
        assert said[:60] == expected.text.strip()[:60]  # the last bytes may be half a character
    assert report.record.recipe["own_answers"]

    (tmp_path / "again").mkdir()
    kept = (tmp_path / "run" / "own_answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "again" / "run.json").write_bytes((tmp_path / "run" / "run.json").read_bytes())
    (tmp_path / "again" / "own_answers.jsonl").write_text("".join(kept[:4]) + kept[4][:9])  # killed in a line
    second = []
    finetune(dataclasses.replace(recipe, out=str(tmp_path / "again")), tell=second.append)
    assert "answered 2 of 2 questions" in second
    for name, weight in weights_in(tmp_path / "run").items():
        assert torch.equal(weight, weights_in(tmp_path / "again")[name]), name


def test_a_model_that_teaches_itself_agrees_with_itself_and_one_taught_by_what_it_was_drifts(
    folder, tmp_path
):
    finetune(recipe_in(folder, tmp_path / "first", modes="full", steps=2))
    apart = {}
    for teacher in ("base", "itself", "start"):
        options = {"start_from": str(tmp_path / "first")} if teacher == "start" else {}
        out = tmp_path / teacher
        recipe = recipe_in(folder, out, distill=0.5, teacher=teacher, modes="full", steps=3, **options)
        last = finetune(recipe).history[-1]
        apart[teacher] = last["loss"] - 0.5 * last["loss_full"]  # half the distance to the teacher
    assert abs(apart["itself"]) < 1e-5
    assert apart["base"] > 1e-3
    assert apart["start"] > 1e-3


@pytest.mark.slow
@pytest.mark.real_weights
def test_training_computes_the_logits_that_serving_computes_on_real_weights(smollm2_path):
    texts = ["Ada Lovelace wrote the notes on the engine.", "The mill has a thousand columns.", "It rains."]
    example = QuestionExample("Who wrote the notes?", tuple(map(Passage, texts)), (True,) * 3, "Ada Lovelace")
    with BlockCache(smollm2_path, None, dtype="float32", device="cpu", blocks_see="themselves") as cache:
        made = SampleMaker(
            cache.tokenizer, (2,), passage_format="paper", preamble=None, min_passages=1, max_tokens=2000
        )
        modes = ("block", "full")
        served = [cache.first_logits(example.question, example.passages, policy=mode) for mode in modes]
        masks = choose_attention(cache.model, "sdpa")
        row = Row.of([made.make(example, mode, None) for mode in modes])
        for logits, expected in zip(row_logits(cache.model.network, row, masks), served, strict=True):
            assert distance(logits[0], expected) < FLOAT32
        assert distance(*served) > 100 * FLOAT32
