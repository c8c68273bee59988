"""An ablation: blocks whose keys stay at the positions where they were encoded."""

from __future__ import annotations

from dataclasses import replace

import torch

from rag_blockcache.block_cache import BlockCache
from rag_blockcache.kv_states import BlockStates, KVStates
from rag_blockcache.model import Model
from rag_blockcache.plan import Plan
from rag_blockcache.rotary import unrotate_keys


class UnmovedBlockCache(BlockCache):
    """A ``BlockCache`` that does without position re-encoding, to measure what it is worth.

    The assembler turns keys forward by their positions in the prompt. Here they are first turned back by as
    much, so that they end up where the block was encoded, wherever it stands and however often.
    """

    def _load(self, plan: Plan) -> dict[str, BlockStates]:
        """Return states of a block for each place where it stands; the plan's blocks are named by place."""
        states = super()._load(plan)
        if plan.policy.is_full:
            return states
        turned: dict[str, BlockStates] = {}
        found = set()
        for index, span in plan.spans():
            if (block := plan.blocks.get(index)) is None:
                continue
            name = f"{block.block_id} at {span.start}"
            exact = states[block.block_id].unpack()
            turned[name] = turned_back(
                self.model, exact, span.start - self._encoded_at(plan, index), plan.num_tokens
            )
            found |= {name} if block.block_id in plan.found else set()
            plan.blocks[index] = replace(block, block_id=name)
        plan.found = frozenset(found)
        return turned

    def _encoded_at(self, plan: Plan, index: int) -> int:
        """Return the position of a block's first token when it was encoded."""
        if index == 0:
            return 0
        preamble, token_ids = plan.segments[0].token_ids, plan.segments[index].block_tokens
        return len(self._blocks.seen_by(token_ids, preamble=preamble, regime=plan.regime))


def turned_back(model: Model, states: KVStates, offset: int, total_length: int) -> KVStates:
    """Turn position-free keys back by ``offset``, so that moving them forward ends that much earlier."""
    keys = states.keys.clone()
    for rotary in {layer.rotary for layer in model.layers if layer.rotary is not None and offset}:
        alike = [index for index, layer in enumerate(model.layers) if layer.rotary == rotary]
        position = torch.tensor([offset], device=model.layers[alike[0]].device)
        angles = rotary.angles(position, total_length=total_length).to(keys.device)
        keys[alike] = unrotate_keys(states.keys[alike], angles, interleaved=rotary.interleaved)
    return KVStates(keys, states.values)
