"""Prompts that begin as an earlier one did go on from its context, and answer as if they had not."""

from __future__ import annotations

import threading

import architectures
import pytest
import torch

from rag_blockcache import BlockCache, Chat, Question
from rag_blockcache.errors import InvalidInputError

PASSAGES = [
    "The harbour freezes in most winters, so the ferry rests until March, and the mail comes by sledge.",
    "The lighthouse was built in 1854. Its lamp burned whale oil until 1880, and petroleum after that.",
    "The mill has a thousand columns of figure wheels, and a store in which numbers wait for their turn.",
]
GREEDY = {"max_new_tokens": 12, "do_sample": False}
POLICIES = ["block", "link-4", "full"]


@pytest.fixture
def cache(tiny_model, tiny_tokenizer):
    with BlockCache(tiny_model, None, tokenizer=tiny_tokenizer) as cache:
        cache.prefill(PASSAGES)
        yield cache


@pytest.fixture
def fresh(tiny_model, tiny_tokenizer):
    """The same without contexts that are kept."""
    with BlockCache(tiny_model, None, tokenizer=tiny_tokenizer, context_budget_bytes=0) as cache:
        cache.prefill(PASSAGES)
        yield cache


def prefilled(cache, request, policy):
    """Return the plan of a request, and keys, values and logits after its prefill pass."""
    plan = cache._planner.plan(request, policy=policy, max_new_tokens=4, start=0.0)
    context, logits, _ = cache._prefill([plan], room=4, continues=True)
    slots = slice(0, plan.num_tokens)
    states = [torch.stack(context.states_of_layer(layer))[..., slots, :] for layer in range(3)]
    return plan, torch.stack(states), logits


def chat(*turns):
    roles = ["user", "assistant"] * len(turns)
    return Chat([{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)])


def told(question):
    return "\n\n".join([*PASSAGES, question])


@pytest.mark.parametrize("policy", POLICIES)
def test_another_question_over_the_same_passages_goes_on_behind_them(cache, fresh, policy):
    cache.generate("When does the ferry rest?", PASSAGES, policy=policy, **GREEDY)
    request = Question("What did the lamp burn, and until when?", PASSAGES)
    plan, states, logits = prefilled(cache, request, policy)
    expected_plan, expected_states, expected = prefilled(fresh, request, policy)
    before = sum(len(segment.token_ids) for segment in plan.segments[:-1])
    assert plan.num_kept >= before
    assert expected_plan.num_kept == 0
    torch.testing.assert_close(states, expected_states, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_next_turn_of_a_chat_computes_what_is_new(cache, fresh, policy):
    first = chat(told("When does the ferry rest?"))
    answers = [each.answer(first, policy=policy, **GREEDY) for each in (cache, fresh)]
    assert answers[0].text == answers[1].text
    second = chat(told("When does the ferry rest?"), "In winter.", "And who brings the mail then?")
    again = [each.answer(second, policy=policy, **GREEDY) for each in (cache, fresh)]
    assert again[0].token_ids == again[1].token_ids
    assert again[0].num_kept_tokens > answers[0].num_prompt_tokens - 30
    assert again[0].num_computed_tokens < 80 < again[1].num_computed_tokens
    assert (again[0].num_hits, again[0].num_prompt_tokens) == (again[1].num_hits, again[1].num_prompt_tokens)
    assert again[1].num_kept_tokens == 0
    # The context had no room for more, so it was copied; now there is room.
    third = cache.answer(second, policy=policy, **GREEDY)
    assert third.token_ids == again[0].token_ids
    assert third.num_computed_tokens <= 1


def test_slots_that_were_made_in_another_way_are_not_used(cache, fresh):
    for policy in [*POLICIES, "link-9", *reversed(POLICIES)]:
        answer = cache.generate("When does the ferry rest?", PASSAGES, policy=policy, **GREEDY)
        expected = fresh.generate("When does the ferry rest?", PASSAGES, policy=policy, **GREEDY)
        assert answer.token_ids == expected.token_ids
    _, states, _ = prefilled(cache, Question("Who?", PASSAGES), "link-9")
    _, expected_states, _ = prefilled(fresh, Question("Who?", PASSAGES), "link-9")
    torch.testing.assert_close(states, expected_states, rtol=1e-4, atol=1e-4)


def test_passages_in_another_order_are_used_as_far_as_they_are_the_same(cache, fresh):
    cache.generate("When?", PASSAGES, policy="block", **GREEDY)
    request = Question("Who?", [PASSAGES[0], PASSAGES[1], PASSAGES[0]])
    plan, states, _ = prefilled(cache, request, "block")
    _, expected, _ = prefilled(fresh, request, "block")
    assert plan.num_kept == sum(len(segment.token_ids) for segment in plan.segments[:3])
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)


def test_a_long_context_is_not_given_up_for_a_short_beginning(cache):
    cache.generate("When?", PASSAGES, policy="block", **GREEDY)
    assert cache.generate("When?", PASSAGES[::-1], policy="block", **GREEDY).num_kept_tokens == 0
    assert cache.generate("Where?", PASSAGES, policy="block", **GREEDY).num_kept_tokens > 200


@pytest.mark.parametrize("policy", ["query-0.2", "blend-0.2", "link-2+query-0.2"])
def test_what_a_question_chose_is_not_kept_for_another(cache, policy):
    cache.generate("When?", PASSAGES, policy=policy, **GREEDY)
    assert cache._kept._kept == []
    cache.generate("When?", PASSAGES, policy="block", **GREEDY)
    assert cache.generate("When?", PASSAGES, policy=policy, **GREEDY).num_kept_tokens == 0


