"""Tokens that are chosen for a request: which, and that they become what full attention makes of them.

The reference computes the same numbers in one pass of the bare model without any cache: every repaired
token stands in it twice, once in its block and once beside it, at the same position, and a mask says who sees
which.
"""

from __future__ import annotations

import architectures
import pytest
import torch
from test_equivalence import FLOAT32, PASSAGES, QUESTION, cache_of, distance, full_prefill

from rag_blockcache import Question
from rag_blockcache.errors import InvalidInputError
from rag_blockcache.repair import _wanted

POLICIES = ["query-0.2", "blend-0.2", "link-2+query-0.15", "link-3+blend-0.1", "query-0.1+blend-0.1"]


def planned(cache, passages, policy, question=QUESTION):
    """Return the plan of a request after it was served, and its logits."""
    plans = []
    prefill = cache._prefill

    def noting(given, **options):
        plans.extend(given)
        return prefill(given, **options)

    cache._prefill = noting
    try:
        logits = cache.first_logits(question, passages, policy=policy)
    finally:
        del cache._prefill
    return plans[0], logits


@torch.inference_mode()
def repaired_prefill(network, plan):
    """Return the last logits of one pass in which repaired tokens stand beside their blocks."""
    computed = plan.is_computed()
    owner = torch.full((plan.num_tokens,), -1)
    for index, span in plan.spans():
        owner[span.start : span.stop] = index
    placed = torch.zeros(plan.num_tokens, dtype=torch.bool)
    for index, span in plan.spans():
        if index in plan.blocks:
            placed[span.start : span.stop] = True
    blocks, exact = placed.nonzero()[:, 0], computed.nonzero()[:, 0]
    positions = torch.cat((blocks, exact))
    is_block = torch.arange(len(positions)) < len(blocks)
    before = positions[:, None] >= positions
    inside = is_block[:, None] & is_block & (owner[positions][:, None] == owner[positions])
    used = ~is_block | ~computed[positions]  # what the final states of a slot are
    seen = before & (inside | (~is_block[:, None] & used))
    output = network(
        input_ids=torch.tensor(plan.token_ids)[positions][None],
        attention_mask=seen[None, None],
        position_ids=positions[None],
        use_cache=False,
    )
    return output.logits[0, -1].float()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3-partial"])
def test_chosen_tokens_are_what_one_pass_over_the_prompt_makes_of_them(name, policy, tiny_tokenizer):
    network = architectures.accepted(name)
    cache = cache_of(network, tiny_tokenizer)
    plan, logits = planned(cache, PASSAGES, policy)
    assert len(plan.chosen) > 0
    reference = repaired_prefill(network, plan)
    assert distance(logits, reference) < FLOAT32
    assert distance(reference, full_prefill(network, [plan.token_ids])) > 10 * FLOAT32


@pytest.mark.parametrize("name", architectures.ACCEPTED)
def test_choosing_every_token_gives_full_attention(name, tiny_tokenizer):
    network = architectures.accepted(name)
    cache = cache_of(network, tiny_tokenizer, preamble="")
    full = cache.first_logits("Who?", PASSAGES[:3], policy="full")
    assert distance(cache.first_logits("Who?", PASSAGES[:3], policy="blend-1"), full) < FLOAT32
    if cache.model.can_be_observed:
        assert distance(cache.first_logits("Who?", PASSAGES[:3], policy="query-1.0"), full) < FLOAT32
    else:
        with pytest.raises(InvalidInputError, match=r"use 'link-<k>' or 'blend-<share>'"):
            cache.first_logits("Who?", PASSAGES[:3], policy="query-1.0")


@pytest.mark.parametrize("policy", POLICIES)
def test_the_share_is_of_the_passages_tokens(policy, tiny_cache):
    plan, _ = planned(tiny_cache, PASSAGES, policy)
    shares = plan.policy.query + plan.policy.blend
    assert len(plan.chosen) == pytest.approx(shares * plan.num_passage_tokens, abs=1.01)
    assert len(set(plan.chosen.tolist())) == len(plan.chosen)
    of_passages = {
        slot for index, span in plan.spans() if plan.segments[index].kind == "passage" for slot in span
    }
    assert set(plan.chosen.tolist()) <= of_passages


@torch.inference_mode()
def test_the_question_attends_most_to_the_tokens_that_query_chooses(tiny_model, tiny_tokenizer):
    # One passage that saw the preamble: over it alone, block attention is full attention, and the model's own
    # eager attention can say what the question attends to.
    cache = cache_of(tiny_model, tiny_tokenizer, blocks_see="preamble")
    plan, _ = planned(cache, PASSAGES[3:4], "query-0.2", question="Who?")
    attention = tiny_model.config._attn_implementation
    tiny_model.set_attn_implementation("eager")
    try:
        output = tiny_model(torch.tensor([plan.token_ids]), output_attentions=True)
    finally:
        tiny_model.set_attn_implementation(attention)
    later = output.attentions[len(output.attentions) // 3 :]
    wanted = sum(layer[0, :, plan.question.start :].amax(dim=1).sqrt().sum(dim=0) for layer in later)
    passage = next(span for index, span in plan.spans() if plan.segments[index].kind == "passage")
    best = wanted[passage.start : passage.stop].topk(len(plan.chosen)).indices + passage.start
    assert set(plan.chosen.tolist()) == set(best.tolist())


def test_of_each_head_the_token_that_pays_most_counts_and_looks_back_only():
    query, key = torch.randn(4, 3, 8), torch.randn(2, 7, 8)
    wanted = _wanted(query, key, 1.0)
    by_hand = torch.zeros(7)
    for head in range(4):
        attention = [
            torch.nn.functional.pad((query[head, i] @ key[head // 2, : 5 + i].T).softmax(dim=0), (0, 2 - i))
            for i in range(3)
        ]
        by_hand += torch.stack(attention).amax(dim=0).sqrt()
    torch.testing.assert_close(wanted, by_hand)


@pytest.mark.parametrize("policy", ["query-0.2", "link-2+query-0.15", "blend-0.2"])
def test_a_batch_chooses_as_each_request_alone(policy, tiny_cache):
    tiny_cache.first_logits(QUESTION, PASSAGES, policy=policy)  # from here on every block is found
    asked = [Question(QUESTION, PASSAGES), Question("Who?", PASSAGES[2:4]), Question("?", [])]
    together = tiny_cache.answer_batch(asked, max_new_tokens=3, policy=policy)
    alone = [tiny_cache.answer(each, max_new_tokens=3, policy=policy) for each in asked]
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]
    assert [each.num_reused_tokens for each in together] == [each.num_reused_tokens for each in alone]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_look_does_not_see_the_answer_that_is_scored(policy, tiny_cache):
    chosen = []
    for continuation in ("in 1843", "nobody knows, and it does not matter to anyone"):
        plans = []
        prefill = tiny_cache._prefill
        tiny_cache._prefill = lambda given, prefill=prefill, plans=plans, **options: (
            plans.extend(given) or prefill(given, **options)
        )
        try:
            tiny_cache.score(QUESTION, PASSAGES, continuation, policy=policy)
        finally:
            del tiny_cache._prefill
        chosen.append(sorted(plans[0].chosen.tolist()))
    assert chosen[0] == chosen[1]
