"""Block-Attention as its authors serve it: each block turned back to position 0, all of them turned on.

The server of the paper (https://arxiv.org/abs/2409.15355) runs the model over one block after the other,
each from position 0, and takes the positions out of its keys, in float32, rounded back to half precision.
The blocks are then put together layer by layer, the keys of the whole run are turned to the positions that
they have now, likewise, and the final block follows in an ordinary forward pass. It keeps nothing between
requests; the other way here keeps the blocks in memory, as the paper says one can, and does the rest per
request.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import rotate_half

from alternatives.prompts import Request
from alternatives.way import Layers, TransformersWay, cache_of, joined, layers_of


class BlockAttention(TransformersWay):
    """Puts a prompt together from blocks.

    Args:
        network: A Llama, with the rotary module of that family.
        keeps_blocks: Whether blocks that were encoded once stay in memory.
    """

    stands_for = "block"

    def __init__(self, network: PreTrainedModel, *, keeps_blocks: bool) -> None:
        super().__init__(network)
        self._keeps_blocks = keeps_blocks
        self._kept: dict[tuple[int, ...], Layers] = {}

    @torch.inference_mode()
    def prepare(self, request: Request) -> None:
        """Encode the blocks that are to be kept."""
        if self._keeps_blocks:
            for block in request.segments[:-1]:
                self._kept[block] = self._kept.get(block) or self._encoded(block)

    def cached(self, request: Request) -> DynamicCache:
        blocks = [self._kept.get(block) or self._encoded(block) for block in request.segments[:-1]]
        return cache_of(self._turned(joined(blocks), sign=1))

    def _encoded(self, block: Sequence[int]) -> Layers:
        """Return the states of a block, without positions."""
        cache = DynamicCache()
        input_ids = torch.tensor([block], device=self.network.device)
        self.network(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return self._turned(layers_of(cache), sign=-1)

    def _turned(self, layers: Layers, sign: int) -> Layers:
        """Turn the keys of a run on from position 0 to their positions, or back."""
        positions = torch.arange(layers[0][0].shape[2], device=self.network.device)[None]
        cos, sin = self.network.model.rotary_emb(layers[0][0].float(), positions)
        return [(turned(keys, cos, sign * sin), values) for keys, values in layers]


def turned(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn keys in float32, and round them to what they were."""
    wide = keys.float()
    return (wide * cos[:, None] + rotate_half(wide) * sin[:, None]).to(keys.dtype)
