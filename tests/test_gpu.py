"""The promises on a CUDA device: the same as on the CPU, over contexts that live on the GPU."""

from __future__ import annotations

import architectures
import pytest
import torch
from test_equivalence import PASSAGES, SHORT, block_masked_prefill, cache_of, distance, windows_of

from rag_blockcache import BlockCache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize("name", architectures.ACCEPTED)
def test_reused_blocks_give_the_logits_of_one_block_masked_prefill_on_a_gpu(name, tiny_tokenizer):
    cache = cache_of(architectures.accepted(name).cuda(), tiny_tokenizer)
    for _ in range(2):  # encoded, then reused
        logits = cache.first_logits("Who?", PASSAGES[:3], policy="block")
    segments = cache.segments("Who?", PASSAGES[:3])
    on_cpu = architectures.accepted(name)
    assert distance(logits, block_masked_prefill(on_cpu, segments, windows_of(on_cpu))) < 1e-4


@pytest.mark.parametrize("name", architectures.ACCEPTED)
def test_blocks_behind_stand_ins_have_the_logits_on_a_gpu_that_they_have_on_a_cpu(name, tiny_tokenizer):
    logits = []
    for device in ("cuda", "cpu"):
        cache = cache_of(architectures.accepted(name).to(device), tiny_tokenizer, blocks_see="stand-ins")
        logits.append(cache.first_logits("Who?", PASSAGES[:3], policy="block"))
    assert distance(*logits) < 1e-4


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3-longrope"])
def test_full_answers_on_a_gpu_equal_generate_of_the_bare_model(name, tiny_tokenizer):
    network = architectures.accepted(name).cuda()
    cache = BlockCache(network, None, tokenizer=tiny_tokenizer, passage_format=SHORT)
    answer = cache.generate("Who?", PASSAGES[:2], policy="full", max_new_tokens=12, do_sample=False)
    token_ids = torch.tensor(
        [[token for segment in cache.segments("Who?", PASSAGES[:2]) for token in segment]]
    ).cuda()
    bare = network.generate(
        token_ids, attention_mask=torch.ones_like(token_ids), max_new_tokens=12, do_sample=False
    )
    assert answer.token_ids == bare[0, token_ids.shape[1] :].tolist()


def test_blocks_on_disk_are_shared_by_cpu_and_gpu(tiny_model, tiny_tokenizer, tmp_path):
    with BlockCache(tiny_model, tmp_path, tokenizer=tiny_tokenizer) as cache:
        cache.prefill(PASSAGES)
        before = cache.first_logits("Who?", PASSAGES, policy="block")
    on_gpu = architectures.build("Llama", {"max_position_embeddings": 2048}).cuda()
    with BlockCache(on_gpu, tmp_path, tokenizer=tiny_tokenizer) as cache:
        answer = cache.generate("Who?", PASSAGES, policy="block", max_new_tokens=2)
        assert answer.num_hits == len(PASSAGES)
        assert distance(cache.first_logits("Who?", PASSAGES, policy="block"), before) < 1e-4


def test_streams_and_batches_run_on_a_gpu(tiny_tokenizer):
    network = architectures.accepted("llama").cuda()
    cache = BlockCache(network, None, tokenizer=tiny_tokenizer, passage_format=SHORT)
    requests = [("Who?", PASSAGES[:2]), ("Where was it printed?", PASSAGES[2:]), ("What?", [])]
    alone = [
        cache.generate(question, passages, policy="block", max_new_tokens=8, do_sample=False)
        for question, passages in requests
    ]
    together = cache.generate_batch(requests, policy="block", max_new_tokens=8, do_sample=False)
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    stream = cache.stream("Who?", PASSAGES[:2], policy="block", max_new_tokens=8, do_sample=False)
    assert "".join(stream) == alone[0].text