def test_the_budget_bounds_what_is_kept_the_oldest_goes(tiny_model, tiny_tokenizer):
    with BlockCache(tiny_model, None, tokenizer=tiny_tokenizer) as cache:
        for passage in PASSAGES:
            cache.generate("When does the ferry rest?", [passage], policy="block", **GREEDY)
        budget = sum(kept.context.num_bytes for kept in cache._kept._kept) - 1
    with BlockCache(tiny_model, None, tokenizer=tiny_tokenizer, context_budget_bytes=budget) as cache:
        for passage in PASSAGES:
            cache.generate("When does the ferry rest?", [passage], policy="block", **GREEDY)
        assert sum(kept.context.num_bytes for kept in cache._kept._kept) <= budget
        oldest, latest = (
            cache.generate("When, then?", [each], policy="block", **GREEDY) for each in PASSAGES[::2]
        )
        assert oldest.num_kept_tokens == 0 < latest.num_kept_tokens
    with BlockCache(tiny_model, None, tokenizer=tiny_tokenizer, context_budget_bytes=100) as cache:
        cache.generate("When does the ferry rest?", PASSAGES, policy="block", **GREEDY)
        assert cache._kept._kept == [], "one that is larger than the budget puts no other out"


def test_a_context_in_use_is_not_given_to_another(cache):
    cache.generate("When does the ferry rest?", PASSAGES, policy="block", **GREEDY)
    plans = [
        cache._planner.plan(Question("Who?", PASSAGES), policy="block", max_new_tokens=4, start=0.0)
        for _ in range(2)
    ]
    taken = [cache._kept.take(plan, 4) for plan in plans]
    assert taken[0] is not None
    assert taken[1] is None
    assert plans[0].num_kept > plans[1].num_kept == 0


def test_a_placed_block_is_never_cut_in_two(cache):
    plan = cache._planner.plan(Question("Who?", PASSAGES), policy="link-4", max_new_tokens=4, start=0.0)
    _, (_, second), *_, (_, last) = plan.spans()
    assert plan.whole_blocks(second.start + 9) == second.start
    assert plan.whole_blocks(second.stop) == second.stop
    assert plan.whole_blocks(last.start + 3) == last.start + 3, "what is computed may be cut anywhere"


def test_a_negative_budget_is_refused(tiny_model, tiny_tokenizer):
    with pytest.raises(InvalidInputError, match="context_budget_bytes is -1"):
        BlockCache(tiny_model, None, tokenizer=tiny_tokenizer, context_budget_bytes=-1)


def test_what_is_forgotten_is_in_no_context_any_more(cache):
    cache.generate("When?", PASSAGES, policy="block", **GREEDY)
    cache.forget(PASSAGES[:1])
    assert cache.generate("When?", PASSAGES, policy="block", **GREEDY).num_kept_tokens == 0


def test_what_is_forgotten_while_an_answer_is_given_is_not_kept(cache):
    stream = cache.stream("When?", PASSAGES, policy="block", **GREEDY)
    next(stream)
    cache.forget(PASSAGES[:1])
    list(stream)
    assert cache._kept._kept == []


def test_beams_batches_and_scores_leave_no_context(cache):
    cache.generate("When?", PASSAGES, policy="block", num_beams=2, **GREEDY)
    cache.generate_batch([("When?", PASSAGES), ("Who?", PASSAGES)], policy="block", **GREEDY)
    cache.score("When?", PASSAGES, "In winter.", policy="block")
    assert cache._kept._kept == []


@pytest.mark.parametrize("name", ["gemma2", "falcon", "qwen2-window", "cohere2"])
def test_architectures_with_windows_or_attention_of_their_own_go_on_too(name, tiny_tokenizer):
    network, answers = architectures.accepted(name), []
    for budget in (2**30, 0):
        with BlockCache(
            network, None, tokenizer=tiny_tokenizer, preamble="", context_budget_bytes=budget
        ) as cache:
            cache.generate("When does the ferry rest?", PASSAGES[:2], policy="block", **GREEDY)
            answers.append(cache.generate("What did it burn?", PASSAGES[:2], policy="block", **GREEDY))
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].num_kept_tokens > 0 == answers[1].num_kept_tokens


def test_frequencies_that_change_with_the_length_are_computed_anew(tiny_tokenizer):
    with BlockCache(architectures.accepted("phi3-longrope"), None, tokenizer=tiny_tokenizer) as cache:
        for question in ("When does the ferry rest?", "What did it burn?"):
            answer = cache.generate(question, PASSAGES[:1], policy="block", **GREEDY)
            assert cache.model.regime(answer.num_prompt_tokens) == "long"
            assert answer.num_kept_tokens == 0


def test_answers_at_the_same_time_never_share_a_context(cache, fresh):
    questions = [f"What is said about number {number}?" for number in range(6)]
    expected = {
        each: fresh.generate(each, PASSAGES, policy="block", **GREEDY).token_ids for each in questions
    }
    found = {}

    def ask(question):
        found[question] = [
            cache.generate(question, PASSAGES, policy="block", **GREEDY).token_ids for _ in range(3)
        ]

    threads = [threading.Thread(target=ask, args=(each,)) for each in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {each: [expected[each]] * 3 for each in questions}
