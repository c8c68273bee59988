"""What the library is compared with computes what it stands for, before anybody reads how long it takes."""

import copy
import importlib
import json
import sys
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
NUM_TOKENS = 1100  # the tokenizer of these tests makes one of each byte
FLOAT32 = 1e-4  # relative, on the logits
TEXT = "A name is bound to an object by an assignment. " * 100


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests/benchmarks")
    return importlib.import_module("bench_alternatives")


@pytest.fixture
def cache(tiny_model, tiny_tokenizer):
    from rag_blockcache import BlockCache

    with BlockCache(tiny_model, None, tokenizer=tiny_tokenizer, context_budget_bytes=0) as cache:
        yield cache


@pytest.fixture
def requests(bench, cache):
    passages = bench.fitting_passages(cache, bench.reference_text(), NUM_TOKENS, 130)
    return list(islice(bench.shuffled(cache, passages), 3))


@torch.inference_mode()
def greedy(way, request, number):
    """Return the first tokens of a way and their logits, decoded over its own cache."""
    logits, kept, _ = way.prefill(request)
    cache, tokens, found = copy.deepcopy(kept), [], []
    for _ in range(number):
        found.append(logits)
        tokens.append(int(logits.argmax()))
        logits = way.network(input_ids=torch.tensor([[tokens[-1]]]), past_key_values=cache).logits[0, -1]
    return tokens, found


def extended(bench, request, tokens):
    """Return a request whose final block goes on with these tokens."""
    *before, final_block = request.segments
    return bench.Request(request.passages, (*before, (*final_block, *tokens)))


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("full", "full"),
        ("prefix", "full"),
        ("block_attention_encoding", "block"),
        ("block_attention", "block"),
        ("turborag", "block"),
    ],
)
def test_each_way_decodes_the_tokens_of_the_attention_that_it_stands_for(
    bench, tiny_model, requests, tmp_path, name, attention
):
    way = {
        "full": lambda: bench.FullPrefill(tiny_model),
        "prefix": lambda: bench.PrefixCache(tiny_model),
        "block_attention_encoding": lambda: bench.BlockAttention(tiny_model, keeps_blocks=False),
        "block_attention": lambda: bench.BlockAttention(tiny_model, keeps_blocks=True),
        "turborag": lambda: bench.TurboRAG(tiny_model, tmp_path),
    }[name]()
    assert way.stands_for == attention
    way.prepare(requests[0])
    for request in requests:  # the second and the third go on from what the one before left
        tokens, logits = greedy(way, request, 5)
        for number, found in enumerate(logits):
            longer = extended(bench, request, tokens[:number])
            reference = bench.reference_logits(tiny_model, longer, attention)
            assert bench.distance(found, reference) < FLOAT32
            assert tokens[number] == int(reference.argmax())


def test_full_and_block_attention_can_be_told_apart(bench, tiny_model, requests):
    full, block = (bench.reference_logits(tiny_model, requests[0], kind) for kind in ("full", "block"))
    assert bench.distance(block, full) > 100 * FLOAT32


def test_in_a_block_mask_only_the_final_block_looks_back(bench):
    from alternatives.references import visible

    assert visible([1, 2, 1], "block").int().tolist() == [
        [1, 0, 0, 0],
        [0, 1, 0, 0],
        [0, 1, 1, 0],
        [1, 1, 1, 1],
    ]
    assert torch.equal(visible([1, 2, 1], "full"), torch.ones(4, 4).tril().bool())


# Prompts


@pytest.mark.parametrize("num_tokens", [800, 1001, 1100])
def test_a_prompt_has_exactly_the_length_asked_for(bench, cache, num_tokens):
    passages = bench.fitting_passages(cache, TEXT, num_tokens, 130)
    assert len(bench.Request.of(cache, passages).token_ids) == num_tokens
    assert len(set(passages)) == len(passages) > 1


def test_a_prompt_without_room_for_a_passage_is_refused(bench, cache):
    with pytest.raises(ValueError, match="longer prompts"):
        bench.fitting_passages(cache, TEXT, 420, 130)


def test_no_request_has_the_order_of_the_one_before(bench, cache):
    asked = list(islice(bench.shuffled(cache, ["one one", "two two"]), 20))
    assert all(one.passages != other.passages for one, other in pairwise(asked))
    assert {tuple(sorted(each.passages)) for each in asked} == {("one one", "two two")}


# What is reused


def test_a_prefix_is_reused_up_to_the_first_token_that_differs(bench, tiny_model, requests):
    way = bench.PrefixCache(tiny_model)
    first, second, _ = requests
    assert way.first_token(first).num_reused == 0
    shared = len(first.segments[0])
    for one, other in zip(first.token_ids[shared:], second.token_ids[shared:], strict=True):
        if one != other:
            break
        shared += 1
    assert len(first.segments[0]) <= shared < len(first.token_ids)
    assert way.first_token(second).num_reused == shared
    assert way.first_token(second).num_reused == len(second.token_ids) - 1  # the last gives the logits


def test_a_pass_that_fails_leaves_no_prefix_behind(bench, tiny_model, requests, monkeypatch):
    way = bench.PrefixCache(tiny_model)
    way.first_token(requests[0])
    with monkeypatch.context() as patch:
        patch.setattr(way, "network", lambda **_: torch.zeros(1) / 0 + None)
        with pytest.raises(AttributeError):
            way.first_token(requests[1])
    assert way.first_token(requests[1]).num_reused == 0


