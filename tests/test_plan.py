"""One request: which slots are placed, which computed, and how they are counted."""

from __future__ import annotations

import torch

from rag_blockcache.kv_states import KVStates
from rag_blockcache.passages import Block
from rag_blockcache.plan import Plan
from rag_blockcache.prompt import Segment
from rag_blockcache.reuse import parse_policy

SEGMENTS = [
    Segment("text", (1, 2)),
    Segment("passage", (3, 4, 5)),
    Segment("text", (6,)),
    Segment("passage", (7, 8)),
    Segment("passage", (3, 4, 5)),
    Segment("text", (9, 10)),
]
BLOCKS = {0: Block((1, 2), "p"), 1: Block((3, 4, 5), "a"), 3: Block((7, 8), "b"), 4: Block((3, 4, 5), "a")}


def plan_of(policy, found=()):
    blocks = {} if policy == "full" else dict(BLOCKS)
    return Plan(list(SEGMENTS), parse_policy(policy), "", "", False, 0.0, None, blocks, frozenset(found))


def states_of(block):
    keys = torch.zeros(1, 1, len(block.token_ids), 2)
    return KVStates(keys, keys)


def test_blocks_are_placed_where_their_segments_stand():
    states = {block.block_id: states_of(block) for block in BLOCKS.values()}
    placements = plan_of("block").placements(states)
    assert [placed.offset for placed in placements] == [0, 2, 6, 8]
    assert placements[1].states is placements[3].states
    assert plan_of("full").placements(states) == []


def test_what_is_not_placed_is_computed():
    computed = plan_of("block").computed()
    assert computed.positions.tolist() == [5, 11, 12]
    assert computed.token_ids.tolist() == [6, 9, 10]
    assert not computed.is_tail
    computed = plan_of("link-1").computed()
    assert computed.positions.tolist() == [2, 5, 6, 8, 11, 12]
    assert plan_of("full").computed().token_ids.tolist() == plan_of("full").token_ids


def test_a_tail_is_one_run_at_the_end():
    plan = Plan(
        SEGMENTS[:2] + SEGMENTS[-1:],
        parse_policy("block"),
        "",
        "",
        False,
        0.0,
        blocks=dict(list(BLOCKS.items())[:2]),
    )
    assert plan.computed().is_tail


def test_placed_and_computed_slots_add_up():
    for policy, num_placed in (("block", 10), ("link-1", 7), ("link-9", 2), ("full", 0)):
        plan = plan_of(policy)
        assert plan.num_placed == num_placed
        assert plan.num_placed + len(plan.computed().positions) == plan.num_tokens == 13


def test_only_what_was_found_and_stays_as_it_is_counts_as_reused():
    assert plan_of("block", "pab").num_reused == 10
    assert plan_of("block", "b").num_reused == 2
    assert plan_of("link-1", "pa").num_reused == 6
    assert plan_of("block").num_reused == 0


def test_passages_are_counted_each_time_they_stand():
    plan = plan_of("block", "pa")
    assert (plan.num_passages, plan.num_hits) == (3, 2)
    assert (plan_of("full").num_passages, plan_of("full").num_hits) == (0, 0)
