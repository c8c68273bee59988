"""The latency benchmark times the work it claims: every way gives the same logits, and all are paired."""

import json

import architectures
import pytest
import torch

from rag_blockcache import BlockCache
from rag_blockcache.errors import ContextTooLongError, InvalidInputError
from rag_blockcache.evaluation import page_cache, requests
from rag_blockcache.evaluation.latency import measure_latency
from rag_blockcache.evaluation.naive import naive_first_token
from rag_blockcache.evaluation.places import Places
from rag_blockcache.evaluation.requests import Floor, full_first_token, make_plan, reused_first_token
from rag_blockcache.evaluation.stopwatch import Spread, in_turn, ratios
from rag_blockcache.evaluation.token_prompts import cut_prompt, mixed_passages, token_run
from rag_blockcache.model import Model
from rag_blockcache.reuse import BLOCK, REPAIR, parse_policy
from rag_blockcache.store import DeviceStore

TEXT = "The mill has a thousand columns of figure wheels, and a store. " * 20


@pytest.fixture(scope="module")
def model(tiny_model, tiny_tokenizer):
    return Model(tiny_model, tiny_tokenizer)


@pytest.fixture(scope="module")
def prompt(model):
    return cut_prompt(token_run(model, 300), 300, final_tokens=20, passage_tokens=50)


@pytest.fixture
def places(model, prompt, tmp_path):
    places = Places(model, prompt, BLOCK, tmp_path)
    yield places
    places.close()


def block_masked_logits(model, prompt):
    """The same logits another way: one pass of the bare model with the block mask."""
    lengths = [*map(len, prompt.passages), len(prompt.final_block)]
    mask = torch.block_diag(*[torch.ones(n, n) for n in lengths])
    mask[-lengths[-1] :] = 1
    mask = mask.tril().bool()[None, None]
    with torch.inference_mode():
        return model.network(input_ids=torch.tensor([prompt.token_ids]), attention_mask=mask).logits[0, -1]


# The work that is timed


def test_every_place_and_the_floor_give_the_logits_of_block_masked_prefill(model, prompt, places):
    expected = block_masked_logits(model, prompt)
    floor = Floor(places.memory, prompt, BLOCK)
    ways = {name: read(BLOCK).logits for name, read in places.readers().items()}
    ways["floor"], ways["floor again"] = floor.first_token().logits, floor.first_token().logits
    assert set(ways) >= {"memory", "disk", "disk_first", "floor"}
    for logits in ways.values():
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_full_prefill_gives_the_logits_of_policy_full(model, prompt, places):
    with torch.inference_mode():
        expected = model.network(input_ids=torch.tensor([prompt.token_ids])).logits[0, -1]
    torch.testing.assert_close(full_first_token(model, prompt).logits, expected)
    assert not torch.allclose(expected, block_masked_logits(model, prompt), atol=1e-2)


def test_a_request_is_what_the_library_does_for_the_same_segments(tiny_model, tiny_tokenizer, model):
    passages = ["Ada wrote the note.", "The mill has a thousand columns."]
    with BlockCache(tiny_model, None, tokenizer=tiny_tokenizer, blocks_see="themselves") as cache:
        expected = cache.first_logits("Who?", passages, policy="block")
        [preamble, *blocks, final] = cache.segments("Who?", passages)
        as_block = requests.TokenPrompt(tuple(map(tuple, [preamble, *blocks])), tuple(final))
        source = requests.block_source(model, cache.store)
        requests.store_blocks(source, as_block, BLOCK)
        torch.testing.assert_close(reused_first_token(source, as_block, BLOCK).logits, expected)


def test_joining_and_turning_the_whole_gives_the_same_logits(model, prompt, places):
    found = naive_first_token(places.memory, prompt)
    torch.testing.assert_close(found.logits, block_masked_logits(model, prompt), rtol=1e-4, atol=1e-4)


def test_a_prompt_may_be_a_final_block_alone(model, tmp_path):
    [length] = measure_latency(model, lengths=(20,), final_tokens=20, repeats=1, directory=tmp_path).lengths
    assert (length.num_passages, length.num_final_tokens) == (0, 20)
    assert all(each.num_computed == 20 for each in length.reuse)