def test_blocks_are_encoded_in_the_request_unless_they_are_kept(bench, tiny_model, requests):
    for keeps_blocks, lengths in ((False, [len(each) for each in requests[0].segments]), (True, None)):
        way = bench.BlockAttention(tiny_model, keeps_blocks=keeps_blocks)
        way.prepare(requests[0])
        computed = []
        hook = tiny_model.register_forward_pre_hook(
            lambda _, __, given, computed=computed: computed.append(given["input_ids"].shape[1]),
            with_kwargs=True,
        )
        way.first_token(requests[0])
        hook.remove()
        assert computed == (lengths or [len(requests[0].segments[-1])])


def test_chunks_are_read_from_files_without_positions(bench, tiny_model, requests, tmp_path):
    way = bench.TurboRAG(tiny_model, tmp_path)
    way.prepare(requests[0])
    chunks = requests[0].segments[1:-1]
    files = list(tmp_path.iterdir())
    assert len(files) == len(set(chunks))
    first_keys = torch.load(way._file(chunks[0]), weights_only=True)[0][0]
    layer = tiny_model.model.layers[0]
    with torch.inference_mode():
        hidden = layer.input_layernorm(tiny_model.model.embed_tokens(torch.tensor([chunks[0]])))
        unturned = layer.self_attn.k_proj(hidden).view(1, len(chunks[0]), -1, 16).transpose(1, 2)
    torch.testing.assert_close(first_keys, unturned)
    files[0].unlink()
    with pytest.raises(FileNotFoundError):
        way.first_token(requests[0])


def test_turborag_changes_a_model_of_its_own_over_the_same_weights(bench, tiny_model, tmp_path):
    changed = bench.TurboRAG(tiny_model, tmp_path).network
    assert all(type(layer.self_attn).__name__ == "LlamaAttention" for layer in tiny_model.model.layers)
    weights = zip(changed.parameters(), tiny_model.parameters(), strict=True)
    assert all(one is other for one, other in weights)


# The benchmark


def test_a_way_that_computes_something_else_is_not_timed(bench, tiny_model, requests):
    references = [
        {kind: bench.reference_logits(tiny_model, request, kind) for kind in ("full", "block")}
        for request in requests
    ]
    full = bench.FullPrefill(tiny_model)
    assert bench.check("full", full, requests, references) < FLOAT32
    full.stands_for = "block"
    with pytest.raises(AssertionError, match="from block attention"):
        bench.check("full", full, requests, references)

    class Unlikely(bench.FullPrefill):
        def first_token(self, request):
            found = super().first_token(request)
            return bench.FirstToken(int(found.logits.argmin()), found.logits)

    with pytest.raises(AssertionError, match="unlikely"):
        bench.check("unlikely", Unlikely(tiny_model), requests, references)


def test_all_ways_take_turns_and_make_a_table(bench, tiny_model_path, monkeypatch, capsys, tmp_path):
    sizes = ["--lengths", "900", "1100", "--passage-tokens", "130", "--repeats", "2"]
    command = ["bench_alternatives.py", "--model", str(tiny_model_path), *sizes]
    monkeypatch.setattr(sys, "argv", command)
    bench.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["num_tokens"] for row in result["rows"]] == [900, 1100]
    without = {"llama_cpp", "llama_cpp_prefix"}  # there is no such file of this model
    for row in result["rows"]:
        assert set(row["logit_distances"]) == set(bench.WAYS) - without
        assert all(len(rounds) == 2 for rounds in row["rounds_seconds"].values())
        assert all((row[f"{name}_seconds"] is None) == (name in without) for name in bench.WAYS)
        assert 0 < row["prefix_percent_reused"] < row["block_percent_reused"]
        assert row["full_percent_reused"] == 0 < row["repair_percent_reused"] < row["block_percent_reused"]
    spec = importlib.util.spec_from_file_location("generate_benchmarks", ROOT / "docs/generate_benchmarks.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    drawn = generator.table(result, ["num_tokens", "full_seconds", "llama_cpp_seconds", "block_times_sooner"])
    assert "| prompt tokens | transformers, full prefill | llama.cpp, full prefill |" in drawn
    pytest.importorskip("matplotlib", reason="plots are not installed")
    generator.plot(result, tmp_path / "plot.svg")
    svg = (tmp_path / "plot.svg").read_text()
    labels = [bench.WAYS[name] for name in bench.DRAWN if name not in without]
    assert all(f">{label}<" in svg for label in labels)


def test_a_process_of_llama_cpp_that_does_not_start_says_so(bench, tmp_path):
    with pytest.raises(RuntimeError, match="exit code 1"):  # this Python has no llama-cpp-python
        bench.LlamaCpp(
            Path(sys.executable), tmp_path / "none", tmp_path, context_length=64, keeps_prefix=False
        )


@pytest.mark.real_weights
def test_llama_cpp_gives_the_tokens_of_full_attention_from_a_prefix_too(bench, smollm2_path, tmp_path):
    python = bench.LLAMA_CPP / "bin" / "python"
    if not python.is_file() or bench.smollm2_gguf() is None:
        pytest.skip(f"llama.cpp is not there; {bench.how_to_install(bench.LLAMA_CPP)}")
    from rag_blockcache import BlockCache

    with BlockCache(smollm2_path, None) as cache:
        passages = bench.fitting_passages(cache, bench.reference_text(), 400, 100)
        asked = list(islice(bench.shuffled(cache, passages), 2))
        for keeps_prefix in (False, True):
            way = bench.LlamaCpp(
                python, bench.smollm2_gguf(), tmp_path, context_length=512, keeps_prefix=keeps_prefix
            )
            found = [way.with_logits(request) for request in asked]
            way.close()
            for request, each in zip(asked, found, strict=True):
                reference = bench.reference_logits(cache.model.network, request, "full")
                assert bench.distance(each.logits, reference) < 0.02
                assert each.token == int(each.logits.argmax())
            num_preamble = len(asked[0].segments[0])
            assert found[0].num_reused == 0
            assert (found[1].num_reused >= num_preamble) == keeps_prefix
