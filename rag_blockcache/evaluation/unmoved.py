"""An ablation: blocks whose keys stay at the positions where they were encoded."""

from __future__ import annotations

import torch

from rag_blockcache.block_cache import BlockCache
from rag_blockcache.errors import InvalidInputError
from rag_blockcache.kv_states import BlockStates, KVStates
from rag_blockcache.model import Model
from rag_blockcache.plan import Plan
from rag_blockcache.rotary import unrotate_keys


class UnmovedBlockCache(BlockCache):
    """A ``BlockCache`` that does without position re-encoding, to measure what it is worth.

    The assembler turns keys forward by their positions in the prompt. Here they are first turned back by the
    position of their block, so that they end up where the block was encoded: at the start.
    """

    def _load(self, plan: Plan) -> dict[str, BlockStates]:
        states = super()._load(plan)
        offsets: dict[str, int] = {}
        for index, span in plan.spans():
            block = plan.blocks.get(index)
            if block is not None and offsets.setdefault(block.block_id, span.start) != span.start:
                raise InvalidInputError(
                    "a passage stands twice in a prompt, and a block that is not moved is at one place only; "
                    "leave it out"
                )
        return {
            name: turned_back(self.model, each.unpack(), offsets.get(name, 0), plan.num_tokens)
            for name, each in states.items()
        }


def turned_back(model: Model, states: KVStates, offset: int, total_length: int) -> KVStates:
    """Turn position-free keys back by ``offset``, so that moving them there leaves them at the start."""
    keys = states.keys.clone()
    for index, layer in enumerate(model.layers):
        if layer.rotary is not None and offset:
            position = torch.tensor([offset], device=layer.device)
            angles = layer.rotary.angles(position, total_length=total_length).to(keys.device)
            keys[index] = unrotate_keys(states.keys[index], angles, interleaved=layer.rotary.interleaved)
    return KVStates(keys, states.values)
