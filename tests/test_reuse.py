"""Reuse policies: how much of a placed block is computed again."""

from __future__ import annotations

import pytest

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.reuse import (
    BLOCK,
    FULL,
    LADDER,
    PLAIN_REPAIR,
    REPAIR,
    Policy,
    choose_policy,
    parse_policy,
)


def test_policies_are_read_by_name():
    assert parse_policy("full") is FULL
    assert parse_policy("block") is BLOCK
    assert parse_policy("auto") is None
    assert parse_policy("link-16") == PLAIN_REPAIR
    assert parse_policy("link-16+query-0.08") == REPAIR
    assert parse_policy("link-0").computed_again([range(5, 9)]) == []
    assert parse_policy("query-.15") == Policy("query-.15", 0, query=0.15)
    assert parse_policy("blend-1") == Policy("blend-1", 0, blend=1.0)
    assert parse_policy("query-0.1+link-8") == Policy("query-0.1+link-8", 8, query=0.1)


@pytest.mark.parametrize(
    "name",
    [
        *("", "blok", "link-", "link--1", "link-1.5", "link-\u0663", "Full", None, 3, ["full"], "link-4+"),
        *("query-0", "query-0.0", "query-1.5", "query", "blend--0.1", "link-4+link-8", "full+query-0.1"),
    ],
)
def test_an_unknown_policy_is_refused_with_the_known_ones(name):
    with pytest.raises(InvalidInputError, match="use 'auto', 'full', 'block' or 'link-<k>'"):
        parse_policy(name)


def test_the_start_of_each_passage_is_computed_again():
    passages = [range(10, 15), range(15, 17), range(30, 34)]
    assert parse_policy("link-3").computed_again(passages) == [10, 11, 12, 15, 16, 30, 31, 32]
    assert parse_policy("block").computed_again(passages) == []


def test_auto_trusts_only_a_model_that_was_fine_tuned_on_blocks():
    assert choose_policy(True)[0] is BLOCK
    policy, reason = choose_policy(False)
    assert policy is REPAIR
    assert "not block-fine-tuned" in reason
    policy, reason = choose_policy(False, can_be_observed=False)
    assert policy is PLAIN_REPAIR
    assert "not block-fine-tuned" in reason


def test_only_full_reuses_nothing():
    assert [policy.is_full for policy in (FULL, BLOCK, REPAIR)] == [True, False, False]


def test_every_step_of_the_ladder_is_a_policy():
    assert [parse_policy(name).name for name in LADDER] == list(LADDER)
