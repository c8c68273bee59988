"""What blocks see: chosen by the model, refused by name, and nothing where stand-ins have no room."""

from __future__ import annotations

import architectures
import pytest
import torch
from test_equivalence import FLOAT32, block_masked_prefill, cache_of, distance, windows_of
from transformers import AutoTokenizer

from rag_blockcache import BlockCache, Passage, block_cache, conditioning
from rag_blockcache.errors import InvalidInputError
from rag_blockcache.evaluation import prefill
from rag_blockcache.prompt import Prompt

LONG = "The mill has a thousand columns of figure wheels, and ground no flour. " * 3


def length(cache: BlockCache, passage: str) -> int:
    return len(cache.block(passage).token_ids)


def is_alone(cache: BlockCache, passage: str) -> bool:
    return not cache._blocks.seen_by(cache.block(passage).token_ids, preamble=())


@pytest.mark.real_weights
def test_the_benchmark_counts_as_many_tokens_as_stand_ins_have(smollm2_path):
    prompt = Prompt(AutoTokenizer.from_pretrained(smollm2_path))
    assert len(prompt.run_of_passages(conditioning.STAND_INS)) == prefill._STAND_IN_TOKENS


@pytest.mark.parametrize(("fine_tuned", "seen"), [(True, "themselves"), (False, "stand-ins")])
def test_a_model_that_was_fine_tuned_on_blocks_gets_the_papers(fine_tuned, seen, tiny_tokenizer):
    network = architectures.build("Llama", {"max_position_embeddings": 2048})
    network.config.block_fine_tuned = fine_tuned
    assert cache_of(network, tiny_tokenizer, blocks_see=None).blocks_see == seen


def test_what_is_unknown_is_refused_before_the_model_is_loaded(tmp_path):
    with pytest.raises(
        InvalidInputError, match="blocks_see is 'neighbours'; use one of 'themselves', 'preamble'"
    ):
        BlockCache(tmp_path / "no-such-model", tmp_path / "kv", blocks_see="neighbours")
    assert not (tmp_path / "kv").exists()


def test_an_index_tells_other_words_of_stand_ins_from_its_own(monkeypatch, tiny_model, tiny_tokenizer):
    before = cache_of(tiny_model, tiny_tokenizer, blocks_see="stand-ins")
    monkeypatch.setattr(conditioning, "STAND_INS", (Passage("It rained."),))
    after = cache_of(tiny_model, tiny_tokenizer, blocks_see="stand-ins")
    assert after.block("Ada.").block_id != before.block("Ada.").block_id
    assert after.fingerprint != before.fingerprint
    assert after.auto_policy.record.prompt != before.auto_policy.record.prompt


def test_stand_ins_change_no_prompt(tiny_model, tiny_tokenizer):
    caches = [cache_of(tiny_model, tiny_tokenizer, blocks_see=seen) for seen in ("themselves", "stand-ins")]
    assert caches[0].segments("Who?", ["Ada."]) == caches[1].segments("Who?", ["Ada."])


def test_a_block_without_room_for_stand_ins_sees_itself_alone(tiny_tokenizer):
    network = architectures.build("Llama", {"max_position_embeddings": 512})
    cache = cache_of(network, tiny_tokenizer, blocks_see="stand-ins")
    room = 512 - len(cache.prompt.run_of_passages(block_cache.STAND_INS))
    fitting = "x" * (room - length(cache, "x") + 1)
    assert length(cache, fitting) == room
    assert not is_alone(cache, fitting)
    assert is_alone(cache, fitting + "x")
    report = cache.prefill([fitting, fitting + "x"])  # both in one call
    assert report.num_encoded == 2
    segments = cache.segments("Who?", [fitting + "x"])
    logits = cache.first_logits("Who?", [fitting + "x"], policy="block")
    assert distance(logits, block_masked_prefill(network, segments, windows_of(network))) < FLOAT32


def test_stand_ins_never_bring_other_rotary_frequencies(monkeypatch, tiny_tokenizer):
    network = architectures.accepted("phi3-longrope")  # turns by other angles beyond 128 tokens
    monkeypatch.setattr(block_cache, "STAND_INS", (Passage("It rained all day."),))
    cache = cache_of(network, tiny_tokenizer, blocks_see="stand-ins")
    lead = len(cache.prompt.run_of_passages(block_cache.STAND_INS))
    short, long = "x" * 20, "x" * (128 - lead)
    assert not is_alone(cache, short)
    assert is_alone(cache, long)
    tokens = cache.block(long).token_ids
    seen = cache._blocks.seen_by(tokens, preamble=(), regime="long")
    assert len(seen) == lead, "beyond the bound all blocks are encoded with the other frequencies anyway"


def test_another_process_encodes_the_same_states(tiny_model, tiny_tokenizer):
    first, second = (cache_of(tiny_model, tiny_tokenizer, blocks_see="stand-ins") for _ in range(2))
    first.prefill(["Ada.", LONG])
    second.prefill([LONG])
    name = first.block(LONG).block_id
    torch.testing.assert_close(
        first.store.get(name).unpack().keys, second.store.get(name).unpack().keys, rtol=1e-5, atol=1e-5
    )
