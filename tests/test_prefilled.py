"""Prompts are answered and led along answers together as each would be alone."""

from __future__ import annotations

import architectures
import pytest
import torch

from rag_blockcache import BlockCache
from rag_blockcache.evaluation import prefilled
from rag_blockcache.evaluation.prefilled import GREEDY, decode_together, prefill_prompts
from rag_blockcache.request import Question

TOKENS = 12
POLICIES = ["full", "block", "link-4", "query-0.2"]
QUESTIONS = [
    Question("Who built the mill?", ["The mill was built by Ruth Hale.", "The ferry runs twice a day."]),
    Question("Why?", ["The well never ran dry."]),
    Question("How many carts does it carry, and how often?", ["The ferry carries nine carts."] * 3),
]


@pytest.fixture(params=["alone", "together"])
def cache(request, tiny_model, tiny_tokenizer, monkeypatch):
    """An engine that prefills prompts one by one, as on a CPU, or in one pass, as on a GPU."""
    monkeypatch.setattr(prefilled, "_TOGETHER", {"cpu": 1} if request.param == "alone" else {})
    with BlockCache(tiny_model, None, tokenizer=tiny_tokenizer, passage_format="plain") as opened:
        yield opened


def prefill(cache, policies, room=TOKENS):
    return [each for policy in policies for each in prefill_prompts(cache, QUESTIONS, policy, room=room)]


def alone(cache, policies, max_new_tokens=TOKENS):
    return [
        cache.answer(question, policy=policy, max_new_tokens=max_new_tokens, **GREEDY).token_ids
        for policy in policies
        for question in QUESTIONS
    ]


@pytest.mark.parametrize("stage", [1, 5, 32])
def test_answers_are_those_that_the_engine_gives_to_each_question_alone(cache, stage, monkeypatch):
    # Random weights hardly end an answer. With tokens of some answers as ends, rows end one after another.
    given = alone(cache, POLICIES)
    ends = [given[row][place] for row, place in ((1, 2), (2, 7), (8, 10))]
    monkeypatch.setattr(cache.model.network.generation_config, "eos_token_id", ends)
    monkeypatch.setattr(prefilled, "_STAGE", stage)
    expected = alone(cache, POLICIES)
    assert len(set(map(len, expected))) > 2, expected
    prompts = prefill(cache, POLICIES)
    assert decode_together(prompts, TOKENS) == expected
    assert decode_together(prompts, TOKENS) == expected  # what was prefilled stays as it is
    assert decode_together(prompts, 2) == [answer[:2] for answer in expected]


def test_distributions_along_an_answer_are_those_of_decoding_it(cache):
    prompts = prefill(cache, POLICIES)
    answers = iter(alone(cache, POLICIES))
    for each in prompts:
        led = [next(answers)[: 1 + 4 * row] for row in range(len(each.plans))]
        for plan, answer, found in zip(each.plans, led, each.along(led), strict=True):
            assert found.shape == (len(answer), cache.model.vocab_size)
            assert found.argmax(dim=-1).tolist() == answer
            scores = cache.score(plan.request, (), answer, policy="full" if plan.policy.is_full else "block")
            assert plan.policy.name not in ("full", "block") or torch.allclose(
                found.gather(1, torch.tensor(answer)[:, None])[:, 0], scores, atol=1e-4
            )


def test_prompts_can_be_led_along_another_answer_and_answered_after_that(cache):
    prompts = prefill(cache, ["block"])
    expected = decode_together(prompts, TOKENS)
    first = [found for each in prompts for found in each.along([[5, 6, 7]] * len(each.plans))]
    for each in prompts:
        each.along([[9] * TOKENS] * len(each.plans))
    again = [found for each in prompts for found in each.along([[5, 6, 7]] * len(each.plans))]
    for one, other in zip(first, again, strict=True):
        torch.testing.assert_close(one, other)
    assert decode_together(prompts, TOKENS) == expected


def test_prompts_of_two_sets_of_rotary_frequencies_are_answered_apart(tiny_tokenizer):
    network = architectures.accepted("phi3-longrope")  # turns by other angles beyond 128 tokens
    with BlockCache(network, None, tokenizer=tiny_tokenizer, preamble="", passage_format="plain") as opened:
        long, short = Question("Where? " * 20, ["Ada."]), Question("Who?", ["Ada wrote."])
        prompts = [prefill_prompts(opened, [each], "block", room=4)[0] for each in (long, short)]
        assert [each.plans[0].regime for each in prompts] == ["long", ""]
        expected = [
            opened.answer(each, policy="block", max_new_tokens=4, **GREEDY).token_ids
            for each in (long, short)
        ]
        assert decode_together(prompts, 4) == expected