def test_what_runs_without_graphs_leaves_the_choice_as_it_was(model, prompt, places):
    model.cuda_graphs = True
    try:
        found = places.readers()["without_graphs"](BLOCK)
        assert model.cuda_graphs
    finally:
        model.cuda_graphs = False
    torch.testing.assert_close(found.logits, block_masked_logits(model, prompt), rtol=1e-4, atol=1e-4)
    assert "without_graphs" not in places.readers()


def test_blocks_packed_by_a_codec_are_what_is_read_from_the_host(model, prompt, places, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # as without a GPU it cannot be
    exact, packed = (places._copy_to_host(BLOCK, codec) for codec in ("none", "int8"))
    assert 0.2 < packed.size_bytes / exact.size_bytes < 0.5  # of float32
    assert {each.codec for each in packed.values()} == {"int8"}


def test_blocks_of_a_disk_that_stay_on_the_device_leave_its_files_free(model, prompt, tmp_path, monkeypatch):
    def copy(blocks):
        return [states.mapped(torch.clone) for states in blocks]

    device = DeviceStore(torch.device("cuda"), copy, 2**30)  # what is asked of it works without a GPU
    monkeypatch.setattr("rag_blockcache.evaluation.places.device_tier", lambda *_, **__: device)
    places = Places(model, prompt, BLOCK, tmp_path)
    found = places.readers()["disk_kept"](BLOCK)
    torch.testing.assert_close(found.logits, block_masked_logits(model, prompt), rtol=1e-4, atol=1e-4)
    assert device.stats().num_hits == len(device) == len(prompt.passages)
    assert len(places._kept.memory) == 0
    places.close()


def test_repair_computes_the_starts_of_passages_again(prompt, places):
    plan = make_plan(places.memory, prompt, REPAIR)
    assert len(plan.computed().positions) == 16 * len(prompt.passages) + len(prompt.final_block)


def test_a_block_that_is_missing_is_never_timed(prompt, places):
    places.memory.store.clear()
    with pytest.raises(AssertionError, match="stored"):
        reused_first_token(places.memory, prompt, BLOCK)


def test_a_bench_that_times_wrong_work_fails(model, monkeypatch, tmp_path):
    def wrong(floor):
        return requests.FirstToken(torch.ones(model.vocab_size), 0.1)

    monkeypatch.setattr(Floor, "first_token", wrong)
    with pytest.raises(AssertionError, match="differ"):
        measure_latency(model, lengths=(120,), passage_tokens=30, repeats=1, directory=tmp_path)


# The disk


def test_cold_files_are_out_of_the_page_cache(prompt, places):
    if not places.can_be_cold:
        pytest.skip("files of this folder cannot be thrown out of the page cache")
    files = page_cache.block_files(places._folder)
    assert len(files) == len(prompt.passages)
    for file in files:
        file.read_bytes()
    assert page_cache.cached_share(files) == 1
    page_cache.drop(files)
    assert page_cache.cached_share(files) == 0
    places.readers()["disk_cold"](BLOCK)
    assert places.cold_share == 0
    assert page_cache.cached_share(files) > 0.9  # it was read


def test_where_files_stay_cached_a_cold_disk_is_not_claimed(model, monkeypatch, tmp_path):
    monkeypatch.setattr(page_cache, "cached_share", lambda files: 1.0)
    report = measure_latency(model, lengths=(120,), passage_tokens=30, repeats=1, directory=tmp_path)
    assert "disk_cold" not in {each.place for each in report.lengths[0].reuse}
    assert "page cache" in report.notes[0]


def test_what_chooses_tokens_is_part_of_the_time_and_of_the_work(model, prompt, places):
    found = reused_first_token(places.memory, prompt, parse_policy("query-0.5"))
    look, computed = found.passes
    assert list(look) == list(range(prompt.num_tokens))[-len(prompt.final_block) :]
    assert len(computed) == len(look) + round(0.5 * (prompt.num_tokens - len(look)))
    assert len(reused_first_token(places.memory, prompt, BLOCK).passes) == 1


# The report


def test_a_report_holds_every_way_paired_and_in_json(model, tmp_path):
    lines = []
    report = measure_latency(
        model, lengths=(130, 280), final_tokens=20, passage_tokens=40, repeats=2,
        name="/models/tiny", directory=tmp_path, progress=lines.append,
    )  # fmt: skip
    assert [each.num_tokens for each in report.lengths] == [130, 280]
    for length in report.lengths:
        assert length.num_final_tokens == 20
        assert length.kv_bytes == length.num_tokens * model.kv_bytes_per_token
        assert length.full_flops > length.reuse[0].flops
        assert {each.policy for each in length.reuse} == {"block", "link-16+query-0.08"}
        block, repair = (
            next(each for each in length.reuse if each.place == "memory" and each.policy.startswith(name))
            for name in ("block", "link")
        )
        num_passage_tokens = length.num_tokens - 20
        in_front = min(16, 40) * length.num_passages
        assert repair.num_computed == 20 + in_front + round(0.08 * num_passage_tokens)
        assert repair.flops > block.flops
        assert length.text_seconds is None
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert {"date", "hardware", "versions", "model", "dtype", "threads", "device"} <= set(found)
    assert found["model"] == "tiny"
    assert [set(row) for row in found["rows"]] == [set(found["rows"][0])] * 2
    assert set(found["columns"]) <= set(found["rows"][0])
    assert "280 tokens: round 2 of 2" in lines
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_text_is_asked_for_through_the_public_face(model, tmp_path):
    report = measure_latency(
        model, lengths=(900,), final_tokens=20, passage_tokens=100, repeats=1, text=TEXT, directory=tmp_path
    )
    [length] = report.lengths
    assert length.text_seconds.median > 0
    assert length.text_tokens <= 900


def test_a_prompt_too_short_for_its_template_leaves_text_out(model, tmp_path):
    report = measure_latency(
        model, lengths=(120,), passage_tokens=30, repeats=1, text=TEXT, directory=tmp_path
    )
    assert report.lengths[0].text_seconds is None
    assert "template" in report.notes[-1]


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"lengths": (4096,)}, ContextTooLongError, "2048"),
        ({"lengths": (60,)}, InvalidInputError, "cannot hold"),
        ({"lengths": ()}, InvalidInputError, "at least"),
        ({"repeats": 0}, InvalidInputError, "at least 1"),
        ({"policies": ("full",)}, InvalidInputError, "reuse"),
        ({"policies": ("auto",)}, InvalidInputError, "reuse"),
        ({"policies": ("some",)}, InvalidInputError, "unknown"),
        ({"text": "Short."}, InvalidInputError, "longer"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(model, options, error, reason):
    with pytest.raises(error, match=reason):
        measure_latency(model, **{"lengths": (512,), "repeats": 1, **options})


def test_frequencies_that_change_with_every_length_cannot_be_measured(tiny_tokenizer, tmp_path):
    model = Model(architectures.accepted("llama-dynamic"), tiny_tokenizer)
    model.config.max_position_embeddings = 1024  # the window of the frequencies stays
    with pytest.raises(InvalidInputError, match="rotary"):
        measure_latency(model, lengths=(700,), repeats=1, directory=tmp_path)


# Prompts and clocks


@pytest.mark.parametrize("num_tokens", [100, 149, 151, 512, 1024, 2047])
def test_a_prompt_has_exactly_the_length_asked_for(model, num_tokens):
    run = token_run(model, 2048)
    prompt = cut_prompt(run, num_tokens, final_tokens=50, passage_tokens=100)
    assert prompt.num_tokens == len(prompt.token_ids) == num_tokens
    assert len(prompt.final_block) == 50
    assert all(50 <= len(passage) <= 150 for passage in prompt.passages)
    assert sum(segment.kind == "passage" for segment in prompt.segments()) == len(prompt.passages)


def test_mixed_passages_hold_all_of_a_run():
    run = list(range(1000))
    passages = mixed_passages(run, 20, 60)
    assert [token for passage in passages for token in passage] == run
    assert all(20 <= len(passage) <= 60 for passage in passages[:-1])
    assert len({len(passage) for passage in passages}) > 5


def test_runs_take_turns_after_one_to_warm_up():
    order, rounds = [], []
    runs = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    warm_up, measured = in_turn(runs, 2, rounds.append)
    assert order == ["a", "b"] * 3
    assert rounds == [0, 1, 2]
    assert warm_up == {"a": 1, "b": 2}
    assert measured == {"a": [3, 5], "b": [4, 6]}


def test_ratios_are_taken_in_pairs():
    assert ratios([10, 40, 90], [1, 2, 3]) == Spread(median=20, min=10, max=30)
